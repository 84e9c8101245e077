//! QEMU's checkpoints and the thread of the primary agent that makes them: one call at a time.

use understudy_libvirt::{DomainEvent, QmpEvent};
use understudy_primary::egress::Sealing;
use understudy_primary::engine::{CaptureFailure, Event};
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::frame::FrameBuilder;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::rpc::epoch::{Begin, DevicePiece, Pages, PrimaryMessage};
use understudy_proto::units::{BlockIndex, PageIndex};

use super::guest::{self, PAGES, Truth};
use super::{HOSTS, What, World, primary};
use crate::bugs::Bug;
use crate::invariants;

/// A call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Arm(EpochId),
    Start,
    WaitReady,
    /// Whether the guest stays stopped.
    Checkpoint(EpochId, bool),
    Disarm,
    Rescue,
}

/// The epoch while its pages are put into frames.
#[derive(Debug)]
struct Opened {
    epoch: EpochId,
    kind: EpochKind,
    builder: FrameBuilder,
}

/// What the thread is at.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    call: Option<Call>,
    calls: u64,
    pub(super) interrupted: bool,
    opened: Option<Opened>,
    /// The last part of a full copy, which waits until the guest has been let run.
    unproven: Option<Vec<PrimaryMessage>>,
    /// What came of the call, if that was decided when it began.
    result: Option<Result<Vec<PrimaryMessage>, CaptureFailure>>,
}

const ALL: u8 = (1 << PAGES) - 1;

impl World {
    pub(super) fn capture(&mut self, h: usize, number: u64, call: Call) {
        let Some(life) = self.hosts[h].life(super::host::Process::Primary) else { return };
        for what in invariants::capture(self, h, matches!(call, Call::Checkpoint(..))) {
            self.wrong(what);
        }
        let Some(protection) = self.protection(h) else { return };
        let capture = &mut protection.capture;
        if capture.call.is_some() {
            return self.wrong(format!("two calls of the capture at once: {call:?}"));
        }
        capture.call = Some(call);
        capture.calls += 1;
        let id = capture.calls;
        let took = match call {
            Call::Arm(epoch) => {
                self.begin_full(h, epoch);
                100 + self.below(300)
            }
            Call::Checkpoint(epoch, hold) => {
                self.checkpoint(h, number, epoch, hold);
                1 + self.below(6)
            }
            Call::Start => {
                protection.gate.resuming();
                self.let_run(h, number);
                2 + self.below(8)
            }
            Call::WaitReady | Call::Disarm | Call::Rescue => 1 + self.below(5),
        };
        self.after(took, What::Primary(h, life, primary::Input::Done(number, id)));
    }

    fn let_run(&mut self, h: usize, number: u64) {
        if let Some(qemu) = self.hosts[h].qemu.as_mut().filter(|qemu| qemu.stopped) {
            qemu.stopped = false;
            self.qmp(h, number, "RESUME");
        }
    }

    fn qmp(&mut self, h: usize, number: u64, name: &str) {
        let event =
            QmpEvent { name: name.to_owned(), timestamp: Default::default(), data: serde_json::Value::Null };
        // In order: they come over one connection.
        let later = if name == "STOP" { 1 } else { 2 };
        self.primary_later(h, number, later, Event::Domain(DomainEvent::Qmp(event)));
    }

    fn begin_full(&mut self, h: usize, epoch: EpochId) {
        self.seen.full_copies += 1;
        self.open_epoch(h, epoch, EpochKind::Full);
        if let Some(qemu) = &mut self.hosts[h].qemu {
            (qemu.dirty, qemu.colo) = (0, true);
        }
        self.put_pages(h, ALL);
    }

    fn open_epoch(&mut self, h: usize, epoch: EpochId, kind: EpochKind) {
        self.new_feed(h);
        let Some(protection) = self.protection(h) else { return };
        let generation = Generation(protection.generation);
        protection.capture.opened = Some(Opened { epoch, kind, builder: FrameBuilder::new() });
        if kind == EpochKind::Full {
            self.feed(h, PrimaryMessage::Seed(guest::seed()));
        }
        self.feed(h, PrimaryMessage::Begin(Begin { generation, epoch, kind }));
    }

    /// Puts pages into a frame, as they are now.
    fn put_pages(&mut self, h: usize, which: u8) {
        let Some(memory) = self.hosts[h].qemu.as_ref().map(|qemu| qemu.memory) else { return };
        let Some(opened) = self.protection(h).and_then(|protection| protection.capture.opened.as_mut())
        else {
            return;
        };
        for index in (0..PAGES).filter(|index| which & 1 << index != 0) {
            let page = memory.page(index);
            let full = opened.builder.push(BlockIndex(0), PageIndex::new(index as u64), Some(&page));
            assert!(full.is_none(), "a frame holds the whole guest");
        }
    }

    /// The guest is stopped: writes down what it is, and ends the epoch.
    fn end_epoch(&mut self, h: usize) -> Vec<PrimaryMessage> {
        self.captures += 1;
        let capture = self.captures;
        let Some(qemu) = &mut self.hosts[h].qemu else { return Vec::new() };
        let which = std::mem::take(&mut qemu.dirty);
        let (instance, memory, frames) = (qemu.instance, qemu.memory, qemu.frames);
        self.put_pages(h, which);
        let Some(protection) = self.protection(h) else { return Vec::new() };
        let generation = protection.generation;
        let Some(Opened { epoch, kind, builder }) = protection.capture.opened.take() else {
            return Vec::new();
        };
        let truth = Truth { generation, epoch: epoch.0, instance, memory, frames, committed: false };
        self.truth.insert(capture, truth);
        let (frame, totals) = builder.finish();
        let device = guest::device(capture);
        let manifest = EpochManifest::new(Generation(generation), epoch, kind, &totals, &device);
        let pages = frame.map(|frame| PrimaryMessage::Pages(Pages { epoch, frame }));
        let piece = DevicePiece { epoch, offset_bytes: 0, data: device };
        pages.into_iter().chain([PrimaryMessage::Device(piece), PrimaryMessage::Manifest(manifest)]).collect()
    }

    fn stop(&mut self, h: usize) -> bool {
        let now = self.now;
        match &mut self.hosts[h].qemu {
            Some(qemu) if !qemu.hung => {
                (qemu.stopped, qemu.stopped_since) = (true, now);
                true
            }
            _ => false,
        }
    }

    fn checkpoint(&mut self, h: usize, number: u64, epoch: EpochId, _hold: bool) {
        let gone = self.hosts[h].qemu.is_none();
        let failure =
            |left_stopped| CaptureFailure { reason: "the checkpoint failed".to_owned(), left_stopped, gone };
        if !self.stop(h) {
            let Some(protection) = self.protection(h) else { return };
            protection.capture.result = Some(Err(failure(false)));
            return;
        }
        self.qmp(h, number, "STOP");
        self.open_epoch(h, epoch, EpochKind::Delta);
        let Some(protection) = self.protection(h) else { return };
        let sealed = protection.gate.stopped(epoch, EpochKind::Delta);
        let lost = self.hosts[h].qemu.as_ref().map_or(0, |qemu| qemu.dirty);
        let last = self.end_epoch(h);
        // What the dirty log gave up is gone with the checkpoint.
        let fails = self.seldom(60) || sealed.is_err();
        let left_stopped = fails && self.seldom(2);
        let result = match fails {
            true if self.bug == Bug::ForgottenPages && lost & 0b0111 != 0 => {
                // The pages are forgotten, the epoch is sent as if it were whole.
                Ok(self.without_pages(h, epoch, last))
            }
            true => Err(failure(left_stopped)),
            false => Ok(last),
        };
        if let Some(protection) = self.protection(h) {
            protection.capture.result = Some(result);
        }
    }

    /// An epoch of no page that its manifest agrees with.
    fn without_pages(&self, _h: usize, _epoch: EpochId, last: Vec<PrimaryMessage>) -> Vec<PrimaryMessage> {
        let (_, totals) = FrameBuilder::new().finish();
        let empty = |message| match message {
            PrimaryMessage::Manifest(manifest) => Some(PrimaryMessage::Manifest(EpochManifest {
                frames: totals.frames,
                pages: totals.pages,
                frame_bytes: totals.frame_bytes,
                pages_digest: totals.digest,
                ..manifest
            })),
            PrimaryMessage::Pages(_) => None,
            other => Some(other),
        };
        last.into_iter().filter_map(empty).collect()
    }

    pub(super) fn capture_done(&mut self, h: usize, number: u64, id: u64) {
        let Some(protection) = self.ongoing(h, number) else { return };
        let capture = &mut protection.capture;
        if capture.calls != id {
            return;
        }
        let Some(call) = capture.call.take() else { return };
        let interrupted = std::mem::take(&mut capture.interrupted);
        let there = self.hosts[h].qemu.as_ref().is_some_and(|qemu| !qemu.hung);
        let gone = self.hosts[h].qemu.is_none();
        let failed = |reason: &str| CaptureFailure { reason: reason.to_owned(), left_stopped: false, gone };
        let broken = !there || self.seldom(80);
        let event = match call {
            Call::Arm(_) if interrupted || broken => {
                self.leave_colo(h, number);
                Event::CaptureFailed(failed("the full copy failed"))
            }
            Call::Arm(epoch) => return self.armed(h, number, epoch),
            Call::WaitReady if interrupted || broken => {
                self.leave_colo(h, number);
                Event::CaptureFailed(failed("QEMU did not come to its next checkpoint"))
            }
            Call::WaitReady => Event::Ready,
            Call::Start if broken => {
                self.leave_colo(h, number);
                Event::CaptureFailed(failed("QEMU did not start the guest"))
            }
            Call::Start => {
                let last = self.protection(h).and_then(|protection| protection.capture.unproven.take());
                last.into_iter().flatten().for_each(|message| self.feed(h, message));
                Event::Ready
            }
            Call::Checkpoint(_, hold) => return self.captured(h, number, hold),
            Call::Disarm => {
                self.leave_colo(h, number);
                Event::Disarmed(if there { Ok(()) } else { Err(failed("QEMU does not answer")) })
            }
            Call::Rescue => {
                self.leave_colo(h, number);
                Event::Rescued(if there { Ok(()) } else { Err(failed("QEMU does not answer")) })
            }
        };
        self.primary_event(h, number, event);
    }

    fn leave_colo(&mut self, h: usize, number: u64) {
        if let Some(protection) = self.protection(h) {
            protection.capture.unproven = None;
            protection.capture.opened = None;
        }
        if let Some(qemu) = self.hosts[h].qemu.as_mut().filter(|qemu| !qemu.hung) {
            qemu.colo = false;
        }
        if self.hosts[h].qemu.as_ref().is_some_and(|qemu| !qemu.hung) {
            self.let_run(h, number);
        }
    }

    fn armed(&mut self, h: usize, number: u64, epoch: EpochId) {
        self.stop(h);
        self.qmp(h, number, "STOP");
        let Some(protection) = self.protection(h) else { return };
        let sealing = protection.gate.stopped(epoch, EpochKind::Full);
        let last = self.end_epoch(h);
        let stay_stopped = match sealing {
            Ok(sealing) => sealing == Sealing::StayStopped,
            Err(error) => {
                self.leave_colo(h, number);
                let reason = error.to_string();
                let failure = CaptureFailure { reason, left_stopped: false, gone: false };
                return self.primary_event(h, number, Event::CaptureFailed(failure));
            }
        };
        if let Some(protection) = self.protection(h) {
            protection.listening = true;
            if !stay_stopped {
                protection.capture.unproven = Some(last.clone());
            }
        }
        self.note(|| format!("{} full copy {epoch} captured", HOSTS[h]));
        self.primary_event(h, number, Event::Armed { stay_stopped });
        if stay_stopped {
            last.into_iter().for_each(|message| self.feed(h, message));
        }
    }

    fn captured(&mut self, h: usize, number: u64, hold: bool) {
        let result = self.protection(h).and_then(|protection| protection.capture.result.take());
        match result {
            Some(Ok(last)) => {
                if !hold {
                    self.let_run(h, number);
                }
                if let Some(protection) = self.protection(h) {
                    protection.listening = true;
                }
                self.primary_event(h, number, Event::Captured);
                last.into_iter().for_each(|message| self.feed(h, message));
            }
            Some(Err(failure)) => {
                if !failure.left_stopped {
                    self.leave_colo(h, number);
                }
                self.primary_event(h, number, Event::CaptureFailed(failure));
            }
            None => {}
        }
    }
}
