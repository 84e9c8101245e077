//! What stands in for an arbiter that is lost: the other host is switched off, and that is the licence.
//!
//! It is not the arbiter's word: a primary that has gone on alone before the arbiter was lost has let out what no image
//! holds. So it is for pairs whose primary never does that (`--on-lost-backup hold`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::{error, info, warn};
use understudy_proto::ids::GuestId;

use crate::arbiter::{FenceCommand, FenceOutcome};
use crate::keeper::Host;
use crate::owner::{LostBackup, Role, Suspicion};

/// How long the arbiter must have been silent: longer than one that is only being restarted.
const ARBITER_SILENT: Duration = Duration::from_secs(5);

/// Between two attempts.
const AGAIN: Duration = Duration::from_secs(30);

/// Whether and when the other host is to be switched off for a guest.
#[derive(Debug, Default)]
pub(super) struct Fencing {
    command: Option<Arc<FenceCommand>>,
    /// Since when the arbiter has given no answer.
    silent_since: Option<Instant>,
    again: Option<Instant>,
    /// Since the other host has been suspected.
    attempt: Option<Attempt>,
}

#[derive(Debug)]
enum Attempt {
    UnderWay,
    Ended(FenceOutcome),
}

/// What a report says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Fenced {
    /// Whether the other host was switched off.
    pub(super) success: bool,
    /// In words.
    pub(super) outcome: String,
}

impl Fencing {
    pub(super) fn new(command: Option<Arc<FenceCommand>>) -> Self {
        Self { command, ..Self::default() }
    }

    /// The arbiter has answered, or not.
    pub(super) fn arbiter(&mut self, answered: bool, now: Instant) {
        self.silent_since = if answered { None } else { self.silent_since.or(Some(now)) };
    }

    /// The command to run now, if the other host is to be switched off: it is silent on all paths, and so is the arbiter.
    pub(super) fn due(
        &mut self,
        role: &Role,
        suspicion: Option<Suspicion>,
        policy: LostBackup,
        now: Instant,
    ) -> Option<Arc<FenceCommand>> {
        let command = self.command.as_ref()?;
        let silent =
            self.silent_since.is_some_and(|since| now.saturating_duration_since(since) >= ARBITER_SILENT);
        let wanted = policy == LostBackup::Hold
            && *role == Role::Claiming
            && matches!(suspicion, Some(Suspicion::Silent(_)))
            && silent;
        if !wanted || self.again.is_some_and(|again| now < again) {
            return None;
        }
        self.again = Some(now + command.timeout + AGAIN);
        self.attempt = Some(Attempt::UnderWay);
        Some(Arc::clone(command))
    }

    /// The other host is suspected anew.
    pub(super) fn suspected(&mut self) {
        self.attempt = None;
    }

    /// The command has ended.
    pub(super) fn ended(&mut self, outcome: FenceOutcome) {
        if self.attempt.is_some() {
            self.attempt = Some(Attempt::Ended(outcome));
        }
    }

    /// What came of it until now.
    pub(super) fn report(&self) -> Fenced {
        let outcome = match (&self.attempt, &self.command) {
            (None, None) => "not configured".to_owned(),
            (None, Some(_)) => "not asked".to_owned(),
            (Some(Attempt::UnderWay), _) => "not ended".to_owned(),
            (Some(Attempt::Ended(FenceOutcome::Fenced)), _) => "the other host is off".to_owned(),
            (Some(Attempt::Ended(FenceOutcome::Refused(why))), _) => format!("failed: {why}"),
            (Some(Attempt::Ended(FenceOutcome::Unknown(why))), _) => format!("unknown: {why}"),
        };
        Fenced { success: matches!(self.attempt, Some(Attempt::Ended(FenceOutcome::Fenced))), outcome }
    }
}

/// Success alone is a licence.
pub(super) async fn fence_and_promote(
    guest: GuestId,
    command: Arc<FenceCommand>,
    host: Arc<dyn Host>,
) -> FenceOutcome {
    warn!(%guest, program = %command.program.display(), "the arbiter and the other host are silent: it is to be switched off");
    let outcome = command.fence().await;
    match &outcome {
        FenceOutcome::Fenced => {
            info!(%guest, "the other host is off; the guest is started here");
            if let Err(failure) = host.promote_fenced(guest).await {
                error!(%guest, reason = failure.reason, "the guest cannot be started");
            }
        }
        FenceOutcome::Refused(why) | FenceOutcome::Unknown(why) => {
            error!(%guest, why, "no licence: make sure that the other host is off, then run `understudy failover --i-have-fenced`");
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: LostBackup = LostBackup::Hold;

    #[test]
    fn only_silence_of_both_is_a_reason() {
        let command = FenceCommand { program: "f".into(), options: vec![], timeout: Duration::from_secs(20) };
        let mut fencing = Fencing::new(Some(Arc::new(command)));
        let (start, silent) = (Instant::now(), Some(Suspicion::Silent(Duration::from_secs(2))));
        let at = |seconds| start + Duration::from_secs(seconds);
        fencing.arbiter(false, start);
        assert!(fencing.due(&Role::Claiming, silent, HOLD, at(4)).is_none(), "it may be being restarted");
        assert!(
            fencing.due(&Role::Claiming, Some(Suspicion::QemuCrashed), HOLD, at(6)).is_none(),
            "its host lives"
        );
        let alone = fencing.due(&Role::Claiming, silent, LostBackup::Solo, at(6));
        assert!(alone.is_none(), "its primary may have gone on alone");
        assert!(fencing.due(&Role::Protected, silent, HOLD, at(6)).is_none(), "nothing is claimed");
        assert_eq!(fencing.report(), Fenced { success: false, outcome: "not asked".into() });
        assert!(fencing.due(&Role::Claiming, silent, HOLD, at(6)).is_some());
        assert_eq!(fencing.report(), Fenced { success: false, outcome: "not ended".into() });
        assert!(fencing.due(&Role::Claiming, silent, HOLD, at(7)).is_none(), "one at a time");
        assert!(fencing.due(&Role::Claiming, silent, HOLD, at(57)).is_some());
        fencing.ended(FenceOutcome::Unknown("has not ended within 20s".into()));
        let unknown = Fenced { success: false, outcome: "unknown: has not ended within 20s".into() };
        assert_eq!(fencing.report(), unknown);
        fencing.ended(FenceOutcome::Fenced);
        assert!(fencing.report().success);
        fencing.suspected();
        // One of before ends late.
        fencing.ended(FenceOutcome::Fenced);
        assert_eq!(fencing.report(), Fenced { success: false, outcome: "not asked".into() });
        fencing.arbiter(true, at(58));
        fencing.arbiter(false, at(120));
        assert!(fencing.due(&Role::Claiming, silent, HOLD, at(121)).is_none(), "it has answered meanwhile");
        assert!(Fencing::new(None).due(&Role::Claiming, silent, HOLD, at(200)).is_none());
    }
}
