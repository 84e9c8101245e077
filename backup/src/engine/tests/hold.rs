//! A promotion that waits for the confirmation of a claim.

use super::*;
use understudy_proto::ownership::{Outdated, Term};
use understudy_proto::rpc::admin::LOADED;

/// Loaded, and held.
fn held() -> (Bench, Vec<Command>) {
    let mut bench = Bench::standby();
    bench.step(Event::Claimed);
    bench.step(Event::ImageReady(Some(at(1, 5))));
    let out = bench.step(Event::Loaded(Ok(())));
    (bench, out)
}

fn records(out: &[Command]) -> bool {
    out.iter().any(|c| matches!(c, Command::WriteControl { .. }))
}

#[test]
fn a_claimed_guest_is_loaded_and_neither_recorded_nor_run_before_the_confirmation() {
    let (mut bench, out) = held();
    assert!(matches!(out.as_slice(), [Command::Progress(step)] if step.phase == LOADED), "{out:?}");
    assert!(bench.engine.awaits_confirmation());
    bench.now += Duration::from_secs(20);
    let out = bench.step(Event::Tick);
    assert!(!records(&out) && !out.contains(&Command::Activate), "{out:?}");
    assert_eq!(bench.engine.record().generation, Generation(1));
    // Nothing of the primary is taken meanwhile: the epoch to go on from is fixed.
    assert_eq!(refused(&bench.hello(9, 1)).unwrap().0, RefusedCode::Busy);
    assert!(records(&bench.step(Event::Confirm { proceed: true })));
    assert!(!bench.engine.awaits_confirmation());
    assert!(bench.step(Event::ControlWritten).contains(&Command::Activate));
    // Said twice, it does no more.
    assert_eq!(bench.step(Event::Confirm { proceed: true }), []);
}

#[test]
fn a_claim_that_is_given_up_leaves_the_image_and_the_generation() {
    let (mut bench, _) = held();
    let out = bench.step(Event::Confirm { proceed: false });
    assert!(out.contains(&Command::Discard) && failure(&out).is_some(), "{out:?}");
    assert_eq!(
        (bench.engine.record().role, bench.engine.record().generation),
        (Role::Standby, Generation(1))
    );
    assert!(bench.engine.committed().is_some());
    // The primary may go on.
    bench.step(Event::Discarded(Ok(())));
    assert_eq!(hello_ack(&bench.hello(9, 1)), Some(Some(at(1, 5))));
}

#[test]
fn a_claim_that_nobody_confirms_is_given_up() {
    let (mut bench, _) = held();
    bench.now += Duration::from_secs(61);
    let out = bench.step(Event::Tick);
    assert!(failure(&out).unwrap().reason.contains("nobody confirmed"), "{out:?}");
    assert_eq!(bench.step(Event::Confirm { proceed: true }), []);
    assert_eq!(bench.engine.record().generation, Generation(1));
}

#[test]
fn what_is_recorded_is_not_given_up_any_more() {
    let (mut bench, _) = held();
    bench.step(Event::Confirm { proceed: true });
    assert_eq!(bench.step(Event::Confirm { proceed: false }), []);
    assert!(bench.step(Event::ControlWritten).contains(&Command::Activate));
    assert_eq!(bench.step(Event::Confirm { proceed: false }), []);
    bench.step(Event::Activated(Ok(Activation::default())));
    assert_eq!(bench.engine.state(), GuestState::Promoted);
}

#[test]
fn a_promotion_that_an_operator_asked_for_is_none_of_the_watchdogs() {
    let (mut bench, _) = Bench::loaded();
    for proceed in [true, false] {
        assert_eq!(bench.step(Event::Confirm { proceed }), []);
    }
    assert!(bench.step(Event::ControlWritten).contains(&Command::Activate));
}

#[test]
fn a_claim_of_the_past_is_neither_loaded_nor_confirmed() {
    let mut bench = Bench::standby();
    assert_eq!(bench.engine.take_order(Some(Term(4))), Ok(()));
    let outdated = Outdated { given: Term(3), newest: Term(4) };
    assert_eq!(bench.engine.take_order(Some(Term(3))), Err(outdated));
    assert_eq!(bench.engine.take_order(None), Ok(()), "an operator's");
    assert_eq!(bench.engine.take_order(Some(Term(4))), Ok(()), "it may come twice");
}
