//! The two hosts, as far as a micro-VM needs any: nothing of libvirt, everything of the agents.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use understudy_backup::image::Image;
use understudy_backup::promoter::{
    Activation, HostFacts, LocalDomain, PromoteError, Promoter, Standby, StandbySpec,
};
use understudy_libvirt::{DomainEvent, QmpEvent, RunState};
use understudy_primary::agent::{Barrier, GuestHost};
use understudy_primary::capture::micro::{DirtyTracking, MicroVm};
use understudy_primary::engine::CaptureFailure;
use understudy_proto::digest::{Digest, PagesDigest};
use understudy_proto::ids::{EpochId, GuestId};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

use super::link::{KillPoint, Link};

/// What a guest is at a stop, found out without the code that captures it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Truth {
    /// All general registers, in words, so that a difference can be read.
    registers: String,
    pub(crate) steps: u64,
    memory: Digest,
}

impl Truth {
    /// Of a guest that is stopped; an error if it is gone.
    pub(crate) fn of(vm: &MicroVm) -> Result<Self, String> {
        let registers = vm.registers().map_err(|error| error.to_string())?;
        let mut memory = PagesDigest::new();
        let mut page = [0; PAGE_BYTES];
        for (slot, block) in (0u16..).zip(vm.layout().blocks()) {
            for index in 0..block.pages() {
                assert!(vm.read_page((slot, index), &mut page));
                memory.update(BlockIndex(slot), PageIndex::new(index), Some(&page));
            }
        }
        Ok(Self { steps: registers.r12, registers: format!("{registers:x?}"), memory: memory.finish() })
    }
}

/// The full copy every protection begins with.
pub(crate) const FIRST_EPOCH: u64 = 1;

/// What the guest was at the end of every epoch.
pub(crate) type History = Arc<Mutex<BTreeMap<u64, Truth>>>;

/// The host of the guest that runs.
#[derive(Debug, Default)]
pub(crate) struct PrimaryHost {
    events: Mutex<Option<mpsc::Sender<DomainEvent>>>,
}

impl PrimaryHost {
    fn event(&self, name: &str) {
        let events = self.events.lock().expect("not poisoned").clone();
        let event = QmpEvent { name: name.to_owned(), timestamp: Duration::from_secs(1), data: Value::Null };
        if let Some(events) = events {
            // The agent may have been killed meanwhile.
            let _ = events.blocking_send(DomainEvent::Qmp(event));
        }
    }

    /// Writes down what the guest is. A kill at the stop happens here.
    pub(crate) fn barrier(self: &Arc<Self>, vm: &MicroVm, history: &History, link: &Arc<Link>) -> Barrier {
        let (host, vm, history, link) = (Arc::clone(self), vm.clone(), Arc::clone(history), Arc::clone(link));
        Box::new(move |EpochId(epoch)| {
            // The power may be cut while this is done.
            let truth = Truth::of(&vm)?;
            history.lock().expect("not poisoned").insert(epoch, truth);
            // What libvirt would report of the stop. After a full copy the agent asks anyway.
            if epoch > FIRST_EPOCH {
                host.event("STOP");
                host.event("RESUME");
            }
            if link.is_stop_of(epoch) {
                link.cut();
                vm.power_off();
            }
            Ok(())
        })
    }
}

impl Link {
    fn is_stop_of(&self, epoch: u64) -> bool {
        self.at() == (KillPoint::Stopped, epoch)
    }
}

impl GuestHost for PrimaryHost {
    fn describe(&self) -> Result<String, String> {
        Ok("<domain/>".to_owned())
    }

    fn run_state(&self) -> Result<RunState, String> {
        Ok(RunState::Running)
    }

    fn pause(&self) -> Result<(), String> {
        Ok(())
    }

    fn rescue(&self) -> Result<(), CaptureFailure> {
        Ok(())
    }

    fn subscribe(&self, events: mpsc::Sender<DomainEvent>) -> Result<(), String> {
        *self.events.lock().expect("not poisoned") = Some(events);
        Ok(())
    }
}

/// Makes micro-VMs of committed images.
#[derive(Debug)]
pub(crate) struct MicroPromoter {
    pub(crate) tracking: DirtyTracking,
    /// The epoch that was loaded, and the guest it became.
    pub(crate) promoted: Mutex<Option<(u64, MicroVm)>>,
}

impl Promoter for MicroPromoter {
    fn host_facts(&self) -> HostFacts {
        HostFacts::default()
    }

    fn supports_machine(&self, _machine: &str) -> Option<bool> {
        Some(true)
    }

    fn local(&self, _guest: GuestId) -> Result<LocalDomain, PromoteError> {
        Ok(LocalDomain::Absent)
    }

    fn prepare(&self, _spec: &StandbySpec) -> Result<Standby, PromoteError> {
        Ok(Standby::Cold(String::new()))
    }

    fn load(&self, _spec: &StandbySpec, image: &Arc<Image>) -> Result<(), PromoteError> {
        let failed = |reason: &dyn std::fmt::Display| PromoteError::new(reason.to_string());
        let at = image.at().ok_or_else(|| failed(&"the image is of no epoch"))?;
        let blocks = image.blocks().map(|(_, _, bytes)| bytes);
        let vm = MicroVm::restore(image.layout(), blocks, image.device(), self.tracking)
            .map_err(|error| failed(&error))?;
        *self.promoted.lock().expect("not poisoned") = Some((at.epoch.0, vm));
        Ok(())
    }

    /// The test itself lets it run, once it has looked at it.
    fn activate(&self, _guest: GuestId, _spec: Option<&StandbySpec>) -> Result<Activation, PromoteError> {
        Ok(Activation::default())
    }

    fn discard(&self, _guest: GuestId) -> Result<(), PromoteError> {
        Ok(())
    }
}
