//! The part of the engine that speaks with the primary.

use super::{Command, ConnectionId, Engine, StandbyPhase};
use crate::assembly::Attempt;
use crate::promoter::LocalDomain;
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use understudy_proto::control::Role;
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::ids::Generation;
use understudy_proto::negotiate::Agreement;
use understudy_proto::rpc::epoch::{
    BackupMessage, Begin, DevicePiece, EpochRef, Hello, HelloAck, Pages, PrimaryMessage, Refused,
    RefusedCode, Reject, RejectCode, Seed,
};

/// What one frame costs beside its bytes, so that many tiny ones are bounded too.
const FRAME_OVERHEAD_BYTES: u64 = 64;

/// A stream that was taken.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) connection: ConnectionId,
    session: u64,
    host: String,
    generation: Generation,
    /// The last heartbeat, and when the primary was last told that it is heard.
    heartbeat: u64,
    told: Instant,
}

/// How often the primary is told that what it sends arrives.
const TELL_INTERVAL: Duration = Duration::from_millis(500);

/// The epoch under way.
#[derive(Debug)]
pub(super) enum Receiving {
    /// None: the next thing is a Begin.
    Nothing,
    /// Its pages and device state arrive.
    Open(OpenEpoch),
    /// It was rejected; what is still under way of it is passed over.
    Skipping,
    /// Its manifest is here, the worker compares. The seed is that of a full epoch.
    Verifying { at: EpochRef, seed: Option<Arc<Seed>> },
}

#[derive(Debug)]
pub(super) struct OpenEpoch {
    begin: Begin,
    seed: Option<Arc<Seed>>,
    frames: u64,
    frame_bytes: u64,
    device_bytes: u64,
}

impl OpenEpoch {
    pub(super) fn at(&self) -> EpochRef {
        EpochRef { generation: self.begin.generation, epoch: self.begin.epoch }
    }
}

impl Engine {
    pub(super) fn hello(
        &mut self,
        connection: ConnectionId,
        hello: Hello,
        agreement: Agreement,
        local: LocalDomain,
        now: Instant,
        out: &mut Vec<Command>,
    ) {
        if let Err((code, text, remedy)) = self.may_take(&hello, local) {
            if code == RefusedCode::Conflict
                && hello.generation > self.record.generation
                && self.record.role == Role::Promoted
            {
                // Two owners: ours is the older one. It is said loudly; only a person or the arbiter may act.
                self.record.role = Role::Stale;
                self.record.generation = hello.generation;
                self.detail = format!(
                    "the guest runs here and, as generation {}, on {}",
                    hello.generation, hello.primary_host
                );
                self.write_control(false, out);
            }
            let generation = Some(self.record.generation);
            let refused = Refused { code, text, remedy: remedy.into(), generation };
            out.push(Command::Send(connection, BackupMessage::Refused(refused)));
            out.push(Command::Close(connection));
            return;
        }
        if let Some(old) = self.stream.take() {
            out.push(Command::Close(old.connection));
            self.drop_open_epoch(out);
        }
        if matches!(self.receiving, Receiving::Verifying { .. }) {
            // It was never acknowledged, and this stream would send it again.
            out.push(Command::DiscardEpoch);
            self.receiving = Receiving::Nothing;
        }
        if hello.generation > self.record.generation {
            // What is here belongs to an owner of the past.
            self.forget_image(out);
            self.record.last_committed = None;
        }
        let before = self.record.clone();
        self.record.role = Role::Standby;
        self.record.generation = hello.generation;
        self.record.name = hello.guest_name;
        self.record.primary_host.clone_from(&hello.primary_host);
        self.persistent = hello.persistent;
        self.report = None;
        self.detail.clear();
        self.stream = Some(Stream {
            connection,
            session: hello.session,
            host: hello.primary_host,
            generation: hello.generation,
            heartbeat: 0,
            told: now,
        });
        if self.record != before || self.control_dirty {
            self.write_control(true, out);
        }
        let ack = HelloAck {
            agreement,
            incarnation: self.identity.incarnation,
            last_committed: self.held.as_ref().map(|h| h.at).filter(|at| at.generation == hello.generation),
            host: self.identity.host.clone(),
            qemu_version: self.identity.qemu_version.clone(),
            libvirt_version: self.identity.libvirt_version.clone(),
        };
        out.push(Command::Send(connection, BackupMessage::HelloAck(ack)));
        out.push(Command::Send(connection, BackupMessage::Standby(self.standby())));
    }

    /// Every reason to refuse a stream, in the order in which they matter.
    fn may_take(&self, hello: &Hello, local: LocalDomain) -> Result<(), (RefusedCode, String, &'static str)> {
        let known = self.record.generation;
        // One that has lost the guest knows the generation of who has it: that is the one it may back up.
        let owned_here = matches!(self.record.role, Role::Promoted | Role::Promoting);
        if self.promotion.is_some() {
            return Err((
                RefusedCode::Busy,
                format!("guest {} is being promoted on {}", hello.guest_name, self.identity.host),
                "wait for the promotion to end",
            ));
        }
        if hello.generation < known || (owned_here && hello.generation == known) {
            return Err((
                RefusedCode::Superseded,
                format!(
                    "guest {} has generation {known}, this stream is of generation {}",
                    hello.guest_name, hello.generation
                ),
                "the guest runs elsewhere: stop it on this host and protect it from its new one",
            ));
        }
        if matches!(local, LocalDomain::Active | LocalDomain::Loaded) {
            return Err((
                RefusedCode::Conflict,
                format!(
                    "a domain with the UUID of guest {} is active on {}",
                    hello.guest_name, self.identity.host
                ),
                "stop it there, after making sure that it is not the one that serves",
            ));
        }
        match &self.stream {
            Some(s) if s.host != hello.primary_host => Err((
                RefusedCode::Busy,
                format!("a stream of guest {} from host {} is open", hello.guest_name, s.host),
                "end the protection on that host first",
            )),
            Some(s) if s.session >= hello.session => Err((
                RefusedCode::Busy,
                format!(
                    "stream {} of guest {} is open, this one is {}",
                    s.session, hello.guest_name, hello.session
                ),
                "a stream that replaces another must have a higher session number",
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn message(
        &mut self,
        connection: ConnectionId,
        message: PrimaryMessage,
        now: Instant,
        out: &mut Vec<Command>,
    ) {
        self.tell(&message, now, out);
        match message {
            PrimaryMessage::Hello(_) => self.break_off("a second Hello on one stream".into(), out),
            PrimaryMessage::Seed(seed) => self.seed = Some(Arc::new(seed)),
            PrimaryMessage::Begin(begin) => self.begin(begin, out),
            PrimaryMessage::Pages(pages) => self.pages(pages, out),
            PrimaryMessage::Device(piece) => self.device(piece, out),
            PrimaryMessage::Manifest(manifest) => self.manifest(&manifest, out),
            PrimaryMessage::Heartbeat(_) => {}
            PrimaryMessage::Goodbye(reason) => {
                self.stream = None;
                self.release(format!("the primary ended the protection ({reason:?})").to_lowercase(), out);
                out.push(Command::Close(connection));
            }
        }
    }

    /// A heartbeat is answered. On a slow link it queues behind megabytes of pages, longer than the primary waits for an
    /// answer; so pages that arrive are answered too, now and then, as if the last heartbeat had come again.
    fn tell(&mut self, message: &PrimaryMessage, now: Instant, out: &mut Vec<Command>) {
        let Some(stream) = &mut self.stream else { return };
        let due = match message {
            PrimaryMessage::Heartbeat(counter) => {
                stream.heartbeat = *counter;
                true
            }
            PrimaryMessage::Pages(_) | PrimaryMessage::Device(_) => now >= stream.told + TELL_INTERVAL,
            _ => false,
        };
        if due {
            stream.told = now;
            out.push(Command::Send(stream.connection, BackupMessage::HeartbeatReply(stream.heartbeat)));
        }
    }

    fn begin(&mut self, begin: Begin, out: &mut Vec<Command>) {
        let at = EpochRef { generation: begin.generation, epoch: begin.epoch };
        if let Receiving::Verifying { at: pending, .. } = &self.receiving {
            let text = format!("epoch {} begins before epoch {} is answered", at.epoch, pending.epoch);
            return self.break_off(text, out);
        }
        let Some(stream) = &self.stream else { return };
        if begin.generation != stream.generation {
            let text = format!(
                "an epoch of generation {} on a stream of generation {}",
                begin.generation, stream.generation
            );
            return self.break_off(text, out);
        }
        self.drop_open_epoch(out);
        let committed = self.held.as_ref().map(|h| h.at).filter(|c| c.generation == at.generation);
        let seed = match begin.kind {
            EpochKind::Full => {
                let Some(seed) = self.seed.take() else {
                    let text = format!("full epoch {} comes without a seed", at.epoch);
                    return self.reject(at, RejectCode::OutOfOrder, text, out);
                };
                if let Some(c) = committed.filter(|c| c.epoch >= at.epoch) {
                    let text =
                        format!("epoch {} does not come after the committed epoch {}", at.epoch, c.epoch);
                    return self.reject(at, RejectCode::OutOfOrder, text, out);
                }
                Some(seed)
            }
            EpochKind::Delta => {
                if committed.is_none_or(|c| c.epoch.next() != at.epoch) {
                    let have = committed.map_or("nothing".into(), |c| format!("epoch {}", c.epoch));
                    let text = format!("delta {} needs the epoch before it, committed is {have}", at.epoch);
                    return self.reject(at, RejectCode::NoBase, text, out);
                }
                None
            }
        };
        self.attempt = Attempt(self.attempt.0 + 1);
        out.push(Command::Open(self.attempt, begin, seed.clone()));
        self.receiving =
            Receiving::Open(OpenEpoch { begin, seed, frames: 0, frame_bytes: 0, device_bytes: 0 });
    }

    fn pages(&mut self, pages: Pages, out: &mut Vec<Command>) {
        let staging_max_bytes = self.identity.staging_max_bytes;
        let open = match &mut self.receiving {
            Receiving::Open(open) if open.begin.epoch == pages.epoch => open,
            other => {
                let what = format!("pages of epoch {}", pages.epoch);
                return Self::misplaced(other, what).into_iter().for_each(|text| self.break_off(text, out));
            }
        };
        open.frames += 1;
        open.frame_bytes = open.frame_bytes.saturating_add(pages.frame.len() as u64);
        let staged_bytes = open.frame_bytes.saturating_add(open.frames.saturating_mul(FRAME_OVERHEAD_BYTES));
        if open.begin.kind == EpochKind::Delta && staged_bytes > staging_max_bytes {
            let at = open.at();
            let text = format!(
                "delta {} needs more than the {staging_max_bytes} bytes that may be staged",
                at.epoch
            );
            out.push(Command::DiscardEpoch);
            return self.reject(at, RejectCode::TooLarge, text, out);
        }
        out.push(Command::Frame(pages.frame));
    }

    fn device(&mut self, piece: DevicePiece, out: &mut Vec<Command>) {
        let open = match &mut self.receiving {
            Receiving::Open(open) if open.begin.epoch == piece.epoch => open,
            other => {
                let what = format!("device state of epoch {}", piece.epoch);
                return Self::misplaced(other, what).into_iter().for_each(|text| self.break_off(text, out));
            }
        };
        if piece.offset_bytes != open.device_bytes {
            let at = open.at();
            let text =
                format!("device state at byte {} follows {} bytes", piece.offset_bytes, open.device_bytes);
            out.push(Command::DiscardEpoch);
            return self.reject(at, RejectCode::OutOfOrder, text, out);
        }
        // Each piece was checked to end within limits::MAX_DEVICE_BYTES.
        open.device_bytes += piece.data.len() as u64;
        out.push(Command::Device(Bytes::clone(&piece.data)));
    }

    fn manifest(&mut self, manifest: &EpochManifest, out: &mut Vec<Command>) {
        let at = EpochRef { generation: manifest.generation, epoch: manifest.epoch };
        match std::mem::replace(&mut self.receiving, Receiving::Nothing) {
            Receiving::Open(open) if open.at() == at => {
                out.push(Command::Verify(manifest.clone()));
                self.receiving = Receiving::Verifying { at, seed: open.seed };
            }
            mut other => {
                let text = Self::misplaced(&mut other, format!("a manifest of epoch {}", at.epoch));
                self.receiving = other;
                text.into_iter().for_each(|text| self.break_off(text, out));
            }
        }
    }

    /// Why something that belongs to an epoch has no place; `None` while a rejected epoch is passed over.
    fn misplaced(receiving: &mut Receiving, what: String) -> Option<String> {
        match receiving {
            Receiving::Skipping => None,
            Receiving::Nothing => Some(format!("{what} without a Begin")),
            Receiving::Open(open) => Some(format!("{what} while epoch {} is open", open.begin.epoch)),
            Receiving::Verifying { at, .. } => {
                Some(format!("{what} behind the manifest of epoch {}", at.epoch))
            }
        }
    }

    pub(super) fn reject(&mut self, at: EpochRef, code: RejectCode, text: String, out: &mut Vec<Command>) {
        self.receiving = Receiving::Skipping;
        self.detail = format!("epoch {} was rejected: {text}", at.epoch);
        if let Some(stream) = &self.stream {
            let reject = Reject { at, code, text };
            out.push(Command::Send(stream.connection, BackupMessage::Reject(reject)));
        }
    }

    fn break_off(&mut self, text: String, out: &mut Vec<Command>) {
        self.detail = format!("the stream was refused: {text}");
        self.refuse_stream(
            RefusedCode::Protocol,
            text,
            "check that both hosts run compatible versions of Understudy",
            out,
        );
    }

    /// Ends the stream, if there is one, saying why.
    pub(super) fn refuse_stream(
        &mut self,
        code: RefusedCode,
        text: String,
        remedy: &str,
        out: &mut Vec<Command>,
    ) {
        let Some(stream) = self.stream.take() else { return };
        let refused = Refused { code, text, remedy: remedy.into(), generation: Some(self.record.generation) };
        out.push(Command::Send(stream.connection, BackupMessage::Refused(refused)));
        out.push(Command::Close(stream.connection));
        self.drop_open_epoch(out);
    }

    /// Drops what is not whole. An epoch whose manifest is here stays: it is whole, and may yet be committed.
    pub(super) fn drop_open_epoch(&mut self, out: &mut Vec<Command>) {
        if matches!(self.receiving, Receiving::Verifying { .. }) {
            return;
        }
        if matches!(self.receiving, Receiving::Open(_)) {
            out.push(Command::DiscardEpoch);
        }
        self.receiving = Receiving::Nothing;
    }

    pub(super) fn forget_image(&mut self, out: &mut Vec<Command>) {
        self.receiving = Receiving::Nothing;
        self.seed = None;
        self.held = None;
        self.image_shared = false;
        self.image_lost = None;
        out.push(Command::DropImage);
        if self.prepared.is_some() || self.standby != StandbyPhase::Absent {
            self.discard(out);
        }
    }
}
