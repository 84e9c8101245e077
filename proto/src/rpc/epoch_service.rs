//! Client and server of the service `Epochs`, in domain types.

use super::epoch::{BackupMessage, PrimaryMessage, ProbeReply, ProbeRequest};
use super::generated::epoch as wire;
use super::lane::{LaneFrame, LaneMessage, LaneOpen, MainMessage};
use super::lane_merge::Lanes;
use super::{Failure, FallibleStream};
use crate::limits;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::{Stream, StreamExt};
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

/// What the backup reads. After an error item the stream has ended.
pub type Inbound = FallibleStream<PrimaryMessage>;

/// What the backup sends. The stream of the connection ends with it.
pub type Outbound = Pin<Box<dyn Stream<Item = BackupMessage> + Send>>;

/// The backup agent's side of the service.
#[tonic::async_trait]
pub trait EpochService: Send + Sync + 'static {
    /// Takes a stream. `peer` is the address it comes from, if it comes over TCP.
    async fn replicate(&self, peer: Option<SocketAddr>, inbound: Inbound) -> Result<Outbound, Failure>;

    /// Answers a probe.
    async fn probe(&self, request: ProbeRequest) -> Result<ProbeReply, Failure>;
}

/// The service, ready to be added to a [`super::transport::server`].
pub fn epoch_routes(service: Arc<impl EpochService>) -> Routes {
    Routes::new(
        wire::epochs_server::EpochsServer::new(Adapter { service, lanes: Lanes::default() })
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES),
    )
}

struct Adapter<S> {
    service: Arc<S>,
    lanes: Lanes,
}

#[tonic::async_trait]
impl<S: EpochService> wire::epochs_server::Epochs for Adapter<S> {
    type ReplicateStream = Pin<Box<dyn Stream<Item = Result<wire::BackupMessage, Status>> + Send>>;

    async fn replicate(
        &self,
        request: Request<Streaming<wire::PrimaryMessage>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let peer = request.remote_addr();
        let inbound = self.lanes.merged(checked(request.into_inner()));
        let outbound = self.service.replicate(peer, inbound).await?;
        Ok(Response::new(Box::pin(outbound.map(|m| Ok(m.into())))))
    }

    type CarryStream = Pin<Box<dyn Stream<Item = Result<wire::LaneReply, Status>> + Send>>;

    async fn carry(
        &self,
        request: Request<Streaming<wire::LaneMessage>>,
    ) -> Result<Response<Self::CarryStream>, Status> {
        let end = self.lanes.attach(checked(request.into_inner())).await?;
        Ok(Response::new(Box::pin(end.map(|never| match never {}))))
    }

    async fn probe(
        &self,
        request: Request<wire::ProbeRequest>,
    ) -> Result<Response<wire::ProbeReply>, Status> {
        let request = request.into_inner().try_into().map_err(Failure::from)?;
        Ok(Response::new(self.service.probe(request).await?.into()))
    }
}

/// The messages of a stream as domain types; ends after the first error.
pub(super) fn checked<W, D>(stream: Streaming<W>) -> FallibleStream<D>
where
    W: Send + 'static,
    D: TryFrom<W, Error = crate::ProtocolError> + Send + 'static,
{
    let mut failed = false;
    Box::pin(
        stream
            .map(|item| item.map_err(Failure::from).and_then(|m| D::try_from(m).map_err(Failure::from)))
            .take_while(move |item| !std::mem::replace(&mut failed, item.is_err())),
    )
}

/// The primary agent's side of the service.
#[derive(Debug, Clone)]
pub struct EpochsClient(wire::epochs_client::EpochsClient<Channel>);

impl EpochsClient {
    /// Over a connection made by [`super::transport`].
    pub fn new(channel: Channel) -> Self {
        Self(
            wire::epochs_client::EpochsClient::new(channel)
                .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
                .max_encoding_message_size(limits::MAX_MESSAGE_BYTES),
        )
    }

    /// Opens the stream of a guest. `outbound` must give its Hello without waiting for this to return; dropping
    /// what this returns ends the stream. After an error item the stream has ended.
    ///
    /// # Errors
    /// If the backup cannot be reached or does not take the stream.
    pub async fn replicate<M: Into<MainMessage> + 'static>(
        &mut self,
        outbound: impl Stream<Item = M> + Send + 'static,
    ) -> Result<FallibleStream<BackupMessage>, Failure> {
        let response =
            self.0.replicate(outbound.map(|message| wire::PrimaryMessage::from(message.into()))).await?;
        Ok(checked(response.into_inner()))
    }

    /// Opens a lane of a stream, over this connection. What it returns is ready when the lane has ended, with the reason;
    /// dropping it ends the lane at once.
    ///
    /// # Errors
    /// If the backup cannot be reached or does not take the lane.
    pub async fn carry(
        &mut self,
        open: LaneOpen,
        frames: impl Stream<Item = LaneFrame> + Send + 'static,
    ) -> Result<futures::future::BoxFuture<'static, String>, Failure> {
        let messages = tokio_stream::once(LaneMessage::Open(open)).chain(frames.map(LaneMessage::Frame));
        let mut replies = self.0.carry(messages.map(wire::LaneMessage::from)).await?.into_inner();
        Ok(Box::pin(async move {
            match replies.message().await {
                Ok(_) => "the backup has ended it".to_owned(),
                Err(status) => Failure::from(status).reason,
            }
        }))
    }

    /// Asks the backup about itself.
    ///
    /// # Errors
    /// If it cannot be reached or its answer is not valid.
    pub async fn probe(&mut self, request: ProbeRequest) -> Result<ProbeReply, Failure> {
        let reply = self.0.probe(wire::ProbeRequest::from(request)).await?;
        Ok(reply.into_inner().try_into()?)
    }
}
