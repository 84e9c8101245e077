//! From the capture's thread into the stream: pages become frames, frames become messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;
use understudy_proto::codec::CodecSet;
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::frame::{FrameBuilder, FrameTotals};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::limits::FRAME_TARGET_BYTES;
use understudy_proto::rpc::epoch::{Begin, DevicePiece, EpochRef, Pages, PrimaryMessage, Seed};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

use crate::capture::{PageSink, SinkClosed};
use crate::encode::thread::{EncodeThread, Job};

/// Frames of a full copy between capture and stream. Beyond them the capture waits, which slows QEMU's copy down.
const FULL_FRAMES: usize = 16;

/// Frames of a delta beyond what all of memory takes: header bytes, the open frame, seed and end.
const SPARE_FRAMES: usize = 64;

/// Encoded frames that wait for the stream. The thread that encodes may wait, the capture behind it does not.
const ENCODED_FRAMES: usize = 8;

/// A piece of an epoch, in order.
#[derive(Debug)]
pub(crate) enum Part {
    Seed(Box<Seed>),
    Frame(Bytes),
    End {
        device: Bytes,
        totals: FrameTotals,
    },
    /// The epoch was captured, or is being captured, and cannot be sent.
    Fault(String),
}

/// An epoch on its way out of the capture. If it breaks off before its end the epoch was given up.
#[derive(Debug)]
pub struct Feed {
    pub(super) messages: EpochMessages,
    pub(super) parts: mpsc::Receiver<Part>,
}

/// How far a full copy is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct FullProgress {
    pages: AtomicU64,
    total_pages: AtomicU64,
}

impl FullProgress {
    /// 0 to 99; a page that comes again counts again, so it is an estimate.
    pub fn percent(&self) -> u8 {
        let total = self.total_pages.load(Ordering::Relaxed).max(1);
        let percent = self.pages.load(Ordering::Relaxed).saturating_mul(100) / total;
        u8::try_from(percent.min(99)).unwrap_or(99)
    }
}

/// Makes the two ends of an epoch's way. A delta of a guest with `memory_bytes` never waits in the sink: QEMU may be
/// holding the guest while it is read. With `encoding` the epoch goes through that thread, which may use these codecs.
pub fn feed(
    generation: Generation,
    epoch: EpochId,
    kind: EpochKind,
    memory_bytes: u64,
    progress: Arc<FullProgress>,
    encoding: Option<(&EncodeThread, CodecSet)>,
) -> (EpochSink, Feed) {
    let frames = match kind {
        EpochKind::Full => FULL_FRAMES,
        EpochKind::Delta => {
            usize::try_from(memory_bytes / (FRAME_TARGET_BYTES - PAGE_BYTES) as u64)
                .unwrap_or(usize::MAX >> 4)
                + SPARE_FRAMES
        }
    };
    let (parts_in, parts) = mpsc::channel(frames);
    let sink =
        EpochSink { builder: FrameBuilder::new(), parts: parts_in, domain_xml: String::new(), progress };
    let parts = match encoding {
        Some((thread, codecs)) => {
            let (to, encoded) = mpsc::channel(ENCODED_FRAMES);
            match thread.encode(Job { generation, epoch, kind, codecs, from: parts, to }) {
                Ok(()) => encoded,
                // Without the thread it goes as it is.
                Err(job) => job.from,
            }
        }
        None => parts,
    };
    (sink, Feed { messages: EpochMessages { generation, epoch, kind }, parts })
}

/// Where the capture's pages go.
#[derive(Debug)]
pub struct EpochSink {
    builder: FrameBuilder,
    parts: mpsc::Sender<Part>,
    /// Of a full copy.
    domain_xml: String,
    progress: Arc<FullProgress>,
}

impl EpochSink {
    /// Gives the domain's XML, which goes with a full copy.
    pub fn describe(&mut self, domain_xml: String) {
        self.domain_xml = domain_xml;
    }

    /// Ends the epoch: all pages are here, and this is the device state.
    ///
    /// # Errors
    /// If nobody takes the epoch any more.
    pub fn finish(self, device: Bytes) -> Result<(), SinkClosed> {
        let (last, totals) = self.builder.finish();
        if let Some(frame) = last {
            self.parts.blocking_send(Part::Frame(frame)).map_err(|_| SinkClosed)?;
        }
        self.parts.blocking_send(Part::End { device, totals }).map_err(|_| SinkClosed)
    }
}

impl PageSink for EpochSink {
    fn layout(&mut self, layout: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        self.progress.pages.store(0, Ordering::Relaxed);
        self.progress.total_pages.store(layout.total_bytes() / PAGE_BYTES as u64, Ordering::Relaxed);
        let domain_xml = std::mem::take(&mut self.domain_xml);
        let seed = Seed { layout: MemoryLayout::clone(layout), domain_xml };
        self.parts.blocking_send(Part::Seed(Box::new(seed))).map_err(|_| SinkClosed)
    }

    fn page(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
    ) -> Result<(), SinkClosed> {
        self.progress.pages.fetch_add(1, Ordering::Relaxed);
        match self.builder.push(block, page, content) {
            Some(frame) => self.parts.blocking_send(Part::Frame(frame)).map_err(|_| SinkClosed),
            None => Ok(()),
        }
    }
}

/// Turns the parts of an epoch into its messages.
#[derive(Debug)]
pub(super) struct EpochMessages {
    generation: Generation,
    epoch: EpochId,
    pub(super) kind: EpochKind,
}

impl EpochMessages {
    /// What opens the epoch before its first part: that of a full epoch is behind the seed.
    pub(super) fn begin(&self) -> Option<PrimaryMessage> {
        (self.kind == EpochKind::Delta).then(|| self.begin_message())
    }

    fn begin_message(&self) -> PrimaryMessage {
        PrimaryMessage::Begin(Begin { generation: self.generation, epoch: self.epoch, kind: self.kind })
    }

    /// The epoch.
    pub(super) fn at(&self) -> EpochRef {
        EpochRef { generation: self.generation, epoch: self.epoch }
    }

    /// The messages of a part; none of a fault.
    pub(super) fn of(&self, part: Part) -> Vec<PrimaryMessage> {
        let epoch = self.epoch;
        match part {
            Part::Fault(_) => Vec::new(),
            Part::Seed(seed) => vec![PrimaryMessage::Seed(*seed), self.begin_message()],
            Part::Frame(frame) => vec![PrimaryMessage::Pages(Pages { epoch, frame })],
            Part::End { device, totals } => {
                let manifest = EpochManifest::new(self.generation, epoch, self.kind, &totals, &device);
                let pieces = DevicePiece::split(epoch, &device).map(PrimaryMessage::Device);
                pieces.chain([PrimaryMessage::Manifest(manifest)]).collect()
            }
        }
    }
}

/// The next part; `None` when the sink is gone.
///
/// # Cancel safety
/// Parts stay in the channel.
pub(super) async fn next(feed: &mut Option<(EpochMessages, mpsc::Receiver<Part>)>) -> Option<Part> {
    match feed {
        Some((_, parts)) => parts.recv().await,
        None => std::future::pending().await,
    }
}
