#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]

use std::time::Duration;

use proptest::prelude::*;

use super::plan::RECORD;
use super::*;

/// A guest, a host and a link as they really are.
#[derive(Debug, Clone)]
struct World {
    pages: u64,
    zeros: u64,
    known_share: f64,
    costs: [[Cost; 3]; 5],
    backup: [f64; 5],
    link_bytes_per_second: f64,
    spare_cpus: f64,
    /// Threads that may work on pages, and how many do at a time.
    max_threads: usize,
    threads: f64,
    /// What measurements are off by, at most.
    noise: f64,
    random: u64,
}

impl World {
    fn noisy(&mut self, value: f64) -> f64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (self.random >> 40) as f64 / (1u64 << 24) as f64;
        value * (1.0 + self.noise * (2.0 * unit - 1.0))
    }

    fn work(&mut self, plan: Plan, class: usize, pages: f64) -> Work {
        let Cost { nanos, bytes } = self.costs[plan as usize][class];
        let time = Duration::from_secs_f64(self.noisy(pages * nanos) / 1e9);
        Work { pages: pages as u64, bytes: (pages * bytes) as u64, time }
    }

    fn epoch(&mut self, governor: &Governor) -> Seen {
        let (plan, pages) = match governor.trial() {
            Some((plan, pages)) => (plan, pages.min(self.pages) as f64),
            None => (governor.plan(), self.pages as f64),
        };
        let known = if plan.uses_cache() { self.known_share } else { 0.0 };
        let (known, fresh) = (self.work(plan, 0, pages * known), self.work(plan, 1, pages * (1.0 - known)));
        let rest = self.work(Plan::Raw, 1, self.pages as f64 - pages);
        let zeros = self.work(plan, 2, if rest.pages > 0 { 0.0 } else { self.zeros as f64 });
        let bytes = known.bytes + fresh.bytes + zeros.bytes + rest.bytes;
        let backup = self.backup[plan as usize] * (pages + zeros.pages as f64);
        let seconds = self.noisy(100e-6 + bytes as f64 / self.link_bytes_per_second + backup);
        let transfer = Some((bytes, Duration::from_secs_f64(seconds)));
        let whole = self.seconds(if pages > 0.0 { plan } else { Plan::Raw });
        let whole = Some(Duration::from_secs_f64(self.noisy(whole)));
        let (threads, spare_cpus) = (self.threads, self.spare_cpus);
        Seen { plan, known, fresh, zeros, rest, threads, transfer, whole, spare_cpus }
    }

    /// What an epoch really takes.
    fn seconds(&self, plan: Plan) -> f64 {
        let truth = Governor {
            costs: self.costs,
            extra: self.backup,
            pages: self.pages as f64,
            zeros: self.zeros as f64,
            known_share: self.known_share,
            link: Link::new(1.0 / self.link_bytes_per_second, 100e-6),
            spare_cpus: self.spare_cpus,
            threads: self.threads,
            ..Governor::new()
        };
        truth.predicted_seconds(plan)
    }

    fn best_seconds(&self) -> f64 {
        Plan::ALL.into_iter().map(|plan| self.seconds(plan)).fold(f64::INFINITY, f64::min)
    }

    /// Runs epochs; gives the number of changes.
    fn run(&mut self, governor: &mut Governor, epochs: u32) -> u32 {
        (0..epochs).map(|_| u32::from(governor.step(&self.epoch(governor), CodecSet::ALL).is_some())).sum()
    }
}

fn world() -> impl Strategy<Value = World> {
    let factor = || 0.3f64..3.0;
    let costs = prop::array::uniform5(prop::array::uniform3((factor(), 0.2f64..1.8)));
    let link = prop_oneof![Just(125e6), Just(1.25e9), Just(5e9), Just(1e12), 1e6f64..1e10];
    // More threads than one: how many really work at a time may be fewer than one.
    let threads = prop_oneof![
        Just((1, 1.0)),
        (2usize..5, 0.1f64..1.0).prop_map(|(most, part)| (most, most as f64 * part))
    ];
    let pages = (20u64..20_000, prop_oneof![Just(0), 0u64..5_000]);
    (pages, 0.0f64..1.0, (costs, factor()), link, (0.0f64..2.0, threads), any::<u64>()).prop_map(
        |(
            (pages, zeros),
            known_share,
            (factors, backup),
            link_bytes_per_second,
            (spare_cpus, (max_threads, threads)),
            random,
        )| {
            let mut costs = USUAL;
            for (cost, (nanos, bytes)) in costs.iter_mut().flatten().zip(factors.iter().flatten()) {
                cost.nanos *= nanos;
                cost.bytes = (cost.bytes * bytes).min(RECORD);
            }
            // Raw is raw, whatever the guest.
            costs[Plan::Raw as usize] = USUAL[Plan::Raw as usize];
            let noise = 0.05;
            World {
                pages,
                zeros,
                known_share,
                costs,
                backup: USUAL_EXTRA.map(|usual| usual * backup),
                link_bytes_per_second,
                spare_cpus,
                max_threads,
                threads,
                noise,
                random,
            }
        },
    )
}

fn usual() -> World {
    World {
        pages: 1000,
        zeros: 0,
        known_share: 0.8,
        costs: USUAL,
        backup: USUAL_EXTRA,
        link_bytes_per_second: 125e6,
        spare_cpus: 1.0,
        max_threads: 1,
        threads: 1.0,
        noise: 0.05,
        random: 1,
    }
}

#[test]
fn a_plan_that_does_not_pay_is_tried_with_few_pages_and_never_used() {
    // Pages without any pattern, on a link that encoding cannot keep up with.
    let mut world = World { link_bytes_per_second: 2.5e9, noise: 0.0, ..usual() };
    world.costs.iter_mut().flatten().for_each(|cost| cost.bytes = RECORD);
    let mut governor = Governor::new();
    let (mut tried, mut used) = (0, 0);
    for _ in 0..200 {
        let seen = world.epoch(&governor);
        assert!(seen.rest.pages == 0 || seen.rest.pages >= world.pages * 8 / 10, "{seen:?}");
        governor.step(&seen, CodecSet::ALL);
        tried += u32::from(governor.trial().is_some());
        used += u32::from(governor.plan() != Plan::Raw);
    }
    assert!((1..=100).contains(&tried) && used == 0, "{tried} epochs tried, {used} used");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever was measured, sense or nonsense.
    #[test]
    fn never_predicted_slower_than_raw(
        seen in prop::collection::vec((
            prop::array::uniform2((0u64..5000, 0u64..5_000_000, 0u64..50_000_000)),
            prop::option::of((0u64..20_000_000, 1u64..100_000_000)),
            (0.0f64..4.0, prop_oneof![0.0f64..8.0, Just(f64::INFINITY)]),
        ), 1..300),
        xbzrle: bool, lz4: bool, max_threads in 1usize..5,
    ) {
        let mut governor = Governor::new().with_threads(max_threads);
        for (work, transfer, (spare_cpus, threads)) in seen {
            let [known, fresh] = work.map(|(pages, bytes, nanos)| {
                Work { pages, bytes, time: Duration::from_nanos(nanos) }
            });
            let transfer = transfer.map(|(bytes, nanos)| (bytes, Duration::from_nanos(nanos)));
            let plan = governor.trial().map_or(governor.plan(), |(plan, _)| plan);
            let whole = transfer.map(|(_, time)| time * 2);
            let rest = if threads > 2.0 { Work::default() } else { known };
            let seen = Seen { plan, known, fresh, zeros: fresh, rest, threads, transfer, whole, spare_cpus };
            let codecs = CodecSet { xbzrle, lz4, ..CodecSet::ALL };
            governor.step(&seen, codecs);
            prop_assert!(governor.plan().is_allowed(codecs));
            let (plan, raw) = (governor.predicted_seconds(governor.plan()), governor.predicted_seconds(Plan::Raw));
            prop_assert!(plan <= raw * MAX_LOSS, "{:?}: {plan} against {raw}", governor.plan());
        }
    }

    /// On a link that costs nothing it ends with what is as fast as raw, and is slower than raw only while it learns.
    #[test]
    fn an_unlimited_link_is_used_raw(mut world in world()) {
        world.link_bytes_per_second = 1e12;
        let mut governor = Governor::new().with_threads(world.max_threads);
        world.run(&mut governor, 300);
        let mut slower = 0;
        for _ in 0..1000 {
            slower += u32::from(world.seconds(governor.plan()) > world.seconds(Plan::Raw) * MAX_LOSS);
            world.run(&mut governor, 1);
        }
        prop_assert!(slower <= 20, "{slower} of 1000 epochs were slower than raw");
    }

    /// It settles, on something nearly as good as the best.
    #[test]
    fn it_settles_near_the_best(mut world in world()) {
        let mut governor = Governor::new().with_threads(world.max_threads);
        let changes = world.run(&mut governor, 3000);
        prop_assert!(changes <= 16, "{changes} changes");
        let late = world.run(&mut governor, 1000);
        // A world in which two plans are all but equal has been seen to change 5 times.
        prop_assert!(late <= 6, "{late} changes after settling");
        // What failed long ago is tried again for a few epochs: the average counts.
        let epochs = 1000;
        let mean = (0..epochs).map(|_| {
            world.run(&mut governor, 1);
            world.seconds(governor.plan())
        }).sum::<f64>() / f64::from(epochs);
        prop_assert!(mean <= world.seconds(Plan::Raw) * MAX_LOSS, "{mean}");
    }
}

#[test]
fn a_slow_link_is_compressed_for_and_a_fast_one_is_not() {
    let mut world = usual();
    let mut governor = Governor::new();
    assert_eq!(governor.plan(), Plan::Raw);
    world.run(&mut governor, 100);
    assert!(governor.plan().uses_cache(), "{:?}", governor.plan());
    assert!(world.seconds(governor.plan()) < world.seconds(Plan::Raw) / 2.0);
    // The link becomes fast: what costs more than it saves ends.
    world.link_bytes_per_second = 1e12;
    world.run(&mut governor, 200);
    assert_eq!(governor.plan(), Plan::Raw);
    // And slow again.
    world.link_bytes_per_second = 125e6;
    world.run(&mut governor, 800);
    assert!(world.seconds(governor.plan()) < world.best_seconds() * 1.15, "{:?}", governor.plan());
}

#[test]
fn a_backup_that_is_slow_to_decode_is_not_taken_for_a_slow_link() {
    for backup in [0.7e-6, 1e-6, 3e-6, 10e-6] {
        let mut world =
            World { backup: USUAL_EXTRA.map(|usual| if usual > 0.0 { backup } else { 0.0 }), ..usual() };
        let mut governor = Governor::new();
        world.run(&mut governor, 100);
        assert!(governor.plan().uses_cache(), "{:?}", governor.plan());
        // The link is no limit any more: what is left of the time is the backup's.
        world.link_bytes_per_second = 4e9;
        world.run(&mut governor, 300);
        assert_eq!(governor.plan(), Plan::Raw, "{backup}");
        let times = Plan::ALL.map(|plan| world.seconds(plan));
        assert!(times[1..].iter().all(|time| *time > times[0]), "the test is wrong: {times:?}");
    }
}

#[test]
fn a_link_that_becomes_slower_or_faster_is_found_out_while_pages_are_encoded() {
    for (from, to) in [(125e6, 12.5e6), (12.5e6, 125e6), (125e6, 70e6), (70e6, 125e6)] {
        let (mut world, mut governor) = (World { link_bytes_per_second: from, ..usual() }, Governor::new());
        world.run(&mut governor, 100);
        assert!(governor.plan().uses_cache(), "{:?}", governor.plan());
        world.link_bytes_per_second = to;
        world.run(&mut governor, 2 * PROBE);
        let known = governor.link_bytes_per_second().unwrap();
        assert!((known / to - 1.0).abs() < 0.3, "{from} to {to}: {known}");
        assert!(world.seconds(governor.plan()) < world.best_seconds() * 1.15, "{:?}", governor.plan());
    }
}

#[test]
fn pages_of_zeros_cost_too() {
    // An epoch of 50 pages and a thousand of zeros, on a link that is none too fast: what the cache makes of zeros is more than
    // it saves.
    let mut world = World { pages: 200, zeros: 5000, link_bytes_per_second: 1.25e9, noise: 0.0, ..usual() };
    for (cost, usual) in world.costs.iter_mut().zip(USUAL).skip(1) {
        cost[2].nanos = usual[2].nanos * 2.0;
    }
    let mut governor = Governor::new();
    world.run(&mut governor, 300);
    assert_eq!(governor.plan(), Plan::Raw);
    let without = World { zeros: 0, ..world.clone() };
    assert!(without.seconds(Plan::Delta) < without.seconds(Plan::Raw), "the test is wrong");
}

#[test]
fn no_spare_cpu_makes_work_dear() {
    let mut world = World {
        pages: 4000,
        link_bytes_per_second: 1.5e9,
        costs: [[Cost { nanos: 1500.0, bytes: 2000.0 }; 3]; 5],
        ..usual()
    };
    world.costs[0] = USUAL[0];
    let mut governor = Governor::new();
    world.run(&mut governor, 100);
    let with_cpu = governor.plan();
    world.spare_cpus = 0.0;
    world.run(&mut governor, 200);
    assert_eq!((with_cpu == Plan::Raw, governor.plan()), (false, Plan::Raw));
}

#[test]
fn more_threads_pay_where_one_does_not_and_only_while_they_work() {
    // 10 Gbit/s carries a raw page faster than one thread makes an LZ4 block of it, and slower than four do.
    let (lz4, dear) = (Cost { nanos: 4000.0, bytes: 1000.0 }, Cost { nanos: 9000.0, bytes: 3000.0 });
    let costs = [[USUAL[0][0]; 3], [lz4; 3], [dear; 3], [dear; 3], [dear; 3]];
    let world = World { costs, link_bytes_per_second: 1.25e9, spare_cpus: 4.0, noise: 0.0, ..usual() };
    let mut one = Governor::new();
    world.clone().run(&mut one, 300);
    assert_eq!(one.plan(), Plan::Raw);
    let mut world = World { max_threads: 4, threads: 3.5, ..world };
    let mut four = Governor::new().with_threads(4);
    world.run(&mut four, 300);
    assert_eq!(four.plan(), Plan::Lz4);
    // Other guests take the threads, though the host has CPUs left.
    world.threads = 1.0;
    world.run(&mut four, 100);
    assert_eq!(four.plan(), Plan::Raw);
}

#[test]
fn a_link_that_changes_all_the_time_does_not_make_it_flap() {
    for period in [1, 2, 5, 10, 40] {
        let (mut world, mut governor, mut changes) = (usual(), Governor::new(), 0);
        for i in 0..4000 {
            world.link_bytes_per_second = if i / period % 2 == 0 { 100e6 } else { 5e9 };
            changes += world.run(&mut governor, 1);
        }
        assert!(changes <= 100, "{changes} changes at a period of {period} epochs");
    }
}

#[test]
fn a_change_says_why() {
    let (mut world, mut governor) = (usual(), Governor::new());
    let change = (0..100)
        .find_map(|_| {
            let seen = world.epoch(&governor);
            governor.step(&seen, CodecSet::ALL)
        })
        .unwrap();
    assert_eq!(change.from, Plan::Raw);
    assert!(change.reason.contains("MB/s") && change.reason.contains("raw"), "{}", change.reason);
}
