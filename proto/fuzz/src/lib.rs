//! What the fuzz targets share.

use std::sync::Arc;
use understudy_proto::digest::{Digest, PagesDigest};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::qemu::{
    CheckpointEvent, CheckpointReader, EndSeen, IncomingWriter, PrecopyEvent, PrecopyReader,
};
use understudy_proto::units::PAGE_BYTES;

/// The shortest device buffer.
pub const DEVICE: &[u8] = b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02\x7e\0\0\0\x05\0";

/// A guest of two small blocks.
pub fn layout() -> Arc<MemoryLayout> {
    let block =
        |name: &str, pages: u64| RamBlock { name: name.into(), used_bytes: pages * PAGE_BYTES as u64 };
    let blocks = vec![block("pc.ram", 256), block("pc.bios", 16)];
    Arc::new(MemoryLayout::new(blocks, b"\0\0\0\x06pc-7.2".to_vec(), 2).expect("a valid layout"))
}

/// The reader of that guest's connection after the precopy.
pub fn checkpoint_reader() -> CheckpointReader {
    let (stream, _) = IncomingWriter::new(vec![], layout())
        .and_then(|writer| writer.finish(DEVICE))
        .expect("a valid stream");
    let mut reader = PrecopyReader::new();
    let mut input = &stream[..];
    while reader.read(&mut input).expect("the writer's stream").is_some() {}
    reader.finish(EndSeen::ColoState).expect("the writer's stream").checkpoints
}

/// What came of reading some bytes. Cutting them elsewhere must not change it.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    events: Vec<String>,
    pages: Digest,
    opaque: Digest,
    error: Option<String>,
    left_bytes: usize,
}

#[derive(Default)]
struct Recorder {
    events: Vec<String>,
    pages: PagesDigest,
    opaque: Vec<u8>,
}

impl Recorder {
    fn finish(self, error: Option<String>, left_bytes: usize) -> Outcome {
        let (pages, opaque) = (self.pages.finish(), Digest::of(&self.opaque));
        Outcome { events: self.events, pages, opaque, error, left_bytes }
    }
}

/// Gives `read` the bytes in pieces, putting back what it leaves over; ends at its first error.
fn pieces(
    data: &[u8],
    piece_bytes: usize,
    mut read: impl FnMut(&mut &[u8]) -> Result<(), String>,
) -> (Option<String>, usize) {
    let (mut start, mut end) = (0, 0);
    while end < data.len() {
        end = data.len().min(end + piece_bytes.max(1));
        let mut input = &data[start..end];
        let result = read(&mut input);
        start = end - input.len();
        if let Err(error) = result {
            // The error stays where it is, whatever follows.
            return (Some(error), data.len() - start);
        }
    }
    (None, end - start)
}

/// Reads a precopy.
pub fn read_precopy(data: &[u8], piece_bytes: usize) -> Outcome {
    let mut reader = PrecopyReader::new();
    let mut recorder = Recorder::default();
    let (error, left_bytes) = pieces(data, piece_bytes, |input| {
        while let Some(event) = reader.read(input).map_err(|e| e.to_string())? {
            match event {
                PrecopyEvent::Page(p) => recorder.pages.update(p.block, p.page, p.content),
                other => recorder.events.push(format!("{other:?}")),
            }
        }
        Ok(())
    });
    let error = error.or_else(|| match reader.finish(EndSeen::Quiet) {
        Ok(precopy) => {
            recorder.opaque.extend_from_slice(&precopy.device);
            None
        }
        Err(e) => Some(e.to_string()),
    });
    recorder.finish(error, left_bytes)
}

/// Reads checkpoints of [`layout`]'s guest.
pub fn read_checkpoints(data: &[u8], piece_bytes: usize) -> Outcome {
    let mut reader = checkpoint_reader();
    let mut recorder = Recorder::default();
    let (error, left_bytes) = pieces(data, piece_bytes, |input| {
        while let Some(event) = reader.read(input).map_err(|e| e.to_string())? {
            match event {
                CheckpointEvent::Page(p) => recorder.pages.update(p.block, p.page, p.content),
                CheckpointEvent::Device(piece) => recorder.opaque.extend_from_slice(piece),
                other => recorder.events.push(format!("{other:?}")),
            }
        }
        Ok(())
    });
    recorder.finish(error, left_bytes)
}
