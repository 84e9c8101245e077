//! The built-in witness as arbiter.

use std::time::Duration;

use tokio::sync::Mutex;
use understudy_proto::ids::GuestId;
use understudy_proto::ownership::Ownership;
use understudy_proto::rpc::transport;
use understudy_proto::rpc::witness::{WITNESS_PORT, WitnessClient};
use understudy_proto::rpc::{Failure, FailureKind, async_trait};

use super::Arbiter;

/// A witness at an address.
#[derive(Debug)]
pub struct WitnessArbiter {
    at: String,
    timeout: Duration,
    /// Made when it is first needed, and again after a failure.
    client: Mutex<Option<WitnessClient>>,
}

impl WitnessArbiter {
    /// The witness at `HOST` or `HOST:PORT`. No question takes longer than `timeout`.
    pub fn new(at: &str, timeout: Duration) -> Self {
        let has_port = transport::authority(at) == at;
        let at = if has_port { at.to_owned() } else { with_port(at) };
        Self { at, timeout, client: Mutex::new(None) }
    }

    async fn client(&self) -> Result<WitnessClient, Failure> {
        let mut kept = self.client.lock().await;
        if let Some(client) = kept.as_ref() {
            return Ok(client.clone());
        }
        let channel = transport::connect_plaintext(&self.at).await.map_err(|failure| {
            failure.with_remedy(
                "check that `understudy-watchdog --witness` runs there and no firewall is in between",
            )
        })?;
        let client = WitnessClient::new(channel, self.timeout);
        *kept = Some(client.clone());
        Ok(client)
    }

    async fn ask<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        question: impl FnOnce(WitnessClient) -> F,
    ) -> Result<T, Failure> {
        let asked = async { question(self.client().await?).await };
        let answer = tokio::time::timeout(self.timeout, asked).await.unwrap_or_else(|_| {
            let text = format!("the witness at {} does not answer within {:?}", self.at, self.timeout);
            Err(Failure::new(FailureKind::Unavailable, "witness-silent", text).retryable())
        });
        if answer.is_err() {
            *self.client.lock().await = None;
        }
        answer
    }
}

fn with_port(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{WITNESS_PORT}")
    } else {
        format!("{host}:{WITNESS_PORT}")
    }
}

#[async_trait]
impl Arbiter for WitnessArbiter {
    async fn read(&self, guest: GuestId) -> Result<Option<Ownership>, Failure> {
        self.ask(|mut client| async move { client.read(guest).await }).await
    }

    async fn swap(&self, guest: GuestId, new: &Ownership) -> Result<(), Failure> {
        let new = new.clone();
        self.ask(|mut client| async move { client.swap(guest, &new).await.map(|_| ()) }).await
    }

    fn name(&self) -> String {
        format!("witness at {}", self.at)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use understudy_proto::ids::Generation;
    use understudy_proto::ownership::{Owner, Term};
    use understudy_proto::rpc::witness::witness_routes;

    use super::*;
    use crate::witness::{Store, Witness};

    fn record(term: u64, owner: &str) -> Ownership {
        let owner = Owner::Solo { owner: owner.into() };
        Ownership { term: Term(term), generation: Generation(1), epoch: None, owner }
    }

    #[tokio::test]
    async fn a_real_witness_is_read_and_swapped_and_its_absence_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let routes = witness_routes(Arc::new(Witness::new(store)));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        // A runtime of its own, whose end takes every connection with it.
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let incoming = transport::listen("127.0.0.1:0".parse().unwrap()).unwrap();
                tell.send(incoming.local_addr().unwrap()).unwrap();
                tokio::select! {
                    ended = transport::server().add_routes(routes).serve_with_incoming(incoming) => ended.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        let address: std::net::SocketAddr = told.recv_timeout(Duration::from_secs(60)).unwrap();
        let arbiter = WitnessArbiter::new(&address.to_string(), Duration::from_secs(20));
        let guest = GuestId(uuid::Uuid::from_u128(1));
        assert_eq!(arbiter.read(guest).await.unwrap(), None);
        arbiter.swap(guest, &record(1, "alpha")).await.unwrap();
        // The loser is not told by an error: it reads.
        arbiter.swap(guest, &record(1, "beta")).await.unwrap();
        assert_eq!(arbiter.read(guest).await.unwrap(), Some(record(1, "alpha")));
        drop(stop);
        server.join().unwrap();
        let failure = arbiter.read(guest).await.unwrap_err();
        assert!(!failure.reason.is_empty());
    }

    #[test]
    fn the_port_of_the_witness_is_its_own() {
        for (given, at) in
            [("w", "w:7421"), ("w:9", "w:9"), ("fe80::1", "[fe80::1]:7421"), ("[::1]:5", "[::1]:5")]
        {
            assert_eq!(WitnessArbiter::new(given, Duration::ZERO).at, at);
        }
    }
}
