//! What the hook tells the agent and what the agent answers: one line of JSON each, over the agent's hook socket.

use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};

/// File name of the agent's hook socket in its run directory.
pub const HOOK_SOCKET: &str = "hook.sock";

/// The longest line in either direction, in bytes, with its line feed.
pub const MAX_LINE_BYTES: usize = 16 << 10;

/// The longest argument of a hook that is passed on, in bytes. Names of domains are shorter.
pub const MAX_ARGUMENT_BYTES: usize = 512;

/// libvirt calls its hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Name of the domain.
    pub guest: String,
    /// What happens: `prepare`, `start`, `started`, `stopped`, `release`, `migrate`, `restore`, `reconnect`, `attach`,
    /// or something newer.
    pub operation: String,
    /// `begin` or `end`.
    #[serde(default)]
    pub phase: String,
    /// The last argument; since libvirt 11 the reason of a `release`.
    #[serde(default)]
    pub extra: String,
    /// Whether this call may be refused: the domain asks not to be started unprotected, and this is the moment.
    #[serde(default)]
    pub may_refuse: bool,
    /// The backup that the domain names; empty if it is not marked.
    #[serde(default)]
    pub backup: String,
    /// Replication without TLS is allowed.
    #[serde(default)]
    pub insecure: bool,
    /// What is wrong with the element; empty if it is right or not there.
    #[serde(default)]
    pub mistake: String,
}

/// What the agent says to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "answer")]
pub enum Answer {
    /// Go on.
    Ok,
    /// Do not start it.
    Deny {
        /// Why, with what to do: it reaches whoever asked libvirt for the start.
        reason: String,
    },
}

/// As one line.
///
/// # Errors
/// If it is longer than [`MAX_LINE_BYTES`].
pub fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE_BYTES {
        return Err(io::Error::other(format!(
            "a line of {} bytes, the limit is {MAX_LINE_BYTES}",
            line.len()
        )));
    }
    Ok(line)
}

/// Reads one line, never more than [`MAX_LINE_BYTES`].
///
/// # Errors
/// Those of `from`, and what is wrong with the line.
pub fn read_line<T: for<'de> Deserialize<'de>>(from: impl BufRead) -> io::Result<T> {
    let mut line = Vec::new();
    from.take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line)?;
    parse_line(&line)
}

/// A line that was read by other means.
///
/// # Errors
/// What is wrong with it.
pub fn parse_line<T: for<'de> Deserialize<'de>>(line: &[u8]) -> io::Result<T> {
    if line.last() != Some(&b'\n') || line.len() > MAX_LINE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the line has no end"));
    }
    serde_json::from_slice(line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The argument without what is beyond [`MAX_ARGUMENT_BYTES`].
pub fn clipped(argument: &str) -> String {
    let mut end = argument.len().min(MAX_ARGUMENT_BYTES);
    while !argument.is_char_boundary(end) {
        end -= 1;
    }
    argument[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_whole() {
        let deny = Answer::Deny { reason: "no\nbackup".into() };
        let bytes = line(&deny).unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert_eq!(read_line::<Answer>(bytes.as_slice()).unwrap(), deny);
        assert!(line(&Answer::Deny { reason: "x".repeat(MAX_LINE_BYTES) }).is_err());
        for bad in ["", "{\"answer\":\"ok\"}", "\n", "{\"answer\":\"maybe\"}\n", "[]\n"] {
            assert!(read_line::<Answer>(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(read_line::<Answer>(vec![b' '; 1 << 20].as_slice()).is_err());
        assert_eq!(clipped(&"é".repeat(400)).len(), 512);
        assert_eq!(clipped("web"), "web");
    }

    #[test]
    fn a_call_of_another_version_is_read() {
        let call: Call =
            read_line(b"{\"guest\":\"web\",\"operation\":\"prepare\",\"new\":1}\n".as_slice()).unwrap();
        assert!(!call.may_refuse && call.backup.is_empty());
    }
}
