//! What watchdogs say to each other, one datagram per guest and path:
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic `UNDSTHBT` |
//! | 4 | version |
//! | 16 | guest |
//! | 8 | life of the sender: grows with every start of it |
//! | 8 | number of the heartbeat in that life |
//! | 8 | term |
//! | 8 | generation |
//! | 8 | last committed epoch known |
//! | 4 | age of QEMU's last sign of life in milliseconds; all ones: no QEMU of the guest is here |
//! | 16 | life of the backup agent that holds an image; zeros: there is none |
//! | 1 | flags: 1 the guest was ended by its operator; 2 the sender hands it over; 4 its QEMU died at the sender |
//! | 1 | bytes of the host name |
//! | n | host name of the sender, UTF-8 |
//! | 2 | bytes of the guest's settings; 0 where the guest does not run |
//! | n | how it is protected ([`crate::policy::GuestSettings`]) |
//! | 4 | CRC-32 of everything before |
//!
//! Numbers are little-endian. On the wire it is sealed ([`crate::sealed`]). It proves nothing to the arbiter: whoever has
//! the key can delay a failover, or have one done that nobody needs, never cause two owners.

use std::time::Duration;

use crate::ProtocolError;
use crate::ids::{EpochId, Generation, GuestId, Incarnation};
use crate::ownership::{MAX_HOST_BYTES, Term};
use crate::policy::{GuestSettings, MAX_SETTINGS_BYTES};

/// Bytes of the longest heartbeat; fits any path.
pub const MAX_BYTES: usize = FIXED_BYTES + MAX_HOST_BYTES + 2 + MAX_SETTINGS_BYTES + CRC_BYTES;

const MAGIC: &[u8; 8] = b"UNDSTHBT";
const VERSION: u32 = 2;
const FIXED_BYTES: usize = 8 + 4 + 16 + 5 * 8 + 4 + 16 + 1 + 1;
const CRC_BYTES: usize = 4;
const NO_QEMU: u32 = u32::MAX;
const ENDED: u8 = 1;
const YIELDS: u8 = 2;
const CRASHED: u8 = 4;

/// A heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// The guest it is about.
    pub guest: GuestId,
    /// Host name of the sender.
    pub host: String,
    /// Life of the sender.
    pub life: u64,
    /// Number in that life.
    pub number: u64,
    /// Newest term the sender has read.
    pub term: Term,
    /// Newest generation the sender knows.
    pub generation: Generation,
    /// Last committed epoch the sender knows of; 0 if none.
    pub epoch: EpochId,
    /// Since QEMU's last sign of life, whole milliseconds; `None` if no QEMU of the guest is at the sender.
    pub qemu_age: Option<Duration>,
    /// The backup agent's life, if the sender holds an image of this generation, up to `epoch`.
    pub image: Option<Incarnation>,
    /// The guest was shut down, or its protection ended: its absence is no failure.
    pub ended: bool,
    /// The guest stands still here, up to `epoch`, for the other host to take it over.
    pub yields: bool,
    /// Its QEMU at the sender has died and nobody has ended the guest.
    pub crashed: bool,
    /// How it is protected, if it is and runs at the sender.
    pub settings: Option<GuestSettings>,
}

impl Heartbeat {
    /// The datagram.
    ///
    /// # Errors
    /// If the host name is too long.
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        ProtocolError::check_len("host name bytes", self.host.len() as u64, MAX_HOST_BYTES as u64)?;
        let age = self
            .qemu_age
            .map_or(NO_QEMU, |age| u32::try_from(age.as_millis()).unwrap_or(NO_QEMU - 1).min(NO_QEMU - 1));
        let settings = self.settings.as_ref().map_or(Ok(Vec::new()), GuestSettings::encode)?;
        let len = FIXED_BYTES + self.host.len() + 2 + settings.len() + CRC_BYTES;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(self.guest.0.as_bytes());
        for number in [self.life, self.number, self.term.0, self.generation.0, self.epoch.0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&age.to_le_bytes());
        bytes.extend_from_slice(self.image.map_or(uuid::Uuid::nil(), |life| life.0).as_bytes());
        let flags = [(self.ended, ENDED), (self.yields, YIELDS), (self.crashed, CRASHED)];
        bytes.push(flags.iter().map(|(set, flag)| u8::from(*set) * flag).sum());
        bytes.push(u8::try_from(self.host.len()).unwrap_or(u8::MAX));
        bytes.extend_from_slice(self.host.as_bytes());
        bytes.extend_from_slice(&u16::try_from(settings.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend_from_slice(&settings);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        Ok(bytes)
    }

    /// A datagram that was received.
    ///
    /// # Errors
    /// [`ProtocolError`] if it is none, damaged, or of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let invalid = |reason: String| ProtocolError::invalid("heartbeat", reason);
        ProtocolError::check_len("heartbeat bytes", bytes.len() as u64, MAX_BYTES as u64)?;
        let mut rest = Reader(bytes);
        let magic = rest.take::<8>()?;
        if &magic != MAGIC {
            return Err(invalid(format!("begins with {magic:02x?}")));
        }
        let version = u32::from_le_bytes(rest.take()?);
        if version != VERSION {
            return Err(invalid(format!("has version {version}, this build knows {VERSION}")));
        }
        let guest = GuestId(uuid::Uuid::from_bytes(rest.take()?));
        let mut number = || rest.take().map(u64::from_le_bytes);
        let (life, count, term) = (number()?, number()?, number()?);
        let (generation, epoch) = (number()?, number()?);
        let age = u32::from_le_bytes(rest.take()?);
        let image = uuid::Uuid::from_bytes(rest.take()?);
        let [flags, len] = rest.take()?;
        if flags & !(ENDED | YIELDS | CRASHED) != 0 {
            return Err(invalid(format!("has the flags {flags:#x}")));
        }
        let host = rest.slice(usize::from(len))?;
        let settings = u16::from_le_bytes(rest.take()?);
        let settings = rest.slice(usize::from(settings))?;
        let crc: [u8; CRC_BYTES] = rest.take()?;
        if !rest.0.is_empty() {
            return Err(invalid(format!("has {} bytes too many", rest.0.len())));
        }
        let checked = &bytes[..bytes.len() - CRC_BYTES];
        if crc != crc32fast::hash(checked).to_le_bytes() {
            return Err(invalid("is damaged".into()));
        }
        let host = std::str::from_utf8(host).map_err(|error| invalid(error.to_string()))?.to_owned();
        let settings = if settings.is_empty() { None } else { Some(GuestSettings::decode(settings)?) };
        Ok(Self {
            guest,
            host,
            life,
            number: count,
            term: Term(term),
            generation: Generation(generation),
            epoch: EpochId(epoch),
            qemu_age: (age != NO_QEMU).then(|| Duration::from_millis(age.into())),
            image: (!image.is_nil()).then_some(Incarnation(image)),
            ended: flags & ENDED != 0,
            yields: flags & YIELDS != 0,
            crashed: flags & CRASHED != 0,
            settings,
        })
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn slice(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        let (taken, rest) = self
            .0
            .split_at_checked(len)
            .ok_or_else(|| ProtocolError::invalid("heartbeat", "it is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (taken, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or_else(|| ProtocolError::invalid("heartbeat", "it is too short"))?;
        self.0 = rest;
        Ok(*taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat() -> Heartbeat {
        Heartbeat {
            guest: GuestId(uuid::Uuid::from_u128(7)),
            host: "alpha".into(),
            life: 5,
            number: 6,
            term: Term(7),
            generation: Generation(8),
            epoch: EpochId(9),
            qemu_age: Some(Duration::from_millis(12)),
            image: Some(Incarnation(uuid::Uuid::from_u128(3))),
            ended: true,
            yields: false,
            crashed: true,
            settings: Some(GuestSettings { epoch_ms: 25, ungated: true, ..GuestSettings::default() }),
        }
    }

    #[test]
    fn what_is_sent_is_received() {
        for qemu_age in [None, Some(Duration::ZERO), Some(Duration::from_millis(u64::from(u32::MAX) - 1))] {
            for host in ["", "alpha", &"x".repeat(MAX_HOST_BYTES)] {
                let sent = Heartbeat { qemu_age, host: host.into(), ..heartbeat() };
                let bytes = sent.encode().unwrap();
                assert!(bytes.len() <= MAX_BYTES);
                assert_eq!(Heartbeat::decode(&bytes).unwrap(), sent);
            }
        }
        for (ended, yields, crashed) in [(false, true, false), (true, true, true), (false, false, false)] {
            let sent = Heartbeat { ended, yields, crashed, ..heartbeat() };
            assert_eq!(Heartbeat::decode(&sent.encode().unwrap()).unwrap(), sent);
        }
        let without = Heartbeat { settings: None, ..heartbeat() };
        assert_eq!(Heartbeat::decode(&without.encode().unwrap()).unwrap(), without);
        // Never taken for "no QEMU".
        let old = Heartbeat { qemu_age: Some(Duration::MAX), ..heartbeat() };
        assert!(Heartbeat::decode(&old.encode().unwrap()).unwrap().qemu_age.is_some());
        assert!(Heartbeat { host: "x".repeat(MAX_HOST_BYTES + 1), ..heartbeat() }.encode().is_err());
    }

    #[test]
    fn every_flipped_bit_and_truncation_is_noticed() {
        let good = heartbeat().encode().unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Heartbeat::decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(Heartbeat::decode(&good[..len]).is_err(), "{len} bytes");
        }
        assert!(Heartbeat::decode(&vec![0; MAX_BYTES + 1]).is_err());
    }
}
