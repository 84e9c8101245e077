//! What is accepted and what is not: made up, and from logs of real runs (`tests/logs`).

use std::path::Path;

use super::*;

fn steps(said: &[(&str, Said, u64)]) -> Vec<Step> {
    let step = |(host, said, term): &(&str, Said, u64)| Step {
        host: (*host).to_owned(),
        life: 1,
        term: *term,
        said: said.clone(),
    };
    said.iter().map(step).collect()
}

fn is(role: &str) -> Said {
    Said::Is(role.to_owned())
}

fn asks(owner: &str) -> Said {
    Said::Asks(owner.to_owned())
}

fn takeover() -> Vec<(&'static str, Said, u64)> {
    vec![
        ("a", asks("Pair { primary: \"a\", backup: \"b\" }"), 1),
        ("a", is("protected"), 1),
        ("b", is("standby"), 1),
        ("b", is("claiming"), 1),
        ("b", asks("Claim { by: \"b\", from: \"a\" }"), 2),
        ("b", is("loading"), 2),
        ("b", is("loaded"), 2),
        ("b", asks("Solo { owner: \"b\" }"), 3),
        ("b", is("solo"), 3),
        ("a", is("held"), 2),
        ("a", is("stale"), 3),
    ]
}

#[test]
fn a_takeover_is_accepted() {
    assert_eq!(accept(&steps(&takeover())), Ok(()));
}

fn refusal(said: &[(&str, Said, u64)]) -> String {
    accept(&steps(said)).unwrap_err()
}

#[test]
fn what_the_protocol_cannot_do_is_not() {
    let changed = |at: usize, to: (&'static str, Said, u64)| {
        let mut said = takeover();
        said[at] = to;
        refusal(&said)
    };
    let error = changed(6, ("b", is("loading"), 2));
    assert!(error.contains("(solo b) cannot replace that of the term before (claim by b)"), "{error}");
    let error = changed(10, ("a", is("solo"), 3));
    assert!(error.contains("no record of term 3 makes b solo, a solo"), "{error}");
    assert!(changed(8, ("b", is("solo"), 1)).contains("goes back"));
    let error = changed(7, ("b", asks("Solo { owner: \"a\" }"), 3));
    assert!(error.contains("b asks for term 3 in the name of a"), "{error}");
    let error = changed(7, ("b", asks("Pair { primary: \"b\", backup: \"a\" }"), 3));
    assert!(error.contains("nobody has asked for a record of term 3"), "{error}");
    let jump = [("a", is("protected"), 1), ("b", asks("Solo { owner: \"b\" }"), 2), ("b", is("solo"), 2)];
    assert!(refusal(&jump).contains("cannot replace"));
    assert!(refusal(&[("a", is("king"), 1)]).contains("no role"));
    assert!(refusal(&[("a", asks("King { of: \"a\" }"), 1)]).contains("no record"));
    assert!(refusal(&[("a", is("held"), 1), ("b", is("held"), 1)]).contains("no record of term 1"));
    let third = [("a", is("stale"), 1), ("b", is("stale"), 1), ("c", is("stale"), 1)];
    assert!(refusal(&third).contains("third host"));
}

#[test]
fn steps_are_read_from_a_log() {
    let log = "2026-01-02T03:04:04.6Z  INFO understudy_watchdog::keeper::guest: this host guest=8a29 role=\"stale\" term=9\n\
               2026-01-02T03:04:05.6Z  INFO understudy_watchdog::keeper: guests are kept host=\"a\" arbiter=\"w\"\n\
               2026-01-02T03:04:06.6Z  INFO understudy_watchdog::keeper::guest: this host guest=8a29 role=\"standby\" term=4\n\
               2026-01-02T03:04:06.7Z  INFO understudy_watchdog::keeper::guest: this host guest=51c0 role=\"solo\" term=7\n\
               2026-01-02T03:04:07.6Z  WARN understudy_watchdog::keeper::guest: the other host is suspected guest=8a29\n\
               2026-01-02T03:04:07.7Z  INFO understudy_watchdog::keeper::guest: asked of the arbiter guest=8a29 term=5 owner=Solo { owner: \"a\" }\n";
    let one = steps(&[("a", is("standby"), 4), ("a", asks("Solo { owner: \"a\" }"), 5)]);
    let other = steps(&[("a", is("solo"), 7)]);
    assert_eq!(parse(log), [("8a29".to_owned(), one), ("51c0".to_owned(), other)].into());
    assert!(accept_logs([log]).unwrap_err().contains("of no guest both"));
}

/// Names and texts.
fn logs(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "log") {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            found.push((name, std::fs::read_to_string(path).unwrap()));
        }
    }
    found
}

fn shipped() -> Vec<(String, String)> {
    let found = logs(&Path::new(env!("CARGO_MANIFEST_DIR")).join("logs"));
    assert!(found.len() >= 6, "{}", found.len());
    found
}

#[test]
fn logs_of_real_runs_are_accepted() {
    for (name, log) in shipped() {
        assert_eq!(accept_logs([log.as_str()]).map(|steps| steps > 8), Ok(true), "{name}");
    }
}

/// For logs that are not shipped: `UNDERSTUDY_SIM_LOGS=folder`, which has those of both hosts' watchdogs.
#[test]
fn logs_that_are_given_are_accepted() {
    let Some(folder) = std::env::var_os("UNDERSTUDY_SIM_LOGS") else { return };
    let mut given = logs(folder.as_ref());
    given.retain(|(name, _)| name.ends_with("watchdog"));
    println!("{} steps", accept_logs(given.iter().map(|(_, log)| log.as_str())).unwrap());
}

/// Where a host has a right of its own, and under which term.
fn owners(steps: &[Step]) -> Vec<(&Step, &str)> {
    let owner = |step: &&Step| matches!(&step.said, Said::Is(role) if role == "protected" || role == "solo");
    let other = |step: &Step| if step.host == "alpha" { "beta" } else { "alpha" };
    steps.iter().filter(owner).map(|step| (step, other(step))).collect()
}

/// Each shipped log is changed in every place where that can be done.
fn falsified(what: &str, why: &str, falsify: impl Fn(&[Step]) -> Vec<Vec<Step>>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (name, log) in shipped() {
        for steps in parse(&log).values() {
            for false_steps in falsify(steps) {
                let refused = accept(&false_steps);
                assert!(
                    refused.as_ref().is_err_and(|said| said.contains(why)),
                    "{name}, {what}: {refused:?}"
                );
                *counts.entry(name.clone()).or_default() += 1;
            }
        }
    }
    counts
}

/// Without what `gone` says.
fn without(steps: &[Step], gone: impl Fn(&Step) -> bool) -> Vec<Step> {
    steps.iter().filter(|step| !gone(step)).cloned().collect()
}

#[test]
fn a_term_that_two_have_used_is_refused() {
    let counts = falsified("two owners", "no record of term", |steps| {
        let second = |(step, other): (&Step, &str)| {
            let mut steps = steps.to_vec();
            steps.push(Step { host: other.to_owned(), life: u64::MAX, term: step.term, said: is("solo") });
            steps
        };
        owners(steps).into_iter().map(second).collect()
    });
    assert_eq!(counts.len(), shipped().len(), "{counts:?}");
}

#[test]
fn a_record_that_nobody_asked_for_is_refused() {
    let counts = falsified("not asked for", "nobody has asked", |steps| {
        let first = steps.iter().filter(|step| matches!(step.said, Said::Is(_))).map(|step| step.term).min();
        let later = owners(steps).into_iter().filter(|(step, _)| Some(step.term) != first);
        let unasked = |(owner, _): (&Step, &str)| {
            without(steps, |step| {
                (&step.host, step.term) == (&owner.host, owner.term) && matches!(step.said, Said::Asks(_))
            })
        };
        later.map(unasked).collect()
    });
    assert_eq!(counts.len(), shipped().len(), "{counts:?}");
}

#[test]
fn a_claim_that_was_confirmed_without_a_load_is_refused() {
    let loads = |steps: &[Step]| -> Vec<Step> {
        steps.iter().filter(|step| step.said == is("loaded")).cloned().collect()
    };
    let counts = falsified("not loaded", "cannot replace", |steps| {
        loads(steps).iter().map(|load| without(steps, |step| step == load)).collect()
    });
    let takeovers =
        [("cut-off", 1), ("in-turn", 2), ("power-cut", 1), ("round", 3), ("witness-then-primary", 1)];
    assert_eq!(counts, takeovers.map(|(name, count)| (name.to_owned(), count)).into());
    // The same if nothing of the claim is left.
    falsified("not claimed", "term", |steps| {
        loads(steps).iter().map(|load| without(steps, |step| step.term == load.term)).collect()
    });
}

#[test]
fn a_watchdog_that_goes_back_is_refused() {
    let counts = falsified("going back", "goes back", |steps| {
        let roles: Vec<usize> =
            (0..steps.len()).filter(|at| matches!(steps[*at].said, Said::Is(_))).collect();
        let grows = |pair: &&[usize]| {
            let (one, next) = (&steps[pair[0]], &steps[pair[1]]);
            (&one.host, one.life) == (&next.host, next.life) && one.term < next.term
        };
        let swapped = |pair: &[usize]| {
            let mut steps = steps.to_vec();
            steps.swap(pair[0], pair[1]);
            steps
        };
        roles.windows(2).filter(grows).map(swapped).collect()
    });
    assert_eq!(counts.len(), shipped().len(), "{counts:?}");
}
