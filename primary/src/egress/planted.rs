//! Test hook: gates that do wrong on purpose, for `understudy verify` to find out.

use super::engine::Kind;
use super::{GateError, Held, NetlinkGate, Op, OutputGate, Port};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// An epoch leaves when it is over, not when it is committed.
    ReleaseBeforeCommit,
    /// What the guest sends after its stop leaves with the epoch before.
    SealAfterResume,
}

/// A gate with a fault.
#[derive(Debug)]
pub struct Planted {
    gate: NetlinkGate,
    fault: Fault,
}

impl Planted {
    /// Makes `gate` faulty.
    pub fn new(gate: NetlinkGate, fault: Fault) -> Self {
        tracing::error!(?fault, "the output gate does wrong, as told");
        Self { gate, fault }
    }
}

impl OutputGate for Planted {
    fn apply(&mut self, op: Op) -> Result<(), GateError> {
        match (self.fault, op.kind()) {
            (Fault::ReleaseBeforeCommit, Kind::Seal) => {
                self.gate.tell(Kind::Seal)?;
                self.gate.tell(Kind::ReleaseSealed)
            }
            (Fault::ReleaseBeforeCommit, Kind::ReleaseSealed) | (Fault::SealAfterResume, Kind::Seal) => {
                Ok(())
            }
            (Fault::SealAfterResume, Kind::ReleaseSealed) => {
                self.gate.tell(Kind::Seal)?;
                self.gate.tell(Kind::ReleaseSealed)
            }
            (_, Kind::Flush) => self.gate.apply(op),
        }
    }

    fn held(&mut self) -> Result<Held, GateError> {
        self.gate.held()
    }

    fn adjust(&mut self, ports: &[Port], shut: bool) -> Result<(), GateError> {
        self.gate.adjust(ports, shut)
    }

    fn remove(&mut self) -> Result<(), GateError> {
        self.gate.remove()
    }

    fn discard(&mut self) -> Result<(), GateError> {
        self.gate.discard()
    }
}
