//! The operator's command, as an operator in a host would type it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Lab;
use super::plan::HostName;
use super::remote::{Exec, Outcome};

/// Seeding a small guest through an emulated host takes seconds.
const LIMIT: Duration = Duration::from_secs(240);

/// What `understudy status --json` says about one guest.
#[derive(Clone, Debug)]
pub(crate) struct GuestStatus(Value);

/// Which agent of a host is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Primary,
    Backup,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }

    /// The program that is this agent.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Primary => "understudy-primary",
            Self::Backup => "understudy-backup",
        }
    }
}

/// Whether a status is of a protection that has ended by itself.
fn is_over(status: &Value) -> bool {
    matches!(status["state"].as_str(), Some("ended" | "crashed"))
}

impl GuestStatus {
    fn parse(text: &str, role: Role, guest: &str) -> Result<Option<Self>> {
        let whole: Value = serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?;
        let guests = whole["guests"].as_array().into_iter().flatten();
        let called = guests.filter(|status| status["domain"] == guest && status["role"] == role.name());
        // Domains of earlier scenarios had the same name.
        let found = called.min_by_key(|status| is_over(status));
        Ok(found.cloned().map(Self))
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_default()
    }

    pub(crate) fn state(&self) -> &str {
        self.text("state")
    }

    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        self.0[key].as_u64()
    }

    pub(crate) fn real(&self, key: &str) -> Option<f64> {
        self.0[key].as_f64()
    }

    pub(crate) fn committed_epoch(&self) -> Option<u64> {
        self.number("committed_epoch")
    }
}

/// What `understudy failover --json` reports.
#[derive(Clone, Debug)]
pub(crate) struct FailoverReport(Value);

impl FailoverReport {
    /// The committed epoch the guest goes on from.
    pub(crate) fn epoch(&self) -> Option<u64> {
        self.0["epoch"].as_u64()
    }

    /// The named parts of the failover that took time, in milliseconds.
    pub(crate) fn parts(&self) -> Vec<(&'static str, f64)> {
        let parts = ["finish_apply", "record", "prepare", "load", "resume", "announce", "total"];
        let time = |part| self.0[format!("{part}_us")].as_f64().map(|us| (part, us / 1000.0));
        parts.into_iter().filter_map(time).collect()
    }
}

impl Lab {
    /// Runs `understudy ARGUMENTS` in a host, whatever comes of it.
    pub(crate) fn understudy(&self, host: HostName, arguments: &[&str]) -> Result<Outcome> {
        self.exec(
            host,
            &Exec::new(std::iter::once("understudy").chain(arguments.iter().copied())).limit(LIMIT),
        )
    }

    /// The same, and it must succeed.
    pub(crate) fn must_understudy(&self, host: HostName, arguments: &[&str]) -> Result<String> {
        let outcome = self.understudy(host, arguments)?;
        if outcome.code != 0 {
            bail!(
                "`understudy {}` on {host} ended with {}: {}{}",
                arguments.join(" "),
                outcome.code,
                outcome.stderr,
                outcome.stdout
            );
        }
        Ok(outcome.stdout)
    }

    pub(crate) fn protect(&self, guest: &str, on: HostName) -> Result<()> {
        self.protect_with(guest, on, &[])
    }

    /// The same, with more options.
    pub(crate) fn protect_with(&self, guest: &str, on: HostName, options: &[&str]) -> Result<()> {
        let protect = ["protect", guest, "--to", on.other().name()];
        self.must_understudy(on, &[&protect, options].concat()).map(drop)
    }

    pub(crate) fn failover(&self, guest: &str, on: HostName) -> Result<FailoverReport> {
        let report = self.must_understudy(on, &["failover", guest, "--i-have-fenced", "--json"])?;
        let report = serde_json::from_str(&report).with_context(|| format!("not JSON: {report}"))?;
        Ok(FailoverReport(report))
    }

    /// What an agent of a host says about a guest, if it knows it.
    pub(crate) fn status(&self, host: HostName, role: Role, guest: &str) -> Result<Option<GuestStatus>> {
        GuestStatus::parse(&self.must_understudy(host, &["status", "--json"])?, role, guest)
    }

    /// The guests the agents of a host know, except those whose protection has ended by itself.
    pub(crate) fn known_guests(&self, host: HostName) -> Result<Vec<String>> {
        let text = self.must_understudy(host, &["status", "--json"])?;
        let whole: Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
        let guests = whole["guests"].as_array().into_iter().flatten();
        let left = guests.filter(|guest| guest["role"] == "backup" || !is_over(guest));
        Ok(left.filter_map(|guest| guest["domain"].as_str().map(str::to_owned)).collect())
    }

    /// Kills an agent; the host starts it again at once.
    pub(crate) fn kill_agent(&self, host: HostName, role: Role) -> Result<()> {
        let program = role.program();
        self.shell(host, &format!("kill -9 $(cat /run/lab/{program}.pid)")).map(drop)
    }

    /// Kills an agent and keeps it from being started.
    pub(crate) fn hold_agent(&self, host: HostName, role: Role) -> Result<()> {
        let program = role.program();
        self.shell(host, &format!("touch /run/lab/{program}.hold; kill -9 $(cat /run/lab/{program}.pid)"))
            .map(drop)
    }

    /// Lets an agent be started again.
    pub(crate) fn release_agent(&self, host: HostName, role: Role) -> Result<()> {
        self.shell(host, &format!("rm -f /run/lab/{}.hold", role.program()))?;
        self.wait_agent(host, role)
    }

    /// Starts an agent anew, with more arguments, one a line.
    pub(crate) fn restart_agent(&self, host: HostName, role: Role, arguments: &str) -> Result<()> {
        self.restart_daemon(host, role.program(), arguments)?;
        self.wait_agent(host, role)
    }

    /// The same for any daemon of a host; does not wait until it is up.
    pub(crate) fn restart_daemon(&self, host: HostName, program: &str, arguments: &str) -> Result<()> {
        let script = format!(
            "printf '%s' '{arguments}' > /run/lab/{program}.args; kill -9 $(cat /run/lab/{program}.pid)"
        );
        self.shell(host, &script).map(drop)
    }

    /// Waits until an agent answers.
    pub(crate) fn wait_agent(&self, host: HostName, role: Role) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            // A host that has just booted may not even have the program yet.
            let said = self.understudy(host, &["status", "--json"]);
            let word = match &said {
                Ok(said) => {
                    let whole: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
                    whole["agents"][role.name()].to_string()
                }
                Err(error) => format!("{error:#}"),
            };
            if word == "\"running\"" {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("the {} of {host} does not answer: {word}", role.program());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until a guest's status is as wished.
    pub(crate) fn wait_status(
        &self,
        (host, role): (HostName, Role),
        guest: &str,
        limit: Duration,
        wish: impl Fn(&GuestStatus) -> bool,
    ) -> Result<GuestStatus> {
        let end = Instant::now() + limit;
        let mut last = None;
        while Instant::now() < end {
            last = self.status(host, role, guest).ok().flatten().or(last);
            if let Some(status) = last.take_if(|status| wish(status)) {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!(
            "the {} of {host} did not say of {guest} what was awaited within {limit:?}; the last was {last:?}",
            role.program()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_found_by_its_name_and_by_who_speaks_of_it() {
        let text = r#"{"guests":[{"domain":"g2","role":"primary"},{"domain":"g1","role":"backup","state":"promoted"},
            {"domain":"g1","role":"primary","state":"protected","pause_p50_ms":0.5}]}"#;
        let status = GuestStatus::parse(text, Role::Primary, "g1").unwrap().unwrap();
        assert_eq!((status.state(), status.real("pause_p50_ms")), ("protected", Some(0.5)));
        assert!(GuestStatus::parse(text, Role::Primary, "g3").unwrap().is_none());
        assert!(GuestStatus::parse("no", Role::Primary, "g3").is_err());
    }
}
