//! Whether what watchdogs say of themselves is something the claim protocol can do. Pure; takes the steps of a simulated
//! world as well as the logs of a real run.
//!
//! A role under a term tells what the record of that term can have been, and a record there is only if one of the hosts has
//! asked for it. Both hosts' words for a term must leave a record over, and there must be a chain of records, each a
//! replacement the protocol makes of the one before.

use std::collections::BTreeMap;

/// What a watchdog says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// It takes its host for this under the record of the term.
    Is(String),
    /// It asks the arbiter for a record of the term, with this owner (as `proto::ownership::Owner` is shown).
    Asks(String),
}

/// A watchdog says something of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its host.
    pub host: String,
    /// Which life of the watchdog.
    pub life: u64,
    /// The term it speaks of.
    pub term: u64,
    /// What it says.
    pub said: Said,
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

/// What both hosts have said of a term.
#[derive(Debug, Default)]
struct Words<'a> {
    roles: Vec<(usize, &'a str)>,
    asked: Vec<Record>,
}

/// Two hosts, and what they have said.
#[derive(Debug, Default)]
struct Run<'a> {
    hosts: Vec<&'a str>,
    terms: BTreeMap<u64, Words<'a>>,
}

/// Accepts the steps of two watchdogs, each host's in its own order.
///
/// # Errors
/// The first thing that the protocol cannot have done.
pub fn accept(steps: &[Step]) -> Result<(), String> {
    let mut run = Run::default();
    let mut newest: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    for step in steps {
        let host = run.host(&step.host)?;
        let (term, words) = (step.term, run.terms.entry(step.term).or_default());
        match &step.said {
            Said::Is(role) => {
                if fits(Record::Ended, host, role).is_none() {
                    return Err(format!("{role} is no role"));
                }
                let known = newest.entry((host, step.life)).or_default();
                if term < *known {
                    return Err(format!("{} goes back from term {known} to {term}", step.host));
                }
                *known = term;
                words.roles.push((host, role));
            }
            Said::Asks(owner) => {
                let (record, of) = asked_for(owner, host)?;
                if of != step.host {
                    return Err(format!("{} asks for term {term} in the name of {of}: {owner}", step.host));
                }
                words.asked.push(record);
            }
        }
    }
    // The term of a host that knows no record.
    run.terms.remove(&0);
    run.chain()
}

/// The record, and the host that it gives a right: only that one asks for it.
fn asked_for(owner: &str, host: usize) -> Result<(Record, &str), String> {
    let kind = owner.split([' ', '{']).next().unwrap_or_default();
    let of = owner.split('"').nth(1).ok_or_else(|| format!("{owner} names no host"))?;
    let record = match kind {
        "Pair" => Record::Pair(host),
        "Claim" => Record::Claim(host),
        "Solo" => Record::Solo(host),
        "Ended" => Record::Ended,
        _ => return Err(format!("{owner} is no record")),
    };
    Ok((record, of))
}

impl<'a> Run<'a> {
    fn host(&mut self, name: &'a str) -> Result<usize, String> {
        if let Some(known) = self.hosts.iter().position(|host| *host == name) {
            return Ok(known);
        }
        if self.hosts.len() == 2 {
            return Err(format!("{name} is a third host"));
        }
        self.hosts.push(name);
        Ok(self.hosts.len() - 1)
    }

    /// Whether there is a chain of records.
    fn chain(&self) -> Result<(), String> {
        let mut known = self.terms.iter().filter(|(_, words)| !words.roles.is_empty()).map(|(term, _)| *term);
        let Some(first) = known.next() else { return Ok(()) };
        let last = known.next_back().unwrap_or(first);
        let (nothing, mut before) = (Words::default(), None::<Vec<Record>>);
        for term in first..=last {
            let words = self.terms.get(&term).unwrap_or(&nothing);
            // The first one may be older than what was said.
            let is_asked = |record: &Record| term == first || words.asked.contains(record);
            let by_roles = |record: &Record| {
                words.roles.iter().all(|(host, role)| fits(*record, *host, role) == Some(true))
            };
            let fitting: Vec<Record> = RECORDS.into_iter().filter(by_roles).collect();
            if fitting.is_empty() {
                return Err(format!("no record of term {term} makes {}", self.shown(&words.roles)));
            }
            let possible: Vec<Record> = fitting.into_iter().filter(is_asked).collect();
            if possible.is_empty() {
                let roles = self.shown(&words.roles);
                return Err(format!(
                    "nobody has asked for a record of term {term} that makes {roles} (asked: {})",
                    self.names(&words.asked)
                ));
            }
            let now: Vec<Record> = match &before {
                None => possible.clone(),
                Some(before) => {
                    let reached = |new: &Record| before.iter().any(|old| self.reached(*old, *new, term));
                    possible.iter().copied().filter(reached).collect()
                }
            };
            if now.is_empty() {
                return Err(format!(
                    "the record of term {term} ({}) cannot replace that of the term before ({})",
                    self.names(&possible),
                    self.names(&before.unwrap_or_default())
                ));
            }
            before = Some(now);
        }
        Ok(())
    }

    /// Whether `new` of this term can have replaced `old`. Invariant 14: who claimed has loaded before the claim is
    /// confirmed.
    fn reached(&self, old: Record, new: Record, term: u64) -> bool {
        let loaded = |host: usize| {
            let earlier = self.terms.get(&(term - 1)).map_or(&[][..], |words| words.roles.as_slice());
            earlier.contains(&(host, "loaded"))
        };
        let unloaded =
            matches!((old, new), (Record::Claim(by), Record::Solo(owner)) if by == owner && !loaded(by));
        follows(old, new) && !unloaded
    }

    fn name(&self, host: usize) -> &str {
        self.hosts.get(host).copied().unwrap_or("the other host")
    }

    fn shown(&self, roles: &[(usize, &str)]) -> String {
        let all: Vec<String> =
            roles.iter().map(|(host, role)| format!("{} {role}", self.name(*host))).collect();
        if all.is_empty() { "anything".to_owned() } else { all.join(", ") }
    }

    fn names(&self, records: &[Record]) -> String {
        let name = |record: &Record| match record {
            Record::Pair(host) => format!("pair led by {}", self.name(*host)),
            Record::Claim(host) => format!("claim by {}", self.name(*host)),
            Record::Solo(host) => format!("solo {}", self.name(*host)),
            Record::Ended => "ended".to_owned(),
        };
        let mut all: Vec<String> = records.iter().map(name).collect();
        all.dedup();
        if all.is_empty() { "nothing".to_owned() } else { all.join(" or ") }
    }
}

/// The steps of each guest.
pub type Guests = BTreeMap<String, Vec<Step>>;

/// The steps in the log of a watchdog; its host's name is in it. What stands before that is not understood.
pub fn parse(log: &str) -> Guests {
    let field = |line: &str, name: &str| {
        let rest = line.split_once(&format!(" {name}="))?.1;
        let rest = rest.trim_start_matches('"');
        Some(rest.split(['"', ' ']).next().unwrap_or_default().to_owned())
    };
    let (mut guests, mut host, mut life) = (Guests::new(), String::new(), 0);
    for line in log.lines() {
        if line.contains(": guests are kept ") {
            life += 1;
            host = field(line, "host").unwrap_or_default();
            continue;
        }
        let said = if line.contains(": this host ") {
            field(line, "role").map(Said::Is)
        } else if line.contains(": asked of the arbiter ") {
            line.split_once(" owner=").map(|(_, owner)| Said::Asks(owner.trim_end().to_owned()))
        } else {
            None
        };
        if !host.is_empty()
            && let (Some(said), Some(guest), Some(Ok(term))) =
                (said, field(line, "guest"), field(line, "term").map(|term| term.parse()))
        {
            guests.entry(guest).or_default().push(Step { host: host.clone(), life, term, said });
        }
    }
    guests
}

/// Accepts the logs of the watchdogs of two hosts; gives how many steps they tell.
///
/// # Errors
/// The first thing that the protocol cannot have done with a guest, or that no guest is known to both.
pub fn accept_logs<'a>(logs: impl IntoIterator<Item = &'a str>) -> Result<usize, String> {
    let mut guests = Guests::new();
    for log in logs {
        for (guest, steps) in parse(log) {
            guests.entry(guest).or_default().extend(steps);
        }
    }
    let both = |steps: &Vec<Step>| steps.iter().any(|step| step.host != steps[0].host);
    if !guests.values().any(both) {
        return Err("of no guest both watchdogs say what they take their hosts for".to_owned());
    }
    for (guest, steps) in &guests {
        accept(steps).map_err(|why| format!("guest {guest}: {why}"))?;
    }
    Ok(guests.values().map(Vec::len).sum())
}

#[cfg(test)]
mod tests;
