//! The primary agent and its stream to the backup.

use understudy_primary::engine::Event;
use understudy_proto::ids::Generation;
use understudy_proto::negotiate::Offer;
use understudy_proto::rpc::epoch::{BackupMessage, Hello, PrimaryMessage};

use super::super::net::{Message, Side};
use super::super::{HOSTS, World};

impl World {
    pub(in crate::world) fn connect(&mut self, h: usize, number: u64, session: u64) {
        let Some(protection) = self.ongoing(h, number) else { return };
        let generation = Generation(protection.generation);
        let Some(stream) = self.open_stream(h, session) else {
            let later = 100 + self.below(900);
            let reason = "no answer".to_owned();
            return self.primary_later(h, number, later, Event::Disconnected { session, reason });
        };
        if let Some(protection) = self.ongoing(h, number) {
            protection.stream = Some(stream);
        }
        let hello = Hello {
            offer: Offer::ours(),
            guest: self.guest,
            guest_name: "web".to_owned(),
            generation,
            session,
            primary_host: HOSTS[h].to_owned(),
            qemu_version: String::new(),
            machine: String::new(),
            persistent: false,
            lane_key: None,
        };
        self.send(stream, Side::Primary, Message::Forth(PrimaryMessage::Hello(hello)));
    }

    pub(in crate::world) fn hears(&mut self, h: usize, stream: u64, session: u64, message: BackupMessage) {
        let held = self.seldom(15);
        let Some(protection) = self.protection(h).filter(|p| p.stream == Some(stream)) else { return };
        let number = protection.number;
        let event = match message {
            BackupMessage::HelloAck(ack) => Event::Connected { session, ack },
            BackupMessage::Ack(at) => {
                if held {
                    self.primary_event(h, number, Event::OutputHeld { bytes: 16 << 20 });
                }
                Event::Acked { session, at }
            }
            BackupMessage::Reject(reject) => Event::Rejected { session, reject },
            BackupMessage::Refused(refused) => {
                protection.stream = None;
                Event::Refused { session, refused }
            }
            BackupMessage::Standby(_) | BackupMessage::HeartbeatReply(_) => return,
        };
        self.primary_event(h, number, event);
    }

    /// A part of the epoch that is captured.
    pub(in crate::world) fn feed(&mut self, h: usize, message: PrimaryMessage) {
        if let Some(protection) = self.protection(h)
            && let Some((messages, live)) = &mut protection.feed
        {
            messages.push(message.clone());
            if let (true, Some(stream)) = (*live, protection.stream) {
                self.send(stream, Side::Primary, Message::Forth(message));
            }
        }
    }

    pub(in crate::world) fn new_feed(&mut self, h: usize) {
        if let Some(protection) = self.protection(h) {
            protection.feed = Some((Vec::new(), true));
        }
    }

    pub(in crate::world) fn resend(&mut self, h: usize) {
        let Some(protection) = self.protection(h) else { return };
        let Some((messages, live)) = &mut protection.feed else { return };
        *live = true;
        let (messages, stream) = (messages.clone(), protection.stream);
        for message in messages {
            if let Some(stream) = stream {
                self.send(stream, Side::Primary, Message::Forth(message));
            }
        }
    }
}
