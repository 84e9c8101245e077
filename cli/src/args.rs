//! The command line.

use clap::{Parser, Subcommand};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use understudy_proto::pace::EpochGoals;
use understudy_proto::policy::{GuestPolicy, LostBackup, QemuCrash};
use understudy_proto::rpc::transport;

use understudy_responder::PORT as RESPONDER_PORT;
use understudy_responder::frame::Mac;

/// Keeps virtual machines alive through the death of their host.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, disable_help_subcommand = true)]
pub(crate) struct Args {
    /// Where the agents of this host have their sockets.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/run/understudy",
        env = "UNDERSTUDY_RUN_DIR"
    )]
    pub run_dir: PathBuf,
    /// Ask these agents instead: a folder of sockets, one socket, https://HOST for both agents of a host that serve
    /// operators over TCP, or https://HOST:PORT for one.
    #[arg(long, global = true, value_name = "ADDRESS", env = "UNDERSTUDY_CONNECT")]
    pub connect: Option<String>,
    /// Certificates for https, in libvirt's layout: CA/cacert.pem, libvirt/clientcert.pem, libvirt/private/clientkey.pem.
    #[arg(long, global = true, value_name = "DIR", default_value = transport::PKI_DIR)]
    pub pki_dir: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Protect a running domain of this host: copy it to HOST and keep the copy current, epoch by epoch.
    ///
    /// Everything that stands against it is checked first; nothing is touched before the checks have passed.
    Protect(ProtectArgs),
    /// Change settings of a protected domain, without a new full copy.
    Set(SetArgs),
    /// End the protection of a domain; the guest runs on. On a backup: drop what is left of a guest there.
    Unprotect {
        /// Name, id or UUID of the domain.
        domain: String,
    },
    /// Start a guest on this host from its last committed epoch. Run it on the backup host.
    Failover(FailoverArgs),
    /// Move a protected guest to its backup as planned work, with nothing lost: it stands still for a moment, and goes on
    /// there. Run it on the host the guest runs on.
    Switchover(AboutArgs),
    /// The same, if the backup is the host where the guest was protected first.
    Failback(AboutArgs),
    /// Show the last takeover of a guest to or from this host: why, from which epoch, and how long each part took.
    Report(AboutArgs),
    /// Show within which time a guest of this host is taken over when its primary fails, with the arithmetic.
    Explain(AboutArgs),
    /// Show what the agents of this host know of their guests.
    ///
    /// With --json the answer is {"agents":{"primary":..,"backup":..},"guests":[..]}: for each agent "running" or
    /// why it did not answer, and a guest for each agent that knows it. Names of fields carry their unit.
    Status(StatusArgs),
    /// Find out, from outside, whether a guest ever takes back what it has said: run it somewhere on the network during
    /// failovers, while `understudy respond` runs in the guest.
    Verify(VerifyArgs),
    /// Answer `understudy verify`. Run it in the guest; it needs no agent.
    Respond(RespondArgs),
    /// Install, remove or examine libvirt's hook, which tells the agent of starts and ends, and refuses to start a guest
    /// that says required='yes' and cannot be protected.
    #[command(subcommand)]
    Hook(HookCommand),
    /// Print what makes a shell complete this command, for example: understudy completion bash >
    /// /etc/bash_completion.d/understudy
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of this command into a folder, for example /usr/local/share/man/man1.
    Man {
        /// The folder; it must exist.
        folder: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    /// Addresses of the guest, IPv4 or IPv6; each is asked over UDP and TCP.
    #[arg(required = true, value_name = "ADDRESS")]
    pub addresses: Vec<IpAddr>,
    /// Where the responder listens.
    #[arg(long, default_value_t = RESPONDER_PORT)]
    pub port: u16,
    /// Our network interface on the guest's segment: ICMP, ICMPv6, ARP, neighbour discovery, 802.1Q and multicast are asked
    /// as well. Needs root or CAP_NET_RAW.
    #[arg(long, value_name = "INTERFACE")]
    pub interface: Option<String>,
    /// The guest's hardware address; learnt by its first IPv4 address if left out.
    #[arg(long, value_name = "MAC", requires = "interface", value_parser = crate::verify::parse_mac)]
    pub mac: Option<Mac>,
    /// Where frames go that show a violation, as pcap.
    #[arg(long, value_name = "FILE", requires = "interface")]
    pub pcap: Option<PathBuf>,
    /// Time between two questions on a path, in milliseconds; three times as long where frames are asked.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub every_ms: u32,
    /// How long to go on; Ctrl-C ends it earlier, with the verdict.
    #[arg(long = "for", value_name = "SECONDS", default_value_t = 60)]
    pub seconds: u32,
    /// The verdict as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RespondArgs {
    /// Where to listen.
    #[arg(long, default_value_t = RESPONDER_PORT)]
    pub port: u16,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HookCommand {
    /// Put the hook where libvirt looks for it.
    Install(HookArgs),
    /// Take it away again.
    Remove(HookArgs),
    /// Say whether it is there, libvirt has seen it and the agent answers it.
    Status(HookArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct HookArgs {
    /// Where libvirt looks for hooks.
    #[arg(long, value_name = "DIR", default_value = "/etc/libvirt/hooks")]
    pub hooks_dir: PathBuf,
    /// The hook; understudy-hook beside this command if left out.
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ProtectArgs {
    /// Name, id or UUID of the domain.
    pub domain: String,
    /// The backup host, as HOST or HOST:PORT (7420 if no port is given).
    #[arg(long, value_name = "HOST")]
    pub to: String,
    #[command(flatten)]
    pub pace: PaceArgs,
    /// Replicate over plain TCP, without TLS. Only to a loopback address.
    #[arg(long)]
    pub insecure: bool,
    /// Let the guest's output through as it comes: after a failover clients may have seen what the guest never said.
    #[arg(long)]
    pub ungated: bool,
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// What watchdogs do with the guest on failures, where that is not what they were told for all.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct PolicyArgs {
    /// When its backup is lost: hold its output until there is one again, or let it run unprotected.
    #[arg(long, value_name = "hold|solo", value_parser = lost_backup)]
    pub on_lost_backup: Option<LostBackup>,
    /// When its QEMU hangs or dies and the host does not: let the backup take over, or leave it.
    #[arg(long, value_name = "failover|leave", value_parser = qemu_crash)]
    pub on_qemu_crash: Option<QemuCrash>,
    /// Who protects it again after a failover; may be given several times, the first that can does.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub spare: Vec<String>,
}

impl PolicyArgs {
    /// On top of what was chosen before.
    pub(crate) fn over(&self, before: GuestPolicy) -> GuestPolicy {
        GuestPolicy {
            on_lost_backup: self.on_lost_backup.or(before.on_lost_backup),
            on_qemu_crash: self.on_qemu_crash.or(before.on_qemu_crash),
            spares: if self.spare.is_empty() { before.spares } else { self.spare.clone() },
        }
    }

    /// Whether anything is chosen.
    pub(crate) fn is_given(&self) -> bool {
        self.over(GuestPolicy::default()) != GuestPolicy::default()
    }
}

fn lost_backup(text: &str) -> Result<LostBackup, String> {
    chosen(&LostBackup::WORDS, text)
}

fn qemu_crash(text: &str) -> Result<QemuCrash, String> {
    chosen(&QemuCrash::WORDS, text)
}

fn chosen<T: Copy>(words: &[(T, &str)], text: &str) -> Result<T, String> {
    let found = words.iter().find(|(_, word)| *word == text).map(|(value, _)| *value);
    found.ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(_, word)| *word).collect();
        format!("give {}", words.join(" or "))
    })
}

/// How long epochs are.
#[derive(Debug, clap::Args)]
pub(crate) struct PaceArgs {
    /// How long the guest runs between two checkpoints: a number, or `auto` for what fits the goals below best while
    /// it runs (without any: what costs the guest a twentieth of its time at most).
    #[arg(long, value_name = "MILLISECONDS|auto", value_parser = epoch_ms)]
    pub epoch_ms: Option<EpochMs>,
    /// The guest's output waits at most so long. Implies --epoch-ms auto, as the other goals do.
    #[arg(long, value_name = "MILLISECONDS")]
    pub latency_goal: Option<u32>,
    /// The guest stands still for at most so much of its time.
    #[arg(long, value_name = "PERCENT", value_parser = permille)]
    pub slowdown_goal: Option<u16>,
    /// At most so much is sent to the backup.
    #[arg(long, value_name = "MBIT/S")]
    pub bandwidth_cap: Option<u32>,
}

/// How long an epoch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EpochMs {
    /// As long as the goals want it.
    Auto,
    /// Always so many milliseconds.
    Fixed(u32),
}

impl PaceArgs {
    /// The length of epochs, or the first one where it is to be found.
    pub(crate) fn epoch(&self) -> Option<Duration> {
        match self.epoch_ms {
            Some(EpochMs::Fixed(ms)) => Some(Duration::from_millis(ms.into())),
            Some(EpochMs::Auto) | None => None,
        }
    }

    /// What epochs are to reach, if their length is to be found.
    pub(crate) fn goals(&self) -> Option<EpochGoals> {
        let goals = EpochGoals {
            latency_ms: self.latency_goal,
            slowdown_permille: self.slowdown_goal,
            bandwidth_bytes: self.bandwidth_cap.map(|mbit| u64::from(mbit) * 1_000_000 / 8),
        };
        (self.epoch_ms == Some(EpochMs::Auto) || goals != EpochGoals::default()).then_some(goals)
    }
}

fn epoch_ms(text: &str) -> Result<EpochMs, String> {
    match text.parse() {
        _ if text == "auto" => Ok(EpochMs::Auto),
        Ok(ms @ 1..=60_000) => Ok(EpochMs::Fixed(ms)),
        _ => Err("give 1 to 60000, or auto".to_owned()),
    }
}

fn permille(text: &str) -> Result<u16, String> {
    let tenths = text.trim_end_matches('%').parse::<f64>().ok().map(|percent| (percent * 10.0).round());
    match tenths {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 900, whole")]
        Some(tenths) if (1.0..=900.0).contains(&tenths) => Ok(tenths as u16),
        _ => Err("give a percentage from 0.1 to 90".to_owned()),
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct SetArgs {
    /// Name, id or UUID of the domain.
    pub domain: String,
    #[command(flatten)]
    pub pace: PaceArgs,
    #[command(flatten)]
    pub policy: PolicyArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FailoverArgs {
    /// Name, id or UUID of the domain.
    pub domain: String,
    /// You have made sure that the old host cannot run the guest any more (it is powered off, or cut off for good).
    #[arg(long)]
    pub i_have_fenced: bool,
    /// Print the report of the failover as JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct AboutArgs {
    /// Name or UUID of the domain.
    pub domain: String,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// Name, id or UUID of a domain; all of them if left out.
    pub domain: Option<String>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// Go on, showing every change (with --json, one object a line), until interrupted.
    #[arg(long)]
    pub watch: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn protect_takes_its_options() {
        let args = Args::try_parse_from([
            "understudy",
            "protect",
            "web",
            "--to",
            "beta:1",
            "--epoch-ms",
            "25",
            "--insecure",
        ])
        .unwrap();
        let Command::Protect(p) = args.command else { panic!("{args:?}") };
        assert_eq!(
            (p.domain.as_str(), p.to.as_str(), p.pace.epoch_ms, p.insecure),
            ("web", "beta:1", Some(EpochMs::Fixed(25)), true)
        );
        assert_eq!(p.pace.goals(), None);
        assert_eq!(args.run_dir, PathBuf::from("/run/understudy"));
    }

    #[test]
    fn what_is_chosen_for_failures_is_laid_over_what_was() {
        let policy = |more: &[&str]| {
            let line = ["understudy", "set", "web"].iter().chain(more);
            let Command::Set(set) = Args::try_parse_from(line).unwrap().command else { panic!("{more:?}") };
            set.policy
        };
        assert!(!policy(&[]).is_given());
        let before = GuestPolicy {
            on_lost_backup: Some(LostBackup::Solo),
            on_qemu_crash: None,
            spares: vec!["c".into()],
        };
        let now = policy(&["--on-qemu-crash", "leave", "--spare", "d", "--spare", "e:9"]);
        assert!(now.is_given());
        let expected = GuestPolicy {
            on_qemu_crash: Some(QemuCrash::Leave),
            spares: vec!["d".into(), "e:9".into()],
            ..before.clone()
        };
        assert_eq!(now.over(before), expected);
        let wrong = Args::try_parse_from(["understudy", "set", "web", "--on-lost-backup", "wait"]);
        assert!(wrong.unwrap_err().to_string().contains("hold or solo"));
    }

    #[test]
    fn goals_leave_the_length_of_epochs_open() {
        let goals = |more: &[&str]| {
            let line = ["understudy", "protect", "web", "--to", "beta"].iter().chain(more);
            let Command::Protect(p) = Args::try_parse_from(line).unwrap().command else { panic!("{more:?}") };
            p.pace.goals()
        };
        let none = EpochGoals::default();
        assert_eq!(goals(&["--epoch-ms", "auto"]), Some(none));
        assert_eq!(goals(&["--latency-goal", "20"]), Some(EpochGoals { latency_ms: Some(20), ..none }));
        let slowdown = Some(EpochGoals { slowdown_permille: Some(25), ..none });
        assert_eq!(goals(&["--slowdown-goal", "2.5%", "--epoch-ms", "auto"]), slowdown);
        let capped = Some(EpochGoals { bandwidth_bytes: Some(125_000_000), ..none });
        assert_eq!(goals(&["--bandwidth-cap", "1000", "--epoch-ms", "50"]), capped);
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for line in [
            &["understudy"][..],
            &["understudy", "protect", "web"],
            &["understudy", "protect", "--to", "beta"],
            &["understudy", "protect", "web", "--to", "beta", "--epoch-ms", "0"],
            &["understudy", "protect", "web", "--to", "beta", "--epoch-ms", "60001"],
            &["understudy", "protect", "web", "--to", "beta", "--epoch-ms", "soon"],
            &["understudy", "protect", "web", "--to", "beta", "--slowdown-goal", "0"],
            &["understudy", "failover"],
            &["understudy", "switchover"],
            &["understudy", "report", "--json"],
            &["understudy", "unprotect"],
        ] {
            assert!(Args::try_parse_from(line).is_err(), "{line:?}");
        }
    }
}
