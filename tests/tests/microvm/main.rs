//! Failovers of a real KVM guest, by the hundred: the micro-VM is captured, replicated over loopback and promoted by
//! the agents as they are shipped, and its host dies at a chosen point of every phase of an epoch.
//!
//! After each death the guest goes on from exactly one committed epoch (invariants 2, 3, 6): registers and memory
//! are those the guest had at that stop, read there by other means than the capture; and it goes on counting,
//! every page being what the number of its steps says. It is then the source of the next round, so that nothing lost on the
//! way stays hidden.
//!
//! `UNDERSTUDY_MICROVM_CYCLES` is the number of deaths, `UNDERSTUDY_SEED` repeats the choices of a run.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends by panicking")]

mod hosts;
mod link;
mod random;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::runtime::{Builder, Runtime};
use tokio_stream::StreamExt;
use understudy_backup::agent::{Agent, Operator};
use understudy_backup::control_store::ControlFolder;
use understudy_backup::guest::Tools;
use understudy_backup::image::AnonymousMemory;
use understudy_primary::agent::{self, Output, Plan};
use understudy_primary::capture::micro::{DirtyTracking, MicroSource, MicroVm, Shape, program, unusable};
use understudy_primary::encode::{Compress, Encoding};
use understudy_primary::engine::Settings;
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::negotiate::Offer;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::FailoverRequest;
use understudy_proto::rpc::epoch::Hello;
use understudy_proto::rpc::{AdminService, epoch_routes, transport};
use understudy_proto::units::PAGE_BYTES;

use hosts::{FIRST_EPOCH, History, MicroPromoter, PrimaryHost, Truth};
use link::{Cuttable, KILL_POINTS, KillPoint, Link};
use random::Random;

/// Only a bound for a test that hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Deaths a guest lives through before another one is made.
const LIVES: u64 = 25;

/// Guests at the same time. The agents wait for each other more than they compute.
const WORKERS: u64 = 4;

const TRACKINGS: [DirtyTracking; 3] = [DirtyTracking::Log, DirtyTracking::ManualProtect, DirtyTracking::Ring];

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable}={value} is not a number")))
}

#[test]
fn every_death_ends_in_a_committed_epoch() {
    if let Some(reason) = unusable() {
        println!("SKIPPED {reason}");
        return;
    }
    let cycles = number("UNDERSTUDY_MICROVM_CYCLES").unwrap_or(30);
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = number("UNDERSTUDY_SEED").unwrap_or(u64::from(since_1970.subsec_nanos()));
    println!(
        "seed {seed}; again: UNDERSTUDY_SEED={seed} UNDERSTUDY_MICROVM_CYCLES={cycles} cargo test -p understudy-tests \
         --test microvm"
    );
    let began = Instant::now();
    let tally = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let tally = &tally;
            scope.spawn(move || {
                let share = cycles / WORKERS + u64::from(worker < cycles % WORKERS);
                lives(share, worker, seed, tally);
            });
        }
    });
    for ((point, survived), count) in tally.lock().unwrap().iter() {
        println!("{count:6} {point:?}{}", if *survived { "" } else { ", before the first commit" });
    }
    println!("{cycles} deaths in {:.1} s", began.elapsed().as_secs_f64());
}

/// Deaths by kill point, and whether anything had been committed.
type Tally = BTreeMap<(KillPoint, bool), u64>;

/// One guest's deaths after the other.
fn lives(cycles: u64, worker: u64, seed: u64, tally: &Mutex<Tally>) {
    let backups = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut random = Random::new(seed.wrapping_add(worker << 32));
    let mut guest: Option<Guest> = None;
    for cycle in 0..cycles {
        let old = guest.take().filter(|guest| guest.lives < LIVES);
        let mut life = old.unwrap_or_else(|| Guest::new(&mut random));
        let (point, nth) = (random.pick(&KILL_POINTS), random.below(5));
        let what = format!(
            "seed {seed}, worker {worker}, cycle {cycle}: {point:?} of epoch {}, life {} of {:?}",
            FIRST_EPOCH + nth,
            life.lives,
            life.shape
        );
        let survived = live_and_die(&backups, &mut life, &mut random, (point, nth), &what);
        *tally.lock().unwrap().entry((point, survived)).or_default() += 1;
        guest = survived.then_some(life);
    }
}

/// A guest over its lives.
#[derive(Debug)]
struct Guest {
    vm: MicroVm,
    shape: Shape,
    lives: u64,
}

impl Guest {
    fn new(random: &mut Random) -> Self {
        let pages = 16 + random.below(150);
        let shape = Shape {
            pages,
            written_pages: 1 + random.below(pages),
            rounds_per_report: 1 + random.below(40),
            tracking: random.pick(&TRACKINGS),
        };
        Self { vm: MicroVm::create(&shape).expect("a micro-VM"), shape, lives: 0 }
    }

    /// Runs to the end of a round and compares all of memory with what the steps say.
    fn check(&self, what: &str) -> u64 {
        let reported = self.vm.run_until_report().unwrap_or_else(|error| panic!("{what}: {error}"));
        let steps = self.vm.steps().unwrap();
        assert_eq!(steps & u64::from(u32::MAX), u64::from(reported), "{what}");
        let (mut page, written) = ([0; PAGE_BYTES], self.shape.written_pages);
        for index in 0..self.shape.pages {
            assert!(self.vm.read_page((1, index), &mut page));
            let expected = program::expected_page(index, written, steps / written);
            let wrong = page.chunks(8).zip(expected.chunks(8)).position(|(is, should)| is != should);
            assert_eq!(wrong, None, "{what}: page {index} after {steps} steps is wrong at this word");
        }
        steps
    }
}

/// One protection, from the full copy to the death of the host and the failover; false if nothing was committed.
fn live_and_die(
    backups: &Runtime,
    guest: &mut Guest,
    random: &mut Random,
    (point, nth): (KillPoint, u64),
    what: &str,
) -> bool {
    let epoch = FIRST_EPOCH + nth;
    let generation = Generation(1 + guest.lives);
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let promoter = Arc::new(MicroPromoter { tracking: random.pick(&TRACKINGS), promoted: Mutex::default() });
    let tools = Tools {
        promoter: Arc::clone(&promoter) as _,
        store: Arc::new(ControlFolder::open(folder.path()).unwrap()),
        memory: Arc::new(AnonymousMemory),
        dump: understudy_backup::dump::Dump::default(),
        pool: Pool::new("decode", 2).unwrap(),
        versions: Default::default(),
    };
    let (agent, link, address, served) = backups.block_on(async {
        let agent = Agent::start(tools, 64 << 20).await.unwrap();
        let link = Link::new(Arc::clone(&agent), point, epoch, random.below(4));
        let incoming = transport::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap().to_string();
        let routes = epoch_routes(Arc::new(Cuttable(Arc::clone(&link))));
        let served = tokio::spawn(transport::server().add_routes(routes).serve_with_incoming(incoming));
        (agent, link, address, served)
    });

    let history = History::default();
    guest.vm.run().unwrap();
    protect_and_kill(guest, generation, &address, (&link, &history), random.below(2000), what);

    let failed_over = backups.block_on(async {
        let request =
            FailoverRequest { domain: "micro".to_owned(), i_have_fenced: true, hold: false, term: None };
        let result = tokio::time::timeout(LIMIT, async {
            let mut progress = Operator(Arc::clone(&agent)).failover(request).await?;
            let mut last = None;
            while let Some(step) = progress.next().await {
                last = Some(step?);
            }
            Ok(last)
        });
        let result = result.await.unwrap_or_else(|_| panic!("{what}: the failover does not end"));
        served.abort();
        agent.shutdown().await;
        result
    });
    let (complete, acked) = link.newest();
    let report = match failed_over {
        Ok(last) => last.and_then(|step| step.failover).unwrap_or_else(|| panic!("{what}: no report")),
        Err(failure) => {
            let failure: understudy_proto::rpc::Failure = failure;
            assert_eq!((failure.code.as_ref(), complete), ("no-image", None), "{what}: {failure}");
            return false;
        }
    };
    let (promoted, vm) = promoter.promoted.lock().unwrap().take().expect("a guest");
    assert_eq!((report.epoch.0, report.generation), (promoted, generation.next()), "{what}");
    // Invariant 3: never older than what the primary was told; and never one that was not whole.
    assert!(
        acked <= Some(promoted) && Some(promoted) <= complete,
        "{what}: {acked:?} {promoted} {complete:?}"
    );
    match point {
        KillPoint::BeforeReply => assert!(promoted >= epoch, "{what}: epoch {promoted}"),
        KillPoint::BeforeAck | KillPoint::AfterAck => assert_eq!(promoted, epoch, "{what}"),
        _ => assert_eq!(promoted, epoch - 1, "{what}"),
    }
    // Invariant 2.
    let truth = history.lock().unwrap().get(&promoted).cloned().expect("an epoch that was captured");
    assert_eq!(Truth::of(&vm).as_ref(), Ok(&truth), "{what}: not what it was at the end of epoch {promoted}");
    guest.vm = vm;
    guest.lives += 1;
    assert!(guest.check(what) >= truth.steps, "{what}");
    true
}

/// The primary's host: an agent, and a guest that runs. All of it is gone at the end.
fn protect_and_kill(
    guest: &Guest,
    generation: Generation,
    address: &str,
    (link, history): (&Arc<Link>, &History),
    later_us: u64,
    what: &str,
) {
    let host = Arc::new(PrimaryHost::default());
    let plan = Plan {
        hello: Hello {
            offer: Offer::ours(),
            guest: GuestId(uuid::Uuid::from_u128(0x0dd)),
            guest_name: "micro".to_owned(),
            generation,
            session: 0,
            primary_host: "alpha".to_owned(),
            qemu_version: String::new(),
            machine: "micro".to_owned(),
            persistent: false,
            lane_key: None,
        },
        to: address.to_owned(),
        security: understudy_proto::rpc::transport::Security::Plain,
        settings: Settings {
            generation,
            epoch: Duration::from_millis(1),
            goals: None,
            floor: Duration::from_millis(1),
            attended: false,
            first_session: 1,
            peer: address.to_owned(),
        },
        libvirt_version: String::new(),
        barrier: host.barrier(&guest.vm, history, link),
        output: Output::Ungated,
        host,
        source: Box::new(MicroSource::new(guest.vm.clone()).unwrap()),
        connections: 4,
        // Loopback is too fast for the governor to find anything worthwhile: every codec, and the shipped choice.
        encoding: Encoding {
            compress: if generation.0.is_multiple_of(3) { Compress::Auto } else { Compress::Always },
            cache_bytes: 4 << 20,
            pool: Pool::new("encode", 2).unwrap(),
        },
    };
    let primary = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    primary.block_on(async {
        let _handle = agent::start(plan).await.unwrap();
        let mut due = link.due();
        let waited = tokio::time::timeout(LIMIT, due.wait_for(|due| *due)).await;
        assert!(waited.is_ok(), "{what}: the moment to die never came");
        if link.at().0 == KillPoint::BeforeReply {
            tokio::time::sleep(Duration::from_micros(later_us)).await;
        }
    });
    // A power cut: the guest, the link and the agent, none of them asked.
    link.cut();
    guest.vm.power_off();
    primary.shutdown_background();
}
