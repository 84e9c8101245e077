//! The commands that change something.

use crate::args::{EpochMs, FailoverArgs, ProtectArgs};
use crate::progress::Display;
use std::path::Path;
use std::time::Duration;
use tokio_stream::StreamExt;
use understudy_proto::rpc::admin::{FailoverRequest, Progress, ProtectRequest, UnprotectRequest};
use understudy_proto::rpc::{AdminClient, Failure, FailureKind, FallibleStream, transport};

/// `understudy protect`.
pub(crate) async fn protect(run_dir: &Path, args: &ProtectArgs) -> Result<(), Failure> {
    let mut agent = connect(run_dir, transport::PRIMARY_SOCKET, "understudy-primary").await?;
    let request = ProtectRequest {
        domain: args.domain.clone(),
        to: args.to.clone(),
        epoch: match args.epoch_ms {
            Some(EpochMs::Fixed(ms)) => Some(Duration::from_millis(ms.into())),
            Some(EpochMs::Auto) | None => None,
        },
        goals: args.goals(),
        insecure: args.insecure,
        ungated: args.ungated,
    };
    follow(agent.protect(request).await?).await.map(drop)
}

/// `understudy unprotect`: by the primary agent, or where only the backup knows the guest, by that one.
pub(crate) async fn unprotect(run_dir: &Path, domain: &str) -> Result<(), Failure> {
    let request = UnprotectRequest { domain: domain.to_owned() };
    let by_primary = match connect(run_dir, transport::PRIMARY_SOCKET, "understudy-primary").await {
        Ok(mut agent) => agent.unprotect(request.clone()).await,
        Err(failure) => Err(failure),
    };
    let reply = match by_primary {
        Err(failure) if matches!(failure.kind, FailureKind::NotFound | FailureKind::Unavailable) => {
            let Ok(mut agent) = connect(run_dir, transport::BACKUP_SOCKET, "understudy-backup").await else {
                return Err(failure);
            };
            agent.unprotect(request).await?
        }
        answer => answer?,
    };
    println!("{}", reply.text);
    Ok(())
}

/// `understudy failover`.
pub(crate) async fn failover(run_dir: &Path, args: &FailoverArgs) -> Result<(), Failure> {
    // Where a watchdog keeps the guest, the arbiter decides, unless the operator knows better.
    if !args.i_have_fenced && crate::owner::failover(run_dir, args).await?.is_some() {
        return Ok(());
    }
    let mut agent =
        connect(run_dir, transport::BACKUP_SOCKET, "understudy-backup").await.map_err(|failure| {
            let remedy = format!("run this on the backup host; if this is it: {}", failure.remedy);
            Failure { remedy, ..failure }
        })?;
    let request =
        FailoverRequest { domain: args.domain.clone(), i_have_fenced: args.i_have_fenced, hold: false };
    let last = follow(agent.failover(request).await?).await?;
    let report = last.failover.ok_or_else(|| no_end("the report of the failover"))?;
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    if args.json {
        println!("{}", json(&report)?);
    } else {
        println!(
            "{} runs here from epoch {} (generation {}), {} ms after the request",
            args.domain,
            report.epoch,
            report.generation,
            report.total.as_millis()
        );
    }
    Ok(())
}

/// Shows the steps of `stream` and gives its last one.
async fn follow(mut stream: FallibleStream<Progress>) -> Result<Progress, Failure> {
    let mut display = Display::new();
    while let Some(step) = stream.next().await {
        let step = step?;
        display.show(&step);
        if step.done {
            return Ok(step);
        }
    }
    Err(no_end("the end of the work"))
}

fn no_end(what: &str) -> Failure {
    Failure::new(FailureKind::Internal, "no-end", format!("the agent's answer ended without {what}"))
        .with_remedy("see the agent's log and `understudy status`")
}

/// Any value of ours as one line of JSON.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|e| Failure::new(FailureKind::Internal, "json", e.to_string()))
}

/// The agent `name` of this host.
pub(crate) async fn connect(run_dir: &Path, socket: &str, name: &str) -> Result<AdminClient, Failure> {
    let channel = transport::connect_unix(&run_dir.join(socket)).await.map_err(|failure| Failure {
        remedy: format!(
            "start {name} on this host, or use root if it runs; --run-dir says where its socket is"
        ),
        ..failure
    })?;
    Ok(AdminClient::new(channel))
}
