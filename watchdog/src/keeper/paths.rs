//! Heartbeats as datagrams, over any number of paths.

use std::io::ErrorKind;
use std::net::SocketAddr;

use tokio::net::UdpSocket;
use tracing::debug;
use understudy_proto::heartbeat::{Heartbeat, MAX_BYTES};

/// A socket and where the other host listens: once for each network both hosts are on.
#[derive(Debug)]
pub struct Paths {
    socket: UdpSocket,
    peers: Vec<SocketAddr>,
}

impl Paths {
    /// Listens on `listen` and sends to all of `peers`.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn open(listen: SocketAddr, peers: Vec<SocketAddr>) -> std::io::Result<Self> {
        Ok(Self { socket: UdpSocket::bind(listen).await?, peers })
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
        let Ok(bytes) = heartbeat.encode() else { return };
        for peer in &self.peers {
            if let Err(error) = self.socket.send_to(&bytes, peer).await {
                debug!(%peer, %error, "a heartbeat was not sent");
            }
        }
    }

    /// The next heartbeat; what is none is passed over.
    ///
    /// # Errors
    /// If the socket fails.
    ///
    /// # Cancel safety
    /// What is not given stays in the socket.
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
            match Heartbeat::decode(&buffer[..len]) {
                Ok(heartbeat) => return Ok(heartbeat),
                Err(error) => debug!(%from, %error, "not a heartbeat"),
            }
        }
    }
}
