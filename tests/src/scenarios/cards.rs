//! Guests whose network card is not a plain tap in a bridge: their output is gated as any other, and they fail over.

use std::time::Duration;

use anyhow::Result;

use super::{Scenario, UP, advances, failover, output};
use crate::lab::Lab;
use crate::lab::domain::{Card, GuestSpec};
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::Alpha;

/// Only when they are asked for by name.
pub(super) const ON_REQUEST: &[Scenario] = &[
    ("cards: a card with two queues is gated, and fails over", |lab| gated(lab, Card::Queues(2))),
    ("cards: a macvtap is gated, and fails over", |lab| gated(lab, Card::Macvtap)),
];

const LIMIT: Duration = Duration::from_secs(90);

/// Frames wait while the agent is away, none is lost, and a power cut takes nothing back that a client has heard.
fn gated(lab: &Lab, card: Card) -> Result<()> {
    lab.start_guest(Alpha, &GuestSpec { vcpus: 2, card, ..GuestSpec::new("g1") })?;
    let mut guest = Guest::wait(lab.dir(), "g1", UP)?;
    let boot = guest.count()?.boot;
    lab.protect("g1", Alpha)?;
    advances(lab, LIMIT)?;
    output::agent_killed(lab, &mut guest)?;
    lab.must_understudy(Alpha, &["unprotect", "g1"])?;
    failover::cut(lab, Alpha, &boot, failover::WARM)
}
