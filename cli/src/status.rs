//! `understudy status`: what both agents of this host say, side by side.

use crate::args::StatusArgs;
use crate::commands::{connect, json};
use crate::connect::Agents;
use serde::Serialize;
use std::time::Duration;
use tokio_stream::StreamExt;
use understudy_proto::rpc::admin::{AgentRole, GuestStatus, StatusReply, StatusRequest};
use understudy_proto::rpc::{Failure, FailureKind, transport};

/// Between two looks for an agent that was not there.
const RETRY: Duration = Duration::from_secs(1);

const AGENTS: [(&str, &str); 2] =
    [(transport::PRIMARY_SOCKET, "understudy-primary"), (transport::BACKUP_SOCKET, "understudy-backup")];

/// The answer of each agent, in the order of [`AGENTS`].
type Answers = [Result<StatusReply, Failure>; 2];

/// `understudy status`.
pub(crate) async fn status(agents: &Agents, args: &StatusArgs) -> Result<(), Failure> {
    let request = StatusRequest { domain: args.domain.clone() };
    if args.watch {
        return watch(agents, args, &request).await;
    }
    if agents.is_one() {
        let reply = once(agents, AGENTS[0], &request).await?;
        let mut answers = [Err(not_asked()), Err(not_asked())];
        let index = place(&reply);
        answers[index] = Ok(reply);
        return print(&answers, args);
    }
    let answers = [once(agents, AGENTS[0], &request).await, once(agents, AGENTS[1], &request).await];
    print(&answers, args)?;
    // Nobody answered, or the domain that was asked for is not known: an error of its own.
    match answers {
        [Err(first), Err(second)] => Err(if first.kind == FailureKind::Unavailable { second } else { first }),
        _ => Ok(()),
    }
}

/// Code of an answer that nobody was asked for.
const NOT_ASKED: &str = "not-asked";

fn not_asked() -> Failure {
    Failure::new(FailureKind::Unavailable, NOT_ASKED, "not asked: --connect names one agent")
}

/// Where an answer belongs in [`Answers`].
fn place(reply: &StatusReply) -> usize {
    match reply.role {
        AgentRole::Primary => 0,
        AgentRole::Backup => 1,
    }
}

async fn once(
    agents: &Agents,
    (socket, name): (&str, &str),
    request: &StatusRequest,
) -> Result<StatusReply, Failure> {
    connect(agents, socket, name).await?.status(request.clone()).await
}

async fn watch(agents: &Agents, args: &StatusArgs, request: &StatusRequest) -> Result<(), Failure> {
    let (tx, mut rx) = tokio::sync::mpsc::channel(16);
    let one = agents.is_one();
    for (index, agent) in AGENTS.into_iter().enumerate().take(if one { 1 } else { 2 }) {
        let (tx, agents, request) = (tx.clone(), agents.clone(), request.clone());
        tokio::spawn(async move {
            let mut index = index;
            loop {
                let end = follow(&agents, agent, &request, |reply| {
                    if one {
                        index = place(&reply);
                    }
                    drop(tx.try_send((index, Ok(reply))));
                })
                .await;
                if tx.send((index, Err(end))).await.is_err() {
                    return;
                }
                tokio::time::sleep(RETRY).await;
            }
        });
    }
    let silent = || Err(Failure::new(FailureKind::Unavailable, "silent", "has not answered yet"));
    let mut answers: Answers = if one { [Err(not_asked()), Err(not_asked())] } else { [silent(), silent()] };
    while let Some((index, answer)) = rx.recv().await {
        if answers[index] != answer {
            answers[index] = answer;
            print(&answers, args)?;
        }
    }
    Ok(())
}

/// Hands every answer of an agent on; gives the reason when there are no more. An answer that nobody takes is
/// dropped: the next one replaces it.
async fn follow(
    agents: &Agents,
    (socket, name): (&str, &str),
    request: &StatusRequest,
    mut take: impl FnMut(StatusReply),
) -> Failure {
    let mut stream = match connect(agents, socket, name).await {
        Ok(mut agent) => match agent.watch(request.clone()).await {
            Ok(stream) => stream,
            Err(failure) => return failure,
        },
        Err(failure) => return failure,
    };
    loop {
        match stream.next().await {
            Some(Ok(reply)) => take(reply),
            Some(Err(failure)) => return failure,
            None => return Failure::new(FailureKind::Unavailable, "ended", "the agent has ended"),
        }
    }
}

#[derive(Serialize)]
struct Json<'a> {
    agents: JsonAgents,
    guests: Vec<&'a GuestStatus>,
}

#[derive(Serialize)]
struct JsonAgents {
    primary: String,
    backup: String,
}

fn agent_word(answer: &Result<StatusReply, Failure>) -> String {
    match answer {
        Ok(_) => "running".to_owned(),
        // It runs, and says that it does not know the domain.
        Err(f) if f.kind == FailureKind::NotFound => "running".to_owned(),
        Err(f) => f.reason.clone(),
    }
}

fn print(answers: &Answers, args: &StatusArgs) -> Result<(), Failure> {
    let guests: Vec<_> = answers.iter().flatten().flat_map(|reply| &reply.guests).collect();
    if args.json {
        let agents = JsonAgents { primary: agent_word(&answers[0]), backup: agent_word(&answers[1]) };
        println!("{}", json(&Json { agents, guests })?);
        return Ok(());
    }
    if answers.iter().all(Result::is_err) && !args.watch {
        return Ok(());
    }
    for (answer, (_, name)) in answers.iter().zip(AGENTS) {
        if let Err(f) = answer
            && f.kind != FailureKind::NotFound
            && f.code != NOT_ASKED
        {
            eprintln!("note: {name}: {}", f.reason);
        }
    }
    print!("{}", table(&guests));
    Ok(())
}

/// The guests as a table, in virsh's manner.
fn table(guests: &[&GuestStatus]) -> String {
    let mut rows = vec![
        ["domain", "role", "state", "peer", "epoch", "age", "pause p50/p99", "pages p50/p99", "detail"]
            .map(str::to_owned),
    ];
    let or_dash = |v: Option<String>| v.unwrap_or_else(|| "-".to_owned());
    for g in guests {
        rows.push([
            g.domain.clone(),
            format!("{:?}", g.role).to_lowercase(),
            g.state.label().to_owned(),
            or_dash(Some(g.peer.clone()).filter(|p| !p.is_empty())),
            or_dash(g.committed_epoch.map(|e| e.to_string())),
            or_dash(g.committed_age_ms.map(|ms| format!("{ms} ms"))),
            or_dash(g.pause_p50_ms.zip(g.pause_p99_ms).map(|(a, b)| format!("{a:.2}/{b:.2} ms"))),
            or_dash(g.dirty_pages_p50.zip(g.dirty_pages_p99).map(|(a, b)| format!("{a}/{b}"))),
            if g.detail.is_empty() { g.standby.clone() } else { g.detail.clone() },
        ]);
    }
    let widths: [usize; 9] =
        std::array::from_fn(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let line: Vec<_> = row.iter().zip(widths).map(|(cell, w)| format!("{cell:w$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::ids::{EpochId, GuestId};
    use understudy_proto::rpc::admin::{AgentRole, GuestState};

    fn guest() -> GuestStatus {
        let id = GuestId("6f1c0f5e-8c1e-4d4b-9a55-0c1f1e3a2b10".parse().unwrap());
        let mut g = GuestStatus::new("web", id, AgentRole::Primary, GuestState::Protected);
        g.peer = "beta".into();
        g.committed_epoch = Some(EpochId(42));
        g.committed_age_ms = Some(7);
        (g.pause_p50_ms, g.pause_p99_ms) = (Some(1.234), Some(5.0));
        g
    }

    #[test]
    fn the_table_lines_up_and_shows_what_is_unknown() {
        assert_eq!(
            table(&[&guest()]),
            "domain  role     state      peer  epoch  age   pause p50/p99  pages p50/p99  detail\n\
             web     primary  protected  beta  42     7 ms  1.23/5.00 ms   -\n"
        );
    }

    #[test]
    fn json_names_agents_and_guests() {
        let g = guest();
        let agents = JsonAgents { primary: "running".into(), backup: "cannot connect".into() };
        let value: serde_json::Value =
            serde_json::from_str(&json(&Json { agents, guests: vec![&g] }).unwrap()).unwrap();
        assert_eq!(value["agents"]["backup"], "cannot connect");
        assert_eq!(value["guests"][0]["committed_epoch"], 42);
        assert_eq!(value["guests"][0]["state"], "protected");
        assert_eq!(value["guests"][0]["role"], "primary");
    }
}
