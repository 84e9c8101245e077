//! What the agent is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::transport::{self, Security, TlsFiles};
use understudy_proto::rpc::{Failure, transport::AdminTcp};

use crate::encode::{Compress, Encoding};

/// Shortest epoch: below it the guest would hardly run.
pub const MIN_EPOCH: Duration = Duration::from_millis(5);

/// Longest epoch.
pub const MAX_EPOCH: Duration = Duration::from_secs(60);

/// The agent beside protected guests: captures them epoch by epoch and sends the epochs to their backups.
#[derive(Debug, Clone, Parser)]
#[command(name = "understudy-primary", version)]
pub struct Config {
    /// The libvirt whose guests are protected.
    #[arg(long, value_name = "URI", default_value = "qemu:///system")]
    pub libvirt_uri: String,

    /// Folder of what must survive a restart.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/understudy")]
    pub state_dir: PathBuf,

    /// Folder of the agent's socket, primary.sock.
    #[arg(long, value_name = "DIR", default_value = "/run/understudy")]
    pub run_dir: PathBuf,

    /// Time a guest runs between two checkpoints, in milliseconds, unless `protect` says otherwise.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub epoch_ms: u32,

    /// Time a guest runs at least between two checkpoints when its output waits, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub output_floor_ms: u32,
    /// Whether pages may be encoded before they are sent, where that makes epochs shorter.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Compress::Auto)]
    pub compress: Compress,

    /// Memory for what guests have rewritten, per guest, in MiB: differences are taken from it.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub page_cache_mib: u32,

    /// Threads that encode the pages of a guest at most: its own, and N - 1 that all guests share. By default the CPUs but
    /// one, at most 4.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub encode_threads: Option<u16>,

    /// Connections that the epochs of a guest go by at most. A further one is opened where it makes them faster, and closed
    /// where it does not; 1 never opens one.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub connections: u8,

    /// Name of this host in messages; libvirt's name for it by default.
    #[arg(long, value_name = "NAME")]
    pub host_name: Option<String>,

    /// Certificates for TLS to backups, in libvirt's layout: CA/cacert.pem, libvirt/clientcert.pem and
    /// libvirt/private/clientkey.pem; with --admin-listen servercert.pem and serverkey.pem beside them. Read anew for
    /// every connection.
    #[arg(long, value_name = "DIR", default_value = transport::PKI_DIR)]
    pub pki_dir: PathBuf,

    /// Serve operators here too, by mutual TLS. Beside the socket, and only together with --admin-allow.
    #[arg(long, value_name = "ADDR:PORT", requires = "admin_allow")]
    pub admin_listen: Option<SocketAddr>,

    /// A name that an operator's certificate must have as a subject alternative name. May be repeated.
    #[arg(long, value_name = "NAME", requires = "admin_listen")]
    pub admin_allow: Vec<String>,

    /// Log filter as for tracing, for example `info,understudy_primary=debug`.
    #[arg(long, value_name = "FILTER", env = "UNDERSTUDY_LOG", default_value = "info")]
    pub log: String,

    /// Log lines as JSON.
    #[arg(long)]
    pub log_json: bool,

    /// Test hook: hold the guest stopped at these epochs and dump its memory.
    #[cfg(feature = "test-hooks")]
    #[arg(long, value_name = "N,M,..", value_delimiter = ',', requires = "dump_dir")]
    pub dump_epochs: Vec<u64>,

    /// Test hook: where to.
    #[cfg(feature = "test-hooks")]
    #[arg(long, value_name = "DIR")]
    pub dump_dir: Option<PathBuf>,

    /// Test hook: write what is captured of each guest into a folder of its name there.
    #[cfg(feature = "test-hooks")]
    #[arg(long, value_name = "DIR")]
    pub record_dir: Option<PathBuf>,

    /// Test hook: plain TCP also to other hosts.
    #[cfg(feature = "test-hooks")]
    #[arg(
        long,
        value_name = "YES",
        default_value_t = false,
        action = clap::ArgAction::Set,
        overrides_with = "insecure_anywhere"
    )]
    pub insecure_anywhere: bool,

    /// Test hook: die while the guest is stopped at this epoch.
    #[cfg(feature = "test-hooks")]
    #[arg(long, value_name = "N")]
    pub die_at_epoch: Option<u64>,

    /// Test hook: the output gates of these domains do wrong.
    #[cfg(feature = "test-hooks")]
    #[arg(long, value_name = "DOMAIN=FAULT,..", value_delimiter = ',')]
    pub plant_fault: Vec<crate::egress::planted::Plant>,
}

impl Config {
    /// How the pages of each guest are encoded.
    pub fn encoding(&self) -> Encoding {
        let cache_mib = usize::try_from(self.page_cache_mib).unwrap_or(0);
        let cache_bytes = cache_mib.saturating_mul(1 << 20);
        Encoding { compress: self.compress, cache_bytes, ..Encoding::default() }
    }

    /// Threads that work on the pages of a guest at most.
    pub fn encode_threads(&self) -> usize {
        self.encode_threads.map_or_else(Pool::usual_threads, usize::from)
    }

    /// How a guest's epochs travel to `host`.
    ///
    /// # Errors
    /// `insecure-not-loopback`.
    pub fn security(&self, insecure: bool, host: &str) -> Result<Security, Failure> {
        match insecure {
            false => Ok(Security::Tls(TlsFiles::client(&self.pki_dir))),
            true if transport::is_loopback(host) || self.insecure_allowed() => Ok(Security::Plain),
            true => Err(transport::insecure_refused(host)),
        }
    }

    #[cfg(feature = "test-hooks")]
    fn insecure_allowed(&self) -> bool {
        self.insecure_anywhere
    }

    #[cfg(not(feature = "test-hooks"))]
    fn insecure_allowed(&self) -> bool {
        false
    }

    /// The admin service over TCP, if it is wanted.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn admin_tcp(&self) -> Result<Option<AdminTcp>, String> {
        AdminTcp::wanted(self.admin_listen, &self.pki_dir, &self.admin_allow)
    }

    /// Everything that is wrong with it, one sentence each.
    pub fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if let Err(mistake) = epoch(self.epoch_ms) {
            mistakes.push(format!("--epoch-ms: {mistake}"));
        }
        for (flag, folder) in [("--state-dir", &self.state_dir), ("--run-dir", &self.run_dir)] {
            if !folder.is_absolute() {
                mistakes.push(format!("{flag} is {:?}: give an absolute path", folder.display()));
            }
        }
        if let Err(error) = self.log.parse::<tracing_subscriber::EnvFilter>() {
            mistakes.push(format!("--log is {:?}: {error}", self.log));
        }
        mistakes
    }
}

/// A length of epoch, checked.
///
/// # Errors
/// Which lengths there are.
pub fn epoch(epoch_ms: u32) -> Result<Duration, String> {
    let epoch = Duration::from_millis(epoch_ms.into());
    if (MIN_EPOCH..=MAX_EPOCH).contains(&epoch) {
        Ok(epoch)
    } else {
        let (min, max) = (MIN_EPOCH.as_millis(), MAX_EPOCH.as_millis());
        Err(format!("{epoch_ms} ms is no length of an epoch: give {min} to {max}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_tcp_stays_on_this_machine() {
        let config = Config::try_parse_from(["understudy-primary"]).unwrap();
        assert!(matches!(config.security(true, "127.0.0.1:9"), Ok(Security::Plain)));
        assert!(matches!(config.security(false, "beta"), Ok(Security::Tls(_))));
        let refused = config.security(true, "beta").unwrap_err();
        assert_eq!(refused.code, "insecure-not-loopback");
        assert!(refused.reason.contains("beta") && refused.remedy.contains("--insecure"), "{refused:?}");
    }

    #[test]
    fn the_admin_service_is_not_opened_to_everybody() {
        let args = |more: &[&str]| Config::try_parse_from([&["understudy-primary"], more].concat());
        assert!(args(&["--admin-listen", "127.0.0.1:0"]).is_err());
        assert!(args(&["--admin-allow", "ops"]).is_err());
        assert!(args(&[]).unwrap().admin_tcp().unwrap().is_none());
        let without = ["--admin-listen", "127.0.0.1:0", "--admin-allow", "ops", "--pki-dir", "/nonexistent"];
        let refused = args(&without).unwrap().admin_tcp().unwrap_err();
        assert!(refused.contains("/nonexistent/CA/cacert.pem"), "{refused}");
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let args = [
            "understudy-primary",
            "--epoch-ms",
            "1",
            "--run-dir",
            "run",
            "--state-dir",
            "s",
            "--log",
            "a=b=c",
        ];
        let config = Config::try_parse_from(args).unwrap();
        assert_eq!(config.mistakes().len(), 4, "{:?}", config.mistakes());
        assert_eq!(Config::try_parse_from(["understudy-primary"]).unwrap().mistakes(), Vec::<String>::new());
    }
}
