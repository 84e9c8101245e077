//! Where the agents are, and the way to them.

use std::path::{Path, PathBuf};

use understudy_proto::rpc::transport::{self, TlsFiles};
use understudy_proto::rpc::{AdminClient, Failure, FailureKind};

/// The agents that are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Agents {
    /// Those whose sockets are in a folder.
    Folder(PathBuf),
    /// The one behind this socket, whichever it is.
    Socket(PathBuf),
    /// Those of a host, at the usual ports.
    Host(String, TlsFiles),
    /// The one at this address, whichever it is.
    Address(String, TlsFiles),
}

impl Agents {
    /// Those of this host, or what `--connect` says.
    pub(crate) fn new(run_dir: &Path, connect: Option<&str>, pki: &Path) -> Result<Self, Failure> {
        let Some(text) = connect else { return Ok(Self::Folder(run_dir.to_owned())) };
        let wrong = || {
            Failure::new(
                FailureKind::InvalidArgument,
                "connect",
                format!("--connect is {text:?}, which is no address of an agent"),
            )
            .with_remedy(
                "give a folder of sockets (/run/understudy), a socket, https://HOST or https://HOST:PORT",
            )
        };
        if let Some(host) = text.strip_prefix("https://") {
            let host = host.trim_end_matches('/');
            let usual = transport::authority_with(host, 0);
            if host.is_empty() || host.contains(['/', '@', ' ']) {
                return Err(wrong());
            }
            let files = TlsFiles::client(pki);
            return Ok(if usual == host {
                Self::Address(usual, files)
            } else {
                Self::Host(host.to_owned(), files)
            });
        }
        let path = Path::new(text.strip_prefix("unix:").unwrap_or(text));
        if !path.is_absolute() {
            return Err(wrong());
        }
        let is_socket = path.extension().is_some_and(|end| end == "sock");
        Ok(if is_socket { Self::Socket(path.to_owned()) } else { Self::Folder(path.to_owned()) })
    }

    /// The folder of this host's sockets: a watchdog is asked through no other way.
    pub(crate) fn folder(&self) -> Result<&Path, Failure> {
        match self {
            Self::Folder(folder) => Ok(folder),
            _ => Err(Failure::new(
                FailureKind::InvalidArgument,
                "connect",
                "--connect names agents, and this is asked of a watchdog",
            )
            .with_remedy("run it on the watchdog's host, without --connect or with a folder of sockets")),
        }
    }

    /// Whether there is one agent, of which it is not known which it is.
    pub(crate) fn is_one(&self) -> bool {
        matches!(self, Self::Socket(_) | Self::Address(..))
    }
}

/// The agent `name`, whose socket has this name.
pub(crate) async fn connect(agents: &Agents, socket: &str, name: &str) -> Result<AdminClient, Failure> {
    let channel = match agents {
        Agents::Folder(folder) => transport::connect_unix(&folder.join(socket)).await.map_err(|failure| {
            let remedy = format!(
                "start {name} on this host, or use root if it runs; --run-dir says where its socket is"
            );
            Failure { remedy, ..failure }
        }),
        Agents::Socket(socket) => transport::connect_unix(socket).await,
        Agents::Host(host, files) => {
            let port = match socket {
                transport::PRIMARY_SOCKET => transport::PRIMARY_ADMIN_PORT,
                _ => transport::BACKUP_ADMIN_PORT,
            };
            transport::connect_admin(transport::authority_with(host, port), files).await
        }
        Agents::Address(authority, files) => transport::connect_admin(authority.clone(), files).await,
    };
    Ok(AdminClient::new(channel?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_which_agents() {
        let pki = Path::new("/pki");
        let files = || TlsFiles::client(pki);
        let agents = |text: &str| Agents::new(Path::new("/run/understudy"), Some(text), pki);
        assert_eq!(Agents::new(Path::new("/run/x"), None, pki), Ok(Agents::Folder("/run/x".into())));
        for (text, wanted) in [
            ("/run/y", Agents::Folder("/run/y".into())),
            ("unix:/run/y", Agents::Folder("/run/y".into())),
            ("/run/y/primary.sock", Agents::Socket("/run/y/primary.sock".into())),
            ("https://beta", Agents::Host("beta".into(), files())),
            ("https://beta/", Agents::Host("beta".into(), files())),
            ("https://beta:7424", Agents::Address("beta:7424".into(), files())),
            ("https://10.0.0.2", Agents::Host("10.0.0.2".into(), files())),
            ("https://[fe80::1]:7", Agents::Address("[fe80::1]:7".into(), files())),
            ("https://fe80::1", Agents::Host("fe80::1".into(), files())),
        ] {
            assert_eq!(agents(text), Ok(wanted), "{text}");
        }
        for text in
            ["", "http://beta", "beta", "beta:7424", "https://", "qemu:///system", "https://a/b", "run/x"]
        {
            let failure = agents(text).unwrap_err();
            assert!(failure.reason.contains(text) && failure.remedy.contains("https"), "{failure:?}");
        }
    }
}
