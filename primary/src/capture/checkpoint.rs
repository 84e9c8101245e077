//! One checkpoint, from REPLY to the last byte.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use understudy_proto::qemu::{CheckpointEvent, CheckpointReader, PeerMessage};

use super::link::{Filled, Link};
use super::precopy::stream_error;
use super::{Acknowledge, CaptureError, CaptureTimings, Checkpoint, ColoOptions, PageSink, Phase};

/// What reading stopped at.
enum Reached {
    /// The guest is stopped.
    Stopped,
    /// The last byte of the checkpoint.
    Complete,
    /// The end of what was received.
    NeedMore,
}

/// A connection in its COLO loop.
#[derive(Debug)]
pub(super) struct Checkpoints {
    pub(super) link: Link,
    reader: CheckpointReader,
    /// Gives its allocation back when the caller has dropped the device buffers made of it.
    device: BytesMut,
}

impl Checkpoints {
    pub(super) fn new(link: Link, reader: CheckpointReader) -> Self {
        Self { link, reader, device: BytesMut::new() }
    }

    /// Lets the guest run after the full copy.
    pub(super) fn ready(&self, options: &ColoOptions) -> Result<(), CaptureError> {
        self.link.send(Phase::Start, &PeerMessage::Ready.encode(), options.silence_stopped)
    }

    /// Lets the guest run after a checkpoint that held it.
    pub(super) fn loaded(&self, options: &ColoOptions) -> Result<(), CaptureError> {
        let mut words = Vec::new();
        if options.acknowledge != Acknowledge::Early {
            words.extend(PeerMessage::Received.encode());
        }
        words.extend(PeerMessage::Loaded.encode());
        self.link.send(Phase::Hold, &words, options.silence_stopped)
    }

    /// Waits for REQUEST.
    pub(super) fn wait_request(&mut self, options: &ColoOptions) -> Result<(), CaptureError> {
        let phase = Phase::WaitReady;
        let limit = options.silence_running + options.checkpoint_delay;
        let deadline = Instant::now() + limit;
        loop {
            let mut input = self.link.unread();
            let event = self.reader.read(&mut input).map_err(stream_error(phase))?;
            let requested = matches!(event, Some(CheckpointEvent::Requested));
            let left = input.len();
            self.link.keep(left);
            if requested {
                return Ok(());
            }
            if self.link.fill(phase, deadline)? == Filled::Quiet {
                return Err(CaptureError::Silent { phase, waited: limit });
            }
        }
    }

    /// The guest is known to run and QEMU has requested. With `hold` it stays stopped until [`Self::loaded`].
    pub(super) fn take(
        &mut self,
        options: &ColoOptions,
        hold: bool,
        barrier: &mut dyn FnMut() -> Result<(), String>,
        sink: &mut dyn PageSink,
    ) -> Result<Checkpoint, CaptureError> {
        let begun = Instant::now();
        let bytes_before = self.link.received_bytes();
        let early = options.acknowledge == Acknowledge::Early;
        let limit = options.silence_stopped;
        let mut words = PeerMessage::Reply.encode().to_vec();
        if early {
            // Read by QEMU only when it has written everything; LOADED alone decides when the guest runs.
            words.extend(PeerMessage::Received.encode());
        }
        self.link.send(Phase::Stop, &words, limit)?;
        let mut phase = Phase::Stop;
        let (mut stopped, mut barrier_took, mut pages) = (begun, Duration::ZERO, 0);
        loop {
            match self.read(phase, sink, &mut pages)? {
                Reached::Stopped => {
                    stopped = Instant::now();
                    phase = Phase::Transfer;
                    barrier().map_err(|reason| CaptureError::Barrier { reason })?;
                    barrier_took = stopped.elapsed();
                    if early && !hold {
                        self.link.send(phase, &PeerMessage::Loaded.encode(), limit)?;
                    }
                }
                Reached::Complete => break,
                Reached::NeedMore => {
                    if self.link.fill(phase, Instant::now() + limit)? == Filled::Quiet {
                        return Err(CaptureError::Silent { phase, waited: limit });
                    }
                    if begun.elapsed() >= options.checkpoint_limit {
                        return Err(CaptureError::Silent { phase, waited: options.checkpoint_limit });
                    }
                }
            }
        }
        let transfer = stopped.elapsed();
        if !early && !hold {
            let words = [PeerMessage::Received.encode(), PeerMessage::Loaded.encode()].concat();
            self.link.send(phase, &words, limit)?;
        }
        let timings = CaptureTimings {
            stop: stopped - begun,
            barrier: barrier_took,
            transfer,
            bytes: self.link.received_bytes() - bytes_before,
        };
        Ok(Checkpoint { device: self.device.split().freeze(), pages, timings })
    }

    /// Reads what the link has, up to the next turning point.
    fn read(
        &mut self,
        phase: Phase,
        sink: &mut dyn PageSink,
        pages: &mut u64,
    ) -> Result<Reached, CaptureError> {
        let mut input = self.link.unread();
        let reached = loop {
            match self.reader.read(&mut input).map_err(stream_error(phase))? {
                Some(CheckpointEvent::Page(record)) => {
                    *pages += 1;
                    sink.page(record.block, record.page, record.content)?;
                }
                Some(CheckpointEvent::Stopped) => break Reached::Stopped,
                Some(CheckpointEvent::DeviceSize(bytes)) => {
                    // Bounded by the reader, and so far within what usize holds.
                    self.device.reserve(usize::try_from(bytes).unwrap_or(0));
                }
                Some(CheckpointEvent::Device(piece)) => self.device.extend_from_slice(piece),
                Some(CheckpointEvent::Complete) => break Reached::Complete,
                // The reader lets a REQUEST pass only between two checkpoints.
                Some(CheckpointEvent::MemoryEnd { .. } | CheckpointEvent::Requested) => {}
                None => break Reached::NeedMore,
            }
        };
        let left = input.len();
        self.link.keep(left);
        Ok(reached)
    }
}
