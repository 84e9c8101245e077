//! Messages whose types are known only at run time.

use prost::Message;
use prost::bytes::BufMut;
use prost_reflect::{DynamicMessage, MessageDescriptor};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Requests as they are, answers of this type.
#[derive(Debug, Clone)]
pub(crate) struct Dynamic(pub(crate) MessageDescriptor);

/// Requests as bytes, answers of this type.
#[derive(Debug, Clone)]
pub(crate) struct Raw(pub(crate) MessageDescriptor);

impl Codec for Dynamic {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Messages;
    type Decoder = Self;

    fn encoder(&mut self) -> Messages {
        Messages
    }

    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

impl Decoder for Dynamic {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let message = DynamicMessage::decode(self.0.clone(), from);
        message.map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// Encodes messages.
#[derive(Debug)]
pub(crate) struct Messages;

impl Encoder for Messages {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: DynamicMessage, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(to).map_err(|error| Status::internal(error.to_string()))
    }
}

/// Encodes bytes as they are.
#[derive(Debug)]
pub(crate) struct Bytes;

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = DynamicMessage;
    type Encoder = Bytes;
    type Decoder = Dynamic;

    fn encoder(&mut self) -> Bytes {
        Bytes
    }

    fn decoder(&mut self) -> Dynamic {
        Dynamic(self.0.clone())
    }
}
