//! The built-in witness as arbiter.

use std::time::Duration;

use tokio::sync::Mutex;
use understudy_proto::ids::GuestId;
use understudy_proto::ownership::Ownership;
use understudy_proto::rpc::transport::{self, Security};
use understudy_proto::rpc::witness::{WITNESS_PORT, WitnessClient};
use understudy_proto::rpc::{Failure, FailureKind, async_trait};

use super::Arbiter;

/// A witness at an address.
#[derive(Debug)]
pub struct WitnessArbiter {
    at: String,
    security: Security,
    timeout: Duration,
    /// Made when it is first needed, and again after a failure.
    client: Mutex<Option<WitnessClient>>,
}

impl WitnessArbiter {
    /// The witness at `HOST` or `HOST:PORT`. No question takes longer than `timeout`.
    pub fn new(at: &str, security: Security, timeout: Duration) -> Self {
        let at = transport::authority_with(at, WITNESS_PORT);
        Self { at, security, timeout, client: Mutex::new(None) }
    }

    async fn client(&self) -> Result<WitnessClient, Failure> {
        let mut kept = self.client.lock().await;
        if let Some(client) = kept.as_ref() {
            return Ok(client.clone());
        }
        let remedy = "check that `understudy-watchdog --witness` runs there and no firewall is in between";
        let channel = transport::connect_at(self.at.clone(), &self.security, remedy).await?;
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
mod tests;
