//! COMMAND records: they carry their length, so all but a few can be skipped.

use super::error::Fault;
use super::wire::{Input, Stop};

/// A command, as far as the peer must know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// The capability `return-path` is on: QEMU expects [`super::RETURN_PATH_SHUT`] after the precopy.
    OpenReturnPath,
    /// Wants an answer on the return path, but waits for none.
    Ping(u32),
    /// The stream goes on with checkpoints.
    EnableColo,
    /// Memory's last part follows.
    SwitchoverStart,
    /// Any other that can be skipped.
    Other(u16),
}

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const PACKAGED: u16 = 7;
const ENABLE_COLO: u16 = 8;
const SWITCHOVER_START: u16 = 11;

impl Command {
    /// Reads number and length, and the payload of those whose payload matters; gives the bytes yet to be
    /// skipped.
    pub(super) fn read(input: &mut Input<'_>) -> Result<(Self, u16), Stop> {
        let number = input.be16()?;
        let payload_bytes = input.be16()?;
        let command = match number {
            OPEN_RETURN_PATH => Self::OpenReturnPath,
            PING if payload_bytes == 4 => return Ok((Self::Ping(input.be32()?), 0)),
            // Adds a field to the block table.
            POSTCOPY_ADVISE => {
                return Err(Fault::Capability {
                    capability: "postcopy-ram".into(),
                    seen: "command 3, POSTCOPY_ADVISE".into(),
                }
                .into());
            }
            // Its length is that of a length.
            PACKAGED => return Err(Fault::Command { number, name: "PACKAGED" }.into()),
            ENABLE_COLO => Self::EnableColo,
            SWITCHOVER_START => Self::SwitchoverStart,
            other => Self::Other(other),
        };
        Ok((command, payload_bytes))
    }
}
