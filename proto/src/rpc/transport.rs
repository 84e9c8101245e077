//! How connections between agents are set up: both sides take their settings from here, so they cannot differ.

use crate::limits;
pub use crate::rpc::secure::{Secure, secured};
use crate::rpc::status::{Failure, FailureKind};
pub use crate::rpc::tls::{PKI_DIR, Security, TlsFiles};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};

/// Port of the backup agent.
pub const DEFAULT_PORT: u16 = 7420;

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
    let has_port = match host.rsplit_once(':') {
        Some((before, port)) => {
            port.parse::<u16>().is_ok() && (!before.contains(':') || before.ends_with(']'))
        }
        None => false,
    };
    if has_port {
        host.to_owned()
    } else if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{DEFAULT_PORT}")
    } else {
        format!("{host}:{DEFAULT_PORT}")
    }
}

/// Connects to the backup agent at `host` (see [`authority`]) over plain TCP.
///
/// # Errors
/// `unreachable`, with what was tried.
pub async fn connect_plaintext(host: &str) -> Result<Channel, Failure> {
    let uri = format!("http://{}", authority(host));
    let endpoint = Endpoint::from_shared(uri.clone()).map_err(|e| {
        Failure { retryable: false, ..Failure::from(e) }
            .with_remedy(format!("give the backup as HOST or HOST:PORT; {host:?} is neither"))
    })?;
    configured(endpoint).connect().await.map_err(|e| {
        let f = Failure::from(e);
        Failure { reason: format!("cannot connect to {uri}: {}", f.reason), ..f }.with_remedy(
            "check that understudy-backup runs there, listens on that address, and no firewall is in between",
        )
    })
}

/// Connects to the backup agent at `host` as `security` says. With TLS nothing of ours is sent before both sides have
/// accepted each other.
///
/// # Errors
/// As [`connect_plaintext`]; `tls` if one side does not accept the other, in words.
pub async fn connect(host: &str, security: &Security) -> Result<Channel, Failure> {
    let Security::Tls(files) = security else { return connect_plaintext(host).await };
    // A mistake of ours is told as it is, and not as a connection that failed.
    files.client_config().map_err(tls_files)?;
    let (authority, files) = (authority(host), files.clone());
    let endpoint = Endpoint::from_shared(format!("http://{authority}"))?;
    let target = authority.clone();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let (authority, files) = (authority.clone(), files.clone());
        async move { Secure::connect(&authority, &files).await.map(TokioIo::new) }
    });
    configured(endpoint).connect_with_connector(connector).await.map_err(|error| {
        let failure = Failure::from(error);
        let is_tls = failure.reason.contains("TLS");
        let reason = format!("cannot connect to {target}: {}", failure.reason);
        if is_tls {
            return Failure::new(FailureKind::FailedPrecondition, "tls", reason).with_remedy(
                "compare the certificates of the two hosts: same CA, not expired, and a subject alternative name for \
                 the name that --to says; the log of understudy-backup there says what it refuses",
            );
        }
        Failure { reason, ..failure }.with_remedy(
            "check that understudy-backup runs there, listens on that address, and no firewall is in between",
        )
    })
}

/// `tls-files`: what [`TlsFiles::client_config`] complains about.
pub fn tls_files(reason: String) -> Failure {
    Failure::new(FailureKind::FailedPrecondition, "tls-files", reason).with_remedy(
        "make the certificates as for libvirt's own TLS (CA/cacert.pem, libvirt/clientcert.pem and \
         libvirt/private/clientkey.pem in --pki-dir), or give --insecure on a network that only the two hosts share",
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
