//! A gRPC client in grpcurl's manner: what a server offers it learns by reflection, requests and answers are JSON.
//!
//! It has nothing of Understudy in it, so what it can do any tool can do.

mod codec;

use codec::Dynamic;
use prost::Message;
use prost_reflect::prost_types::FileDescriptorProto;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use tokio_stream::StreamExt;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic_types::StatusExt;

/// A connection, and what has been learnt over it.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    pool: DescriptorPool,
    services: Vec<String>,
}

impl Client {
    /// Connects to a unix socket and learns what is served there.
    ///
    /// # Errors
    /// In words.
    pub async fn unix(socket: &Path) -> Result<Self, String> {
        let endpoint =
            Endpoint::from_shared(format!("unix:{}", socket.display())).map_err(|error| error.to_string())?;
        let channel = endpoint.connect().await;
        Self::over(channel.map_err(|error| format!("{}: {error}", socket.display()))?).await
    }

    /// Learns what is served over a connection.
    ///
    /// # Errors
    /// In words.
    pub async fn over(channel: Channel) -> Result<Self, String> {
        let mut client = Self { channel, pool: DescriptorPool::new(), services: Vec::new() };
        let wanted = MessageRequest::ListServices(String::new());
        let MessageResponse::ListServicesResponse(list) = client.ask(wanted).await? else {
            return Err("reflection does not list services".to_owned());
        };
        client.services = list.service.into_iter().map(|service| service.name).collect();
        for service in client.services.clone() {
            client.learn(service).await?;
        }
        Ok(client)
    }

    /// The services, by their full names.
    pub fn services(&self) -> &[String] {
        &self.services
    }

    /// The methods of a service.
    pub fn methods(&self, service: &str) -> Vec<String> {
        let service = self.pool.get_service_by_name(service);
        service
            .into_iter()
            .flat_map(|s| s.methods().map(|m| m.name().to_owned()).collect::<Vec<_>>())
            .collect()
    }

    /// The fields of the request of a method, with their types.
    ///
    /// # Errors
    /// If there is no such method.
    pub fn describe(&self, method: &str) -> Result<Vec<(String, String)>, String> {
        let input = self.method(method)?.input();
        Ok(input.fields().map(|field| (field.name().to_owned(), format!("{:?}", field.kind()))).collect())
    }

    /// The comment of a method in its source.
    pub fn comment(&self, method: &str) -> Option<String> {
        let method = self.method(method).ok()?;
        let file = method.parent_file().file_descriptor_proto().clone();
        let info = file.source_code_info?;
        let place = info.location.into_iter().find(|place| place.path == method.path())?;
        place.leading_comments
    }

    /// Calls `package.Service/Method` and gives all answers of a method that ends.
    ///
    /// # Errors
    /// The status, also of a stream that ends with one.
    pub async fn call(&self, method: &str, request: Value) -> Result<Vec<Value>, Status> {
        let mut answers = self.stream(method, request).await?;
        let mut all = Vec::new();
        while let Some(answer) = answers.next().await {
            all.push(json(&answer?)?);
        }
        Ok(all)
    }

    /// Calls a method and gives its first answer.
    ///
    /// # Errors
    /// The status.
    pub async fn first(&self, method: &str, request: Value) -> Result<Value, Status> {
        let first = self.stream(method, request).await?.next().await;
        json(&first.ok_or_else(|| Status::unknown("no answer"))??)
    }

    /// Calls a method and gives the first answer that `wish` takes.
    ///
    /// # Errors
    /// The status; also when the answers end before.
    pub async fn until(
        &self,
        method: &str,
        request: Value,
        wish: impl Fn(&Value) -> bool,
    ) -> Result<Value, Status> {
        let mut answers = self.stream(method, request).await?;
        while let Some(answer) = answers.next().await {
            let answer = json(&answer?)?;
            if wish(&answer) {
                return Ok(answer);
            }
        }
        Err(Status::unknown("the answers ended"))
    }

    async fn stream(&self, method: &str, request: Value) -> Result<tonic::Streaming<DynamicMessage>, Status> {
        let method = self.method(method).map_err(Status::invalid_argument)?;
        let message = DynamicMessage::deserialize(method.input(), request).map_err(|error| {
            Status::invalid_argument(format!("not {}: {error}", method.input().full_name()))
        })?;
        self.send(&method, message).await
    }

    /// Sends bytes as the request of a method, whatever they are.
    ///
    /// # Errors
    /// The status.
    pub async fn raw(&self, method: &str, bytes: &[u8]) -> Result<Vec<Value>, Status> {
        let method = self.method(method).map_err(Status::invalid_argument)?;
        let path = path(&method)?;
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        ready(&mut grpc).await?;
        let request = Request::new(bytes.to_vec());
        let mut answers =
            grpc.server_streaming(request, path, codec::Raw(method.output())).await?.into_inner();
        let mut all = Vec::new();
        while let Some(answer) = answers.next().await {
            all.push(json(&answer?)?);
        }
        Ok(all)
    }

    /// A method with one answer looks on the wire like one with a stream of answers.
    async fn send(
        &self,
        method: &MethodDescriptor,
        message: DynamicMessage,
    ) -> Result<tonic::Streaming<DynamicMessage>, Status> {
        let path = path(method)?;
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        ready(&mut grpc).await?;
        let codec = Dynamic(method.output());
        Ok(grpc.server_streaming(Request::new(message), path, codec).await?.into_inner())
    }

    fn method(&self, name: &str) -> Result<MethodDescriptor, String> {
        let (service, method) = name.split_once('/').ok_or_else(|| format!("{name} is no SERVICE/METHOD"))?;
        let service = self.pool.get_service_by_name(service);
        let found = service.and_then(|service| service.methods().find(|found| found.name() == method));
        found.ok_or_else(|| format!("the server has no {name}"))
    }

    async fn ask(&self, wanted: MessageRequest) -> Result<MessageResponse, String> {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(wanted) };
        let mut client = ServerReflectionClient::new(self.channel.clone());
        let answers = client.server_reflection_info(tokio_stream::once(request)).await;
        let mut answers = answers.map_err(|status| format!("reflection: {status}"))?.into_inner();
        match answers.next().await {
            Some(Ok(ServerReflectionResponse { message_response: Some(answer), .. })) => Ok(answer),
            other => Err(format!("reflection answered {other:?}")),
        }
    }

    async fn learn(&mut self, symbol: String) -> Result<(), String> {
        let MessageResponse::FileDescriptorResponse(files) =
            self.ask(MessageRequest::FileContainingSymbol(symbol.clone())).await?
        else {
            return Err(format!("reflection knows nothing of {symbol}"));
        };
        let files =
            files.file_descriptor_proto.iter().map(|bytes| FileDescriptorProto::decode(bytes.as_slice()));
        let files: Vec<_> = files.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        let known: BTreeSet<_> = self.pool.files().map(|file| file.name().to_owned()).collect();
        let new = files.into_iter().filter(|file| !known.contains(file.name()));
        self.pool.add_file_descriptor_protos(new).map_err(|error| error.to_string())
    }
}

fn path(method: &MethodDescriptor) -> Result<PathAndQuery, Status> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    path.parse().map_err(|_| Status::internal("no path"))
}

async fn ready(grpc: &mut tonic::client::Grpc<Channel>) -> Result<(), Status> {
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))
}

fn json(message: &DynamicMessage) -> Result<Value, Status> {
    serde_json::to_value(message).map_err(|error| Status::internal(error.to_string()))
}

/// What a generic tool reads from the details of an error: reason, domain, and whether a retry helps.
pub fn error_info(status: &Status) -> Option<(String, String, bool)> {
    let details = status.get_error_details();
    let info = details.error_info()?;
    let retryable = info.metadata.get("retryable").is_some_and(|word| word == "true");
    Some((info.reason.clone(), info.domain.clone(), retryable))
}
