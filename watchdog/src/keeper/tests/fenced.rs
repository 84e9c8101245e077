//! A fencing command that gives no licence: its device is gone with the power of its host.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::arbiter::FenceCommand;

#[tokio::test]
async fn fencing_that_hangs_keeps_no_claim_waiting_and_the_report_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (program, asked) = (folder.path().join("fence"), folder.path().join("asked"));
    std::fs::write(&program, format!("#!/bin/sh\n: > {}\nexec sleep 600\n", asked.display())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let fence = FenceCommand { program, options: vec![], timeout: Duration::from_secs(600) };
    let pair = pair_with(Policies::default(), None, Some(Arc::new(fence))).await;
    pair.standby().await;
    pair.record.silent.store(true, Ordering::Relaxed);
    pair.keepers[0].abort();
    let end = Instant::now() + PATIENCE;
    while !asked.exists() {
        assert!(Instant::now() < end, "nobody is fenced");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let done = pair.beta.done();
    assert!(!done.iter().any(|command| matches!(command, Command::Load(_))), "{done:?}");
    pair.record.silent.store(false, Ordering::Relaxed);
    pair.until("taken over", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta"))
        .await;
    let report = pair.report().await;
    assert_eq!(report["fencing"], serde_json::json!({"success": false, "outcome": "not ended"}), "{report}");
}
