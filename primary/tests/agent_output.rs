//! The owner of a guest with an output gate: what leaves, and when.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends by panicking")]

mod fake;

use fake::{FakeGate, FakeGuest, StubBackup, eventually, start_with, wish};
use understudy_primary::agent::Wish;
use understudy_primary::engine::OutcomeKind;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_leaves_when_its_epoch_is_committed_and_none_is_lost() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let gate = FakeGate::new(&guest, &backup);
    let handle = start_with(&guest, &backup, gate.open()).await;
    eventually("20 epochs", || backup.committed() >= Some(20)).await;
    // With an acknowledgement that is lost, an epoch that is dropped, and a backup that forgets everything.
    for upset in [|backup: &StubBackup| backup.cut(true), StubBackup::reject_next, StubBackup::restart] {
        let out = gate.out().len();
        upset(&backup);
        eventually("frames", || gate.out().len() > out + 10).await;
    }
    assert_eq!(gate.early(), [0; 0]);
    wish(&handle, Wish::Unprotect).await;
    assert_eq!(fake::end(&handle).await.kind, OutcomeKind::Unprotected);
    assert!(gate.is_removed());
    let out = gate.out();
    assert!(out.is_sorted() && !out.is_empty(), "{out:?}");
    let moments: Vec<u64> = (1..=*out.last().unwrap()).collect();
    let mut seen = out;
    seen.dedup();
    assert_eq!(seen, moments, "every moment has sent at least one frame");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_copy_of_a_guest_that_ran_on_is_not_handed_over() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let gate = FakeGate::new(&guest, &backup);
    guest.runs_on_after(0);
    let handle = start_with(&guest, &backup, gate.open()).await;
    eventually("epochs", || backup.committed() >= Some(5)).await;
    assert_eq!(backup.full_copies(), 1, "the first one was sealed behind output of a guest that had run on");
    assert_eq!(gate.early(), [0; 0]);
    wish(&handle, Wish::Shutdown).await;
    assert_eq!(fake::end(&handle).await.kind, OutcomeKind::AgentStopped);
    assert!(!gate.is_removed(), "invariant 7");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_found_gate_lets_nothing_out_before_a_full_copy_is_committed_and_the_guest_stands_still() {
    // The guest runs on before the copy is handed over, and before the release.
    for questions in [0, 1] {
        let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
        let gate = FakeGate::new(&guest, &backup);
        guest.runs_on_after(questions);
        let handle = start_with(&guest, &backup, gate.found()).await;
        eventually("epochs", || backup.committed() >= Some(5)).await;
        eventually("frames", || gate.out().len() > 5).await;
        assert_eq!(gate.early(), [0; 0], "after {questions} questions");
        assert_eq!(gate.out()[0], 0, "what an earlier agent held comes first");
        assert_eq!(backup.full_copies(), 1 + u64::from(questions));
        wish(&handle, Wish::Unprotect).await;
        fake::end(&handle).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_sends_too_much_is_held_for_its_commits() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let gate = FakeGate::new(&guest, &backup);
    let handle = start_with(&guest, &backup, gate.open()).await;
    eventually("epochs", || backup.committed() >= Some(5)).await;
    assert_eq!(guest.holds(), 0);
    gate.weigh(16 << 20);
    eventually("holds", || guest.holds() > 5).await;
    gate.weigh(0);
    let out = gate.out().len();
    eventually("frames", || gate.out().len() > out + 10).await;
    assert_eq!(gate.early(), [0; 0]);
    wish(&handle, Wish::Unprotect).await;
    fake::end(&handle).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_that_somebody_takes_away_is_made_anew_and_a_full_copy_follows() {
    let (guest, backup) = (FakeGuest::new(), StubBackup::listen().await);
    let gate = FakeGate::new(&guest, &backup);
    let handle = start_with(&guest, &backup, gate.open()).await;
    eventually("epochs", || backup.committed() >= Some(5)).await;
    let copies = backup.full_copies();
    gate.take_away();
    eventually("the gate is there again", || !gate.is_broken()).await;
    eventually("a full copy", || backup.full_copies() > copies).await;
    let out = gate.out().len();
    eventually("frames", || gate.out().len() > out + 10).await;
    assert_eq!(gate.early(), [0; 0]);
    wish(&handle, Wish::Unprotect).await;
    fake::end(&handle).await;
}
