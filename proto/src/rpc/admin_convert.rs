//! Generated admin messages to and from domain types.

use super::admin as domain;
use super::convert::{epoch, generation, guest, shortened, sixteen, text, uuid_bytes};
use super::generated::admin as wire;
use crate::ids::Incarnation;
use crate::ownership::Term;
use crate::pace::EpochGoals;
use crate::policy::{self, GuestPolicy, GuestSettings, LostBackup, QemuCrash};
use crate::{ProtocolError, limits};
use std::time::Duration;

/// How a request names a domain.
fn key(value: String) -> Result<String, ProtocolError> {
    filled("domain", value)
}

fn filled(field: &'static str, value: String) -> Result<String, ProtocolError> {
    if value.is_empty() { Err(ProtocolError::Missing { field }) } else { text(field, value) }
}

fn millis(d: Duration) -> u32 {
    u32::try_from(d.as_millis()).unwrap_or(u32::MAX)
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

impl TryFrom<wire::ProtectRequest> for domain::ProtectRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::ProtectRequest) -> Result<Self, ProtocolError> {
        Ok(Self {
            domain: key(m.domain)?,
            to: filled("backup host", m.to)?,
            epoch: m.epoch_ms.map(|ms| Duration::from_millis(ms.into())),
            insecure: m.insecure,
            ungated: m.ungated,
            goals: m.goals.map(TryInto::try_into).transpose()?,
            term: m.term.map(Term),
            policy: m.policy.map(TryInto::try_into).transpose()?.unwrap_or_default(),
        })
    }
}

impl TryFrom<wire::GuestPolicy> for GuestPolicy {
    type Error = ProtocolError;

    fn try_from(m: wire::GuestPolicy) -> Result<Self, ProtocolError> {
        let policy = Self {
            on_lost_backup: policy::valued("on-lost-backup", &LostBackup::WORDS, &m.on_lost_backup)?,
            on_qemu_crash: policy::valued("on-qemu-crash", &QemuCrash::WORDS, &m.on_qemu_crash)?,
            spares: m.spares,
        };
        policy.checked()
    }
}

impl From<GuestPolicy> for wire::GuestPolicy {
    fn from(m: GuestPolicy) -> Self {
        Self {
            on_lost_backup: policy::word(&LostBackup::WORDS, m.on_lost_backup).to_owned(),
            on_qemu_crash: policy::word(&QemuCrash::WORDS, m.on_qemu_crash).to_owned(),
            spares: m.spares,
        }
    }
}

impl TryFrom<wire::GuestSettings> for GuestSettings {
    type Error = ProtocolError;

    fn try_from(m: wire::GuestSettings) -> Result<Self, ProtocolError> {
        Ok(Self {
            epoch_ms: m.epoch_ms,
            goals: m.goals.map(TryInto::try_into).transpose()?,
            ungated: m.ungated,
            policy: m.policy.map(TryInto::try_into).transpose()?.unwrap_or_default(),
        })
    }
}

impl From<GuestSettings> for wire::GuestSettings {
    fn from(m: GuestSettings) -> Self {
        Self {
            epoch_ms: m.epoch_ms,
            goals: m.goals.map(Into::into),
            ungated: m.ungated,
            policy: Some(m.policy.into()),
        }
    }
}

impl TryFrom<wire::EpochGoals> for EpochGoals {
    type Error = ProtocolError;

    fn try_from(m: wire::EpochGoals) -> Result<Self, ProtocolError> {
        let goals = Self {
            latency_ms: m.latency_ms,
            slowdown_permille: m.slowdown_permille.map(|n| u16::try_from(n).unwrap_or(u16::MAX)),
            bandwidth_bytes: m.bandwidth_bytes_per_second,
        };
        goals.checked()
    }
}

impl From<EpochGoals> for wire::EpochGoals {
    fn from(m: EpochGoals) -> Self {
        Self {
            latency_ms: m.latency_ms,
            slowdown_permille: m.slowdown_permille.map(u32::from),
            bandwidth_bytes_per_second: m.bandwidth_bytes,
        }
    }
}

impl From<domain::ProtectRequest> for wire::ProtectRequest {
    fn from(m: domain::ProtectRequest) -> Self {
        Self {
            domain: m.domain,
            to: m.to,
            epoch_ms: m.epoch.map(millis),
            insecure: m.insecure,
            ungated: m.ungated,
            goals: m.goals.map(Into::into),
            term: m.term.map(|term| term.0),
            policy: Some(m.policy.into()),
        }
    }
}

impl TryFrom<wire::Progress> for domain::Progress {
    type Error = ProtocolError;

    fn try_from(m: wire::Progress) -> Result<Self, ProtocolError> {
        let percent = match m.percent {
            None => None,
            Some(p) => match u8::try_from(p) {
                Ok(p) if p <= 100 => Some(p),
                _ => return Err(ProtocolError::invalid("percent", format!("{p}, expected 0 to 100"))),
            },
        };
        Ok(Self {
            phase: text("phase", m.phase)?,
            percent,
            text: text("progress text", m.text)?,
            done: m.done,
            failover: m.failover.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<domain::Progress> for wire::Progress {
    fn from(m: domain::Progress) -> Self {
        Self {
            phase: m.phase,
            percent: m.percent.map(Into::into),
            text: shortened(m.text),
            done: m.done,
            failover: m.failover.map(Into::into),
        }
    }
}

impl TryFrom<wire::UnprotectRequest> for domain::UnprotectRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::UnprotectRequest) -> Result<Self, ProtocolError> {
        Ok(Self { domain: key(m.domain)?, term: m.term.map(Term) })
    }
}

impl From<domain::UnprotectRequest> for wire::UnprotectRequest {
    fn from(m: domain::UnprotectRequest) -> Self {
        Self { domain: m.domain, term: m.term.map(|term| term.0) }
    }
}

impl TryFrom<wire::UnprotectReply> for domain::UnprotectReply {
    type Error = ProtocolError;

    fn try_from(m: wire::UnprotectReply) -> Result<Self, ProtocolError> {
        Ok(Self { text: text("reply text", m.text)? })
    }
}

impl From<domain::UnprotectReply> for wire::UnprotectReply {
    fn from(m: domain::UnprotectReply) -> Self {
        Self { text: shortened(m.text) }
    }
}

impl TryFrom<wire::StatusRequest> for domain::StatusRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::StatusRequest) -> Result<Self, ProtocolError> {
        Ok(Self { domain: m.domain.map(key).transpose()? })
    }
}

impl From<domain::StatusRequest> for wire::StatusRequest {
    fn from(m: domain::StatusRequest) -> Self {
        Self { domain: m.domain }
    }
}

impl TryFrom<wire::StatusReply> for domain::StatusReply {
    type Error = ProtocolError;

    fn try_from(m: wire::StatusReply) -> Result<Self, ProtocolError> {
        ProtocolError::check_len(
            "number of guests",
            m.guests.len() as u64,
            limits::MAX_STATUS_GUESTS as u64,
        )?;
        Ok(Self {
            guests: m.guests.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            host: text("host", m.host)?,
            role: role(m.role)?,
        })
    }
}

impl From<domain::StatusReply> for wire::StatusReply {
    fn from(m: domain::StatusReply) -> Self {
        let guests = m.guests.into_iter().take(limits::MAX_STATUS_GUESTS);
        Self {
            guests: guests.map(Into::into).collect(),
            host: m.host,
            role: wire::AgentRole::from(m.role).into(),
        }
    }
}

impl TryFrom<wire::GetRequest> for domain::StatusRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::GetRequest) -> Result<Self, ProtocolError> {
        Ok(Self { domain: Some(key(m.domain)?) })
    }
}

impl TryFrom<wire::SetRequest> for domain::SetRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::SetRequest) -> Result<Self, ProtocolError> {
        Ok(Self {
            domain: key(m.domain)?,
            epoch: m.epoch_ms.map(|ms| Duration::from_millis(ms.into())),
            goals: m.goals.map(TryInto::try_into).transpose()?,
            policy: m.policy.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<domain::SetRequest> for wire::SetRequest {
    fn from(m: domain::SetRequest) -> Self {
        Self {
            domain: m.domain,
            epoch_ms: m.epoch.map(millis),
            goals: m.goals.map(Into::into),
            policy: m.policy.map(Into::into),
        }
    }
}

impl TryFrom<wire::SetReply> for domain::SetReply {
    type Error = ProtocolError;

    fn try_from(m: wire::SetReply) -> Result<Self, ProtocolError> {
        Ok(Self { text: text("reply text", m.text)? })
    }
}

impl From<domain::SetReply> for wire::SetReply {
    fn from(m: domain::SetReply) -> Self {
        Self { text: shortened(m.text) }
    }
}

impl TryFrom<wire::FailoverRequest> for domain::FailoverRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::FailoverRequest) -> Result<Self, ProtocolError> {
        let term = m.term.map(Term);
        Ok(Self { domain: key(m.domain)?, i_have_fenced: m.i_have_fenced, hold: m.hold, term })
    }
}

impl From<domain::FailoverRequest> for wire::FailoverRequest {
    fn from(m: domain::FailoverRequest) -> Self {
        let term = m.term.map(|term| term.0);
        Self { domain: m.domain, i_have_fenced: m.i_have_fenced, hold: m.hold, term }
    }
}

impl TryFrom<wire::ConfirmRequest> for domain::ConfirmRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::ConfirmRequest) -> Result<Self, ProtocolError> {
        Ok(Self { domain: key(m.domain)?, proceed: m.proceed, term: m.term.map(Term) })
    }
}

impl From<domain::ConfirmRequest> for wire::ConfirmRequest {
    fn from(m: domain::ConfirmRequest) -> Self {
        Self { domain: m.domain, proceed: m.proceed, term: m.term.map(|term| term.0) }
    }
}

fn role(number: i32) -> Result<domain::AgentRole, ProtocolError> {
    match wire::AgentRole::try_from(number) {
        Ok(wire::AgentRole::Primary) => Ok(domain::AgentRole::Primary),
        Ok(wire::AgentRole::Backup) => Ok(domain::AgentRole::Backup),
        Ok(wire::AgentRole::Unspecified) => Err(ProtocolError::Missing { field: "agent role" }),
        Err(_) => {
            Err(ProtocolError::invalid("agent role", format!("{number}, which this build does not know")))
        }
    }
}

impl From<domain::AgentRole> for wire::AgentRole {
    fn from(role: domain::AgentRole) -> Self {
        match role {
            domain::AgentRole::Primary => Self::Primary,
            domain::AgentRole::Backup => Self::Backup,
        }
    }
}

fn state(label: &str) -> Result<domain::GuestState, ProtocolError> {
    domain::GuestState::ALL.iter().copied().find(|s| s.label() == label).ok_or_else(|| {
        ProtocolError::invalid("guest state", format!("{label:?}, which this build does not know"))
    })
}

impl TryFrom<wire::GuestStatus> for domain::GuestStatus {
    type Error = ProtocolError;

    fn try_from(m: wire::GuestStatus) -> Result<Self, ProtocolError> {
        Ok(Self {
            domain: text("domain", m.domain)?,
            uuid: guest(&m.uuid)?,
            role: role(m.role)?,
            state: state(&m.state)?,
            peer: text("peer", m.peer)?,
            generation: generation(m.generation)?,
            committed_epoch: m.committed_epoch.map(epoch).transpose()?,
            committed_age_ms: m.committed_age_ms,
            epochs_total: m.epochs_total,
            full_copies_total: m.full_copies_total,
            pause_p50_ms: m.pause_p50_ms,
            pause_p99_ms: m.pause_p99_ms,
            dirty_pages_p50: m.dirty_pages_p50,
            dirty_pages_p99: m.dirty_pages_p99,
            epoch_ms: m.epoch_ms,
            bytes_total: m.bytes_total,
            standby: text("standby", m.standby)?,
            qemu: text("QEMU version", m.qemu)?,
            libvirt: text("libvirt version", m.libvirt)?,
            detail: text("detail", m.detail)?,
            failover: m.failover.map(TryInto::try_into).transpose()?,
            incarnation: m.incarnation.map(|bytes| incarnation(&bytes)).transpose()?,
            held_term: m.held_term.map(Term),
            output: text("output", m.output)?,
            output_waiting_bytes: m.output_waiting_bytes,
            output_dropped_total: m.output_dropped_total,
            encoding: m.encoding.map(TryInto::try_into).transpose()?,
            pace: text("pace", m.pace)?,
            settings: m.settings.map(TryInto::try_into).transpose()?,
            connections: m.connections,
        })
    }
}

impl From<domain::GuestStatus> for wire::GuestStatus {
    fn from(m: domain::GuestStatus) -> Self {
        Self {
            domain: m.domain,
            uuid: uuid_bytes(m.uuid.0),
            role: wire::AgentRole::from(m.role).into(),
            state: m.state.label().to_owned(),
            peer: m.peer,
            generation: m.generation.0,
            committed_epoch: m.committed_epoch.map(|e| e.0),
            committed_age_ms: m.committed_age_ms,
            epochs_total: m.epochs_total,
            full_copies_total: m.full_copies_total,
            pause_p50_ms: m.pause_p50_ms,
            pause_p99_ms: m.pause_p99_ms,
            dirty_pages_p50: m.dirty_pages_p50,
            dirty_pages_p99: m.dirty_pages_p99,
            epoch_ms: m.epoch_ms,
            bytes_total: m.bytes_total,
            standby: shortened(m.standby),
            qemu: m.qemu,
            libvirt: m.libvirt,
            detail: shortened(m.detail),
            failover: m.failover.map(Into::into),
            incarnation: m.incarnation.map(|life| uuid_bytes(life.0)),
            held_term: m.held_term.map(|term| term.0),
            output: shortened(m.output),
            output_waiting_bytes: m.output_waiting_bytes,
            output_dropped_total: m.output_dropped_total,
            encoding: m.encoding.map(Into::into),
            pace: shortened(m.pace),
            settings: m.settings.map(Into::into),
            connections: m.connections,
        }
    }
}

impl TryFrom<wire::EncodingReport> for domain::EncodingReport {
    type Error = ProtocolError;

    fn try_from(m: wire::EncodingReport) -> Result<Self, ProtocolError> {
        let report = Self {
            mode: text("encoding mode", m.mode)?,
            plan: text("encoding plan", m.plan)?,
            reason: text("reason of the encoding", m.reason)?,
            raw_bytes: m.raw_bytes,
            sent_bytes: m.sent_bytes,
            cache_bytes: m.cache_bytes,
            cache_hits: m.cache_hits,
            cache_misses: m.cache_misses,
            pages: text("pages by codec", m.pages)?,
            threads: m.threads,
            ..Self::default()
        };
        Ok(report.with_rates())
    }
}

impl From<domain::EncodingReport> for wire::EncodingReport {
    fn from(m: domain::EncodingReport) -> Self {
        Self {
            mode: m.mode,
            plan: m.plan,
            reason: shortened(m.reason),
            raw_bytes: m.raw_bytes,
            sent_bytes: m.sent_bytes,
            cache_bytes: m.cache_bytes,
            cache_hits: m.cache_hits,
            cache_misses: m.cache_misses,
            pages: shortened(m.pages),
            threads: m.threads,
        }
    }
}

fn incarnation(bytes: &[u8]) -> Result<Incarnation, ProtocolError> {
    sixteen("incarnation", bytes).map(|bytes| Incarnation(uuid::Uuid::from_bytes(bytes)))
}

impl TryFrom<wire::FailoverReport> for domain::FailoverReport {
    type Error = ProtocolError;

    fn try_from(m: wire::FailoverReport) -> Result<Self, ProtocolError> {
        ProtocolError::check_len(
            "number of warnings",
            m.warnings.len() as u64,
            limits::MAX_OFFER_ENTRIES as u64,
        )?;
        Ok(Self {
            epoch: epoch(m.epoch)?,
            generation: generation(m.generation)?,
            finish_apply: Duration::from_micros(m.finish_apply_us),
            record: Duration::from_micros(m.record_us),
            prepare: Duration::from_micros(m.prepare_us),
            load: Duration::from_micros(m.load_us),
            resume: Duration::from_micros(m.resume_us),
            announce: Duration::from_micros(m.announce_us),
            total: Duration::from_micros(m.total_us),
            warnings: m.warnings.into_iter().map(|w| text("warning", w)).collect::<Result<_, _>>()?,
        })
    }
}

impl From<domain::FailoverReport> for wire::FailoverReport {
    fn from(m: domain::FailoverReport) -> Self {
        Self {
            epoch: m.epoch.0,
            generation: m.generation.0,
            finish_apply_us: micros(m.finish_apply),
            record_us: micros(m.record),
            prepare_us: micros(m.prepare),
            load_us: micros(m.load),
            resume_us: micros(m.resume),
            announce_us: micros(m.announce),
            total_us: micros(m.total),
            warnings: m.warnings.into_iter().map(shortened).collect(),
        }
    }
}
