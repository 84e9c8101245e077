use super::*;
use crate::assembly::Proof;
use crate::promoter::Activation;
use bytes::Bytes;
use standby::{STANDBY_CHECK_INTERVAL, STANDBY_RETRY_INTERVAL};
use understudy_proto::digest::Digest;
use understudy_proto::epoch::EpochManifest;
use understudy_proto::ids::{EpochId, Incarnation};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::negotiate::{Agreement, Offer};
use understudy_proto::rpc::epoch::{
    BackupMessage, Begin, DevicePiece, GoodbyeReason, Hello, Pages, PrimaryMessage, RefusedCode, RejectCode,
};

mod failures;
mod hold;

const GUEST: GuestId = GuestId(uuid::Uuid::from_u128(1));

/// An engine with a clock and the connection numbers a test needs.
struct Bench {
    engine: Engine,
    now: Instant,
}

fn identity() -> Identity {
    Identity {
        host: "beta".into(),
        incarnation: Incarnation(uuid::Uuid::from_u128(2)),
        qemu_version: None,
        libvirt_version: None,
        staging_max_bytes: 10_000,
    }
}

fn at(generation: u64, epoch: u64) -> EpochRef {
    EpochRef { generation: Generation(generation), epoch: EpochId(epoch) }
}

fn seed(xml: &str) -> Seed {
    let block = RamBlock { name: "pc.ram".into(), used_bytes: 8 * 4096 };
    Seed { layout: MemoryLayout::new(vec![block], vec![], 2).unwrap(), domain_xml: xml.into() }
}

fn manifest(at: EpochRef, kind: EpochKind) -> EpochManifest {
    EpochManifest {
        generation: at.generation,
        epoch: at.epoch,
        kind,
        frames: 1,
        pages: 1,
        frame_bytes: 1,
        pages_digest: Digest(0),
        device_bytes: 1,
        device_digest: Digest(0),
    }
}

fn cold() -> Result<Way, PromoteError> {
    Ok(Way::Cold(String::new()))
}

impl Bench {
    fn new() -> Self {
        Self { engine: Engine::new(identity(), GUEST, "web".into()), now: Instant::now() }
    }

    fn step(&mut self, event: Event) -> Vec<Command> {
        self.engine.step(event, self.now)
    }

    fn hello_from(
        &mut self,
        c: u64,
        generation: u64,
        session: u64,
        host: &str,
        local: LocalDomain,
    ) -> Vec<Command> {
        let hello = Hello {
            offer: Offer::ours(),
            guest: GUEST,
            guest_name: "web".into(),
            generation: Generation(generation),
            session,
            primary_host: host.into(),
            qemu_version: "7.2.22".into(),
            machine: "pc-q35-7.2".into(),
            persistent: true,
            lane_key: None,
        };
        let agreement = Agreement { version: 1, features: Default::default() };
        self.step(Event::Hello { connection: ConnectionId(c), hello: Box::new(hello), agreement, local })
    }

    fn hello(&mut self, c: u64, generation: u64) -> Vec<Command> {
        self.hello_from(c, generation, c, "alpha", LocalDomain::Absent)
    }

    fn say(&mut self, c: u64, message: PrimaryMessage) -> Vec<Command> {
        self.step(Event::Message(ConnectionId(c), message))
    }

    fn begin(&mut self, c: u64, at: EpochRef, kind: EpochKind) -> Vec<Command> {
        self.say(c, PrimaryMessage::Begin(Begin { generation: at.generation, epoch: at.epoch, kind }))
    }

    /// Everything of an epoch, up to its acknowledgement.
    fn commit(&mut self, c: u64, at: EpochRef, kind: EpochKind) -> Vec<Command> {
        if kind == EpochKind::Full {
            self.say(c, PrimaryMessage::Seed(seed("<domain/>")));
        }
        let opened = self.begin(c, at, kind);
        assert!(matches!(opened.as_slice(), [Command::Open(..)]), "{opened:?}");
        let verify = self.say(c, PrimaryMessage::Manifest(manifest(at, kind)));
        assert!(matches!(verify.as_slice(), [Command::Verify(_)]), "{verify:?}");
        let proof = Proof::for_test(self.engine.attempt, at, kind);
        self.step(Event::Verified(proof))
    }

    /// A guest with epoch 5 of generation 1 committed, its stream gone, its standby ready.
    fn standby() -> Self {
        let mut bench = Self::new();
        bench.hello(1, 1);
        bench.commit(1, at(1, 5), EpochKind::Full);
        bench.step(Event::Prepared(cold()));
        bench.step(Event::Disconnected(ConnectionId(1), "gone".into()));
        bench
    }

    /// The same, loaded: the next thing is the record.
    fn loaded() -> (Self, Vec<Command>) {
        let mut bench = Self::standby();
        bench.step(Event::Failover { i_have_fenced: false });
        bench.step(Event::ImageReady(Some(at(1, 5))));
        let out = bench.step(Event::Loaded(Ok(())));
        (bench, out)
    }

    fn promoted() -> Self {
        let (mut bench, _) = Self::loaded();
        bench.step(Event::ControlWritten);
        bench.step(Event::Activated(Ok(Activation::default())));
        bench
    }
}

fn refused(out: &[Command]) -> Option<(RefusedCode, Option<Generation>)> {
    out.iter().find_map(|c| match c {
        Command::Send(_, BackupMessage::Refused(r)) => Some((r.code, r.generation)),
        _ => None,
    })
}

fn rejected(out: &[Command]) -> Option<RejectCode> {
    out.iter().find_map(|c| match c {
        Command::Send(_, BackupMessage::Reject(r)) => Some(r.code),
        _ => None,
    })
}

fn hello_ack(out: &[Command]) -> Option<Option<EpochRef>> {
    out.iter().find_map(|c| match c {
        Command::Send(_, BackupMessage::HelloAck(a)) => Some(a.last_committed),
        _ => None,
    })
}

fn acks(out: &[Command]) -> bool {
    out.iter().any(|c| matches!(c, Command::Ack(..)))
}

fn failure(out: &[Command]) -> Option<&Failure> {
    out.iter().find_map(|c| match c {
        Command::FailoverDone(outcome) => outcome.as_ref().as_ref().err(),
        _ => None,
    })
}

#[test]
fn a_new_guest_is_recorded_before_its_hello_is_answered() {
    let out = Bench::new().hello(1, 1);
    let [Command::WriteControl { file, required: true }, Command::Send(_, BackupMessage::HelloAck(_)), ..] =
        out.as_slice()
    else {
        panic!("{out:?}")
    };
    assert_eq!((file.role, file.generation), (Role::Standby, Generation(1)));
}

#[test]
fn an_older_generation_is_superseded_everywhere() {
    let mut bench = Bench::new();
    bench.hello(1, 3);
    let superseded = Some((RefusedCode::Superseded, Some(Generation(3))));
    assert_eq!(refused(&bench.hello(2, 2)), superseded);
    // After the protection has ended, too.
    bench.say(1, PrimaryMessage::Goodbye(GoodbyeReason::Unprotected));
    assert_eq!(bench.engine.state(), GuestState::Unprotected);
    assert_eq!(refused(&bench.hello(3, 2)), superseded);
    assert_eq!(hello_ack(&bench.hello(4, 3)), Some(None));
    // And after a restart.
    let mut again = Bench {
        engine: Engine::restarted(identity(), bench.engine.record().clone(), LocalDomain::Absent),
        now: bench.now,
    };
    assert_eq!(refused(&again.hello(1, 2)), superseded);
}

#[test]
fn a_newer_generation_makes_the_image_worthless() {
    let mut bench = Bench::standby();
    let out = bench.hello(2, 2);
    assert!(out.contains(&Command::DropImage) && out.contains(&Command::Discard));
    assert_eq!(hello_ack(&out), Some(None));
    assert_eq!(bench.engine.committed(), None);
}

#[test]
fn a_guest_has_one_stream() {
    let mut bench = Bench::new();
    bench.hello_from(1, 1, 10, "alpha", LocalDomain::Absent);
    let busy = Some((RefusedCode::Busy, Some(Generation(1))));
    assert_eq!(refused(&bench.hello_from(2, 1, 10, "alpha", LocalDomain::Absent)), busy);
    assert_eq!(refused(&bench.hello_from(3, 1, 9, "alpha", LocalDomain::Absent)), busy);
    assert_eq!(refused(&bench.hello_from(4, 1, 99, "gamma", LocalDomain::Absent)), busy);
    assert_eq!(bench.engine.connection(), Some(ConnectionId(1)));
    let out = bench.hello_from(5, 1, 11, "alpha", LocalDomain::Absent);
    assert_eq!(out.first(), Some(&Command::Close(ConnectionId(1))));
    assert_eq!(bench.engine.connection(), Some(ConnectionId(5)));
    // What the old one still says is not heard.
    assert_eq!(bench.say(1, PrimaryMessage::Heartbeat(1)), []);
}

#[test]
fn a_domain_that_runs_here_is_a_conflict() {
    let conflict = Some((RefusedCode::Conflict, Some(Generation(1))));
    for local in [LocalDomain::Active, LocalDomain::Loaded] {
        assert_eq!(refused(&Bench::new().hello_from(1, 1, 1, "alpha", local)), conflict);
    }
}

#[test]
fn deltas_need_their_predecessor() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    assert_eq!(rejected(&bench.begin(1, at(1, 1), EpochKind::Delta)), Some(RejectCode::NoBase));
    assert!(acks(&bench.commit(1, at(1, 7), EpochKind::Full)));
    for wrong in [6, 7, 9] {
        assert_eq!(rejected(&bench.begin(1, at(1, wrong), EpochKind::Delta)), Some(RejectCode::NoBase));
    }
    assert!(acks(&bench.commit(1, at(1, 8), EpochKind::Delta)));
    assert_eq!(bench.engine.committed().unwrap().0, at(1, 8));
}

#[test]
fn full_epochs_need_a_seed_of_their_own_and_never_go_back() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    assert_eq!(rejected(&bench.begin(1, at(1, 1), EpochKind::Full)), Some(RejectCode::OutOfOrder));
    bench.commit(1, at(1, 5), EpochKind::Full);
    assert_eq!(rejected(&bench.begin(1, at(1, 6), EpochKind::Full)), Some(RejectCode::OutOfOrder));
    for old in [4, 5] {
        bench.say(1, PrimaryMessage::Seed(seed("<domain/>")));
        assert_eq!(rejected(&bench.begin(1, at(1, old), EpochKind::Full)), Some(RejectCode::OutOfOrder));
    }
    assert!(acks(&bench.commit(1, at(1, 6), EpochKind::Full)));
}

#[test]
fn a_stream_of_another_generation_breaks_off() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    let out = bench.begin(1, at(2, 1), EpochKind::Full);
    assert_eq!(refused(&out).unwrap().0, RefusedCode::Protocol);
    assert_eq!(bench.engine.connection(), None);
}

#[test]
fn what_belongs_to_no_open_epoch_breaks_off_but_not_after_a_rejection() {
    let pages = || PrimaryMessage::Pages(Pages { epoch: EpochId(1), frame: Bytes::from_static(&[0; 16]) });
    let mut bench = Bench::new();
    bench.hello(1, 1);
    assert_eq!(refused(&bench.say(1, pages())).unwrap().0, RefusedCode::Protocol);

    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.begin(1, at(1, 1), EpochKind::Delta);
    assert_eq!(bench.say(1, pages()), []);
    assert_eq!(bench.say(1, PrimaryMessage::Manifest(manifest(at(1, 1), EpochKind::Delta))), []);
    assert!(acks(&bench.commit(1, at(1, 2), EpochKind::Full)));
}

#[test]
fn device_state_comes_in_order() {
    let piece = |offset_bytes| {
        PrimaryMessage::Device(DevicePiece {
            epoch: EpochId(1),
            offset_bytes,
            data: Bytes::from_static(b"ab"),
        })
    };
    for (first, second) in [(0, 1), (0, 3), (0, 0)] {
        let mut bench = Bench::new();
        bench.hello(1, 1);
        bench.say(1, PrimaryMessage::Seed(seed("<domain/>")));
        bench.begin(1, at(1, 1), EpochKind::Full);
        assert!(matches!(bench.say(1, piece(first)).as_slice(), [Command::Device(_)]));
        assert_eq!(rejected(&bench.say(1, piece(second))), Some(RejectCode::OutOfOrder));
    }
}

#[test]
fn a_delta_may_not_outgrow_its_staging() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.begin(1, at(1, 2), EpochKind::Delta);
    let frame = || Pages { epoch: EpochId(2), frame: Bytes::from(vec![0; 4112]) };
    bench.say(1, PrimaryMessage::Pages(frame()));
    bench.say(1, PrimaryMessage::Pages(frame()));
    let out = bench.say(1, PrimaryMessage::Pages(frame()));
    assert_eq!(rejected(&out), Some(RejectCode::TooLarge));
    assert_eq!(out[0], Command::DiscardEpoch);
}

/// On a link so slow that a heartbeat comes after seconds of pages, the pages are signs of life.
#[test]
fn pages_that_arrive_are_answered_now_and_then() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    let reply = |counter| vec![Command::Send(ConnectionId(1), BackupMessage::HeartbeatReply(counter))];
    assert_eq!(bench.say(1, PrimaryMessage::Heartbeat(7)), reply(7));
    bench.begin(1, at(1, 1), EpochKind::Full);
    let frame = || PrimaryMessage::Pages(Pages { epoch: EpochId(1), frame: Bytes::from_static(&[0; 16]) });
    let mut answers = 0;
    for _ in 0..20 {
        bench.now += Duration::from_millis(100);
        let out = bench.say(1, frame());
        answers += out.iter().filter(|command| reply(7).contains(command)).count();
    }
    assert_eq!(answers, 4);
}

#[test]
fn tiny_frames_do_not_slip_past_the_staging_limit() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.begin(1, at(1, 2), EpochKind::Delta);
    let tiny = || PrimaryMessage::Pages(Pages { epoch: EpochId(2), frame: Bytes::from_static(&[0; 16]) });
    assert!((0..10_000 / 16).any(|_| rejected(&bench.say(1, tiny())).is_some()));
}

#[test]
fn an_epoch_cut_off_is_dropped_and_the_one_before_stays() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.begin(1, at(1, 2), EpochKind::Delta);
    assert_eq!(bench.step(Event::Disconnected(ConnectionId(1), "gone".into())), [Command::DiscardEpoch]);
    assert_eq!(hello_ack(&bench.hello(2, 1)), Some(Some(at(1, 1))));
}

#[test]
fn a_whole_epoch_is_committed_although_its_stream_is_gone() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.begin(1, at(1, 2), EpochKind::Delta);
    bench.say(1, PrimaryMessage::Manifest(manifest(at(1, 2), EpochKind::Delta)));
    bench.step(Event::Disconnected(ConnectionId(1), "gone".into()));
    let attempt = bench.engine.attempt;
    bench.step(Event::Verified(Proof::for_test(attempt, at(1, 2), EpochKind::Delta)));
    assert_eq!(hello_ack(&bench.hello(2, 1)), Some(Some(at(1, 2))));
}

#[test]
fn the_answer_to_an_abandoned_attempt_is_not_taken_for_the_next() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.begin(1, at(1, 2), EpochKind::Delta);
    bench.say(1, PrimaryMessage::Manifest(manifest(at(1, 2), EpochKind::Delta)));
    let stale = bench.engine.attempt;
    let out = bench.hello(2, 1);
    assert!(out.contains(&Command::DiscardEpoch));
    assert_eq!(hello_ack(&out), Some(Some(at(1, 1))));
    bench.begin(2, at(1, 2), EpochKind::Delta);
    bench.say(2, PrimaryMessage::Manifest(manifest(at(1, 2), EpochKind::Delta)));
    assert_eq!(bench.step(Event::Verified(Proof::for_test(stale, at(1, 2), EpochKind::Delta))), []);
    let fault = Fault { code: RejectCode::Corrupt, text: String::new() };
    assert_eq!(bench.step(Event::Rejected(stale, at(1, 2), fault)), []);
    let fresh = bench.engine.attempt;
    assert!(acks(&bench.step(Event::Verified(Proof::for_test(fresh, at(1, 2), EpochKind::Delta)))));
}

#[test]
fn the_window_is_one_epoch() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.say(1, PrimaryMessage::Seed(seed("<domain/>")));
    bench.begin(1, at(1, 1), EpochKind::Full);
    bench.say(1, PrimaryMessage::Manifest(manifest(at(1, 1), EpochKind::Full)));
    assert_eq!(refused(&bench.begin(1, at(1, 2), EpochKind::Delta)).unwrap().0, RefusedCode::Protocol);
}

#[test]
fn a_corrupt_epoch_is_rejected_and_a_full_one_heals() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.begin(1, at(1, 2), EpochKind::Delta);
    bench.say(1, PrimaryMessage::Manifest(manifest(at(1, 2), EpochKind::Delta)));
    let fault = Fault { code: RejectCode::Corrupt, text: "digest".into() };
    let out = bench.step(Event::Rejected(bench.engine.attempt, at(1, 2), fault));
    assert_eq!(rejected(&out), Some(RejectCode::Corrupt));
    assert_eq!(bench.engine.committed().unwrap().0, at(1, 1));
    assert!(acks(&bench.commit(1, at(1, 3), EpochKind::Full)));
}

#[test]
fn the_standby_is_made_after_the_first_full_epoch_and_again_if_it_disappears() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    let out = bench.commit(1, at(1, 1), EpochKind::Full);
    assert!(matches!(&out[..], [Command::Ack(..), Command::Apply(_), .., Command::Prepare(_), _]), "{out:?}");
    bench.step(Event::Prepared(cold()));
    assert_eq!(bench.engine.standby().state, StandbyState::Ready);
    bench.now += STANDBY_CHECK_INTERVAL;
    assert!(bench.step(Event::Tick).contains(&Command::CheckStandby));
    let out = bench.step(Event::Checked(Ok(LocalDomain::Absent)));
    assert!(out.iter().any(|c| matches!(c, Command::Prepare(_))), "{out:?}");
    let failed = bench.step(Event::Prepared(Err(PromoteError::new("no bridge"))));
    assert!(failed.iter().any(|c| matches!(c,
        Command::Send(_, BackupMessage::Standby(Standby { state: StandbyState::Failed, text })) if text == "no bridge")));
    assert!(!bench.step(Event::Tick).iter().any(|c| matches!(c, Command::Prepare(_))));
    bench.now += STANDBY_RETRY_INTERVAL;
    assert!(bench.step(Event::Tick).iter().any(|c| matches!(c, Command::Prepare(_))));
}

#[test]
fn a_warm_standby_gets_the_image_and_every_new_one() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    let out = bench.step(Event::Prepared(Ok(Way::Warm)));
    assert!(out.contains(&Command::Adopt(1)), "{out:?}");
    assert!(bench.engine.standby().text.contains("being moved"));
    bench.step(Event::Adopted(1, Ok(())));
    assert!(bench.engine.standby().text.starts_with("warm"));
    // A look at the standby changes nothing of that.
    bench.now += STANDBY_CHECK_INTERVAL;
    bench.step(Event::Tick);
    bench.step(Event::Checked(Ok(LocalDomain::Waiting)));
    assert!(bench.engine.standby().text.starts_with("warm"));
    assert!(!bench.commit(1, at(1, 2), EpochKind::Delta).iter().any(|c| matches!(c, Command::Adopt(_))));
    let out = bench.commit(1, at(1, 3), EpochKind::Full);
    let place = |wanted: &dyn Fn(&Command) -> bool| out.iter().position(wanted).unwrap();
    assert!(place(&|c| matches!(c, Command::Apply(_))) < place(&|c| *c == Command::Adopt(2)));
    // The end of the first move says nothing about the second.
    bench.step(Event::Adopted(1, Ok(())));
    assert!(bench.engine.standby().text.contains("being moved"));
    let out = bench.step(Event::Adopted(2, Err("no room".into())));
    assert!(
        out.iter()
            .any(|c| matches!(c, Command::Send(_, BackupMessage::Standby(s)) if s.text.contains("no room")))
    );
    assert_eq!(bench.engine.standby().state, StandbyState::Ready);
}

#[test]
fn a_standby_that_cannot_be_warm_says_why() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    let out = bench.step(Event::Prepared(Ok(Way::Cold("hugepages".into()))));
    assert!(!out.iter().any(|c| matches!(c, Command::Adopt(_))), "{out:?}");
    let standby = bench.engine.standby();
    assert!(
        standby.state == StandbyState::Ready
            && standby.text.contains("cold")
            && standby.text.contains("hugepages")
    );
}

/// [`Bench::standby`], its memory in the standby.
fn warm() -> Bench {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 5), EpochKind::Full);
    bench.step(Event::Prepared(Ok(Way::Warm)));
    bench.step(Event::Adopted(1, Ok(())));
    bench.step(Event::Disconnected(ConnectionId(1), "gone".into()));
    bench
}

#[test]
fn a_warm_load_that_fails_is_tried_cold_once() {
    let mut bench = warm();
    bench.step(Event::Failover { i_have_fenced: false });
    assert!(bench.step(Event::ImageReady(Some(at(1, 5)))).contains(&Command::Load));
    let out = bench.step(Event::Loaded(Err(PromoteError::new("no such block"))));
    assert!(out.contains(&Command::Discard) && failure(&out).is_none(), "{out:?}");
    assert!(bench.step(Event::Discarded(Ok(()))).iter().any(|c| matches!(c, Command::Prepare(_))));
    // The image is taken and stays where it is.
    let out = bench.step(Event::Prepared(Ok(Way::Warm)));
    assert!(out.contains(&Command::Load) && !out.iter().any(|c| matches!(c, Command::Adopt(_))), "{out:?}");
    let out = bench.step(Event::Loaded(Err(PromoteError::new("no such device"))));
    assert_eq!(failure(&out).unwrap().reason, "no such device");
}

#[test]
fn shared_memory_of_a_guest_that_may_have_run_is_never_promoted() {
    for (may_have_run, lost) in [(true, true), (false, false)] {
        let mut bench = warm();
        bench.step(Event::Failover { i_have_fenced: false });
        bench.step(Event::ImageReady(Some(at(1, 5))));
        bench.step(Event::Loaded(Ok(())));
        bench.step(Event::ControlWritten);
        let error = PromoteError::new("QEMU is io-error");
        let error = if may_have_run { error.having_run() } else { error };
        let out = bench.step(Event::Activated(Err(error)));
        assert!(out.contains(&Command::Discard) && failure(&out).is_some());
        assert_eq!(out.contains(&Command::DropImage), lost);
        bench.step(Event::Discarded(Ok(())));
        let again = bench.step(Event::Failover { i_have_fenced: false });
        match failure(&again) {
            Some(f) if lost => assert!(f.code == "no-image" && f.reason.contains("io-error"), "{f:?}"),
            None if !lost => assert!(again.contains(&Command::TakeImage)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_control_file_lags_a_second_at_most() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    let written = |out: &[Command]| out.iter().any(|c| matches!(c, Command::WriteControl { .. }));
    assert!(written(&bench.commit(1, at(1, 1), EpochKind::Full)));
    assert!(!written(&bench.commit(1, at(1, 2), EpochKind::Delta)));
    assert!(!written(&bench.step(Event::Tick)));
    bench.now += CONTROL_INTERVAL;
    assert!(written(&bench.step(Event::Tick)));
    assert!(!written(&bench.step(Event::Shutdown)));
    assert!(!written(&bench.commit(1, at(1, 3), EpochKind::Delta)));
    assert!(written(&bench.step(Event::Shutdown)));
}

#[test]
fn goodbye_leaves_nothing_but_the_generation() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.step(Event::Prepared(cold()));
    let out = bench.say(1, PrimaryMessage::Goodbye(GoodbyeReason::Ended));
    assert!(out.contains(&Command::DropImage) && out.contains(&Command::Discard), "{out:?}");
    assert_eq!(bench.engine.record().role, Role::Released);
    assert_eq!(failure(&bench.step(Event::Failover { i_have_fenced: true })).unwrap().code, "not-protected");
}

#[test]
fn an_operator_gives_up_an_image_only_when_nobody_feeds_or_promotes_it() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    bench.step(Event::Prepared(cold()));
    let refusal = bench.engine.may_release().unwrap_err();
    assert_eq!(refusal.code, "primary-alive");
    bench.step(Event::Disconnected(ConnectionId(1), "gone".into()));
    assert_eq!(bench.engine.may_release().unwrap(), "the copy that was here is dropped");
    let out = bench.step(Event::Release);
    assert!(out.contains(&Command::DropImage) && out.contains(&Command::Discard), "{out:?}");
    assert_eq!(bench.engine.record().role, Role::Released);
    assert_eq!(bench.engine.record().generation, Generation(1));
}

#[test]
fn giving_up_a_promoted_guest_does_not_touch_it() {
    let mut bench = Bench::new();
    let record =
        ControlFile { role: Role::Promoted, generation: Generation(2), ..bench.engine.record().clone() };
    bench.engine = Engine::restarted(identity(), record, LocalDomain::Active);
    assert_eq!(bench.engine.may_release().unwrap(), "the guest runs on here, unprotected");
    let out = bench.step(Event::Release);
    assert!(!out.contains(&Command::DropImage) && !out.contains(&Command::Discard), "{out:?}");
    assert_eq!(
        (bench.engine.record().role, bench.engine.record().generation),
        (Role::Released, Generation(2))
    );
}

#[test]
fn a_standby_that_is_being_made_at_goodbye_is_removed_when_it_is_there() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 1), EpochKind::Full);
    let out = bench.say(1, PrimaryMessage::Goodbye(GoodbyeReason::Ended));
    assert!(!out.contains(&Command::Discard));
    assert!(bench.step(Event::Prepared(cold())).contains(&Command::Discard));
}

#[test]
fn failover_needs_an_image_and_a_dead_or_fenced_primary() {
    let code = |bench: &mut Bench, fenced| {
        failure(&bench.step(Event::Failover { i_have_fenced: fenced })).map(|f| f.code.to_string())
    };
    let mut bench = Bench::new();
    bench.hello(1, 1);
    assert_eq!(code(&mut bench, true).unwrap(), "no-image");
    bench.commit(1, at(1, 1), EpochKind::Full);
    assert_eq!(code(&mut bench, false).unwrap(), "primary-alive");
    assert_eq!(bench.engine.connection(), Some(ConnectionId(1)));
    assert_eq!(code(&mut bench, true), None);
    assert_eq!(bench.engine.connection(), None);
    assert_eq!(code(&mut bench, true).unwrap(), "promoting");
}

#[test]
fn nothing_of_the_primary_is_accepted_once_a_promotion_has_begun() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 5), EpochKind::Full);
    bench.begin(1, at(1, 6), EpochKind::Delta);
    bench.say(1, PrimaryMessage::Manifest(manifest(at(1, 6), EpochKind::Delta)));
    let attempt = bench.engine.attempt;
    let out = bench.step(Event::Failover { i_have_fenced: true });
    assert!(out.contains(&Command::DiscardEpoch) && out.contains(&Command::TakeImage));
    assert_eq!(bench.step(Event::Verified(Proof::for_test(attempt, at(1, 6), EpochKind::Delta))), []);
    assert_eq!(refused(&bench.hello(2, 1)).unwrap().0, RefusedCode::Busy);
}

#[test]
fn the_generation_is_on_disk_before_the_guest_may_run() {
    let (mut bench, out) = Bench::loaded();
    let [Command::WriteControl { file, required: true }] = out.as_slice() else { panic!("{out:?}") };
    assert_eq!(
        (file.role, file.generation, file.last_committed),
        (Role::Promoting, Generation(2), Some(EpochId(5)))
    );
    assert!(bench.step(Event::ControlWritten).contains(&Command::Activate));
    let out = bench.step(Event::Activated(Ok(Activation::default())));
    assert!(
        matches!(out.last(), Some(Command::FailoverDone(r)) if r.as_ref().as_ref().unwrap().generation == Generation(2))
    );
    assert_eq!(bench.engine.state(), GuestState::Promoted);
}

#[test]
fn the_report_has_the_time_of_each_part() {
    let mut bench = Bench::standby();
    let mut later = |event, ms| {
        bench.now += Duration::from_millis(ms);
        bench.engine.step(event, bench.now)
    };
    later(Event::Failover { i_have_fenced: false }, 0);
    later(Event::ImageReady(Some(at(1, 5))), 3);
    later(Event::Loaded(Ok(())), 20);
    later(Event::ControlWritten, 5);
    later(Event::Activated(Ok(Activation { resume: Duration::from_millis(7), ..Activation::default() })), 9);
    let report = bench.engine.report().unwrap();
    let ms = |d: Duration| d.as_millis();
    assert_eq!(
        [report.finish_apply, report.prepare, report.load, report.record, report.resume, report.total]
            .map(ms),
        [3, 0, 20, 5, 7, 37]
    );
}

#[test]
fn a_promotion_that_fails_before_the_record_leaves_the_generation() {
    let mut bench = Bench::standby();
    bench.step(Event::Failover { i_have_fenced: false });
    bench.step(Event::ImageReady(Some(at(1, 5))));
    let out = bench.step(Event::Loaded(Err(PromoteError::new("no such device"))));
    assert!(out.contains(&Command::Discard));
    assert_eq!(failure(&out).unwrap().reason, "no such device");
    assert_eq!(
        (bench.engine.record().role, bench.engine.record().generation),
        (Role::Standby, Generation(1))
    );
    // And again, with a standby made anew.
    assert!(bench.step(Event::Discarded(Ok(()))).iter().any(|c| matches!(c, Command::Prepare(_))));
    bench.step(Event::Failover { i_have_fenced: false });
    bench.step(Event::ImageReady(Some(at(1, 5))));
    assert!(bench.step(Event::Prepared(cold())).contains(&Command::Load));
}

#[test]
fn a_record_that_cannot_be_written_stops_the_promotion() {
    let (mut bench, _) = Bench::loaded();
    let out = bench.step(Event::ControlFailed("disk full".into()));
    assert!(out.contains(&Command::Discard) && !out.contains(&Command::Activate));
    assert!(failure(&out).unwrap().reason.contains("disk full"));
    assert_eq!(
        (bench.engine.record().role, bench.engine.record().generation),
        (Role::Standby, Generation(1))
    );
}

#[test]
fn a_guest_that_may_have_run_keeps_the_generation() {
    let (mut bench, _) = Bench::loaded();
    bench.step(Event::ControlWritten);
    let out = bench.step(Event::Activated(Err(PromoteError::new("QEMU is paused"))));
    assert!(out.contains(&Command::Discard));
    assert_eq!(
        (bench.engine.record().role, bench.engine.record().generation),
        (Role::Standby, Generation(2))
    );
    assert_eq!(refused(&bench.hello(9, 1)).unwrap(), (RefusedCode::Superseded, Some(Generation(2))));
    bench.step(Event::Discarded(Ok(())));
    bench.step(Event::Failover { i_have_fenced: false });
    bench.step(Event::ImageReady(Some(at(1, 5))));
    bench.step(Event::Prepared(cold()));
    bench.step(Event::Loaded(Ok(())));
    assert_eq!(bench.engine.record().generation, Generation(3));
}

#[test]
fn a_promoted_guest_refuses_its_own_generation_and_takes_a_newer_one_if_it_does_not_run_here() {
    let mut bench = Bench::promoted();
    for old in [1, 2] {
        assert_eq!(
            refused(&bench.hello(10 + old, old)).unwrap(),
            (RefusedCode::Superseded, Some(Generation(2)))
        );
    }
    assert!(hello_ack(&bench.hello(20, 3)).is_some());

    let mut bench = Bench::promoted();
    let out = bench.hello_from(30, 3, 1, "alpha", LocalDomain::Active);
    assert_eq!(refused(&out).unwrap().0, RefusedCode::Conflict);
    assert_eq!(bench.engine.state(), GuestState::Superseded);
    // Its instance is ended: the newer owner is no older one.
    assert_eq!(refused(&bench.hello(31, 2)).unwrap().0, RefusedCode::Superseded);
    assert!(hello_ack(&bench.hello(32, 3)).is_some());
}

#[test]
fn failover_while_the_standby_is_being_made_waits_for_it() {
    let mut bench = Bench::new();
    bench.hello(1, 1);
    bench.commit(1, at(1, 5), EpochKind::Full);
    bench.step(Event::Disconnected(ConnectionId(1), "gone".into()));
    bench.step(Event::Failover { i_have_fenced: false });
    assert_eq!(bench.step(Event::ImageReady(Some(at(1, 5)))), []);
    assert!(bench.step(Event::Prepared(cold())).contains(&Command::Load));
}

#[test]
fn an_image_that_is_not_the_committed_epoch_is_not_promoted() {
    let mut bench = Bench::standby();
    bench.step(Event::Failover { i_have_fenced: false });
    let out = bench.step(Event::ImageReady(Some(at(1, 4))));
    assert!(failure(&out).is_some() && !out.contains(&Command::Load));
}

#[test]
fn a_restart_says_that_the_image_is_gone() {
    let record = Bench::standby().engine.record().clone();
    let mut bench =
        Bench { engine: Engine::restarted(identity(), record, LocalDomain::Absent), now: Instant::now() };
    assert_eq!(bench.engine.state(), GuestState::Failed);
    assert!(bench.engine.detail().contains("restarted"));
    let out = bench.step(Event::Failover { i_have_fenced: true });
    assert!(failure(&out).unwrap().reason.contains("epoch 5 was committed"), "{out:?}");
    assert_eq!(hello_ack(&bench.hello(1, 1)), Some(None));
}

#[test]
fn a_restart_in_the_middle_of_a_promotion_ends_well() {
    let (bench, _) = Bench::loaded();
    let restarted = |local| Bench {
        engine: Engine::restarted(identity(), bench.engine.record().clone(), local),
        now: Instant::now(),
    };
    assert_eq!(restarted(LocalDomain::Active).engine.state(), GuestState::Promoted);
    let mut loaded = restarted(LocalDomain::Loaded);
    // It can be let run, which is what the watchdog then asks for.
    assert_eq!(loaded.engine.state(), GuestState::Promoting);
    assert_eq!(
        refused(&loaded.hello_from(1, 2, 1, "alpha", LocalDomain::Loaded)).unwrap().0,
        RefusedCode::Superseded
    );
    assert_eq!(loaded.step(Event::Failover { i_have_fenced: false }), [Command::Activate]);
    let out = loaded.step(Event::Activated(Ok(Activation::default())));
    assert!(matches!(out.last(), Some(Command::FailoverDone(r)) if r.is_ok()));
    assert_eq!(loaded.engine.report().unwrap().epoch, EpochId(5));
    // It cannot, and it is looked whether it is still there.
    let mut gone = restarted(LocalDomain::Loaded);
    gone.step(Event::Failover { i_have_fenced: false });
    let out = gone.step(Event::Activated(Err(PromoteError::new("no answer"))));
    assert!(out.contains(&Command::CheckStandby), "{out:?}");
    gone.step(Event::Checked(Ok(LocalDomain::Loaded)));
    assert_eq!(gone.engine.state(), GuestState::Promoting);
    gone.step(Event::Checked(Ok(LocalDomain::Absent)));
    assert_eq!(gone.engine.state(), GuestState::Failed);
}
