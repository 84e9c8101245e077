//! A lab whose watchdogs keep guests, with a witness in the client's namespace.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::observer::{Observer, Sample};
use crate::lab::pki;
use crate::lab::plan::{HostName, Net};
use crate::lab::sides::Sides;
use crate::lab::understudy::Role;
use crate::lab::verify::Verify;
use crate::scenarios::{SHAPES, start_shaped};
use crate::{process, workspace};

use super::logs;

pub(super) const LIMIT: Duration = Duration::from_secs(120);
pub(super) const WATCHDOG: &str = "understudy-watchdog";
const WITNESS_PORT: u16 = 7421;
const HEARTBEAT_PORT: u16 = 7422;
/// Emulated hosts stand still for seconds, now and then.
pub(super) const SUSPECT_AFTER_MS: u32 = 10_000;
const QEMU_SILENT_MS: u32 = 15_000;
/// Between two questions of the outside observer on a path.
const VERIFY_EVERY_MS: u32 = 100;
/// It has asked on every path by then.
const ASKED: Duration = Duration::from_secs(10);

/// The witness, the watchdogs, guest g1 and who looks at it.
pub(super) struct Keeping<'a> {
    pub(super) lab: &'a Lab,
    witness: Option<Child>,
    witness_on: Net,
    policy: &'static str,
    fence: Option<PathBuf>,
    pub(super) observer: Observer,
    sides: Sides,
    verify: Option<Verify>,
    /// When that began.
    began: Instant,
    boot: String,
    total: u64,
    /// Term of the last report.
    reported: u64,
    /// From where the logs of the watchdogs are read.
    from: logs::Ends,
}

impl<'a> Keeping<'a> {
    /// Guest g1 runs on alpha and is protected.
    pub(super) fn start(lab: &'a Lab, witness_on: Net, policy: &'static str) -> Result<Self> {
        Self::start_with(lab, witness_on, policy, None)
    }

    /// The same with a fencing command, the same for both hosts.
    pub(super) fn start_with(
        lab: &'a Lab,
        witness_on: Net,
        policy: &'static str,
        fence: Option<PathBuf>,
    ) -> Result<Self> {
        let sides = Sides::start(lab, "g1")?;
        let first = start_shaped(lab, HostName::Alpha, SHAPES[0])?.count()?;
        let mut this = Self {
            lab,
            witness: None,
            witness_on,
            policy,
            fence,
            observer: Observer::start(lab.dir(), "g1"),
            sides,
            verify: None,
            began: Instant::now(),
            boot: first.boot,
            total: first.total,
            reported: 0,
            from: logs::Ends::default(),
        };
        this.witness_up()?;
        this.mark();
        for host in HostName::ALL {
            this.watch(host)?;
        }
        lab.protect("g1", HostName::Alpha)?;
        this.paired(HostName::Alpha)?;
        this.began = Instant::now();
        this.verify = Some(Verify::start(lab, "g1", VERIFY_EVERY_MS)?);
        Ok(this)
    }

    /// Nothing that was heard of the guest until now was taken back.
    pub(super) fn clean(&mut self) -> Result<()> {
        std::thread::sleep(ASKED.saturating_sub(self.began.elapsed()));
        self.verify.take().context("verify has ended already")?.end()?.ensure_clean()
    }

    pub(super) fn witness_up(&mut self) -> Result<()> {
        let folder = self.lab.dir().path().join("witness");
        fs::create_dir_all(&folder)?;
        let program = workspace::target().join("release").join(WATCHDOG);
        let mut command = process::tied(&self.lab.dir().helper(), Some(&self.lab.dir().netns()), program);
        command.arg("--witness").arg(format!("0.0.0.0:{WITNESS_PORT}")).arg("--witness-dir").arg(&folder);
        command.arg("--pki-dir").arg(pki::folder(&self.lab.dir().shared(), pki::WITNESS));
        command.args(HostName::ALL.iter().flat_map(|host| ["--allow", host.name()]));
        let log = self.lab.dir().shared().join("log").join("witness.log");
        let log = fs::File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.witness = Some(command.spawn().context("cannot start the witness")?);
        Ok(())
    }

    pub(super) fn witness_down(&mut self) -> Result<()> {
        if let Some(mut witness) = self.witness.take() {
            witness.kill()?;
            witness.wait()?;
        }
        Ok(())
    }

    /// Has the watchdog of a host keep guests; also after every boot of it.
    pub(super) fn watch(&self, host: HostName) -> Result<()> {
        let peers = [Net::Repl, Net::Lan]
            .map(|net| format!("--peer\n{}:{HEARTBEAT_PORT}", host.other().address(net)));
        let arguments = format!(
            "{}\n--witness-at\n{}:{WITNESS_PORT}\n--suspect-after-ms\n{SUSPECT_AFTER_MS}\n--qemu-silent-ms\n{QEMU_SILENT_MS}\
             \n--heartbeat-key\n{}\n--on-lost-backup\n{}",
            peers.join("\n"),
            self.witness_on.client(),
            pki::heartbeat_key(&self.lab.dir().shared()).display(),
            self.policy,
        );
        let fence = self.fence.as_ref().map(|program| format!("\n--fence\n{}", program.display()));
        self.lab.restart_daemon(host, WATCHDOG, &(arguments + &fence.unwrap_or_default()))
    }

    /// What is waited for in the logs comes from now on.
    pub(super) fn mark(&mut self) {
        self.from = logs::ends(self.lab);
    }

    /// What the watchdog of a host has said since the mark.
    pub(super) fn said_since(&self, host: HostName) -> String {
        logs::said(self.lab, host, &self.from)
    }

    pub(super) fn wait_said(&self, host: HostName, words: &str) -> Result<String> {
        let end = Instant::now() + LIMIT;
        loop {
            let text = self.said_since(host);
            if let Some(line) = text.lines().find(|line| line.contains(words)) {
                return Ok(line.to_owned());
            }
            ensure!(Instant::now() < end, "the watchdog of {host} never said {words:?}, but:\n{text}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The guest runs on `on` and the other host would take it over; both watchdogs have said so since the mark.
    pub(super) fn paired(&mut self, on: HostName) -> Result<()> {
        self.wait_said(on, "role=\"protected\"")?;
        self.wait_said(on.other(), "role=\"standby\"")?;
        self.protected(on)?;
        self.lab.wait_status((on.other(), Role::Backup), "g1", LIMIT, |status| {
            status.text("standby").starts_with("ready: warm")
        })?;
        self.mark();
        self.answers_since(Instant::now()).map(drop)
    }

    pub(super) fn protected(&self, on: HostName) -> Result<u64> {
        let status =
            self.lab.wait_status((on, Role::Primary), "g1", LIMIT, |status| status.state() == "protected")?;
        status.number("full_copies_total").context("the agent does not count full copies")
    }

    /// The same guest goes on answering, and has forgotten nothing a client has heard.
    pub(super) fn answers_since(&mut self, moment: Instant) -> Result<Sample> {
        let first = self.observer.first_after(moment, LIMIT).with_context(|| {
            let said =
                HostName::ALL.map(|host| format!("the watchdog of {host} said\n{}", self.said_since(host)));
            format!("nobody answers for the guest; {}", said.join("\n"))
        })?;
        ensure!(first.count.boot == self.boot, "the guest was started anew: {:?}", first.count);
        ensure!(first.count.total >= self.total, "{} was heard, then {:?}", self.total, first.count);
        self.total = first.count.total;
        Ok(first)
    }

    /// After what was done to `from` at `moment` the other host takes the guest over; says, and gives, for how long nobody
    /// answered.
    pub(super) fn taken_over(&mut self, from: HostName, moment: Instant, what: &str) -> Result<Duration> {
        let to = from.other();
        self.wait_said(to, "the guest was taken over").with_context(|| what.to_owned())?;
        let before = self.observer.last().map_or(moment, |sample| sample.at.min(moment));
        // Nothing of the old instance can be on its way any more.
        let first = self.answers_since(Instant::now()).with_context(|| what.to_owned())?;
        Guest::wait(self.lab.dir(), "g1", LIMIT)?.must("check")?;
        let silent = first.at.saturating_duration_since(before);
        println!("    {what}: {to} took the guest over, at the latest after {} ms", silent.as_millis());
        Ok(silent)
    }

    /// How long a failover to a host may take, as that is said to an operator.
    pub(super) fn bound(&self, to: HostName) -> Result<Duration> {
        let said = self.lab.must_understudy(to, &["explain", "g1", "--json"])?;
        let said: Value = serde_json::from_str(&said).with_context(|| format!("not JSON: {said}"))?;
        said["bound_ms"].as_u64().map(Duration::from_millis).with_context(|| format!("no bound: {said}"))
    }

    /// Of the takeover since the last one asked for.
    pub(super) fn report(&mut self, host: HostName) -> Result<Value> {
        let end = Instant::now() + LIMIT;
        loop {
            // It is written when the agent has said how long its part took.
            let said = self.lab.understudy(host, &["report", "g1", "--json"])?;
            let report: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
            if let Some(term) = report["term"].as_u64().filter(|term| *term > self.reported) {
                self.reported = term;
                return Ok(report);
            }
            ensure!(Instant::now() < end, "no report: {}{}", said.stdout, said.stderr);
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Only one host at a time has spoken for the guest, in this order, and never what was taken back.
    pub(super) fn spoke(&mut self, hosts: &[HostName]) -> Result<()> {
        if self.verify.is_some() {
            self.clean()?;
        }
        let turns = self.sides.turns()?;
        let order: Vec<HostName> = turns.iter().map(|(host, _)| *host).collect();
        ensure!(order == hosts, "frames of the guest came from {turns:?}");
        Ok(())
    }
}

impl Drop for Keeping<'_> {
    fn drop(&mut self) {
        for host in HostName::ALL {
            // One that has no power has none.
            drop(self.lab.restart_daemon(host, WATCHDOG, ""));
        }
        drop(self.witness_down());
    }
}
