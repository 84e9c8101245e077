//! The commands that change something.

use crate::args::{FailoverArgs, ProtectArgs, SetArgs};
use crate::connect::Agents;
pub(crate) use crate::connect::connect;
use crate::progress::Display;
use tokio_stream::StreamExt;
use understudy_proto::policy::GuestPolicy;
use understudy_proto::rpc::admin::{
    FailoverRequest, Progress, ProtectRequest, SetRequest, StatusRequest, UnprotectRequest,
};
use understudy_proto::rpc::{Failure, FailureKind, FallibleStream, transport};

/// `understudy protect`.
pub(crate) async fn protect(agents: &Agents, args: &ProtectArgs) -> Result<(), Failure> {
    let mut agent = connect(agents, transport::PRIMARY_SOCKET, "understudy-primary").await?;
    let request = ProtectRequest {
        domain: args.domain.clone(),
        to: args.to.clone(),
        epoch: args.pace.epoch(),
        goals: args.pace.goals(),
        insecure: args.insecure,
        ungated: args.ungated,
        term: None,
        policy: args.policy.over(GuestPolicy::default()),
    };
    follow(agent.protect(request).await?).await.map(drop)
}

/// `understudy set`.
pub(crate) async fn set(agents: &Agents, args: &SetArgs) -> Result<(), Failure> {
    let mut agent = connect(agents, transport::PRIMARY_SOCKET, "understudy-primary").await?;
    let (domain, epoch, goals) = (args.domain.clone(), args.pace.epoch(), args.pace.goals());
    let policy = if args.policy.is_given() {
        let known = agent.status(StatusRequest { domain: Some(domain.clone()) }).await?.guests;
        let before = known.into_iter().find_map(|guest| guest.settings);
        Some(args.policy.over(before.map(|settings| settings.policy).unwrap_or_default()))
    } else {
        None
    };
    let reply = agent.set(SetRequest { domain, epoch, goals, policy }).await?;
    println!("{}", reply.text);
    Ok(())
}

/// `understudy unprotect`: by the primary agent, or where only the backup knows the guest, by that one.
pub(crate) async fn unprotect(agents: &Agents, domain: &str) -> Result<(), Failure> {
    let request = UnprotectRequest { domain: domain.to_owned(), term: None };
    let by_primary = match connect(agents, transport::PRIMARY_SOCKET, "understudy-primary").await {
        Ok(mut agent) => agent.unprotect(request.clone()).await,
        Err(failure) => Err(failure),
    };
    let reply = match by_primary {
        Err(failure) if matches!(failure.kind, FailureKind::NotFound | FailureKind::Unavailable) => {
            let Ok(mut agent) = connect(agents, transport::BACKUP_SOCKET, "understudy-backup").await else {
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
pub(crate) async fn failover(agents: &Agents, args: &FailoverArgs) -> Result<(), Failure> {
    // Where a watchdog keeps the guest, the arbiter decides, unless the operator knows better.
    if !args.i_have_fenced
        && let Ok(folder) = agents.folder()
        && crate::owner::failover(folder, args).await?.is_some()
    {
        return Ok(());
    }
    let mut agent =
        connect(agents, transport::BACKUP_SOCKET, "understudy-backup").await.map_err(|failure| {
            let remedy = format!("run this on the backup host; if this is it: {}", failure.remedy);
            Failure { remedy, ..failure }
        })?;
    let (domain, i_have_fenced) = (args.domain.clone(), args.i_have_fenced);
    let request = FailoverRequest { domain, i_have_fenced, hold: false, term: None };
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
