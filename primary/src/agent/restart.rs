//! After a start: guests a dead predecessor has left stopped are freed, then the listed ones are protected again.

use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};
use understudy_libvirt::{Connection, Domain, LibvirtError, qmp};
use understudy_proto::ids::GuestId;

use super::{Agent, Entry, State};
use crate::capture;
use crate::protect;
use crate::state_file::ProtectedGuest;

/// Before another attempt at a guest that cannot be protected yet.
const AGAIN: Duration = Duration::from_secs(2);

/// How long the start waits for guests to be freed. It goes on behind.
const RESCUE_LIMIT: Duration = Duration::from_secs(15);

impl Agent {
    /// Frees guests, then takes up the protections of `remembered`; returns while they are being set up.
    pub async fn restart(self: &Arc<Self>, remembered: Vec<ProtectedGuest>) {
        for wanted in &remembered {
            let detail = "the agent has just been started".to_owned();
            let entry = Entry { wanted: wanted.clone(), state: State::Waiting { detail } };
            self.lock().insert(wanted.guest, entry);
        }
        let (agent, listed) = (Arc::clone(self), remembered.iter().map(|wanted| wanted.guest).collect());
        let rescue = tokio::task::spawn_blocking(move || rescue_all(&agent, listed));
        if tokio::time::timeout(RESCUE_LIMIT, rescue).await.is_err() {
            warn!("freeing guests takes long; some QEMU does not answer its monitor");
        }
        for wanted in remembered {
            let agent = Arc::clone(self);
            tokio::spawn(async move { agent.take_up(wanted).await });
        }
    }

    async fn take_up(self: Arc<Self>, wanted: ProtectedGuest) {
        let guest = wanted.guest;
        loop {
            let guard = self.exclusive().await;
            // An operator may have ended it while it waited.
            if !matches!(self.lock().get(&guest), Some(Entry { state: State::Waiting { .. }, .. })) {
                return;
            }
            let reason = match protect::again(&self, &wanted).await {
                Ok(Some(plan)) => match self.protect(wanted.clone(), plan).await {
                    Ok(_) => return info!(domain = wanted.name, "protected again"),
                    Err(failure) => failure.reason,
                },
                Ok(None) => {
                    warn!(
                        domain = wanted.name,
                        "the guest has ended, or changed hosts, while the agent was away"
                    );
                    self.lock().remove(&guest);
                    if let Err(failure) = self.remember(None, guest).await {
                        warn!(reason = failure.reason, "cannot forget the guest");
                    }
                    return;
                }
                Err(failure) => failure.reason,
            };
            drop(guard);
            warn!(domain = wanted.name, reason, "cannot be protected again yet");
            if let Some(Entry { state: State::Waiting { detail }, .. }) = self.lock().get_mut(&guest) {
                *detail = format!("cannot be protected again yet: {reason}");
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// Each guest on a thread of its own: a monitor that hangs must not keep the others waiting.
fn rescue_all(agent: &Agent, listed: Vec<GuestId>) {
    let domains = match agent.libvirt().and_then(|connection: Connection| connection.domains()) {
        Ok(domains) => domains,
        Err(error) => return warn!(%error, "cannot look for guests to free"),
    };
    std::thread::scope(|scope| {
        for domain in &domains {
            let is_listed = listed.contains(&GuestId(domain.uuid()));
            scope.spawn(move || {
                if let Err(reason) = rescue(domain, is_listed) {
                    warn!(domain = domain.name(), reason, "cannot be freed");
                }
            });
        }
    });
}

/// A guest that is not listed is touched only if it is in COLO: nobody else on this host would end that.
fn rescue(domain: &Domain, is_listed: bool) -> Result<(), String> {
    let text = |error: LibvirtError| error.to_string();
    if !domain.is_active().map_err(text)? {
        return Ok(());
    }
    if !is_listed {
        if domain.has_job().map_err(text)? {
            return Ok(());
        }
        // Not every domain is QEMU's.
        match qmp::query_colo_mode(domain) {
            Ok(mode) if mode == "primary" => {}
            _ => return Ok(()),
        }
    }
    capture::rescue(domain).map(drop).map_err(|error| error.to_string())
}
