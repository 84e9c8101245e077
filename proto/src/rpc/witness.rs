//! Client and server of the service `Witness`.

use super::Failure;
use super::convert::{guest, uuid_bytes};
use super::generated::witness as wire;
use crate::ProtocolError;
use crate::ids::GuestId;
use crate::ownership::{MAX_RECORD_BYTES, Ownership, Term};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// A record is small; nothing larger is read.
const MAX_MESSAGE_BYTES: usize = 2 * MAX_RECORD_BYTES;

/// Port of the witness.
pub const WITNESS_PORT: u16 = 7421;

/// A record as the witness keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its term, at least 1.
    pub term: Term,
    /// See [`Ownership::encode`].
    pub record: Bytes,
}

/// What a witness does.
#[tonic::async_trait]
pub trait WitnessService: Send + Sync + 'static {
    /// The record of a guest.
    async fn read(&self, guest: GuestId) -> Result<Option<Stored>, Failure>;
    /// Replaces the record of the term before `new`; gives whether it did, and what is there now. Answers when that
    /// would survive a power cut.
    async fn swap(&self, guest: GuestId, new: Stored) -> Result<(bool, Option<Stored>), Failure>;
}

/// The service, ready to be added to a [`super::transport::server`].
pub fn witness_routes(service: Arc<impl WitnessService>) -> Routes {
    Routes::new(
        wire::witness_server::WitnessServer::new(Adapter(service))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES),
    )
}

struct Adapter<S>(Arc<S>);

fn stored(term: u64, record: Bytes) -> Result<Option<Stored>, ProtocolError> {
    ProtocolError::check_len("ownership record bytes", record.len() as u64, MAX_RECORD_BYTES as u64)?;
    match (term, record.is_empty()) {
        (0, true) => Ok(None),
        (0, false) | (_, true) => Err(ProtocolError::invalid(
            "ownership record",
            format!("term {term} with {} bytes", record.len()),
        )),
        _ => Ok(Some(Stored { term: Term(term), record })),
    }
}

fn reply(stored: Option<Stored>) -> wire::RecordReply {
    match stored {
        Some(Stored { term, record }) => wire::RecordReply { term: term.0, record },
        None => wire::RecordReply::default(),
    }
}

#[tonic::async_trait]
impl<S: WitnessService> wire::witness_server::Witness for Adapter<S> {
    async fn read(&self, request: Request<wire::ReadRequest>) -> Result<Response<wire::RecordReply>, Status> {
        let guest = guest(&request.into_inner().guest_uuid).map_err(Failure::from)?;
        Ok(Response::new(reply(self.0.read(guest).await?)))
    }

    async fn swap(&self, request: Request<wire::SwapRequest>) -> Result<Response<wire::SwapReply>, Status> {
        let request = request.into_inner();
        let guest = guest(&request.guest_uuid).map_err(Failure::from)?;
        let new = stored(request.term, request.record).map_err(Failure::from)?;
        let new = new.ok_or_else(|| ProtocolError::invalid("ownership term", "0, the first record is 1"));
        let (swapped, now) = self.0.swap(guest, new.map_err(Failure::from)?).await?;
        Ok(Response::new(wire::SwapReply { swapped, now: Some(reply(now)) }))
    }
}

/// The watchdog's side of the service.
#[derive(Debug, Clone)]
pub struct WitnessClient {
    client: wire::witness_client::WitnessClient<Channel>,
    timeout: Duration,
}

impl WitnessClient {
    /// Over a connection made by [`super::transport`]. No call takes longer than `timeout`.
    pub fn new(channel: Channel, timeout: Duration) -> Self {
        let client = wire::witness_client::WitnessClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Self { client, timeout }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// The record of a guest.
    ///
    /// # Errors
    /// What the witness answers, or that it does not; a record that cannot be read.
    pub async fn read(&mut self, guest: GuestId) -> Result<Option<Ownership>, Failure> {
        let request = self.request(wire::ReadRequest { guest_uuid: uuid_bytes(guest.0) });
        let reply = self.client.read(request).await?.into_inner();
        Ok(understood(reply)?)
    }

    /// Asks for the record of the term before `new` to be replaced; gives what is there afterwards.
    ///
    /// # Errors
    /// What the witness answers, or that it does not: then nothing is known until a read.
    pub async fn swap(&mut self, guest: GuestId, new: &Ownership) -> Result<Option<Ownership>, Failure> {
        let record = Bytes::from(new.encode()?);
        let message = wire::SwapRequest { guest_uuid: uuid_bytes(guest.0), term: new.term.0, record };
        let request = self.request(message);
        let reply = self.client.swap(request).await?.into_inner();
        Ok(understood(reply.now.unwrap_or_default())?)
    }
}

fn understood(reply: wire::RecordReply) -> Result<Option<Ownership>, ProtocolError> {
    let Some(Stored { term, record }) = stored(reply.term, reply.record)? else { return Ok(None) };
    Ownership::decode(term, &record).map(Some)
}
