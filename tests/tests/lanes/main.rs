//! Epochs by several connections, over loopback, through a relay that limits each of them: what is committed is what one
//! connection would have brought (invariants 2 and 3).
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

mod pair;

use pair::{Pair, noise};
use understudy_proto::epoch::EpochKind::{Delta, Full};
use understudy_proto::units::{PAGE_BYTES, PageData};

const PAGES: u64 = 1024;
/// Bytes a second of each connection.
const RATE: f64 = 40e6;

fn write(model: &mut [u8], pages: &[(u64, Box<PageData>)]) {
    for (index, content) in pages {
        let at = usize::try_from(*index).unwrap() * PAGE_BYTES;
        model[at..at + PAGE_BYTES].copy_from_slice(&content[..]);
    }
}

/// Sends epochs, at most so many, until so many connections are used; the model of the image, and the salt that comes next.
fn widened(pair: &mut Pair, wanted: usize, most: u64) -> (Vec<u8>, u64) {
    let mut model = vec![0; usize::try_from(PAGES).unwrap() * PAGE_BYTES];
    let all = noise(0..PAGES, 0);
    pair.epoch(Full, &all).unwrap();
    write(&mut model, &all);
    for salt in 1..most {
        if pair.connections() >= wanted {
            return (model, salt);
        }
        delta(pair, &mut model, salt);
    }
    panic!("{} connections after {most} epochs", pair.connections());
}

/// Half of memory, in an order of its own; some pages twice, the later one counts.
fn delta(pair: &mut Pair, model: &mut [u8], salt: u64) {
    let mut pages = noise((0..512).map(|at| (at * 7 + salt * 13) % PAGES), salt);
    pages.extend(noise((0..16).map(|at| (at * 7 + salt * 13) % PAGES), salt + 1_000_000));
    pair.epoch(Delta, &pages).unwrap();
    write(model, &pages);
}

#[test]
fn epochs_by_several_connections_arrive_exactly() {
    let mut pair = Pair::open(PAGES, 3, Some(RATE)).unwrap();
    let (mut model, from) = widened(&mut pair, 3, 200);
    for salt in from..from + 30 {
        delta(&mut pair, &mut model, salt);
    }
    assert!(pair.connections() >= 2, "{}", pair.connections());
    assert!(pair.image().unwrap() == model, "the image is not what was sent");
}

#[test]
fn a_lane_that_breaks_costs_a_stream_and_no_epoch() {
    let mut pair = Pair::open(PAGES, 2, Some(RATE)).unwrap();
    let (mut model, from) = widened(&mut pair, 2, 200);
    for salt in from..from + 20 {
        if salt == from + 3 {
            // Idle, or in the middle of the epoch that follows: both may happen.
            pair.relay().unwrap().cut_last();
        }
        delta(&mut pair, &mut model, salt);
    }
    assert_eq!(pair.connections(), 1, "it is not tried again at once");
    assert!(pair.image().unwrap() == model, "the image is not what was sent");
}

#[test]
fn who_wants_one_connection_has_one() {
    let mut pair = Pair::open(PAGES, 1, Some(RATE)).unwrap();
    let mut model = vec![0; usize::try_from(PAGES).unwrap() * PAGE_BYTES];
    let all = noise(0..PAGES, 0);
    pair.epoch(Full, &all).unwrap();
    write(&mut model, &all);
    for salt in 1..25 {
        delta(&mut pair, &mut model, salt);
        assert_eq!(pair.connections(), 1);
    }
    assert!(pair.image().unwrap() == model);
}

/// A link on which an epoch takes longer than from one heartbeat to the next, which are no part of it.
#[test]
fn a_slow_link_is_taken_for_what_it_is() {
    let mut pair = Pair::open(PAGES, 2, Some(1.5e6)).unwrap();
    let (mut model, from) = widened(&mut pair, 2, 20);
    delta(&mut pair, &mut model, from);
    assert!(pair.image().unwrap() == model, "the image is not what was sent");
}
