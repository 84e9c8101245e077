//! `cargo xtask lab ...`, and the same as `lab ...` in scripts.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::domain::GuestSpec;
use super::guest::Guest;
use super::plan::{GUEST_PORT, HostName, Link, Net, guest_address};
use super::remote::{self, Exec};
use super::roots::Roots;
use super::state::LabDir;
use super::{Lab, agents, control, control::Request};
use crate::testing::Report;
use crate::ui::Steps;
use crate::{process, scenarios};

/// Which lab is meant: one for every checkout, unless `LAB_NAME` says otherwise.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// The lab's name
    #[arg(long, global = true, env = "LAB_NAME")]
    name: Option<String>,
    #[command(subcommand)]
    command: LabCommand,
}

/// What the hosts are rooted in.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct RootArg {
    /// What the hosts are rooted in: machine, debian13, or one each as in alpha=machine,beta=debian13
    #[arg(long = "root", value_name = "ROOT")]
    roots: Option<Roots>,
}

impl RootArg {
    pub(crate) fn roots(self) -> Roots {
        self.given().unwrap_or_default()
    }

    pub(crate) fn given(self) -> Option<Roots> {
        self.roots
    }
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Boots the hosts alpha and beta and leaves them running
    Up {
        /// The lab ends by itself after this many minutes
        #[arg(long, default_value_t = 120)]
        minutes: u64,
        /// Leave the agents out
        #[arg(long)]
        bare: bool,
        #[command(flatten)]
        root: RootArg,
    },
    /// What is running
    Status {
        #[arg(long)]
        json: bool,
    },
    /// Runs a command in a host and returns its exit status
    Exec {
        host: HostName,
        /// Pass standard input on
        #[arg(short, long)]
        interactive: bool,
        /// Seconds after which it is killed
        #[arg(long, default_value_t = 600)]
        limit: u64,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Boots a lab, runs a program in the client's network namespace, takes the lab down, returns its status
    Run {
        /// Use the lab that is running, and leave it running
        #[arg(long)]
        attach: bool,
        /// Leave the agents out
        #[arg(long)]
        bare: bool,
        #[command(flatten)]
        root: RootArg,
        /// Minutes after which it is killed
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        script: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Cuts the power of a host
    PowerOff { host: HostName },
    /// Switches a host on and waits until it is ready
    PowerOn { host: HostName },
    /// Unplugs a cable: lan, repl, or lan:alpha, repl:beta, ...
    Cut { link: Link },
    /// Plugs a cable in again
    Heal { link: Link },
    /// Records the frames of a link until the lab ends or --stop
    Pcap {
        link: Link,
        #[arg(required_unless_present = "stop")]
        file: Option<PathBuf>,
        /// End the recording of this link
        #[arg(long, conflicts_with = "file")]
        stop: bool,
    },
    /// Lab guests
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Builds the agents anew and restarts them in the running hosts
    Deploy,
    /// Runs the scenarios of the test group lab, or those whose names contain TEXT, in the running lab
    Scenarios {
        #[arg(default_value = "", value_name = "TEXT")]
        pattern: String,
    },
    /// Ends the lab
    Down,
}

#[derive(Debug, Subcommand)]
enum GuestCommand {
    /// Defines and starts a guest
    Start {
        guest: String,
        host: HostName,
        #[command(flatten)]
        shape: Shape,
    },
    /// Prints a guest's domain XML
    Xml {
        guest: String,
        #[command(flatten)]
        shape: Shape,
    },
    /// Sends one request to a guest's program: count, id, check, `dirty 1000 50`, ...
    Ask {
        guest: String,
        #[arg(required = true, trailing_var_arg = true)]
        request: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Shape {
    /// pc or q35
    #[arg(long, default_value = "pc")]
    machine: String,
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// MiB
    #[arg(long, default_value_t = 128)]
    memory: u32,
    /// kvm, or qemu for software emulation
    #[arg(long, default_value = "kvm")]
    kind: String,
}

impl Shape {
    fn spec(self, guest: &str) -> GuestSpec {
        let Self { machine, vcpus, memory: memory_mib, kind } = self;
        GuestSpec { machine, vcpus, memory_mib, kind, ..GuestSpec::new(guest) }
    }
}

/// Does it; gives the exit status.
pub(crate) fn main(args: LabArgs) -> Result<i32> {
    process::ensure_root()?;
    let dir = match &args.name {
        Some(name) => LabDir::new(name)?,
        None => LabDir::of_checkout(),
    };
    match args.command {
        LabCommand::Up { minutes, bare, root } => up(dir, root.roots(), minutes, bare)?,
        LabCommand::Status { json } => status(&dir, json)?,
        LabCommand::Exec { host, interactive, limit, command } => {
            let exec = Exec::new(command).limit(Duration::from_secs(limit));
            let exec = if interactive { exec.with_input() } else { exec };
            return exec.stream(&dir, host, &mut std::io::stdout(), &mut std::io::stderr());
        }
        LabCommand::Run { attach, bare, root, minutes, script, arguments } => {
            let limit = Duration::from_secs(minutes * 60);
            let lab = if attach {
                Lab::attach(dir)
            } else {
                booted(LabDir::unique(), root.roots(), limit, true, bare, &Steps::start())?
            };
            let code = run(&lab, &script, &arguments, limit)?;
            if !attach {
                lab.down()?;
            }
            return Ok(code);
        }
        LabCommand::PowerOff { host } => Lab::attach(dir).power_off(host)?,
        LabCommand::PowerOn { host } => {
            let lab = Lab::attach(dir);
            lab.power_on(host)?;
            lab.wait_ready(host, &Steps::start())?;
        }
        LabCommand::Cut { link } => Lab::attach(dir).cut(link)?,
        LabCommand::Heal { link } => Lab::attach(dir).heal(link)?,
        LabCommand::Pcap { link, file, .. } => {
            let request = match file {
                Some(file) => Request::Pcap(link, std::path::absolute(file)?),
                None => Request::PcapStop(link),
            };
            control::ask(&dir, &request)?;
        }
        LabCommand::Guest(command) => return guest(&dir, command),
        LabCommand::Deploy => {
            agents::build()?;
            agents::deploy(&dir)?;
        }
        LabCommand::Scenarios { pattern } => {
            let mut report = Report::default();
            scenarios::play(&Lab::attach(dir), &mut report, &pattern);
            return Ok(report.close());
        }
        LabCommand::Down => {
            if dir.is_running() {
                Lab::attach(dir.clone()).down()?;
            }
            dir.clean()?;
        }
    }
    Ok(0)
}

/// A lab with both hosts ready.
pub(crate) fn booted(
    dir: LabDir,
    roots: Roots,
    lifetime: Duration,
    lifeline: bool,
    bare: bool,
    steps: &Steps,
) -> Result<Lab> {
    if !bare {
        steps.waiting("building the agents");
        agents::build()?;
        steps.say("the agents are built");
    }
    let lab = Lab::start(dir, roots, lifetime, lifeline)?;
    if !bare {
        agents::deploy(lab.dir())?;
    }
    lab.boot(steps)?;
    Ok(lab)
}

fn up(dir: LabDir, roots: Roots, minutes: u64, bare: bool) -> Result<()> {
    let lab = booted(dir, roots, Duration::from_secs(minutes * 60), false, bare, &Steps::start())?;
    let dir = lab.detach();
    println!(
        "The lab `{}` is up for {minutes} minutes; its files are in {}",
        dir.name(),
        dir.path().display()
    );
    Ok(())
}

fn status(dir: &LabDir, as_json: bool) -> Result<()> {
    let reply = control::ask(dir, &Request::Status)?;
    let hosts: Vec<_> = HostName::ALL
        .into_iter()
        .map(|host| {
            let phase = remote::phase(dir, host).ok();
            json!({
                "name": host.name(),
                "power": reply.powered.contains_key(&host),
                "pid": reply.powered.get(&host),
                "phase": phase.as_ref().map(|phase| &phase.name),
                "ready": phase.as_ref().is_some_and(super::wire::Phase::is_ready),
                "ready_after_ms": phase.as_ref().filter(|phase| phase.is_ready()).map(|phase| phase.uptime_ms),
                "failure": phase.and_then(|phase| phase.failure),
                "lan": host.address(Net::Lan),
                "repl": host.address(Net::Repl),
                "console": dir.console(host),
                "root": reply.roots.of(host).name(),
            })
        })
        .collect();
    if as_json {
        let whole = json!({
            "name": dir.name(), "netns": dir.netns(), "dir": dir.shared(), "supervisor": reply.supervisor,
            "seconds_left": reply.seconds_left, "cut": reply.cut, "hosts": hosts,
        });
        println!("{}", serde_json::to_string_pretty(&whole)?);
        return Ok(());
    }
    println!(
        "lab {} (ends in {} min), LAB_DIR {}",
        dir.name(),
        reply.seconds_left / 60,
        dir.shared().display()
    );
    for host in hosts {
        let text = |key: &str| host[key].as_str().unwrap_or("-").to_owned();
        let power = if host["power"] == true { "on" } else { "off" };
        println!(
            "  {:6} power {power:3}  {:14} {}  {:8}  {}",
            text("name"),
            text("phase"),
            text("lan"),
            text("root"),
            text("failure")
        );
    }
    for link in reply.cut {
        println!("  cut: {link}");
    }
    Ok(())
}

/// Runs a program of the user's beside the lab.
fn run(lab: &Lab, script: &str, arguments: &[String], limit: Duration) -> Result<i32> {
    let dir = lab.dir();
    let file = std::path::Path::new(script);
    let program =
        if file.is_file() { std::path::absolute(file)?.display().to_string() } else { script.to_owned() };
    let path = std::env::var("PATH").unwrap_or_default();
    let helpers = dir.path().join("bin");
    let mut command = process::tied(&dir.helper(), Some(&dir.netns()), &program);
    command.args(arguments).env("PATH", format!("{}:{path}", helpers.display())).stdin(Stdio::null());
    command.env("LAB_NAME", dir.name()).env("LAB_DIR", dir.shared());
    for host in HostName::ALL {
        let name = host.name().to_uppercase();
        command.env(format!("LAB_{name}"), host.address(Net::Lan).to_string());
        command.env(format!("LAB_{name}_REPL"), host.address(Net::Repl).to_string());
    }
    command.env("LAB_GUEST", guest_address("g1").to_string()).env("LAB_GUEST_PORT", GUEST_PORT.to_string());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    match process::wait(&mut child, limit)? {
        Some(status) => Ok(process::exit_code(status)),
        None => bail!("{script} took longer than {} minutes and was killed", limit.as_secs() / 60),
    }
}

fn guest(dir: &LabDir, command: GuestCommand) -> Result<i32> {
    match command {
        GuestCommand::Start { guest, host, shape } => {
            Lab::attach(dir.clone()).start_guest(host, &shape.spec(&guest))?;
        }
        GuestCommand::Xml { guest, shape } => print!("{}", shape.spec(&guest).xml(dir)),
        GuestCommand::Ask { guest, request } => {
            let answer = Guest::connect(dir, &guest, Duration::from_secs(10))?.ask(&request.join(" "))?;
            println!("{answer}");
            return Ok(i32::from(!answer.starts_with("ok")));
        }
    }
    Ok(0)
}
