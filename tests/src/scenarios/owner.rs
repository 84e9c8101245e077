//! Nobody is asked: the watchdogs of the hosts and a witness decide who runs a guest.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{SHAPES, Scenario, start_shaped};
use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::observer::Observer;
use crate::lab::plan::{HostName, Net};
use crate::lab::understudy::Role;
use crate::{process, workspace};

pub(super) const SCENARIOS: &[Scenario] =
    &[("owner: a power cut is noticed and the guest promoted without anybody", unattended)];

const LIMIT: Duration = Duration::from_secs(120);
const WATCHDOG: &str = "understudy-watchdog";
const WITNESS_PORT: u16 = 7421;
const HEARTBEAT_PORT: u16 = 7422;
/// Emulated hosts stand still for seconds, now and then.
const SUSPECT_AFTER_MS: u32 = 10_000;

/// In the client's namespace, which is neither host.
struct Witness(Child);

impl Witness {
    fn start(lab: &Lab) -> Result<Self> {
        let folder = lab.dir().path().join("witness");
        fs::create_dir_all(&folder)?;
        let program = workspace::target().join("release").join(WATCHDOG);
        let mut command = process::tied(&lab.dir().helper(), Some(&lab.dir().netns()), program);
        command.arg("--witness").arg(format!("{}:{WITNESS_PORT}", Net::Mgmt.client()));
        command.arg("--witness-dir").arg(&folder);
        let log = fs::File::create(lab.dir().shared().join("log").join("witness.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.spawn().map(Self).context("cannot start the witness")
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn automatic(host: HostName) -> String {
    let peers =
        [Net::Repl, Net::Lan].map(|net| format!("--peer\n{}:{HEARTBEAT_PORT}", host.other().address(net)));
    format!(
        "{}\n--witness-at\n{}:{WITNESS_PORT}\n--suspect-after-ms\n{SUSPECT_AFTER_MS}\n--on-qemu-crash\nleave",
        peers.join("\n"),
        Net::Mgmt.client()
    )
}

/// What the watchdog of a host has said since a moment.
fn said(lab: &Lab, host: HostName, from: usize) -> String {
    let whole = fs::read_to_string(log(lab, host)).unwrap_or_default();
    whole.get(from..).unwrap_or_default().to_owned()
}

fn log(lab: &Lab, host: HostName) -> std::path::PathBuf {
    lab.dir().shared().join("log").join(format!("{host}-{WATCHDOG}.log"))
}

fn wait_said(lab: &Lab, host: HostName, from: usize, words: &str) -> Result<String> {
    let end = Instant::now() + LIMIT;
    loop {
        let text = said(lab, host, from);
        if let Some(line) = text.lines().find(|line| line.contains(words)) {
            return Ok(line.to_owned());
        }
        ensure!(Instant::now() < end, "the watchdog of {host} never said {words:?}, but:\n{text}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn unattended(lab: &Lab) -> Result<()> {
    let _witness = Witness::start(lab)?;
    let from = HostName::ALL.map(|host| said(lab, host, 0).len());
    for host in HostName::ALL {
        lab.restart_daemon(host, WATCHDOG, &automatic(host))?;
    }
    let result = power_cut(lab, from);
    lab.restart_daemon(HostName::Beta, WATCHDOG, "")?;
    result
}

fn power_cut(lab: &Lab, from: [usize; 2]) -> Result<()> {
    let (on, backup) = (HostName::Alpha, HostName::Beta);
    let boot = start_shaped(lab, on, SHAPES[0])?.count()?.boot;
    lab.protect("g1", on)?;
    lab.wait_status((backup, Role::Backup), "g1", LIMIT, |status| {
        status.text("standby").starts_with("ready: warm")
    })?;
    wait_said(lab, on, from[0], "role=\"protected\"")?;
    wait_said(lab, backup, from[1], "role=\"standby\"")?;
    let observer = Observer::start(lab.dir(), "g1");
    observer.first_after(Instant::now(), LIMIT).context("the client saw nothing of the protected guest")?;
    lab.power_off(on)?;
    let cut = Instant::now();
    let before = observer.last().context("the client saw nothing before the cut")?;
    let first = observer.first_after(cut, LIMIT).with_context(|| {
        format!("nobody took the guest over; the watchdog of {backup} said\n{}", said(lab, backup, from[1]))
    })?;
    ensure!(first.count.boot == boot, "the guest was started anew: {:?}", first.count);
    ensure!(first.count.total >= before.count.total, "{:?}, then {:?}", before.count, first.count);
    Guest::wait(lab.dir(), "g1", LIMIT)?.must("check")?;
    println!("    {}", wait_said(lab, backup, from[1], "the guest was taken over")?);
    println!(
        "    no answer for {} ms, of it {SUSPECT_AFTER_MS} ms until the silence counts",
        first.at.saturating_duration_since(before.at).as_millis()
    );
    Ok(())
}
