//! From a domain's name to a plan for its protection. Nothing is touched here, only asked.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::warn;
use understudy_libvirt::domain_xml::DomainFacts;
use understudy_libvirt::preflight::{self, Backup, Inputs, Refusal};
use understudy_libvirt::{Connection, Domain, LibvirtError, Monitor};
use understudy_proto::control::{self, ControlFile, Role};
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::negotiate::{self, Offer};
use understudy_proto::rpc::admin::ProtectRequest;
use understudy_proto::rpc::epoch::{Hello, ProbeReply, ProbeRequest};
use understudy_proto::rpc::transport::Security;
use understudy_proto::rpc::{EpochsClient, Failure, FailureKind, transport};

use crate::agent::{Agent, Barrier, Gate, LibvirtGuest, Output, Plan};
use crate::capture::{CheckpointSource, ColoOptions, ColoSource};
use crate::config;
use crate::egress::{self, NetlinkGate, OutputGate, SharedKeeper};
use crate::encode::Encoding;
use crate::engine::Settings;
use crate::state_file::ProtectedGuest;

/// How long a backup may take over a probe.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// What libvirt says of a guest and of this host.
struct Facts {
    domain: Domain,
    guest: preflight::Guest,
    persistent: bool,
    host: String,
    libvirt_version: String,
    local: Option<ControlFile>,
}

/// Examines a guest and its backup, and plans the protection.
///
/// # Errors
/// Every reason against it, each with its remedy.
pub async fn examine(
    agent: &Arc<Agent>,
    request: &ProtectRequest,
) -> Result<(ProtectedGuest, Plan), Failure> {
    let security = agent.config.security(request.insecure, &request.to)?;
    if let Security::Tls(files) = &security {
        files.client_config().map_err(transport::tls_files)?;
    }
    let epoch = match request.epoch {
        Some(epoch) => config::epoch(u32::try_from(epoch.as_millis()).unwrap_or(u32::MAX)),
        None => config::epoch(agent.config.epoch_ms),
    };
    let epoch =
        epoch.map_err(|mistake| Failure::new(FailureKind::InvalidArgument, "epoch-length", mistake))?;
    let facts = facts(agent, &request.domain).await?;
    let id = GuestId(facts.domain.uuid());
    let probe = probe(&request.to, &security, id, &facts.guest.facts.machine).await;
    let generation = generation(&facts, probe.as_ref().ok())?;
    let inputs = Inputs {
        guest: facts.guest.clone(),
        host: facts.host.clone(),
        protected_to: agent.protected_to(id),
        generation: generation.0,
        backup_address: request.to.clone(),
        backup: probe
            .map(|reply| backup(&reply, &facts.guest.facts.machine, generation))
            .map_err(|failure| failure.reason),
    };
    let refusals = preflight::check(&inputs);
    if !refusals.is_empty() {
        return Err(refused(&request.domain, &refusals));
    }
    if !request.ungated {
        let facts = facts.guest.facts.clone();
        blocking(move || gateable(&facts)).await??;
    }
    let wanted = ProtectedGuest {
        guest: id,
        name: facts.domain.name().to_owned(),
        to: request.to.clone(),
        insecure: request.insecure,
        epoch_ms: u32::try_from(epoch.as_millis()).unwrap_or(u32::MAX),
        generation,
        ungated: request.ungated,
        goals: request.goals,
        policy: request.policy.clone(),
    };
    let plan = plan(agent, &wanted, facts, true)?;
    Ok((wanted, plan))
}

/// Plans the protection of a guest that was protected before the agent was restarted; `None` if it does not run, or has
/// changed hands since.
///
/// # Errors
/// What keeps it from being protected now; it may be better later.
pub async fn again(agent: &Arc<Agent>, wanted: &ProtectedGuest) -> Result<Option<Plan>, Failure> {
    let (owned, guest, generation) = (Arc::clone(agent), wanted.guest, wanted.generation);
    if blocking(move || is_gone(&owned, guest, generation)).await?? {
        return Ok(None);
    }
    let facts = facts(agent, &guest.to_string()).await?;
    plan(agent, wanted, facts, false).map(Some)
}

/// Whether the instance that was protected as `generation` is not here any more. Blocks.
///
/// # Errors
/// If that is not known.
pub fn is_gone(agent: &Agent, guest: GuestId, generation: Generation) -> Result<bool, Failure> {
    let active = match agent.libvirt().and_then(|libvirt| libvirt.find_domain(&guest.to_string())) {
        Ok(domain) => domain.is_active(),
        Err(LibvirtError::NoDomain { .. }) => Ok(false),
        Err(error) => Err(error),
    };
    if !active.map_err(libvirt_failure)? {
        return Ok(true);
    }
    let local = local_record(&agent.config.state_dir, guest)?;
    Ok(local.is_some_and(|local| is_past(generation, &local)))
}

/// Whether what is here is another instance than the one that was protected as `generation`: the backup agent of this host
/// has had the guest since.
fn is_past(generation: Generation, local: &ControlFile) -> bool {
    local.generation > generation && matches!(local.role, Role::Standby | Role::Promoting | Role::Promoted)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| Failure::new(FailureKind::Internal, "agent", error.to_string()))
}

pub(crate) fn libvirt_failure(error: LibvirtError) -> Failure {
    let kind = match &error {
        LibvirtError::NoDomain { .. } => {
            return Failure::new(FailureKind::NotFound, "no-domain", error.to_string());
        }
        LibvirtError::Unreachable { .. } => FailureKind::Unavailable,
        LibvirtError::Invalid { .. } => FailureKind::InvalidArgument,
        _ => FailureKind::Internal,
    };
    Failure::new(kind, "libvirt", error.to_string())
}

async fn facts(agent: &Arc<Agent>, key: &str) -> Result<Facts, Failure> {
    let (agent, key) = (Arc::clone(agent), key.to_owned());
    blocking(move || {
        let connection: Connection = agent.libvirt().map_err(libvirt_failure)?;
        let domain = connection.find_domain(&key).map_err(libvirt_failure)?;
        let guest = preflight::Guest::gather(&domain)
            .map_err(|error| Failure::new(FailureKind::Internal, "libvirt", error.to_string()))?;
        let host = match &agent.config.host_name {
            Some(name) => name.clone(),
            None => connection.hostname().map_err(libvirt_failure)?,
        };
        Ok(Facts {
            persistent: domain.is_persistent().map_err(libvirt_failure)?,
            libvirt_version: connection.versions().map_err(libvirt_failure)?.libvirt.to_string(),
            local: local_record(&agent.config.state_dir, GuestId(domain.uuid()))?,
            domain,
            guest,
            host,
        })
    })
    .await?
}

/// What the backup agent of this host remembers of the guest. After a failover to here it alone knows the generation.
pub(crate) fn local_record(state_dir: &Path, guest: GuestId) -> Result<Option<ControlFile>, Failure> {
    let path = state_dir.join(control::FOLDER).join(control::file_name(guest));
    let unusable = |reason: String| {
        Failure::new(FailureKind::FailedPrecondition, "control-file", format!("{}: {reason}", path.display()))
            .with_remedy("it holds the guest's generation: find out which host ran the guest last before moving it away")
    };
    match std::fs::read(&path) {
        Ok(bytes) => ControlFile::decode(&bytes).map(Some).map_err(|error| unusable(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unusable(error.to_string())),
    }
}

async fn probe(
    host: &str,
    security: &Security,
    guest: GuestId,
    machine: &str,
) -> Result<ProbeReply, Failure> {
    let request =
        ProbeRequest { offer: Offer::ours(), guest: Some(guest), machine: Some(machine.to_owned()) };
    let reply = probe_with(host, security, request, PROBE_LIMIT).await;
    match reply {
        Err(failure) if *security == Security::Plain && transport::wants_tls(host).await => {
            let reason = format!("{}; it seems to want TLS: leave out --insecure", failure.reason);
            Err(Failure { reason, ..failure })
        }
        reply => reply,
    }
}

/// Whether a backup answers at all and could work with this agent. Asks libvirt nothing.
///
/// # Errors
/// Why not.
pub async fn reach(host: &str, security: &Security, limit: Duration) -> Result<(), Failure> {
    let request = ProbeRequest { offer: Offer::ours(), guest: None, machine: None };
    let reply = probe_with(host, security, request, limit).await?;
    match negotiate::select(&Offer::ours(), &reply.offer) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(FailureKind::FailedPrecondition, "incompatible", error.to_string())),
    }
}

async fn probe_with(
    host: &str,
    security: &Security,
    request: ProbeRequest,
    limit: Duration,
) -> Result<ProbeReply, Failure> {
    let asking = async {
        let channel = transport::connect(host, security).await?;
        EpochsClient::new(channel).probe(request).await
    };
    tokio::time::timeout(limit, asking).await.unwrap_or_else(|_| {
        let reason = format!("no answer within {:.1} s", limit.as_secs_f64());
        Err(Failure::new(FailureKind::Unavailable, "unreachable", reason))
    })
}

/// The newest generation there is a trace of; see [`control`].
fn generation(facts: &Facts, probe: Option<&ProbeReply>) -> Result<Generation, Failure> {
    if let Some(local) = &facts.local
        && matches!(local.role, Role::Standby | Role::Promoting)
    {
        let reason = format!(
            "this host is itself the backup of domain {} (role {}), which belongs to {}",
            local.name,
            local.role.label(),
            local.primary_host
        );
        return Err(Failure::new(FailureKind::FailedPrecondition, "standby-here", reason)
            .with_remedy("protect it from the host it runs on, or end that protection there first"));
    }
    let local = facts.local.as_ref().map(|local| local.generation);
    let released = probe
        .and_then(|reply| reply.guest.as_ref())
        .filter(|record| record.role == Role::Released)
        .map(|record| record.generation);
    Ok([Some(Generation::FIRST), local, released].into_iter().flatten().max().unwrap_or(Generation::FIRST))
}

/// The backup's answer in the terms of the preflight, for a guest of this generation.
fn backup(reply: &ProbeReply, machine: &str, generation: Generation) -> Backup {
    let incompatible = negotiate::select(&Offer::ours(), &reply.offer).err().map(|error| error.to_string());
    let record = reply.guest.as_ref();
    // What an older generation was there is over: a host that lost the guest comes back believing it still runs it.
    let owner = record.filter(|record| record.generation >= generation).map(|record| record.role);
    let occupied = match owner {
        Some(Role::Promoted) => Some("it runs there since a failover".to_owned()),
        Some(Role::Promoting) => Some("a failover of it was begun there".to_owned()),
        _ if !reply.trouble.is_empty() => Some(reply.trouble.clone()),
        _ => None,
    };
    let machine_types = match reply.machine_supported {
        Some(true) => [machine.to_owned()].into(),
        Some(false) => ["others".to_owned()].into(),
        None => [].into(),
    };
    Backup {
        host: reply.host.clone(),
        incompatible,
        qemu: reply.qemu_version.clone().unwrap_or_else(|| "(version unknown)".to_owned()),
        machine_types,
        free_memory_bytes: Some(reply.free_memory_bytes).filter(|bytes| *bytes > 0),
        generation: record.map(|record| record.generation.0),
        occupied,
    }
}

/// Whether everything the guest sends can be held back.
fn gateable(facts: &DomainFacts) -> Result<(), Failure> {
    let refused = |reason: String, remedy: String| {
        Failure::new(FailureKind::FailedPrecondition, "output-not-gated", reason).with_remedy(remedy)
    };
    let ports = egress::ports(facts).map_err(|refusals| {
        let remedy = refusals.first().map(|first| first.remedy.clone()).unwrap_or_default();
        refused(refusals.into_iter().map(|r| r.reason).collect::<Vec<_>>().join("; "), remedy)
    })?;
    NetlinkGate::check(&ports).map_err(|error| {
        refused(
            error.to_string(),
            "do as it says, or give --ungated to protect the guest without output commit".to_owned(),
        )
    })
}

/// What becomes of the guest's output: the gate is made, open, when the protection starts.
fn output(agent: &Agent, wanted: &ProtectedGuest, facts: &DomainFacts) -> Output {
    if wanted.ungated {
        return Output::Ungated;
    }
    for device in egress::by_vhost(facts) {
        warn!(
            domain = facts.name,
            device,
            "vhost-net serves it: QEMU throws away a frame for the guest at every stop in which one arrives; give the interface \
             <driver name='qemu'/>"
        );
    }
    let ports = egress::ports(facts);
    let name = facts.name.clone();
    let gate_of = gate_of(agent, &name);
    Output::Gated(Box::new(move || {
        let ports = ports.map_err(|refusals| egress::GateError::Hole {
            reason: refusals.into_iter().map(|refusal| refusal.reason).collect::<Vec<_>>().join("; "),
        })?;
        let (gate, engine) = NetlinkGate::install(&ports)?;
        let watch = gate.watch()?;
        Ok(Gate::new(SharedKeeper::new(engine, gate_of(gate)).of(&name), Some(watch)))
    }))
}

type GateOf = Box<dyn FnOnce(NetlinkGate) -> Box<dyn OutputGate> + Send>;

#[cfg(not(feature = "test-hooks"))]
fn gate_of(_agent: &Agent, _domain: &str) -> GateOf {
    Box::new(|gate| Box::new(gate))
}

#[cfg(feature = "test-hooks")]
fn gate_of(agent: &Agent, domain: &str) -> GateOf {
    match agent.config.plant_fault.iter().find(|plant| plant.domain == domain).map(|plant| plant.fault) {
        Some(fault) => Box::new(move |gate| Box::new(egress::planted::Planted::new(gate, fault))),
        None => Box::new(|gate| Box::new(gate)),
    }
}

fn refused(domain: &str, refusals: &[Refusal]) -> Failure {
    let kind = FailureKind::FailedPrecondition;
    match refusals {
        [only] => Failure::new(kind, only.code, only.reason.clone()).with_remedy(only.remedy.clone()),
        _ => {
            let mut reason = format!("domain {domain} cannot be protected, for {} reasons:", refusals.len());
            for refusal in refusals {
                reason.push_str(&format!("\n- {}\n  remedy: {}", refusal.reason, refusal.remedy));
            }
            let code = refusals.first().map_or("refused", |first| first.code);
            Failure::new(kind, code, reason)
        }
    }
}

fn plan(agent: &Agent, wanted: &ProtectedGuest, facts: Facts, attended: bool) -> Result<Plan, Failure> {
    let internal = |code, reason: String| Failure::new(FailureKind::Internal, code, reason);
    let qemu_version = facts.guest.qemu.as_ref().map(|qemu| qemu.version.to_string());
    let domain = facts.domain.clone();
    let output = output(agent, wanted, &facts.guest.facts);
    let guest = Arc::new(LibvirtGuest::new(facts.domain));
    let monitor: Arc<dyn Monitor> = Arc::clone(&guest) as Arc<dyn Monitor>;
    let source =
        ColoSource::new(monitor, options(agent)).map_err(|error| internal("capture", error.to_string()))?;
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Plan {
        hello: Hello {
            offer: Offer::ours(),
            guest: wanted.guest,
            guest_name: wanted.name.clone(),
            generation: wanted.generation,
            session: 0,
            primary_host: facts.host,
            qemu_version: qemu_version.unwrap_or_default(),
            machine: facts.guest.facts.machine,
            persistent: facts.persistent,
            lane_key: None,
        },
        to: wanted.to.clone(),
        security: agent.config.security(wanted.insecure, &wanted.to)?,
        settings: Settings {
            generation: wanted.generation,
            epoch: Duration::from_millis(wanted.epoch_ms.into()),
            goals: wanted.goals,
            floor: Duration::from_millis(agent.config.output_floor_ms.into()),
            attended,
            // No agent opens a stream every microsecond, so a later agent begins above an earlier one.
            first_session: u64::try_from(since_1970.as_micros()).unwrap_or(1),
            peer: wanted.to.clone(),
        },
        libvirt_version: facts.libvirt_version,
        host: guest,
        source: recorded(agent, &wanted.name, Box::new(source)),
        barrier: barrier(agent, &domain),
        output,
        encoding: Encoding { pool: agent.pool.clone(), ..agent.config.encoding() },
        connections: agent.config.connections.into(),
    })
}

#[cfg(not(feature = "test-hooks"))]
fn options(_agent: &Agent) -> ColoOptions {
    ColoOptions::default()
}

/// A dump of all memory holds the stop for longer than any checkpoint may otherwise take.
#[cfg(feature = "test-hooks")]
fn options(agent: &Agent) -> ColoOptions {
    const DUMP_LIMIT: Duration = Duration::from_secs(300);
    let options = ColoOptions::default();
    if agent.config.dump_dir.is_none() {
        return options;
    }
    ColoOptions { checkpoint_limit: DUMP_LIMIT, silence_stopped: DUMP_LIMIT, ..options }
}

#[cfg(not(feature = "test-hooks"))]
fn recorded(_agent: &Agent, _domain: &str, source: Box<dyn CheckpointSource>) -> Box<dyn CheckpointSource> {
    source
}

#[cfg(feature = "test-hooks")]
fn recorded(agent: &Agent, domain: &str, source: Box<dyn CheckpointSource>) -> Box<dyn CheckpointSource> {
    match &agent.config.record_dir {
        Some(folder) => Box::new(crate::record::Recording::new(source, folder.join(domain))),
        None => source,
    }
}

/// What is done at every stop beside the gate: nothing, until there are disks.
#[cfg(not(feature = "test-hooks"))]
fn barrier(_agent: &Agent, _domain: &Domain) -> Barrier {
    Box::new(|_| Ok(()))
}

#[cfg(feature = "test-hooks")]
fn barrier(agent: &Agent, domain: &Domain) -> Barrier {
    let barrier: Barrier = match &agent.config.dump_dir {
        Some(folder) => {
            crate::dump::barrier(domain.clone(), folder.clone(), agent.config.dump_epochs.clone())
        }
        None => Box::new(|_| Ok(())),
    };
    match agent.config.die_at_epoch {
        Some(epoch) => crate::hooks::die_at(epoch, barrier),
        None => barrier,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::ids::Incarnation;
    use understudy_proto::rpc::epoch::GuestRecord;

    #[test]
    fn a_guest_that_was_promoted_here_meanwhile_is_not_taken_for_the_one_before() {
        let past = |role, generation| {
            let local = ControlFile {
                guest: GuestId(uuid::Uuid::nil()),
                name: "web".into(),
                role,
                generation: Generation(generation),
                last_committed: None,
                primary_host: String::new(),
                incarnation: Incarnation(uuid::Uuid::nil()),
            };
            is_past(Generation(2), &local)
        };
        assert!(past(Role::Promoted, 4) && past(Role::Standby, 3) && past(Role::Promoting, 3));
        assert!(!past(Role::Promoted, 2), "promoted here, and then protected");
        // It has lost the guest, and finds that out by trying.
        assert!(!past(Role::Stale, 3) && !past(Role::Released, 3));
    }

    #[test]
    fn only_an_owner_of_this_generation_or_a_newer_one_occupies_a_backup() {
        let occupied = |role, generation| {
            let reply = ProbeReply {
                offer: Offer::ours(),
                host: "beta".into(),
                incarnation: Incarnation(uuid::Uuid::nil()),
                qemu_version: None,
                libvirt_version: None,
                machine_supported: None,
                free_memory_bytes: 0,
                guest: Some(GuestRecord {
                    role,
                    generation: Generation(generation),
                    last_committed: None,
                    primary_host: "alpha".into(),
                }),
                trouble: String::new(),
            };
            backup(&reply, "pc-q35-7.2", Generation(3)).occupied.is_some()
        };
        // Lost power as the owner of generation 2; the guest has been promoted elsewhere since.
        assert!(!occupied(Role::Promoted, 2));
        assert!(!occupied(Role::Promoting, 2));
        assert!(occupied(Role::Promoted, 3));
        assert!(occupied(Role::Promoting, 4));
        assert!(!occupied(Role::Standby, 3));
    }
}
