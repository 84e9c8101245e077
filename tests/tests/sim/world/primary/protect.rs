//! How a protection begins.

use std::sync::Arc;
use std::time::Duration;

use understudy_primary::egress::{GateEngine, SharedKeeper};
use understudy_primary::engine::{Engine, Event, Settings};
use understudy_proto::control::Role;
use understudy_proto::ids::Generation;

use super::super::capture::Capture;
use super::super::guest::Kind;
use super::super::host::Process;
use super::super::plug::{self, PlugGate};
use super::super::{HOSTS, What, World, backup};
use super::{Entry, Input, PrimaryAgent, Protection};
use crate::bugs::Bug;

impl World {
    /// What an agent does at its start: frees the guest, takes up what was protected.
    pub(in crate::world) fn begin_primary(&mut self, h: usize) {
        if self.protection(h).is_some() {
            return;
        }
        if let Some(qemu) = &mut self.hosts[h].qemu
            && qemu.kind == Kind::Active
        {
            (qemu.stopped, qemu.colo) = (false, false);
        }
        self.take_up(h);
    }

    pub(in crate::world) fn take_up(&mut self, h: usize) {
        let Some(agent) = &self.hosts[h].primary else { return };
        let Some(Entry::Waiting(generation)) = agent.entry else { return };
        let life = agent.life;
        if self.hosts[h].qemu.is_none() || self.is_past(h, generation) {
            self.forget_protection(h);
            if let Some(agent) = &mut self.hosts[h].primary {
                agent.entry = None;
            }
            return;
        }
        self.protect(h, false);
        if let Some(PrimaryAgent { entry: Some(Entry::Waiting(_)), .. }) = &self.hosts[h].primary {
            self.after(2000, What::Primary(h, life, Input::Begin));
        }
    }

    /// Whether the backup agent of this host has had the guest since it was protected as this generation.
    pub(in crate::world) fn is_past(&self, h: usize, generation: u64) -> bool {
        self.hosts[h].disk.control.as_ref().is_some_and(|local| {
            let had = matches!(local.role, Role::Standby | Role::Promoting | Role::Promoted);
            had && local.generation.0 > generation
        })
    }

    /// What `understudy protect` does, or the agent itself after a restart.
    pub(in crate::world) fn protect(&mut self, h: usize, attended: bool) {
        let Some(agent) = &self.hosts[h].primary else { return };
        let (life, number) = (agent.life, agent.protections + 1);
        let waiting = match &agent.entry {
            Some(Entry::Owned(protection)) if protection.outcome.is_none() => return,
            Some(Entry::Waiting(generation)) => Some(*generation),
            _ => None,
        };
        let active = self.hosts[h].qemu.as_ref().is_some_and(|qemu| qemu.kind == Kind::Active && !qemu.hung);
        let generation = match (waiting, attended) {
            (Some(generation), false) => Some(generation),
            (None, true) => self.generation_to_protect(h),
            _ => None,
        };
        let (Some(generation), true, false) = (generation, active, self.hosts[h].disk.full) else { return };
        self.hosts[h].disk.protected = Some(generation);
        let found = self.hosts[h].plug.is_some();
        let shared = match &self.hosts[h].plug {
            Some(plug) => Arc::clone(plug),
            None => self.new_plug(h),
        };
        let engine = if found { GateEngine::found() } else { GateEngine::open() };
        {
            let mut gate = plug::lock(&shared);
            if found {
                gate.buffer();
            } else {
                gate.release_all();
            }
            gate.leaks = self.bug == Bug::SeedWithOpenGate && self.arbiter.alone() == Some(HOSTS[h]);
        }
        let settings = Settings {
            generation: Generation(generation),
            goals: None,
            epoch: Duration::from_millis(200),
            floor: Duration::from_millis(50),
            attended,
            first_session: life * 1_000_000 + number * 1000,
            peer: HOSTS[1 - h].to_owned(),
        };
        let now = self.local(h);
        let protection = Protection {
            number,
            generation,
            engine: Engine::new(settings, now),
            gate: SharedKeeper::new(engine, Box::new(PlugGate { plug: shared, bug: self.bug })),
            capture: Capture::default(),
            stream: None,
            feed: None,
            pulse: now,
            ticks_at: u64::MAX,
            outcome: None,
            listening: false,
            unprotecting: Vec::new(),
        };
        self.note(|| format!("{} protects generation {generation}, gate found: {found}", HOSTS[h]));
        if let Some(agent) = &mut self.hosts[h].primary {
            agent.protections = number;
            agent.entry = Some(Entry::Owned(Box::new(protection)));
        }
        self.primary_event(h, number, Event::Tick);
    }

    /// The newest generation there is a trace of, if nothing speaks against protecting the guest.
    pub(in crate::world) fn generation_to_protect(&self, h: usize) -> Option<u64> {
        let peer = &self.hosts[1 - h];
        if !self.linked() || !peer.answers(Process::Backup, self.now) {
            return None;
        }
        let local = self.hosts[h].disk.control.as_ref();
        if local.is_some_and(|local| matches!(local.role, Role::Standby | Role::Promoting)) {
            return None;
        }
        let theirs = peer.backup.as_ref().and_then(backup::BackupAgent::record);
        let released =
            theirs.filter(|record| record.role == Role::Released).map(|record| record.generation.0);
        let generation =
            [Some(1), local.map(|local| local.generation.0), released].into_iter().flatten().max()?;
        let occupied = theirs.is_some_and(|record| {
            record.generation.0 >= generation && matches!(record.role, Role::Promoted | Role::Promoting)
        });
        (!occupied).then_some(generation)
    }
}
