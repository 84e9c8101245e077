//! A guest that stands still for the other host.

use super::*;

/// It stands still behind the commit of an epoch that ended at once.
fn handed_over() -> Bench {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(Event::HandOver), [Command::CheckpointHeld(EpochId(2))]);
    assert_eq!(bench.step(Event::Captured), []);
    assert_eq!(bench.engine.view().handed_over, None, "nothing is committed yet");
    assert_released(&bench.step(Event::Acked { session: 7, at: at(2) }), 2);
    assert_eq!(bench.engine.view().handed_over, Some(EpochId(2)));
    bench
}

#[test]
fn nothing_lets_it_run_but_the_way_back() {
    let mut bench = handed_over();
    // The other host has claimed the guest and refuses streams.
    let lost = Event::Disconnected { session: 7, reason: "closed".to_owned() };
    assert!(matches!(bench.step(lost)[..], [Command::Connect { session: 8, .. }]));
    let refused = Event::Refused { session: 8, refused: refusal(RefusedCode::Busy) };
    assert!(matches!(bench.step(refused)[..], [Command::Connect { session: 9, .. }]));
    assert_eq!(bench.tick(Duration::from_secs(15)), []);
    assert_eq!(bench.engine.view().handed_over, Some(EpochId(2)));
    assert_eq!(bench.step(Event::TakeBack), [Command::Start]);
    assert_eq!(bench.engine.view().handed_over, None);
}

#[test]
fn it_runs_on_when_nobody_takes_it() {
    let mut bench = handed_over();
    assert_eq!(bench.tick(Duration::from_secs(19)), []);
    assert_eq!(bench.tick(Duration::from_secs(2)), [Command::Start]);
    bench.events_of_checkpoint();
    bench.run(Event::Ready);
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(3))], "protection goes on");
}

#[test]
fn an_epoch_in_flight_is_waited_for() {
    let mut bench = Bench::in_flight(settings());
    assert_eq!(bench.step(Event::HandOver), []);
    bench.run(Event::Ready);
    let committed = bench.run(Event::Acked { session: 7, at: at(2) });
    assert!(committed.contains(&Command::CheckpointHeld(EpochId(3))), "{committed:?}");
}

#[test]
fn unprotecting_lets_it_run() {
    let mut bench = handed_over();
    assert!(bench.step(Event::Unprotect).contains(&Command::Start));
}
