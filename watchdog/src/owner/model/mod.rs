//! Every interleaving of the shipped [`Protocol`] on two hosts with one arbiter, up to a bound.
//!
//! Messages are lost, doubled and delayed without limit; swaps reach the arbiter at any later time, also after the death
//! of who sent them; suspicion comes at any time; hosts, agents and watchdogs die at any time. What the agents do is
//! modelled: a history of epochs, checkpoints, acknowledgements, a gate.

mod interleavings;
mod properties;
mod state;

use stateright::{Checker, Model};

use interleavings::{Bounded, Start};

/// Broken on purpose; each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Bug {
    None,
    /// The claimant runs the guest before its claim is confirmed.
    PromoteWithoutConfirm,
    /// The primary opens its gate when it suspects the backup, without asking the arbiter.
    SoloWithoutSwap,
    /// A watchdog that restarts and is the owner opens the gate at once.
    ReopenOnRestart,
    /// A backup gets a full copy while output goes out by itself.
    SeedWithOpenGate,
    /// A record that is older than the one known counts.
    OldRecord,
    /// An acknowledgement of before the full copy counts as its completion.
    OldAck,
}

fn check(start: Start, (epochs, terms, crashes): (usize, u64, u8), bug: Bug) -> impl Checker<Bounded> {
    // With a bug the first violation ends it; without, the states do.
    let found = stateright::HasDiscoveries::AnyFailures;
    let model = Bounded { epochs, terms, crashes, start, bug };
    let checker = model.checker().threads(2);
    if bug == Bug::None { checker.spawn_bfs().join() } else { checker.finish_when(found).spawn_bfs().join() }
}

fn holds(start: Start, bounds: (usize, u64, u8)) -> impl Checker<Bounded> {
    let checked = check(start, bounds, Bug::None);
    println!("{start:?} {bounds:?}: {} states, depth {}", checked.unique_state_count(), checked.max_depth());
    for property in checked.model().properties().into_iter().take(3) {
        checked.assert_no_discovery(property.name);
    }
    checked
}

#[test]
fn no_interleaving_breaks_the_protocol() {
    holds(Start::Pair, (1, 3, 1));
    holds(Start::Solo, (1, 3, 1));
    // Without deaths, but long enough for everything to be reached.
    let long = holds(Start::Pair, (1, 4, 0));
    for name in [
        "the backup takes over",
        "the primary goes on alone",
        "a claim is taken back",
        "the stale instance is ended",
    ] {
        long.assert_any_discovery(name);
    }
}

/// Run by hand with other bounds: `MODEL=3,5,2 cargo test -p understudy-watchdog model -- --ignored --nocapture`.
#[test]
#[ignore = "takes minutes"]
fn no_longer_interleaving_breaks_the_protocol() {
    let bounds = std::env::var("MODEL").unwrap_or_else(|_| "2,5,1".into());
    let bounds: Vec<u8> = bounds.split(',').map(|n| n.parse().unwrap()).collect();
    holds(Start::Pair, (bounds[0].into(), bounds[1].into(), bounds[2])).assert_properties();
}

#[test]
fn every_planted_bug_is_found() {
    for (bug, start, bounds) in [
        (Bug::PromoteWithoutConfirm, Start::Pair, (2, 3, 0)),
        (Bug::SoloWithoutSwap, Start::Pair, (2, 3, 0)),
        (Bug::ReopenOnRestart, Start::Solo, (1, 5, 1)),
        (Bug::SeedWithOpenGate, Start::Solo, (2, 5, 0)),
        (Bug::OldRecord, Start::Solo, (2, 5, 0)),
        (Bug::OldAck, Start::Pair, (2, 5, 0)),
    ] {
        let checked = check(start, bounds, bug);
        let always = checked.model().properties().into_iter().map(|property| property.name).take(3);
        let found: Vec<_> = always.filter(|name| checked.discovery(name).is_some()).collect();
        println!("{bug:?}: {} states, {found:?}", checked.unique_state_count());
        assert!(!found.is_empty(), "{bug:?} was not found");
    }
}
