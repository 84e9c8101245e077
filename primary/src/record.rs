//! Test hook: what capture gives, page by page, in files: traces of what real guests do to their memory are made of them.
//!
//! `DIR/blocks` has a line for each RAM block, its bytes and its name. `DIR/N.frames` are the pages of epoch N as raw frames;
//! 0 is the full copy, in which a page may come several times. A file has its name once it is complete.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tracing::error;
use understudy_proto::frame::FrameBuilder;
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::{BlockIndex, PageData, PageIndex};

use crate::capture::{Armed, CaptureError, Checkpoint, CheckpointSource, Interrupter, PageSink, SinkClosed};

/// A source whose epochs are recorded. One that cannot be written ends capture.
pub struct Recording {
    source: Box<dyn CheckpointSource>,
    folder: PathBuf,
    epoch: u64,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording")
            .field("folder", &self.folder)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

impl Recording {
    /// Records into `folder`, which is made.
    pub fn new(source: Box<dyn CheckpointSource>, folder: PathBuf) -> Self {
        Self { source, folder, epoch: 0 }
    }
}

/// Both get every page: the file, and who has asked for it.
struct Tee<'a> {
    sink: &'a mut dyn PageSink,
    folder: &'a Path,
    partial: PathBuf,
    epoch: u64,
    file: Option<File>,
    frames: FrameBuilder,
}

impl<'a> Tee<'a> {
    fn new(sink: &'a mut dyn PageSink, folder: &'a Path, epoch: u64) -> Self {
        let partial = folder.join(format!("{epoch}.partial"));
        Self { sink, folder, partial, epoch, file: None, frames: FrameBuilder::new() }
    }

    fn write(&mut self, frame: Option<Bytes>) -> std::io::Result<()> {
        let Some(frame) = frame else { return Ok(()) };
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(File::create(&self.partial)?),
        };
        file.write_all(&frame)
    }

    fn finish(mut self) -> std::io::Result<()> {
        let (last, _) = std::mem::take(&mut self.frames).finish();
        self.write(last)?;
        if self.file.is_none() {
            // An epoch without a page is one as well.
            File::create(&self.partial)?;
        }
        fs::rename(&self.partial, self.folder.join(format!("{}.frames", self.epoch)))
    }
}

/// The only error a sink has.
fn closed(error: &std::io::Error) -> SinkClosed {
    error!(%error, "the epoch cannot be recorded");
    SinkClosed
}

impl PageSink for Tee<'_> {
    fn layout(&mut self, layout: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        let line =
            |block: &understudy_proto::layout::RamBlock| format!("{} {}\n", block.used_bytes, block.name);
        let blocks: String = layout.blocks().iter().map(line).collect();
        // What another protection has left is of no use with this one.
        let _ = fs::remove_dir_all(self.folder);
        fs::create_dir_all(self.folder)
            .and_then(|()| fs::write(self.folder.join("blocks"), blocks))
            .map_err(|error| closed(&error))?;
        self.sink.layout(layout)
    }

    fn page(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
    ) -> Result<(), SinkClosed> {
        let frame = self.frames.push(block, page, content);
        self.write(frame).map_err(|error| closed(&error))?;
        self.sink.page(block, page, content)
    }
}

impl CheckpointSource for Recording {
    fn arm(&mut self, sink: &mut dyn PageSink) -> Result<Armed, CaptureError> {
        self.epoch = 0;
        let mut tee = Tee::new(sink, &self.folder, 0);
        let armed = self.source.arm(&mut tee)?;
        tee.finish().map_err(|error| closed(&error))?;
        Ok(armed)
    }

    fn start(&mut self) -> Result<(), CaptureError> {
        self.source.start()
    }

    fn wait_ready(&mut self) -> Result<(), CaptureError> {
        self.source.wait_ready()
    }

    fn checkpoint(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), String>,
        sink: &mut dyn PageSink,
    ) -> Result<Checkpoint, CaptureError> {
        self.epoch += 1;
        let mut tee = Tee::new(sink, &self.folder, self.epoch);
        let checkpoint = self.source.checkpoint(barrier, &mut tee)?;
        tee.finish().map_err(|error| closed(&error))?;
        Ok(checkpoint)
    }

    fn hold_next(&mut self) {
        self.source.hold_next();
    }

    fn still_stopped(&mut self) -> Result<(), CaptureError> {
        self.source.still_stopped()
    }

    fn disarm(&mut self) -> Result<(), CaptureError> {
        self.source.disarm()
    }

    fn interrupter(&self) -> Interrupter {
        self.source.interrupter()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use understudy_proto::codec;
    use understudy_proto::frame::records;
    use understudy_proto::layout::RamBlock;
    use understudy_proto::units::PAGE_BYTES;

    use super::*;
    use crate::capture::{ArmTimings, CaptureTimings};

    /// Writes what it is told, also what the page holds already.
    struct Scripted(Vec<Vec<(u64, u8)>>, Interrupter);

    impl Scripted {
        fn epoch(&mut self, sink: &mut dyn PageSink) -> Result<u64, CaptureError> {
            let pages = self.0.remove(0);
            for (page, byte) in &pages {
                sink.page(BlockIndex(0), PageIndex::new(*page), Some(&[*byte; PAGE_BYTES]))?;
            }
            Ok(pages.len() as u64)
        }
    }

    fn layout() -> Arc<MemoryLayout> {
        let block = RamBlock { name: "pc.ram".into(), used_bytes: 8 * PAGE_BYTES as u64 };
        Arc::new(MemoryLayout::new(vec![block], vec![], 2).unwrap())
    }

    impl CheckpointSource for Scripted {
        fn arm(&mut self, sink: &mut dyn PageSink) -> Result<Armed, CaptureError> {
            sink.layout(&layout())?;
            let pages = self.epoch(sink)?;
            let timings = ArmTimings { precopy: Duration::ZERO, switchover: Duration::ZERO, bytes: 0 };
            Ok(Armed { layout: layout(), device: Bytes::new(), dialect: None, pages, timings })
        }

        fn start(&mut self) -> Result<(), CaptureError> {
            Ok(())
        }

        fn wait_ready(&mut self) -> Result<(), CaptureError> {
            Ok(())
        }

        fn checkpoint(
            &mut self,
            _: &mut dyn FnMut() -> Result<(), String>,
            sink: &mut dyn PageSink,
        ) -> Result<Checkpoint, CaptureError> {
            let pages = self.epoch(sink)?;
            Ok(Checkpoint { device: Bytes::new(), pages, timings: CaptureTimings::default() })
        }

        fn hold_next(&mut self) {}

        fn still_stopped(&mut self) -> Result<(), CaptureError> {
            Ok(())
        }

        fn disarm(&mut self) -> Result<(), CaptureError> {
            Ok(())
        }

        fn interrupter(&self) -> Interrupter {
            self.1.clone()
        }
    }

    struct Counting(usize);

    impl PageSink for Counting {
        fn layout(&mut self, _: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
            Ok(())
        }

        fn page(&mut self, _: BlockIndex, _: PageIndex, _: Option<&PageData>) -> Result<(), SinkClosed> {
            self.0 += 1;
            Ok(())
        }
    }

    #[test]
    fn every_page_of_an_epoch_is_recorded_also_one_that_is_written_with_what_it_held() {
        let folder = tempfile::tempdir().unwrap();
        let script = vec![vec![(0, 1), (1, 2), (0, 3)], vec![(1, 2), (5, 0)], vec![]];
        let wanted = script.clone();
        let source = Scripted(script, Interrupter::new().unwrap());
        let mut recording = Recording::new(Box::new(source), folder.path().join("g1"));
        let mut sink = Counting(0);
        recording.arm(&mut sink).unwrap();
        for _ in 0..2 {
            recording.checkpoint(&mut || Ok(()), &mut sink).unwrap();
        }
        assert_eq!(sink.0, 5);
        let blocks = fs::read_to_string(folder.path().join("g1/blocks")).unwrap();
        assert_eq!(blocks, "32768 pc.ram\n");
        for (number, pages) in wanted.iter().enumerate() {
            let frames = fs::read(folder.path().join(format!("g1/{number}.frames"))).unwrap();
            let layout = layout();
            let read = records(&frames, &layout).map(|record| {
                let record = record.unwrap();
                let mut content = [9; PAGE_BYTES];
                codec::apply(&record, &mut content).unwrap();
                (record.page.get(), content[7])
            });
            assert_eq!(&read.collect::<Vec<_>>(), pages, "epoch {number}");
        }
        assert!(fs::read_dir(folder.path().join("g1")).unwrap().count() == 4, "nothing partial is left");
    }
}
