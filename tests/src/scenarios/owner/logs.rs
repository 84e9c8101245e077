//! What the watchdogs of both hosts write, and whether the claim protocol can have done it.

use std::fs;

use anyhow::{Result, anyhow};
use understudy_tests::conformance;

use super::keeping::WATCHDOG;
use crate::lab::Lab;
use crate::lab::plan::HostName;

/// How long their logs are, in the order of [`HostName::ALL`].
pub(super) type Ends = [usize; 2];

fn whole(lab: &Lab, host: HostName) -> String {
    let log = lab.dir().shared().join("log").join(format!("{host}-{WATCHDOG}.log"));
    fs::read_to_string(log).unwrap_or_default()
}

pub(super) fn ends(lab: &Lab) -> Ends {
    HostName::ALL.map(|host| whole(lab, host).len())
}

/// What the watchdog of a host has said since.
pub(super) fn said(lab: &Lab, host: HostName, since: &Ends) -> String {
    let from = HostName::ALL.iter().position(|one| *one == host).map_or(0, |at| since[at]);
    whole(lab, host).get(from..).unwrap_or_default().to_owned()
}

/// Plays something, after which what the watchdogs have said of themselves meanwhile must be something that the protocol
/// can do.
pub(super) fn accepted<T>(lab: &Lab, play: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
    let since = ends(lab);
    let done = play(lab)?;
    let logs = HostName::ALL.map(|host| said(lab, host, &since));
    let steps = conformance::accept_logs(logs.iter().map(String::as_str)).map_err(|why| {
        let logs = HostName::ALL.iter().zip(&logs).map(|(host, log)| format!("{host}:\n{log}"));
        let logs: Vec<String> = logs.collect();
        anyhow!(
            "the logs of the watchdogs tell of what the claim protocol cannot do: {why}\n{}",
            logs.join("\n")
        )
    })?;
    println!("    the logs of the watchdogs are accepted: {steps} steps");
    Ok(done)
}
