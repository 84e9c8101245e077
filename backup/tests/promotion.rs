//! Promotion end to end, through the admin socket, with a promoter that records what it was given.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test ends by panicking")]

mod support;

use std::sync::atomic::Ordering;
use support::*;
use tokio_stream::StreamExt;
use understudy_backup::promoter::LocalDomain;
use understudy_proto::control::Role;
use understudy_proto::epoch::EpochKind::{Delta, Full};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::rpc::FailureKind;
use understudy_proto::rpc::admin::{GuestState, ProtectRequest, StatusRequest, UnprotectRequest};
use understudy_proto::rpc::epoch::{BackupMessage, RefusedCode};

async fn protected() -> (Backup, Primary, Model) {
    let backup = Backup::start().await;
    let mut primary = Primary::connect(&backup, hello(1)).await.unwrap();
    let layout = layout(&[4]);
    let pages = [page(0, 0, 1), page(0, 1, 2), page(0, 2, 0), page(0, 3, 4)];
    primary.commit(&Epoch::new(at(1, 1), Full, &layout, &pages, b"device 1")).await;
    primary.commit(&Epoch::new(at(1, 2), Delta, &layout, &[page(0, 2, 3)], b"device 2")).await;
    let mut model = Model::new(&layout);
    model.write(&pages);
    model.write(&[page(0, 2, 3)]);
    (backup, primary, model)
}

#[tokio::test]
async fn failover_brings_the_last_committed_epoch_to_life_once() {
    let (backup, primary, model) = protected().await;
    let alive = backup.failover(false).await.unwrap_err();
    assert_eq!((alive.kind, alive.code.as_ref()), (FailureKind::FailedPrecondition, "primary-alive"));
    assert!(alive.remedy.contains("--i-have-fenced"));
    let steps = backup.failover(true).await.unwrap();
    let last = steps.last().unwrap();
    let report = last.failover.as_ref().unwrap();
    assert!(last.done);
    assert_eq!((report.epoch, report.generation), (EpochId(2), Generation(2)));
    assert_eq!(backup.promoter.loaded.lock().unwrap().take().unwrap(), model.content(at(1, 2), b"device 2"));
    assert_eq!(backup.promoter.calls(), ["prepare", "load", "activate and define"]);
    let recorded = backup.promoter.control_at_activation.lock().unwrap().take().unwrap();
    assert_eq!((recorded.role, recorded.generation), (Role::Promoting, Generation(2)));
    drop(primary);

    match Primary::connect(&backup, hello(1)).await.err().unwrap() {
        BackupMessage::Refused(r) => {
            assert_eq!((r.code, r.generation), (RefusedCode::Superseded, Some(Generation(2))));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(backup.failover(true).await.unwrap_err().code, "already-promoted");
    let backup = backup.restart().await;
    assert_eq!(backup.control().role, Role::Promoted);
    let status = backup.admin().await.status(StatusRequest::default()).await.unwrap();
    assert_eq!(status.guests[0].state, GuestState::Promoted);
}

#[tokio::test]
async fn a_dead_primary_needs_no_fence() {
    let (backup, primary, _) = protected().await;
    drop(primary);
    in_time("failover", async {
        // The backup learns of the death in its own time.
        while let Err(failure) = backup.failover(false).await {
            assert_eq!(failure.code, "primary-alive");
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_epoch_under_way_is_not_part_of_what_is_promoted() {
    let (backup, primary, model) = protected().await;
    let next = Epoch::new(at(1, 3), Delta, &layout(&[4]), &[page(0, 0, 99)], b"device 3");
    let messages = next.messages();
    primary.send_all(messages[..messages.len() - 1].iter().cloned()).await;
    backup.failover(true).await.unwrap();
    assert_eq!(backup.promoter.loaded.lock().unwrap().take().unwrap(), model.content(at(1, 2), b"device 2"));
}

#[tokio::test]
async fn a_promotion_that_fails_can_be_tried_again() {
    let (backup, primary, model) = protected().await;
    drop(primary);
    for _ in 0..2 {
        assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 2), b"device 2"));
    }
    assert_eq!(backup.control().generation, Generation(1));
    backup.promoter.fail_activate.store(true, Ordering::Relaxed);
    let failure = backup.failover(true).await.unwrap_err();
    assert_eq!(failure.reason, "told to fail at activation");
    backup.promoter.fail_activate.store(false, Ordering::Relaxed);
    let steps = backup.failover(true).await.unwrap();
    let report = steps.last().unwrap().failover.clone().unwrap();
    // The failed activation may have let the guest run: its generation is spent.
    assert_eq!(report.generation, Generation(3));
    assert_eq!(backup.promoter.loaded.lock().unwrap().take().unwrap(), model.content(at(1, 2), b"device 2"));
    // Every standby but the last was removed.
    let calls = backup.promoter.calls();
    let count = |call: &str| calls.iter().filter(|c| *c == call).count();
    assert_eq!(count("prepare"), count("discard") + 1, "{calls:?}");
}

#[tokio::test]
async fn a_warm_standby_has_the_image_ahead_of_the_failover() {
    let backup = Backup::start().await;
    backup.promoter.warm.store(true, Ordering::Relaxed);
    let mut primary = Primary::connect(&backup, hello(1)).await.unwrap();
    let layout = layout(&[2048, 2]);
    // The second full copy leaves pages out that the first had.
    let pages = [page(0, 0, 1), page(0, 1500, 2), page(1, 1, 3)];
    primary.commit(&Epoch::new(at(1, 1), Full, &layout, &pages, b"device 1")).await;
    in_time("the image moves", async {
        while !backup.status().await.standby.contains("warm") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let again = [page(0, 7, 4), page(1, 0, 5)];
    primary.commit(&Epoch::new(at(1, 2), Full, &layout, &again, b"device 2")).await;
    primary.commit(&Epoch::new(at(1, 3), Delta, &layout, &[page(0, 2047, 6)], b"device 3")).await;
    let mut model = Model::new(&layout);
    model.write(&again);
    model.write(&[page(0, 2047, 6)]);
    backup.failover(true).await.unwrap();
    assert_eq!(backup.promoter.warm_loads.load(Ordering::Relaxed), 1);
    let loaded = backup.promoter.loaded.lock().unwrap().take().unwrap();
    assert!(loaded == model.content(at(1, 3), b"device 3"));
}

#[tokio::test]
async fn after_a_failed_promotion_the_primary_may_go_on() {
    let (backup, primary, _) = protected().await;
    drop(primary);
    backup.peek().await.unwrap();
    let mut primary = Primary::reconnect(&backup, 1).await;
    assert_eq!(primary.ack.last_committed, Some(at(1, 2)));
    primary.commit(&Epoch::new(at(1, 3), Delta, &layout(&[4]), &[page(0, 0, 9)], b"device 3")).await;
}

#[tokio::test]
async fn a_left_over_standby_is_removed_when_the_agent_starts() {
    let (backup, primary, _) = protected().await;
    drop(primary);
    *backup.promoter.local.lock().unwrap() = Some(LocalDomain::Loaded);
    let backup = backup.restart().await;
    assert_eq!(*backup.promoter.local.lock().unwrap(), None);
}

#[tokio::test]
async fn the_admin_socket_answers_what_this_agent_does() {
    let (backup, _primary, _) = protected().await;
    let mut admin = backup.admin().await;
    let mut watch = admin.watch(StatusRequest { domain: Some("web".into()) }).await.unwrap();
    let seen = in_time("watch", async {
        loop {
            let guest = watch.next().await.unwrap().unwrap().guests.remove(0);
            if guest.committed_epoch == Some(EpochId(2)) && guest.standby == "ready" {
                return guest;
            }
        }
    })
    .await;
    assert_eq!((seen.state, seen.epochs_total, seen.full_copies_total), (GuestState::Standby, 2, 1));
    assert_eq!((seen.peer.as_str(), seen.qemu.as_str(), seen.dirty_pages_p50), ("alpha", "7.2.22", Some(1)));
    let protect = ProtectRequest {
        domain: "web".into(),
        to: "x".into(),
        epoch: None,
        insecure: true,
        ungated: false,
        goals: None,
        term: None,
        policy: understudy_proto::policy::GuestPolicy::default(),
    };
    assert_eq!(admin.protect(protect).await.err().unwrap().code, "wrong-agent");
    let unprotect = UnprotectRequest { domain: "web".into(), term: None };
    assert_eq!(
        admin.unprotect(unprotect).await.err().unwrap().remedy,
        "run `understudy unprotect web` on alpha"
    );
    let missing = admin.status(StatusRequest { domain: Some("nope".into()) }).await.unwrap_err();
    assert_eq!((missing.kind, missing.code.as_ref()), (FailureKind::NotFound, "no-guest"));
}
