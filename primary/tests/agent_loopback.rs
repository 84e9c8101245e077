//! The owner of a guest with a fake guest on one side and a backup over real gRPC on the other.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends by panicking")]

mod fake;

use fake::{FakeGuest, StubBackup, eventually, start, wish};
use understudy_libvirt::{DomainEvent, Lifecycle};
use understudy_primary::agent::Wish;
use understudy_primary::engine::OutcomeKind;
use understudy_proto::ids::Generation;
use understudy_proto::rpc::admin::GuestState;
use understudy_proto::rpc::epoch::{GoodbyeReason, Refused, RefusedCode};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn epochs_arrive_whole_and_in_order() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let handle = start(&guest, &backup).await;
    eventually("20 epochs", || backup.committed() >= Some(20)).await;
    let status = handle.snapshot.borrow().status();
    assert_eq!(status.state, GuestState::Protected, "{}", status.detail);
    eventually("numbers", || handle.snapshot.borrow().status().dirty_pages_p50 == Some(fake::DIRTY_PAGES))
        .await;
    let status = handle.snapshot.borrow().status();
    assert_eq!((status.full_copies_total, status.generation), (1, Generation(2)));
    assert!(status.pause_p50_ms.is_some_and(|ms| (0.4..0.6).contains(&ms)), "{:?}", status.pause_p50_ms);
    assert!(status.bytes_total > 0 && status.committed_age_ms.is_some());

    wish(&handle, Wish::Unprotect).await;
    let outcome = fake::end(&handle).await;
    assert_eq!(outcome.kind, OutcomeKind::Unprotected);
    assert_eq!(backup.goodbyes(), [GoodbyeReason::Unprotected]);
    assert!(guest.runs());
    // The image of the last epoch is what the guest was at that stop.
    let (epoch, image) = backup.image();
    assert_eq!(image, guest.memory_at(epoch));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_stream_is_resumed_without_a_full_copy() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let handle = start(&guest, &backup).await;
    for round in 1..4 {
        let before = backup.committed().unwrap_or(0);
        eventually("epochs", || backup.committed() >= Some(before + 3)).await;
        // Every second time the acknowledgement is lost with the stream.
        backup.cut(round % 2 == 0);
        let at = backup.committed();
        eventually("more epochs", || backup.committed() >= at.map(|epoch| epoch + 3)).await;
    }
    assert_eq!(backup.full_copies(), 1);
    let (epoch, image) = backup.image();
    assert_eq!(image, guest.memory_at(epoch));
    wish(&handle, Wish::Shutdown).await;
    assert_eq!(fake::end(&handle).await.kind, OutcomeKind::AgentStopped);
    assert_eq!(backup.goodbyes(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_backup_and_a_rejected_epoch_lead_to_a_full_copy() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let handle = start(&guest, &backup).await;
    eventually("epochs", || backup.committed() >= Some(3)).await;
    backup.restart();
    eventually("second full copy", || backup.full_copies() == 2 && backup.committed() >= Some(8)).await;
    backup.reject_next();
    eventually("third full copy", || backup.full_copies() == 3).await;
    let at = backup.committed();
    eventually("protected", || backup.committed() >= at.map(|epoch| epoch + 3)).await;
    assert_eq!(handle.snapshot.borrow().status().state, GuestState::Protected);
    let (epoch, image) = backup.image();
    assert_eq!(image, guest.memory_at(epoch));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_away_is_said_to_be_and_the_guest_runs_on() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let handle = start(&guest, &backup).await;
    eventually("epochs", || backup.committed() >= Some(3)).await;
    backup.refuse(Some(Refused {
        code: RefusedCode::Busy,
        text: "not now".to_owned(),
        remedy: String::new(),
        generation: None,
    }));
    backup.cut(false);
    eventually("degraded", || handle.snapshot.borrow().status().state == GuestState::Degraded).await;
    assert!(guest.runs());
    let (stops, attempts) = (guest.stops(), backup.attempts());
    eventually("more attempts", || backup.attempts() >= attempts + 3).await;
    assert!(guest.stops() <= stops + 1, "checkpoints without a backup");
    backup.refuse(None);
    let at = backup.committed();
    eventually("protected again", || backup.committed() >= at.map(|epoch| epoch + 3)).await;
    assert_eq!(backup.full_copies(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_superseded_guest_is_paused() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let handle = start(&guest, &backup).await;
    eventually("epochs", || backup.committed() >= Some(3)).await;
    backup.refuse(Some(Refused {
        code: RefusedCode::Superseded,
        text: "promoted here".to_owned(),
        remedy: String::new(),
        generation: Some(Generation(3)),
    }));
    backup.cut(false);
    let outcome = fake::end(&handle).await;
    assert_eq!(outcome.kind, OutcomeKind::Superseded, "{outcome:?}");
    assert!(!guest.runs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backup_hears_of_an_orderly_end_and_not_of_a_crash() {
    for (detail, goodbyes, kind) in [
        ("shutdown", vec![GoodbyeReason::Ended], OutcomeKind::Ended),
        ("crashed", vec![], OutcomeKind::Crashed),
    ] {
        let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
        let handle = start(&guest, &backup).await;
        eventually("epochs", || backup.committed() >= Some(3)).await;
        let stopped = DomainEvent::Lifecycle { kind: Lifecycle::Stopped, detail: detail.to_owned() };
        guest.event(stopped);
        assert_eq!(fake::end(&handle).await.kind, kind);
        assert_eq!(backup.goodbyes(), goodbyes, "{detail}");
        assert_eq!(handle.snapshot.borrow().status().state, kind.state());
    }
}
