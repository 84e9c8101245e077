//! Clients and servers of the services `Keeper` and `Handover`.

use super::convert::{guest, uuid_bytes};
use super::generated::owner as wire;
use super::{Failure, generated};
use crate::ids::{EpochId, GuestId};
use crate::ownership::Term;
use std::sync::Arc;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// File name of the watchdog's socket in the run directory.
pub const WATCHDOG_SOCKET: &str = "watchdog.sock";

/// Questions are short; an answer is a few reports.
const MAX_MESSAGE_BYTES: usize = 256 << 10;

/// What an operator asks a watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// The last takeover.
    Report,
    /// The bound on the time of a failover.
    Explain,
    /// The backup takes the guest over as planned work.
    Switchover,
    /// The same, if that is where the guest was protected first.
    Failback,
    /// This host, the backup, claims the guest.
    Failover,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Told {
    /// For people.
    pub text: String,
    /// For programs.
    pub json: String,
}

/// A watchdog's side of `Keeper`.
#[tonic::async_trait]
pub trait KeeperService: Send + Sync + 'static {
    /// Answers about the guest of that name or UUID, when what was asked for is done.
    async fn ask(&self, question: Question, domain: String) -> Result<Told, Failure>;
}

/// The primary agent's side of `Handover`.
#[tonic::async_trait]
pub trait HandoverService: Send + Sync + 'static {
    /// Stops the guest at the end of an epoch; gives the epoch when it is committed.
    async fn begin(&self, guest: GuestId, term: Option<Term>) -> Result<EpochId, Failure>;
    /// Lets it run on.
    async fn take_back(&self, guest: GuestId, term: Option<Term>) -> Result<(), Failure>;
    /// Promises that no order of this term or an older one lets the guest's output go.
    async fn hold(&self, guest: GuestId, term: Term) -> Result<(), Failure>;
}

struct Adapter<S>(Arc<S>);

/// The service, ready to be added to a [`super::transport::server`].
pub fn keeper_routes(service: Arc<impl KeeperService>) -> Routes {
    Routes::new(
        wire::keeper_server::KeeperServer::new(Adapter(service))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES),
    )
}

/// Adds the service to others of the same socket.
pub fn with_handover(routes: Routes, service: Arc<impl HandoverService>) -> Routes {
    routes.add_service(generated::owner::handover_server::HandoverServer::new(Adapter(service)))
}

impl<S: KeeperService> Adapter<S> {
    async fn ask(
        &self,
        question: Question,
        request: Request<wire::Asked>,
    ) -> Result<Response<wire::Told>, Status> {
        let Told { text, json } = self.0.ask(question, request.into_inner().domain).await?;
        Ok(Response::new(wire::Told { text, json }))
    }
}

#[tonic::async_trait]
impl<S: KeeperService> wire::keeper_server::Keeper for Adapter<S> {
    async fn report(&self, request: Request<wire::Asked>) -> Result<Response<wire::Told>, Status> {
        self.ask(Question::Report, request).await
    }

    async fn explain(&self, request: Request<wire::Asked>) -> Result<Response<wire::Told>, Status> {
        self.ask(Question::Explain, request).await
    }

    async fn switchover(&self, request: Request<wire::Asked>) -> Result<Response<wire::Told>, Status> {
        self.ask(Question::Switchover, request).await
    }

    async fn failback(&self, request: Request<wire::Asked>) -> Result<Response<wire::Told>, Status> {
        self.ask(Question::Failback, request).await
    }

    async fn failover(&self, request: Request<wire::Asked>) -> Result<Response<wire::Told>, Status> {
        self.ask(Question::Failover, request).await
    }
}

#[tonic::async_trait]
impl<S: HandoverService> wire::handover_server::Handover for Adapter<S> {
    async fn begin(
        &self,
        request: Request<wire::HandoverRequest>,
    ) -> Result<Response<wire::HandoverReply>, Status> {
        let wire::HandoverRequest { guest_uuid, term } = request.into_inner();
        let guest = guest(&guest_uuid).map_err(Failure::from)?;
        Ok(Response::new(wire::HandoverReply { epoch: self.0.begin(guest, term.map(Term)).await?.0 }))
    }

    async fn take_back(
        &self,
        request: Request<wire::HandoverRequest>,
    ) -> Result<Response<wire::HandoverReply>, Status> {
        let wire::HandoverRequest { guest_uuid, term } = request.into_inner();
        let guest = guest(&guest_uuid).map_err(Failure::from)?;
        self.0.take_back(guest, term.map(Term)).await?;
        Ok(Response::new(wire::HandoverReply::default()))
    }

    async fn hold(&self, request: Request<wire::HoldRequest>) -> Result<Response<wire::HoldReply>, Status> {
        let wire::HoldRequest { guest_uuid, term } = request.into_inner();
        let guest = guest(&guest_uuid).map_err(Failure::from)?;
        self.0.hold(guest, Term(term)).await?;
        Ok(Response::new(wire::HoldReply {}))
    }
}

/// The operator's side of `Keeper`.
#[derive(Debug, Clone)]
pub struct KeeperClient(wire::keeper_client::KeeperClient<Channel>);

impl KeeperClient {
    /// Over a connection made by [`super::transport`].
    pub fn new(channel: Channel) -> Self {
        Self(
            wire::keeper_client::KeeperClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    /// Asks, and waits until it is done.
    ///
    /// # Errors
    /// What the watchdog answers.
    pub async fn ask(&mut self, question: Question, domain: &str) -> Result<Told, Failure> {
        let asked = wire::Asked { domain: domain.to_owned() };
        let told = match question {
            Question::Report => self.0.report(asked).await,
            Question::Explain => self.0.explain(asked).await,
            Question::Switchover => self.0.switchover(asked).await,
            Question::Failback => self.0.failback(asked).await,
            Question::Failover => self.0.failover(asked).await,
        };
        let wire::Told { text, json } = told?.into_inner();
        Ok(Told { text, json })
    }
}

/// The watchdog's side of `Handover`.
#[derive(Debug, Clone)]
pub struct HandoverClient(wire::handover_client::HandoverClient<Channel>);

impl HandoverClient {
    /// Over a connection made by [`super::transport`].
    pub fn new(channel: Channel) -> Self {
        Self(wire::handover_client::HandoverClient::new(channel))
    }

    /// Stops the guest at the end of an epoch; gives the epoch when it is committed.
    ///
    /// # Errors
    /// What the agent answers. The guest runs on then, or soon.
    pub async fn begin(&mut self, guest: GuestId, term: Term) -> Result<EpochId, Failure> {
        let request = wire::HandoverRequest { guest_uuid: uuid_bytes(guest.0), term: Some(term.0) };
        Ok(EpochId(self.0.begin(request).await?.into_inner().epoch))
    }

    /// Lets it run on.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn take_back(&mut self, guest: GuestId, term: Term) -> Result<(), Failure> {
        let request = wire::HandoverRequest { guest_uuid: uuid_bytes(guest.0), term: Some(term.0) };
        self.0.take_back(request).await?;
        Ok(())
    }

    /// Has the agent promise that no order of this term or an older one lets the guest's output go.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn hold(&mut self, guest: GuestId, term: Term) -> Result<(), Failure> {
        self.0.hold(wire::HoldRequest { guest_uuid: uuid_bytes(guest.0), term: term.0 }).await?;
        Ok(())
    }
}
