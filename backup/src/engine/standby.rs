//! The standby domain: made of the newest seed, watched, and given the image's memory ahead of a promotion.

use super::Engine;
use super::event::{Command, Way};
use crate::promoter::{LocalDomain, PromoteError};
use std::sync::Arc;
use std::time::{Duration, Instant};
use understudy_proto::rpc::epoch::{BackupMessage, Standby};

/// How often it is checked that the standby is still there.
pub(super) const STANDBY_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// How long after a failure the standby is tried again.
pub(super) const STANDBY_RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// The standby domain. One call to the promoter is under way at a time; `Preparing`, `Checking` and `Discarding`
/// are the states in which one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StandbyPhase {
    Absent,
    Preparing,
    Ready { checked: Instant },
    Checking,
    Discarding,
    Failed { since: Instant },
}

/// How far that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Memory {
    /// At promotion.
    Cold(String),
    /// The move with this number is under way.
    Moving(u64),
    /// It is in the standby.
    Moved,
}

impl Memory {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Cold(reason) if reason.is_empty() => String::new(),
            Self::Cold(reason) => format!("cold, memory is loaded at promotion: {reason}"),
            Self::Moving(_) => "memory is being moved into it".into(),
            Self::Moved => "warm, its memory is up to date".into(),
        }
    }
}

impl Engine {
    /// Moves the image into the standby, if the standby has memory for it.
    pub(super) fn adopt(&mut self, out: &mut Vec<Command>) {
        let there = matches!(self.standby, StandbyPhase::Ready { .. } | StandbyPhase::Checking);
        if !there || matches!(self.memory, Memory::Cold(_)) {
            return;
        }
        self.moves += 1;
        self.image_shared = true;
        self.set_memory(Memory::Moving(self.moves), out);
        out.push(Command::Adopt(self.moves));
    }

    pub(super) fn adopted(&mut self, number: u64, result: Result<(), String>, out: &mut Vec<Command>) {
        if self.memory != Memory::Moving(number) {
            return;
        }
        let memory = match result {
            Ok(()) => Memory::Moved,
            Err(reason) => Memory::Cold(reason),
        };
        self.set_memory(memory, out);
    }

    pub(super) fn set_memory(&mut self, memory: Memory, out: &mut Vec<Command>) {
        let before = self.standby();
        self.memory = memory;
        self.tell_standby(&before, out);
    }

    pub(super) fn prepare(&mut self, out: &mut Vec<Command>) {
        let Some(held) = &self.held else { return };
        self.prepared = Some(Arc::clone(&held.seed));
        out.push(Command::Prepare(Arc::clone(&held.seed)));
        self.set_standby(StandbyPhase::Preparing, String::new(), out);
    }

    pub(super) fn discard(&mut self, out: &mut Vec<Command>) {
        self.prepared = None;
        // A call under way ends with an event, which finds nothing prepared and discards then.
        if matches!(self.standby, StandbyPhase::Preparing | StandbyPhase::Checking | StandbyPhase::Discarding)
        {
            return;
        }
        out.push(Command::Discard);
        self.set_standby(StandbyPhase::Discarding, String::new(), out);
    }

    pub(super) fn set_standby(&mut self, phase: StandbyPhase, text: String, out: &mut Vec<Command>) {
        let before = self.standby();
        self.standby = phase;
        self.standby_text = text;
        if !matches!(phase, StandbyPhase::Ready { .. } | StandbyPhase::Checking) {
            self.memory = Memory::Cold(String::new());
        }
        self.tell_standby(&before, out);
    }

    pub(super) fn tell_standby(&self, before: &Standby, out: &mut Vec<Command>) {
        let after = self.standby();
        if let (true, Some(stream)) = (*before != after, &self.stream) {
            out.push(Command::Send(stream.connection, BackupMessage::Standby(after)));
        }
    }

    pub(super) fn prepared(
        &mut self,
        result: Result<Way, PromoteError>,
        now: Instant,
        out: &mut Vec<Command>,
    ) {
        match result {
            Ok(way) => {
                self.set_standby(StandbyPhase::Ready { checked: now }, String::new(), out);
                match way {
                    Way::Cold(reason) => self.set_memory(Memory::Cold(reason), out),
                    // The image is being promoted, or is of another guest: it stays where it is.
                    Way::Warm if self.promotion.is_some() || !self.fits() => (),
                    Way::Warm => {
                        self.memory = Memory::Moving(self.moves);
                        self.adopt(out);
                    }
                }
            }
            Err(e) => {
                self.prepared = None;
                self.set_standby(StandbyPhase::Failed { since: now }, e.reason.clone(), out);
                if self.promotion.is_some() {
                    return self.promotion_failed(e, out);
                }
            }
        }
        self.standby_settled(now, out);
    }

    /// Whether the standby was made of what the image was seeded with.
    pub(super) fn fits(&self) -> bool {
        match (&self.prepared, &self.held) {
            (Some(p), Some(h)) => p.domain_xml == h.seed.domain_xml,
            _ => false,
        }
    }

    /// After a call to the promoter: what was asked for meanwhile.
    pub(super) fn standby_settled(&mut self, now: Instant, out: &mut Vec<Command>) {
        if self.promotion.is_some() {
            return self.promote_if_ready(now, out);
        }
        let ready = matches!(self.standby, StandbyPhase::Ready { .. });
        match (&self.prepared, &self.held) {
            (None, _) if ready => self.discard(out),
            (Some(p), Some(h)) if ready && p.domain_xml != h.seed.domain_xml => self.prepare(out),
            (_, Some(_)) if self.standby == StandbyPhase::Absent => self.prepare(out),
            _ => (),
        }
    }

    pub(super) fn checked(
        &mut self,
        result: Result<LocalDomain, PromoteError>,
        now: Instant,
        out: &mut Vec<Command>,
    ) {
        if self.loaded_before {
            return self.checked_loaded(result);
        }
        match result {
            Ok(LocalDomain::Waiting) => {
                self.set_standby(StandbyPhase::Ready { checked: now }, String::new(), out);
            }
            Ok(LocalDomain::Absent | LocalDomain::Loaded) => {
                self.prepared = None;
                self.set_standby(StandbyPhase::Absent, "the standby domain disappeared".into(), out);
            }
            Ok(LocalDomain::Active) => {
                self.prepared = None;
                let text = "a domain of this UUID is active here that is not the standby";
                self.set_standby(StandbyPhase::Failed { since: now }, text.into(), out);
            }
            // Not known is not gone.
            Err(e) => self.set_standby(StandbyPhase::Ready { checked: now }, e.reason, out),
        }
        self.standby_settled(now, out);
    }

    /// What an earlier life of the agent has loaded is there still, or is not.
    fn checked_loaded(&mut self, result: Result<LocalDomain, PromoteError>) {
        if matches!(result, Ok(LocalDomain::Absent | LocalDomain::Waiting)) {
            self.loaded_before = false;
            self.detail = "the agent restarted during the promotion, and the loaded guest is gone".into();
        }
    }

    pub(super) fn discarded(
        &mut self,
        result: Result<(), PromoteError>,
        now: Instant,
        out: &mut Vec<Command>,
    ) {
        match result {
            Ok(()) => self.set_standby(StandbyPhase::Absent, String::new(), out),
            Err(e) => self.set_standby(StandbyPhase::Failed { since: now }, e.reason, out),
        }
        self.standby_settled(now, out);
    }

    /// From time to time: whether it is still there, and another try after a failure.
    pub(super) fn look_after_standby(&mut self, now: Instant, out: &mut Vec<Command>) {
        if self.promotion.is_some() || self.held.is_none() {
            return;
        }
        let older = |t: Instant, than| now.saturating_duration_since(t) >= than;
        match self.standby {
            StandbyPhase::Ready { checked } if older(checked, STANDBY_CHECK_INTERVAL) => {
                self.standby = StandbyPhase::Checking;
                out.push(Command::CheckStandby);
            }
            StandbyPhase::Failed { since } if older(since, STANDBY_RETRY_INTERVAL) => self.prepare(out),
            _ => (),
        }
    }
}
