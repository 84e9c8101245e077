//! What the engine says of itself.

use understudy_proto::epoch::EpochKind;
use understudy_proto::rpc::admin::GuestState;

use super::{Engine, View};
use crate::capture::run_state::{Verdict, WaitReason};

impl Engine {
    /// State, reason and last committed epoch.
    pub fn view(&self) -> View {
        let (state, detail) = self.state();
        let in_flight = self.window.as_ref().map(|window| (window.epoch, window.kind));
        let (epoch, pace) = (self.epoch_length(), self.pace.reason().to_owned());
        let handed_over = self.handed_over();
        View { state, detail, committed: self.committed, in_flight, epoch, pace, handed_over }
    }

    fn state(&self) -> (GuestState, String) {
        let outcome = self.over.as_ref().or(self.end.as_ref().map(|end| &end.outcome));
        if let Some(outcome) = outcome {
            let detail = match outcome.remedy.as_str() {
                "" => outcome.text.clone(),
                remedy => format!("{}; {remedy}", outcome.text),
            };
            return (outcome.kind.state(), detail);
        }
        let copying = self.window.as_ref().is_some_and(|window| window.kind == EpochKind::Full);
        let Some(committed) = self.committed else {
            let detail = match (self.link.trouble(), self.link.is_up()) {
                (Some(trouble), _) => format!("connecting to {} again: {trouble}", self.settings.peer),
                (None, false) => format!("connecting to {}", self.settings.peer),
                (None, true) if copying => "full copy under way".to_owned(),
                (None, true) => self.guest_wait().unwrap_or_else(|| {
                    format!(
                        "a full copy is needed: {}",
                        self.needs_full.as_deref().unwrap_or("none was made")
                    )
                }),
            };
            return (GuestState::Seeding, detail);
        };
        if let Some(epoch) = self.handed_over() {
            let peer = &self.settings.peer;
            return (
                GuestState::Protected,
                format!("stands still at epoch {epoch} for {peer} to take it over"),
            );
        }
        if !self.link.is_up() {
            let why = self.link.trouble().unwrap_or("connecting");
            let peer = &self.settings.peer;
            let detail = format!(
                "backup {peer} is lost ({why}); the guest runs on, protected up to epoch {committed} only"
            );
            return (GuestState::Degraded, detail);
        }
        if copying {
            return (GuestState::Degraded, "full copy under way".to_owned());
        }
        if let Some(reason) = &self.needs_full {
            let wait = self.guest_wait().map(|wait| format!("; waiting: {wait}")).unwrap_or_default();
            return (GuestState::Degraded, format!("a full copy is needed: {reason}{wait}"));
        }
        (GuestState::Protected, self.guest_wait().map(|wait| format!("waiting: {wait}")).unwrap_or_default())
    }

    /// What about the guest keeps the next step waiting, if it is worth telling.
    fn guest_wait(&self) -> Option<String> {
        if !self.wants_guest() {
            return None;
        }
        match self.run.verdict() {
            Verdict::Wait(WaitReason::OwnCheckpoint) | Verdict::Yes => None,
            Verdict::Wait(reason) => Some(reason.to_string()),
            Verdict::AskQemu(_) => self.run_state.as_ref().map(|state| format!("the guest is {state}")),
            Verdict::Ended(reason) => Some(reason.to_string()),
        }
    }
}
