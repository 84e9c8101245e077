//! The engine against tables of events.

mod handover;
mod output;
mod pace;
mod random;

use serde_json::json;
use understudy_libvirt::{Lifecycle, QmpEvent};
use understudy_proto::ids::Generation;
use understudy_proto::negotiate::{self, Offer};
use understudy_proto::rpc::admin::GuestState;
use understudy_proto::rpc::epoch::{
    EpochRef, GoodbyeReason, HelloAck, Refused, RefusedCode, Reject, RejectCode,
};

use super::*;

const EPOCH: Duration = Duration::from_millis(100);
const FLOOR: Duration = Duration::from_millis(4);
const GENERATION: Generation = Generation(3);

fn settings() -> Settings {
    Settings {
        generation: GENERATION,
        epoch: EPOCH,
        goals: None,
        floor: FLOOR,
        attended: false,
        first_session: 7,
        peer: "beta".to_owned(),
    }
}

fn life(n: u128) -> Incarnation {
    Incarnation(uuid::Uuid::from_u128(n))
}

fn hello(incarnation: Incarnation, last: Option<u64>) -> HelloAck {
    HelloAck {
        agreement: negotiate::select(&Offer::ours(), &Offer::ours()).unwrap(),
        incarnation,
        last_committed: last.map(at),
        host: "beta".to_owned(),
        qemu_version: None,
        libvirt_version: None,
    }
}

fn at(epoch: u64) -> EpochRef {
    EpochRef { generation: GENERATION, epoch: EpochId(epoch) }
}

fn qmp(name: &str, data: serde_json::Value) -> Event {
    Event::Domain(DomainEvent::Qmp(QmpEvent { name: name.to_owned(), timestamp: Duration::ZERO, data }))
}

fn lifecycle(kind: Lifecycle, detail: &str) -> Event {
    Event::Domain(DomainEvent::Lifecycle { kind, detail: detail.to_owned() })
}

fn broken(reason: &str) -> CaptureFailure {
    CaptureFailure { reason: reason.to_owned(), left_stopped: false, gone: false }
}

/// An engine with a clock that only the test moves.
struct Bench {
    engine: Engine,
    now: Instant,
}

impl Bench {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        let mut bench = Self { engine: Engine::new(settings, now), now };
        let begun = bench.step(Event::Tick);
        assert_eq!(begun, [Command::Connect { session: 7, after: Duration::ZERO }]);
        bench
    }

    fn step(&mut self, event: Event) -> Vec<Command> {
        self.engine.step(event, self.now)
    }

    /// Steps and answers a question about the guest with `running`, if one is asked.
    fn run(&mut self, event: Event) -> Vec<Command> {
        let mut commands = self.step(event);
        if let [.., Command::AskQemu(question)] = commands[..] {
            commands.pop();
            commands.extend(self.step(Event::Answer(question, Some(RunState::Running))));
        }
        commands
    }

    fn tick(&mut self, later: Duration) -> Vec<Command> {
        self.now += later;
        self.run(Event::Tick)
    }

    fn state(&self) -> GuestState {
        self.engine.view().state
    }

    /// Epoch 1 is committed, the guest runs, capture is ready.
    fn protected(settings: Settings) -> Self {
        let mut bench = Self::new(settings);
        let connected = Event::Connected { session: 7, ack: hello(life(1), None) };
        assert_eq!(bench.run(connected), [Command::Arm(EpochId(1))]);
        assert_eq!(bench.state(), GuestState::Seeding);
        assert_eq!(bench.step(Event::Armed { stay_stopped: false }), [Command::Start]);
        bench.step(qmp("MIGRATION", json!({"status": "colo"})));
        assert_eq!(bench.run(Event::Ready), []);
        assert_released(&bench.run(Event::Acked { session: 7, at: at(1) }), 1);
        assert_eq!(bench.state(), GuestState::Protected);
        bench
    }

    /// Epoch 2 is captured and not acknowledged.
    fn in_flight(settings: Settings) -> Self {
        let mut bench = Self::protected(settings);
        assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
        assert_eq!(bench.step(Event::Captured), [Command::WaitReady]);
        bench.events_of_checkpoint();
        assert_eq!(bench.step(Event::Ready), []);
        bench
    }

    fn events_of_checkpoint(&mut self) {
        assert_eq!(self.step(qmp("STOP", json!(null))), []);
        assert_eq!(self.step(qmp("RESUME", json!(null))), []);
    }

    fn lose(&mut self, session: u64) -> Vec<Command> {
        self.step(Event::Disconnected { session, reason: "cable cut".to_owned() })
    }
}

fn assert_released(commands: &[Command], epoch: u64) {
    assert!(
        matches!(commands.first(), Some(Command::Release(c)) if c.epoch() == EpochId(epoch)),
        "{commands:?}"
    );
}

fn outcome(commands: &[Command]) -> (Option<GoodbyeReason>, OutcomeKind) {
    match commands.last() {
        Some(Command::Finish { goodbye, outcome }) => (*goodbye, outcome.kind),
        _ => panic!("not finished: {commands:?}"),
    }
}

#[test]
fn an_epoch_lasts_its_time_and_the_next_waits_for_its_acknowledgement() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.engine.deadline(), Some(bench.engine.next_stop()));
    let mut bench = {
        assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
        bench
    };
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady]);
    bench.events_of_checkpoint();
    assert_eq!(bench.step(Event::Ready), []);
    assert_eq!(bench.tick(EPOCH * 10), [], "epoch 2 is still in flight");
    let commands = bench.run(Event::Acked { session: 7, at: at(2) });
    assert_released(&commands, 2);
    assert_eq!(commands[1..], [Command::Checkpoint(EpochId(3))], "its time was over long ago");
}

#[test]
fn the_guest_is_not_stopped_before_its_own_stop_is_accounted_for() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady]);
    assert_eq!(bench.step(Event::Ready), []);
    assert_released(&bench.run(Event::Acked { session: 7, at: at(2) }), 2);
    assert_eq!(bench.tick(EPOCH), [], "STOP and RESUME of epoch 2 are to come");
    assert_eq!(bench.step(qmp("STOP", json!(null))), []);
    assert_eq!(bench.step(qmp("RESUME", json!(null))), [Command::Checkpoint(EpochId(3))]);
}

#[test]
fn a_suspended_guest_waits_and_a_resumed_one_goes_on() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(qmp("STOP", json!(null))), []);
    assert_eq!(bench.tick(EPOCH), []);
    assert_eq!(bench.state(), GuestState::Protected);
    assert!(bench.engine.view().detail.contains("suspended"), "{:?}", bench.engine.view());
    assert_eq!(bench.engine.deadline(), None, "nothing to do but wait");
    assert_eq!(bench.run(qmp("RESUME", json!(null))), [Command::Checkpoint(EpochId(2))]);
}

#[test]
fn a_reset_does_not_end_protection() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.run(qmp("RESET", json!({"guest": true}))), []);
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
}

#[test]
fn qemu_is_asked_again_after_a_while_when_the_guest_does_not_run() {
    let mut bench = Bench::protected(settings());
    let commands = bench.step(qmp("BLOCK_IO_ERROR", json!({"action": "stop"})));
    let [Command::AskQemu(question)] = commands[..] else { panic!("{commands:?}") };
    assert_eq!(bench.step(Event::Answer(question, Some(RunState::IoError))), []);
    assert_eq!(bench.engine.deadline(), Some(bench.now + ASK_INTERVAL));
    assert!(bench.engine.view().detail.contains("io-error"));
    assert_eq!(bench.tick(ASK_INTERVAL), [Command::Checkpoint(EpochId(2))], "running again");
}

#[test]
fn a_lost_backup_holds_the_next_checkpoint_and_the_guest_runs_on() {
    let mut bench = Bench::protected(settings());
    let commands = bench.lose(7);
    assert_eq!(commands, [Command::Connect { session: 8, after: Duration::from_millis(100) }]);
    assert_eq!(bench.state(), GuestState::Degraded);
    assert!(bench.engine.view().detail.contains("cable cut"));
    assert_eq!(bench.tick(EPOCH * 10), []);
    let back = Event::Connected { session: 8, ack: hello(life(1), Some(1)) };
    assert_eq!(bench.run(back), [Command::Checkpoint(EpochId(2))]);
    assert_eq!(bench.state(), GuestState::Protected);
}

#[test]
fn attempts_to_connect_come_slower_and_slower() {
    let mut bench = Bench::protected(settings());
    let waits: Vec<u64> = (7..16)
        .map(|session| match bench.lose(session)[..] {
            [Command::Connect { session: next, after }] if next == session + 1 => {
                u64::try_from(after.as_millis()).unwrap()
            }
            ref other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    assert_eq!(bench.lose(3), [], "a stream of long ago");
}

/// What the backup holds after an interruption, and what follows from it, with epoch 2 captured and in flight.
#[test]
fn resuming_with_an_epoch_in_flight() {
    enum Then {
        Resend,
        Released,
        FullCopy,
    }
    for (who, last, then) in [
        (life(1), Some(1), Then::Resend),
        (life(1), Some(2), Then::Released),
        (life(1), None, Then::FullCopy),
        (life(1), Some(9), Then::FullCopy),
        (life(2), Some(1), Then::FullCopy),
        (life(2), Some(2), Then::FullCopy),
        (life(2), None, Then::FullCopy),
    ] {
        let mut bench = Bench::in_flight(settings());
        bench.lose(7);
        let commands = bench.run(Event::Connected { session: 8, ack: hello(who, last) });
        match then {
            Then::Resend => assert_eq!(commands, [Command::Resend]),
            Then::Released => assert_released(&commands, 2),
            Then::FullCopy => {
                assert_eq!(commands, [Command::Forget, Command::Disarm], "{who} {last:?}");
                assert_eq!(bench.state(), GuestState::Degraded);
                let next = EpochId(last.unwrap_or(0).max(2) + 1);
                assert_eq!(bench.run(Event::Disarmed(Ok(()))), [Command::Arm(next)], "{who} {last:?}");
            }
        }
    }
}

#[test]
fn a_backup_that_was_restarted_gets_a_full_copy() {
    let mut bench = Bench::protected(settings());
    bench.lose(7);
    let commands = bench.run(Event::Connected { session: 8, ack: hello(life(2), None) });
    assert_eq!(commands, [Command::Disarm]);
    assert_eq!(bench.tick(EPOCH * 3), [], "no checkpoint until then");
    assert_eq!(bench.run(Event::Disarmed(Ok(()))), [Command::Arm(EpochId(2))]);
    assert_eq!(bench.step(Event::Armed { stay_stopped: false }), [Command::Start]);
    assert_eq!(bench.run(Event::Ready), []);
    assert_released(&bench.run(Event::Acked { session: 8, at: at(2) }), 2);
    assert_eq!(bench.state(), GuestState::Protected);
}

#[test]
fn a_stream_lost_during_the_full_copy_begins_it_anew() {
    let mut bench = Bench::new(settings());
    bench.run(Event::Connected { session: 7, ack: hello(life(1), None) });
    let commands = bench.lose(7);
    assert!(commands.contains(&Command::Forget) && commands.contains(&Command::Interrupt), "{commands:?}");
    assert_eq!(bench.step(Event::CaptureFailed(broken("interrupted"))), [Command::Disarm]);
    assert_eq!(bench.step(Event::Disarmed(Ok(()))), []);
    let back = Event::Connected { session: 8, ack: hello(life(1), None) };
    assert_eq!(bench.run(back), [Command::Arm(EpochId(2))]);
}

#[test]
fn a_rejected_epoch_ends_in_a_full_copy_after_a_pause() {
    let mut bench = Bench::in_flight(settings());
    let reject = Reject { at: at(2), code: RejectCode::Corrupt, text: "digest differs".to_owned() };
    assert_eq!(bench.step(Event::Rejected { session: 7, reject }), [Command::Forget, Command::Disarm]);
    assert!(bench.engine.view().detail.contains("digest differs"));
    assert_eq!(bench.run(Event::Disarmed(Ok(()))), []);
    assert_eq!(bench.engine.deadline(), Some(bench.now + ARM_BACKOFF));
    assert_eq!(bench.tick(ARM_BACKOFF), [Command::Arm(EpochId(3))]);
}

#[test]
fn acknowledgements_that_fit_nothing_commit_nothing() {
    for wrong in [at(3), EpochRef { generation: Generation(2), epoch: EpochId(2) }] {
        let mut bench = Bench::in_flight(settings());
        let commands = bench.step(Event::Acked { session: 7, at: wrong });
        assert_eq!(commands, [Command::Forget, Command::Disarm], "{wrong:?}");
    }
    let mut bench = Bench::in_flight(settings());
    assert_eq!(bench.step(Event::Acked { session: 7, at: at(1) }), [], "late, of an epoch before");
    assert_eq!(bench.step(Event::Acked { session: 6, at: at(2) }), [], "of another stream");
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
    let early = bench.step(Event::Acked { session: 7, at: at(2) });
    assert_eq!(early, [Command::Forget], "before its last byte; the checkpoint under way runs to its end");
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady, Command::Interrupt]);
}

#[test]
fn a_failed_capture_is_repeated_with_growing_pauses() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
    assert_eq!(bench.step(Event::CaptureFailed(broken("silent"))), [Command::Disarm, Command::Forget]);
    assert_eq!(bench.run(Event::Disarmed(Ok(()))), []);
    assert_eq!(bench.tick(Duration::from_secs(1)), [Command::Arm(EpochId(3))]);
    assert_eq!(bench.step(Event::CaptureFailed(broken("silent"))), [Command::Disarm, Command::Forget]);
    assert_eq!(bench.run(Event::Disarmed(Ok(()))), []);
    assert_eq!(bench.tick(Duration::from_secs(1)), []);
    assert_eq!(bench.tick(Duration::from_secs(1)), [Command::Arm(EpochId(4))]);
}

#[test]
fn a_guest_left_stopped_is_rescued_until_it_runs() {
    let mut bench = Bench::protected(settings());
    bench.tick(EPOCH);
    let left = CaptureFailure { reason: "no way out".to_owned(), left_stopped: true, gone: false };
    let commands = bench.step(Event::CaptureFailed(left.clone()));
    assert_eq!(commands, [Command::Forget, Command::Rescue]);
    assert_eq!(bench.step(Event::Rescued(Err(left))), []);
    assert_eq!(bench.engine.deadline(), Some(bench.now + REPEAT_INTERVAL));
    assert_eq!(bench.tick(REPEAT_INTERVAL), [Command::Rescue]);
    assert_eq!(bench.run(Event::Rescued(Ok(()))), [Command::Arm(EpochId(3))]);
}

#[test]
fn an_attended_protection_fails_instead_of_trying_again() {
    let mut bench = Bench::new(Settings { attended: true, ..settings() });
    bench.run(Event::Connected { session: 7, ack: hello(life(1), None) });
    let failed = bench.step(Event::CaptureFailed(broken("QEMU 10.1 cannot be captured")));
    assert_eq!(failed, [Command::Disarm, Command::Forget]);
    let end = bench.step(Event::Disarmed(Ok(())));
    assert_eq!(outcome(&end), (Some(GoodbyeReason::Unprotected), OutcomeKind::Failed));
    assert!(bench.engine.view().detail.contains("10.1"));

    let mut bench = Bench::new(Settings { attended: true, ..settings() });
    let refused = refusal(RefusedCode::NoMemory);
    assert_eq!(outcome(&bench.step(Event::Refused { session: 7, refused })).1, OutcomeKind::Failed);
    let mut bench = Bench::protected(Settings { attended: true, ..settings() });
    let refused = refusal(RefusedCode::NoMemory);
    let again = bench.step(Event::Refused { session: 7, refused });
    assert!(matches!(again[..], [Command::Connect { session: 8, .. }]), "{again:?}");
}

#[test]
fn an_attended_protection_waits_a_little_for_a_backup_that_is_busy() {
    let mut bench = Bench::new(Settings { attended: true, ..settings() });
    for session in 7..12 {
        let commands = bench.step(Event::Refused { session, refused: refusal(RefusedCode::Busy) });
        assert!(matches!(commands[..], [Command::Connect { .. }]), "{commands:?}");
    }
    let last = bench.step(Event::Refused { session: 12, refused: refusal(RefusedCode::Busy) });
    assert_eq!(outcome(&last).1, OutcomeKind::Failed);
}

fn refusal(code: RefusedCode) -> Refused {
    Refused { code, text: "why".to_owned(), remedy: String::new(), generation: None }
}

#[test]
fn a_superseded_guest_is_paused_before_and_after_capture_ends() {
    let mut bench = Bench::in_flight(settings());
    let refused = refusal(RefusedCode::Superseded);
    let commands = bench.step(Event::Refused { session: 7, refused });
    assert_eq!(commands, [Command::PauseGuest, Command::Disarm]);
    assert_eq!(bench.step(Event::Paused(Ok(()))), []);
    let again = bench.step(Event::Disarmed(Ok(())));
    assert_eq!(again, [Command::Forget, Command::PauseGuest], "COLO's end starts the guest");
    assert_eq!(bench.step(Event::Paused(Err("libvirt is away".to_owned()))), []);
    assert_eq!(bench.tick(REPEAT_INTERVAL), [Command::PauseGuest]);
    assert_eq!(outcome(&bench.step(Event::Paused(Ok(())))), (None, OutcomeKind::Superseded));
    assert_eq!(bench.state(), GuestState::Superseded);
}

#[test]
fn a_guest_superseded_within_a_checkpoint_is_paused_after_it() {
    let mut bench = Bench::protected(settings());
    bench.tick(EPOCH);
    assert_eq!(bench.step(Event::Refused { session: 7, refused: refusal(RefusedCode::Superseded) }), []);
    assert_eq!(bench.step(Event::Captured), [Command::WaitReady, Command::PauseGuest, Command::Interrupt]);
}

/// How a guest can end, and what the backup hears of it.
#[test]
fn ends_of_the_guest() {
    for (event, goodbye) in [
        (lifecycle(Lifecycle::Stopped, "shutdown"), Some(GoodbyeReason::Ended)),
        (lifecycle(Lifecycle::Stopped, "destroyed"), Some(GoodbyeReason::Ended)),
        (lifecycle(Lifecycle::Stopped, "saved"), Some(GoodbyeReason::Ended)),
        (lifecycle(Lifecycle::Stopped, "migrated"), Some(GoodbyeReason::Ended)),
        (qmp("SHUTDOWN", json!({"reason": "host-signal"})), Some(GoodbyeReason::Ended)),
        (lifecycle(Lifecycle::Stopped, "crashed"), None),
        (lifecycle(Lifecycle::Stopped, "failed"), None),
        (lifecycle(Lifecycle::Crashed, "panicked"), None),
    ] {
        let text = format!("{event:?}");
        let mut bench = Bench::protected(settings());
        assert_eq!(bench.step(event), [Command::Disarm], "{text}");
        let (kind, state) = match goodbye {
            Some(_) => (OutcomeKind::Ended, GuestState::Ended),
            None => (OutcomeKind::Crashed, GuestState::Crashed),
        };
        assert_eq!(outcome(&bench.step(Event::Disarmed(Ok(())))), (goodbye, kind), "{text}");
        assert_eq!(bench.state(), state);
    }
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(lifecycle(Lifecycle::Undefined, "removed")), [], "it runs on");
    assert_eq!(bench.tick(EPOCH), [Command::Checkpoint(EpochId(2))]);
}

#[test]
fn a_guest_that_ends_within_a_checkpoint() {
    let mut bench = Bench::protected(settings());
    bench.tick(EPOCH);
    assert_eq!(bench.step(lifecycle(Lifecycle::Stopped, "destroyed")), []);
    let gone = CaptureFailure { reason: "closed".to_owned(), left_stopped: false, gone: true };
    assert_eq!(bench.step(Event::CaptureFailed(gone.clone())), [Command::Disarm, Command::Forget]);
    let end = bench.step(Event::Disarmed(Err(gone)));
    assert_eq!(outcome(&end), (Some(GoodbyeReason::Ended), OutcomeKind::Ended));
}

#[test]
fn somebody_elses_migration_ends_protection() {
    let mut bench = Bench::protected(settings());
    let commands = bench.step(qmp("MIGRATION", json!({"status": "setup"})));
    assert_eq!(commands, [Command::Disarm]);
    let end = bench.run(Event::Disarmed(Ok(())));
    assert_eq!(outcome(&end), (Some(GoodbyeReason::Unprotected), OutcomeKind::Failed));
    let mut bench = Bench::new(settings());
    bench.run(Event::Connected { session: 7, ack: hello(life(1), None) });
    assert_eq!(bench.step(qmp("MIGRATION", json!({"status": "setup"}))), [], "that is our own");
}

/// Invariant 18.
#[test]
fn the_backup_keeps_its_copy_of_a_guest_that_dies_while_its_protection_ends() {
    let crashed = || lifecycle(Lifecycle::Stopped, "failed");
    let ways = [Event::Unprotect, qmp("MIGRATION", json!({"status": "setup"}))];
    for way in ways {
        // Before capture has ended, ...
        let mut bench = Bench::protected(settings());
        assert_eq!(bench.step(way.clone()), [Command::Disarm]);
        assert_eq!(bench.step(crashed()), []);
        let end = bench.step(Event::Disarmed(Ok(())));
        assert_eq!(outcome(&end), (None, OutcomeKind::Crashed), "{way:?}");

        // ... and when that was the first sign of it: nothing is said before QEMU has answered.
        let mut bench = Bench::protected(settings());
        bench.step(way.clone());
        let commands = bench.step(Event::Disarmed(Err(broken("the monitor is gone"))));
        assert_eq!(commands, [Command::Rescue], "{way:?}");
        let gone = CaptureFailure { gone: true, ..broken("gone") };
        let commands = bench.step(Event::Rescued(Err(gone)));
        let [Command::AskQemu(question)] = commands[..] else { panic!("{way:?}: {commands:?}") };
        assert_eq!(bench.step(Event::Answer(question, None)), []);
        let commands = bench.step(Event::Tick);
        assert_eq!(commands, [], "it is asked again, but not at once");
        assert_eq!(outcome(&bench.step(crashed())), (None, OutcomeKind::Crashed), "{way:?}");

        // Of one that is neither dead nor answers nothing is known.
        let mut bench = Bench::protected(settings());
        bench.step(way);
        let mut commands = bench.step(Event::Disarmed(Ok(())));
        let began = bench.now;
        let end = loop {
            match commands[..] {
                [] => {}
                [Command::AskQemu(question)] => {
                    assert_eq!(bench.step(Event::Answer(question, None)), []);
                }
                _ => break commands,
            }
            bench.now = bench.engine.deadline().expect("it waits for something");
            commands = bench.step(Event::Tick);
        };
        assert_eq!(outcome(&end).0, None);
        assert_eq!(bench.now - began, Duration::from_secs(10));
        assert!(
            bench.engine.view().detail.contains("beta keeps the last epoch"),
            "{:?}",
            bench.engine.view()
        );
    }
}

#[test]
fn a_guest_that_is_shut_down_while_its_protection_ends_needs_no_copy() {
    let mut bench = Bench::protected(settings());
    bench.step(Event::Unprotect);
    assert_eq!(bench.step(lifecycle(Lifecycle::Stopped, "destroyed")), []);
    let end = bench.step(Event::Disarmed(Ok(())));
    assert_eq!(outcome(&end), (Some(GoodbyeReason::Unprotected), OutcomeKind::Unprotected));
}

#[test]
fn unprotect_and_the_end_of_the_agent() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(Event::Unprotect), [Command::Disarm]);
    let end = bench.run(Event::Disarmed(Ok(())));
    assert_eq!(outcome(&end), (Some(GoodbyeReason::Unprotected), OutcomeKind::Unprotected));
    assert_eq!(bench.step(Event::Unprotect), [], "nothing comes after the end");

    let mut bench = Bench::protected(settings());
    bench.step(Event::Shutdown);
    let end = bench.step(Event::Disarmed(Ok(())));
    assert_eq!(outcome(&end), (None, OutcomeKind::AgentStopped), "the backup keeps what it has");

    let mut bench = Bench::protected(settings());
    bench.lose(7);
    bench.step(Event::Unprotect);
    let end = bench.run(Event::Disarmed(Ok(())));
    assert_eq!(outcome(&end).0, None);
    assert!(bench.engine.view().detail.contains("beta could not be told"), "{:?}", bench.engine.view());
}

#[test]
fn another_length_of_epochs_counts_at_once() {
    let mut bench = Bench::protected(settings());
    assert_eq!(bench.step(Event::Pace { epoch: EPOCH * 3, goals: None }), []);
    assert_eq!(bench.tick(EPOCH), []);
    assert_eq!(bench.tick(EPOCH * 2), [Command::Checkpoint(EpochId(2))]);
}

#[test]
fn events_that_stop_coming_are_subscribed_anew() {
    let mut bench = Bench::protected(settings());
    let closed = Event::Domain(DomainEvent::ConnectionClosed { reason: "restart".to_owned() });
    assert_eq!(bench.step(closed), [Command::Resubscribe]);
    assert_eq!(bench.tick(EPOCH), [], "nothing is known of the guest");
    assert_eq!(bench.run(Event::Subscribed), [Command::Checkpoint(EpochId(2))]);
}

#[test]
fn a_question_is_worthless_after_an_event() {
    let mut bench = Bench::protected(settings());
    bench.now += EPOCH;
    let commands = bench.step(qmp("RESET", json!(null)));
    let [Command::AskQemu(question)] = commands[..] else { panic!("{commands:?}") };
    assert_eq!(bench.step(qmp("STOP", json!(null))), []);
    assert_eq!(bench.step(Event::Answer(question, Some(RunState::Running))), [], "it was stopped since");
}
