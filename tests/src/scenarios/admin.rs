//! The admin service, from outside: through a client that knows only what reflection tells, through TLS, and by whom
//! not. All of it with certificates, as between real hosts.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{SHAPES, Scenario, UP, start_shaped};
use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::pki::{self, Wrong};
use crate::lab::plan::HostName::{self, Alpha, Beta};
use crate::lab::remote::{Exec, Outcome};
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("admin: who is not let in by TLS gets no page and no command", strangers),
    ("admin: protect, set, get and failover by a generic gRPC client alone", generic),
];

const LIMIT: Duration = Duration::from_secs(120);

/// Calls a method of an agent by what reflection tells of it.
fn call(lab: &Lab, host: HostName, role: Role, method: &str, request: &Value) -> Result<Outcome> {
    let socket = format!("/run/understudy/{}.sock", role.name());
    let method = format!("understudy.admin.v1.Admin/{method}");
    let exec = Exec::new(["understudy-generic".to_owned(), socket, method, request.to_string()]);
    lab.exec(host, &exec.limit(LIMIT))
}

/// The same, and it must succeed; gives its last answer.
fn must(lab: &Lab, host: HostName, role: Role, method: &str, request: &Value) -> Result<Value> {
    let outcome = call(lab, host, role, method, request)?;
    ensure!(outcome.code == 0, "{method} {request}: {outcome:?}");
    let last = outcome.stdout.lines().last().context("no answer")?;
    serde_json::from_str(last).with_context(|| format!("not JSON: {last}"))
}

fn generic(lab: &Lab) -> Result<()> {
    let boot = start_shaped(lab, Alpha, SHAPES[0])?.count()?.boot;
    let listed = lab.shell(Alpha, "understudy-generic /run/understudy/primary.sock")?;
    for method in ["understudy.admin.v1.Admin/Protect", "grpc.health.v1.Health/Check"] {
        ensure!(listed.contains(method), "reflection does not show {method}: {listed}");
    }
    let guest = json!({"domain": "g1"});
    let begun = std::time::Instant::now();
    let protected = must(lab, Alpha, Role::Primary, "Protect", &json!({"domain": "g1", "to": "beta"}))?;
    ensure!(protected["done"] == true, "{protected}");
    println!("    protected with TLS within {:.1} s", begun.elapsed().as_secs_f64());
    must(lab, Alpha, Role::Primary, "Set", &json!({"domain": "g1", "epochMs": 50}))?;
    lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| status.number("epoch_ms") == Some(50))?;
    let shown = must(lab, Alpha, Role::Primary, "Get", &guest)?;
    ensure!(shown["state"] == "protected" && shown["epochMs"] == 50, "{shown}");
    let listed = must(lab, Beta, Role::Backup, "List", &json!({}))?;
    ensure!(listed["guests"][0]["state"] == "standby", "{listed}");
    let refused = call(lab, Beta, Role::Backup, "Failover", &guest)?;
    ensure!(refused.code != 0 && refused.stderr.contains("FailedPrecondition PRIMARY_ALIVE"), "{refused:?}");
    over_tcp(lab)?;
    lab.power_off(Alpha)?;
    let fenced = json!({"domain": "g1", "iHaveFenced": true});
    let report = must(lab, Beta, Role::Backup, "Failover", &fenced)?;
    ensure!(report["done"] == true && report["failover"]["generation"] == "2", "{report}");
    let now = Guest::wait(lab.dir(), "g1", UP)?.count()?;
    ensure!(now.boot == boot, "another boot: {} instead of {boot}", now.boot);
    super::up(lab, Alpha)
}

/// An operator on another host, who shows a certificate.
fn over_tcp(lab: &Lab) -> Result<()> {
    let operator = pki::folder(&lab.dir().shared(), pki::OPERATOR).display().to_string();
    let ask = |more: &[&str]| {
        let https = ["--connect", "https://beta"];
        lab.understudy(Alpha, &[&https, more, &["status", "g1", "--json"]].concat())
    };
    let told = ask(&["--pki-dir", &operator])?;
    ensure!(told.code == 0 && told.stdout.contains("\"standby\""), "{told:?}");
    // Alpha may send epochs; that makes it no operator.
    let refused = ask(&[])?;
    ensure!(refused.code == 1 && refused.stderr.contains("AccessDenied"), "{refused:?}");
    Ok(())
}

/// `protect` fails with these words, and the backup has heard of no guest.
fn kept_out(lab: &Lab, options: &[&str], words: &[&str]) -> Result<()> {
    let outcome = lab.understudy(Alpha, &[&["protect", "g1", "--to", "beta"], options].concat())?;
    let said = &outcome.stderr;
    ensure!(outcome.code == 1 && words.iter().any(|word| said.contains(word)), "{words:?}: {outcome:?}");
    ensure!(said.contains("what to do"), "it does not say what to do: {said}");
    let known = lab.status(Beta, Role::Backup, "g1")?;
    ensure!(known.is_none(), "the backup has heard of it: {known:?}");
    Ok(())
}

fn strangers(lab: &Lab) -> Result<()> {
    let mut guest = start_shaped(lab, Alpha, SHAPES[0])?;
    let before = guest.count()?;
    let result = kept_out_all(lab);
    // Whoever comes next finds agents as they always are.
    for host in HostName::ALL {
        let role = if host == Alpha { Role::Primary } else { Role::Backup };
        lab.restart_agent(host, role, "")?;
    }
    result?;
    let after = guest.count()?;
    ensure!(after.boot == before.boot && after.total > before.total, "the guest was disturbed");
    Ok(())
}

fn kept_out_all(lab: &Lab) -> Result<()> {
    for (wrong, words) in [
        (Wrong::Stranger, &["not of our CA"][..]),
        (Wrong::Expired, &["CertificateExpired", "expired"]),
        (Wrong::Gamma, &["AccessDenied"]),
    ] {
        let folder = pki::folder(&lab.dir().shared(), wrong.name());
        let arguments = format!("--pki-dir\n{}\n--insecure-anywhere\nfalse", folder.display());
        lab.restart_agent(Alpha, Role::Primary, &arguments)?;
        kept_out(lab, &[], words).with_context(|| format!("{wrong:?}"))?;
    }
    // As it is for operators: plain TCP to another host is not even tried.
    kept_out(lab, &["--insecure"], &["no loopback address"])?;
    // And one that does it all the same, as only a lab's agent can, finds nobody who listens.
    lab.restart_agent(Alpha, Role::Primary, "")?;
    lab.restart_agent(Beta, Role::Backup, "--insecure-anywhere\nfalse")?;
    kept_out(lab, &["--insecure"], &["leave out --insecure"])
}
