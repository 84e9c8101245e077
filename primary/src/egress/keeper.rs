//! The gate and its state, shared by the capture, which seals, and the owner of the guest, who releases.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use understudy_proto::epoch::{Committed, EpochKind};
use understudy_proto::ids::EpochId;

use super::engine::Event;
use super::{GateEngine, GateError, Held, Op, OutputGate, Port, Sealing, State};

/// A gate with its state.
pub struct Keeper {
    /// Of the guest.
    name: String,
    engine: GateEngine,
    gate: Box<dyn OutputGate>,
    /// Why an interface of the guest has no gate, if one has none.
    hole: Option<String>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("engine", &self.engine).finish_non_exhaustive()
    }
}

/// The handle both have.
#[derive(Debug, Clone)]
pub struct SharedKeeper(Arc<Mutex<Keeper>>);

impl SharedKeeper {
    /// For a gate that is in `engine`'s state.
    pub fn new(engine: GateEngine, gate: Box<dyn OutputGate>) -> Self {
        Self(Arc::new(Mutex::new(Keeper { name: String::new(), engine, gate, hole: None })))
    }

    /// The same, of the guest of this name, for the log.
    pub fn of(self, name: &str) -> Self {
        name.clone_into(&mut self.lock().name);
        self
    }

    fn lock(&self) -> MutexGuard<'_, Keeper> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In which state it is.
    pub fn state(&self) -> State {
        self.lock().engine.state()
    }

    /// The guest is stopped at the end of `epoch`: what it has sent is sealed before it may run on.
    ///
    /// # Errors
    /// [`GateError`], here and below. The epoch must then be given up.
    pub fn stopped(&self, epoch: EpochId, kind: EpochKind) -> Result<Sealing, GateError> {
        let mut keeper = self.lock();
        if let Some(reason) = &keeper.hole {
            return Err(GateError::Hole { reason: reason.clone() });
        }
        keeper.step(Event::Stopped(epoch, kind))?;
        tracing::debug!(guest = keeper.name, epoch = epoch.0, unix_us = unix_us(), "sealed");
        Ok(keeper.engine.sealing())
    }

    /// The guest is about to run on after a full copy.
    pub fn resuming(&self) {
        // Only a change of state; there is nothing in it that can fail.
        let _ = self.lock().step(Event::Resuming);
    }

    /// Whether a commit lets everything out, which takes a while and needs the guest stopped.
    pub fn flushes(&self) -> bool {
        self.lock().engine.sealing() == Sealing::StayStopped
    }

    /// The backup has committed: what was sealed for the epoch goes.
    ///
    /// # Errors
    /// See above.
    pub fn committed(&self, proof: &Committed) -> Result<(), GateError> {
        let mut keeper = self.lock();
        // Before anything is released: with the lines above this is the log that a capture of the network is compared with.
        tracing::debug!(guest = keeper.name, epoch = proof.epoch().0, unix_us = unix_us(), "committed");
        keeper.step(Event::Committed(proof))
    }

    /// What waits.
    ///
    /// # Errors
    /// See above.
    pub fn held(&self) -> Result<Held, GateError> {
        self.lock().gate.held()
    }

    /// The guest has these interfaces now.
    ///
    /// # Errors
    /// See above; then no epoch ends until this succeeds, so the guest is not protected.
    pub fn adjust(&self, ports: &[Port]) -> Result<(), GateError> {
        let mut keeper = self.lock();
        let shut = keeper.engine.state() != State::Open;
        let result = keeper.gate.adjust(ports, shut);
        keeper.hole = result.as_ref().err().map(ToString::to_string);
        result
    }

    /// Looks whether the gate still stands.
    ///
    /// # Errors
    /// See above; then no epoch ends until [`SharedKeeper::adjust`] succeeds.
    pub fn intact(&self) -> Result<(), GateError> {
        let mut keeper = self.lock();
        let result = keeper.gate.intact();
        if let Err(error) = &result {
            keeper.hole = Some(error.to_string());
        }
        result
    }

    /// It is not known which interfaces the guest has now.
    pub fn unknown(&self, reason: String) {
        self.lock().hole = Some(reason);
    }

    /// Protection is over and the guest runs on: lets everything out and takes the gate away.
    ///
    /// # Errors
    /// See above.
    pub fn remove(&self) -> Result<(), GateError> {
        self.lock().gate.remove()
    }

    /// The guest is gone, or belongs to another host: throws away what is held.
    ///
    /// # Errors
    /// See above.
    pub fn discard(&self) -> Result<(), GateError> {
        self.lock().gate.discard()
    }
}

/// Now, on the clock that captures of the network have.
fn unix_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

impl Keeper {
    fn step(&mut self, event: Event<'_>) -> Result<(), GateError> {
        let Some(op) = self.engine.step(event)? else { return Ok(()) };
        self.apply(op)
    }

    fn apply(&mut self, op: Op) -> Result<(), GateError> {
        let kind = op.kind();
        let result = self.gate.apply(op);
        if result.is_err() {
            tracing::warn!(?kind, "the output gate did not do as told; what it holds waits for a full copy");
            let _ = self.engine.step(Event::Failed);
        }
        result
    }
}
