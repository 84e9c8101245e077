//! A guest whose memory is a few pages that change in a known way.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::mpsc;
use understudy_libvirt::{DomainEvent, QmpEvent, RunState};
use understudy_primary::agent::{Barrier, GuestHost};
use understudy_primary::capture::{
    ArmTimings, Armed, CaptureError, CaptureTimings, Checkpoint, CheckpointSource, Dialect, Interrupter,
    PageSink, Phase,
};
use understudy_primary::engine::CaptureFailure;
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

const PAGES: u64 = 300;

/// Pages that change between two stops.
pub(crate) const DIRTY_PAGES: u64 = 70;

/// What every byte of a page is.
pub(crate) type Memory = BTreeMap<u64, u8>;

#[derive(Clone)]
pub(crate) struct FakeGuest(Arc<Mutex<Inner>>);

struct Inner {
    memory: Memory,
    runs: bool,
    stops: u64,
    /// The guest at the stop of every epoch.
    history: BTreeMap<u64, Memory>,
    events: Option<mpsc::Sender<DomainEvent>>,
    clock: Duration,
    /// How often it was stopped, full copies counted too; a frame belongs to the stop that comes next.
    moment: u64,
    /// The moment of every epoch.
    moments: BTreeMap<u64, u64>,
    /// What takes its frames.
    network: Option<Network>,
    /// Somebody else lets it run while it is to stay stopped, so many questions from now.
    runs_on_after: Option<u32>,
    /// Checkpoints that left it stopped.
    holds: u64,
}

/// Takes a frame with the moment it belongs to.
pub(crate) type Network = Arc<dyn Fn(u64) + Send + Sync>;

impl Inner {
    fn qmp(&mut self, name: &str, later: Duration) {
        self.clock += later;
        let event = QmpEvent { name: name.to_owned(), timestamp: self.clock, data: Value::Null };
        if let Some(events) = &self.events {
            events.blocking_send(DomainEvent::Qmp(event)).ok();
        }
    }

    fn send_frame(&self) {
        if let Some(network) = &self.network {
            network(self.moment + 1);
        }
    }

    /// What the guest does between two stops: pages at a place that moves get the number of the stop.
    fn run(&mut self) -> Vec<u64> {
        let fill = u8::try_from(self.stops % 5).expect("small");
        let pages: Vec<u64> = (0..DIRTY_PAGES).map(|n| (self.stops * 31 + n) % PAGES).collect();
        self.memory.extend(pages.iter().map(|page| (*page, fill)));
        pages
    }
}

impl FakeGuest {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Inner {
            memory: (0..PAGES).map(|page| (page, u8::try_from(page % 3).expect("small"))).collect(),
            runs: true,
            stops: 0,
            history: BTreeMap::new(),
            events: None,
            clock: Duration::ZERO,
            moment: 0,
            moments: BTreeMap::new(),
            network: None,
            runs_on_after: None,
            holds: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("not poisoned")
    }

    pub(crate) fn source(&self) -> FakeSource {
        FakeSource { guest: self.clone(), hold: false, interrupter: Interrupter::new().expect("an eventfd") }
    }

    pub(crate) fn barrier(&self) -> Barrier {
        let guest = self.clone();
        Box::new(move |epoch| {
            let mut inner = guest.lock();
            let memory = inner.memory.clone();
            inner.history.insert(epoch.0, memory);
            let moment = inner.moment;
            inner.moments.insert(epoch.0, moment);
            Ok(())
        })
    }

    pub(crate) fn connect(&self, network: Network) {
        self.lock().network = Some(network);
    }

    /// Frames up to this moment belong to the epoch or to one before it.
    pub(crate) fn moment_of(&self, epoch: u64) -> u64 {
        self.lock().moments[&epoch]
    }

    /// A supervisor lets it run behind this agent's back: before the READY of a full copy, or before the question after so
    /// many others.
    pub(crate) fn runs_on_after(&self, questions: u32) {
        self.lock().runs_on_after = Some(questions);
    }

    pub(crate) fn holds(&self) -> u64 {
        self.lock().holds
    }

    pub(crate) fn runs(&self) -> bool {
        self.lock().runs
    }

    pub(crate) fn stops(&self) -> u64 {
        self.lock().stops
    }

    pub(crate) fn memory_at(&self, epoch: u64) -> Memory {
        self.lock().history[&epoch].clone()
    }

    pub(crate) fn event(&self, event: DomainEvent) {
        let events = self.lock().events.clone().expect("subscribed");
        events.try_send(event).expect("room for an event");
    }
}

impl GuestHost for FakeGuest {
    fn describe(&self) -> Result<String, String> {
        Ok("<domain/>".to_owned())
    }

    fn run_state(&self) -> Result<RunState, String> {
        Ok(if self.runs() { RunState::Running } else { RunState::Paused })
    }

    fn pause(&self) -> Result<(), String> {
        self.lock().runs = false;
        Ok(())
    }

    fn rescue(&self) -> Result<(), CaptureFailure> {
        Ok(())
    }

    fn subscribe(&self, events: mpsc::Sender<DomainEvent>) -> Result<(), String> {
        self.lock().events = Some(events);
        Ok(())
    }
}

pub(crate) struct FakeSource {
    guest: FakeGuest,
    hold: bool,
    interrupter: Interrupter,
}

impl FakeSource {
    fn check(&self) -> Result<(), CaptureError> {
        if self.interrupter.is_interrupted() { Err(CaptureError::Interrupted) } else { Ok(()) }
    }

    fn send(&self, pages: &[u64], sink: &mut dyn PageSink) -> Result<(), CaptureError> {
        let memory = self.guest.lock().memory.clone();
        for page in pages {
            let content = [memory[page]; PAGE_BYTES];
            sink.page(BlockIndex(0), PageIndex::new(*page), Some(&content))?;
        }
        Ok(())
    }
}

impl CheckpointSource for FakeSource {
    fn arm(&mut self, sink: &mut dyn PageSink) -> Result<Armed, CaptureError> {
        self.check()?;
        let block = RamBlock { name: "pc.ram".to_owned(), used_bytes: PAGES * PAGE_BYTES as u64 };
        let layout = Arc::new(MemoryLayout::new(vec![block], b"machine".to_vec(), 2).expect("a layout"));
        sink.layout(&layout)?;
        self.send(&(0..PAGES).collect::<Vec<_>>(), sink)?;
        self.guest.lock().send_frame();
        self.guest.lock().moment += 1;
        self.guest.lock().qmp("STOP", Duration::from_millis(1));
        let device = Bytes::from_static(b"device state of the full copy");
        let timings = ArmTimings::default();
        Ok(Armed { layout, device, dialect: Some(Dialect::V7_2), pages: PAGES, timings })
    }

    fn start(&mut self) -> Result<(), CaptureError> {
        self.check()?;
        let mut inner = self.guest.lock();
        if inner.runs_on_after.take().is_some() {
            // What it sends is in no epoch, and QEMU has closed the socket.
            inner.qmp("RESUME", Duration::from_millis(1));
            inner.send_frame();
            return Err(CaptureError::Closed { phase: Phase::Start, detail: None });
        }
        inner.qmp("RESUME", Duration::from_millis(1));
        inner.send_frame();
        Ok(())
    }

    fn wait_ready(&mut self) -> Result<(), CaptureError> {
        self.check()
    }

    fn checkpoint(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), String>,
        sink: &mut dyn PageSink,
    ) -> Result<Checkpoint, CaptureError> {
        self.check()?;
        let pages = {
            let mut inner = self.guest.lock();
            assert!(inner.runs, "checkpoint of a guest that does not run");
            inner.stops += 1;
            let pages = inner.run();
            inner.send_frame();
            inner.moment += 1;
            inner.qmp("STOP", Duration::from_millis(5));
            pages
        };
        barrier().map_err(|reason| CaptureError::Barrier { reason })?;
        self.send(&pages, sink)?;
        if std::mem::take(&mut self.hold) {
            self.guest.lock().holds += 1;
        } else {
            self.guest.lock().qmp("RESUME", Duration::from_micros(500));
        }
        let device = Bytes::from(vec![7; 300_000]);
        Ok(Checkpoint { device, pages: DIRTY_PAGES, timings: CaptureTimings::default() })
    }

    fn hold_next(&mut self) {
        self.hold = true;
    }

    fn still_stopped(&mut self) -> Result<(), CaptureError> {
        let mut inner = self.guest.lock();
        match &mut inner.runs_on_after {
            Some(0) => {
                inner.qmp("RESUME", Duration::from_millis(1));
                inner.send_frame();
                Err(CaptureError::RanOn { state: RunState::Running })
            }
            Some(questions) => {
                *questions -= 1;
                if *questions == 0 {
                    // It does so now, right behind the answer.
                    inner.send_frame();
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn disarm(&mut self) -> Result<(), CaptureError> {
        self.guest.lock().runs_on_after = None;
        self.interrupter.clear();
        Ok(())
    }

    fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }
}
