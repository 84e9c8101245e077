//! What a keeper sees of its host, and what follows from that: as `Kept` has it in the watchdog.

use std::time::{Duration, Instant};

use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::rpc::admin::GuestState;
use understudy_watchdog::owner::{Event, Input as Told, Local, QemuCrash, Role};

use super::super::World;
use super::super::host::Process;
use super::{GONE, LOST, Place, Seen};

impl World {
    pub(in crate::world) fn look(&mut self, h: usize) -> Seen {
        let now = self.local(h);
        let host = &self.hosts[h];
        let answers = |agent| host.answers(agent, self.now);
        let primary = self.primary_status(h).filter(|_| answers(Process::Primary));
        let backup = host.backup.as_ref().filter(|_| answers(Process::Backup)).and_then(|b| b.status());
        let state = backup.map(|(state, ..)| state);
        let standby =
            matches!(state, Some(GuestState::Standby | GuestState::Seeding | GuestState::Promoting));
        let place = match host.qemu.as_ref() {
            _ if standby => Place::Unknown,
            Some(qemu) if qemu.hung => Place::Hangs,
            Some(_) => Place::Answers,
            None => Place::Off,
        };
        let (runs, present) = (place == Place::Answers, matches!(place, Place::Answers | Place::Hangs));
        let listed = host.disk.protected.map(Generation);
        let promoted = backup
            .filter(|_| state == Some(GuestState::Promoted))
            .map(|(.., generation)| Generation(generation));
        let protecting = primary.is_some_and(|(state, ..)| {
            matches!(state, GuestState::Seeding | GuestState::Protected | GuestState::Degraded)
        });
        let said = self.said_generation(h).filter(|_| primary.is_some());
        let over = primary.filter(|_| !protecting).zip(said).and_then(|((state, ..), said)| match state {
            GuestState::Ended => Some((said, false)),
            GuestState::Crashed => Some((said, true)),
            _ => None,
        });
        let is = |wanted| primary.is_some_and(|(state, ..)| state == wanted);
        let epochs = [primary.map(|(.., epoch)| epoch), backup.map(|(_, _, epoch, _)| epoch)];
        Seen {
            local: Local {
                runs,
                image: backup.and_then(|(_, image, ..)| image),
                generation: listed.max(promoted).max(said.map(Generation)).filter(|_| present),
            },
            sending: primary.filter(|_| protecting).and_then(|(_, sending, _)| sending),
            listed: listed.is_some(),
            protecting,
            degraded: is(GuestState::Degraded),
            superseded: is(GuestState::Superseded),
            over,
            place,
            epoch: epochs.into_iter().flatten().max().unwrap_or(0),
            qemu: runs.then_some(now),
        }
    }

    /// As the keeper's `Kept::seen`.
    pub(in crate::world) fn seen(&mut self, h: usize, mut seen: Seen) {
        let now = self.local(h);
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        let before = keeper.last.take();
        if seen.qemu.is_none() {
            let counts = seen.protecting || seen.place == Place::Hangs;
            seen.qemu = before.as_ref().and_then(|before| before.qemu).filter(|_| counts);
        }
        if *keeper.engine.protocol().role() == Role::Stale && seen.place == Place::Hangs {
            seen.local.runs = true;
        }
        keeper.protecting = seen.protecting;
        let local = keeper.engine.protocol().local();
        if before.as_ref().is_some_and(|before| before.epoch < seen.epoch) {
            self.tell(h, Told::Alive);
        }
        if local != seen.local {
            self.tell(h, Told::Event(Event::Local(seen.local)));
        }
        let let_go = before.as_ref().is_some_and(|before| before.listed) && !seen.listed && !seen.superseded;
        if self.is_over(h, &seen, let_go, now) {
            self.tell(h, Told::Event(Event::GuestEnded));
        }
        let Some(keeper) = &self.hosts[h].keeper else { return };
        if !keeper.outdated && keeper.opening == 0 {
            self.protection_goes_on(h, &seen, now);
        }
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        let promised = seen.sending.and_then(|sending| sending.held);
        let holds = keeper.engine.protocol().holds();
        keeper.last = Some(seen);
        if let (Some(term), Some(promised)) = (holds, promised)
            && promised < term
        {
            self.have_it_held(h, term);
        }
    }

    pub(in crate::world) fn is_over(&mut self, h: usize, seen: &Seen, let_go: bool, now: Instant) -> bool {
        let fails_over = self.policies.qemu_crash == QemuCrash::Failover;
        let Some(keeper) = &mut self.hosts[h].keeper else { return false };
        let protocol = keeper.engine.protocol();
        let known = protocol.record().map_or(0, |record| record.generation.0);
        let over = seen.over.filter(|(generation, _)| *generation >= known);
        let crashed = over.is_some_and(|(_, crashed)| crashed) && fails_over;
        keeper.crashed = crashed;
        let leads = matches!(protocol.role(), Role::Protected | Role::Asking);
        let alone = matches!(protocol.role(), Role::Solo | Role::Recovering { .. });
        let gone = alone && seen.place == Place::Off && seen.local.image.is_none() && !seen.protecting;
        keeper.gone_since = if gone { keeper.gone_since.or(Some(now)) } else { None };
        let gone_for = keeper.gone_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        leads && !crashed && (over.is_some() || let_go) || gone_for >= GONE
    }

    pub(in crate::world) fn protection_goes_on(&mut self, h: usize, seen: &Seen, now: Instant) {
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        let role = keeper.engine.protocol().role();
        let seeding = matches!(role, Role::Seeding { aborted: false, .. });
        keeper.lost_since = if seeding && seen.degraded { keeper.lost_since.or(Some(now)) } else { None };
        let lost = keeper.lost_since.is_some_and(|since| now.saturating_duration_since(since) >= LOST);
        match role {
            Role::Solo if seen.protecting => {
                let after = seen.sending.map_or(EpochId(0), |sending| sending.committed);
                self.tell(h, Told::Event(Event::SeedBegins { after }));
            }
            Role::Seeding { aborted: false, .. } if !seen.protecting || lost => {
                keeper.lost_since = None;
                self.tell(h, Told::Event(Event::SeedFailed));
            }
            _ => {}
        }
        let Some(keeper) = &self.hosts[h].keeper else { return };
        let seeded = seen
            .sending
            .zip(keeper.peer.as_ref())
            .and_then(|(sending, peer)| sending.seeded(peer, keeper.engine.protocol().term()));
        if let Some(seeded) = seeded {
            self.tell(h, Told::Event(Event::Seeded(seeded)));
        }
    }
}
