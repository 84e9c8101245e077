//! What is to be seen of a domain.

use std::net::{ToSocketAddrs, UdpSocket};
use std::time::Duration;

use understudy_hook::metadata::{
    COMMAND_NAMESPACE, Command, Epoch, Output, PROTECT_NAMESPACE, Protect, STATE_NAMESPACE, State,
};
use understudy_libvirt::{Domain, LibvirtError};
use understudy_proto::control::{ControlFile, Role};
use understudy_proto::ids::GuestId;
use understudy_proto::rpc::admin::GuestState;
use understudy_proto::rpc::transport;

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
    let record = record(agent, guest);
    let standby =
        record.as_ref().is_some_and(|record| matches!(record.role, Role::Standby | Role::Promoting));
    let mark = match (mark, came_from(record)) {
        (Ok(Some(mark)), Some(origin)) => {
            Ok(Some(turned_round(mark, &origin, |host| is_this_host(agent, host))))
        }
        (mark, _) => mark,
    };
    Ok(Found {
        running: domain.is_active()?,
        standby,
        mark: if standby { Ok(None) } else { mark },
        command: command.map(|xml| Command::parse(&xml).map_err(|mistake| mistake.to_string())),
        reported: reported.and_then(|xml| State::parse(&xml).ok()),
        protection: protection(agent, guest),
    })
}

/// Whether a failover has brought the guest here, as its record says.
pub(super) fn promoted(agent: &Agent, guest: GuestId) -> bool {
    record(agent, guest).is_some_and(|record| record.role == Role::Promoted)
}

/// One that cannot be read is for `protect` to complain about.
fn record(agent: &Agent, guest: GuestId) -> Option<ControlFile> {
    protect::local_record(&agent.config.state_dir, guest).ok().flatten()
}

/// The host a guest was on before a failover brought it here.
fn came_from(record: Option<ControlFile>) -> Option<String> {
    let record = record.filter(|record| record.role == Role::Promoted)?;
    Some(record.primary_host).filter(|host| !host.is_empty())
}

/// What the element means once a failover has brought the guest to the backup it names: the two hosts have changed places.
fn turned_round(mark: Protect, origin: &str, is_here: impl Fn(&str) -> bool) -> Protect {
    if !mark.enabled || !is_here(&transport::host_of(&mark.backup)) {
        return mark;
    }
    let named = transport::authority(&mark.backup);
    let port = named.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    let backup = match port {
        Some(port) if port != transport::DEFAULT_PORT => transport::authority_with(origin, port),
        _ => origin.to_owned(),
    };
    Protect { backup, ..mark }
}

/// Whether a name or address is this host's. May ask a name server.
fn is_this_host(agent: &Agent, host: &str) -> bool {
    let own = agent.config.host_name.clone();
    let own = own.or_else(|| agent.libvirt().and_then(|libvirt| libvirt.hostname()).ok()).unwrap_or_default();
    let short = own.split('.').next().unwrap_or_default();
    if host.eq_ignore_ascii_case(&own) || host.eq_ignore_ascii_case(short) {
        return true;
    }
    // Only an address of this host can be bound to.
    let addresses = (host, 0).to_socket_addrs();
    addresses.is_ok_and(|mut all| all.any(|address| UdpSocket::bind(address).is_ok()))
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
            policy: super::policy::in_words(&wanted.policy),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(attributes: &str) -> Protect {
        Protect::parse(&format!("<protect {attributes}/>")).unwrap()
    }

    #[test]
    fn after_a_failover_the_hosts_have_changed_places() {
        let turned = |backup: &str, origin: &str| {
            let mark = mark(&format!("enabled='yes' epoch='25ms' backup='{backup}'"));
            let turned =
                turned_round(mark.clone(), origin, |host| ["beta", "10.0.0.2", "fe80::2"].contains(&host));
            assert_eq!(
                Protect { backup: mark.backup.clone(), ..turned.clone() },
                mark,
                "nothing else changes"
            );
            turned.backup
        };
        assert_eq!(turned("beta", "alpha"), "alpha");
        assert_eq!(turned("10.0.0.2", "alpha"), "alpha");
        assert_eq!(turned("beta:7420", "alpha"), "alpha");
        assert_eq!(turned("beta:9000", "alpha"), "alpha:9000");
        assert_eq!(turned("[fe80::2]:9000", "alpha"), "alpha:9000");
        // Somebody has changed it, or it was moved on.
        assert_eq!(turned("gamma", "alpha"), "gamma");
        assert_eq!(turned_round(mark("enabled='no'"), "alpha", |_| true), mark("enabled='no'"));
    }

    #[test]
    fn only_a_promoted_guest_came_from_somewhere() {
        let record = |role, host: &str| {
            Some(ControlFile {
                guest: GuestId(uuid::Uuid::from_u128(7)),
                name: "web".into(),
                role,
                generation: understudy_proto::ids::Generation(2),
                last_committed: None,
                primary_host: host.into(),
                incarnation: understudy_proto::ids::Incarnation(uuid::Uuid::nil()),
            })
        };
        assert_eq!(came_from(record(Role::Promoted, "alpha")).as_deref(), Some("alpha"));
        assert_eq!(came_from(record(Role::Promoted, "")), None);
        for role in [Role::Standby, Role::Promoting, Role::Stale, Role::Released] {
            assert_eq!(came_from(record(role, "alpha")), None, "{role:?}");
        }
        assert_eq!(came_from(None), None);
    }

    #[test]
    fn this_host_is_known_by_its_addresses() {
        let config = <crate::config::Config as clap::Parser>::try_parse_from([
            "understudy-primary",
            "--host-name",
            "beta.example.org",
        ]);
        let agent = Agent::new(config.unwrap());
        for here in ["beta.example.org", "BETA", "127.0.0.1", "::1"] {
            assert!(is_this_host(&agent, here), "{here}");
        }
        // An address that is nobody's.
        assert!(!is_this_host(&agent, "192.0.2.1"));
    }
}
