//! A gate that holds numbers instead of frames, and knows which may leave.

use std::sync::{Arc, Mutex, MutexGuard};

use understudy_primary::agent::{Gate, Output};
use understudy_primary::egress::engine::Kind;
use understudy_primary::egress::{GateEngine, GateError, Held, Op, OutputGate, Port, SharedKeeper};

use super::backup::StubBackup;
use super::guest::FakeGuest;

/// What a frame counts.
const FRAME_BYTES: u64 = 1500;

#[derive(Clone)]
pub(crate) struct FakeGate {
    wire: Arc<Mutex<Wire>>,
    guest: FakeGuest,
    backup: StubBackup,
}

#[derive(Default)]
struct Wire {
    open: bool,
    /// Moments of the frames that wait.
    waiting: Vec<u64>,
    sealed: usize,
    out: Vec<u64>,
    /// What left before its epoch was committed.
    early: Vec<u64>,
    /// Bytes of every frame beyond its own.
    ballast: u64,
    removed: bool,
    /// Somebody has taken it away.
    broken: bool,
}

impl Wire {
    fn let_go(&mut self, frames: usize, committed: u64) {
        for moment in self.waiting.drain(..frames) {
            if moment > committed {
                self.early.push(moment);
            }
            self.out.push(moment);
        }
    }
}

impl FakeGate {
    /// In front of `guest`.
    pub(crate) fn new(guest: &FakeGuest, backup: &StubBackup) -> Self {
        let gate = Self { wire: Arc::default(), guest: guest.clone(), backup: backup.clone() };
        let wire = Arc::clone(&gate.wire);
        guest.connect(Arc::new(move |moment| {
            let mut wire = wire.lock().expect("not poisoned");
            if wire.open { wire.out.push(moment) } else { wire.waiting.push(moment) }
        }));
        gate
    }

    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().expect("not poisoned")
    }

    /// For a guest that is not protected yet.
    pub(crate) fn open(&self) -> Output {
        self.lock().open = true;
        self.output(GateEngine::open)
    }

    /// As an agent that died has left it, with a frame in it.
    pub(crate) fn found(&self) -> Output {
        self.lock().waiting.push(0);
        self.output(GateEngine::found)
    }

    fn output(&self, engine: fn() -> GateEngine) -> Output {
        let gate = self.clone();
        Output::Gated(Box::new(move || Ok(Gate::new(SharedKeeper::new(engine(), Box::new(gate)), None))))
    }

    /// Every frame is so much larger.
    pub(crate) fn weigh(&self, bytes: u64) {
        self.lock().ballast = bytes;
    }

    /// Somebody takes it away: what waits is lost, what comes leaves at once.
    pub(crate) fn take_away(&self) {
        let mut wire = self.lock();
        wire.waiting.clear();
        (wire.sealed, wire.open, wire.broken) = (0, true, true);
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.lock().broken
    }

    pub(crate) fn out(&self) -> Vec<u64> {
        self.lock().out.clone()
    }

    pub(crate) fn early(&self) -> Vec<u64> {
        self.lock().early.clone()
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.lock().removed
    }

    /// Up to which moment the backup has, or had, the guest.
    fn committed(&self) -> u64 {
        self.backup.ever_committed().map_or(0, |epoch| self.guest.moment_of(epoch))
    }
}

impl OutputGate for FakeGate {
    fn apply(&mut self, op: Op) -> Result<(), GateError> {
        let committed = self.committed();
        let mut wire = self.lock();
        match op.kind() {
            Kind::Seal => wire.sealed = wire.waiting.len(),
            Kind::ReleaseSealed => {
                let sealed = std::mem::take(&mut wire.sealed);
                wire.let_go(sealed, committed);
            }
            Kind::Flush => {
                let all = wire.waiting.len();
                wire.let_go(all, committed);
                (wire.sealed, wire.open) = (0, false);
            }
        }
        Ok(())
    }

    fn held(&mut self) -> Result<Held, GateError> {
        let wire = self.lock();
        let frames = wire.waiting.len() as u64;
        Ok(Held { frames, bytes: frames * (FRAME_BYTES + wire.ballast), dropped: 0 })
    }

    fn adjust(&mut self, _: &[Port], shut: bool) -> Result<(), GateError> {
        let mut wire = self.lock();
        if std::mem::take(&mut wire.broken) {
            wire.open = !shut;
        }
        Ok(())
    }

    fn intact(&mut self) -> Result<(), GateError> {
        if self.lock().broken { Err(GateError::TakenAway { device: "vnet0".to_owned() }) } else { Ok(()) }
    }

    fn remove(&mut self) -> Result<(), GateError> {
        let mut wire = self.lock();
        let all = wire.waiting.len();
        // The operator wants it so.
        wire.let_go(all, u64::MAX);
        (wire.open, wire.removed) = (true, true);
        Ok(())
    }

    fn discard(&mut self) -> Result<(), GateError> {
        let mut wire = self.lock();
        wire.waiting.clear();
        wire.removed = true;
        Ok(())
    }
}
