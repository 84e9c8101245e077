//! What is said to a lab's supervisor: one JSON line each way over a unix socket.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::plan::{HostName, Link};
use super::roots::Roots;
use super::state::LabDir;

/// Longer than anything the supervisor does for one request.
const LIMIT: Duration = Duration::from_secs(60);
const MAX_LINE: u64 = 1 << 20;

/// A wish.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    Status,
    PowerOn(HostName),
    PowerOff(HostName),
    Cut(Link),
    Heal(Link),
    /// Records a link's frames until the lab ends or `PcapStop`.
    Pcap(Link, PathBuf),
    PcapStop(Link),
    Down,
}

/// What the supervisor knows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Reply {
    /// Why the wish was not fulfilled.
    pub(crate) error: Option<String>,
    /// Whether the hosts are emulated.
    pub(crate) emulated: bool,
    /// The hosts that have power, with the process that is them.
    pub(crate) powered: BTreeMap<HostName, u32>,
    /// How hosts ended that were not switched off.
    pub(crate) ended: BTreeMap<HostName, String>,
    /// The cables that are unplugged.
    pub(crate) cut: Vec<String>,
    /// What the hosts are rooted in.
    #[serde(default)]
    pub(crate) roots: Roots,
    pub(crate) supervisor: u32,
    /// When the lab ends by itself.
    pub(crate) seconds_left: u64,
}

/// Asks the supervisor of a lab.
pub(crate) fn ask(lab: &LabDir, request: &Request) -> Result<Reply> {
    let path = lab.control();
    let stream = UnixStream::connect(&path).with_context(|| {
        format!("the lab `{}` is not running: `cargo xtask lab up` starts it", lab.name())
    })?;
    stream.set_read_timeout(Some(LIMIT))?;
    send(&stream, request)?;
    let reply: Reply = receive(&stream)?;
    match reply.error {
        Some(error) => bail!(error),
        None => Ok(reply),
    }
}

pub(crate) fn send<T: Serialize>(mut stream: &UnixStream, message: &T) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).context("cannot talk to the supervisor")
}

pub(crate) fn receive<T: for<'a> Deserialize<'a>>(stream: &UnixStream) -> Result<T> {
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line).context("no answer")?;
    serde_json::from_str(&line).with_context(|| format!("not understood: {line:?}"))
}
