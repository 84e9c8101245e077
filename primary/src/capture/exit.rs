//! Out of COLO again, with the guest running: at the end of capture, after an error, and after a predecessor that died.
//!
//! Never `migrate_cancel`: from COLO, QEMU 10.0 and 11 hang in `cancelling` for ever.

use std::time::{Duration, Instant};

use tracing::{info, warn};
use understudy_libvirt::{Monitor, MonitorError, RunState, qmp};

use super::link::Link;
use super::{CaptureError, Phase, settings};

/// How long QEMU may take when nothing was configured.
const RESCUE_LIMIT: Duration = Duration::from_secs(10);

/// A refused or unheard lost-heartbeat is repeated after this long.
const REPEAT_AFTER: Duration = Duration::from_millis(200);

/// What [`rescue`] found and did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rescue {
    /// QEMU was not in COLO.
    NotNeeded,
    /// QEMU was in COLO with a peer that does not exist any more; now it is not.
    Rescued {
        /// The run state the guest was found in; `running` unless the peer died while it was stopped.
        found: RunState,
        /// The run state it is in now.
        now: RunState,
    },
}

/// Ends what a dead predecessor has left in QEMU: COLO, a migration of its that was completed instead of entering COLO
/// (QEMU 10.0.0 to 10.0.6, 10.1) and left the guest stopped, and migration settings (to QEMU's defaults, as what they
/// were before is not known). To be called before a guest is armed for the first time.
///
/// # Errors
/// [`CaptureError::Monitor`], or [`CaptureError::Silent`] if QEMU does not leave COLO within 10 s.
pub fn rescue(monitor: &dyn Monitor) -> Result<Rescue, CaptureError> {
    let error = CaptureError::monitor;
    if qmp::query_colo_mode(monitor).map_err(error(Phase::Exit))? != "primary" {
        if qmp::query_yank_has_migration(monitor).map_err(error(Phase::Exit))? {
            return Ok(Rescue::NotNeeded);
        }
        let rescue = rescue_completed(monitor).map_err(error(Phase::Exit))?;
        settings::reset(monitor).map_err(error(Phase::Exit))?;
        return Ok(rescue);
    }
    let found = qmp::query_status(monitor).map_err(error(Phase::Exit))?;
    warn!(%found, "QEMU is in COLO with a peer that is gone: ending it");
    let now = leave(monitor, None, RESCUE_LIMIT)?;
    settings::reset(monitor).map_err(error(Phase::Exit))?;
    info!(%now, "guest rescued from COLO");
    Ok(Rescue::Rescued { found, now })
}

/// A guest that is stopped behind a completed migration runs somewhere else by now, unless the migration was to be a
/// capture: then its stream went to an agent that is dead, and nobody has loaded it. Only an agent switches COLO on.
fn rescue_completed(monitor: &dyn Monitor) -> Result<Rescue, MonitorError> {
    let ours = qmp::query_capabilities(monitor)?.get("x-colo") == Some(&true);
    let found = qmp::query_status(monitor)?;
    if !ours || found != RunState::PostMigrate {
        return Ok(Rescue::NotNeeded);
    }
    warn!(%found, "QEMU has completed a capture of a dead agent and stopped the guest: it is let run");
    qmp::cont(monitor)?;
    let now = qmp::query_status(monitor)?;
    Ok(Rescue::Rescued { found, now })
}

/// Brings QEMU out of COLO or a precopy and the guest back to running; gives the run state at the end. A guest that an
/// operator had suspended stays so.
pub(super) fn leave(
    monitor: &dyn Monitor,
    mut link: Option<Link>,
    limit: Duration,
) -> Result<RunState, CaptureError> {
    let error = |source| CaptureError::Monitor { phase: Phase::Exit, source };
    let deadline = Instant::now() + limit;
    // Leaving COLO resumes a paused guest, whoever paused it.
    let keep_paused = qmp::query_status(monitor).map_err(error)? == RunState::Paused;
    let mut told: Option<Instant> = None;
    let mut pause = Duration::from_millis(1);
    loop {
        // Asked every time: a precopy whose socket is closed at its very end still enters COLO, and hangs there.
        let in_colo = qmp::query_colo_mode(monitor).map_err(error)? == "primary";
        if in_colo && told.is_none_or(|at| at.elapsed() >= REPEAT_AFTER) {
            match qmp::colo_lost_heartbeat(monitor) {
                Ok(()) => {}
                // It has just left by itself, or is about to: the next round tells.
                Err(MonitorError::Qmp { desc, .. }) => warn!(desc, "QEMU refused x-colo-lost-heartbeat"),
                Err(source) => return Err(error(source)),
            }
            told = Some(Instant::now());
        }
        // Ends a precopy. After lost-heartbeat QEMU does not look at it any more.
        drop(link.take());
        if !in_colo && !qmp::query_yank_has_migration(monitor).map_err(error)? {
            break;
        }
        if Instant::now() >= deadline {
            return Err(CaptureError::Silent { phase: Phase::Exit, waited: limit });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    settle(monitor, keep_paused).map_err(error)
}

/// The migration is over: starts the guest if that was what kept it stopped.
fn settle(monitor: &dyn Monitor, keep_paused: bool) -> Result<RunState, MonitorError> {
    match qmp::query_status(monitor)? {
        RunState::Running if keep_paused => {
            // The vCPUs ran for a moment; nothing of it leaves a closed gate.
            qmp::stop(monitor)?;
            qmp::query_status(monitor)
        }
        RunState::Colo | RunState::FinishMigrate | RunState::PostMigrate => {
            qmp::cont(monitor)?;
            qmp::query_status(monitor)
        }
        // Running, or stopped for a reason that is not ours (I/O error, shutdown, panic, an operator).
        other => Ok(other),
    }
}
