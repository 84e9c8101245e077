//! Serves the agent: primary agents over TCP, operators over a unix socket.

use crate::agent::{Agent, Operator};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::TcpIncoming;
use understudy_proto::rpc::transport::{AdminTcp, Security};
use understudy_proto::rpc::{admin_routes, epoch_routes, transport};

/// The sockets of an agent, bound.
#[derive(Debug)]
pub struct Sockets {
    tcp: TcpIncoming,
    address: SocketAddr,
    unix: UnixListener,
    path: PathBuf,
    admin: Option<AdminTcp>,
}

impl Sockets {
    /// Binds both. A socket file left by an agent that is gone is replaced; one that answers is an error.
    ///
    /// # Errors
    /// Naming the address or path.
    pub fn bind(listen: SocketAddr, run_dir: &Path) -> io::Result<Self> {
        let named =
            |what: String| move |e: io::Error| io::Error::new(e.kind(), format!("cannot bind {what}: {e}"));
        let path = run_dir.join(transport::BACKUP_SOCKET);
        std::fs::create_dir_all(run_dir).map_err(named(path.display().to_string()))?;
        if std::os::unix::net::UnixStream::connect(&path).is_ok() {
            return Err(io::Error::other(format!("another backup agent answers on {}", path.display())));
        }
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(named(path.display().to_string())(e));
            }
            _ => (),
        }
        let unix = UnixListener::bind(&path).map_err(named(path.display().to_string()))?;
        // Whoever may write to it may start guests.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let tcp = transport::listen(listen).map_err(named(listen.to_string()))?;
        let address = tcp.local_addr()?;
        Ok(Self { tcp, address, unix, path, admin: None })
    }

    /// Serves operators here too.
    #[must_use]
    pub fn with_admin(self, admin: AdminTcp) -> Self {
        Self { admin: Some(admin), ..self }
    }

    /// The TCP address, with the port that was given if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The admin socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until `stop` is ready, then ends the guests.
    ///
    /// # Errors
    /// If a server fails.
    pub async fn serve(
        self,
        agent: Arc<Agent>,
        security: Security,
        stop: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let epochs = transport::serve(epoch_routes(Arc::clone(&agent)), self.tcp, security);
        let routes = admin_routes(Arc::new(Operator(Arc::clone(&agent))));
        let by_tcp = async {
            match self.admin {
                Some(tcp) => tcp.serve(routes.clone()).await,
                None => std::future::pending().await,
            }
        };
        let admin = transport::server()
            .add_routes(routes.clone())
            .serve_with_incoming(UnixListenerStream::new(self.unix));
        // Streams never end by themselves, so the servers are not drained but dropped.
        let result = tokio::select! {
            result = epochs => result,
            result = admin => result,
            result = by_tcp => result,
            () = stop => Ok(()),
        };
        agent.shutdown().await;
        if let Err(e) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), error = %e, "admin socket not removed");
        }
        result
    }
}
