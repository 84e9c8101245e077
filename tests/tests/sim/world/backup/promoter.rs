//! libvirt, as the backup agent uses it: the standby, its load, its start.

use understudy_backup::engine::{Event, Way};
use understudy_backup::promoter::{Activation, LocalDomain, PromoteError};

use super::super::guest::{self, Kind, Memory, Qemu};
use super::super::{HOSTS, What, World};
use super::{BackupAgent, Call, Input};
use crate::invariants;

impl World {
    pub(in crate::world) fn call_promoter(&mut self, h: usize, life: u64, call: Call) {
        let took = match call {
            Call::Prepare => 30 + self.below(150),
            Call::Check => 2,
            Call::Discard => 5 + self.below(20),
            Call::Load => 30 + self.below(200),
            Call::Activate => 3 + self.below(30),
        };
        self.after(took, What::Backup(h, life, Input::Called(call)));
    }

    pub(in crate::world) fn called(&mut self, h: usize, call: Call) {
        let fails = self.seldom(12);
        let failed = || PromoteError::new("libvirt refused");
        let local = self.local_domain(h);
        let event = match call {
            Call::Prepare => Event::Prepared(match local {
                LocalDomain::Active => Err(failed()),
                _ if fails => Err(failed()),
                _ => {
                    self.hosts[h].qemu = Some(Qemu::standby());
                    Ok(Way::Cold(String::new()))
                }
            }),
            Call::Check => Event::Checked(Ok(local)),
            Call::Discard => {
                if matches!(local, LocalDomain::Waiting | LocalDomain::Loaded) {
                    self.hosts[h].qemu = None;
                }
                Event::Discarded(Ok(()))
            }
            Call::Load => Event::Loaded(if fails { Err(failed()) } else { self.load(h) }),
            Call::Activate if fails && local == LocalDomain::Loaded => Event::Activated(Err(failed())),
            Call::Activate => Event::Activated(self.activate(h)),
        };
        self.backup_event(h, event);
    }

    pub(in crate::world) fn load(&mut self, h: usize) -> Result<(), PromoteError> {
        let image = self.hosts[h].backup.as_ref().and_then(|agent| agent.taken.clone());
        let image = image.ok_or_else(|| PromoteError::new("the image is gone"))?;
        for what in invariants::loaded(self, h, &image) {
            self.wrong(what);
        }
        let Some(qemu) = self.hosts[h].qemu.as_mut().filter(|qemu| qemu.kind == Kind::Waiting) else {
            return Err(PromoteError::new("the standby is gone"));
        };
        qemu.kind = Kind::Loaded(guest::capture_of(&image));
        qemu.memory = Memory::of(&image);
        Ok(())
    }

    pub(in crate::world) fn activate(&mut self, h: usize) -> Result<Activation, PromoteError> {
        let generation = self.hosts[h].backup.as_ref().and_then(BackupAgent::record);
        let generation = generation.map_or(0, |record| record.generation.0);
        self.instances += 1;
        let instance = self.instances;
        let Some(qemu) = self.hosts[h].qemu.as_mut().filter(|qemu| matches!(qemu.kind, Kind::Loaded(_)))
        else {
            return Err(PromoteError::new("the standby is gone"));
        };
        let from = match qemu.kind {
            Kind::Loaded(capture) => capture,
            _ => 0,
        };
        (qemu.kind, qemu.instance, qemu.generation) = (Kind::Active, instance, generation);
        (qemu.frames, qemu.dirty) = (0, 0);
        self.note(|| format!("{} runs the guest, from capture {from}", HOSTS[h]));
        for what in invariants::activated(self, h, generation) {
            self.wrong(what);
        }
        self.at(self.now, What::Guest(h, instance));
        Ok(Activation::default())
    }

    pub(in crate::world) fn local_domain(&self, h: usize) -> LocalDomain {
        match self.hosts[h].qemu.as_ref().map(|qemu| &qemu.kind) {
            None => LocalDomain::Absent,
            Some(Kind::Waiting) => LocalDomain::Waiting,
            Some(Kind::Loaded(_)) => LocalDomain::Loaded,
            Some(Kind::Active) => LocalDomain::Active,
        }
    }
}
