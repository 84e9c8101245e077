//! What fails, and when: some at any time, some just after a guest has changed hands.

use super::host::Process;
use super::net::Cut;
use super::plug;
use super::{CHAOS, HOSTS, What, World};

/// Nothing fails before the guest is protected for the first time.
const FIRST: u64 = 1500;

/// Something that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    PowerOff(usize),
    Kill(usize, Process),
    /// A process is stopped for so long.
    Freeze(usize, Process, u64),
    /// The whole host is.
    Still(usize, u64),
    HangQemu(usize),
    KillQemu(usize),
    Cut(Cut),
    Witness,
    DiskFull(usize),
    /// The clock jumps ahead and has another rate.
    Jump(usize, u64),
    GateBroken(usize),
}

impl World {
    pub(super) fn plan_faults(&mut self) {
        for _ in 0..1 + self.below(7) {
            let when = FIRST + self.below(CHAOS - FIRST);
            let h = usize::from(self.below(2) == 1);
            self.plan(when, h);
        }
    }

    /// The moments in which most can go wrong.
    pub(super) fn record_changed(&mut self) {
        if self.chaos && self.now > FIRST && self.below(3) == 0 {
            let when = self.now + self.below(400);
            let h = usize::from(self.below(2) == 1);
            self.plan(when, h);
        }
    }

    /// One kind of failure of one host, which may be more than one fault.
    fn plan(&mut self, when: u64, h: usize) {
        let long = 100 + self.below(5000);
        let process = self.random.pick(&Process::ALL);
        let faults: Vec<Fault> = match self.below(18) {
            0 | 1 => vec![Fault::PowerOff(h)],
            2..=4 => vec![Fault::Kill(h, process)],
            5 | 6 => vec![Fault::Freeze(h, process, long)],
            7 => vec![Fault::Still(h, long)],
            8 => vec![Fault::HangQemu(h)],
            9 => vec![Fault::KillQemu(h)],
            10 => vec![Fault::Cut(Cut::Path(h, 0)), Fault::Cut(Cut::Path(1 - h, 0))],
            11 => vec![Fault::Cut(Cut::Path(h, 0)), Fault::Cut(Cut::Path(h, 1))],
            12 => (0..4).map(|n| Fault::Cut(Cut::Path(n / 2, n % 2))).collect(),
            13 => {
                let links = (0..4).map(|n| Fault::Cut(Cut::Path(n / 2, n % 2)));
                links.chain([Fault::Cut(Cut::Witness(h))]).collect()
            }
            14 => vec![Fault::Cut(Cut::Witness(h))],
            15 => vec![Fault::Witness],
            16 => vec![if long.is_multiple_of(2) { Fault::DiskFull(h) } else { Fault::GateBroken(h) }],
            _ => vec![Fault::Jump(h, long)],
        };
        for fault in faults {
            self.at(when, What::Fault(fault));
            self.at(when + long, What::Undo(fault));
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        if !self.chaos {
            return;
        }
        self.note(|| format!("FAULT {fault:?}"));
        let now = self.now;
        match fault {
            Fault::PowerOff(h) => {
                if self.hosts[h].up {
                    self.power_off(h);
                }
            }
            Fault::Kill(h, process) => {
                if self.hosts[h].is_alive(process) {
                    self.kill(h, process);
                }
            }
            Fault::Freeze(h, process, long) => self.hosts[h].freeze(process, now + long),
            Fault::Still(h, long) => self.hosts[h].still_until = now + long,
            Fault::HangQemu(h) => {
                if let Some(qemu) = &mut self.hosts[h].qemu {
                    qemu.hung = true;
                }
            }
            Fault::KillQemu(h) => self.end_guest(h, "crashed"),
            Fault::Cut(cut) => self.net.cuts.push(cut),
            Fault::Witness => self.arbiter.up = false,
            Fault::DiskFull(h) => self.hosts[h].disk.full = true,
            Fault::Jump(h, ahead) => {
                let rate = 800 + self.below(400);
                self.hosts[h].clock.jump(now, ahead, rate);
            }
            Fault::GateBroken(h) => self.break_gate(h, true),
        }
    }

    fn break_gate(&mut self, h: usize, broken: bool) {
        if let Some(gate) = &self.hosts[h].plug {
            plug::lock(gate).broken = broken;
        }
    }

    pub(super) fn undo(&mut self, fault: Fault) {
        match fault {
            Fault::PowerOff(h) => self.boot(h),
            Fault::Kill(h, process) => self.after(0, What::Start(h, process)),
            Fault::HangQemu(h) => {
                if let Some(qemu) = &mut self.hosts[h].qemu {
                    qemu.hung = false;
                }
            }
            Fault::Cut(cut) => {
                if let Some(at) = self.net.cuts.iter().position(|other| *other == cut) {
                    self.net.cuts.swap_remove(at);
                }
            }
            Fault::Witness => self.arbiter.up = true,
            Fault::DiskFull(h) => self.hosts[h].disk.full = false,
            Fault::GateBroken(h) => self.break_gate(h, false),
            Fault::Freeze(..) | Fault::Still(..) | Fault::KillQemu(_) | Fault::Jump(..) => {}
        }
    }

    /// Nothing fails any more.
    pub(super) fn heal(&mut self) {
        self.chaos = false;
        self.note(|| "everything heals".to_owned());
        self.net.cuts.clear();
        self.arbiter.up = true;
        for (h, _) in HOSTS.iter().enumerate() {
            self.hosts[h].thaw();
            self.hosts[h].disk.full = false;
            self.break_gate(h, false);
            if let Some(qemu) = &mut self.hosts[h].qemu {
                qemu.hung = false;
            }
            if !self.hosts[h].up {
                self.after(500, What::Boot(h));
            }
            for process in Process::ALL {
                self.after(300, What::Start(h, process));
            }
        }
    }
}
