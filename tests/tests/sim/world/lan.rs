//! The guests, their client, and the network between them.

use super::guest::Kind;
use super::plug::{self, Frame};
use super::{HOSTS, What, World};
use crate::invariants;

/// Between two answers of a client that waits for none.
const ASK: u64 = 80;

/// After so long a client asks again.
const ASK_AGAIN: u64 = 300;

impl World {
    pub(super) fn guest_lives(&mut self, h: usize, instance: u16) {
        let Some(qemu) = self.hosts[h].qemu.as_mut().filter(|qemu| qemu.instance == instance) else { return };
        if qemu.runs() && self.hosts[h].still_until <= self.now {
            let Some(qemu) = self.hosts[h].qemu.as_mut() else { return };
            qemu.dirty |= qemu.memory.tick();
        }
        self.after(40, What::Guest(h, instance));
    }

    pub(super) fn client_asks(&mut self) {
        self.after(ASK / 2, What::Client);
        let waits = self.client.answered.0 < self.client.asked;
        let due = if waits { ASK_AGAIN } else { ASK };
        if self.now < self.client.asked_at + due && self.client.asked > 0 {
            return;
        }
        if !waits {
            self.client.asked += 1;
        }
        self.client.asked_at = self.now;
        let request = self.client.asked;
        for h in 0..2 {
            if self.below(50) > 0 {
                let later = 1 + self.below(4);
                self.after(later, What::Request(h, request));
            }
        }
    }

    pub(super) fn request(&mut self, h: usize, request: u64) {
        let chance = self.below(u64::MAX);
        let host = &mut self.hosts[h];
        if !host.up || host.still_until > self.now {
            return;
        }
        let Some(qemu) = host.qemu.as_mut().filter(|qemu| qemu.runs()) else { return };
        if request == qemu.memory.served() + 1 {
            qemu.dirty |= qemu.memory.serve(chance);
        }
        if request < qemu.memory.served() {
            return;
        }
        qemu.frames += 1;
        let frame = Frame {
            instance: qemu.instance,
            number: qemu.frames,
            request: qemu.memory.served(),
            history: qemu.memory.history(),
        };
        match &host.plug {
            Some(shared) => {
                plug::lock(shared).enqueue(frame);
                self.frame_waits(h);
            }
            None => self.leaves(h, frame, true),
        }
    }

    /// What gates have let go is on the network.
    pub(super) fn flush_gates(&mut self) {
        for h in 0..2 {
            let Some(shared) = &self.hosts[h].plug else { continue };
            let mut gate = plug::lock(shared);
            let open = gate.is_open();
            let out = std::mem::take(&mut gate.out);
            let removed = gate.removed;
            drop(gate);
            if removed {
                self.hosts[h].plug = None;
            }
            for frame in out {
                self.leaves(h, frame, open);
            }
        }
    }

    fn leaves(&mut self, h: usize, frame: Frame, open: bool) {
        self.note(|| format!("{} lets out the answer to {} ({open})", HOSTS[h], frame.request));
        for what in invariants::frame(self, h, frame) {
            self.wrong(what);
        }
        if self.below(50) > 0 {
            let later = 1 + self.below(4);
            self.after(later, What::Answer(frame));
        }
        if self.below(50) == 0 {
            let later = 1 + self.below(100);
            self.after(later, What::Answer(frame));
        }
    }

    pub(super) fn answer(&mut self, frame: Frame) {
        if let Err(what) = self.client.hear(frame.request, frame.history, self.now) {
            self.wrong(format!("invariant 1 (output commit): {what}"));
        }
    }

    /// A guest that lets output out must have done all that anybody outside has been told.
    pub(crate) fn lacks(&self, h: usize) -> Option<String> {
        let qemu = self.hosts[h].qemu.as_ref().filter(|qemu| qemu.kind == Kind::Active)?;
        let (request, _) = self.client.answered;
        (self.hosts[h].serves() && qemu.memory.served() < request).then(|| {
            format!(
                "{} serves and has done {} requests, {request} were answered",
                HOSTS[h],
                qemu.memory.served()
            )
        })
    }
}
