//! Failures of the guest, and of what keeps it, beside the death of a host.

use super::*;

#[tokio::test]
async fn a_guest_started_by_hand_has_the_record_follow_and_the_old_instance_ended() {
    let pair = pair(Policies::default()).await;
    pair.beta.change(|seen| {
        seen.local = Local { runs: true, image: None, generation: Some(Generation(2)) };
        seen.place = Place::Answers;
    });
    pair.until("followed", |record| {
        matches!(&record.owner, Owner::Solo { owner } if owner == "beta")
            && record.generation == Generation(2)
    })
    .await;
    Pair::until_done(&pair.alpha, |command| matches!(command, Command::DestroyGuest(_))).await;
}

#[tokio::test]
async fn a_qemu_that_dies_is_a_failure_unless_it_is_to_be_left() {
    let crashed = Over { generation: Generation(1), crashed: true };
    let dies = |seen: &mut Seen| {
        (seen.local, seen.place, seen.over) = (Local::default(), Place::Off, Some(crashed));
        (seen.listed, seen.protecting, seen.sending) = (false, false, None);
    };
    let failover = pair(Policies::default()).await;
    failover.alpha.change(dies);
    failover
        .until("at beta", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta"))
        .await;
    let leave = Policies { qemu_crash: crate::owner::QemuCrash::Leave, ..Policies::default() };
    let left = pair(leave).await;
    left.alpha.change(dies);
    left.until("ended", |record| matches!(&record.owner, Owner::Ended { .. })).await;
    assert!(!left.beta.done().iter().any(|command| matches!(command, Command::Load(_))));
}

#[tokio::test]
async fn an_instance_that_hangs_is_replaced_and_ended() {
    let pair = pair(Policies::default()).await;
    pair.alpha.change(|seen| {
        (seen.local.runs, seen.place) = (false, Place::Hangs);
    });
    pair.until("at beta", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta")).await;
    Pair::until_done(&pair.alpha, |command| matches!(command, Command::DestroyGuest(_))).await;
}

/// A host that keeps guests, alone, with a record that is there already.
async fn alone(record: Ownership, host: &Arc<FakeHost>) -> (Arc<Memory>, tempfile::TempDir) {
    let (folder, arbiter) = (tempfile::tempdir().unwrap(), Arc::new(Memory::default()));
    *arbiter.kept.lock().unwrap() = Some(record);
    let settings = settings("alpha", Policies::default(), Timing::default(), folder.path());
    let paths = Paths::open("127.0.0.1:0".parse().unwrap(), vec![], seal()).await.unwrap();
    let (asking, questions) = questions();
    // Nobody asks, and the keeper must not think that it is over.
    std::mem::forget(asking);
    tokio::spawn(run(settings, arbiter.clone(), host.clone(), paths, questions));
    (arbiter, folder)
}

fn solo() -> Ownership {
    let owner = Owner::Solo { owner: "alpha".into() };
    Ownership { term: Term(5), generation: Generation(1), epoch: None, owner }
}

async fn reaches(arbiter: &Memory, term: Term) {
    let end = Instant::now() + PATIENCE;
    while arbiter.get().is_none_or(|record| record.term < term) {
        assert!(Instant::now() < end, "{:?}", arbiter.get());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_protection_that_began_before_a_restart_goes_on() {
    let runs = Local { runs: true, image: None, generation: Some(Generation(1)) };
    let host = FakeHost::new(runs, Some(SENDING));
    host.change(|seen| seen.degraded = true);
    let (arbiter, _folder) = alone(solo(), &host).await;
    // The term after that which was found makes void what was under way; the one after gives the copy up, whose backup
    // stays lost.
    reaches(&arbiter, Term(6)).await;
    assert!(!host.done().contains(&Command::OpenGate(Term(6))), "{:?}", host.done());
    reaches(&arbiter, Term(7)).await;
    Pair::until_done(&host, |command| *command == Command::OpenGate(Term(7))).await;
}

#[tokio::test]
async fn an_agent_too_busy_to_answer_goes_on_with_its_copy_but_not_for_ever() {
    let runs = Local { runs: true, image: None, generation: Some(Generation(1)) };
    let host = FakeHost::new(runs, Some(SENDING));
    let (arbiter, _folder) = alone(solo(), &host).await;
    reaches(&arbiter, Term(6)).await;
    Pair::until_done(&host, |command| *command == Command::HoldGate(Term(6))).await;
    host.change(|seen| (seen.protecting, seen.sending, seen.busy) = (false, None, true));
    let looked = Instant::now() + Duration::from_secs(3);
    while Instant::now() < looked {
        assert_eq!(arbiter.get().map(|record| record.term), Some(Term(6)), "{:?}", arbiter.get());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    reaches(&arbiter, Term(7)).await;
}

#[tokio::test]
async fn the_end_of_an_earlier_generation_is_not_the_end_of_the_guest() {
    let runs = Local { runs: true, image: None, generation: Some(Generation(1)) };
    let host = FakeHost::new(runs, Some(SENDING));
    host.change(|seen| seen.over = Some(Over { generation: Generation(0), crashed: false }));
    let image =
        Owner::Pair { primary: "alpha".into(), backup: "beta".into(), incarnation: IMAGE.incarnation };
    let (arbiter, _folder) = alone(Ownership { owner: image, ..solo() }, &host).await;
    Pair::until_done(&host, |command| matches!(command, Command::HoldGate(_))).await;
    let looked = Instant::now() + Duration::from_secs(1);
    while Instant::now() < looked {
        assert_eq!(arbiter.get().map(|record| record.term), Some(Term(5)), "{:?}", arbiter.get());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // That of its own is.
    host.change(|seen| {
        seen.over = Some(Over { generation: Generation(1), crashed: false });
        (seen.listed, seen.protecting, seen.sending) = (false, false, None);
    });
    reaches(&arbiter, Term(6)).await;
    assert!(matches!(arbiter.get().map(|record| record.owner), Some(Owner::Ended { .. })));
}

#[tokio::test]
async fn a_guest_that_is_alone_and_gone_has_ended() {
    let host = FakeHost::new(Local::default(), None);
    host.change(|seen| seen.place = Place::Off);
    let (arbiter, _folder) = alone(solo(), &host).await;
    reaches(&arbiter, Term(7)).await;
    assert!(matches!(arbiter.get().map(|record| record.owner), Some(Owner::Ended { .. })));
}
