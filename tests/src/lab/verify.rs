//! `understudy verify` as an operator runs it: beside the guests, in the client's network namespace.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Lab;
use super::domain::guest_mac;
use super::plan::{Net, guest_address, guest_v6};
use crate::{process, workspace};

/// It ends when it is told to; this is for the case that nobody does.
const AT_MOST: &str = "3000";

const LIMIT: Duration = Duration::from_secs(20);

/// UDP and TCP over IPv4 and IPv6, and six by frames.
const PATHS: usize = 10;

/// One that asks; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Verify {
    child: Child,
    pcap: PathBuf,
}

impl Verify {
    /// Asks a guest over everything, each path every so many milliseconds.
    pub(crate) fn start(lab: &Lab, guest: &str, every_ms: u32) -> Result<Self> {
        let pcap = lab.dir().logs().join(format!("verify-{guest}.pcap"));
        let address = guest_address(guest);
        let (v4, v6, mac) = (address.to_string(), guest_v6(address).to_string(), guest_mac(guest));
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &lab.dir().netns()])
            .arg(workspace::target().join("release/understudy"));
        command.args(["verify", &v4, &v6, "--interface", Net::Lan.name(), "--mac", &mac]);
        command.args(["--every-ms", &every_ms.to_string(), "--for", AT_MOST, "--json", "--pcap"]).arg(&pcap);
        let said = std::fs::File::create(lab.dir().logs().join(format!("verify-{guest}.log")))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said).spawn();
        Ok(Self { child: child.context("cannot run verify")?, pcap })
    }

    /// Its verdict, now.
    pub(crate) fn end(mut self) -> Result<Verdict> {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            rustix::process::kill_process(pid, rustix::process::Signal::INT).context("verify has ended")?;
        }
        let mut out = self.child.stdout.take().context("verify has no output")?;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut out, &mut text)?;
        let Some(status) = process::wait(&mut self.child, LIMIT)? else { bail!("verify does not end") };
        let json: Value = serde_json::from_str(text.trim()).with_context(|| format!("not JSON: {text:?}"))?;
        let agrees = (json["violations_total"] == 0) == (process::exit_code(status) == 0);
        ensure!(agrees, "exit status {status:?} of {json}");
        let evidence = std::fs::metadata(&self.pcap).context("no pcap")?.len();
        Ok(Verdict { json, evidence_bytes: evidence })
    }
}

impl Drop for Verify {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        drop(process::wait(&mut self.child, LIMIT));
    }
}

/// What it found.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) json: Value,
    /// Of the pcap, its header included.
    pub(crate) evidence_bytes: u64,
}

impl Verdict {
    /// Nothing is wrong, and every path was answered.
    pub(crate) fn ensure_clean(&self) -> Result<()> {
        ensure!(self.json["violations_total"] == 0, "{}", self.json);
        let answers = self.json["answers"].as_object().context("no answers")?;
        let answered = answers.values().filter(|answers| **answers != 0).count();
        ensure!(answered == PATHS, "{answered} of {PATHS} paths were answered: {}", self.json);
        Ok(())
    }

    /// Something is, and it is shown.
    pub(crate) fn ensure_violated(&self, what: &str) -> Result<u64> {
        let violations = self.json["violations_total"].as_u64().unwrap_or(0);
        ensure!(violations > 0, "verify has not noticed {what}: {}", self.json);
        ensure!(self.evidence_bytes > 24 + 16 + 60, "no frame is shown of {what}: {}", self.json);
        Ok(violations)
    }
}
