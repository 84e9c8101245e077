//! Running programs in a host, from this machine.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::network;
use super::plan::{EXEC_PORT, HostName, Net};
use super::state::LabDir;
use super::wire::{self, Frame, Phase, Wish};

const CONNECT: Duration = Duration::from_secs(3);
/// The server itself ends a program that takes too long; this is for a host that is gone.
const GRACE: Duration = Duration::from_secs(10);

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Exec {
    argv: Vec<String>,
    limit: Duration,
    input: bool,
}

/// What a program that ran in a host left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Exec {
    pub(crate) fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            limit: Duration::from_secs(60),
            input: false,
        }
    }

    pub(crate) fn shell(script: &str) -> Self {
        Self::new(["/bin/bash", "-c", script])
    }

    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Passes our standard input on.
    pub(crate) fn with_input(mut self) -> Self {
        self.input = true;
        self
    }

    /// Runs it and keeps what it wrote.
    pub(crate) fn run(&self, lab: &LabDir, host: HostName) -> Result<Outcome> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = self.stream(lab, host, &mut stdout, &mut stderr)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Outcome { code, stdout: text(stdout), stderr: text(stderr) })
    }

    /// Runs it, passing on what it writes as it writes it; gives its exit status.
    pub(crate) fn stream(
        &self,
        lab: &LabDir,
        host: HostName,
        out: &mut impl Write,
        err: &mut impl Write,
    ) -> Result<i32> {
        let stream = connect(lab, host)?;
        let end = Instant::now() + self.limit + GRACE;
        let limit_ms = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
        let wish = Wish::Exec { argv: self.argv.clone(), env: BTreeMap::new(), input: self.input, limit_ms };
        wire::write_line(&mut &stream, &wish)?;
        if self.input {
            let to = stream.try_clone()?;
            std::thread::spawn(move || forward_input(&to));
        }
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("host {host} does not answer any more");
            }
            stream.set_read_timeout(Some(left))?;
            match Frame::read(&mut &stream)
                .with_context(|| format!("lost host {host} while it ran {}", self.argv.join(" ")))?
            {
                Some(Frame::Output(bytes)) => out.write_all(&bytes).and_then(|()| out.flush())?,
                Some(Frame::Error(bytes)) => err.write_all(&bytes).and_then(|()| err.flush())?,
                Some(Frame::Exit(code)) => return Ok(code),
                Some(Frame::Failed(text)) => bail!("host {host}: {text}"),
                Some(Frame::Input(_)) => {}
                None => bail!("host {host} went away while it ran {}", self.argv.join(" ")),
            }
        }
    }
}

fn forward_input(to: &TcpStream) {
    let mut buffer = [0; 16 << 10];
    let mut input = std::io::stdin().lock();
    while let Ok(count @ 1..) = input.read(&mut buffer) {
        if Frame::Input(buffer[..count].to_vec()).write(&mut &*to).is_err() {
            return;
        }
    }
    drop(to.shutdown(Shutdown::Write));
}

/// How far a host is; an error while nothing answers there.
pub(crate) fn phase(lab: &LabDir, host: HostName) -> Result<Phase> {
    let stream = connect(lab, host)?;
    stream.set_read_timeout(Some(CONNECT))?;
    wire::write_line(&mut &stream, &Wish::Phase)?;
    Ok(wire::read_line(&mut BufReader::new(&stream))?)
}

fn connect(lab: &LabDir, host: HostName) -> Result<TcpStream> {
    let to = SocketAddr::from((host.address(Net::Mgmt), EXEC_PORT));
    let stream = network::connect(&lab.netns(), to, CONNECT)
        .with_context(|| format!("host {host} does not answer"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
