//! The agents of a host and their supervisor, kept running as a service manager would.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::lab::pki;
use crate::lab::plan::{BACKUP_ADMIN_PORT, BACKUP_PORT, HostName, PRIMARY_ADMIN_PORT};

/// systemd's default for `RestartSec`.
const RESTART: Duration = Duration::from_millis(100);
const POLL: Duration = Duration::from_millis(300);

/// A dump of all memory at a stop takes long in an emulated host, and is no hung agent; as long as the agent itself allows
/// for it, and a while to let the guest run.
const HUNG_AFTER_MS: u32 = 330_000;

/// Where programs come from and where they run from.
struct Program {
    from: PathBuf,
    to: PathBuf,
}

impl Program {
    fn new(shared: &Path, name: &str) -> Self {
        Self { from: shared.join("bin").join(name), to: Path::new("/usr/local/bin").join(name) }
    }

    /// When the one that was built last was put here.
    fn stamp(&self) -> Option<SystemTime> {
        fs::metadata(&self.from).and_then(|data| data.modified()).ok()
    }

    fn fetch(&self) -> Result<()> {
        let fresh = self.to.with_extension("new");
        fs::copy(&self.from, &fresh).with_context(|| format!("cannot copy {}", self.from.display()))?;
        fs::rename(&fresh, &self.to).context("cannot put a program into place")
    }
}

pub(super) fn keep_running(shared: &Path, host: HostName) {
    // Some scenarios ask for plain connections, which only a lab's agents accept from another host.
    let both = |port: u16| {
        format!("--insecure-anywhere true --admin-listen 0.0.0.0:{port} --admin-allow {}", pki::OPERATOR)
    };
    let allowed = HostName::ALL.map(|host| format!("--allow {host}")).join(" ");
    let daemons = [
        ("understudy-primary", both(PRIMARY_ADMIN_PORT)),
        (
            "understudy-backup",
            format!("--listen 0.0.0.0:{BACKUP_PORT} {allowed} {}", both(BACKUP_ADMIN_PORT)),
        ),
        ("understudy-watchdog", format!("--hung-after-ms {HUNG_AFTER_MS}")),
    ];
    let certificates = pki::folder(shared, host.name());
    for (name, arguments) in daemons {
        let program = Program::new(shared, name);
        let log = shared.join("log").join(format!("{host}-{name}.log"));
        let certificates = certificates.clone();
        let arguments: Vec<_> = arguments.split_whitespace().map(str::to_owned).collect();
        std::thread::spawn(move || supervise(name, &program, &arguments, &certificates, &log));
    }
    let commands = ["understudy", "understudy-hook", "understudy-generic"]
        .map(|name| (name, Program::new(shared, name), None));
    std::thread::spawn(move || keep_in_place(commands));
}

/// Programs that are only to be there, each with the stamp of what is there.
fn keep_in_place(mut commands: [(&str, Program, Option<SystemTime>); 3]) {
    loop {
        for (name, program, have) in &mut commands {
            let stamp = program.stamp();
            if stamp.is_some() && stamp != *have && report(name, program.fetch()) {
                *have = stamp;
            }
        }
        std::thread::sleep(POLL);
    }
}

/// Runs one daemon for ever. `/run/lab/NAME.hold` keeps it from being started; `/run/lab/NAME.args` adds
/// arguments, one a line.
fn supervise(name: &str, program: &Program, arguments: &[String], certificates: &Path, log: &Path) {
    let hold = format!("/run/lab/{name}.hold");
    loop {
        let stamp = program.stamp();
        if stamp.is_none() || Path::new(&hold).exists() {
            std::thread::sleep(POLL);
            continue;
        }
        if report(name, place_certificates(certificates)) && report(name, program.fetch()) {
            report(name, run(name, program, arguments, log, stamp));
        }
        std::thread::sleep(RESTART);
    }
}

/// Where libvirt and the agents look for them. They are made before the programs are put into the shared folder.
fn place_certificates(from: &Path) -> Result<()> {
    for file in pki::FILES {
        let to = Path::new("/etc/pki").join(file);
        if !to.exists() {
            fs::create_dir_all(to.parent().unwrap_or(&to))?;
            // Three daemons begin at once: each sees whole files only.
            let fresh = to.with_extension(format!("{:?}", std::thread::current().id()));
            fs::copy(from.join(file), &fresh).with_context(|| format!("no certificate {file}"))?;
            fs::rename(&fresh, &to)?;
        }
    }
    Ok(())
}

fn report(name: &str, result: Result<()>) -> bool {
    if let Err(error) = &result {
        println!("LAB {name}: {error:#}");
    }
    result.is_ok()
}

/// Until it ends by itself or there is a newer one.
fn run(
    name: &str,
    program: &Program,
    arguments: &[String],
    log: &Path,
    stamp: Option<SystemTime>,
) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)?;
    }
    let log = File::options().create(true).append(true).open(log)?;
    let more = fs::read_to_string(format!("/run/lab/{name}.args")).unwrap_or_default();
    let mut child = Command::new(&program.to)
        .args(arguments)
        .args(more.lines())
        .env("RUST_BACKTRACE", "1")
        .env("RUST_LOG", "info")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    fs::write(format!("/run/lab/{name}.pid"), child.id().to_string())?;
    let mut polls = 0_u32;
    loop {
        if let Some(status) = child.try_wait()? {
            println!("LAB {name} ended: {status}");
            return Ok(());
        }
        polls += 1;
        // Asking the shared folder costs more than asking about a child.
        if polls.is_multiple_of(100) && program.stamp().is_some_and(|now| Some(now) != stamp) {
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
