//! Datagrams between watchdogs, authentic and fresh:
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic `UNDSTSEA` |
//! | 1 | version |
//! | 1 | what it is: 0 a heartbeat, 1 an answer to a stranger |
//! | 16 | start of the sender: another one every time its process starts |
//! | 16 | of an answer: the start it answers; otherwise zeros |
//! | 8 | number of the datagram since that start, little-endian |
//! | n | the heartbeat ([`crate::heartbeat`]) |
//! | 32 | HMAC-SHA-256 of everything before |
//!
//! **Authentic**: only who has the key makes such a datagram. **Fresh**: a start counts once it has answered ours, which
//! nobody can have recorded before we began; from then on every number counts once. So a heartbeat of a stranger is
//! answered, and not taken; an answer that names our start makes its sender known, and is answered if it was not.
//!
//! ```text
//!   A                                   B, which does not know A
//!     heartbeat 17 ------------------->   not taken
//!     <------------- answer to A's start
//!     answer to B's start ------------>   A is known, at number 18
//!     heartbeat 19 ------------------->   taken
//! ```

use std::collections::BTreeMap;

use ring::hmac;
use uuid::Uuid;

use crate::ProtocolError;
use crate::heartbeat::{self, Heartbeat};

/// Bytes of the longest datagram.
pub const MAX_BYTES: usize = HEAD_BYTES + heartbeat::MAX_BYTES + MAC_BYTES;

/// Bytes of the shortest key: as long as what the MAC makes of it.
pub const MIN_KEY_BYTES: usize = 32;

const MAGIC: &[u8; 8] = b"UNDSTSEA";
const VERSION: u8 = 1;
const HEARTBEAT: u8 = 0;
const ANSWER: u8 = 1;
const HEAD_BYTES: usize = 8 + 1 + 1 + 16 + 16 + 8;
const MAC_BYTES: usize = 32;

/// How far behind the newest a number may be: paths are not equally fast.
const WINDOW: u64 = 128;

/// The secret that both hosts have.
#[derive(Clone)]
pub struct HeartbeatKey(hmac::Key);

impl HeartbeatKey {
    /// Of a secret.
    ///
    /// # Errors
    /// If it is too short.
    pub fn new(secret: &[u8]) -> Result<Self, ProtocolError> {
        if secret.len() < MIN_KEY_BYTES {
            let text = format!("has {} bytes, at least {MIN_KEY_BYTES} are needed", secret.len());
            return Err(ProtocolError::invalid("heartbeat key", text));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, secret)))
    }

    /// What everybody has: it protects against damage, not against anybody.
    pub fn none() -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, b"no key"))
    }
}

impl std::fmt::Debug for HeartbeatKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HeartbeatKey(..)")
    }
}

/// What a datagram was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// Authentic and fresh.
    Heartbeat(Heartbeat),
    /// To be sent back to where the datagram came from.
    Reply(Vec<u8>),
    /// There is nothing to do.
    Known,
}

/// Why a datagram does not count.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Not made with our key, or no datagram of ours at all.
    #[error("it is not authentic: it was made by somebody else, or with another --heartbeat-key")]
    NotAuthentic,
    /// It was received before, or is older than what was.
    #[error("it is not fresh: it was sent before")]
    NotFresh,
    /// One that we have sent.
    #[error("it is our own")]
    Own,
    /// Authentic, and not to be understood.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

/// One start of a watchdog among others.
#[derive(Debug)]
pub struct Seal {
    key: HeartbeatKey,
    start: Uuid,
    sent: u64,
    /// The starts that have answered ours. Each costs some bytes, for as long as we run: one that was forgotten could be
    /// brought back by what was recorded of it.
    known: BTreeMap<Uuid, Numbers>,
}

impl Seal {
    /// Begins a start. `start` must never have been there before: a random one.
    pub fn new(key: HeartbeatKey, start: Uuid) -> Self {
        Self { key, start, sent: 0, known: BTreeMap::new() }
    }

    /// A datagram with a heartbeat.
    ///
    /// # Errors
    /// If the heartbeat cannot be encoded.
    pub fn seal(&mut self, heartbeat: &Heartbeat) -> Result<Vec<u8>, ProtocolError> {
        let payload = heartbeat.encode()?;
        Ok(self.made(HEARTBEAT, Uuid::nil(), &payload))
    }

    fn made(&mut self, what: u8, to: Uuid, payload: &[u8]) -> Vec<u8> {
        self.sent += 1;
        let mut bytes = Vec::with_capacity(HEAD_BYTES + payload.len() + MAC_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&[VERSION, what]);
        bytes.extend_from_slice(self.start.as_bytes());
        bytes.extend_from_slice(to.as_bytes());
        bytes.extend_from_slice(&self.sent.to_le_bytes());
        bytes.extend_from_slice(payload);
        let mac = hmac::sign(&self.key.0, &bytes);
        bytes.extend_from_slice(mac.as_ref());
        bytes
    }

    /// Takes a datagram that was received.
    ///
    /// # Errors
    /// Why it does not count; then nothing has changed.
    pub fn open(&mut self, bytes: &[u8]) -> Result<Opened, Refused> {
        let head = self.authentic(bytes)?;
        if head.from == self.start {
            return Err(Refused::Own);
        }
        match head.what {
            HEARTBEAT => {
                let Some(numbers) = self.known.get_mut(&head.from) else {
                    return Ok(Opened::Reply(self.made(ANSWER, head.from, &[])));
                };
                let heartbeat = Heartbeat::decode(head.payload)?;
                if numbers.take(head.number) {
                    Ok(Opened::Heartbeat(heartbeat))
                } else {
                    Err(Refused::NotFresh)
                }
            }
            // What names our start was made after we began.
            ANSWER if head.to == self.start => {
                if self.known.contains_key(&head.from) {
                    return Ok(Opened::Known);
                }
                self.known.insert(head.from, Numbers::after(head.number));
                Ok(Opened::Reply(self.made(ANSWER, head.from, &[])))
            }
            ANSWER => Err(Refused::NotFresh),
            other => Err(ProtocolError::invalid("sealed datagram", format!("is of kind {other}")).into()),
        }
    }

    fn authentic<'a>(&self, bytes: &'a [u8]) -> Result<Head<'a>, Refused> {
        let body = bytes.len().checked_sub(MAC_BYTES).filter(|body| *body >= HEAD_BYTES);
        let (said, mac) = bytes.split_at(body.ok_or(Refused::NotAuthentic)?);
        hmac::verify(&self.key.0, said, mac).map_err(|_| Refused::NotAuthentic)?;
        let mut rest = said;
        let magic: [u8; 8] = take(&mut rest)?;
        let [version, what] = take(&mut rest)?;
        if &magic != MAGIC || version != VERSION {
            let text = format!("has version {version}, this build knows {VERSION}");
            return Err(ProtocolError::invalid("sealed datagram", text).into());
        }
        let (from, to) = (Uuid::from_bytes(take(&mut rest)?), Uuid::from_bytes(take(&mut rest)?));
        let number = u64::from_le_bytes(take(&mut rest)?);
        Ok(Head { what, from, to, number, payload: rest })
    }
}

struct Head<'a> {
    what: u8,
    from: Uuid,
    to: Uuid,
    number: u64,
    payload: &'a [u8],
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Refused> {
    let (taken, more) = rest.split_first_chunk::<N>().ok_or(Refused::NotAuthentic)?;
    *rest = more;
    Ok(*taken)
}

/// The numbers of a start that have come: the newest, and which of those just before it.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    newest: u64,
    /// Bit n: the one n before the newest.
    seen: u128,
}

impl Numbers {
    /// Only what comes after `number` is taken.
    fn after(number: u64) -> Self {
        Self { newest: number, seen: u128::MAX }
    }

    /// Whether it comes for the first time, as far as that can be known.
    fn take(&mut self, number: u64) -> bool {
        if number > self.newest {
            let ahead = number - self.newest;
            self.seen = if ahead < WINDOW { self.seen << ahead } else { 0 } | 1;
            self.newest = number;
            return true;
        }
        let behind = self.newest - number;
        if behind >= WINDOW || self.seen & (1 << behind) != 0 {
            return false;
        }
        self.seen |= 1 << behind;
        true
    }
}

#[cfg(test)]
mod tests;
