//! What cargo itself checks.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Report;
use crate::{process, workspace};

const LIMIT: Duration = Duration::from_secs(3600);
const GUEST: &str = "tests/guest/Cargo.toml";
/// The version whose options and configuration are ours.
const CARGO_DENY: &str = "0.20.2";
/// How much of what a failing command said is shown.
const SHOWN_LINES: usize = 120;

pub(super) fn unit(report: &mut Report) -> Result<()> {
    step(report, "format", cargo(&["fmt", "--all", "--check"]))?;
    step(report, "format of the guest program", cargo(&["fmt", "--manifest-path", GUEST, "--check"]))?;
    let lint =
        ["clippy", "--locked", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"];
    step(report, "lints", cargo(&lint))?;
    let alone =
        ["clippy", "--locked", "-p", "understudy-tests", "--no-default-features", "--", "-D", "warnings"];
    step(report, "lints of xtask alone", cargo(&alone))?;
    step(
        report,
        "lints of the guest program",
        guest(&["clippy"], &["--all-targets", "--", "-D", "warnings"]),
    )?;
    tests(
        report,
        "unit tests",
        &mut cargo(&["test", "--locked", "--workspace", "--all-features", "--no-fail-fast"]),
    )?;
    tests(report, "tests of the guest program", &mut guest(&["test"], &[]))?;
    let mut doc = cargo(&["doc", "--locked", "--workspace", "--no-deps", "--all-features"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    step(report, "documentation", doc)
}

pub(super) fn deny(report: &mut Report) -> Result<()> {
    let tools = workspace::target().join("tools");
    let deny = process::find_program("cargo-deny").unwrap_or_else(|| tools.join("bin/cargo-deny"));
    if !deny.is_file() {
        println!("  cargo-deny is not there: building it in {} (a few minutes, once)", tools.display());
        let install = ["install", "--quiet", "--locked", "--version", CARGO_DENY, "cargo-deny", "--root"];
        let mut install = cargo(&install);
        install.arg(&tools);
        // In a target folder of its own, or it would take that of the workspace.
        install.env("CARGO_TARGET_DIR", tools.join("build"));
        let built = process::output(&mut install, LIMIT)?;
        if !built.status.success() {
            let why = String::from_utf8_lossy(&built.stderr);
            report.skip("cargo deny", &format!("it cannot be built: {}", why.trim_end()));
            return Ok(());
        }
    }
    // Not advisories: their database would have to be fetched, and a new one is no fault of a change.
    let mut check = Command::new(deny);
    check.current_dir(workspace::root()).args(["--all-features", "--config", ".deny.toml", "check"]);
    check.args(["bans", "licenses", "sources"]);
    step(report, "cargo deny", check)
}

pub(super) fn cargo(arguments: &[&str]) -> Command {
    let mut command = workspace::cargo();
    command.args(arguments);
    command
}

fn guest(first: &[&str], then: &[&str]) -> Command {
    let mut command = cargo(first);
    command
        .args(["--locked", "--manifest-path", GUEST, "--target-dir"])
        .arg(workspace::target().join("guest"));
    command.args(then);
    command
}

/// A command that counts as one test.
fn step(report: &mut Report, what: &str, mut command: Command) -> Result<()> {
    let started = Instant::now();
    let output = process::output(&mut command, LIMIT)?;
    if output.status.success() {
        println!("  ok {what} ({:.1} s)", started.elapsed().as_secs_f64());
        report.pass(1);
    } else {
        report.fail(what, &said(&output));
    }
    Ok(())
}

/// A `cargo test` whose tests are counted.
pub(super) fn tests(report: &mut Report, what: &str, command: &mut Command) -> Result<()> {
    let started = Instant::now();
    let output = process::output(command, LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let counts = Counts::parse(&text);
    report.pass(counts.passed);
    println!(
        "  {what}: {} passed, {} failed ({:.1} s)",
        counts.passed,
        counts.failed.len(),
        started.elapsed().as_secs_f64()
    );
    for name in &counts.ignored {
        report.skip(name, "ignored in the source");
    }
    for name in &counts.failed {
        report.fail(name, own_words(&text, name));
    }
    if !output.status.success() {
        if counts.failed.is_empty() {
            report.fail(what, &said(&output));
        } else {
            println!("{}", said(&output));
        }
    }
    Ok(())
}

fn said(output: &std::process::Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy);
    let interesting = |line: &&str| !line.ends_with("... ok") && !line.trim_start().starts_with("Compiling");
    let lines: Vec<&str> = both.iter().flat_map(|text| text.lines()).filter(interesting).collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}

/// What libtest shows of a test that failed.
fn own_words<'a>(text: &'a str, name: &str) -> &'a str {
    let Some((_, block)) = text.split_once(&format!("---- {name} stdout ----\n")) else { return "" };
    let end = ["\n---- ", "\nfailures:\n"].iter().filter_map(|end| block.find(end)).min();
    block[..end.unwrap_or(block.len())].trim_end()
}

/// What libtest printed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: Vec<String>,
    ignored: Vec<String>,
}

impl Counts {
    fn parse(text: &str) -> Self {
        let mut counts = Self::default();
        for line in text.lines() {
            let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
            else {
                continue;
            };
            match outcome.split_whitespace().next() {
                Some("ok") => counts.passed += 1,
                Some("FAILED") => counts.failed.push(name.to_owned()),
                Some("ignored,") | Some("ignored") => counts.ignored.push(name.to_owned()),
                _ => {}
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted_by_outcome() {
        let text = "running 4 tests\ntest a::b ... ok\ntest c - should panic ... ok\ntest d ... FAILED\n\
            test e ... ignored, slow\ntest result: FAILED. 2 passed; 1 failed; 1 ignored;\n";
        let counts = Counts::parse(text);
        assert_eq!((counts.passed, counts.failed, counts.ignored), (2, vec!["d".into()], vec!["e".into()]));
    }

    #[test]
    fn a_failed_test_speaks_for_itself() {
        let text = "failures:\n\n---- a::b stdout ----\nleft: 1\nright: 2\n\n---- d stdout ----\nother\n\n\nfailures:\n    a::b\n";
        assert_eq!(
            (own_words(text, "a::b"), own_words(text, "d"), own_words(text, "e")),
            ("left: 1\nright: 2", "other", "")
        );
    }
}
