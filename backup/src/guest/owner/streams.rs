//! The streams of primaries.

use super::Owner;
use crate::engine::{ConnectionId, Event};
use crate::guest::Connect;
use tokio::sync::mpsc;
use understudy_proto::rpc::epoch::{BackupMessage, Refused, RefusedCode};
use understudy_proto::rpc::{Failure, Inbound};

pub(super) struct Connection {
    pub(super) inbound: Inbound,
    pub(super) outbound: mpsc::Sender<BackupMessage>,
}

pub(super) fn protocol_refusal(failure: &Failure) -> Refused {
    Refused {
        code: RefusedCode::Protocol,
        text: failure.reason.clone(),
        remedy: failure.remedy.clone(),
        generation: None,
    }
}

impl Owner {
    pub(super) async fn connect(&mut self, connect: Connect) {
        let Connect { hello, agreement, local, inbound, outbound } = connect;
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        self.connections.insert(id, Connection { inbound, outbound });
        let hello = Box::new(hello);
        self.happen(Event::Hello { connection: id, hello, agreement, local }).await;
    }

    pub(super) fn send(&mut self, id: ConnectionId, message: BackupMessage) -> Option<Event> {
        let sent = self.connections.get(&id)?.outbound.try_send(message);
        if sent.is_ok() {
            return None;
        }
        self.connections.remove(&id);
        Some(Event::Disconnected(id, "the primary does not read its answers".into()))
    }
}
