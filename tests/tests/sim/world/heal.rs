//! When nothing fails any more the guest must be served, by one host, and protected again.

use understudy_proto::ownership::Owner;
use understudy_proto::rpc::admin::GuestState;
use understudy_watchdog::owner::Role;

use super::guest::Kind;
use super::{CHAOS, HEAL, HOSTS, World};

/// For so long all must be well.
const REST: u64 = 1500;

/// So long after everything has healed a guest of which no copy is left is given up.
const GIVE_UP: u64 = 5000;

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Healed {
    well_since: Option<u64>,
    lost_since: Option<u64>,
    looked: u64,
}

impl World {
    /// Whether the world has come to rest.
    ///
    /// # Errors
    /// If it does not within its limit.
    pub(super) fn at_rest(&mut self) -> Result<bool, String> {
        if self.now < self.healed.looked + 100 {
            return Ok(false);
        }
        self.healed.looked = self.now;
        let (well, lost) = (self.is_well(), !self.is_left());
        let since = |is, since: Option<u64>, now| if is { since.or(Some(now)) } else { None };
        self.healed.well_since = since(well, self.healed.well_since, self.now);
        self.healed.lost_since = since(lost, self.healed.lost_since, self.now);
        if self.healed.well_since.is_some_and(|since| self.now >= since + REST) {
            return match crate::invariants::at_rest(self).pop() {
                Some(what) => Err(format!("at {} ms: {what}", self.now)),
                None => Ok(true),
            };
        }
        if self.healed.lost_since.is_some_and(|since| self.now >= since.max(CHAOS) + GIVE_UP) {
            self.seen.lost += 1;
            return Ok(true);
        }
        if self.now < CHAOS + HEAL {
            return Ok(false);
        }
        Err(format!("not served and protected {HEAL} ms after everything has healed: {}", self.picture()))
    }

    fn is_well(&self) -> bool {
        if self.now > self.client.answered_at + 1000 {
            return false;
        }
        let Some(record) = self.arbiter.current() else { return false };
        let Owner::Pair { primary, .. } = &record.owner else { return false };
        HOSTS.iter().enumerate().any(|(h, name)| {
            let protected = self.primary_status(h).is_some_and(|(state, ..)| state == GuestState::Protected);
            name == primary && protected && self.role(h) == Some(&Role::Protected)
        })
    }

    /// Whether a copy is left that may be started, or runs.
    fn is_left(&self) -> bool {
        let runs = |name: &str| {
            HOSTS.iter().zip(&self.hosts).any(|(host, at)| {
                *host == name && at.qemu.as_ref().is_some_and(|qemu| qemu.kind == Kind::Active)
            })
        };
        let image = |name: &str, generation: Option<u64>| {
            HOSTS.iter().zip(&self.hosts).any(|(host, at)| {
                let agent = at.backup.as_ref();
                let fits = |held: u64| generation.is_none_or(|wanted| wanted == held);
                let held = agent.and_then(|agent| agent.holds());
                let loaded = at.qemu.as_ref().is_some_and(|qemu| matches!(qemu.kind, Kind::Loaded(_)));
                *host == name && (held.is_some_and(|held| fits(held.generation.0)) || loaded)
            })
        };
        let Some(record) = self.arbiter.current() else { return runs(HOSTS[0]) };
        match &record.owner {
            Owner::Pair { primary, backup, incarnation } => {
                let same = HOSTS.iter().zip(&self.hosts).any(|(host, at)| {
                    host == backup && at.backup.as_ref().is_some_and(|b| b.incarnation() == *incarnation)
                });
                runs(primary) || (same && image(backup, Some(record.generation.0)))
            }
            Owner::Solo { owner } => runs(owner) || image(owner, None),
            Owner::Claim { by, from, .. } => runs(from) || image(by, None),
            Owner::Ended { by } => runs(by),
        }
    }

    /// How it is, for people.
    fn picture(&self) -> String {
        let mut text = format!("record {:?}", self.arbiter.current());
        for (h, name) in HOSTS.iter().enumerate() {
            let host = &self.hosts[h];
            let qemu = host.qemu.as_ref().map(|q| (q.kind.clone(), q.stopped, q.paused));
            text.push_str(&format!(
                "; {name}: role {:?}, QEMU (kind, stopped, paused) {qemu:?}, serves {}, primary {:?}, backup {:?}, listed {:?}",
                self.role(h).map(Role::label),
                host.serves(),
                self.primary_status(h),
                host.backup.as_ref().and_then(|agent| agent.status()),
                host.disk.protected,
            ));
        }
        text
    }
}
