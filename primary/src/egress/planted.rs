//! Test hook: gates that do wrong on purpose, for `understudy verify` to find out.

use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;

use super::engine::Kind;
use super::{GateError, Held, NetlinkGate, Op, OutputGate, Port};

/// How long a guest speaks after its stop before a barrier that comes too late.
const LATE: Duration = Duration::from_millis(400);

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// An epoch leaves when it is over, not when it is committed.
    ReleaseBeforeCommit,
    /// The barrier is set when the guest runs again: what it sends until then leaves with the epoch before.
    SealAfterResume,
    /// Only IPv4 is redirected into the gate.
    Ipv4Only,
}

/// A fault of the gate of one domain, `DOMAIN=FAULT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plant {
    /// Whose gate.
    pub domain: String,
    /// What is wrong with it.
    pub fault: Fault,
}

impl FromStr for Plant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (domain, fault) = text.split_once('=').ok_or_else(|| format!("{text:?} is not DOMAIN=FAULT"))?;
        Ok(Self { domain: domain.to_owned(), fault: Fault::from_str(fault, false)? })
    }
}

/// A gate with a fault.
#[derive(Debug)]
pub struct Planted {
    gate: NetlinkGate,
    fault: Fault,
}

impl Planted {
    /// Makes `gate` faulty.
    pub fn new(mut gate: NetlinkGate, fault: Fault) -> Self {
        tracing::error!(?fault, "the output gate does wrong, as told");
        if fault == Fault::Ipv4Only
            && let Err(error) = gate.gate_ipv4_only()
        {
            tracing::error!(%error, "no, it does not");
        }
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
                std::thread::sleep(LATE);
                self.gate.tell(Kind::Seal)?;
                self.gate.tell(Kind::ReleaseSealed)
            }
            (_, Kind::Flush) | (Fault::Ipv4Only, _) => self.gate.apply(op),
        }
    }

    fn held(&mut self) -> Result<Held, GateError> {
        self.gate.held()
    }

    fn adjust(&mut self, ports: &[Port], shut: bool) -> Result<(), GateError> {
        self.gate.adjust(ports, shut)
    }

    /// A planted fault is to stay.
    fn intact(&mut self) -> Result<(), GateError> {
        Ok(())
    }

    fn remove(&mut self) -> Result<(), GateError> {
        self.gate.remove()
    }

    fn discard(&mut self) -> Result<(), GateError> {
        self.gate.discard()
    }
}
