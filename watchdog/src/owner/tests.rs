//! What the interleavings do not reach: they have no agents that fail or forget.

use std::time::{Duration, Instant};

use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, Generation, GuestId, Incarnation};
use understudy_proto::ownership::{Owner, Ownership, Term};

use super::*;

fn record(term: u64, generation: u64, owner: Owner) -> Event {
    let (term, generation) = (Term(term), Generation(generation));
    Event::Record(Some(Ownership { term, generation, epoch: Some(EpochId(1)), owner }))
}

fn pair(primary: &str, backup: &str) -> Owner {
    let incarnation = Incarnation(uuid::Uuid::from_u128(1));
    Owner::Pair { primary: primary.into(), backup: backup.into(), incarnation }
}

fn solo(owner: &str) -> Owner {
    Owner::Solo { owner: owner.into() }
}

#[test]
fn a_confirmed_guest_that_could_not_be_started_is_started_again() {
    let mut dog = Protocol::new("b", Policies::default());
    let image = Image { incarnation: Incarnation(uuid::Uuid::from_u128(1)), generation: Generation(1) };
    dog.step(Event::Local(Local { image: Some(image), ..Local::default() }));
    dog.step(record(1, 1, pair("a", "b")));
    dog.step(Event::Suspect);
    let incarnation = image.incarnation;
    let claim = Owner::Claim { by: "b".into(), from: "a".into(), incarnation };
    dog.step(record(2, 1, claim));
    dog.step(Event::Loaded);
    let activate = Command::Activate(Term(3));
    assert!(dog.step(record(3, 2, solo("b"))).contains(&activate));
    // Nothing has changed here: the agent has failed at it and holds the image as before.
    assert_eq!(dog.step(record(3, 2, solo("b"))), [activate]);
    dog.step(Event::Local(Local { runs: true, image: None, generation: Some(Generation(2)) }));
    assert_eq!(dog.step(record(3, 2, solo("b"))), []);
}

#[test]
fn an_instance_whose_generation_nobody_knows_any_more_is_what_ran_here_before() {
    let running = |generation| Event::Local(Local { runs: true, image: None, generation });
    let mut dog = Protocol::new("a", Policies::default());
    dog.step(running(Some(Generation(1))));
    dog.step(record(1, 1, pair("a", "b")));
    // The agent was told that it is superseded, forgot the guest, and was started anew.
    dog.step(running(None));
    assert!(dog.step(record(3, 2, solo("b"))).contains(&Command::DestroyGuest(Term(3))));
    // A host that never had it touches nothing.
    let mut dog = Protocol::new("a", Policies::default());
    dog.step(running(None));
    assert_eq!(dog.step(record(3, 2, solo("b"))), []);
}

#[test]
fn a_swap_that_fails_is_asked_for_again_in_time_and_not_as_fast_as_the_arbiter_answers() {
    let mut now = std::time::Instant::now();
    let mut dog = Engine::new("b", Policies::default(), Timing::default(), now);
    let swaps = |said: Vec<Output>| {
        said.iter().filter(|out| matches!(out, Output::Command(Command::Swap(_)))).count()
    };
    let image = Image { incarnation: Incarnation(uuid::Uuid::from_u128(1)), generation: Generation(1) };
    dog.step(Input::Event(Event::Local(Local { image: Some(image), ..Local::default() })), now);
    dog.step(Input::Event(record(1, 1, pair("a", "b"))), now);
    assert_eq!(swaps(dog.step(Input::Event(Event::Suspect), now)), 1);
    // The arbiter answers what it has: nothing was swapped.
    for _ in 0..100 {
        assert_eq!(swaps(dog.step(Input::Event(record(1, 1, pair("a", "b"))), now)), 0);
    }
    now = now.max(dog.deadline());
    assert_eq!(swaps(dog.step(Input::Tick, now)), 1, "a swap may have been lost");
    // Another record, another swap.
    assert_eq!(swaps(dog.step(Input::Event(record(2, 1, pair("a", "b"))), now)), 1);
}

#[test]
fn a_claimed_guest_is_loaded_from_the_copy_that_is_there() {
    let life =
        |n| Some(Image { incarnation: Incarnation(uuid::Uuid::from_u128(n)), generation: Generation(1) });
    let image = |image| Event::Local(Local { image, ..Local::default() });
    let claim = || {
        let incarnation = Incarnation(uuid::Uuid::from_u128(1));
        record(2, 1, Owner::Claim { by: "b".into(), from: "a".into(), incarnation })
    };
    let mut dog = Protocol::new("b", Policies::default());
    dog.step(image(life(1)));
    dog.step(record(1, 1, pair("a", "b")));
    dog.step(Event::Suspect);
    // The agent dies with the image; its next life is sent everything once more.
    dog.step(image(None));
    assert_eq!(dog.step(claim()), []);
    assert_eq!(*dog.role(), Role::Stale);
    assert_eq!(dog.step(image(life(2))), [Command::Load(Term(2))]);
    // One of another generation is of no use.
    let mut dog = Protocol::new("b", Policies::default());
    dog.step(image(life(2).map(|image| Image { generation: Generation(2), ..image })));
    assert_eq!(dog.step(claim()), []);
}

#[test]
fn a_guest_that_ended_here_when_it_had_gone_elsewhere_is_taken_over_all_the_same() {
    let mut dog = Protocol::new("a", Policies::default());
    dog.step(Event::Local(Local { runs: true, image: None, generation: Some(Generation(1)) }));
    dog.step(record(1, 1, pair("a", "b")));
    // The arbiter is not heard: the other host has had the guest for long, and this one its copy.
    let image = Image { incarnation: Incarnation(uuid::Uuid::from_u128(1)), generation: Generation(2) };
    dog.step(Event::Local(Local { image: Some(image), ..Local::default() }));
    dog.step(Event::GuestEnded);
    dog.step(record(4, 2, pair("b", "a")));
    assert_eq!(*dog.role(), Role::Standby);
    let claims = dog.step(Event::Suspect);
    assert!(
        matches!(claims.as_slice(), [Command::Swap(new)] if matches!(&new.owner, Owner::Claim { by, .. } if by == "a")),
        "{claims:?}"
    );
}

#[test]
fn a_backup_that_was_suspected_is_suspected_anew_when_it_has_become_the_primary() {
    let mut now = std::time::Instant::now();
    let policies = Policies { lost_backup: LostBackup::Solo, ..Policies::default() };
    let mut dog = Engine::new("a", policies, Timing::default(), now);
    let local = |runs, image| Input::Event(Event::Local(Local { runs, image, generation: None }));
    dog.step(local(true, None), now);
    dog.step(Input::Event(record(1, 1, pair("a", "b"))), now);
    let suspects = |said: &[Output]| said.iter().any(|output| matches!(output, Output::Suspected(_)));
    now += std::time::Duration::from_secs(2);
    assert!(suspects(&dog.step(Input::Tick, now)));
    // It had the guest for long, and has copied it here before it fell silent.
    let image = Image { incarnation: Incarnation(uuid::Uuid::from_u128(1)), generation: Generation(2) };
    dog.step(local(false, Some(image)), now);
    let said = dog.step(Input::Event(record(4, 2, pair("b", "a"))), now);
    assert!(*dog.protocol().role() == Role::Standby && !suspects(&said), "{said:?}");
    now += std::time::Duration::from_secs(2);
    assert!(suspects(&dog.step(Input::Tick, now)));
    assert_eq!(*dog.protocol().role(), Role::Claiming);
}

/// Host b stands by for a, whose watchdog says every 100 ms what QEMU is like so long after the start; gives the report of
/// the takeover that comes of it.
fn taken_over_from(mut beat: impl FnMut(Duration, &mut Heartbeat)) -> Takeover {
    let start = Instant::now();
    let mut dog = Engine::new("b", Policies::default(), Timing::default(), start);
    let image = Image { incarnation: Incarnation(uuid::Uuid::from_u128(1)), generation: Generation(1) };
    dog.step(Input::Event(Event::Local(Local { image: Some(image), ..Local::default() })), start);
    dog.step(Input::Event(record(1, 1, pair("a", "b"))), start);
    let mut after = Duration::ZERO;
    for number in 1.. {
        after += Duration::from_millis(100);
        assert!(after < Duration::from_secs(60), "nothing is suspected");
        let mut heartbeat = heartbeat(number, None);
        beat(after, &mut heartbeat);
        let said = dog.step(Input::Heartbeat(heartbeat), start + after);
        if said.iter().any(|output| matches!(output, Output::Suspected(_))) {
            break;
        }
    }
    let (now, incarnation) = (start + after, image.incarnation);
    let claim = Owner::Claim { by: "b".into(), from: "a".into(), incarnation };
    for event in [record(2, 1, claim), Event::Loaded, record(3, 2, solo("b"))] {
        for output in dog.step(Input::Event(event), now) {
            if let Output::TookOver(report) = output {
                return report;
            }
        }
    }
    panic!("the guest was not taken over")
}

fn heartbeat(number: u64, qemu_age: Option<Duration>) -> Heartbeat {
    Heartbeat {
        guest: GuestId(uuid::Uuid::from_u128(3)),
        host: "a".into(),
        life: 1,
        number,
        term: Term(1),
        generation: Generation(1),
        epoch: EpochId(1),
        qemu_age,
        image: None,
        ended: false,
        yields: false,
        crashed: false,
        settings: None,
    }
}

/// QEMU's last sign of life.
const LAST: Duration = Duration::from_millis(700);

#[test]
fn a_hung_qemu_was_detected_from_its_own_last_sign_of_life() {
    let report = taken_over_from(|after, beat| beat.qemu_age = Some(after.saturating_sub(after.min(LAST))));
    assert_eq!((report.suspicion.as_str(), report.detect_ms), ("its QEMU has been silent for 5000 ms", 5000));
}

#[test]
fn a_dead_qemu_was_detected_from_its_own_last_sign_of_life() {
    let report = taken_over_from(|after, beat| {
        beat.qemu_age = (after <= LAST).then_some(Duration::ZERO);
        beat.crashed = after >= Duration::from_secs(1);
    });
    assert_eq!((report.suspicion.as_str(), report.detect_ms), ("its QEMU has died", 300));
}

#[test]
fn a_host_that_is_silent_is_not_taken_for_a_qemu_that_hangs() {
    let image = Image { incarnation: Incarnation(uuid::Uuid::from_u128(2)), generation: Generation(1) };
    let start = Instant::now();
    // The host may be silent for longer than its QEMU.
    let timing = Timing { primary_silent: Duration::from_secs(10), ..Timing::default() };
    let mut dog = Engine::new("b", Policies::default(), timing, start);
    let local = Local { image: Some(image), ..Local::default() };
    dog.step(Input::Event(Event::Local(local)), start);
    dog.step(Input::Event(record(1, 1, pair("a", "b"))), start);
    let at = |millis| start + Duration::from_millis(millis);
    let beat = |number, age| Input::Heartbeat(heartbeat(number, Some(Duration::from_millis(age))));
    dog.step(beat(1, 150), at(1000));
    assert_eq!(dog.deadline().max(at(11_000)), at(11_000));
    for millis in [6000, 8000, 10_999] {
        dog.step(Input::Tick, at(millis));
        assert_eq!(dog.suspicion(), None, "after {millis} ms");
    }
    let silent = Suspicion::Silent(Duration::from_secs(10));
    assert!(dog.step(Input::Tick, at(11_000)).contains(&Output::Suspected(silent)));
    // It is heard again, and its QEMU is not.
    let hung = Suspicion::QemuSilent(Duration::from_secs(7));
    assert!(dog.step(beat(2, 7000), at(12_000)).contains(&Output::Suspected(hung)));
    let again = dog.step(Input::Tick, at(22_000));
    assert!(again.contains(&Output::Suspected(silent)), "{again:?}");
    assert!(dog.step(beat(3, 0), at(22_100)).contains(&Output::Heard));
}
