//! Heartbeats as datagrams, over any number of paths.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tracing::{debug, warn};
use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::sealed::{MAX_BYTES, Opened, Refused, Seal};

/// Between two warnings about datagrams that are not authentic.
const WARN: Duration = Duration::from_secs(60);

/// A socket and where the other host listens: once for each network both hosts are on.
#[derive(Debug)]
pub struct Paths {
    socket: UdpSocket,
    peers: Vec<SocketAddr>,
    seal: Mutex<Seal>,
    warned: Mutex<Option<Instant>>,
}

impl Paths {
    /// Listens on `listen` and sends to all of `peers`; what counts is what `seal` takes.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn open(listen: SocketAddr, peers: Vec<SocketAddr>, seal: Seal) -> std::io::Result<Self> {
        let socket = UdpSocket::bind(listen).await?;
        Ok(Self { socket, peers, seal: Mutex::new(seal), warned: Mutex::default() })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Sends to everyone; one that is lost is like one that was never sent.
    pub async fn send(&self, heartbeat: &Heartbeat) {
        for peer in &self.peers {
            let sealed = self.seal.lock().unwrap_or_else(PoisonError::into_inner).seal(heartbeat);
            if let Ok(bytes) = sealed {
                self.send_to(&bytes, *peer).await;
            }
        }
    }

    async fn send_to(&self, bytes: &[u8], peer: SocketAddr) {
        if let Err(error) = self.socket.send_to(bytes, peer).await {
            debug!(%peer, %error, "a datagram was not sent");
        }
    }

    /// The next heartbeat; what is none, is not authentic or not fresh is passed over.
    ///
    /// # Errors
    /// If the socket fails.
    ///
    /// # Cancel safety
    /// What is not given stays in the socket. An answer to a stranger may not be sent; it asks again.
    pub async fn receive(&self) -> std::io::Result<Heartbeat> {
        let mut buffer = [0; MAX_BYTES + 1];
        loop {
            let (len, from) = match self.socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                // An answer to something sent: nobody listens there now.
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let opened = self.seal.lock().unwrap_or_else(PoisonError::into_inner).open(&buffer[..len]);
            match opened {
                Ok(Opened::Heartbeat(heartbeat)) => return Ok(heartbeat),
                Ok(Opened::Reply(reply)) => self.send_to(&reply, from).await,
                Ok(Opened::Known) => {}
                Err(Refused::NotAuthentic) => self.not_authentic(from),
                Err(error) => debug!(%from, %error, "a datagram does not count"),
            }
        }
    }

    fn not_authentic(&self, from: SocketAddr) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN) {
            *warned = Some(Instant::now());
            let why = Refused::NotAuthentic;
            warn!(%from, %why, "a datagram does not count");
        }
    }
}
