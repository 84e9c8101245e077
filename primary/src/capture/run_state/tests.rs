use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn qmp(name: &str) -> DomainEvent {
    qmp_with(name, Value::Null)
}

fn qmp_with(name: &str, data: Value) -> DomainEvent {
    DomainEvent::Qmp(QmpEvent { name: name.into(), timestamp: Duration::ZERO, data })
}

fn running() -> RunTracker {
    let mut tracker = RunTracker::new();
    assert!(answer(&mut tracker, RunState::Running));
    assert_eq!(tracker.verdict(), Verdict::Yes);
    tracker
}

/// Answers the tracker's question; false if it has none.
fn answer(tracker: &mut RunTracker, state: RunState) -> bool {
    let Verdict::AskQemu(question) = tracker.verdict() else { return false };
    tracker.answer(question, &state);
    true
}

fn asks(tracker: &RunTracker) -> bool {
    matches!(tracker.verdict(), Verdict::AskQemu(_))
}

#[test]
fn nothing_is_allowed_before_qemu_was_asked() {
    let mut tracker = RunTracker::new();
    for state in [RunState::Paused, RunState::IoError, RunState::Colo, RunState::Other("new".into())] {
        assert!(answer(&mut tracker, state));
        assert!(asks(&tracker));
    }
    assert!(answer(&mut tracker, RunState::Running));
    assert_eq!(tracker.verdict(), Verdict::Yes);
}

#[test]
fn own_checkpoints_wait_for_their_own_two_events() {
    let mut tracker = running();
    for _ in 0..3 {
        tracker.reply_sent();
        assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::OwnCheckpoint));
        tracker.checkpoint_done();
        assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::OwnCheckpoint));
        tracker.event(&qmp("STOP"));
        assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::OwnCheckpoint));
        tracker.event(&qmp("RESUME"));
        assert_eq!(tracker.verdict(), Verdict::Yes);
    }
}

#[test]
fn an_operators_suspend_holds_until_resume_and_a_look() {
    let mut tracker = running();
    tracker.reply_sent();
    tracker.checkpoint_done();
    for name in ["STOP", "RESUME", "STOP"] {
        tracker.event(&qmp(name));
    }
    assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::StoppedByOthers));
    tracker.event(&qmp("RESUME"));
    assert!(asks(&tracker));
    assert!(answer(&mut tracker, RunState::Running));
    assert_eq!(tracker.verdict(), Verdict::Yes);
}

#[test]
fn an_answer_from_before_the_last_event_is_worthless() {
    let mut tracker = RunTracker::new();
    let Verdict::AskQemu(question) = tracker.verdict() else { panic!() };
    tracker.event(&qmp("STOP"));
    tracker.answer(question, &RunState::Running);
    assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::StoppedByOthers));
    tracker.event(&qmp("RESUME"));
    tracker.answer(question, &RunState::Running);
    assert!(asks(&tracker));
}

#[test]
fn unusual_events_and_what_they_ask_for() {
    let panic = json!({"action": "pause"});
    for (event, wanted) in [
        (qmp("RESET"), None),
        (qmp("BLOCK_IO_ERROR"), None),
        (qmp_with("GUEST_PANICKED", panic), None),
        (qmp("COLO_EXIT"), None),
        (DomainEvent::Lost { events: 3 }, None),
        (qmp("SUSPEND"), Some(WaitReason::Asleep)),
        (
            qmp_with("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"})),
            Some(WaitReason::ShutDown),
        ),
        (DomainEvent::ConnectionClosed { reason: "eof".into() }, Some(WaitReason::NoEvents)),
    ] {
        let mut tracker = running();
        tracker.event(&event);
        match wanted {
            None => assert!(asks(&tracker), "{event:?}"),
            Some(reason) => assert_eq!(tracker.verdict(), Verdict::Wait(reason), "{event:?}"),
        }
    }
}

#[test]
fn ordinary_events_change_nothing() {
    for event in [
        qmp("POWERDOWN"),
        qmp("MIGRATION_PASS"),
        qmp("RTC_CHANGE"),
        qmp("SOMETHING_NEW"),
        DomainEvent::Lifecycle { kind: Lifecycle::Suspended, detail: "paused".into() },
        DomainEvent::Lifecycle { kind: Lifecycle::Resumed, detail: "unpaused".into() },
        DomainEvent::Lifecycle { kind: Lifecycle::Undefined, detail: "removed".into() },
    ] {
        let mut tracker = running();
        tracker.event(&event);
        assert_eq!(tracker.verdict(), Verdict::Yes, "{event:?}");
    }
}

#[test]
fn ends() {
    for (event, wanted) in [
        (
            qmp_with("SHUTDOWN", json!({"guest": false, "reason": "host-signal"})),
            EndReason::QemuQuits { cause: "host-signal".into() },
        ),
        (
            DomainEvent::Lifecycle { kind: Lifecycle::Stopped, detail: "destroyed".into() },
            EndReason::Stopped { detail: "destroyed".into() },
        ),
        (DomainEvent::Lifecycle { kind: Lifecycle::Crashed, detail: "panicked".into() }, EndReason::Panicked),
    ] {
        let mut tracker = running();
        tracker.event(&event);
        tracker.event(&qmp("RESUME"));
        tracker.started();
        assert_eq!(tracker.verdict(), Verdict::Ended(wanted));
    }
    let mut tracker = running();
    tracker.event(&qmp("GUEST_PANICKED"));
    assert!(answer(&mut tracker, RunState::GuestPanicked));
    assert_eq!(tracker.verdict(), Verdict::Ended(EndReason::Panicked));
}

#[test]
fn a_reboot_through_libvirt_shuts_down_resets_and_resumes() {
    let mut tracker = running();
    tracker.event(&qmp("POWERDOWN"));
    tracker.event(&qmp_with("SHUTDOWN", json!({"reason": "guest-shutdown"})));
    tracker.event(&qmp("STOP"));
    assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::ShutDown));
    tracker.event(&qmp_with("RESET", json!({"reason": "host-qmp-system-reset"})));
    assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::StoppedByOthers));
    tracker.event(&qmp("RESUME"));
    assert!(answer(&mut tracker, RunState::Running));
    assert_eq!(tracker.verdict(), Verdict::Yes);
}

#[test]
fn sleep_ends_with_wakeup() {
    let mut tracker = running();
    tracker.event(&qmp("SUSPEND"));
    tracker.event(&qmp("WAKEUP"));
    assert!(answer(&mut tracker, RunState::Suspended));
    assert!(asks(&tracker));
    assert!(answer(&mut tracker, RunState::Running));
    assert_eq!(tracker.verdict(), Verdict::Yes);
}

#[test]
fn events_after_a_gap_in_the_subscription() {
    let mut tracker = running();
    tracker.event(&DomainEvent::ConnectionClosed { reason: "eof".into() });
    assert!(!answer(&mut tracker, RunState::Running));
    tracker.subscribed();
    assert!(answer(&mut tracker, RunState::Running));
    assert_eq!(tracker.verdict(), Verdict::Yes);
}

#[test]
fn events_of_the_full_copy_that_come_late_settle_by_themselves() {
    let mut tracker = running();
    tracker.started();
    assert!(answer(&mut tracker, RunState::Running));
    tracker.event(&qmp("STOP"));
    assert_eq!(tracker.verdict(), Verdict::Wait(WaitReason::StoppedByOthers));
    tracker.event(&qmp("RESUME"));
    assert!(answer(&mut tracker, RunState::Running));
    assert_eq!(tracker.verdict(), Verdict::Yes);
}

/// What can happen around a tracker, in any order.
#[derive(Debug, Clone, Copy)]
enum Step {
    OperatorStops,
    OperatorResumes,
    DiskFails,
    GuestResets,
    /// REPLY, if allowed.
    Reply,
    /// QEMU takes the REPLY.
    QemuStops,
    /// QEMU takes LOADED.
    QemuResumes,
    Deliver,
    /// `query-status`, if wanted: QEMU's answer is made now...
    Ask,
    /// ...and arrives now.
    Answer,
}

/// QEMU and the agent around the tracker.
struct World {
    tracker: RunTracker,
    state: RunState,
    /// Events on their way; true if they tell of a stop not made by a checkpoint.
    events: VecDeque<(DomainEvent, bool)>,
    answer: Option<(Question, RunState)>,
    reply: bool,
    in_checkpoint: bool,
}

impl World {
    fn emit(&mut self, name: &str, foreign_stop: bool) {
        self.events.push_back((qmp(name), foreign_stop));
    }

    fn deliver(&mut self) {
        if let Some((event, _)) = self.events.pop_front() {
            self.tracker.event(&event);
        }
    }

    fn step(&mut self, step: Step) {
        let runs = self.state == RunState::Running;
        match step {
            Step::OperatorStops if runs => {
                self.state = RunState::Paused;
                self.emit("STOP", true);
            }
            Step::OperatorResumes if runs => {
                self.emit("STOP", false);
                self.emit("RESUME", false);
            }
            Step::OperatorResumes if !self.in_checkpoint => {
                self.state = RunState::Running;
                self.emit("RESUME", false);
            }
            Step::DiskFails if runs => {
                self.state = RunState::IoError;
                self.emit("BLOCK_IO_ERROR", true);
                self.emit("STOP", true);
            }
            Step::GuestResets if runs => self.emit("RESET", false),
            Step::Reply if !self.reply && !self.in_checkpoint && self.tracker.verdict() == Verdict::Yes => {
                assert!(
                    runs || self.events.iter().any(|(_, foreign_stop)| *foreign_stop),
                    "allowed although the guest is {} and no event about it is under way",
                    self.state
                );
                self.tracker.reply_sent();
                self.reply = true;
            }
            Step::QemuStops if self.reply => {
                if runs {
                    self.emit("STOP", false);
                }
                self.state = RunState::Colo;
                self.reply = false;
                self.in_checkpoint = true;
            }
            Step::QemuResumes if self.in_checkpoint => {
                self.state = RunState::Running;
                self.emit("RESUME", false);
                self.in_checkpoint = false;
                self.tracker.checkpoint_done();
            }
            Step::Deliver => self.deliver(),
            Step::Ask => {
                if let Verdict::AskQemu(question) = self.tracker.verdict() {
                    self.answer = Some((question, self.state.clone()));
                }
            }
            Step::Answer => {
                if let Some((question, state)) = self.answer.take() {
                    self.tracker.answer(question, &state);
                }
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever the delays: REPLY is allowed to a guest that does not run only while the news of that is still under
    /// way, and once all news have arrived a running guest is not held back.
    #[test]
    fn right_with_any_delay(steps in prop::collection::vec(prop_oneof![
        2 => Just(Step::OperatorStops), 2 => Just(Step::OperatorResumes), 1 => Just(Step::DiskFails),
        1 => Just(Step::GuestResets), 8 => Just(Step::Reply), 6 => Just(Step::QemuStops),
        6 => Just(Step::QemuResumes), 14 => Just(Step::Deliver), 6 => Just(Step::Ask), 6 => Just(Step::Answer),
    ], 1..120)) {
        let mut world = World {
            tracker: RunTracker::new(),
            state: RunState::Running,
            events: VecDeque::new(),
            answer: None,
            reply: false,
            in_checkpoint: false,
        };
        for step in steps {
            world.step(step);
        }
        for step in [Step::QemuStops, Step::QemuResumes, Step::OperatorResumes] {
            world.step(step);
        }
        while !world.events.is_empty() {
            world.deliver();
        }
        world.step(Step::Ask);
        world.step(Step::Answer);
        prop_assert_eq!(world.tracker.verdict(), Verdict::Yes);
    }
}
