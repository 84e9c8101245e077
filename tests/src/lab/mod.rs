//! The lab: two real hosts on one machine (see `docs`), as a handle for commands, the demo and scenarios.

pub(crate) mod agents;
pub(crate) mod cli;
pub(crate) mod commits;
pub(crate) mod control;
pub(crate) mod domain;
pub(crate) mod frames;
pub(crate) mod guest;
pub(crate) mod machine;
pub(crate) mod network;
pub(crate) mod observer;
pub(crate) mod pinger;
pub(crate) mod pki;
pub(crate) mod plan;
pub(crate) mod remote;
pub(crate) mod roots;
pub(crate) mod sides;
pub(crate) mod stamps;
pub(crate) mod state;
pub(crate) mod supervisor;
pub(crate) mod understudy;
pub(crate) mod verify;
pub(crate) mod wire;

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::assets::Assets;
use crate::assets::probe::Accelerator;
use crate::host::boot::{VIRTQEMUD, copy_files, probed};
use crate::ui::Steps;
use crate::{process, setup, workspace};
use control::{Reply, Request};
use machine::Hardware;
use plan::{HostName, Link};
use remote::{Exec, Outcome};
use roots::{Root, Roots};
use state::LabDir;
use supervisor::Order;

/// A host that is not up after this will not come up. With software emulation and a busy machine it is
/// ten times what it takes.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// A host that takes longer to do nothing is not slow but stuck.
const STUCK_LIMIT: Duration = Duration::from_secs(20);
const HOST_MEMORY_MIB: u32 = 3072;

/// A running lab. One made by [`Lab::start`] ends when this is dropped, or with this process.
#[derive(Debug)]
pub(crate) struct Lab {
    dir: LabDir,
    supervisor: Option<Child>,
}

impl Lab {
    /// Sets the machine up and starts a lab that is ours alone; its hosts still have no power.
    pub(crate) fn start(dir: LabDir, roots: Roots, lifetime: Duration, lifeline: bool) -> Result<Self> {
        process::ensure_root()?;
        setup::ensure()?;
        LabDir::clean_stale()?;
        if dir.is_running() {
            bail!("the lab `{}` is already running: `cargo xtask lab down` ends it", dir.name());
        }
        dir.clean()?;
        let assets = Assets::ensure(roots)?;
        fs::create_dir_all(dir.shared())?;
        for (from, to) in
            [(assets.guest_kernel.image(), "vmlinuz"), (assets.guest_initramfs.clone(), "initramfs.img")]
        {
            let folder = dir.shared().join("guest");
            fs::create_dir_all(&folder)?;
            fs::copy(&from, folder.join(to)).with_context(|| format!("cannot copy {}", from.display()))?;
        }
        if let Some(daemon) = &assets.virtqemud {
            fs::copy(daemon, dir.shared().join(VIRTQEMUD)).context("cannot copy virtqemud")?;
        }
        for host in HostName::ALL {
            let root = roots.of(host);
            copy_files(&probed_cache(root)?, &dir.shared().join(probed(root)))?;
        }
        let hardware = Hardware {
            kernel: assets.host_kernel.image(),
            initramfs: assets.host_initramfs.clone(),
            modules: assets.host_kernel.modules(),
            accelerator: assets.accelerator,
            emulator: assets.emulator,
            memory_mib: HOST_MEMORY_MIB,
            roots,
            trees: assets.trees,
        };
        if hardware.accelerator == Accelerator::Tcg {
            eprintln!(
                "This machine's KVM does not run Linux: the hosts are emulated (TCG), slower but the same."
            );
        }
        let order = Order { name: dir.name().to_owned(), hardware, lifetime, lifeline };
        let supervisor = supervisor::spawn(&dir, &order)?;
        let mut lab = Self { dir, supervisor: Some(supervisor) };
        lab.wait_for_supervisor()?;
        Ok(lab)
    }

    /// A lab that somebody else started.
    pub(crate) fn attach(dir: LabDir) -> Self {
        Self { dir, supervisor: None }
    }

    fn wait_for_supervisor(&mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            if self.ask(&Request::Status).is_ok() {
                return Ok(());
            }
            let ended = self.supervisor.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                bail!(
                    "the lab's supervisor ended ({status}): {}",
                    state::tail(&self.dir.supervisor_log(), 20)
                );
            }
            std::thread::sleep(Duration::from_millis(30));
        }
        bail!("the lab's supervisor does not answer: {}", state::tail(&self.dir.supervisor_log(), 20))
    }

    pub(crate) fn dir(&self) -> &LabDir {
        &self.dir
    }

    /// Lets the lab live on without us.
    pub(crate) fn detach(mut self) -> LabDir {
        self.supervisor = None;
        self.dir.clone()
    }

    pub(crate) fn ask(&self, request: &Request) -> Result<Reply> {
        control::ask(&self.dir, request)
    }

    /// What the hosts are rooted in.
    pub(crate) fn roots(&self) -> Result<Roots> {
        self.ask(&Request::Status).map(|reply| reply.roots)
    }

    /// Whether the hosts' processors are emulated.
    pub(crate) fn is_emulated(&self) -> Result<bool> {
        self.ask(&Request::Status).map(|reply| reply.emulated)
    }

    pub(crate) fn power_on(&self, host: HostName) -> Result<()> {
        self.ask(&Request::PowerOn(host)).map(drop)
    }

    pub(crate) fn power_off(&self, host: HostName) -> Result<()> {
        self.ask(&Request::PowerOff(host)).map(drop)
    }

    pub(crate) fn cut(&self, link: Link) -> Result<()> {
        self.ask(&Request::Cut(link)).map(drop)
    }

    pub(crate) fn heal(&self, link: Link) -> Result<()> {
        self.ask(&Request::Heal(link)).map(drop)
    }

    /// Switches both hosts on and waits until they are ready.
    pub(crate) fn boot(&self, steps: &Steps) -> Result<()> {
        for host in HostName::ALL {
            self.power_on(host)?;
        }
        for host in HostName::ALL {
            self.wait_ready(host, steps)?;
        }
        let roots = self.roots()?;
        HostName::ALL
            .into_iter()
            .map(|host| roots.of(host))
            .try_for_each(|root| copy_files(&self.dir.shared().join(probed(root)), &probed_cache(root)?))
    }

    /// Switches a host on if it is off, and waits until it is ready.
    pub(crate) fn ensure_up(&self, host: HostName, steps: &Steps) -> Result<()> {
        self.ensure_on(host)?;
        self.wait_ready(host, steps)
    }

    /// Gives a host power unless it has it.
    pub(crate) fn ensure_on(&self, host: HostName) -> Result<()> {
        if self.ask(&Request::Status)?.powered.contains_key(&host) { Ok(()) } else { self.power_on(host) }
    }

    /// Hosts that ended by themselves, and those that have power but do not even run `true`, over a network that is
    /// never cut; with what happened to each.
    pub(crate) fn fallen_hosts(&self) -> Result<Vec<(HostName, String)>> {
        let Reply { powered, ended, .. } = self.ask(&Request::Status)?;
        let alive = |host: &HostName| self.exec(*host, &Exec::new(["true"]).limit(STUCK_LIMIT)).is_ok();
        let stuck = powered.into_keys().filter(|host| !alive(host)).map(|host| (host, "hangs".to_owned()));
        let panicked = ended.into_keys().map(|host| {
            let console = state::tail(&self.dir.console(host), 60);
            let why =
                console.lines().rfind(|line| line.contains("Kernel panic")).unwrap_or("ended").to_owned();
            (host, why)
        });
        Ok(stuck.chain(panicked).collect())
    }

    /// Cuts the power of a host unless it has none.
    pub(crate) fn ensure_off(&self, host: HostName) -> Result<()> {
        if self.ask(&Request::Status)?.powered.contains_key(&host) { self.power_off(host) } else { Ok(()) }
    }

    /// Waits until libvirt of a host answers; shows the end of its console if it never does.
    pub(crate) fn wait_ready(&self, host: HostName, steps: &Steps) -> Result<()> {
        let end = Instant::now() + BOOT_LIMIT;
        let mut doing = String::from("kernel");
        while Instant::now() < end {
            steps.waiting(format!("host {host}: {doing}"));
            let reply = self.ask(&Request::Status)?;
            if let Some(how) = reply.ended.get(&host) {
                bail!(
                    "host {host} ended while booting ({how}); its console said:\n{}",
                    self.console_tail(host)
                );
            }
            if let Ok(phase) = remote::phase(&self.dir, host) {
                if let Some(failure) = phase.failure {
                    bail!(
                        "host {host} failed at {}: {failure}\nits console said:\n{}",
                        phase.name,
                        self.console_tail(host)
                    );
                }
                if phase.is_ready() {
                    steps.say(format!("host {host} is ready"));
                    return Ok(());
                }
                doing = phase.name;
            }
            std::thread::sleep(Duration::from_millis(150));
        }
        bail!(
            "host {host} is not ready after {BOOT_LIMIT:?} (at: {doing}); its console said:\n{}",
            self.console_tail(host)
        )
    }

    fn console_tail(&self, host: HostName) -> String {
        state::tail(&self.dir.console(host), 25)
    }

    /// Runs a program in a host, whatever its exit status.
    pub(crate) fn exec(&self, host: HostName, exec: &Exec) -> Result<Outcome> {
        exec.run(&self.dir, host)
    }

    /// Runs a shell script in a host; it must succeed. Gives its standard output.
    pub(crate) fn shell(&self, host: HostName, script: &str) -> Result<String> {
        self.checked(host, &Exec::shell(script))
    }

    /// Runs a program in a host; it must succeed. Gives its standard output.
    pub(crate) fn checked(&self, host: HostName, exec: &Exec) -> Result<String> {
        let outcome = self.exec(host, exec)?;
        if outcome.code != 0 {
            let said = if outcome.stderr.trim().is_empty() { &outcome.stdout } else { &outcome.stderr };
            bail!("on {host}, {exec:?} ended with {}: {}", outcome.code, said.trim());
        }
        Ok(outcome.stdout)
    }

    /// Defines a guest in a host and starts it; it answers a few seconds later.
    pub(crate) fn start_guest(&self, host: HostName, spec: &domain::GuestSpec) -> Result<()> {
        let file = self.dir.shared().join(format!("{}.xml", spec.name));
        fs::write(&file, spec.xml(&self.dir))?;
        let script = format!("virsh -q define {} && virsh -q start {}", file.display(), spec.name);
        self.checked(host, &Exec::shell(&script).limit(Duration::from_secs(120))).map(drop)
    }

    /// The ends of what the agents logged.
    pub(crate) fn agent_logs(&self) -> String {
        let files = fs::read_dir(self.dir.shared().join("log")).into_iter().flatten().flatten();
        files
            .map(|file| format!("--- {}\n{}\n", file.file_name().display(), state::tail(&file.path(), 25)))
            .collect()
    }

    /// What the gates hold and what has passed them, and whether QEMU runs: for a guest that does not answer any more.
    pub(crate) fn gates(&self) -> String {
        let look = Exec::shell(
            "date -u +%FT%T.%N
            for card in $(ls /sys/class/net | grep ^vnet); do
              ip -s link show dev $card
              ip -s link show dev usg-$card
              tc -s qdisc show dev usg-$card
              tc -s filter show dev $card ingress
            done
            virsh list --all
            virsh qemu-monitor-command --hmp g1 'info status'
            virsh qemu-monitor-command --hmp g1 'info migrate' | grep -i '^migration status'",
        )
        .limit(STUCK_LIMIT);
        let of = |host| match self.exec(host, &look) {
            Ok(outcome) => format!("--- {host}\n{}\n", outcome.stdout),
            Err(error) => format!("--- {host}: {error:#}\n"),
        };
        HostName::ALL.into_iter().map(of).collect()
    }

    /// Ends the lab.
    pub(crate) fn down(mut self) -> Result<()> {
        let result = self.ask(&Request::Down).map(drop);
        if let Some(mut supervisor) = self.supervisor.take() {
            process::wait(&mut supervisor, Duration::from_secs(30))?;
        }
        result
    }
}

/// Where the hosts' libvirt finds next time what it has found out about QEMU.
fn probed_cache(root: Root) -> Result<std::path::PathBuf> {
    Ok(workspace::lab_cache()?.join(format!("libvirt-capabilities-{root}")))
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut supervisor) = self.supervisor.take() {
            // The lifeline: with it cut the supervisor cleans up and ends.
            drop(supervisor.stdin.take());
            drop(process::wait(&mut supervisor, Duration::from_secs(30)));
        }
    }
}
