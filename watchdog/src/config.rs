//! What the supervisor is told at its start.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use understudy_proto::rpc::transport::{self, PKI_DIR, Security, TlsFiles};
use understudy_proto::sealed::HeartbeatKey;

use crate::arbiter::FenceCommand;
use crate::bound;
use crate::owner::{LostBackup, Policies, QemuCrash, Timing};

/// Lets guests run that a primary agent of this host has left stopped, because it died or hangs; with --peer, promotes
/// and protects them again without anybody.
#[derive(Debug, Clone, Parser)]
#[command(name = "understudy-watchdog", version, after_help = bound::explain())]
pub struct Config {
    /// The libvirt whose guests are protected.
    #[arg(long, value_name = "URI", alias = "libvirt-uri", default_value = "qemu:///system")]
    pub connect: String,

    /// The agent's folder of what must survive a restart, as given to understudy-primary.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/understudy")]
    pub state_dir: PathBuf,

    /// How long a living agent may hold a guest stopped, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = default_hung_after_ms())]
    pub hung_after_ms: u64,

    /// The agents' folder of sockets.
    #[arg(long, value_name = "DIR", default_value = "/run/understudy")]
    pub run_dir: PathBuf,

    /// Where the watchdog of the other host listens for heartbeats; once for every network both hosts are on. With
    /// --witness-at this makes promotion automatic.
    #[arg(long, value_name = "ADDR:PORT")]
    pub peer: Vec<SocketAddr>,

    /// Where this one listens for them.
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7422")]
    pub listen_heartbeats: SocketAddr,

    /// The witness, which decides who runs a guest: in a third place, 7421 if no port is given. By mutual TLS.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub witness_at: Option<String>,

    /// A member of an etcd cluster that decides instead of a witness: HOST, HOST:PORT (2379 if none is given), both by
    /// mutual TLS, or a URL; may be given several times.
    #[arg(long, value_name = "ENDPOINT", conflicts_with = "witness_at")]
    pub etcd: Vec<String>,

    /// The secret of the heartbeats, in a file that only root can read: at least 32 bytes, the same on both hosts.
    #[arg(long, value_name = "FILE")]
    pub heartbeat_key: Option<PathBuf>,

    /// Take heartbeats from anybody: whoever reaches the port can delay a failover, or have one done that nobody needs.
    #[arg(long, conflicts_with = "heartbeat_key")]
    pub unauthenticated_heartbeats: bool,

    /// Certificates in libvirt's layout, for the witness and etcd.
    #[arg(long, value_name = "DIR", default_value = PKI_DIR)]
    pub pki_dir: PathBuf,

    /// When the backup is lost: hold the guest's output until there is one again, or let it run unprotected.
    #[arg(long, value_enum, default_value_t = OnLostBackup::Hold)]
    pub on_lost_backup: OnLostBackup,

    /// When the guest's QEMU hangs and its host does not: let the backup take over, or leave it. One that crashes ends
    /// the protection in any case; the backup keeps its copy.
    #[arg(long, value_enum, default_value_t = OnQemuCrash::Failover)]
    pub on_qemu_crash: OnQemuCrash,

    /// Silence after which the primary is suspected, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 1500)]
    pub suspect_after_ms: u64,

    /// Silence after which a QEMU whose host is heard counts as hung, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    pub qemu_silent_ms: u64,

    /// How long the load of a claimed guest may take, in milliseconds; then the claim is given back.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub load_limit_ms: u64,

    /// A backup for a guest that runs alone after a failover; may be given several times. The hosts of --peer if left out.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub spare: Vec<String>,

    /// Leave a guest that runs alone after a failover alone, until an operator protects it.
    #[arg(long, conflicts_with = "spare")]
    pub no_reprotect: bool,

    /// Protect it again over plain TCP, as with `understudy protect --insecure`, and ask or serve as witness without TLS:
    /// only on loopback addresses.
    #[arg(long)]
    pub insecure: bool,

    /// When the arbiter and the other host are both silent: the program that switches the other host off, called as fence
    /// agents are. Its success is the licence to start the guest here. Only with --on-lost-backup hold, on both hosts.
    #[arg(long, value_name = "PROGRAM", requires = "peer")]
    pub fence: Option<PathBuf>,

    /// The fencing program's options, KEY=VALUE a line; `action` is given by the watchdog.
    #[arg(long, value_name = "FILE", requires = "fence")]
    pub fence_options: Option<PathBuf>,

    /// How long the fencing program may take, in milliseconds; beyond that it has not succeeded.
    #[arg(long, value_name = "N", default_value_t = 60_000)]
    pub fence_timeout_ms: u64,

    /// Serve as witness on this address, and do nothing else. By mutual TLS.
    #[arg(long, value_name = "ADDR:PORT", conflicts_with_all = ["peer", "witness_at", "etcd"])]
    pub witness: Option<SocketAddr>,

    /// A name of which the certificate of whoever asks the witness must have one; may be given several times. Without it
    /// every certificate of the CA will do.
    #[arg(long, value_name = "NAME", requires = "witness")]
    pub allow: Vec<String>,

    /// Where the witness keeps its records.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/understudy-witness")]
    pub witness_dir: PathBuf,

    /// Log filter as for tracing, for example `info,understudy_watchdog=debug`.
    #[arg(long, value_name = "FILTER", env = "UNDERSTUDY_LOG", default_value = "info")]
    pub log: String,

    /// Log lines as JSON.
    #[arg(long)]
    pub log_json: bool,
}

/// See [`crate::owner::LostBackup`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnLostBackup {
    /// Output waits.
    Hold,
    /// The guest runs unprotected.
    Solo,
}

/// See [`crate::owner::QemuCrash`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnQemuCrash {
    /// The backup takes over.
    Failover,
    /// Nothing is done.
    Leave,
}

/// Below this an ordinary pause of a busy host could be taken for a death; above it nobody would wait.
const SUSPECT_AFTER_MS: std::ops::RangeInclusive<u64> = 300..=600_000;

/// A warm standby takes milliseconds. Longer than the most, and a loaded guest would no longer be waited for: the backup
/// agent gives up after a minute.
const LOAD_LIMIT_MS: std::ops::RangeInclusive<u64> = 1000..=40_000;

/// The other host takes a guest back that is claimed and not confirmed for so long after a load may have failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Below this an ordinary stop could be taken for one that hangs.
const MIN_HUNG_AFTER_MS: u64 = 1000;
/// A day. A guest stopped for longer than that is nobody's whose agent matters.
const MAX_HUNG_AFTER_MS: u64 = 24 * 3600 * 1000;

fn default_hung_after_ms() -> u64 {
    u64::try_from(bound::HUNG_AFTER.as_millis()).unwrap_or(MAX_HUNG_AFTER_MS)
}

impl Config {
    /// How long a living agent may hold a guest stopped.
    pub fn hung_after(&self) -> Duration {
        Duration::from_millis(self.hung_after_ms)
    }

    /// Whether guests are to be promoted without anybody.
    pub fn is_automatic(&self) -> bool {
        !self.peer.is_empty()
    }

    /// What the operator has chosen.
    pub fn policies(&self) -> Policies {
        Policies {
            lost_backup: match self.on_lost_backup {
                OnLostBackup::Hold => LostBackup::Hold,
                OnLostBackup::Solo => LostBackup::Solo,
            },
            qemu_crash: match self.on_qemu_crash {
                OnQemuCrash::Failover => QemuCrash::Failover,
                OnQemuCrash::Leave => QemuCrash::Leave,
            },
        }
    }

    /// How long things may take. The backup is suspected in two thirds of the time the primary is.
    pub fn timing(&self) -> Timing {
        let primary_silent = Duration::from_millis(self.suspect_after_ms);
        Timing {
            primary_silent,
            backup_silent: primary_silent * 2 / 3,
            qemu_silent: Duration::from_millis(self.qemu_silent_ms),
            claim_patience: self.load_limit() + PATIENCE,
            ..Timing::default()
        }
    }

    /// How long a load may take.
    pub fn load_limit(&self) -> Duration {
        Duration::from_millis(self.load_limit_ms)
    }

    /// What switches the other host off, if that is configured. Blocks for a moment.
    ///
    /// # Errors
    /// If the options cannot be used. They may hold passwords, and are not quoted.
    pub fn fence(&self) -> Result<Option<Arc<FenceCommand>>, String> {
        let Some(program) = self.fence.clone() else { return Ok(None) };
        let mut options = Vec::new();
        if let Some(file) = &self.fence_options {
            let named = |reason: String| format!("--fence-options {}: {reason}", file.display());
            let text = std::fs::read_to_string(file).map_err(|error| named(error.to_string()))?;
            for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let (key, value) = line
                    .split_once('=')
                    .ok_or_else(|| named(format!("line {} is no KEY=VALUE", number + 1)))?;
                options.push((key.trim().to_owned(), value.trim().to_owned()));
            }
        }
        let timeout = Duration::from_millis(self.fence_timeout_ms);
        Ok(Some(Arc::new(FenceCommand { program, options, timeout })))
    }

    /// How the witness is asked.
    pub fn asks(&self) -> Security {
        if self.insecure { Security::Plain } else { Security::Tls(TlsFiles::client(&self.pki_dir)) }
    }

    /// How it is served.
    pub fn serves(&self) -> Security {
        if self.insecure {
            return Security::Plain;
        }
        Security::Tls(TlsFiles::server(&self.pki_dir, self.allow.clone()))
    }

    /// The secret of the heartbeats. Blocks for a moment.
    ///
    /// # Errors
    /// If the file cannot be used, or others can read it. Its content is not quoted.
    pub fn key(&self) -> Result<HeartbeatKey, String> {
        let Some(file) = &self.heartbeat_key else { return Ok(HeartbeatKey::none()) };
        let named = |reason: String| format!("--heartbeat-key {}: {reason}", file.display());
        let data = std::fs::metadata(file).map_err(|error| named(error.to_string()))?;
        if data.permissions().mode() & 0o077 != 0 {
            return Err(named("others can read it: chmod 600".to_owned()));
        }
        let secret = std::fs::read(file).map_err(|error| named(error.to_string()))?;
        HeartbeatKey::new(secret.trim_ascii()).map_err(|error| named(error.to_string()))
    }

    /// Who is asked to protect a guest that runs alone.
    pub fn spares(&self) -> Vec<String> {
        if self.no_reprotect {
            return Vec::new();
        }
        if !self.spare.is_empty() {
            return self.spare.clone();
        }
        let mut hosts: Vec<String> = self.peer.iter().map(|peer| peer.ip().to_string()).collect();
        hosts.dedup();
        hosts
    }

    fn of_the_arbiter(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let arbiter = self.witness_at.is_some() || !self.etcd.is_empty();
        if self.is_automatic() && !arbiter {
            mistakes.push(
                "--peer is given without --witness-at or --etcd: who runs a guest takes both".to_owned(),
            );
        }
        if arbiter && !self.is_automatic() {
            let which = if self.etcd.is_empty() { "--witness-at" } else { "--etcd" };
            mistakes.push(format!("{which} is given without --peer: who runs a guest takes both"));
        }
        if cfg!(not(feature = "etcd")) && !self.etcd.is_empty() {
            mistakes.push("--etcd is given, but this was built without the feature `etcd`".to_owned());
        }
        let served = self.witness.is_some_and(|address| !address.ip().is_loopback());
        let asked = self.witness_at.as_ref().is_some_and(|at| !transport::is_loopback(at));
        if self.insecure && (served || asked) {
            let which = if served { "--witness" } else { "--witness-at" };
            mistakes.push(format!(
                "--insecure is given, and {which} is no loopback address: leave it out, and give the hosts and the witness \
                 certificates"
            ));
        }
        mistakes
    }

    /// Everything that is wrong with it, one sentence each.
    pub fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if !self.state_dir.is_absolute() {
            mistakes.push(format!("--state-dir is {:?}: give an absolute path", self.state_dir.display()));
        }
        if !(MIN_HUNG_AFTER_MS..=MAX_HUNG_AFTER_MS).contains(&self.hung_after_ms) {
            mistakes.push(format!(
                "--hung-after-ms is {}: give {MIN_HUNG_AFTER_MS} to {MAX_HUNG_AFTER_MS}",
                self.hung_after_ms
            ));
        }
        mistakes.extend(self.of_the_arbiter());
        let far = self.peer.iter().any(|peer| !peer.ip().is_loopback());
        if far && self.heartbeat_key.is_none() && !self.unauthenticated_heartbeats {
            mistakes.push(
                "--peer is another host and there is no --heartbeat-key: whoever reaches the port could keep a dead host \
                 alive; make one on both hosts, or say --unauthenticated-heartbeats on a network of your own"
                    .to_owned(),
            );
        }
        if !SUSPECT_AFTER_MS.contains(&self.suspect_after_ms) {
            let (from, to) = (SUSPECT_AFTER_MS.start(), SUSPECT_AFTER_MS.end());
            mistakes.push(format!("--suspect-after-ms is {}: give {from} to {to}", self.suspect_after_ms));
        }
        if !SUSPECT_AFTER_MS.contains(&self.qemu_silent_ms) {
            let (from, to) = (SUSPECT_AFTER_MS.start(), SUSPECT_AFTER_MS.end());
            mistakes.push(format!("--qemu-silent-ms is {}: give {from} to {to}", self.qemu_silent_ms));
        }
        if self.fence.is_some() && self.on_lost_backup == OnLostBackup::Solo {
            mistakes.push(
                "--fence is given with --on-lost-backup solo: a primary that went on alone has let out what no backup \
                 holds; use hold, on both hosts"
                    .to_owned(),
            );
        }
        if !LOAD_LIMIT_MS.contains(&self.load_limit_ms) {
            let (from, to) = (LOAD_LIMIT_MS.start(), LOAD_LIMIT_MS.end());
            mistakes.push(format!("--load-limit-ms is {}: give {from} to {to}", self.load_limit_ms));
        }
        if let Err(error) = self.log.parse::<tracing_subscriber::EnvFilter>() {
            mistakes.push(format!("--log is {:?}: {error}", self.log));
        }
        mistakes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let args = ["understudy-watchdog", "--state-dir", "s", "--hung-after-ms", "5", "--log", "a=b=c"];
        let config = Config::try_parse_from(args).unwrap();
        assert_eq!(config.mistakes().len(), 3, "{:?}", config.mistakes());
        assert_eq!(Config::try_parse_from(["understudy-watchdog"]).unwrap().mistakes(), Vec::<String>::new());
    }

    #[test]
    fn promotion_is_automatic_only_with_a_peer_and_an_arbiter() {
        let parse = |args: &[&str]| {
            Config::try_parse_from(["understudy-watchdog"].iter().chain(args)).map(|config| {
                let mistakes = config.mistakes().len();
                (config.is_automatic(), mistakes)
            })
        };
        assert_eq!(parse(&[]).unwrap(), (false, 0));
        assert_eq!(parse(&["--peer", "127.0.0.1:7422"]).unwrap(), (true, 1));
        assert_eq!(parse(&["--witness-at", "w"]).unwrap(), (false, 1));
        assert_eq!(parse(&["--peer", "127.0.0.1:7422", "--witness-at", "w"]).unwrap(), (true, 0));
        let built = usize::from(cfg!(not(feature = "etcd")));
        assert_eq!(
            parse(&["--peer", "127.0.0.1:7422", "--etcd", "w", "--etcd", "v"]).unwrap(),
            (true, built)
        );
        assert_eq!(parse(&["--etcd", "w"]).unwrap(), (false, 1 + built));
        assert!(parse(&["--peer", "127.0.0.1:7422", "--etcd", "w", "--witness-at", "v"]).is_err());
        assert_eq!(parse(&["--suspect-after-ms", "10"]).unwrap().1, 1);
        assert_eq!(parse(&["--qemu-silent-ms", "10", "--load-limit-ms", "60000"]).unwrap().1, 2);
        assert!(parse(&["--witness", "0.0.0.0:7421", "--peer", "10.0.0.2:7422"]).is_err());
    }

    #[test]
    fn nothing_leaves_this_machine_unprotected_unless_it_is_said() {
        let mistakes = |args: &[&str]| {
            let config = Config::try_parse_from(["understudy-watchdog"].iter().chain(args)).unwrap();
            config.mistakes().join("; ")
        };
        let far = ["--peer", "10.0.0.2:7422", "--witness-at", "w"];
        assert!(mistakes(&far).contains("--heartbeat-key"), "{}", mistakes(&far));
        for more in [&["--heartbeat-key", "k"][..], &["--unauthenticated-heartbeats"]] {
            assert_eq!(mistakes(&[&far[..], more].concat()), "");
        }
        let plain = mistakes(&[&far[..], &["--heartbeat-key", "k", "--insecure"]].concat());
        assert!(plain.contains("--witness-at is no loopback"), "{plain}");
        assert_eq!(mistakes(&["--witness", "10.0.0.1:7421", "--allow", "a"]), "");
        let plain = mistakes(&["--witness", "10.0.0.1:7421", "--insecure"]);
        assert!(plain.contains("--witness is no loopback"), "{plain}");
        assert_eq!(mistakes(&["--witness", "127.0.0.1:7421", "--insecure"]), "");
    }

    #[test]
    fn a_key_that_others_can_read_or_that_is_short_is_refused_and_not_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        let config =
            Config::try_parse_from(["understudy-watchdog", "--heartbeat-key", file.to_str().unwrap()]);
        let config = config.unwrap();
        assert!(config.key().unwrap_err().contains("No such file"));
        let write = |text: &str, mode| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let secret = "s3cret".repeat(10);
        write(&secret, 0o640);
        let error = config.key().unwrap_err();
        assert!(error.contains("chmod 600") && !error.contains("s3cret"), "{error}");
        write("s3cret\n", 0o600);
        let error = config.key().unwrap_err();
        assert!(error.contains("6 bytes") && !error.contains("s3cret"), "{error}");
        write(&secret, 0o600);
        assert!(config.key().is_ok());
    }

    #[test]
    fn a_guest_alone_is_protected_by_the_peer_unless_others_are_named() {
        let spares = |args: &[&str]| {
            let config = Config::try_parse_from(["understudy-watchdog"].iter().chain(args)).unwrap();
            config.spares()
        };
        let peers = ["--peer", "10.0.0.2:7422", "--peer", "[fe80::2]:7422", "--witness-at", "w"];
        assert_eq!(spares(&peers), ["10.0.0.2", "fe80::2"]);
        assert_eq!(spares(&[&peers[..], &["--spare", "c", "--spare", "d:9"]].concat()), ["c", "d:9"]);
        assert_eq!(spares(&[&peers[..], &["--no-reprotect"]].concat()), [""; 0]);
    }

    #[test]
    fn fencing_is_for_pairs_that_hold_and_its_options_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("options");
        let parse = |more: &[&str]| {
            let args = ["understudy-watchdog", "--peer", "127.0.0.1:7422", "--witness-at", "w"];
            Config::try_parse_from(args.iter().chain(more)).unwrap()
        };
        let options = file.to_str().unwrap();
        std::fs::write(&file, "ip=bmc\n\npassword = a=b\n").unwrap();
        let config = parse(&["--fence", "/usr/sbin/fence_ipmilan", "--fence-options", options]);
        assert_eq!(config.mistakes(), Vec::<String>::new());
        let expected = [("ip".to_owned(), "bmc".to_owned()), ("password".to_owned(), "a=b".to_owned())];
        assert_eq!(config.fence().unwrap().unwrap().options, expected);
        std::fs::write(&file, "ip=bmc\nsecret\n").unwrap();
        let error = config.fence().unwrap_err();
        assert!(error.contains("line 2") && !error.contains("secret"), "{error}");
        assert_eq!(parse(&["--fence", "f", "--on-lost-backup", "solo"]).mistakes().len(), 1);
        assert!(parse(&[]).fence().unwrap().is_none());
    }

    #[test]
    fn help_states_the_bound() {
        let help = <Config as clap::CommandFactory>::command().render_help().to_string();
        assert!(help.contains("runs again within 3000 ms"), "{help}");
    }
}
