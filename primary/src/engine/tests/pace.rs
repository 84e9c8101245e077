//! How long epochs are where their length is found while they run.

use understudy_proto::pace::EpochGoals;

use super::*;

const STOP: Duration = Duration::from_millis(2);
const TRANSFER: Duration = Duration::from_millis(1);

/// Runs the guest for as long as the engine wants, then takes epoch `number` of it; says how long it ran.
fn epoch(bench: &mut Bench, number: u64) -> Duration {
    let began = bench.now;
    let due = bench.engine.deadline().expect("a protected guest is stopped sooner or later");
    bench.now = due;
    assert_eq!(bench.run(Event::Tick), [Command::Checkpoint(EpochId(number))]);
    bench.now += STOP;
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady]);
    bench.events_of_checkpoint();
    assert_eq!(bench.step(Event::Ready), []);
    bench.now += TRANSFER;
    assert_eq!(bench.step(Event::Measured { stop: Some(STOP), bytes: 4096 }), []);
    assert_released(&bench.run(Event::Acked { session: 7, at: at(number) }), number);
    due - began
}

fn epochs(bench: &mut Bench, numbers: std::ops::Range<u64>) {
    for number in numbers {
        epoch(bench, number);
    }
}

fn with_goals(goals: EpochGoals) -> Bench {
    Bench::protected(Settings { goals: Some(goals), ..settings() })
}

fn about(found: Duration, wanted: Duration) {
    let ratio = found.as_secs_f64() / wanted.as_secs_f64();
    assert!((0.9..1.1).contains(&ratio), "{found:?}, wanted about {wanted:?}");
}

#[test]
fn a_fixed_length_stays_whatever_is_measured() {
    let mut bench = Bench::protected(settings());
    for number in 2..40 {
        let ran = epoch(&mut bench, number);
        // The guest runs on while its last epoch is on the way.
        assert!(ran == EPOCH || ran + TRANSFER == EPOCH, "{ran:?}");
    }
    let view = bench.engine.view();
    assert_eq!((view.epoch, view.pace.as_str()), (EPOCH, ""));
}

#[test]
fn the_length_goes_where_the_goals_are() {
    // A twentieth of the time, by default: 2 of 40 ms.
    let mut bench = with_goals(EpochGoals::default());
    epochs(&mut bench, 2..200);
    about(bench.engine.view().epoch, Duration::from_millis(38));
    assert!(bench.engine.view().pace.contains("stop 2.00 ms"), "{}", bench.engine.view().pace);
    about(epoch(&mut bench, 200) + TRANSFER, Duration::from_millis(38));

    let mut bench = with_goals(EpochGoals { latency_ms: Some(10), ..EpochGoals::default() });
    epochs(&mut bench, 2..200);
    about(bench.engine.view().epoch, Duration::from_millis(7));
}

#[test]
fn a_full_copy_teaches_nothing() {
    let mut bench = with_goals(EpochGoals::default());
    assert_eq!(bench.engine.view().epoch, EPOCH);
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
    // Not captured yet: an acknowledgement now is of something else.
    let measured = Event::Measured { stop: Some(Duration::from_secs(9)), bytes: 1 << 40 };
    for _ in 0..50 {
        assert_eq!(bench.step(measured.clone()), []);
    }
    assert_eq!(bench.engine.view().epoch, EPOCH);
}

#[test]
fn a_goal_for_the_slowdown_holds_while_output_waits() {
    const WAITING: Event = Event::OutputWaiting { pressing: false };
    let ran = |goals| {
        let mut bench = with_goals(goals);
        for number in 2..40 {
            bench.step(WAITING);
            epoch(&mut bench, number);
        }
        bench.step(WAITING);
        epoch(&mut bench, 40) + TRANSFER
    };
    // Twice the checkpoint, as without an autopilot.
    about(ran(EpochGoals::default()), 2 * STOP);
    about(
        ran(EpochGoals { slowdown_permille: Some(100), ..EpochGoals::default() }),
        Duration::from_millis(18),
    );
}
