//! A guest without a hypervisor, and a backup without an agent.
#![allow(dead_code, unused_imports, reason = "every test uses its part of it")]

mod backup;
mod guest;
mod output;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use backup::StubBackup;
pub(crate) use guest::{DIRTY_PAGES, FakeGuest};
pub(crate) use output::FakeGate;
use understudy_primary::agent::{self, Handle, Output, Plan, Wish};
use understudy_primary::encode::{Compress, Encoding};
use understudy_primary::engine::{Outcome, Settings};
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::negotiate::Offer;
use understudy_proto::rpc::epoch::Hello;

/// Only a bound for a test that hangs.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const GENERATION: Generation = Generation(2);

pub(crate) async fn start(guest: &FakeGuest, backup: &StubBackup) -> Handle {
    start_with(guest, backup, Output::Ungated).await
}

pub(crate) async fn start_with(guest: &FakeGuest, backup: &StubBackup, output: Output) -> Handle {
    let to = backup.address();
    let hello = Hello {
        offer: Offer::ours(),
        guest: GuestId(uuid::Uuid::from_u128(1)),
        guest_name: "web".to_owned(),
        generation: GENERATION,
        session: 0,
        primary_host: "alpha".to_owned(),
        qemu_version: "7.2.22".to_owned(),
        machine: "pc-q35-7.2".to_owned(),
        persistent: true,
        lane_key: None,
    };
    let settings = Settings {
        generation: GENERATION,
        epoch: Duration::from_millis(5),
        goals: None,
        floor: Duration::from_millis(1),
        attended: false,
        first_session: 1,
        peer: to.clone(),
    };
    let plan = Plan {
        hello,
        to,
        security: understudy_proto::rpc::transport::Security::Plain,
        settings,
        libvirt_version: "9.0.0".to_owned(),
        host: Arc::new(guest.clone()),
        source: Box::new(guest.source()),
        barrier: guest.barrier(),
        output,
        // The fake backup has no image to take differences from.
        encoding: Encoding { compress: Compress::Off, ..Encoding::default() },
        connections: 4,
    };
    agent::start(plan).await.expect("starts")
}

pub(crate) async fn wish(handle: &Handle, wish: Wish) {
    handle.wishes.send(wish).await.expect("the owner listens");
}

pub(crate) async fn end(handle: &Handle) -> Outcome {
    let mut snapshot = handle.snapshot.clone();
    let end = tokio::time::timeout(LIMIT, snapshot.wait_for(|snapshot| snapshot.outcome.is_some())).await;
    end.expect("ends in time").expect("has an end").outcome.clone().expect("has an outcome")
}

pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, waiting).await.is_ok(), "{what}: not within {LIMIT:?}");
}
