use proptest::prelude::*;
use understudy_libvirt::RunState;
use understudy_proto::ids::Generation;

use super::watch::{MAX_REPLACED, REPLACE_AFTER};
use super::*;
use crate::bound::{self, LOOK, REPEAT};

mod world;

const HUNG_AFTER: Duration = Duration::from_secs(5);
const A: GuestId = GuestId(uuid::Uuid::from_u128(1));
const B: GuestId = GuestId(uuid::Uuid::from_u128(2));

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn listed(guest: GuestId) -> ProtectedGuest {
    let name = format!("g{}", guest.0.as_u128());
    ProtectedGuest {
        guest,
        name,
        to: "beta".into(),
        insecure: true,
        epoch_ms: 100,
        generation: Generation(1),
        ungated: false,
        goals: None,
        policy: understudy_proto::policy::GuestPolicy::default(),
    }
}

fn facts(colo: bool, state: RunState) -> Facts {
    Facts { colo, migrating: false, armed: colo, runs: Some(7), state }
}

fn full(facts: Facts) -> Event {
    Event::Seen(A, Ok(Seen::Full(facts)))
}

fn look(depth: Depth) -> Command {
    Command::Look(A, depth)
}

fn abouts(commands: &[Command]) -> Vec<&About> {
    let about = |command| match command {
        &Command::Report(Report::Guest { ref what, .. }) => Some(what),
        _ => None,
    };
    commands.iter().filter_map(about).collect()
}

/// Commands without reports.
fn deeds(commands: Vec<Command>) -> Vec<Command> {
    commands.into_iter().filter(|command| !matches!(command, Command::Report(_))).collect()
}

/// One guest whose living agent was looked at once.
fn at_ease(now: Instant) -> Engine {
    let mut engine = Engine::new(HUNG_AFTER);
    assert_eq!(engine.step(Event::Record(vec![listed(A)]), now), []);
    assert_eq!(engine.deadline(), None, "nothing is looked at before a sign of life was seen");
    assert_eq!(deeds(engine.step(Event::Life(Life::Alive), now)), [look(Depth::Glance)]);
    assert_eq!(deeds(engine.step(Event::Seen(A, Ok(Seen::Running)), now)), []);
    assert_eq!(engine.deadline(), Some(now + LOOK));
    engine
}

#[test]
fn a_guest_left_stopped_is_told_and_seen_to_run() {
    let t = Instant::now();
    for found in [RunState::Colo, RunState::FinishMigrate, RunState::Running] {
        let mut engine = at_ease(t);
        let t = t + ms(300);
        assert_eq!(deeds(engine.step(Event::Life(Life::Dead), t)), [look(Depth::Full)]);
        let told = engine.step(full(facts(true, found.clone())), t + ms(1));
        assert_eq!(told, [Command::Order(A, Order::LostHeartbeat)]);
        assert_eq!(engine.step(Event::Done(A, Ok(())), t + ms(2)), [look(Depth::Full)]);
        // Not at once.
        assert_eq!(engine.step(full(facts(true, found.clone())), t + ms(3)), []);
        assert_eq!(engine.step(Event::Tick, t + ms(13)), [look(Depth::Full)]);
        let commands = engine.step(full(facts(false, RunState::Running)), t + ms(14));
        let freed = About::Freed { cause: Cause::Died, found, now: RunState::Running, after: ms(14) };
        assert_eq!(abouts(&commands), [&freed]);
        assert_eq!(deeds(commands), []);
    }
}

#[test]
fn an_order_without_effect_is_repeated() {
    let t = Instant::now();
    let mut engine = at_ease(t);
    engine.step(Event::Life(Life::Dead), t);
    engine.step(full(facts(true, RunState::Colo)), t);
    let refused = engine.step(Event::Done(A, Err(Trouble::Refused("no".into()))), t);
    assert_eq!(abouts(&refused), [&About::Trouble { reason: "no".into() }]);
    engine.step(Event::Tick, t + ms(10));
    assert_eq!(engine.step(full(facts(true, RunState::Colo)), t + ms(10)), []);
    engine.step(Event::Tick, t + REPEAT);
    let again = engine.step(full(facts(true, RunState::Colo)), t + REPEAT);
    assert_eq!(again, [Command::Order(A, Order::LostHeartbeat)]);
}

#[test]
fn what_others_have_stopped_is_left_alone() {
    let others = ["paused", "shutdown", "io-error", "guest-panicked", "internal-error", "suspended", "new"];
    for state in others.map(RunState::from_name) {
        let t = Instant::now();
        let mut engine = at_ease(t);
        engine.step(Event::Life(Life::Dead), t);
        let commands = engine.step(full(facts(true, state.clone())), t);
        assert_eq!(abouts(&commands), [&About::LeftAlone { state: state.clone() }]);
        assert_eq!(deeds(commands), []);
        // Once is enough; and when it turns out to be in a checkpoint after all, that is ended.
        engine.step(Event::Tick, t + LOOK);
        assert_eq!(engine.step(full(facts(true, state)), t + LOOK), []);
        engine.step(Event::Tick, t + 2 * LOOK);
        let commands = engine.step(full(facts(true, RunState::Colo)), t + 2 * LOOK);
        assert_eq!(commands, [Command::Order(A, Order::LostHeartbeat)]);
    }
}

#[test]
fn a_guest_without_checkpoints_is_left_alone() {
    // Another's migration, for example, that has come to its end: the guest runs elsewhere.
    for state in ["running", "paused", "postmigrate", "finish-migrate", "colo"].map(RunState::from_name) {
        let t = Instant::now();
        let mut engine = at_ease(t);
        engine.step(Event::Life(Life::Dead), t);
        assert_eq!(engine.step(full(facts(false, state)), t), []);
        assert_eq!(engine.deadline(), Some(t + LOOK));
    }
}

#[test]
fn a_full_copy_whose_reader_died_is_watched_to_its_end() {
    let t = Instant::now();
    let copying = |state| Facts { migrating: true, ..facts(false, state) };
    let mut engine = at_ease(t);
    engine.step(Event::Life(Life::Dead), t);
    assert_eq!(engine.step(full(copying(RunState::Running)), t), []);
    assert_eq!(engine.step(Event::Tick, t + ms(10)), [look(Depth::Full)]);
    assert_eq!(engine.step(full(copying(RunState::FinishMigrate)), t + ms(10)), []);
    engine.step(Event::Tick, t + ms(20));
    // It has come to its end and enters COLO after all...
    let commands = engine.step(full(facts(true, RunState::FinishMigrate)), t + ms(20));
    assert_eq!(commands, [Command::Order(A, Order::LostHeartbeat)]);
    // ... or an old QEMU takes it for an ordinary migration.
    let mut engine = at_ease(t);
    engine.step(Event::Life(Life::Dead), t);
    let ended = Facts { armed: true, ..facts(false, RunState::PostMigrate) };
    assert_eq!(engine.step(full(ended), t), [Command::Order(A, Order::Continue)]);
}

#[test]
fn a_guest_that_left_colo_without_running_is_continued() {
    let t = Instant::now();
    let mut engine = at_ease(t);
    engine.step(Event::Life(Life::Dead), t);
    engine.step(full(facts(true, RunState::Colo)), t);
    engine.step(Event::Done(A, Ok(())), t);
    engine.step(full(facts(false, RunState::PostMigrate)), t);
    engine.step(Event::Tick, t + REPEAT);
    let commands = engine.step(full(facts(false, RunState::PostMigrate)), t + REPEAT);
    assert_eq!(commands, [Command::Order(A, Order::Continue)]);
}

#[test]
fn a_glance_from_before_the_death_proves_nothing() {
    let t = Instant::now();
    let mut engine = at_ease(t);
    assert_eq!(engine.step(Event::Tick, t + LOOK), [look(Depth::Glance)]);
    assert_eq!(deeds(engine.step(Event::Life(Life::Dead), t + LOOK)), [], "one question at a time");
    assert_eq!(engine.step(Event::Seen(A, Ok(Seen::Running)), t + LOOK), [look(Depth::Full)]);
}

#[test]
fn a_new_agent_takes_over() {
    let t = Instant::now();
    let mut engine = at_ease(t);
    engine.step(Event::Life(Life::Dead), t);
    engine.step(full(facts(true, RunState::Colo)), t);
    engine.step(Event::Done(A, Ok(())), t);
    let commands = engine.step(Event::Life(Life::Alive), t + ms(1));
    assert_eq!(abouts(&commands), [&About::HandedOver]);
    assert_eq!(engine.step(full(facts(true, RunState::Colo)), t + ms(2)), []);
    // It has the time a living agent has.
    engine.step(Event::Tick, t + HUNG_AFTER);
    assert_eq!(engine.step(full(facts(true, RunState::Colo)), t + HUNG_AFTER), []);
}

#[test]
fn a_living_agent_may_stop_a_guest_often_but_not_for_long() {
    let t = Instant::now();
    let mut engine = at_ease(t);
    let stopped = |runs| full(Facts { runs: Some(runs), ..facts(true, RunState::Colo) });
    let mut now = t;
    // Every look finds it stopped, and every time it has run in between.
    for n in 0..20 {
        now = engine.deadline().unwrap();
        assert_eq!(engine.step(Event::Tick, now).len(), 1);
        assert_eq!(engine.step(stopped(n), now), [], "look {n}");
    }
    // From here on it has not.
    let began = now;
    let order = loop {
        now = engine.deadline().unwrap();
        assert_eq!(engine.step(Event::Tick, now), [look(Depth::Count)]);
        let commands = engine.step(stopped(19), now);
        if !commands.is_empty() {
            break commands;
        }
    };
    assert_eq!(order, [Command::Order(A, Order::LostHeartbeat)]);
    assert_eq!(now - began, HUNG_AFTER);
    engine.step(Event::Done(A, Ok(())), now);
    let commands = engine.step(full(facts(false, RunState::Running)), now);
    let freed =
        About::Freed { cause: Cause::Hung, found: RunState::Colo, now: RunState::Running, after: HUNG_AFTER };
    assert_eq!(abouts(&commands), [&freed]);
}

#[test]
fn a_hung_agent_is_no_reason_to_touch_what_others_stopped_or_what_cannot_be_told() {
    let t = Instant::now();
    let paused = facts(true, RunState::Paused);
    let uncounted = Facts { runs: None, ..facts(true, RunState::Colo) };
    for (seen, said) in [(paused, vec![]), (uncounted, vec![About::CannotTell])] {
        let mut engine = at_ease(t);
        let mut all = Vec::new();
        for _ in 0..30 {
            let now = engine.deadline().unwrap();
            engine.step(Event::Tick, now);
            all.extend(engine.step(full(seen.clone()), now));
        }
        assert_eq!(abouts(&all), said.iter().collect::<Vec<_>>());
        assert_eq!(deeds(all), []);
    }
}

#[test]
fn nothing_is_done_without_a_sign_of_life() {
    let t = Instant::now();
    let mut engine = Engine::new(HUNG_AFTER);
    assert_eq!(deeds(engine.step(Event::Record(vec![listed(A), listed(B)]), t)), []);
    assert_eq!(engine.step(Event::Tick, t + HUNG_AFTER), []);
    let mut engine = at_ease(t);
    assert_eq!(deeds(engine.step(Event::Life(Life::Unknown), t + LOOK)), []);
    assert_eq!(engine.step(Event::Tick, t + 10 * LOOK), []);
    // Nor with an answer that comes late.
    let mut engine = at_ease(t);
    engine.step(Event::Tick, t + LOOK);
    engine.step(Event::Life(Life::Unknown), t + LOOK);
    assert_eq!(engine.step(full(facts(true, RunState::Colo)), t + LOOK), []);
}

#[test]
fn a_guest_that_is_taken_off_the_list_is_forgotten() {
    let t = Instant::now();
    let mut engine = at_ease(t);
    engine.step(Event::Life(Life::Dead), t);
    assert_eq!(
        engine.step(Event::Record(vec![listed(B)]), t),
        [Command::Forget(A), Command::Look(B, Depth::Full)]
    );
    assert_eq!(engine.step(full(facts(true, RunState::Colo)), t), []);
}

#[test]
fn a_guest_that_cannot_be_asked_is_asked_again_and_again() {
    let t = Instant::now();
    let mut engine = at_ease(t);
    engine.step(Event::Life(Life::Dead), t);
    let gone = || Event::Seen(A, Err(Trouble::Unreachable("libvirt is restarting".into())));
    let (mut now, mut waits) = (t, Vec::new());
    let mut said = 0;
    for _ in 0..8 {
        said += abouts(&engine.step(gone(), now)).len();
        let next = engine.deadline().unwrap();
        waits.push(u64::try_from((next - now).as_millis()).unwrap());
        now = next;
        assert_eq!(engine.step(Event::Tick, now), [look(Depth::Full)]);
    }
    assert_eq!(waits, [50, 100, 200, 400, 800, 1000, 1000, 1000]);
    assert_eq!(said, 1);
    let commands = engine.step(full(facts(true, RunState::Colo)), now);
    assert_eq!(commands, [Command::Order(A, Order::LostHeartbeat)]);
    // And one that is off needs nothing.
    assert_eq!(engine.step(Event::Done(A, Err(Trouble::Off)), now), []);
    assert_eq!(engine.deadline(), Some(now + LOOK));
}

#[test]
fn an_answer_is_not_waited_for_for_ever() {
    let mut now = Instant::now();
    let mut engine = at_ease(now);
    engine.step(Event::Life(Life::Dead), now);
    let (mut replaced, mut silent) = (0, 0);
    while let Some(next) = engine.deadline() {
        assert!(next > now, "no progress");
        now = next;
        let commands = engine.step(Event::Tick, now);
        silent += abouts(&commands).len();
        if commands.contains(&Command::Replace(A)) {
            replaced += 1;
            assert!(commands.contains(&look(Depth::Full)));
        }
    }
    assert_eq!((replaced, silent), (MAX_REPLACED, 4));
    assert!(REPLACE_AFTER > ms(30_000), "libvirt gives a command up after 30 s, and that is an answer");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_only_checkpoints_without_an_owner_are_ended_and_in_time(
        deeds in proptest::collection::vec(world::deed(), 1..60),
        answers_ms in 0_u64..=200,
    ) {
        world::World::new(ms(answers_ms)).live(&deeds);
    }
}

#[test]
fn the_bound_of_a_hung_agent_holds_with_every_phase_of_the_looks() {
    for phase in (0..1000).step_by(10) {
        let deeds = [world::Deed::Wait(3000 + phase), world::Deed::Stop, world::Deed::Wait(20_000)];
        let stopped = world::World::new(bound::ANSWER).live(&deeds);
        assert!(stopped <= bound::hung(HUNG_AFTER), "{stopped:?}");
    }
}
