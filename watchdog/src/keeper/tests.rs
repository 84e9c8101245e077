//! Two keepers with heartbeats over loopback and a record they share. Only the agents are made up.

mod chosen;
mod failures;
mod fenced;
mod forged;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use understudy_proto::ids::{EpochId, Generation, Incarnation};
use understudy_proto::ownership::{Owner, Ownership, Term};
use understudy_proto::policy::GuestSettings;
use understudy_proto::rpc::Failure;
use understudy_proto::rpc::async_trait;
use understudy_proto::sealed::{HeartbeatKey, MIN_KEY_BYTES, Seal};

use super::*;
use understudy_proto::rpc::owner::{Question, Told};

use crate::owner::{Command, Image, Local, Sending};

const SENDING: Sending = Sending { generation: Generation(1), committed: EpochId(7), held: Some(Term::NONE) };
const GUEST: GuestId = GuestId(uuid::Uuid::from_u128(1));
const IMAGE: Image = Image { incarnation: Incarnation(uuid::Uuid::from_u128(2)), generation: Generation(1) };
/// For a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Memory {
    kept: Mutex<Option<Ownership>>,
    /// Gives no answer.
    silent: AtomicBool,
}

impl Memory {
    fn get(&self) -> Option<Ownership> {
        self.kept.lock().unwrap().clone()
    }

    fn answers(&self) -> Result<(), Failure> {
        if self.silent.load(Ordering::Relaxed) {
            return Err(Failure::new(
                understudy_proto::rpc::FailureKind::Unavailable,
                "silent",
                "it is silent",
            ));
        }
        Ok(())
    }
}

#[async_trait]
impl Arbiter for Memory {
    async fn read(&self, _: GuestId) -> Result<Option<Ownership>, Failure> {
        self.answers().map(|()| self.get())
    }

    async fn swap(&self, _: GuestId, new: &Ownership) -> Result<(), Failure> {
        self.answers()?;
        let mut kept = self.kept.lock().unwrap();
        if kept.as_ref().map_or(Term::NONE, |kept| kept.term).next() == new.term {
            *kept = Some(new.clone());
        }
        Ok(())
    }

    fn name(&self) -> String {
        "memory".into()
    }
}

/// What is on a host, and what was done there.
struct FakeHost(Mutex<(Seen, Vec<Command>)>, Mutex<Vec<String>>);

impl FakeHost {
    fn new(local: Local, sending: Option<Sending>) -> Arc<Self> {
        let qemu = local.runs.then(Instant::now);
        let protecting = sending.is_some();
        let listed = protecting;
        let seen = Seen {
            guest: GUEST,
            name: "g1".into(),
            place: if local.runs { Place::Answers } else { Place::Unknown },
            local,
            sending,
            listed,
            protecting,
            degraded: false,
            busy: false,
            epoch: EpochId(7),
            qemu,
            superseded: false,
            over: None,
            promotion: None,
            held_bytes: None,
            settings: None,
        };
        Arc::new(Self(Mutex::new((seen, Vec::new())), Mutex::default()))
    }

    fn done(&self) -> Vec<Command> {
        self.0.lock().unwrap().1.clone()
    }

    fn change(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.0.lock().unwrap().0);
    }
}

#[async_trait]
impl Host for FakeHost {
    async fn look(&self, _: &[GuestId]) -> Vec<Seen> {
        let mut kept = self.0.lock().unwrap();
        if kept.0.local.runs {
            kept.0.qemu = Some(Instant::now());
        }
        vec![kept.0.clone()]
    }

    async fn carry_out(&self, _: GuestId, command: Command) -> Option<Event> {
        let mut kept = self.0.lock().unwrap();
        kept.1.push(command.clone());
        match command {
            Command::Load(_) => return Some(Event::Loaded),
            Command::Activate(_) => {
                kept.0.local = Local { runs: true, image: None, generation: Some(Generation(2)) };
            }
            Command::OpenGate(_) => (kept.0.protecting, kept.0.sending) = (false, None),
            Command::DestroyGuest(_) => kept.0.local = Local::default(),
            Command::HoldGate(term) => {
                kept.0.sending = kept.0.sending.map(|sending| Sending { held: Some(term), ..sending });
            }
            _ => {}
        }
        None
    }

    async fn protect(
        &self,
        _: GuestId,
        to: &str,
        as_before: Option<GuestSettings>,
        _: Term,
    ) -> Result<(), Failure> {
        let how = as_before.map_or(String::new(), |before| format!(" as {}", said(&before)));
        self.1.lock().unwrap().push(format!("protect {to}{how}"));
        Err(Failure::new(understudy_proto::rpc::FailureKind::Unavailable, "unreachable", "nobody there"))
    }

    async fn promote_fenced(&self, _: GuestId) -> Result<(), Failure> {
        let mut kept = self.0.lock().unwrap();
        kept.0.local = Local { runs: true, image: None, generation: Some(Generation(2)) };
        kept.0.place = Place::Answers;
        Ok(())
    }

    async fn hand_over(&self, _: GuestId, _: Term) -> Result<EpochId, Failure> {
        self.1.lock().unwrap().push("hand over".to_owned());
        Ok(EpochId(7))
    }

    async fn take_back(&self, _: GuestId, _: Term) -> Result<(), Failure> {
        self.1.lock().unwrap().push("take back".to_owned());
        Ok(())
    }
}

fn said(settings: &GuestSettings) -> String {
    String::from_utf8(settings.encode().unwrap()).unwrap()
}

struct Pair {
    record: Arc<Memory>,
    alpha: Arc<FakeHost>,
    beta: Arc<FakeHost>,
    keepers: Vec<tokio::task::JoinHandle<std::io::Result<()>>>,
    /// Alpha's and beta's.
    ask: Vec<mpsc::Sender<Asking>>,
    folder: tempfile::TempDir,
    /// Where beta listens.
    second: std::net::SocketAddr,
}

fn questions() -> (mpsc::Sender<Asking>, Questions) {
    mpsc::channel(4)
}

fn settings(host: &str, policies: Policies, timing: Timing, folder: &std::path::Path) -> Settings {
    Settings {
        host: host.into(),
        policies,
        timing,
        limits: Limits { arbiter: Duration::from_secs(1), load: Duration::from_secs(20) },
        fence: None,
        spares: vec![if host == "alpha" { "beta".into() } else { "alpha".into() }],
        reports: Reports::new(folder.join(host)),
    }
}

fn seal() -> Seal {
    Seal::new(HeartbeatKey::new(&[7; MIN_KEY_BYTES]).unwrap(), uuid::Uuid::new_v4())
}

async fn pair(policies: Policies) -> Pair {
    pair_with(policies, None, None).await
}

/// What alpha sends goes to the relay, if there is one; it is told where the two listen. Both have the fencing command.
async fn pair_with(
    policies: Policies,
    relay: Option<&forged::Relay>,
    fence: Option<Arc<crate::arbiter::FenceCommand>>,
) -> Pair {
    let record = Arc::new(Memory::default());
    let runs = Local { runs: true, image: None, generation: Some(Generation(1)) };
    let sending = SENDING;
    let alpha = FakeHost::new(runs, Some(sending));
    let beta = FakeHost::new(Local { runs: false, image: Some(IMAGE), generation: None }, None);
    let any = "127.0.0.1:0".parse().unwrap();
    let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = free.local_addr().unwrap();
    drop(free);
    let second = Paths::open(any, vec![at], seal()).await.unwrap();
    let back = second.address().unwrap();
    let to = relay.map_or(back, |relay| relay.between(at, back));
    let first = Paths::open(at, vec![to], seal()).await.unwrap();
    // Generous: a busy machine must not look like a death.
    let second_long = Duration::from_secs(5);
    let timing = Timing { primary_silent: second_long, backup_silent: second_long, ..Timing::default() };
    let (mut keepers, mut ask, folder) = (Vec::new(), Vec::new(), tempfile::tempdir().unwrap());
    for (name, host, paths) in [("alpha", &alpha, first), ("beta", &beta, second)] {
        let (mut settings, asked) = (settings(name, policies, timing, folder.path()), questions());
        settings.fence = fence.clone();
        let (arbiter, host): (Arc<dyn Arbiter>, Arc<dyn Host>) = (record.clone(), host.clone());
        keepers.push(tokio::spawn(run(settings, arbiter, host, paths, asked.1)));
        ask.push(asked.0);
    }
    let pair = Pair { record, alpha, beta, keepers, ask, folder, second: back };
    pair.until("both agree", |record| {
        matches!(&record.owner, Owner::Pair { primary, backup, .. } if primary == "alpha" && backup == "beta")
    })
    .await;
    pair
}

impl Pair {
    async fn until(&self, what: &str, is: impl Fn(&Ownership) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !self.record.get().as_ref().is_some_and(&is) {
            assert!(Instant::now() < end, "not reached: {what}; {:?}", self.record.get());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Beta has read the record too: before that it suspects nobody.
    async fn standby(&self) {
        let end = Instant::now() + PATIENCE;
        while !self.answer(1, Question::Switchover).await.unwrap_err().reason.contains("standby") {
            assert!(Instant::now() < end, "beta has not read the record");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_done(host: &FakeHost, what: impl Fn(&Command) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !host.done().iter().any(&what) {
            assert!(Instant::now() < end, "not done; {:?}", host.done());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn a_dead_primary_is_replaced_without_anybody_and_its_stale_guest_is_ended_when_it_is_back() {
    let pair = pair(Policies::default()).await;
    pair.keepers[0].abort();
    pair.until("taken over", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta"))
        .await;
    Pair::until_done(&pair.beta, |command| matches!(command, Command::Activate(_))).await;
    let done = pair.beta.done();
    let at = |wanted: fn(&Command) -> bool| done.iter().position(wanted).unwrap();
    assert!(at(|c| matches!(c, Command::Load(_))) < at(|c| matches!(c, Command::Activate(_))), "{done:?}");
    assert_eq!(
        pair.record.get().map(|record| (record.term, record.generation)),
        Some((Term(3), Generation(2)))
    );
    // The old host comes back with its guest still there.
    let settings = settings("alpha", Policies::default(), Timing::default(), pair.folder.path());
    let paths = Paths::open("127.0.0.1:0".parse().unwrap(), vec![], seal()).await.unwrap();
    tokio::spawn(run(settings, pair.record.clone(), pair.alpha.clone(), paths, questions().1));
    Pair::until_done(&pair.alpha, |command| matches!(command, Command::DestroyGuest(_))).await;
    assert!(!pair.alpha.done().iter().any(|command| matches!(command, Command::OpenGate(_))));
}

#[tokio::test]
async fn a_guest_that_was_shut_down_is_not_brought_back() {
    let pair = pair(Policies::default()).await;
    // As the agent leaves it: not listed any more, be it shut down or unprotected.
    pair.alpha.change(|seen| {
        (seen.local.runs, seen.listed, seen.protecting, seen.sending) = (false, false, false, None);
    });
    pair.until("ended", |record| matches!(&record.owner, Owner::Ended { by } if by == "alpha")).await;
    pair.keepers[0].abort();
    // Longer than the silence that is suspicious.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(
        !pair.beta.done().iter().any(|command| matches!(command, Command::Load(_) | Command::Activate(_)))
    );
}

#[tokio::test]
async fn a_lost_backup_lets_the_primary_go_on_alone_only_if_it_may() {
    let solo = Policies { lost_backup: crate::owner::LostBackup::Solo, ..Policies::default() };
    let pair = pair(solo).await;
    pair.keepers[1].abort();
    pair.until("alone", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "alpha")).await;
    Pair::until_done(&pair.alpha, |command| matches!(command, Command::OpenGate(Term(2)))).await;
}

#[tokio::test]
async fn the_survivor_asks_for_a_backup_and_reports_the_takeover() {
    let pair = pair(Policies::default()).await;
    pair.keepers[0].abort();
    let json = pair.report().await;
    assert_eq!(json["fencing"]["outcome"], "not configured", "{json}");
    assert_eq!((json["kind"].as_str(), json["epoch"].as_u64()), (Some("takeover"), Some(9)), "{json}");
    assert!(json["suspected"].as_str().unwrap().contains("silent"), "{json}");
}

fn promotion() -> understudy_proto::rpc::admin::FailoverReport {
    let zero = Duration::ZERO;
    understudy_proto::rpc::admin::FailoverReport {
        epoch: EpochId(9),
        generation: Generation(2),
        finish_apply: zero,
        record: zero,
        prepare: zero,
        load: zero,
        resume: zero,
        announce: zero,
        total: zero,
        warnings: vec![],
    }
}

impl Pair {
    /// Beta's, of the takeover that is under way; by then it has asked for a backup.
    async fn report(&self) -> serde_json::Value {
        let end = Instant::now() + PATIENCE;
        while !self.beta.1.lock().unwrap().contains(&"protect alpha".to_owned()) {
            assert!(Instant::now() < end, "nobody is asked; {:?}", self.beta.done());
            // The agent has told of the promotion, or the report would be waited for.
            self.beta.change(|seen| {
                if seen.local.runs && seen.promotion.is_none() {
                    seen.promotion = Some(promotion());
                }
            });
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let told = self.answer(1, Question::Report).await.unwrap();
        serde_json::from_str(&told.json).unwrap()
    }

    /// As soon as the keeper has read the record.
    async fn granted(&self, keeper: usize, question: Question) -> Told {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.answer(keeper, question).await {
                Ok(told) => return told,
                Err(failure) => assert!(Instant::now() < end, "{failure}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn answer(&self, keeper: usize, question: Question) -> Result<Told, Failure> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let asking = Asking { question, domain: "g1".into(), reply };
        assert!(self.ask[keeper].send(asking).await.is_ok());
        tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn a_guest_is_handed_over_and_its_home_is_known() {
    let pair = pair(Policies::default()).await;
    assert_eq!(pair.answer(1, Question::Switchover).await.unwrap_err().code, "not-protected");
    let told = pair.granted(0, Question::Switchover).await;
    assert!(told.text.contains("runs on beta"), "{}", told.text);
    let done = pair.alpha.1.lock().unwrap().clone();
    assert_eq!(done, ["hand over"]);
    pair.until("at beta", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta")).await;
    Pair::until_done(&pair.alpha, |command| matches!(command, Command::DestroyGuest(_))).await;
}

#[tokio::test]
async fn an_operator_claims_a_guest_whose_primary_lives() {
    let pair = pair(Policies::default()).await;
    assert_eq!(pair.answer(0, Question::Failover).await.unwrap_err().code, "not-standby");
    pair.granted(1, Question::Failover).await;
    pair.until("at beta", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta")).await;
}
