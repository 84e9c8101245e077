//! What the gate is told and when, as types: without a kernel, clock or lock.
//!
//! `plug` counts one sealed epoch. Told to seal a second one before it has released the first, it forgets the first
//! one's count and from then on lets frames out late, for good. So the states are types, and the wrong step does not
//! exist: [`Sealed`] cannot be sealed, and only it, with a [`Committed`], can be released (invariant 8).
//!
//! ```text
//! Open --shut--> Sealed --release(committed)--> Unsealed --seal--> Sealed ...
//!                  |                               ^
//!                  +--abandon--> Tangled --cover--> Covered --release(committed)--+
//! ```
//!
//! An epoch that is given up (its capture failed, the backup lost it, the agent died) leaves a count behind that
//! nobody will release: the gate is *tangled*. All that it then holds is covered by the next full copy, at whose end
//! the guest stays stopped until the backup has it. Nothing new is sent meanwhile, so everything held may go at once,
//! and the gate counts from zero again.

use std::fmt;

use understudy_proto::epoch::{Committed, EpochKind};
use understudy_proto::ids::EpochId;

use super::GateError;

/// What the qdiscs are told. Made only by the steps below.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Op(Kind);

/// The kinds of [`Op`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What has come in up to now is one epoch; what comes from now on waits behind it.
    Seal,
    /// Let the sealed epoch out, nothing behind it.
    ReleaseSealed,
    /// Let everything out, wait until it has left, and hold what comes then. Only while the guest is stopped: a frame
    /// that came in between would slip through, or stay uncounted before those that are counted.
    Flush,
}

impl Op {
    /// Which it is.
    pub fn kind(&self) -> Kind {
        self.0
    }
}

/// Frames go through: the guest is not protected yet.
#[derive(Debug)]
pub struct Open(());

/// Frames wait; none of them belongs to an epoch that is over.
#[derive(Debug)]
pub struct Unsealed(());

/// Frames wait; those of this epoch, which is over, are the first.
#[derive(Debug)]
pub struct Sealed(EpochId);

/// Frames wait, and it is not known any more which belong to what.
#[derive(Debug)]
pub struct Tangled(());

/// Frames wait; all of them were sent before the end of this full copy, and the guest is stopped.
#[derive(Debug)]
pub struct Covered(EpochId);

impl Open {
    /// The first protected epoch begins: `epoch`, a full copy, has just been captured.
    pub fn shut(self, epoch: EpochId) -> (Sealed, Op) {
        (Sealed(epoch), Op(Kind::Flush))
    }
}

impl Unsealed {
    /// The guest is stopped at the end of `epoch`.
    pub fn seal(self, epoch: EpochId) -> (Sealed, Op) {
        (Sealed(epoch), Op(Kind::Seal))
    }
}

impl Sealed {
    /// The epoch is committed.
    ///
    /// # Errors
    /// Gives itself back if the proof is of another epoch.
    pub fn release(self, proof: &Committed) -> Result<(Unsealed, Op), Self> {
        if proof.epoch() == self.0 { Ok((Unsealed(()), Op(Kind::ReleaseSealed))) } else { Err(self) }
    }

    /// The epoch will never be committed.
    pub fn abandon(self) -> Tangled {
        Tangled(())
    }
}

impl Tangled {
    /// The guest is stopped at the end of `epoch`, a full copy, and stays so until it is committed. Sealing counts
    /// nothing here: it shuts a qdisc that had refused to be shut.
    pub fn cover(self, epoch: EpochId) -> (Covered, Op) {
        (Covered(epoch), Op(Kind::Seal))
    }
}

impl Covered {
    /// The full copy is committed and the guest is still stopped.
    ///
    /// # Errors
    /// Gives itself back if the proof is of another epoch.
    pub fn release(self, proof: &Committed) -> Result<(Unsealed, Op), Self> {
        if proof.epoch() == self.0 { Ok((Unsealed(()), Op(Kind::Flush))) } else { Err(self) }
    }

    /// The guest runs again before the full copy is committed.
    pub fn abandon(self) -> Tangled {
        Tangled(())
    }
}

/// In which state a gate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Frames go through.
    Open,
    /// They wait, none of an epoch that is over.
    Unsealed,
    /// They wait, those of this epoch first.
    Sealed(EpochId),
    /// They wait for a full copy.
    Tangled,
    /// They wait for this full copy while the guest is stopped.
    Covered(EpochId),
}

impl State {
    /// The word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Unsealed => "shut",
            Self::Sealed(_) => "sealed",
            Self::Tangled => "waiting for a full copy",
            Self::Covered(_) => "waiting for the commit of a full copy",
        }
    }
}

/// What the end of an epoch asks of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealing {
    /// It may run on.
    RunOn,
    /// It must stay stopped until the epoch is committed.
    StayStopped,
}

/// What happens to a gate.
#[derive(Debug)]
pub enum Event<'a> {
    /// The guest is stopped at the end of this epoch.
    Stopped(EpochId, EpochKind),
    /// It is about to run on.
    Resuming,
    /// The backup has committed.
    Committed(&'a Committed),
    /// An operation failed, on some interface or on all.
    Failed,
}

enum Gate {
    Open(Open),
    Unsealed(Unsealed),
    Sealed(Sealed),
    Tangled(Tangled),
    Covered(Covered),
}

/// The gate's state over time.
pub struct GateEngine(Gate);

impl fmt::Debug for GateEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GateEngine").field(&self.state()).finish()
    }
}

impl GateEngine {
    /// For a gate that was just made and lets everything through.
    pub fn open() -> Self {
        Self(Gate::Open(Open(())))
    }

    /// For a gate that an earlier agent left behind, shut.
    pub fn found() -> Self {
        Self(Gate::Tangled(Tangled(())))
    }

    /// In which state it is.
    pub fn state(&self) -> State {
        match &self.0 {
            Gate::Open(_) => State::Open,
            Gate::Unsealed(_) => State::Unsealed,
            Gate::Sealed(sealed) => State::Sealed(sealed.0),
            Gate::Tangled(_) => State::Tangled,
            Gate::Covered(covered) => State::Covered(covered.0),
        }
    }

    /// Whether the guest has to stay stopped until the commit.
    pub fn sealing(&self) -> Sealing {
        if matches!(self.0, Gate::Covered(_)) { Sealing::StayStopped } else { Sealing::RunOn }
    }

    /// Takes an event and says what the qdiscs are to be told, if anything. If that fails the answer is
    /// [`Event::Failed`].
    ///
    /// # Errors
    /// [`GateError::OutOfTurn`]; then nothing has changed, and nothing may be released.
    pub fn step(&mut self, event: Event<'_>) -> Result<Option<Op>, GateError> {
        let before = self.state();
        // Whatever goes wrong within, the gate is no more open than this.
        let gate = std::mem::replace(&mut self.0, Gate::Tangled(Tangled(())));
        let out_of_turn = |what: String| GateError::OutOfTurn { state: before.label(), what };
        let (gate, result) = match (gate, event) {
            (Gate::Open(open), Event::Stopped(epoch, EpochKind::Full)) => sealed(open.shut(epoch)),
            (Gate::Unsealed(gate), Event::Stopped(epoch, _)) => sealed(gate.seal(epoch)),
            (Gate::Sealed(gate), Event::Stopped(epoch, EpochKind::Full)) => {
                covered(gate.abandon().cover(epoch))
            }
            (Gate::Tangled(gate), Event::Stopped(epoch, EpochKind::Full)) => covered(gate.cover(epoch)),
            (Gate::Covered(gate), Event::Stopped(epoch, EpochKind::Full)) => {
                covered(gate.abandon().cover(epoch))
            }
            (gate, Event::Stopped(epoch, EpochKind::Delta)) => {
                (gate, Err(out_of_turn(format!("the end of epoch {epoch}"))))
            }
            (Gate::Sealed(gate), Event::Committed(proof)) => match gate.release(proof) {
                Ok((gate, op)) => (Gate::Unsealed(gate), Ok(Some(op))),
                Err(gate) => (Gate::Sealed(gate), Err(out_of_turn(commit(proof)))),
            },
            (Gate::Covered(gate), Event::Committed(proof)) => match gate.release(proof) {
                Ok((gate, op)) => (Gate::Unsealed(gate), Ok(Some(op))),
                Err(gate) => (Gate::Covered(gate), Err(out_of_turn(commit(proof)))),
            },
            (gate, Event::Committed(proof)) => (gate, Err(out_of_turn(commit(proof)))),
            (Gate::Covered(gate), Event::Resuming) => (Gate::Tangled(gate.abandon()), Ok(None)),
            (gate, Event::Resuming) => (gate, Ok(None)),
            (_, Event::Failed) => (Gate::Tangled(Tangled(())), Ok(None)),
        };
        self.0 = gate;
        result
    }
}

fn sealed((gate, op): (Sealed, Op)) -> (Gate, Result<Option<Op>, GateError>) {
    (Gate::Sealed(gate), Ok(Some(op)))
}

fn covered((gate, op): (Covered, Op)) -> (Gate, Result<Option<Op>, GateError>) {
    (Gate::Covered(gate), Ok(Some(op)))
}

fn commit(proof: &Committed) -> String {
    format!("the commit of epoch {}", proof.epoch())
}

#[cfg(test)]
mod tests;
