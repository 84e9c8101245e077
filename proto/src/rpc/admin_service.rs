//! Client and server of the service `Admin`, in domain types.

use super::admin::{
    ConfirmRequest, FailoverRequest, Progress, ProtectRequest, SetReply, SetRequest, StatusReply,
    StatusRequest, UnprotectReply, UnprotectRequest,
};
use super::epoch_service::checked;
use super::generated::admin as wire;
use super::{Failure, FailureKind, FallibleStream};
use crate::limits;
use futures::FutureExt;
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::{Stream, StreamExt};
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// An agent's side of the service. A method an agent has nothing to do with answers [`Failure::wrong_agent`].
#[tonic::async_trait]
pub trait AdminService: Send + Sync + 'static {
    /// Protects a guest.
    async fn protect(&self, request: ProtectRequest) -> Result<FallibleStream<Progress>, Failure>;
    /// Ends a protection.
    async fn unprotect(&self, request: UnprotectRequest) -> Result<UnprotectReply, Failure>;
    /// What the agent knows now.
    async fn status(&self, request: StatusRequest) -> Result<StatusReply, Failure>;
    /// What the agent knows, again at every change.
    async fn watch(&self, request: StatusRequest) -> Result<FallibleStream<StatusReply>, Failure>;
    /// Starts a guest from its last committed epoch.
    async fn failover(&self, request: FailoverRequest) -> Result<FallibleStream<Progress>, Failure>;
    /// Changes settings of a protected guest.
    async fn set(&self, _request: SetRequest) -> Result<SetReply, Failure> {
        Err(Failure::wrong_agent("set", "primary"))
    }
    /// Ends the wait of a failover that is held.
    async fn confirm(&self, _request: ConfirmRequest) -> Result<(), Failure> {
        Err(Failure::wrong_agent("confirm", "backup"))
    }
}

/// What reflection tells of the service; the test `bootstrap` keeps it current.
const DESCRIPTORS: &[u8] = include_bytes!("../gen/understudy.admin.v1.bin");

/// The service with health and reflection beside it, ready to be added to a [`super::transport::server`].
pub fn admin_routes<S: AdminService>(service: Arc<S>) -> Routes {
    let (reporter, health) = tonic_health::server::health_reporter();
    // Nobody else knows the reporter yet, so this is done at once.
    let _ = reporter.set_serving::<wire::admin_server::AdminServer<Adapter<S>>>().now_or_never();
    let mut routes = Routes::new(
        wire::admin_server::AdminServer::new(Adapter(service))
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES),
    )
    .add_service(health);
    let told = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Both versions: tools that are in use speak the older one.
    match (told().build_v1(), told().build_v1alpha()) {
        (Ok(now), Ok(before)) => routes = routes.add_service(now).add_service(before),
        (Err(error), _) | (_, Err(error)) => tracing::error!(%error, "no reflection is served"),
    }
    routes
}

/// The generated service, served by ours.
struct Adapter<S>(Arc<S>);

type WireStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn domain<W, D: TryFrom<W, Error = crate::ProtocolError>>(request: Request<W>) -> Result<D, Failure> {
    D::try_from(request.into_inner()).map_err(Failure::from)
}

fn wired<D: 'static, W: From<D> + 'static>(stream: FallibleStream<D>) -> Response<WireStream<W>> {
    Response::new(Box::pin(stream.map(|item| item.map(W::from).map_err(Status::from))))
}

#[tonic::async_trait]
impl<S: AdminService> wire::admin_server::Admin for Adapter<S> {
    type ProtectStream = WireStream<wire::Progress>;
    type WatchStream = WireStream<wire::StatusReply>;
    type FailoverStream = WireStream<wire::Progress>;

    async fn list(&self, _: Request<wire::ListRequest>) -> Result<Response<wire::StatusReply>, Status> {
        Ok(Response::new(self.0.status(StatusRequest::default()).await?.into()))
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<wire::GuestStatus>, Status> {
        let mut reply = self.0.status(domain(request)?).await?;
        let only = reply.guests.pop().ok_or_else(|| {
            Failure::new(FailureKind::NotFound, "no-guest", "this agent does not know the guest any more")
        })?;
        Ok(Response::new(only.into()))
    }

    async fn set(&self, request: Request<wire::SetRequest>) -> Result<Response<wire::SetReply>, Status> {
        Ok(Response::new(self.0.set(domain(request)?).await?.into()))
    }

    async fn protect(
        &self,
        request: Request<wire::ProtectRequest>,
    ) -> Result<Response<Self::ProtectStream>, Status> {
        Ok(wired(self.0.protect(domain(request)?).await?))
    }

    async fn unprotect(
        &self,
        request: Request<wire::UnprotectRequest>,
    ) -> Result<Response<wire::UnprotectReply>, Status> {
        Ok(Response::new(self.0.unprotect(domain(request)?).await?.into()))
    }

    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusReply>, Status> {
        Ok(Response::new(self.0.status(domain(request)?).await?.into()))
    }

    async fn watch(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(wired(self.0.watch(domain(request)?).await?))
    }

    async fn failover(
        &self,
        request: Request<wire::FailoverRequest>,
    ) -> Result<Response<Self::FailoverStream>, Status> {
        Ok(wired(self.0.failover(domain(request)?).await?))
    }

    async fn confirm(
        &self,
        request: Request<wire::ConfirmRequest>,
    ) -> Result<Response<wire::ConfirmReply>, Status> {
        self.0.confirm(domain(request)?).await?;
        Ok(Response::new(wire::ConfirmReply {}))
    }
}

/// The operator's side of the service.
#[derive(Debug, Clone)]
pub struct AdminClient(wire::admin_client::AdminClient<Channel>);

impl AdminClient {
    /// Over a connection made by [`super::transport`].
    pub fn new(channel: Channel) -> Self {
        Self(
            wire::admin_client::AdminClient::new(channel)
                .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
                .max_encoding_message_size(limits::MAX_MESSAGE_BYTES),
        )
    }

    /// Protects a guest. The stream ends with `done`, or with an error.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn protect(&mut self, request: ProtectRequest) -> Result<FallibleStream<Progress>, Failure> {
        Ok(checked(self.0.protect(wire::ProtectRequest::from(request)).await?.into_inner()))
    }

    /// Ends a protection.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn unprotect(&mut self, request: UnprotectRequest) -> Result<UnprotectReply, Failure> {
        let reply = self.0.unprotect(wire::UnprotectRequest::from(request)).await?;
        Ok(reply.into_inner().try_into()?)
    }

    /// What the agent knows now.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn status(&mut self, request: StatusRequest) -> Result<StatusReply, Failure> {
        let reply = self.0.status(wire::StatusRequest::from(request)).await?;
        Ok(reply.into_inner().try_into()?)
    }

    /// What the agent knows, again at every change.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn watch(&mut self, request: StatusRequest) -> Result<FallibleStream<StatusReply>, Failure> {
        Ok(checked(self.0.watch(wire::StatusRequest::from(request)).await?.into_inner()))
    }

    /// Starts a guest from its last committed epoch. The stream ends with `done` and a report, or with an error.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn failover(&mut self, request: FailoverRequest) -> Result<FallibleStream<Progress>, Failure> {
        Ok(checked(self.0.failover(wire::FailoverRequest::from(request)).await?.into_inner()))
    }

    /// Changes settings of a protected guest.
    ///
    /// # Errors
    /// What the agent answers.
    pub async fn set(&mut self, request: SetRequest) -> Result<SetReply, Failure> {
        let reply = self.0.set(wire::SetRequest::from(request)).await?;
        Ok(reply.into_inner().try_into()?)
    }

    /// Ends the wait of a failover that is held.
    ///
    /// # Errors
    /// What the agent answers: also that none waits.
    pub async fn confirm(&mut self, request: ConfirmRequest) -> Result<(), Failure> {
        self.0.confirm(wire::ConfirmRequest::from(request)).await?;
        Ok(())
    }
}
