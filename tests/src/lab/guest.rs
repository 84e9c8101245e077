//! Talking to the guest program from the client's network namespace.

#[path = "../../guest/src/bulk.rs"]
mod bulk;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::network;
use super::plan::{GUEST_PORT, guest_address};
use super::state::LabDir;

/// One value of the guest's counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) total: u64,
    /// Which start of the guest it comes from.
    pub(crate) boot: String,
}

/// A connection to a guest.
#[derive(Debug)]
pub(crate) struct Guest {
    stream: BufReader<TcpStream>,
}

impl Guest {
    /// Connects and waits for an answer at most `limit` for each.
    pub(crate) fn connect(lab: &LabDir, name: &str, limit: Duration) -> Result<Self> {
        let to = SocketAddr::from((guest_address(name), GUEST_PORT));
        let stream = network::connect(&lab.netns(), to, limit)
            .with_context(|| format!("guest {name} does not answer"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Keeps trying until the guest answers.
    pub(crate) fn wait(lab: &LabDir, name: &str, limit: Duration) -> Result<Self> {
        let end = Instant::now() + limit;
        loop {
            let attempt = Self::connect(lab, name, Duration::from_secs(1)).and_then(|mut guest| {
                guest.ask("id")?;
                Ok(guest)
            });
            match attempt {
                Ok(guest) => {
                    guest.limit(Duration::from_secs(30))?;
                    return Ok(guest);
                }
                Err(error) if Instant::now() >= end => {
                    return Err(error)
                        .with_context(|| format!("guest {name} did not come up within {limit:?}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// How long an answer may take from now on.
    pub(crate) fn limit(&self, limit: Duration) -> Result<()> {
        self.stream.get_ref().set_read_timeout(Some(limit)).context("cannot set a time limit")
    }

    /// One request, one answer, which may be `bad ...`.
    pub(crate) fn ask(&mut self, request: &str) -> Result<String> {
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes()).context("the guest is gone")?;
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("the guest does not answer")? == 0 {
            bail!("the guest has closed the connection");
        }
        Ok(line.trim().to_owned())
    }

    /// One request whose answer must be `ok ...`.
    pub(crate) fn must(&mut self, request: &str) -> Result<String> {
        let answer = self.ask(request)?;
        if answer != "ok" && !answer.starts_with("ok ") {
            bail!("the guest answered `{request}` with `{answer}`");
        }
        Ok(answer)
    }

    /// Has it send so many blocks, and looks at every byte of them.
    pub(crate) fn bulk(&mut self, blocks: u32, seed: u64) -> Result<()> {
        let request = format!("bulk {blocks} {seed}\n");
        self.stream.get_mut().write_all(request.as_bytes()).context("the guest is gone")?;
        let (mut wanted, mut expected, mut found) =
            (bulk::Stream::new(seed), bulk::Hash::new(), bulk::Hash::new());
        for number in 0..blocks {
            let mut block = [0; bulk::BLOCK];
            self.stream.read_exact(&mut block).with_context(|| format!("block {number} of {blocks}"))?;
            found.add(&block);
            expected.add(&wanted.block());
        }
        let mut line = String::new();
        self.stream.read_line(&mut line).context("the guest does not answer")?;
        let said = field(&line, "hash").and_then(|hash| hash.parse::<u64>().ok());
        ensure!(found.value() == expected.value(), "what came is not what was sent");
        ensure!(said == Some(found.value()), "the guest says it sent {said:?}, {} came", found.value());
        Ok(())
    }

    pub(crate) fn count(&mut self) -> Result<Count> {
        let answer = self.must("count")?;
        let total = field(&answer, "count").and_then(|value| value.parse().ok());
        let (Some(total), Some(boot)) = (total, field(&answer, "boot")) else {
            bail!("no count in `{answer}`")
        };
        Ok(Count { total, boot: boot.to_owned() })
    }
}

/// `value` of `key=value` in an answer.
pub(crate) fn field<'a>(answer: &'a str, key: &str) -> Option<&'a str> {
    answer.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let answer = "ok recount=7 count=12 boot=x";
        assert_eq!((field(answer, "count"), field(answer, "oot")), (Some("12"), None));
    }
}
