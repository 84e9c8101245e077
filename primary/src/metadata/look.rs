//! What is to be seen of a domain.

use std::time::Duration;

use understudy_hook::metadata::{
    COMMAND_NAMESPACE, Command, Epoch, Output, PROTECT_NAMESPACE, Protect, STATE_NAMESPACE, State,
};
use understudy_libvirt::{Domain, LibvirtError};
use understudy_proto::control::Role;
use understudy_proto::ids::GuestId;
use understudy_proto::rpc::admin::GuestState;

use super::view::{Ended, Failed, Found, Protection, Report};
use crate::agent::Agent;
use crate::engine::OutcomeKind;
use crate::protect;

/// Looks at a domain. Blocks.
pub(super) fn at(agent: &Agent, domain: &Domain) -> Result<Found, LibvirtError> {
    let guest = GuestId(domain.uuid());
    let mark = domain.metadata(PROTECT_NAMESPACE)?;
    let mark = mark.map(|xml| Protect::parse(&xml).map_err(|mistake| mistake.to_string())).transpose();
    let command = domain.metadata(COMMAND_NAMESPACE)?;
    let reported = domain.metadata(STATE_NAMESPACE)?;
    // A record that cannot be read is for `protect` to complain about.
    let record = protect::local_record(&agent.config.state_dir, guest).ok().flatten();
    let standby = record.is_some_and(|record| matches!(record.role, Role::Standby | Role::Promoting));
    Ok(Found {
        running: domain.is_active()?,
        standby,
        mark: if standby { Ok(None) } else { mark },
        command: command.map(|xml| Command::parse(&xml).map_err(|mistake| mistake.to_string())),
        reported: reported.and_then(|xml| State::parse(&xml).ok()),
        protection: protection(agent, guest),
    })
}

/// How the protection of a guest fares.
pub(super) fn protection(agent: &Agent, guest: GuestId) -> Protection {
    let Some((wanted, status, outcome)) = agent.view(guest) else { return Protection::None };
    let Some(outcome) = outcome else {
        return Protection::Active {
            backup: wanted.to.clone(),
            epoch: match wanted.goals {
                Some(_) => Epoch::Auto,
                None => Epoch::Fixed(Duration::from_millis(wanted.epoch_ms.into())),
            },
            insecure: wanted.insecure,
            output: if wanted.ungated { Output::Ungated } else { Output::Gated },
            report: Report {
                value: status.state.label().to_owned(),
                backup: wanted.to,
                generation: Some(status.generation.0),
                detail: status.detail,
                settled: status.state == GuestState::Protected,
            },
        };
    };
    let failed = |time_helps| {
        let code = outcome.kind.state().label().to_owned();
        let (reason, remedy) = (outcome.text.clone(), outcome.remedy.clone());
        Ended::Failed(Failed { code, reason, remedy, time_helps })
    };
    Protection::Over(match outcome.kind {
        OutcomeKind::Unprotected => Ended::ByOperator,
        OutcomeKind::Ended | OutcomeKind::Crashed => Ended::WithGuest,
        OutcomeKind::AgentStopped => Ended::WithAgent,
        // Its newer owner runs it: nothing here brings it back.
        OutcomeKind::Superseded => failed(false),
        OutcomeKind::Failed => failed(true),
    })
}
