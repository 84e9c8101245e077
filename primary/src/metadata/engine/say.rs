//! What the second namespace says of a domain, and when.

use std::time::Instant;

use understudy_hook::metadata::State;
use understudy_proto::ids::GuestId;

use super::{Command, Domain, Failed, Phase, REPORT_INTERVAL, STANDBY};

/// Publishes what has changed, not too often.
pub(super) fn report(guest: GuestId, domain: &mut Domain, now: Instant, out: &mut Vec<Command>) {
    if !domain.running {
        return;
    }
    let state = state(domain);
    let due = domain.published_at.is_none_or(|at| now >= at + REPORT_INTERVAL);
    if domain.published.as_ref() != Some(&state) && due {
        domain.published = Some(state.clone());
        domain.published_at = Some(now);
        out.push(Command::Report(guest, state));
    }
}

fn state(domain: &Domain) -> Option<State> {
    let wanted = domain.mark.as_ref().ok().and_then(Option::as_ref);
    let following = matches!(domain.phase, Phase::Following | Phase::Ending);
    if !domain.marked() && !following && domain.command.is_empty() {
        return None;
    }
    let mut state = State {
        backup: wanted.map(|wanted| wanted.backup.clone()).unwrap_or_default(),
        command: domain.command.clone(),
        ..State::default()
    };
    let failed = |state: &mut State, failed: &Failed| {
        state.value = "failed".to_owned();
        (state.code, state.detail) = (failed.code.clone(), failed.reason.clone());
        state.remedy.clone_from(&failed.remedy);
    };
    match &domain.phase {
        Phase::Idle if domain.report.value == STANDBY => state.value.clone_from(&domain.report.value),
        Phase::Idle => state.value = "off".to_owned(),
        Phase::Off => {
            state.value = "off".to_owned();
            state.detail =
                "an operator has ended the protection; change the element to begin anew".to_owned();
        }
        Phase::Protecting => state.value = "starting".to_owned(),
        Phase::Waiting { failed: why, again } => {
            failed(&mut state, why);
            if again.is_some() {
                state.detail.push_str("; it is tried again");
            }
        }
        Phase::Following | Phase::Ending => {
            let report = &domain.report;
            (state.value, state.detail) = (report.value.clone(), report.detail.clone());
            state.generation = report.generation;
            state.by_metadata = true;
            if !report.backup.is_empty() {
                state.backup.clone_from(&report.backup);
            }
        }
    }
    if let Err(mistake) = &domain.mark {
        if !following {
            state.value = "invalid".to_owned();
        }
        state.code = "invalid-metadata".to_owned();
        state.detail = mistake.clone();
    }
    Some(state)
}
