//! The epoch stream end to end over loopback: what is committed, what is not, and what the primary is told.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test ends by panicking")]

mod support;

use bytes::Bytes;
use support::*;
use understudy_proto::digest::Digest;
use understudy_proto::epoch::EpochKind::{Delta, Full};
use understudy_proto::frame::RECORD_HEADER_BYTES;
use understudy_proto::ids::{EpochId, Generation, GuestId};
use understudy_proto::negotiate::Offer;
use understudy_proto::rpc::FailureKind;
use understudy_proto::rpc::epoch::{
    BackupMessage, Begin, GoodbyeReason, Hello, Pages, PrimaryMessage, ProbeRequest, RefusedCode, RejectCode,
};

fn rejected(answer: Option<BackupMessage>) -> (RejectCode, String) {
    match answer {
        Some(BackupMessage::Reject(r)) => (r.code, r.text),
        other => panic!("{other:?}"),
    }
}

fn refused(answer: BackupMessage) -> (RefusedCode, Option<Generation>) {
    match answer {
        BackupMessage::Refused(r) => (r.code, r.generation),
        other => panic!("{other:?}"),
    }
}

/// A backup with full epoch 1 committed, and what its image must be.
async fn seeded() -> (Backup, Primary, Model) {
    let backup = Backup::start().await;
    let mut primary = Primary::connect(&backup, hello(1)).await.unwrap();
    let layout = layout(&[8, 2]);
    let pages: Vec<_> =
        (0..8).map(|i| page(0, i, i as u8 + 1)).chain([page(1, 0, 9), page(1, 1, 0)]).collect();
    primary.commit(&Epoch::new(at(1, 1), Full, &layout, &pages, b"device 1")).await;
    let mut model = Model::new(&layout);
    model.write(&pages);
    (backup, primary, model)
}

#[tokio::test]
async fn committed_epochs_are_the_image() {
    let (backup, mut primary, mut model) = seeded().await;
    // A page twice in one epoch: the later one counts.
    let pages = [page(0, 3, 77), page(1, 1, 5), page(0, 3, 78), page(0, 0, 0)];
    primary.commit(&Epoch::new(at(1, 2), Delta, &layout(&[8, 2]), &pages, b"device 2")).await;
    model.write(&pages);
    primary.commit(&Epoch::new(at(1, 3), Delta, &layout(&[8, 2]), &[], b"device 3")).await;
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 3), b"device 3"));
}

#[tokio::test]
async fn a_primary_that_dies_in_the_middle_of_an_epoch_leaves_the_one_before() {
    let epoch = Epoch::new(at(1, 2), Delta, &layout(&[8, 2]), &[page(0, 0, 200)], b"device 2");
    let messages = epoch.messages();
    for sent in 1..messages.len() {
        let (backup, primary, model) = seeded().await;
        primary.send_all(messages[..sent].iter().cloned()).await;
        drop(primary);
        let again = Primary::reconnect(&backup, 1).await;
        assert_eq!(again.ack.last_committed, Some(at(1, 1)));
        assert_eq!(
            backup.peek().await.unwrap(),
            model.content(at(1, 1), b"device 1"),
            "after {sent} messages"
        );
    }
}

#[tokio::test]
async fn a_full_copy_cut_off_leaves_the_old_image() {
    let (backup, primary, model) = seeded().await;
    let pages: Vec<_> = (0..8).map(|i| page(0, i, 0xee)).collect();
    let epoch = Epoch::new(at(1, 2), Full, &layout(&[8, 2]), &pages, b"device 2");
    let messages = epoch.messages();
    primary.send_all(messages[..messages.len() - 1].iter().cloned()).await;
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 1), b"device 1"));
}

#[tokio::test]
async fn a_full_copy_replaces_everything_even_the_layout() {
    let (backup, mut primary, _) = seeded().await;
    let other = layout(&[3]);
    primary.commit(&Epoch::new(at(1, 2), Full, &other, &[page(0, 2, 4)], b"device 2")).await;
    let mut model = Model::new(&other);
    model.write(&[page(0, 2, 4)]);
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 2), b"device 2"));
}

#[tokio::test]
async fn every_flipped_bit_of_an_epoch_is_rejected_and_a_full_copy_heals() {
    let (backup, mut primary, _) = seeded().await;
    let layout = layout(&[8, 2]);
    let mut number = 1;
    for kind in [Delta, Full] {
        for byte in [0, 8, 10, 12, 16, 4000, 4111] {
            number += 1;
            let mut epoch = Epoch::new(at(1, number), kind, &layout, &[page(0, 0, 200)], b"device");
            let mut frame = epoch.frames[0].to_vec();
            frame[byte] ^= 1;
            epoch.frames[0] = frame.into();
            primary.send_all(epoch.messages()).await;
            let (code, text) = rejected(primary.answer().await);
            assert_eq!(code, RejectCode::Corrupt, "byte {byte}: {text}");
            number += 1;
            primary.commit(&Epoch::new(at(1, number), Full, &layout, &[page(0, 1, 3)], b"good")).await;
        }
    }
    let mut model = Model::new(&layout);
    model.write(&[page(0, 1, 3)]);
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, number), b"good"));
}

#[tokio::test]
async fn records_by_reference_are_over_the_epoch_before() {
    let (backup, mut primary, mut model) = seeded().await;
    let layout = layout(&[8, 2]);
    primary.commit(&Epoch::new(at(1, 2), Delta, &layout, &[edited(0, 0, 9), edited(0, 1, 8)], b"2")).await;
    model.write(&[edited(0, 0, 9), edited(0, 1, 8)]);
    // Page 0 differs a little, page 1 not at all, page 2 everywhere; then pages 0 and 1 once more.
    let pages = [edited(0, 0, 20), edited(0, 1, 8), page(0, 2, 50), edited(0, 0, 21), page(0, 1, 0)];
    for (number, batched) in [(3, false), (4, true)] {
        let epoch = Epoch::coded(at(1, number), Delta, &layout, &pages, b"device", &model, batched);
        primary.commit(&epoch).await;
        model.write(&pages);
    }
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 4), b"device"));
}

#[tokio::test]
async fn a_reference_that_nothing_stands_behind_is_rejected() {
    let (backup, mut primary, model) = seeded().await;
    let layout = layout(&[8, 2]);
    let epoch = |number, kind, pages: &[Page]| {
        let mut epoch = Epoch::coded(at(1, number), Delta, &layout, pages, b"device", &model, false);
        (epoch.kind, epoch.manifest.kind) = (kind, kind);
        epoch
    };
    // In a full copy there is no epoch before.
    let full = epoch(2, Full, &[page(0, 0, 1)]);
    assert_eq!(full.frames[0].len(), RECORD_HEADER_BYTES, "the page is said to be unchanged");
    // The second record of a page cannot say whether the epoch before or the first one is meant.
    let mut twice = epoch(2, Delta, &[page(0, 0, 7)]);
    let unchanged = &full.frames[0];
    twice.frames = vec![[&twice.frames[0][..], unchanged].concat().into()];
    twice.manifest.frame_bytes = twice.frames[0].len() as u64;
    for (epoch, reason) in [(full, "refers to the epoch before"), (twice, "has given before")] {
        primary.send_all(epoch.messages()).await;
        let (code, text) = rejected(primary.answer().await);
        assert_eq!(code, RejectCode::Corrupt);
        assert!(text.contains(reason), "{text}");
    }
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 1), b"device 1"));
}

/// A backup whose image is not what the primary takes it for must not commit what comes of it.
#[tokio::test]
async fn a_difference_from_another_page_is_rejected_by_its_digest() {
    let (backup, mut primary, model) = seeded().await;
    let layout = layout(&[8, 2]);
    let mut other = Model::new(&layout);
    other.write(&[page(0, 0, 99), page(0, 1, 99)]);
    let (block, index, mut content) = page(0, 0, 99);
    content.iter_mut().for_each(|content| content[5] = 5);
    for pages in [[(block, index, content)], [page(0, 1, 99)]] {
        let epoch = Epoch::coded(at(1, 2), Delta, &layout, &pages, b"device", &other, false);
        assert!(epoch.frames[0].len() < 100, "by reference");
        primary.send_all(epoch.messages()).await;
        let (code, text) = rejected(primary.answer().await);
        assert_eq!(code, RejectCode::Corrupt);
        assert!(text.contains("digest of the pages"), "{text}");
    }
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 1), b"device 1"));
}

#[tokio::test]
async fn every_field_of_the_manifest_counts() {
    let (backup, mut primary, model) = seeded().await;
    let good = Epoch::new(at(1, 2), Delta, &layout(&[8, 2]), &[page(0, 0, 200)], b"device 2");
    type Edit = (&'static str, fn(&mut Epoch));
    let edits: [Edit; 8] = [
        ("frames", |e| e.manifest.frames += 1),
        ("pages", |e| e.manifest.pages -= 1),
        ("bytes of frames", |e| e.manifest.frame_bytes += 1),
        ("bytes of device", |e| e.manifest.device_bytes -= 1),
        ("digest of the pages", |e| e.manifest.pages_digest.0 ^= 1),
        ("digest of the device", |e| e.manifest.device_digest = Digest(0)),
        ("manifest is of Full", |e| e.manifest.kind = Full),
        ("bytes of device", |e| e.device = Bytes::from_static(b"device")),
    ];
    for (named, edit) in edits {
        let mut epoch = good.clone();
        edit(&mut epoch);
        primary.send_all(epoch.messages()).await;
        let (code, text) = rejected(primary.answer().await);
        assert_eq!(code, RejectCode::Corrupt);
        assert!(text.contains(named), "{named}: {text}");
    }
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 1), b"device 1"));
}

#[tokio::test]
async fn gaps_and_duplicates_are_rejected() {
    let (backup, mut primary, model) = seeded().await;
    let layout = layout(&[8, 2]);
    for (number, kind, code) in
        [(3, Delta, RejectCode::NoBase), (1, Delta, RejectCode::NoBase), (1, Full, RejectCode::OutOfOrder)]
    {
        let epoch = Epoch::new(at(1, number), kind, &layout, &[page(0, 0, 200)], b"device");
        primary.send_all(epoch.messages()).await;
        assert_eq!(rejected(primary.answer().await).0, code, "{kind:?} {number}");
    }
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 1), b"device 1"));
}

#[tokio::test]
async fn oversize_is_refused_before_it_is_held() {
    let backup = Backup::with_staging(300_000).await;
    let layout = layout(&[128]);
    let mut primary = Primary::connect(&backup, hello(1)).await.unwrap();
    let all: Vec<_> = (0..128).map(|i| page(0, i, 1)).collect();
    // A full copy is not staged.
    primary.commit(&Epoch::new(at(1, 1), Full, &layout, &all, b"d")).await;
    primary.send_all(Epoch::new(at(1, 2), Delta, &layout, &all, b"d").messages()).await;
    assert_eq!(rejected(primary.answer().await).0, RejectCode::TooLarge);
    primary.commit(&Epoch::new(at(1, 3), Full, &layout, &all, b"d")).await;
    primary.commit(&Epoch::new(at(1, 4), Delta, &layout, &all[..64], b"d")).await;

    let begin = Begin { generation: Generation(1), epoch: EpochId(5), kind: Delta };
    primary.send(PrimaryMessage::Begin(begin)).await;
    let frame = Bytes::from(vec![0; understudy_proto::limits::MAX_FRAME_BYTES + 1]);
    primary.send(PrimaryMessage::Pages(Pages { epoch: EpochId(5), frame })).await;
    let (code, _) = refused(primary.answer().await.unwrap());
    assert_eq!((code, primary.answer().await), (RefusedCode::Protocol, None));
    // The epochs committed stay.
    assert_eq!(Primary::reconnect(&backup, 1).await.ack.last_committed, Some(at(1, 4)));
}

#[tokio::test]
async fn a_reconnected_primary_goes_on_where_it_was() {
    let (backup, mut primary, mut model) = seeded().await;
    let layout = layout(&[8, 2]);
    let incarnation = primary.ack.incarnation;
    for number in 2..6 {
        let pages = [page(0, number, 100)];
        primary.commit(&Epoch::new(at(1, number), Delta, &layout, &pages, b"d")).await;
        model.write(&pages);
        drop(primary);
        primary = Primary::reconnect(&backup, 1).await;
        assert_eq!((primary.ack.incarnation, primary.ack.last_committed), (incarnation, Some(at(1, number))));
    }
    assert_eq!(backup.peek().await.unwrap(), model.content(at(1, 5), b"d"));
}

#[tokio::test]
async fn streams_that_have_no_place_are_refused() {
    let (backup, mut primary, _) = seeded().await;
    let busy = Primary::connect(&backup, hello_with(|h| h.session = 0)).await.err().unwrap();
    assert_eq!(refused(busy), (RefusedCode::Busy, Some(Generation(1))));
    let busy =
        Primary::connect(&backup, hello_with(|h| h.primary_host = "gamma".into())).await.err().unwrap();
    assert_eq!(refused(busy).0, RefusedCode::Busy);
    let old = hello_with(|h| h.offer = Offer::new([999], Vec::<String>::new()).unwrap());
    assert_eq!(refused(Primary::connect(&backup, old).await.err().unwrap()).0, RefusedCode::Incompatible);
    let machine = hello_with(|h| h.machine = "pc-unknown".into());
    assert_eq!(refused(Primary::connect(&backup, machine).await.err().unwrap()).0, RefusedCode::Incompatible);
    // None of it disturbed the stream there is.
    primary.send(PrimaryMessage::Heartbeat(7)).await;
    assert_eq!(primary.answer().await, Some(BackupMessage::HeartbeatReply(7)));
    // A newer session of the same host replaces it.
    let newer = Primary::connect(&backup, hello(1)).await.unwrap();
    assert_eq!(newer.ack.last_committed, Some(at(1, 1)));
    assert_eq!(primary.answer().await, None);
}

fn hello_with(
    edit: impl FnOnce(&mut understudy_proto::rpc::epoch::Hello),
) -> understudy_proto::rpc::epoch::Hello {
    let mut hello = hello(1);
    edit(&mut hello);
    hello
}

#[tokio::test]
async fn a_stream_begins_with_hello() {
    let backup = Backup::start().await;
    let (tx, outbound) = tokio::sync::mpsc::channel(1);
    tx.send(PrimaryMessage::Heartbeat(1)).await.unwrap();
    let outbound = tokio_stream::wrappers::ReceiverStream::new(outbound);
    let failure = backup.epochs().await.replicate(outbound).await.err().unwrap();
    assert_eq!((failure.kind, failure.code.as_ref()), (FailureKind::InvalidArgument, "protocol"));
    assert!(failure.reason.contains("begins with Hello"), "{failure}");
}

#[tokio::test]
async fn goodbye_discards_image_and_standby_but_not_the_generation() {
    let backup = Backup::start().await;
    let mut primary = Primary::connect(&backup, hello(4)).await.unwrap();
    primary.commit(&Epoch::new(at(4, 1), Full, &layout(&[2]), &[page(0, 0, 1)], b"d")).await;
    primary.send(PrimaryMessage::Goodbye(GoodbyeReason::Unprotected)).await;
    assert_eq!(primary.answer().await, None);
    assert_eq!(backup.failover(true).await.unwrap_err().code, "not-protected");
    let older = Primary::connect(&backup, hello(3)).await.err().unwrap();
    assert_eq!(refused(older), (RefusedCode::Superseded, Some(Generation(4))));
    assert_eq!(Primary::connect(&backup, hello(4)).await.unwrap().ack.last_committed, None);
}

#[tokio::test]
async fn a_guest_that_was_given_up_keeps_no_thread() {
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
        names.filter(|name| name.trim() == "image given-up").count()
    };
    let backup = Backup::start().await;
    let hello = Hello { guest_name: "given-up".into(), ..hello(1) };
    let mut primary = Primary::connect(&backup, hello).await.unwrap();
    primary.commit(&Epoch::new(at(1, 1), Full, &layout(&[2]), &[page(0, 0, 1)], b"d")).await;
    assert_eq!(threads(), 1);
    primary.send(PrimaryMessage::Goodbye(GoodbyeReason::Unprotected)).await;
    assert_eq!(primary.answer().await, None);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while threads() > 0 {
        assert!(std::time::Instant::now() < end, "its thread is still there");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_name_means_the_guest_that_is_protected_now() {
    let backup = Backup::start().await;
    let epoch = Epoch::new(at(1, 1), Full, &layout(&[2]), &[page(0, 0, 1)], b"d");
    // Undefined and defined again: the same name, another UUID.
    let earlier = Hello { guest: GuestId(uuid::Uuid::from_u128(1)), ..hello(1) };
    let mut primary = Primary::connect(&backup, earlier).await.unwrap();
    primary.commit(&epoch).await;
    primary.send(PrimaryMessage::Goodbye(GoodbyeReason::Ended)).await;
    assert_eq!(primary.answer().await, None);
    Primary::connect(&backup, hello(1)).await.unwrap().commit(&epoch).await;
    let steps = backup.failover(true).await.unwrap();
    assert!(steps.last().unwrap().done, "{steps:?}");
}

#[tokio::test]
async fn a_restarted_backup_says_that_it_holds_nothing() {
    let (backup, primary, _) = seeded().await;
    let before = primary.ack.incarnation;
    drop(primary);
    let backup = backup.restart().await;
    assert_eq!(backup.control().last_committed, Some(EpochId(1)));
    assert_eq!(backup.failover(true).await.unwrap_err().code, "no-image");
    let mut primary = Primary::reconnect(&backup, 1).await;
    assert_ne!(primary.ack.incarnation, before);
    assert_eq!(primary.ack.last_committed, None);
    let delta = Epoch::new(at(1, 2), Delta, &layout(&[8, 2]), &[page(0, 0, 1)], b"d");
    primary.send_all(delta.messages()).await;
    assert_eq!(rejected(primary.answer().await).0, RejectCode::NoBase);
}

#[tokio::test]
async fn a_control_file_that_cannot_be_read_refuses_its_guest() {
    let (backup, primary, _) = seeded().await;
    drop(primary);
    let path = backup.dir.path().join(understudy_proto::control::FOLDER);
    let path = path.join(understudy_proto::control::file_name(GUEST));
    // After the file was written for the last time.
    let dir = std::sync::Arc::clone(&backup.dir);
    let promoter = std::sync::Arc::clone(&backup.promoter);
    drop(backup.restart().await);
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let other = std::sync::Arc::new(tempfile::tempdir().unwrap());
    std::fs::create_dir(other.path().join(understudy_proto::control::FOLDER)).unwrap();
    let copy = other.path().join(understudy_proto::control::FOLDER).join(path.file_name().unwrap());
    std::fs::copy(&path, &copy).unwrap();
    drop(dir);
    let backup = Backup::start_in(other, promoter, 1 << 20).await;
    match Primary::connect(&backup, hello(9)).await.err().unwrap() {
        BackupMessage::Refused(r) => {
            assert_eq!(r.code, RefusedCode::Internal);
            assert!(r.text.contains("damaged") && r.remedy.contains("restore"), "{r:?}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read(&copy).unwrap(), bytes);
}

#[tokio::test]
async fn a_probe_tells_what_a_primary_must_know() {
    let (backup, _primary, _) = seeded().await;
    let request =
        ProbeRequest { offer: Offer::ours(), guest: Some(GUEST), machine: Some("pc-unknown".into()) };
    let reply = backup.epochs().await.probe(request).await.unwrap();
    assert_eq!(reply.machine_supported, Some(false));
    assert_eq!(reply.qemu_version.as_deref(), Some("7.2.22"));
    assert!(reply.free_memory_bytes > 0);
    let record = reply.guest.unwrap();
    assert_eq!((record.generation, record.primary_host.as_str()), (Generation(1), "alpha"));
}
