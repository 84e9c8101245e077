//! Epochs by several connections, between hosts, over TLS: what the backup goes on from is what one would have brought.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::failover::{self, WARM};
use super::{SHAPES, Scenario, advances, is_protected, start_shaped};
use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::Alpha;
use crate::lab::plan::{BACKUP_PORT, Net};
use crate::lab::understudy::{GuestStatus, Role};

pub(super) const SCENARIOS: &[Scenario] =
    &[("connections: epochs go by several of them, and the power is cut", |lab| restored(lab, power_cut))];

/// Played when they are asked for by name.
pub(super) const ON_REQUEST: &[Scenario] =
    &[("connections: one of several breaks, and nothing is copied anew", |lab| restored(lab, broken))];

/// Until there is more than one: samples of the link with one, and with two.
const LIMIT: Duration = Duration::from_secs(180);

/// Of each connection: less than an emulated host sends.
const RATE: &str = "40mbit";

/// Pages that the guest rewrites all the time: an epoch of them takes the link long enough to tell.
const PAGES: u32 = 400;

/// The agent is told to use several connections and to leave pages as they are, and neither stays for whoever comes next.
fn restored(lab: &Lab, scenario: fn(&Lab, &str) -> Result<()>) -> Result<()> {
    let mut guest = start_shaped(lab, Alpha, SHAPES[1])?;
    let boot = guest.count()?.boot;
    lab.restart_agent(Alpha, Role::Primary, "--connections=4\n--compress=off")?;
    let result = scenario(lab, &boot);
    super::up(lab, Alpha)?;
    lab.shell(Alpha, &format!("tc qdisc del dev {} root 2>/dev/null || true", Net::Repl.name()))?;
    lab.restart_agent(Alpha, Role::Primary, "")?;
    result
}

fn connections(status: &GuestStatus) -> u64 {
    status.number("connections").unwrap_or(0)
}

/// Protects the guest, has the link limit each connection, and waits until there are several.
fn widened(lab: &Lab) -> Result<GuestStatus> {
    failover::protect(lab, Alpha, WARM)?;
    lab.shell(Alpha, &format!("tc qdisc replace dev {} root fq maxrate {RATE}", Net::Repl.name()))?;
    Guest::wait(lab.dir(), "g1", LIMIT)?.must(&format!("dirty {PAGES} 20"))?;
    let began = std::time::Instant::now();
    let wide = lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| connections(status) > 1)?;
    println!("    {} connections after {:.1} s", connections(&wide), began.elapsed().as_secs_f64());
    Ok(wide)
}

fn power_cut(lab: &Lab, boot: &str) -> Result<()> {
    widened(lab)?;
    advances(lab, LIMIT)?;
    failover::cut_protected(lab, Alpha, boot)
}

/// A lane is reset while epochs go by it: the stream begins anew, with the epochs that are not committed yet.
fn broken(lab: &Lab, boot: &str) -> Result<()> {
    let wide = widened(lab)?;
    let list = format!("ss -Hntio state established dport = :{BACKUP_PORT}");
    let lane = youngest(&lab.shell(Alpha, &list)?).context("no connection to the backup")?;
    lab.shell(Alpha, &format!("ss -K state established dport = :{BACKUP_PORT} and sport = :{lane}"))?;
    let left = lab.shell(Alpha, &list)?;
    ensure!(!left.contains(&format!(":{lane} ")), "it was not cut: {left}");
    advances(lab, LIMIT)?;
    let after = lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, is_protected)?;
    let copies = |status: &GuestStatus| status.number("full_copies_total");
    ensure!(copies(&after) == copies(&wide), "a full copy was needed: {after:?}");
    let again = lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| connections(status) > 1)?;
    println!("    {} connections again", connections(&again));
    failover::cut_protected(lab, Alpha, boot)
}

/// The local port of the connection that has brought least, of those that `ss -i` lists.
fn youngest(listed: &str) -> Option<u16> {
    let lines: Vec<_> = listed.lines().collect();
    let (pairs, _) = lines.as_chunks::<2>();
    let of = |[ends, facts]: &[&str; 2]| {
        let port = ends.split_whitespace().nth(2)?.rsplit(':').next()?.parse().ok()?;
        let acked = facts.split_whitespace().find_map(|fact| fact.strip_prefix("bytes_acked:"))?;
        Some((acked.parse::<u64>().ok()?, port))
    };
    pairs.iter().filter_map(of).min().map(|(_, port)| port)
}

#[cfg(test)]
mod tests {
    use super::youngest;

    #[test]
    fn the_lane_is_the_one_that_has_brought_least() {
        let listed = "0 0 [::ffff:10.78.0.1]:40002 [::ffff:10.78.0.2]:7420 timer:(on,200ms,0)\n\
            \t cubic wscale:7,7 bytes_sent:900 bytes_acked:900 segs_out:3\n\
            0 0 10.78.0.1:40004 10.78.0.2:7420\n\
            \t cubic bytes_sent:90 bytes_acked:80\n";
        assert_eq!(youngest(listed), Some(40004));
        assert_eq!(youngest(""), None);
    }
}
