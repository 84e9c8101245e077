//! How connections between agents are set up: both sides take their settings from here, so they cannot differ.

use crate::limits;
#[cfg(feature = "test-hooks")]
use crate::rpc::secure::secured_or_plain;
use crate::rpc::secure::{Secure, secured};
use crate::rpc::status::{Failure, FailureKind};
pub use crate::rpc::tls::{PKI_DIR, Security, TlsFiles};
use hyper_util::rt::TokioIo;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;
pub use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};

/// Port of the backup agent.
pub const DEFAULT_PORT: u16 = 7420;

/// Port on which clients look for the admin service of a primary agent.
pub const PRIMARY_ADMIN_PORT: u16 = 7423;

/// The same of a backup agent.
pub const BACKUP_ADMIN_PORT: u16 = 7424;

/// How often a silent connection is asked for a sign of life.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// How long the sign of life may take before the connection counts as broken. Longer than the agents' own limits, which
/// know what they wait for: it queues behind whatever a full copy has in the socket, on hosts that are busy.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may take to come up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// File name of the primary agent's socket in the run directory.
pub const PRIMARY_SOCKET: &str = "primary.sock";

/// File name of the backup agent's socket in the run directory.
pub const BACKUP_SOCKET: &str = "backup.sock";

/// A server with the settings of every agent. HTTP/2 frame size and windows are the receiver's to set.
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(limits::HTTP2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::HTTP2_CONNECTION_WINDOW_BYTES)
        .max_frame_size(limits::HTTP2_FRAME_BYTES)
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// Listens for other agents, without delaying small messages.
///
/// # Errors
/// If the address cannot be bound.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpIncoming> {
    Ok(TcpIncoming::bind(address)?.with_nodelay(Some(true)))
}

fn configured(endpoint: Endpoint) -> Endpoint {
    endpoint
        .initial_stream_window_size(limits::HTTP2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::HTTP2_CONNECTION_WINDOW_BYTES)
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// `HOST`, `HOST:PORT`, `ADDR`, `[V6]` or `[V6]:PORT` as `authority` of a URI, with [`DEFAULT_PORT`] if none is given.
pub fn authority(host: &str) -> String {
    authority_with(host, DEFAULT_PORT)
}

/// The same with another port if none is given.
pub fn authority_with(host: &str, port: u16) -> String {
    let has_port = match host.rsplit_once(':') {
        Some((before, port)) => {
            port.parse::<u16>().is_ok() && (!before.contains(':') || before.ends_with(']'))
        }
        None => false,
    };
    if has_port {
        host.to_owned()
    } else if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// The host in an authority, without brackets.
pub fn host_of(host: &str) -> String {
    let authority = authority(host);
    authority
        .rsplit_once(':')
        .map_or(authority.as_str(), |(host, _)| host)
        .trim_matches(['[', ']'])
        .to_owned()
}

/// Whether what is sent to `host` stays on this machine: an address of the loopback, or the name `localhost`. Other names
/// are not resolved, they may mean something else a moment later.
pub fn is_loopback(host: &str) -> bool {
    let host = host_of(host);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// `insecure-not-loopback`: plain TCP is asked for to a host that is not this one.
pub fn insecure_refused(host: &str) -> Failure {
    let reason =
        format!("{host} is no loopback address: nothing of a guest is sent over a network without TLS");
    Failure::new(FailureKind::InvalidArgument, "insecure-not-loopback", reason).with_remedy(
        "leave out --insecure (insecure='yes') and give both hosts certificates, as for libvirt's own TLS",
    )
}

/// The admin service over TCP: bound, and only for clients with a certificate of the CA and one of the names in
/// `files.allowed`.
#[derive(Debug)]
pub struct AdminTcp {
    incoming: TcpIncoming,
    files: TlsFiles,
}

impl AdminTcp {
    /// Binds it, if there is an address; `allow` are the names whose certificates may command the agent.
    ///
    /// # Errors
    /// If nobody is allowed, the files cannot be used, or the address cannot be bound.
    pub fn wanted(address: Option<SocketAddr>, pki: &Path, allow: &[String]) -> Result<Option<Self>, String> {
        address.map(|address| Self::bind(address, TlsFiles::server(pki, allow.to_vec()))).transpose()
    }

    /// Binds it.
    ///
    /// # Errors
    /// As [`Self::wanted`].
    pub fn bind(address: SocketAddr, files: TlsFiles) -> Result<Self, String> {
        if files.allowed.is_empty() {
            return Err(
                "--admin-listen needs --admin-allow: whose certificates may command this agent".to_owned()
            );
        }
        files.server_config()?;
        let incoming = listen(address).map_err(|error| format!("cannot listen on {address}: {error}"))?;
        Ok(Self { incoming, files })
    }

    /// The address, with the port that was given if 0 was asked for.
    ///
    /// # Errors
    /// Those of the system.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.incoming.local_addr()
    }

    /// Serves until it fails.
    ///
    /// # Errors
    /// Those of the server.
    pub async fn serve(self, routes: tonic::service::Routes) -> Result<(), tonic::transport::Error> {
        serve(routes, self.incoming, Security::Tls(self.files)).await
    }
}

/// Serves whom `security` lets in, until the server fails.
///
/// # Errors
/// Those of the server.
pub async fn serve(
    routes: tonic::service::Routes,
    incoming: TcpIncoming,
    security: Security,
) -> Result<(), tonic::transport::Error> {
    let server = server().add_routes(routes);
    match security {
        // Plain connections stay tonic's own: nothing is in the way of the pages.
        Security::Plain => server.serve_with_incoming(incoming).await,
        Security::Tls(files) => server.serve_with_incoming(secured(incoming, files)).await,
        #[cfg(feature = "test-hooks")]
        Security::Either(files) => server.serve_with_incoming(secured_or_plain(incoming, files)).await,
    }
}

/// What is said when nobody answers where a backup agent should.
const NO_BACKUP: &str =
    "check that understudy-backup runs there, listens on that address, and no firewall is in between";

/// Threads an agent's runtime has, at least four: encrypting an epoch takes seconds without pause where the CPU is slow and
/// the link is not, and what sees to the guest, or answers for the agent, must not wait behind it.
pub fn runtime_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).max(4)
}

/// Connects to the backup agent at `host` (see [`authority`]) over plain TCP.
///
/// # Errors
/// `unreachable`, with what was tried.
pub async fn connect_plaintext(host: &str) -> Result<Channel, Failure> {
    connect_plain(&authority(host), configured, NO_BACKUP).await.map_err(|failure| {
        if failure.kind == FailureKind::InvalidArgument {
            return failure.with_remedy(format!("give the backup as HOST or HOST:PORT; {host:?} is neither"));
        }
        failure
    })
}

/// Connects to the backup agent at `host` as `security` says. With TLS nothing of ours is sent before both sides have
/// accepted each other.
///
/// # Errors
/// As [`connect_plaintext`]; `tls` if one side does not accept the other, in words.
pub async fn connect(host: &str, security: &Security) -> Result<Channel, Failure> {
    let Security::Tls(files) = security else { return connect_plaintext(host).await };
    connect_tls(authority(host), files, configured, NO_BACKUP).await
}

/// Connects to a server of ours at `authority` as `security` says; `unreachable` is what to do if nobody answers there.
///
/// # Errors
/// As [`connect`].
pub async fn connect_at(
    authority: String,
    security: &Security,
    unreachable: &str,
) -> Result<Channel, Failure> {
    match security {
        Security::Tls(files) => connect_tls(authority, files, configured, unreachable).await,
        _ => connect_plain(&authority, configured, unreachable).await,
    }
}

/// The same to a server that is not ours: it is not asked for signs of life, as many end a connection for that.
///
/// # Errors
/// As [`connect`].
pub async fn connect_foreign(
    authority: String,
    security: &Security,
    unreachable: &str,
) -> Result<Channel, Failure> {
    let settings = |endpoint: Endpoint| endpoint.tcp_nodelay(true).connect_timeout(CONNECT_TIMEOUT);
    match security {
        Security::Tls(files) => connect_tls(authority, files, settings, unreachable).await,
        _ => connect_plain(&authority, settings, unreachable).await,
    }
}

/// Connects to the admin service at `authority` by TLS.
///
/// # Errors
/// As [`connect`].
pub async fn connect_admin(authority: String, files: &TlsFiles) -> Result<Channel, Failure> {
    let remedy =
        "check that the agent there was started with --admin-listen and that no firewall is in between";
    connect_tls(authority, files, configured, remedy).await
}

async fn connect_plain(
    authority: &str,
    settings: fn(Endpoint) -> Endpoint,
    unreachable: &str,
) -> Result<Channel, Failure> {
    let uri = format!("http://{authority}");
    let endpoint = Endpoint::from_shared(uri.clone()).map_err(|e| Failure {
        retryable: false,
        kind: FailureKind::InvalidArgument,
        ..Failure::from(e)
    })?;
    settings(endpoint).connect().await.map_err(|e| {
        let f = Failure::from(e);
        Failure { reason: format!("cannot connect to {uri}: {}", f.reason), ..f }.with_remedy(unreachable)
    })
}

async fn connect_tls(
    authority: String,
    files: &TlsFiles,
    settings: fn(Endpoint) -> Endpoint,
    unreachable: &str,
) -> Result<Channel, Failure> {
    // A mistake of ours is told as it is, and not as a connection that failed.
    files.client_config().map_err(tls_files)?;
    let files = files.clone();
    let endpoint = Endpoint::from_shared(format!("http://{authority}"))
        .map_err(|e| Failure { retryable: false, ..Failure::from(e) })?;
    let target = authority.clone();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let (authority, files) = (authority.clone(), files.clone());
        async move { Secure::connect(&authority, &files).await.map(TokioIo::new) }
    });
    settings(endpoint).connect_with_connector(connector).await.map_err(|error| {
        let failure = Failure::from(error);
        let is_tls = failure.reason.contains("TLS");
        let reason = format!("cannot connect to {target}: {}", failure.reason);
        if is_tls {
            return Failure::new(FailureKind::FailedPrecondition, "tls", reason).with_remedy(
                "compare the certificates of the two hosts: same CA, not expired, a subject alternative name for \
                 the name it was called by, and one that is allowed there; the log of the agent there says what it \
                 refuses",
            );
        }
        Failure { reason, ..failure }.with_remedy(unreachable)
    })
}

/// `tls-files`: what [`TlsFiles::client_config`] complains about.
pub fn tls_files(reason: String) -> Failure {
    Failure::new(FailureKind::FailedPrecondition, "tls-files", reason).with_remedy(
        "make the certificates as for libvirt's own TLS (CA/cacert.pem, libvirt/clientcert.pem and \
         libvirt/private/clientkey.pem in --pki-dir)",
    )
}

/// Whether whoever listens at `host` expects TLS; for an error message after a plain connection has failed.
pub async fn wants_tls(host: &str) -> bool {
    crate::rpc::secure::wants_tls(&authority(host)).await.unwrap_or(false)
}

/// Connects to the admin socket of an agent of this host.
///
/// # Errors
/// `unreachable`, with the path.
pub async fn connect_unix(path: &Path) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", path.display()))?;
    endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await.map_err(|e| {
        let f = Failure::from(e);
        Failure { reason: format!("cannot connect to {}: {}", path.display(), f.reason), ..f }
            .with_remedy("check that the agent runs and that you may use its socket")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stays_on_this_machine_is_loopback() {
        for host in ["localhost", "localhost:1", "127.0.0.1", "127.8.8.8:9", "::1", "[::1]:7"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["beta", "127.0.0.1.evil", "10.0.0.1:7420", "::", "0.0.0.0", "localhost.example", "fe80::1"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn authority_table() {
        for (host, want) in [
            ("beta", "beta:7420"),
            ("beta:1", "beta:1"),
            ("10.0.0.2", "10.0.0.2:7420"),
            ("10.0.0.2:80", "10.0.0.2:80"),
            ("fe80::1", "[fe80::1]:7420"),
            ("[fe80::1]", "[fe80::1]:7420"),
            ("[fe80::1]:9", "[fe80::1]:9"),
        ] {
            assert_eq!(authority(host), want);
        }
    }
}
