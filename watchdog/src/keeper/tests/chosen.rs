//! What was chosen for one guest.

use understudy_proto::policy::{GuestPolicy, LostBackup, QemuCrash};

use super::*;

fn settings(policy: GuestPolicy) -> GuestSettings {
    GuestSettings { epoch_ms: 25, ungated: true, policy, ..GuestSettings::default() }
}

/// Alpha's agent says it of the guest, and beta's watchdog knows it too.
async fn chosen(pair: &Pair, policy: GuestPolicy) -> GuestSettings {
    let settings = settings(policy);
    pair.alpha.change(|seen| seen.settings = Some(settings.clone()));
    let end = Instant::now() + PATIENCE;
    let file = pair.folder.path().join("beta").join(GUEST.to_string()).join("settings");
    while std::fs::read(&file).ok().and_then(|bytes| GuestSettings::decode(&bytes).ok()).as_ref()
        != Some(&settings)
    {
        assert!(Instant::now() < end, "beta does not know");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    settings
}

#[tokio::test]
async fn a_guest_is_protected_again_as_it_was_and_by_its_own_spare() {
    let pair = pair(Policies::default()).await;
    let policy = GuestPolicy { spares: vec!["gamma".into()], ..GuestPolicy::default() };
    let before = chosen(&pair, policy).await;
    pair.keepers[0].abort();
    let asked = format!("protect gamma as {}", said(&before));
    let end = Instant::now() + PATIENCE;
    while !pair.beta.1.lock().unwrap().contains(&asked) {
        assert!(Instant::now() < end, "{asked} was not asked, but {:?}", pair.beta.1.lock().unwrap());
        pair.beta.change(|seen| {
            if seen.local.runs && seen.promotion.is_none() {
                seen.promotion = Some(promotion());
            }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn what_is_chosen_for_the_guest_counts_more_than_the_default_on_both_hosts() {
    let crashed = Over { generation: Generation(1), crashed: true };
    let dies = |seen: &mut Seen| {
        (seen.local, seen.place, seen.over) = (Local::default(), Place::Off, Some(crashed));
        (seen.listed, seen.protecting, seen.sending) = (false, false, None);
    };
    let leave = GuestPolicy { on_qemu_crash: Some(QemuCrash::Leave), ..GuestPolicy::default() };
    let left = pair(Policies::default()).await;
    chosen(&left, leave).await;
    left.alpha.change(dies);
    left.until("ended", |record| matches!(&record.owner, Owner::Ended { .. })).await;
    assert!(!left.beta.done().iter().any(|command| matches!(command, Command::Load(_))));
    // The other way round.
    let leave = Policies { qemu_crash: QemuCrash::Leave, ..Policies::default() };
    let failover = GuestPolicy { on_qemu_crash: Some(QemuCrash::Failover), ..GuestPolicy::default() };
    let taken = pair(leave).await;
    chosen(&taken, failover).await;
    taken.alpha.change(dies);
    taken.until("at beta", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta")).await;
}

#[tokio::test]
async fn a_guest_that_may_go_on_alone_does_when_its_backup_is_lost() {
    let pair = pair(Policies::default()).await;
    let solo = GuestPolicy { on_lost_backup: Some(LostBackup::Solo), ..GuestPolicy::default() };
    chosen(&pair, solo).await;
    pair.keepers[1].abort();
    pair.until("alone", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "alpha")).await;
    Pair::until_done(&pair.alpha, |command| matches!(command, Command::OpenGate(_))).await;
}
