//! What is on one host: the guest, its gate, the image, and what the agents do with them.

use std::rc::Rc;

use understudy_proto::ids::{EpochId, Generation, Incarnation};
use understudy_proto::ownership::Term;

use super::super::{Image, Local, Sending};

#[derive(Debug, Clone)]
pub(super) struct Copy {
    pub(super) hist: Rc<Vec<u16>>,
    pub(super) number: u64,
    pub(super) generation: u64,
}

/// Of one host.
#[derive(Debug)]
pub(super) struct Agents {
    pub(super) runs: bool,
    pub(super) hangs: bool,
    pub(super) paused: bool,
    pub(super) gated: bool,
    pub(super) gate_term: Term,
    pub(super) generation: u64,
    /// Which instance executed each epoch.
    pub(super) hist: Vec<u16>,
    /// How much of it was let out.
    pub(super) released: usize,
    pub(super) id: u16,
    pub(super) sent: u64,
    /// Number and length of what was sent last, to whom.
    pub(super) in_flight: Option<(u64, usize)>,
    pub(super) committed: u64,
    pub(super) streaming: bool,
    pub(super) life: u64,
    pub(super) image: Option<Copy>,
    pub(super) known: u64,
    pub(super) accepting: bool,
    /// Counts loads, so that one that was given up ends nowhere.
    pub(super) load: u64,
}

impl Agents {
    pub(super) fn new(runs: bool) -> Self {
        Self {
            runs,
            hangs: false,
            paused: false,
            gated: true,
            gate_term: Term::NONE,
            generation: u64::from(runs),
            hist: Vec::new(),
            released: 0,
            id: 1,
            sent: 0,
            in_flight: None,
            committed: 0,
            streaming: runs,
            life: 1,
            image: None,
            known: 0,
            accepting: true,
            load: 0,
        }
    }

    pub(super) fn serves(&self) -> bool {
        self.runs && !self.paused && !self.gated
    }

    pub(super) fn local(&self) -> Local {
        let image = self.image.as_ref().map(|image| Image {
            incarnation: incarnation(self.life),
            generation: Generation(image.generation),
        });
        let generation = self.runs.then_some(Generation(self.generation));
        Local { runs: self.runs && !self.hangs, image, generation }
    }

    pub(super) fn sending(&self) -> Option<Sending> {
        (self.runs && self.streaming && self.committed > 0).then_some(Sending {
            generation: Generation(self.generation),
            committed: EpochId(self.committed),
        })
    }

    /// The instance is gone.
    pub(super) fn end_guest(&mut self) {
        (self.runs, self.hangs, self.paused, self.gated, self.streaming) = (false, false, false, true, false);
        self.hist.clear();
        (self.released, self.in_flight, self.committed) = (0, None, 0);
    }

    /// The backup agent starts anew.
    pub(super) fn end_backup(&mut self) {
        self.life += 1;
        self.image = None;
        self.accepting = true;
        self.load += 1;
    }

    /// The image becomes a guest.
    pub(super) fn activate(&mut self, id: u16) -> bool {
        let Some(image) = self.image.take().filter(|_| !self.runs) else { return false };
        (self.runs, self.hangs, self.paused, self.gated) = (true, false, false, true);
        self.generation = image.generation + 1;
        self.known = self.generation;
        self.released = image.hist.len();
        self.hist = image.hist.to_vec();
        self.id = id;
        (self.sent, self.in_flight, self.committed, self.streaming) = (0, None, 0, false);
        self.accepting = true;
        true
    }
}

pub(super) fn incarnation(life: u64) -> Incarnation {
    Incarnation(uuid::Uuid::from_u128(life.into()))
}
