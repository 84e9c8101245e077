//! A guest under Understudy's capture whose epochs become frames, as in the agent, and go nowhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_primary::capture::{
    Checkpoint, CheckpointSource, ColoOptions, ColoSource, PageSink, SinkClosed,
};
use understudy_proto::frame::FrameBuilder;
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::{BlockIndex, PageData, PageIndex};

use crate::guest::Guest;

/// See the module's description.
pub(crate) struct Captured {
    source: ColoSource,
    sink: Frames,
    doze: Duration,
}

/// One epoch.
pub(crate) struct Epoch {
    /// How long the guest ran, as far as the capture is concerned.
    pub(crate) ran: Duration,
    /// From the order to stop to the last byte.
    pub(crate) took: Duration,
    pub(crate) checkpoint: Checkpoint,
}

impl Captured {
    /// Makes the full copy and lets the guest run.
    pub(crate) fn arm(guest: &Guest) -> anyhow::Result<Self> {
        let mut source = ColoSource::new(guest.monitor.clone(), ColoOptions::default())?;
        let mut sink = Frames { builder: FrameBuilder::new(), doze: Duration::ZERO };
        source.arm(&mut sink)?;
        source.start()?;
        Ok(Self { source, sink, doze: Duration::ZERO })
    }

    /// Has the reader sleep at the first page of every epoch: long enough, and QEMU writes it without anybody beside it.
    pub(crate) fn doze(&mut self, time: Duration) {
        self.doze = time;
    }

    /// Lets the guest run for `length` and takes an epoch of it.
    pub(crate) fn epoch(&mut self, length: Duration) -> anyhow::Result<Epoch> {
        let began = Instant::now();
        self.source.wait_ready()?;
        std::thread::sleep(length.saturating_sub(began.elapsed()));
        let ran = began.elapsed();
        self.sink = Frames { builder: FrameBuilder::new(), doze: self.doze };
        let checkpoint = self.source.checkpoint(&mut || Ok(()), &mut self.sink)?;
        Ok(Epoch { ran, took: began.elapsed() - ran, checkpoint })
    }

    pub(crate) fn disarm(&mut self) -> anyhow::Result<()> {
        Ok(self.source.disarm()?)
    }
}

struct Frames {
    builder: FrameBuilder,
    /// Before the next page.
    doze: Duration,
}

impl PageSink for Frames {
    fn layout(&mut self, _: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        Ok(())
    }

    fn page(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
    ) -> Result<(), SinkClosed> {
        if !self.doze.is_zero() {
            std::thread::sleep(std::mem::take(&mut self.doze));
        }
        drop(self.builder.push(block, page, content));
        Ok(())
    }
}
