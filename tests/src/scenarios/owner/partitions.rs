//! What two hosts cannot tell from each other's death, and what a witness decides.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::WITNESS_ON;
use super::keeping::{Keeping, LIMIT, SUSPECT_AFTER_MS};
use crate::lab::Lab;
use crate::lab::plan::{HostName, Link, Net};
use crate::lab::understudy::Role;
use crate::scenarios::up;
use HostName::{Alpha, Beta};

/// Nobody takes the guest over until the witness is back.
pub(super) fn witness_then_primary(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    keeping.witness_down()?;
    keeping.wait_said(Beta, "the arbiter gives no answer")?;
    lab.power_off(Alpha)?;
    let moment = Instant::now();
    keeping.wait_said(Beta, "the other host is suspected")?;
    ensure!(lab.status(Beta, Role::Backup, "g1")?.is_some_and(|status| status.state() == "standby"));
    keeping.witness_up()?;
    keeping.taken_over(Alpha, moment, "witness, then primary")?;
    up(lab, Alpha)?;
    keeping.watch(Alpha)?;
    keeping.paired(Beta)?;
    keeping.spoke(&[Alpha, Beta])
}

/// The guest runs on there, silent behind its gate, while the other host has it; then it is ended.
pub(super) fn cut_off(lab: &Lab) -> Result<()> {
    // The witness is on a network that is cut too.
    let mut keeping = Keeping::start(lab, Net::Lan, "solo")?;
    let links = [Net::Lan, Net::Repl].map(|net| Link { net, host: Some(Alpha) });
    let moment = Instant::now();
    links.into_iter().try_for_each(|link| lab.cut(link))?;
    keeping.taken_over(Alpha, moment, "all links cut")?;
    lab.shell(Alpha, "virsh domstate g1 | grep -q -e running -e paused")
        .context("it should still be there")?;
    links.into_iter().try_for_each(|link| lab.heal(link))?;
    keeping.paired(Beta)?;
    keeping.spoke(&[Alpha, Beta])
}

/// Its host is heard and its QEMU lives: output waits, nothing changes hands.
pub(super) fn agent_stands_still(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    let agent = "$(cat /run/lab/understudy-primary.pid)";
    lab.shell(Alpha, &format!("kill -STOP {agent}"))?;
    lab.wait_status((Beta, Role::Backup), "g1", LIMIT, |status| {
        status.number("committed_age_ms").is_some_and(|age| age > u64::from(SUSPECT_AFTER_MS))
    })?;
    let said = keeping.said_since(Beta);
    ensure!(!said.contains("is suspected"), "{said}");
    lab.shell(Alpha, &format!("kill -CONT {agent}"))?;
    keeping.protected(Alpha)?;
    keeping.answers_since(Instant::now())?;
    keeping.spoke(&[Alpha])
}

/// With `hold` clients wait for the backup, with `solo` they do not.
pub(super) fn backup_lost(lab: &Lab, policy: &'static str) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, policy)?;
    lab.power_off(Beta)?;
    if policy == "solo" {
        keeping.wait_said(Alpha, "role=\"solo\"")?;
        keeping.answers_since(Instant::now())?;
    } else {
        lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| {
            status.state() == "degraded"
                && status.number("output_waiting_bytes").is_some_and(|bytes| bytes > 0)
        })?;
    }
    up(lab, Beta)?;
    keeping.watch(Beta)?;
    if policy == "solo" {
        keeping.wait_said(Alpha, "role=\"protected\"")?;
    }
    keeping.wait_said(Beta, "role=\"standby\"")?;
    keeping.protected(Alpha)?;
    keeping.answers_since(Instant::now())?;
    keeping.spoke(&[Alpha])
}

/// The memory of both is gone. The guest stays off until somebody starts it, and can be protected.
pub(super) fn both_lost(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    // The guest that is started afterwards is another one.
    keeping.clean()?;
    HostName::ALL.into_iter().try_for_each(|host| lab.power_off(host))?;
    HostName::ALL.into_iter().try_for_each(|host| lab.ensure_on(host))?;
    for host in HostName::ALL {
        up(lab, host)?;
        keeping.watch(host)?;
    }
    for host in HostName::ALL {
        lab.shell(host, "test -z \"$(virsh list --name | xargs)\"").context("a guest was started")?;
    }
    keeping.mark();
    lab.shell(Alpha, "virsh start g1")?;
    lab.protect("g1", Alpha)?;
    keeping.wait_said(Beta, "role=\"standby\"")?;
    keeping.protected(Alpha)?;
    keeping.spoke(&[Alpha])
}
