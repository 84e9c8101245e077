//! Checkpoints of a micro-VM.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use understudy_libvirt::RunState;
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

use super::dirty::DirtyPage;
use super::error::MicroError;
use super::vm::MicroVm;
use crate::capture::{
    ArmTimings, Armed, CaptureError, CaptureTimings, Checkpoint, CheckpointSource, Interrupter, PageSink,
    Phase,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// At the end of the full copy.
    Stopped,
    /// At the end of a checkpoint that holds it.
    Held,
    Running,
}

/// A [`CheckpointSource`] over a [`MicroVm`], which somebody else has started.
#[derive(Debug)]
pub struct MicroSource {
    vm: MicroVm,
    state: State,
    /// The next checkpoint leaves the guest stopped.
    hold: bool,
    interrupter: Interrupter,
    dirty: Vec<DirtyPage>,
    /// Pages are copied here at the stop, and handed on while the guest runs again.
    arena: Vec<PageData>,
}

impl MicroSource {
    /// For a guest that runs.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new(vm: MicroVm) -> Result<Self, MicroError> {
        let interrupter = Interrupter::new().map_err(MicroError::system("make an eventfd"))?;
        Ok(Self { vm, state: State::Idle, hold: false, interrupter, dirty: Vec::new(), arena: Vec::new() })
    }

    fn expect(&self, call: &'static str, state: State) -> Result<(), CaptureError> {
        if self.interrupter.is_interrupted() {
            return Err(CaptureError::Interrupted);
        }
        if self.state == state {
            return Ok(());
        }
        let state = match self.state {
            State::Idle => "idle",
            State::Stopped => "at the end of its full copy",
            State::Held => "held at a checkpoint",
            State::Running => "running",
        };
        Err(CaptureError::OutOfTurn { call, state })
    }

    /// Whatever happened, the guest runs on and nothing is tracked. If that fails, that is the error.
    fn release<T>(&mut self, result: Result<T, CaptureError>) -> Result<T, CaptureError> {
        let Err(cause) = result else { return result };
        match self.let_go() {
            Ok(()) => Err(cause),
            Err(source) => Err(CaptureError::GuestLeftStopped {
                cause: Box::new(cause),
                reason: Box::new(CaptureError::Micro { phase: Phase::Exit, source }),
            }),
        }
    }

    fn let_go(&mut self) -> Result<(), MicroError> {
        self.state = State::Idle;
        if !self.vm.is_running() {
            self.vm.run()?;
        }
        self.vm.track(false)
    }

    fn full_copy(&mut self, sink: &mut dyn PageSink) -> Result<Armed, CaptureError> {
        let failed = |phase| move |source| CaptureError::Micro { phase, source };
        let began = Instant::now();
        let layout = Arc::clone(self.vm.layout());
        sink.layout(&layout)?;
        self.vm.track(true).map_err(failed(Phase::Setup))?;
        let mut pages = 0;
        let mut content = [0; PAGE_BYTES];
        for (slot, block) in (0u16..).zip(layout.blocks()) {
            for page in 0..block.pages() {
                if self.interrupter.is_interrupted() {
                    return Err(CaptureError::Interrupted);
                }
                copy(&self.vm, (slot, page), &mut content).map_err(failed(Phase::Precopy))?;
                sink.page(BlockIndex(slot), PageIndex::new(page), Some(&content))?;
                pages += 1;
            }
        }
        let precopy = began.elapsed();
        let device = self.stop_and_copy().map_err(failed(Phase::Switchover))?;
        let switchover = began.elapsed() - precopy;
        self.hand_on(sink)?;
        pages += self.dirty.len() as u64;
        let timings = ArmTimings { precopy, switchover, bytes: pages * PAGE_BYTES as u64 };
        Ok(Armed { layout, device, dialect: None, pages, timings })
    }

    /// Stops the guest and takes its state and the pages it has dirtied.
    fn stop_and_copy(&mut self) -> Result<Bytes, MicroError> {
        self.vm.pause()?;
        self.copy_stopped()
    }

    fn copy_stopped(&mut self) -> Result<Bytes, MicroError> {
        let state = self.vm.save()?;
        self.dirty.clear();
        self.vm.take_dirty(&mut self.dirty)?;
        if self.arena.len() < self.dirty.len() {
            self.arena.resize(self.dirty.len(), [0; PAGE_BYTES]);
        }
        for (at, content) in self.dirty.iter().zip(&mut self.arena) {
            copy(&self.vm, *at, content)?;
        }
        Ok(state.encode().into())
    }

    fn hand_on(&self, sink: &mut dyn PageSink) -> Result<(), CaptureError> {
        for ((slot, page), content) in self.dirty.iter().zip(&self.arena) {
            sink.page(BlockIndex(*slot), PageIndex::new(*page), Some(content))?;
        }
        Ok(())
    }

    fn one(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), String>,
        sink: &mut dyn PageSink,
    ) -> Result<Checkpoint, CaptureError> {
        let failed = |phase| move |source| CaptureError::Micro { phase, source };
        let began = Instant::now();
        self.vm.pause().map_err(failed(Phase::Stop))?;
        let stop = began.elapsed();
        barrier().map_err(|reason| CaptureError::Barrier { reason })?;
        let barrier = began.elapsed() - stop;
        let device = self.copy_stopped().map_err(failed(Phase::Transfer))?;
        if std::mem::take(&mut self.hold) {
            self.state = State::Held;
        } else {
            self.vm.run().map_err(failed(Phase::Transfer))?;
        }
        let transfer = began.elapsed() - stop;
        self.hand_on(sink)?;
        let pages = self.dirty.len() as u64;
        let bytes = pages * PAGE_BYTES as u64 + device.len() as u64;
        Ok(Checkpoint { device, pages, timings: CaptureTimings { stop, barrier, transfer, bytes } })
    }
}

fn copy(vm: &MicroVm, at: DirtyPage, to: &mut PageData) -> Result<(), MicroError> {
    if vm.read_page(at, to) {
        Ok(())
    } else {
        Err(MicroError::Exit { exit: format!("page {:#x} of slot {} is dirty and not there", at.1, at.0) })
    }
}

impl CheckpointSource for MicroSource {
    fn arm(&mut self, sink: &mut dyn PageSink) -> Result<Armed, CaptureError> {
        self.expect("arm", State::Idle)?;
        let armed = self.full_copy(sink);
        let armed = self.release(armed)?;
        self.state = State::Stopped;
        Ok(armed)
    }

    fn start(&mut self) -> Result<(), CaptureError> {
        let from = if self.state == State::Held { State::Held } else { State::Stopped };
        let started = self.expect("start", from).and_then(|()| {
            self.vm.run().map_err(|source| CaptureError::Micro { phase: Phase::Start, source })
        });
        self.release(started)?;
        self.state = State::Running;
        Ok(())
    }

    fn wait_ready(&mut self) -> Result<(), CaptureError> {
        let ready = self.expect("wait_ready", State::Running);
        self.release(ready)
    }

    fn checkpoint(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), String>,
        sink: &mut dyn PageSink,
    ) -> Result<Checkpoint, CaptureError> {
        let checkpoint = self.expect("checkpoint", State::Running).and_then(|()| self.one(barrier, sink));
        self.release(checkpoint)
    }

    fn hold_next(&mut self) {
        self.hold = true;
    }

    fn still_stopped(&mut self) -> Result<(), CaptureError> {
        if matches!(self.state, State::Stopped | State::Held) && !self.vm.is_running() {
            return Ok(());
        }
        Err(CaptureError::RanOn { state: RunState::Running })
    }

    fn disarm(&mut self) -> Result<(), CaptureError> {
        self.hold = false;
        let result = if self.state == State::Idle { Ok(()) } else { self.let_go() };
        self.interrupter.clear();
        result.map_err(|source| CaptureError::Micro { phase: Phase::Exit, source })
    }

    fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }
}
