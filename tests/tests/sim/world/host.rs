//! A host: its processes, its guest, its disk.

use std::sync::Arc;

use understudy_proto::control::ControlFile;

use super::backup::BackupAgent;
use super::clock::Clock;
use super::guest::Qemu;
use super::keeper::Keeper;
use super::plug::SharedPlug;
use super::primary::PrimaryAgent;
use super::{What, World};

/// A process of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Process {
    Primary,
    Backup,
    Keeper,
}

impl Process {
    pub(crate) const ALL: [Self; 3] = [Self::Primary, Self::Backup, Self::Keeper];

    fn index(self) -> usize {
        match self {
            Self::Primary => 0,
            Self::Backup => 1,
            Self::Keeper => 2,
        }
    }
}

/// What survives a power cut.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) control: Option<ControlFile>,
    /// The primary agent's state file: the generation of the guest it protects.
    pub(crate) protected: Option<u64>,
    pub(crate) full: bool,
}

/// See the module's description.
pub(crate) struct Host {
    pub(crate) clock: Clock,
    pub(crate) up: bool,
    /// All of it stands still until then.
    pub(crate) still_until: u64,
    pub(crate) disk: Disk,
    pub(crate) qemu: Option<Qemu>,
    /// The gate on the way of what the guest sends.
    pub(crate) plug: Option<SharedPlug>,
    lives: [Option<u64>; 3],
    frozen: [u64; 3],
    pub(crate) primary: Option<PrimaryAgent>,
    pub(crate) backup: Option<BackupAgent>,
    pub(crate) keeper: Option<Keeper>,
}

impl Host {
    pub(crate) fn new(clock: Clock) -> Self {
        Self {
            clock,
            up: true,
            still_until: 0,
            disk: Disk::default(),
            qemu: None,
            plug: None,
            lives: [None; 3],
            frozen: [0; 3],
            primary: None,
            backup: None,
            keeper: None,
        }
    }

    pub(crate) fn life(&self, process: Process) -> Option<u64> {
        self.lives[process.index()]
    }

    pub(crate) fn is_alive(&self, process: Process) -> bool {
        self.up && self.life(process).is_some()
    }

    pub(crate) fn frozen_until(&self, process: Process) -> u64 {
        self.frozen[process.index()].max(self.still_until)
    }

    /// Whether it lives and is not stopped.
    pub(crate) fn answers(&self, process: Process, now: u64) -> bool {
        self.is_alive(process) && self.frozen_until(process) <= now
    }

    pub(crate) fn freeze(&mut self, process: Process, until: u64) {
        self.frozen[process.index()] = until;
    }

    pub(crate) fn thaw(&mut self) {
        (self.frozen, self.still_until) = ([0; 3], 0);
    }

    /// Whether the guest here runs and what it sends goes out at once.
    pub(crate) fn serves(&self) -> bool {
        let open = self.plug.as_ref().is_none_or(|plug| super::plug::lock(plug).is_open());
        self.up && self.qemu.as_ref().is_some_and(Qemu::runs) && open
    }
}

impl World {
    pub(super) fn start(&mut self, h: usize, process: Process) {
        self.lives += 1;
        let life = self.lives;
        self.hosts[h].lives[process.index()] = Some(life);
        self.hosts[h].frozen[process.index()] = 0;
        self.note(|| format!("{} {process:?} starts", super::HOSTS[h]));
        match process {
            Process::Primary => self.start_primary(h, life),
            Process::Backup => self.start_backup(h, life),
            Process::Keeper => self.start_keeper(h, life),
        }
    }

    pub(super) fn kill(&mut self, h: usize, process: Process) {
        self.note(|| format!("{} {process:?} dies", super::HOSTS[h]));
        let host = &mut self.hosts[h];
        host.lives[process.index()] = None;
        match process {
            Process::Primary => {
                host.primary = None;
                if let Some(qemu) = host.qemu.as_ref().filter(|qemu| qemu.stopped) {
                    let instance = qemu.instance;
                    let later = 500 + self.below(1500);
                    self.after(later, What::Supervisor(h, instance));
                }
            }
            Process::Backup => host.backup = None,
            Process::Keeper => host.keeper = None,
        }
        self.process_is_gone(h, process);
    }

    /// The supervisor lets a guest run that a dead agent has left stopped.
    pub(super) fn supervise(&mut self, h: usize, instance: u16) {
        let dead = !self.hosts[h].is_alive(Process::Primary);
        if let Some(qemu) = self.hosts[h].qemu.as_mut()
            && qemu.instance == instance
            && qemu.stopped
            && dead
        {
            (qemu.stopped, qemu.colo) = (false, false);
            self.note(|| format!("{} the supervisor lets the guest run", super::HOSTS[h]));
        }
    }

    pub(super) fn power_off(&mut self, h: usize) {
        self.note(|| format!("{} loses power", super::HOSTS[h]));
        for process in Process::ALL {
            self.hosts[h].lives[process.index()] = None;
        }
        let host = &mut self.hosts[h];
        (host.up, host.qemu, host.plug) = (false, None, None);
        (host.primary, host.backup, host.keeper) = (None, None, None);
        host.thaw();
    }

    pub(super) fn boot(&mut self, h: usize) {
        if !self.hosts[h].up {
            self.note(|| format!("{} is back", super::HOSTS[h]));
            self.hosts[h].up = true;
            for process in Process::ALL {
                self.start(h, process);
            }
        }
    }

    /// QEMU ends, and the device of the guest with it.
    pub(super) fn end_guest(&mut self, h: usize, detail: &str) {
        let Some(qemu) = self.hosts[h].qemu.take() else { return };
        self.note(|| format!("{} QEMU ends: {detail}", super::HOSTS[h]));
        self.hosts[h].plug = None;
        if qemu.kind == super::guest::Kind::Active {
            self.tell_primary_of_end(h, detail);
        }
    }

    pub(super) fn new_plug(&mut self, h: usize) -> SharedPlug {
        let plug = SharedPlug::default();
        self.hosts[h].plug = Some(Arc::clone(&plug));
        plug
    }
}
