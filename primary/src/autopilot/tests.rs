#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]

use super::*;

/// A guest that writes a working set at random, and a link.
#[derive(Debug, Clone)]
struct World {
    /// Pages it writes a second, and pages they are of.
    writes: f64,
    working_set: f64,
    noise: f64,
    random: u64,
}

impl World {
    fn new(writes: f64, working_set: f64) -> Self {
        Self { writes, working_set, noise: 0.1, random: 7 }
    }

    fn noisy(&mut self, value: f64) -> f64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (self.random >> 40) as f64 / (1u64 << 24) as f64;
        value * (1.0 + self.noise * (2.0 * unit - 1.0))
    }

    /// Different pages written in so many seconds.
    fn pages(&self, seconds: f64) -> f64 {
        self.working_set * (1.0 - (-self.writes * seconds / self.working_set).exp())
    }

    /// An epoch of that length, without noise: stop, transfer, bytes.
    fn truth(&self, seconds: f64) -> (f64, f64, f64) {
        let pages = self.pages(seconds);
        let bytes = pages * 4112.0;
        (0.3e-3 + pages * 0.75e-6, 0.3e-3 + bytes / 1.25e9, bytes)
    }

    fn slowdown(&self, seconds: f64) -> f64 {
        let (stop, ..) = self.truth(seconds);
        stop / (seconds + stop)
    }

    fn epoch(&mut self, length: Duration) -> Seen {
        let (stop, transfer, bytes) = self.truth(length.as_secs_f64());
        let time = |seconds| Duration::from_secs_f64(seconds);
        Seen {
            ran: length,
            stop: time(self.noisy(stop)),
            transfer: time(self.noisy(transfer)),
            bytes: bytes.round().clamp(0.0, 1e18) as u64,
        }
    }

    /// Lets it run for so many seconds; gives the largest number of turns in any second behind `settled`.
    fn run(&mut self, pilot: &mut Autopilot, seconds: f64, settled: f64) -> usize {
        let (mut now, mut last, mut turns) = (0.0, 0.0, Vec::new());
        while now < seconds {
            let seen = self.epoch(pilot.length());
            now += (seen.ran + seen.stop).as_secs_f64();
            if let Some(change) = pilot.step(&seen) {
                assert!(!change.reason.is_empty());
                let direction = if change.to > change.from { 1.0 } else { -1.0 };
                if direction * last < 0.0 && now > settled {
                    turns.push(now);
                }
                last = direction;
            }
        }
        let within = |at: f64| turns.iter().filter(|turn| (at..at + 1.0).contains(*turn)).count();
        turns.iter().map(|at| within(*at)).max().unwrap_or(0)
    }

    /// The shortest length that keeps the slowdown, by trying all.
    fn best(&self, slowdown: f64) -> f64 {
        let lengths = (0..2000).map(|i| 0.005 + f64::from(i) * 0.0005);
        lengths.into_iter().find(|length| self.slowdown(*length) <= slowdown).unwrap_or(1.0)
    }
}

fn auto() -> Autopilot {
    Autopilot::new(Goals::default(), Duration::from_millis(100))
}

/// Hardly anything, a few thousand pages, many pages that are written again, pages that are new all the time.
const WORKLOADS: [(f64, f64); 4] =
    [(500.0, 200.0), (40_000.0, 3000.0), (400_000.0, 20_000.0), (30_000.0, 1e6)];

#[test]
fn without_goals_it_ends_near_the_best_fixed_length() {
    for (writes, set) in WORKLOADS {
        let (mut world, mut pilot) = (World::new(writes, set), auto());
        let turns = world.run(&mut pilot, 20.0, 5.0);
        assert!(turns <= 2, "{turns} turns a second at {writes} writes a second");
        let (length, best) = (pilot.length().as_secs_f64(), world.best(USUAL_SLOWDOWN));
        assert!(
            (best * 0.9 - 1e-3..best * 1.1 + 1e-3).contains(&length),
            "{length} instead of {best} at {writes}"
        );
    }
}

#[test]
fn a_step_is_followed_there_and_back() {
    let (mut world, mut pilot) = (World::new(500.0, 200.0), auto());
    world.run(&mut pilot, 10.0, 0.0);
    let idle = pilot.length();
    world = World::new(40_000.0, 3000.0);
    assert!(world.run(&mut pilot, 10.0, 5.0) <= 2);
    let busy = pilot.length().as_secs_f64();
    let best = world.best(USUAL_SLOWDOWN);
    assert!((best * 0.9..best * 1.1).contains(&busy), "{busy} instead of {best}");
    world = World::new(500.0, 200.0);
    world.run(&mut pilot, 10.0, 5.0);
    let back = pilot.length();
    assert!(back < idle.mul_f64(1.15) && idle < back.mul_f64(1.15), "{back:?} instead of {idle:?}");
}

#[test]
fn bursts_and_sines_do_not_make_it_flap() {
    for period in [0.02, 0.1, 0.5, 2.0] {
        for sine in [false, true] {
            let (mut world, mut pilot) = (World::new(500.0, 3000.0), auto());
            let (mut now, mut last, mut turns) = (0.0, 0.0, 0usize);
            while now < 30.0 {
                let phase = now / period * std::f64::consts::TAU;
                let part = if sine { f64::midpoint(1.0, phase.sin()) } else { f64::from(phase.sin() > 0.9) };
                world.writes = 500.0 + 60_000.0 * part;
                let seen = world.epoch(pilot.length());
                now += (seen.ran + seen.stop).as_secs_f64();
                if let Some(change) = pilot.step(&seen) {
                    let direction = if change.to > change.from { 1.0 } else { -1.0 };
                    turns += usize::from(direction * last < 0.0);
                    last = direction;
                }
            }
            assert!(turns <= 60, "{turns} turns in 30 s, period {period}, sine {sine}");
            assert!((SHORTEST..=LONGEST).contains(&pilot.length()));
        }
    }
}

#[test]
fn goals_bound_the_length_and_the_reason_says_which_is_missed() {
    let goals = |latency_ms: u64, slowdown| Goals {
        latency: Some(Duration::from_millis(latency_ms)),
        slowdown,
        bandwidth_bytes: None,
    };
    // Only latency: as long as it allows.
    let (mut world, mut pilot) = (World::new(5000.0, 500.0), Autopilot::new(goals(40, None), SHORTEST));
    world.run(&mut pilot, 10.0, 5.0);
    let (stop, transfer, _) = world.truth(pilot.length().as_secs_f64());
    let waits = pilot.length().as_secs_f64() + stop + transfer;
    assert!((0.036..0.0432).contains(&waits), "{waits}");
    // Both, and both can be kept.
    let mut pilot = Autopilot::new(goals(60, Some(0.05)), LONGEST);
    world.run(&mut pilot, 10.0, 5.0);
    let length = pilot.length().as_secs_f64();
    assert!(length < 0.06 && world.slowdown(length) < 0.05, "{length}");
    // Both cannot: the guest comes first, and that is said.
    let mut world = World::new(400_000.0, 20_000.0);
    let mut pilot = Autopilot::new(goals(10, Some(0.02)), Duration::from_millis(20));
    let change = (0..50).find_map(|_| pilot.step(&world.epoch(pilot.length()))).unwrap();
    assert!(change.reason.contains("latency goal is missed"), "{}", change.reason);
    world.run(&mut pilot, 20.0, 5.0);
    assert!(world.slowdown(pilot.length().as_secs_f64()) < 0.0225);
}

#[test]
fn a_cap_on_bandwidth_makes_epochs_longer() {
    let (mut world, cap) = (World::new(40_000.0, 1000.0), 20e6);
    let goals = Goals { bandwidth_bytes: Some(cap), ..Goals::default() };
    let mut pilot = Autopilot::new(goals, Duration::from_millis(10));
    let rate = |world: &World, length: f64| {
        let (stop, _, bytes) = world.truth(length);
        bytes / (length + stop)
    };
    assert!(rate(&world, 0.01) > 2.0 * cap);
    world.run(&mut pilot, 20.0, 5.0);
    let reached = rate(&world, pilot.length().as_secs_f64());
    assert!((0.85 * cap..1.1 * cap).contains(&reached), "{reached}");
}

#[test]
fn nonsense_does_not_lead_it_out_of_bounds() {
    let mut random = 99u64;
    let mut next = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        random >> 33
    };
    for goals in [
        Goals::default(),
        Goals { latency: Some(Duration::ZERO), slowdown: Some(0.0), bandwidth_bytes: Some(0.0) },
        Goals { latency: Some(Duration::MAX), slowdown: Some(2.0), bandwidth_bytes: Some(f64::INFINITY) },
    ] {
        let mut pilot = Autopilot::new(goals, Duration::ZERO);
        for _ in 0..2000 {
            let time = |value: u64| Duration::from_nanos(value % 10_000_000_000);
            let seen = Seen { ran: time(next()), stop: time(next()), transfer: time(next()), bytes: next() };
            pilot.step(&seen);
            assert!((SHORTEST..=LONGEST).contains(&pilot.length()), "{:?}", pilot.length());
        }
    }
}
