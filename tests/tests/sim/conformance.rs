//! Whether what watchdogs say of themselves is something the claim protocol can do. Pure; takes the steps of a simulated
//! world as well as the logs of a real run.
//!
//! A role under a term tells what the record of that term can have been. Both hosts' words for a term must leave a record
//! over, and there must be a chain of records, each a replacement the protocol makes of the one before.

use std::collections::BTreeMap;

/// A watchdog takes its host for something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) host: String,
    /// Which life of the watchdog.
    pub(crate) life: u64,
    pub(crate) role: String,
    pub(crate) term: u64,
}

/// What a record may say, with the host that it is about: the primary, the claimant, the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Record {
    Pair(usize),
    Claim(usize),
    Solo(usize),
    Ended,
}

const RECORDS: [Record; 7] = [
    Record::Pair(0),
    Record::Pair(1),
    Record::Claim(0),
    Record::Claim(1),
    Record::Solo(0),
    Record::Solo(1),
    Record::Ended,
];

/// Whether a host can be this under the record.
fn fits(record: Record, host: usize, role: &str) -> Option<bool> {
    use Record::{Claim, Ended, Pair, Solo};
    Some(match (role, record) {
        ("unknown", _) => true,
        ("protected" | "asking", Pair(primary)) => primary == host,
        ("standby" | "claiming", Pair(primary)) => primary != host,
        // A load that failed leaves the claim as it is, and the image.
        ("standby" | "claiming" | "loading" | "loaded", Claim(by)) => by == host,
        ("held", Claim(by)) => by != host,
        ("solo" | "seeding" | "recovering", Solo(owner)) => owner == host,
        ("stale", Pair(primary)) => primary != host,
        ("stale", Solo(owner)) => owner != host,
        // Its image is gone.
        ("stale", Claim(by)) => by == host,
        ("ended", Ended) => true,
        (
            "protected" | "asking" | "standby" | "claiming" | "loading" | "loaded" | "held" | "solo"
            | "seeding" | "recovering" | "stale" | "ended",
            _,
        ) => false,
        _ => return None,
    })
}

/// Whether the protocol replaces one by the other.
fn follows(before: Record, after: Record) -> bool {
    use Record::{Claim, Ended, Pair, Solo};
    match (before, after) {
        (Pair(a), Solo(b) | Pair(b)) | (Solo(a), Pair(b) | Solo(b)) => a == b,
        (Pair(primary), Claim(by)) => primary != by,
        // Confirmed, or taken back.
        (Claim(_), Solo(_)) => true,
        (Pair(_) | Solo(_), Ended) | (Ended, Pair(_)) => true,
        _ => false,
    }
}

/// Accepts the steps of two watchdogs, each host's in its own order.
///
/// # Errors
/// The first thing that the protocol cannot have done.
pub(crate) fn accept(steps: &[Step]) -> Result<(), String> {
    let mut hosts: Vec<&str> = Vec::new();
    let mut terms: BTreeMap<u64, Vec<(usize, &str)>> = BTreeMap::new();
    let mut newest: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    for step in steps {
        let host = match hosts.iter().position(|host| *host == step.host) {
            Some(host) => host,
            None => {
                hosts.push(&step.host);
                hosts.len() - 1
            }
        };
        if host > 1 {
            return Err(format!("{} is a third host", step.host));
        }
        if fits(Record::Ended, host, &step.role).is_none() {
            return Err(format!("{} is no role", step.role));
        }
        let known = newest.entry((host, step.life)).or_default();
        if step.term < *known {
            return Err(format!("{} goes back from term {known} to {}", step.host, step.term));
        }
        *known = step.term;
        if step.term > 0 {
            terms.entry(step.term).or_default().push((host, &step.role));
        }
    }
    chain(&terms)
}

/// Whether there is a chain of records.
fn chain(terms: &BTreeMap<u64, Vec<(usize, &str)>>) -> Result<(), String> {
    let (Some(first), Some(last)) = (terms.keys().next(), terms.keys().last()) else { return Ok(()) };
    let mut before: Option<Vec<Record>> = None;
    for term in *first..=*last {
        let said = terms.get(&term).map_or(&[][..], Vec::as_slice);
        let by_roles =
            |record: &Record| said.iter().all(|(host, role)| fits(*record, *host, role) == Some(true));
        let possible: Vec<Record> = RECORDS.into_iter().filter(by_roles).collect();
        if possible.is_empty() {
            return Err(format!("no record of term {term} makes the hosts {said:?}"));
        }
        let loaded = |host: usize| {
            let earlier = terms.get(&(term - 1)).map_or(&[][..], Vec::as_slice);
            earlier.iter().any(|(other, role)| *other == host && *role == "loaded")
        };
        // Invariant 14: who claimed has loaded before the claim is confirmed.
        let reached = |after: &Record| {
            before.as_ref().is_none_or(|before| {
                before.iter().any(|old| {
                    let confirms = matches!((old, after), (Record::Claim(by), Record::Solo(o)) if by == o);
                    follows(*old, *after) && (!confirms || matches!(after, Record::Solo(o) if loaded(*o)))
                })
            })
        };
        let now: Vec<Record> = possible.iter().copied().filter(reached).collect();
        if now.is_empty() {
            return Err(format!(
                "the record of term {term} ({possible:?}) cannot replace that of the term before ({before:?})"
            ));
        }
        before = Some(now);
    }
    Ok(())
}

/// The steps in the log of a watchdog; the host's name is in it.
pub(crate) fn parse(log: &str) -> Vec<Step> {
    let field = |line: &str, name: &str| {
        let rest = line.split_once(&format!(" {name}="))?.1;
        let rest = rest.trim_start_matches('"');
        Some(rest.split(['"', ' ']).next().unwrap_or_default().to_owned())
    };
    let (mut steps, mut host, mut life) = (Vec::new(), String::new(), 0);
    for line in log.lines() {
        if line.contains(": guests are kept ") {
            life += 1;
            host = field(line, "host").unwrap_or_default();
        } else if line.contains(": this host ")
            && let (Some(role), Some(Ok(term))) =
                (field(line, "role"), field(line, "term").map(|t| t.parse()))
        {
            steps.push(Step { host: host.clone(), life, role, term });
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(said: &[(&str, &str, u64)]) -> Vec<Step> {
        let step = |(host, role, term): &(&str, &str, u64)| Step {
            host: (*host).to_owned(),
            life: 1,
            role: (*role).to_owned(),
            term: *term,
        };
        said.iter().map(step).collect()
    }

    const TAKEOVER: [(&str, &str, u64); 8] = [
        ("a", "protected", 1),
        ("b", "standby", 1),
        ("b", "claiming", 1),
        ("b", "loading", 2),
        ("b", "loaded", 2),
        ("b", "solo", 3),
        ("a", "held", 2),
        ("a", "stale", 3),
    ];

    #[test]
    fn a_takeover_is_accepted() {
        assert_eq!(accept(&steps(&TAKEOVER)), Ok(()));
    }

    #[test]
    fn what_the_protocol_cannot_do_is_not() {
        let without = |role: &str| -> Vec<_> {
            TAKEOVER.iter().copied().filter(|(_, other, _)| *other != role).collect()
        };
        let error = accept(&steps(&without("loaded"))).unwrap_err();
        assert!(error.contains("cannot replace"), "{error}");
        let mut both = TAKEOVER;
        both[7] = ("a", "solo", 3);
        let error = accept(&steps(&both)).unwrap_err();
        assert!(error.contains("no record of term 3"), "{error}");
        let mut back = TAKEOVER;
        back[5] = ("b", "solo", 1);
        assert!(accept(&steps(&back)).unwrap_err().contains("goes back"));
        let jump = [("a", "protected", 1), ("b", "solo", 2), ("a", "protected", 1)];
        assert!(accept(&steps(&jump)).unwrap_err().contains("cannot replace"));
        assert!(accept(&steps(&[("a", "king", 1)])).unwrap_err().contains("no role"));
    }

    /// For the logs of a lab: `UNDERSTUDY_SIM_LOGS=folder`, which has those of both hosts' watchdogs.
    #[test]
    fn logs_that_are_given_are_accepted() {
        let Some(folder) = std::env::var_os("UNDERSTUDY_SIM_LOGS") else { return };
        let mut steps = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.to_string_lossy().ends_with("watchdog.log") {
                steps.extend(parse(&std::fs::read_to_string(path).unwrap()));
            }
        }
        assert!(!steps.is_empty(), "no watchdog says what it takes its host for");
        assert_eq!(accept(&steps), Ok(()));
    }

    #[test]
    fn steps_are_read_from_a_log() {
        let log = "2026-01-02T03:04:05.6Z  INFO understudy_watchdog::keeper: guests are kept host=\"a\" arbiter=\"w\"\n\
                   2026-01-02T03:04:06.6Z  INFO understudy_watchdog::keeper::guest: this host guest=8a29 role=\"standby\" term=4\n\
                   2026-01-02T03:04:07.6Z  WARN understudy_watchdog::keeper::guest: the other host is suspected guest=8a29\n";
        assert_eq!(parse(log), steps(&[("a", "standby", 4)]));
    }
}
