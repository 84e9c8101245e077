//! What waiting output does to epochs, and what a full copy does for a gate that has lost count.

use super::*;

const WAITING: Event = Event::OutputWaiting { pressing: false };

/// A full copy is captured, and the gate needs the guest to stay stopped for it.
fn held() -> Bench {
    let mut bench = Bench::new(settings());
    let connected = Event::Connected { session: 7, ack: hello(life(1), None) };
    assert_eq!(bench.run(connected), [Command::Arm(EpochId(1))]);
    assert_eq!(bench.step(Event::Armed { stay_stopped: true }), [], "the guest stays stopped");
    bench
}

#[test]
fn waiting_output_ends_the_epoch_but_not_before_the_floor() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(WAITING), []);
    assert_eq!(bench.tick(FLOOR - Duration::from_millis(1)), []);
    assert_eq!(bench.tick(Duration::from_millis(1)), [Command::Checkpoint(EpochId(2))]);
    // What waits since before that stop waits for its commit, not for another stop.
    assert_eq!(bench.step(WAITING), []);
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady]);
    bench.events_of_checkpoint();
    assert_eq!(bench.step(Event::Ready), []);
    assert_released(&bench.run(Event::Acked { session: 7, at: at(2) }), 2);
    assert_eq!(bench.tick(FLOOR), [], "nothing waits: the epoch is long");
    assert_eq!(bench.tick(EPOCH - FLOOR), [Command::Checkpoint(EpochId(3))]);
}

#[test]
fn a_guest_that_is_dear_to_stop_is_stopped_less_often() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
    bench.now += Duration::from_millis(10);
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady]);
    bench.events_of_checkpoint();
    assert_eq!(bench.step(Event::Ready), []);
    assert_released(&bench.run(Event::Acked { session: 7, at: at(2) }), 2);
    assert_eq!(bench.step(WAITING), []);
    assert_eq!(bench.tick(Duration::from_millis(19)), [], "10 ms to stop: 20 ms to run");
    assert_eq!(bench.tick(Duration::from_millis(1)), [Command::Checkpoint(EpochId(3))]);
}

/// A checkpoint that comes when the epoch is over and takes this long, of which the guest is stopped for `stop`.
fn checkpoint(bench: &mut Bench, number: u64, took: Duration, stop: Option<Duration>) {
    bench.now = bench.engine.deadline().expect("a protected guest is stopped sooner or later");
    assert_eq!(bench.run(Event::Tick), [Command::Checkpoint(EpochId(number))]);
    bench.now += took;
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady]);
    bench.events_of_checkpoint();
    assert_eq!(bench.step(Event::Ready), []);
    assert_eq!(bench.step(Event::Measured { stop, bytes: 4096 }), []);
    assert_released(&bench.run(Event::Acked { session: 7, at: at(number) }), number);
}

/// How long it runs now that output waits.
fn runs(bench: &mut Bench) -> Duration {
    assert_eq!(bench.step(WAITING), []);
    bench.engine.deadline().expect("a protected guest is stopped sooner or later") - bench.now
}

#[test]
fn what_a_stop_costs_is_said_by_qemus_clock_and_not_by_one_hiccup() {
    let ms = Duration::from_millis;
    let mut bench = Bench::protected(settings());
    for number in 2..5 {
        // Read for longer than the guest was stopped.
        checkpoint(&mut bench, number, ms(14), Some(ms(10)));
    }
    assert_eq!(runs(&mut bench), ms(20));
    checkpoint(&mut bench, 5, ms(90), Some(ms(80)));
    assert_eq!(runs(&mut bench), ms(20), "once is a hiccup");
    checkpoint(&mut bench, 6, ms(45), Some(ms(40)));
    assert_eq!(runs(&mut bench), ms(80), "twice is what it costs now");
    for number in 7..9 {
        checkpoint(&mut bench, number, ms(30), None);
    }
    assert_eq!(runs(&mut bench), ms(60), "QEMU's events are lost: as long as it took");
}

#[test]
fn pressing_output_ends_the_epoch_at_once_and_one_epoch_stays_in_flight() {
    let mut bench = Bench::in_flight(settings());
    assert_eq!(bench.step(Event::OutputWaiting { pressing: true }), [], "epoch 2 is not acknowledged");
    let commands = bench.run(Event::Acked { session: 7, at: at(2) });
    assert_released(&commands, 2);
    assert_eq!(commands[1..], [Command::Checkpoint(EpochId(3))]);
}

#[test]
fn a_held_guest_runs_when_its_full_copy_is_committed() {
    let mut bench = held();
    let commands = bench.step(Event::Acked { session: 7, at: at(1) });
    assert_released(&commands, 1);
    assert_eq!(
        commands[1..],
        [Command::Start],
        "in this order: nothing new may be sent before the old is out"
    );
}

#[test]
fn a_held_guest_runs_when_the_commit_does_not_come() {
    let mut bench = held();
    assert_eq!(bench.lose(7)[..2], [Command::Forget, Command::Start], "invariant 10");
    let mut bench = held();
    let until = bench.engine.deadline().expect("there is a limit");
    assert_eq!(bench.tick(until - bench.now)[..2], [Command::Forget, Command::Start]);
    let mut bench = held();
    assert_eq!(bench.step(Event::Unprotect)[..2], [Command::Forget, Command::Start]);
}

/// Epoch 2 was acknowledged with so much in the gate; epoch 3 is to be captured.
fn after_an_epoch_that_held(bytes: u64) -> (Bench, Vec<Command>) {
    let mut bench = Bench::in_flight(settings());
    assert_eq!(bench.step(Event::OutputHeld { bytes }), []);
    assert_released(&bench.run(Event::Acked { session: 7, at: at(2) }), 2);
    let commands = bench.tick(EPOCH);
    (bench, commands)
}

/// A guest that is held at the end of epoch 3 for its commit.
fn held_back() -> Bench {
    let (mut bench, commands) = after_an_epoch_that_held(16 << 20);
    assert_eq!(commands, [Command::CheckpointHeld(EpochId(3))]);
    assert_eq!(bench.step(Event::Captured), [], "the guest stays stopped");
    assert_eq!(bench.step(qmp("STOP", json!(null))), []);
    bench
}

#[test]
fn a_guest_that_sends_more_than_commits_can_follow_waits_for_them() {
    assert_eq!(after_an_epoch_that_held((16 << 20) - 1).1, [Command::Checkpoint(EpochId(3))]);
    let mut bench = held_back();
    bench.now += Duration::from_secs(2);
    let commands = bench.run(Event::Acked { session: 7, at: at(3) });
    assert_released(&commands, 3);
    assert_eq!(commands[1..], [Command::Start]);
    // The epoch begins when the guest runs, however long it was held, and what it sends at once is not forgotten.
    assert_eq!(bench.step(WAITING), []);
    assert_eq!(bench.step(qmp("RESUME", json!(null))), []);
    assert_eq!(bench.step(Event::Ready), []);
    assert_eq!(bench.tick(FLOOR - Duration::from_millis(1)), []);
    assert_eq!(
        bench.tick(Duration::from_millis(1)),
        [Command::Checkpoint(EpochId(4))],
        "nothing is held any more"
    );
}

#[test]
fn a_guest_is_not_held_back_for_a_commit_that_does_not_come() {
    let mut bench = held_back();
    assert_eq!(bench.lose(8), []);
    assert_eq!(bench.lose(7)[0], Command::Start, "invariant 10");
    let mut bench = held_back();
    let until = bench.engine.deadline().expect("there is a limit");
    assert_eq!(bench.tick(until - bench.now), [Command::Start], "the epoch may still be committed");
    assert_released(&bench.run(Event::Acked { session: 7, at: at(3) }), 3);
    let mut bench = held_back();
    assert_eq!(bench.step(Event::Unprotect), [Command::Start, Command::Interrupt]);
}

#[test]
fn a_gate_that_fails_leads_to_a_full_copy() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(Event::OutputFailed("no such device".to_owned())), [Command::Disarm]);
    assert_eq!(bench.state(), GuestState::Degraded);
    assert!(bench.engine.view().detail.contains("no such device"), "{:?}", bench.engine.view());
}

#[test]
fn an_acknowledgement_that_waited_for_an_agent_that_stood_still_releases_nothing() {
    let still = Event::StoodStill(Duration::from_secs(9));
    let mut bench = Bench::in_flight(settings());
    let connect = bench.step(still.clone());
    assert!(matches!(connect[..], [Command::Connect { session: 8, .. }]), "{connect:?}");
    assert_eq!(bench.run(Event::Acked { session: 7, at: at(2) }), []);
    // The backup is still one: it says what it has.
    let ack = hello(life(1), Some(2));
    assert_released(&bench.run(Event::Connected { session: 8, ack }), 2);

    let mut bench = Bench::in_flight(settings());
    bench.step(still);
    assert_eq!(bench.run(Event::Acked { session: 7, at: at(2) }), []);
    let commands = bench.step(Event::Refused { session: 8, refused: refusal(RefusedCode::Superseded) });
    assert_eq!(commands[0], Command::PauseGuest, "it runs there since");
    assert!(!commands.iter().any(|command| matches!(command, Command::Release(_))), "{commands:?}");
}

#[test]
fn an_agent_that_stood_still_with_nothing_to_release_goes_on() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(Event::StoodStill(Duration::from_secs(9))), []);
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
    assert_eq!(bench.step(Event::StoodStill(Duration::from_secs(9))), [], "not captured yet");
}
