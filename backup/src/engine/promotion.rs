//! The part of the engine that promotes.
//!
//! Order: the image is finished and loaded into the paused standby; then the new generation is written to disk; only
//! then the guest is let run. What fails before that leaves no trace: the same generation, the image, another try.
//! What fails at letting it run leaves the new generation behind, because the guest may have run for a moment.

use super::{Command, Engine, Memory, StandbyPhase};
use crate::promoter::{Activation, PromoteError};
use std::time::{Duration, Instant};
use understudy_proto::control::Role;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::rpc::admin::{FailoverReport, LOADED, Progress};
use understudy_proto::rpc::epoch::{EpochRef, RefusedCode};
use understudy_proto::rpc::{Failure, FailureKind};

use super::stream::Receiving;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waiting for the worker to have applied everything.
    FinishApply,
    /// Waiting for the standby to be there.
    Prepare,
    /// The image goes into it.
    Load,
    /// The claim is to be confirmed.
    Confirm,
    /// The new generation is written.
    Record,
    /// It is let run.
    Activate,
}

/// Whether somebody must say once more that the guest may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// It runs as soon as it can.
    No,
    /// When it is loaded the claim is confirmed, or the promotion given up.
    UntilConfirmed,
}

/// How long a loaded guest waits for the confirmation: longer than the other host waits before it takes the guest back.
const CONFIRM_LIMIT: Duration = Duration::from_secs(60);

/// A promotion under way.
#[derive(Debug)]
pub(super) struct Promotion {
    stage: Stage,
    hold: Hold,
    epoch: EpochId,
    /// The generation before this promotion took its own.
    before: Generation,
    started: Instant,
    stage_began: Instant,
    finish_apply: Duration,
    prepare: Duration,
    load: Duration,
    record: Duration,
}

impl Promotion {
    /// Ends the stage; gives how long it took.
    fn enter(&mut self, stage: Stage, now: Instant) -> Duration {
        let took = now.saturating_duration_since(self.stage_began);
        self.stage = stage;
        self.stage_began = now;
        took
    }
}

impl Engine {
    pub(super) fn failover(&mut self, i_have_fenced: bool, hold: Hold, now: Instant, out: &mut Vec<Command>) {
        if let Err(failure) = self.may_promote(i_have_fenced) {
            out.push(Command::FailoverDone(Box::new(Err(failure))));
            return;
        }
        if self.held.is_none() && hold == Hold::UntilConfirmed {
            // After a restart in the middle of a promotion the new generation is recorded already.
            let text = format!("guest {} is loaded and recorded already", self.record.name);
            let failure = Failure::new(FailureKind::FailedPrecondition, "already-loaded", text);
            out.push(Command::FailoverDone(Box::new(Err(failure))));
            return;
        }
        self.refuse_stream(
            RefusedCode::Busy,
            format!("guest {} is being promoted on {}", self.record.name, self.identity.host),
            "wait for the promotion to end",
            out,
        );
        if matches!(self.receiving, Receiving::Verifying { .. }) {
            // Whole, but never acknowledged: the last committed epoch is the one before it.
            out.push(Command::DiscardEpoch);
            self.receiving = Receiving::Nothing;
        }
        let promotion = |stage, epoch| Promotion {
            stage,
            hold,
            epoch,
            before: self.record.generation,
            started: now,
            stage_began: now,
            finish_apply: Duration::ZERO,
            prepare: Duration::ZERO,
            load: Duration::ZERO,
            record: Duration::ZERO,
        };
        if let Some(held) = &self.held {
            let epoch = held.at.epoch;
            self.promotion = Some(promotion(Stage::FinishApply, epoch));
            out.push(Command::Progress(Progress::step(
                "finish-apply",
                format!("going on from epoch {epoch} of generation {}", held.at.generation),
            )));
            out.push(Command::TakeImage);
        } else {
            // After a restart in the middle of a promotion: loaded, recorded, not let run.
            let epoch = self.record.last_committed.unwrap_or(EpochId(0));
            self.promotion = Some(promotion(Stage::Activate, epoch));
            out.push(Command::Activate);
        }
    }

    fn may_promote(&self, i_have_fenced: bool) -> Result<(), Failure> {
        let name = &self.record.name;
        let refused = |code, reason: String| Failure::new(FailureKind::FailedPrecondition, code, reason);
        if self.promotion.is_some() {
            return Err(refused("promoting", format!("guest {name} is being promoted already")).retryable());
        }
        match self.record.role {
            Role::Promoted => {
                return Err(refused("already-promoted", format!("guest {name} runs here already"))
                    .with_remedy("`virsh list` shows it"));
            }
            Role::Stale => {
                return Err(refused(
                    "superseded",
                    format!(
                        "guest {name} has a newer owner, generation {}, on {}",
                        self.record.generation, self.record.primary_host
                    ),
                )
                .with_remedy("run `understudy failover` on the host that backs that one up"));
            }
            Role::Released => {
                return Err(refused("not-protected", format!("guest {name} is not protected to this host"))
                    .with_remedy("start it where it was, or restore it from a backup"));
            }
            Role::Promoting | Role::Standby => (),
        }
        if let (Some(_), false) = (&self.stream, i_have_fenced) {
            return Err(refused(
                "primary-alive",
                format!("the stream of guest {name} from {} is alive", self.record.primary_host),
            )
            .with_remedy(
                "if that host has just died, wait 3 s and try again; if it lives, make sure it cannot run the guest \
                 any more (power it off), then say so with --i-have-fenced",
            )
            .retryable());
        }
        if self.held.is_none() && self.record.role == Role::Standby {
            let reason = match self.record.last_committed {
                Some(epoch) if self.image_lost.is_some() => format!(
                    "no image of guest {name} is here: epoch {epoch} was committed, but {}",
                    self.image_lost.as_deref().unwrap_or_default()
                ),
                Some(epoch) => format!(
                    "no image of guest {name} is here: epoch {epoch} was committed, but the backup agent restarted since"
                ),
                None => format!("no image of guest {name} is here: no full copy was completed"),
            };
            return Err(refused("no-image", reason)
                .with_remedy("start the guest on its old host and protect it again"));
        }
        Ok(())
    }

    /// Whether the image is to be taken that [`Command::TakeImage`] has asked for. It may come when its promotion has failed:
    /// whoever kept it then would have the next epoch find the image in use, when it is acknowledged already (invariant 3).
    pub fn wants_image(&self) -> bool {
        self.promotion.as_ref().is_some_and(|promotion| promotion.stage == Stage::FinishApply)
    }

    pub(super) fn image_ready(&mut self, at: Option<EpochRef>, now: Instant, out: &mut Vec<Command>) {
        let Some(promotion) = self.promotion.as_mut().filter(|p| p.stage == Stage::FinishApply) else {
            return;
        };
        if at.map(|a| a.epoch) != Some(promotion.epoch) {
            let error =
                PromoteError::new(format!("the image is of {at:?}, epoch {} was committed", promotion.epoch));
            self.held = None;
            return self.promotion_failed(error, out);
        }
        promotion.finish_apply = promotion.enter(Stage::Prepare, now);
        self.promote_if_ready(now, out);
    }

    /// Loads the standby as soon as the image is ready and the standby is.
    pub(super) fn promote_if_ready(&mut self, now: Instant, out: &mut Vec<Command>) {
        let fits = self.fits();
        let Some(promotion) = self.promotion.as_mut().filter(|p| p.stage == Stage::Prepare) else { return };
        let what = match self.memory {
            Memory::Moved => "loading devices, memory is there",
            Memory::Cold(_) | Memory::Moving(_) => "loading memory and devices",
        };
        match self.standby {
            StandbyPhase::Ready { .. } if fits => {
                promotion.prepare = promotion.enter(Stage::Load, now);
                out.push(Command::Progress(Progress::step("load", what)));
                out.push(Command::Load);
            }
            StandbyPhase::Preparing | StandbyPhase::Checking | StandbyPhase::Discarding => (),
            StandbyPhase::Absent | StandbyPhase::Ready { .. } | StandbyPhase::Failed { .. } => {
                out.push(Command::Progress(Progress::step("prepare", "creating the domain")));
                self.prepare(out);
            }
        }
    }

    pub(super) fn loaded(&mut self, result: Result<(), PromoteError>, now: Instant, out: &mut Vec<Command>) {
        let Some(promotion) = self.promotion.as_mut().filter(|p| p.stage == Stage::Load) else { return };
        if let Err(e) = result {
            if self.memory != Memory::Moved {
                return self.promotion_failed(e, out);
            }
            // It has not run, so the memory is still that of the epoch, and can go the other way, into another one.
            promotion.enter(Stage::Prepare, now);
            let text = format!("trying again with memory through the stream: {e}");
            out.push(Command::Progress(Progress::step("prepare", text)));
            return self.discard(out);
        }
        promotion.load = promotion.enter(Stage::Confirm, now);
        match promotion.hold {
            Hold::No => self.take_generation(now, out),
            Hold::UntilConfirmed => {
                let text = "loaded, waiting for the claim to be confirmed";
                out.push(Command::Progress(Progress::step(LOADED, text)));
            }
        }
    }

    /// The claim is confirmed: nobody else may run the guest any more. Or it is not.
    pub(super) fn confirm(&mut self, proceed: bool, now: Instant, out: &mut Vec<Command>) {
        if self.promotion.as_ref().is_none_or(|p| p.hold == Hold::No) {
            return;
        }
        if !proceed {
            let stage = self.promotion.as_ref().map(|p| p.stage);
            // What is recorded goes on.
            if !matches!(stage, Some(Stage::Record | Stage::Activate)) {
                self.promotion_failed(PromoteError::new("the claim was given up"), out);
            }
        } else if self.promotion.as_ref().is_some_and(|p| p.stage == Stage::Confirm) {
            self.take_generation(now, out);
        }
    }

    /// Whether a confirmation would be heard.
    pub fn awaits_confirmation(&self) -> bool {
        self.promotion.as_ref().is_some_and(|p| p.stage == Stage::Confirm)
    }

    /// Gives a promotion up that nobody confirms.
    pub(super) fn confirmation_due(&mut self, now: Instant, out: &mut Vec<Command>) {
        let waiting = self.promotion.as_ref().filter(|p| p.stage == Stage::Confirm);
        if waiting.is_some_and(|p| now.saturating_duration_since(p.stage_began) >= CONFIRM_LIMIT) {
            let error = PromoteError::new(format!("nobody confirmed the claim within {CONFIRM_LIMIT:?}"));
            self.promotion_failed(error, out);
        }
    }

    /// Writes the new generation; the guest runs when that is on disk.
    fn take_generation(&mut self, now: Instant, out: &mut Vec<Command>) {
        let Some(promotion) = self.promotion.as_mut() else { return };
        promotion.enter(Stage::Record, now);
        self.record.role = Role::Promoting;
        self.record.generation = self.record.generation.next();
        self.record.last_committed = Some(promotion.epoch);
        self.write_control(true, out);
    }

    pub(super) fn control_written(&mut self, now: Instant, out: &mut Vec<Command>) {
        let Some(promotion) = self.promotion.as_mut().filter(|p| p.stage == Stage::Record) else { return };
        promotion.record = promotion.enter(Stage::Activate, now);
        out.push(Command::Progress(Progress::step("resume", "letting the guest run")));
        out.push(Command::Activate);
    }

    /// Whether it was a promotion's record that could not be written.
    pub(super) fn record_failed(&mut self, text: &str, out: &mut Vec<Command>) -> bool {
        let Some(promotion) = self.promotion.as_ref().filter(|p| p.stage == Stage::Record) else {
            return false;
        };
        // It never ran and nobody was told of the new generation.
        self.record.role = Role::Standby;
        self.record.generation = promotion.before;
        let error =
            PromoteError::new(text).with_remedy("make room in the state directory of the backup agent");
        self.promotion_failed(error, out);
        true
    }

    pub(super) fn activated(
        &mut self,
        result: Result<Activation, PromoteError>,
        now: Instant,
        out: &mut Vec<Command>,
    ) {
        let Some(promotion) = self.promotion.take_if(|p| p.stage == Stage::Activate) else { return };
        let activation = match result {
            Ok(activation) => activation,
            Err(e) => {
                self.promotion = Some(promotion);
                if self.held.is_some() {
                    self.record.role = Role::Standby;
                    self.write_control(false, out);
                } else if self.loaded_before {
                    // It may be gone.
                    out.push(Command::CheckStandby);
                }
                if self.image_shared && e.may_have_run {
                    // Its memory may be of a later moment than its devices: of no epoch (invariant 2).
                    self.lose_image(&format!(
                        "the guest may have run here for a moment and then failed: {e}"
                    ));
                    out.push(Command::DropImage);
                    self.discard(out);
                }
                return self.promotion_failed(e, out);
            }
        };
        self.record.role = Role::Promoted;
        self.loaded_before = false;
        self.write_control(false, out);
        self.held = None;
        self.seed = None;
        self.prepared = None;
        self.standby = StandbyPhase::Absent;
        self.standby_text.clear();
        self.memory = Memory::Cold(String::new());
        self.image_shared = false;
        self.detail.clear();
        out.push(Command::DropImage);
        let report = FailoverReport {
            epoch: promotion.epoch,
            generation: self.record.generation,
            finish_apply: promotion.finish_apply,
            record: promotion.record,
            prepare: promotion.prepare,
            load: promotion.load,
            resume: activation.resume,
            announce: activation.announce,
            total: now.saturating_duration_since(promotion.started),
            warnings: activation.warnings,
        };
        self.report = Some(report.clone());
        out.push(Command::FailoverDone(Box::new(Ok(report))));
    }

    /// Ends the promotion, if one is under way, so that it can be tried again. Never leaves a domain behind, except
    /// one that is loaded and has no image left to load it from again.
    pub(super) fn promotion_failed(&mut self, error: PromoteError, out: &mut Vec<Command>) {
        if self.promotion.take().is_none() {
            return;
        }
        self.detail = format!("the promotion failed: {error}");
        if self.held.is_some() {
            self.discard(out);
        }
        let failure =
            Failure::new(FailureKind::Internal, "promotion-failed", error.reason).with_remedy(error.remedy);
        out.push(Command::FailoverDone(Box::new(Err(failure))));
    }
}
