//! The gate as the kernel makes it: `sch_plug` on the way from the guest to the network, with its real counts. It
//! remembers one sealed epoch: a second BUFFER before the release forgets how much the first one was.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use understudy_primary::egress::engine::Kind;
use understudy_primary::egress::{GateError, Held, Op, OutputGate, Port};

use crate::bugs::Bug;

/// What the guest has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) instance: u16,
    /// Number of it among what the instance sent.
    pub(crate) number: u64,
    /// The request it answers; how far the guest is, and its history, then.
    pub(crate) request: u64,
    pub(crate) history: u64,
}

/// The qdisc.
#[derive(Debug, Default)]
pub(crate) struct Plug {
    queue: VecDeque<Frame>,
    current: usize,
    last: usize,
    to_release: usize,
    indefinite: bool,
    /// What has left it and is not on the network yet.
    pub(crate) out: Vec<Frame>,
    /// Operations fail while it is set.
    pub(crate) broken: bool,
    /// A planted mistake.
    pub(crate) leaks: bool,
    /// The guest's way out does not lead through it any more.
    pub(crate) removed: bool,
    /// The guest's way out ends in it.
    dead: bool,
}

impl Plug {
    pub(crate) fn enqueue(&mut self, frame: Frame) {
        if self.dead {
            return;
        }
        self.queue.push_back(frame);
        if !self.indefinite {
            self.current += 1;
        }
        self.drain();
    }

    pub(crate) fn buffer(&mut self) {
        self.last = self.current;
        self.current = 0;
        self.indefinite = false;
    }

    fn release_one(&mut self) {
        self.to_release += self.last;
        self.last = 0;
        self.drain();
    }

    pub(crate) fn release_all(&mut self) {
        (self.indefinite, self.to_release, self.last, self.current) = (true, 0, 0, 0);
        self.drain();
    }

    fn drain(&mut self) {
        while self.indefinite || self.leaks || self.to_release > 0 {
            let Some(frame) = self.queue.pop_front() else { return };
            if !self.indefinite {
                self.to_release = self.to_release.saturating_sub(1);
            }
            self.out.push(frame);
        }
    }

    /// Whether frames go through.
    pub(crate) fn is_open(&self) -> bool {
        self.indefinite || self.leaks
    }
}

/// The kernel's end of it: outlives the agent that made it.
pub(crate) type SharedPlug = Arc<Mutex<Plug>>;

/// The agent's end of it.
#[derive(Debug)]
pub(crate) struct PlugGate {
    pub(crate) plug: SharedPlug,
    pub(crate) bug: Bug,
}

pub(crate) fn lock<T>(shared: &Arc<Mutex<T>>) -> MutexGuard<'_, T> {
    shared.lock().expect("one thread")
}

impl OutputGate for PlugGate {
    fn apply(&mut self, op: Op) -> Result<(), GateError> {
        let mut plug = lock(&self.plug);
        if plug.broken {
            return Err(GateError::NoDevice { device: "vnet0".to_owned() });
        }
        match op.kind() {
            Kind::Seal => plug.buffer(),
            Kind::ReleaseSealed => plug.release_one(),
            Kind::Flush => {
                plug.release_all();
                plug.buffer();
            }
        }
        if self.bug == Bug::ReleaseBeforeAck && op.kind() == Kind::Seal {
            plug.release_one();
        }
        Ok(())
    }

    fn held(&mut self) -> Result<Held, GateError> {
        let plug = lock(&self.plug);
        let frames = plug.queue.len() as u64;
        Ok(Held { frames, bytes: frames * 1500, dropped: 0 })
    }

    fn adjust(&mut self, _: &[Port], _: bool) -> Result<(), GateError> {
        Ok(())
    }

    fn intact(&mut self) -> Result<(), GateError> {
        Ok(())
    }

    fn remove(&mut self) -> Result<(), GateError> {
        let mut plug = lock(&self.plug);
        if !plug.dead {
            plug.release_all();
            plug.removed = true;
        }
        Ok(())
    }

    fn discard(&mut self) -> Result<(), GateError> {
        let mut plug = lock(&self.plug);
        plug.queue.clear();
        (plug.dead, plug.indefinite, plug.to_release) = (true, false, 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: u64) -> Frame {
        Frame { instance: 1, number, request: number, history: 0 }
    }

    /// The trap for which the gate's engine has types.
    #[test]
    fn a_second_sealed_epoch_makes_the_counts_slip_for_good() {
        let mut plug = Plug::default();
        plug.enqueue(frame(1));
        plug.buffer();
        plug.enqueue(frame(2));
        plug.buffer();
        plug.release_one();
        plug.release_one();
        let out: Vec<u64> = plug.out.iter().map(|frame| frame.number).collect();
        assert_eq!(out, [1], "the second one is never let out by counting");
    }
}
