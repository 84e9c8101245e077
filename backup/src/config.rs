//! The command line of the agent. Whatever is wrong with it is said before anything is bound or written.

use clap::Parser;
use std::net::SocketAddr;
use std::path::PathBuf;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::transport::{self, AdminTcp, Security, TlsFiles};

/// The Understudy agent of a backup host: holds the images of guests that run elsewhere and starts them when told.
#[derive(Debug, Clone, Parser)]
#[command(name = "understudy-backup", version)]
pub struct Config {
    /// Address and port on which primary agents are awaited.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:7420")]
    pub listen: SocketAddr,

    /// Plain TCP without TLS. Whoever reaches the port reads and replaces guests, so --listen must be a loopback address.
    #[arg(long)]
    pub insecure: bool,

    /// Certificates for TLS, in libvirt's layout: CA/cacert.pem, libvirt/servercert.pem and
    /// libvirt/private/serverkey.pem. Read anew for every connection.
    #[arg(long, value_name = "DIR", default_value = transport::PKI_DIR)]
    pub pki_dir: PathBuf,

    /// A name of a host that may send epochs: its client certificate must have it as a subject alternative name. May be
    /// repeated; without any every client of the CA may.
    #[arg(long, value_name = "NAME", conflicts_with = "insecure")]
    pub allow: Vec<String>,

    /// Serve operators here too, by mutual TLS. Beside the socket, and only together with --admin-allow.
    #[arg(long, value_name = "ADDR:PORT", requires = "admin_allow")]
    pub admin_listen: Option<SocketAddr>,

    /// A name that an operator's certificate must have as a subject alternative name. May be repeated.
    #[arg(long, value_name = "NAME", requires = "admin_listen")]
    pub admin_allow: Vec<String>,

    /// libvirt to create standby domains with.
    #[arg(long, value_name = "URI", default_value = "qemu:///system")]
    pub libvirt_uri: String,

    /// Where control files are kept; must survive a reboot.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/understudy")]
    pub state_dir: PathBuf,

    /// Where the admin socket is made.
    #[arg(long, value_name = "DIR", default_value = "/run/understudy")]
    pub run_dir: PathBuf,

    /// Memory per guest for an epoch that is not complete yet, MiB. An epoch that needs more costs a full copy.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub staging_mib: u64,

    /// Threads that decode the pages of a guest and write them into its image at most: its own, and N - 1 that all guests
    /// share. By default the CPUs but one, at most 4.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub decode_threads: Option<u16>,

    /// Load the memory of a standby at its promotion, not ahead of it: the promotion takes longer, by the size of the
    /// memory. Without this it is kept up to date in a file shared with QEMU, where memory_backing_dir of libvirt's
    /// qemu.conf is on a tmpfs; `understudy status` says which it is, and why.
    #[arg(long)]
    pub cold_standby: bool,

    /// Test hook: with --insecure any address; without it, plain connections beside those with TLS.
    #[cfg(feature = "test-hooks")]
    #[arg(
        long,
        value_name = "YES",
        default_value_t = false,
        action = clap::ArgAction::Set,
        overrides_with = "insecure_anywhere"
    )]
    pub insecure_anywhere: bool,

    /// Test hook: write the committed image of these epochs to files.
    #[cfg(feature = "test-hooks")]
    #[arg(long, value_name = "N,M,..", value_delimiter = ',', requires = "dump_dir")]
    pub dump_epochs: Vec<u64>,

    /// Test hook: the directory for them.
    #[cfg(feature = "test-hooks")]
    #[arg(long, value_name = "DIR")]
    pub dump_dir: Option<PathBuf>,
}

impl Config {
    /// How epochs arrive.
    pub fn security(&self) -> Security {
        if self.insecure {
            return Security::Plain;
        }
        let files = TlsFiles::server(&self.pki_dir, self.allow.clone());
        #[cfg(feature = "test-hooks")]
        if self.insecure_anywhere {
            return Security::Either(files);
        }
        Security::Tls(files)
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

    /// Checks what the parser cannot; all mistakes at once.
    ///
    /// # Errors
    /// Every mistake, one a line.
    pub fn validate(&self) -> Result<(), String> {
        let mut mistakes = Vec::new();
        if let Security::Tls(files) = self.security()
            && let Err(mistake) = files.server_config()
        {
            mistakes.push(format!(
                "{mistake}; make the certificates as for libvirt's own TLS (--insecure is for loopback addresses only)"
            ));
        }
        if self.insecure && !self.listen.ip().is_loopback() && !self.insecure_allowed() {
            mistakes.push(format!(
                "--insecure with --listen {}, which other hosts can reach: leave --insecure out and make certificates as \
                 for libvirt's own TLS, or listen on a loopback address",
                self.listen
            ));
        }
        for (name, dir) in [("--state-dir", &self.state_dir), ("--run-dir", &self.run_dir)] {
            if !dir.is_absolute() {
                mistakes.push(format!("{name} {} is not an absolute path", dir.display()));
            }
        }
        if mistakes.is_empty() { Ok(()) } else { Err(mistakes.join("\n")) }
    }

    /// Threads that work on the pages of a guest at most.
    pub fn decode_threads(&self) -> usize {
        self.decode_threads.map_or_else(Pool::usual_threads, usize::from)
    }

    /// The test hook as configured.
    pub fn dump(&self) -> crate::dump::Dump {
        #[cfg(feature = "test-hooks")]
        if let Some(dir) = &self.dump_dir {
            return crate::dump::Dump::new(self.dump_epochs.iter().copied(), dir.clone());
        }
        crate::dump::Dump::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> Result<Config, String> {
        let arguments = [&["understudy-backup"], arguments].concat();
        Config::try_parse_from(arguments).map_err(|e| e.to_string())
    }

    #[test]
    fn plain_tcp_must_be_asked_for() {
        let without = config(&["--pki-dir", "/nonexistent"]).unwrap().validate().unwrap_err();
        assert!(
            without.contains("--insecure") && without.contains("/nonexistent/CA/cacert.pem"),
            "{without}"
        );
        assert!(config(&["--insecure", "--allow", "alpha"]).is_err());
        assert_eq!(config(&["--insecure", "--listen", "127.0.0.1:0"]).unwrap().validate(), Ok(()));
        assert_eq!(config(&["--insecure", "--listen", "[::1]:0"]).unwrap().validate(), Ok(()));
    }

    #[test]
    fn plain_tcp_stays_on_this_machine() {
        for listen in ["0.0.0.0:7420", "[::]:7420", "10.0.0.1:7420"] {
            let refused = config(&["--insecure", "--listen", listen]).unwrap().validate().unwrap_err();
            assert!(refused.contains(listen) && refused.contains("certificates"), "{refused}");
        }
    }

    #[test]
    fn the_admin_service_is_not_opened_to_everybody() {
        assert!(config(&["--admin-listen", "127.0.0.1:0"]).is_err());
        let without = ["--admin-listen", "127.0.0.1:0", "--admin-allow", "ops", "--pki-dir", "/nonexistent"];
        let refused = config(&without).unwrap().admin_tcp().unwrap_err();
        assert!(refused.contains("/nonexistent/CA/cacert.pem"), "{refused}");
    }

    #[test]
    fn all_mistakes_are_named_at_once() {
        let mistakes = config(&["--pki-dir", "/nonexistent", "--state-dir", "x", "--run-dir", "y"])
            .unwrap()
            .validate()
            .unwrap_err();
        assert_eq!(mistakes.lines().count(), 3, "{mistakes}");
    }

    #[test]
    fn values_are_checked() {
        assert!(config(&["--listen", "nonsense"]).is_err());
        assert!(config(&["--staging-mib", "0"]).is_err());
    }
}
