//! What `lab exec` and the exec server of a host say to each other: a JSON line, then frames of one byte
//! kind, four bytes length, and content.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};

use serde::{Deserialize, Serialize};

/// Neither side believes in a longer frame or line.
const MAX_BYTES: u32 = 1 << 20;

/// What is wanted of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Wish {
    /// How far the host is; answered by one line, a [`Phase`].
    Phase,
    /// Run a program; answered by frames.
    Exec { argv: Vec<String>, env: BTreeMap<String, String>, input: bool, limit_ms: u64 },
}

/// How far a host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Phase {
    /// What it is doing, or `ready`.
    pub(crate) name: String,
    /// What went wrong, if anything did.
    pub(crate) failure: Option<String>,
    /// Milliseconds since its kernel started.
    pub(crate) uptime_ms: u64,
}

impl Phase {
    pub(crate) const READY: &str = "ready";

    pub(crate) fn is_ready(&self) -> bool {
        self.name == Self::READY
    }
}

/// A piece of a running program's input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Input(Vec<u8>),
    Output(Vec<u8>),
    Error(Vec<u8>),
    /// The program ended, as a shell would say it.
    Exit(i32),
    /// The program could not be run or took too long.
    Failed(String),
}

impl Frame {
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let (kind, body): (u8, &[u8]) = match self {
            Self::Input(body) => (0, body),
            Self::Output(body) => (1, body),
            Self::Error(body) => (2, body),
            Self::Exit(code) => (3, &code.to_be_bytes()),
            Self::Failed(text) => (4, text.as_bytes()),
        };
        let length =
            u32::try_from(body.len()).ok().filter(|length| *length <= MAX_BYTES).ok_or_else(too_long)?;
        let mut bytes = Vec::with_capacity(5 + body.len());
        bytes.push(kind);
        bytes.extend(length.to_be_bytes());
        bytes.extend(body);
        out.write_all(&bytes)
    }

    /// The next frame; nothing when the other side has closed.
    pub(crate) fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; 5];
        match from.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        if length > MAX_BYTES {
            return Err(too_long());
        }
        let mut body = vec![0; length as usize];
        from.read_exact(&mut body)?;
        Ok(Some(match head[0] {
            0 => Self::Input(body),
            1 => Self::Output(body),
            2 => Self::Error(body),
            3 => Self::Exit(i32::from_be_bytes(
                body.try_into().map_err(|_| invalid("an exit status of wrong length"))?,
            )),
            4 => Self::Failed(String::from_utf8_lossy(&body).into_owned()),
            _ => return Err(invalid("a frame of unknown kind")),
        }))
    }
}

fn too_long() -> io::Error {
    invalid("a frame or line of more than 1 MiB")
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

pub(crate) fn write_line<T: Serialize>(out: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    out.write_all(&line)
}

pub(crate) fn read_line<T: for<'a> Deserialize<'a>>(from: &mut impl BufRead) -> io::Result<T> {
    let mut line = Vec::new();
    from.take(u64::from(MAX_BYTES)).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were() {
        let frames = [
            Frame::Input(vec![]),
            Frame::Output(b"x".to_vec()),
            Frame::Error(vec![7; 300]),
            Frame::Exit(-1),
            Frame::Failed("no".into()),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut from = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut from).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut from).unwrap(), None);
    }

    #[test]
    fn a_length_out_of_bounds_is_an_error() {
        assert!(Frame::read(&mut [1, 0xff, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [9, 0, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [3, 0, 0, 0, 1, 0].as_slice()).is_err());
    }
}
