//! Rules of the code base that no compiler knows.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Report;
use crate::{process, workspace};

/// What a crate may depend on within the workspace. Everything points to `proto`, nothing back.
const ALLOWED: &[(&str, &[&str])] = &[
    ("xbzrle", &[]),
    ("understudy-proto", &["xbzrle"]),
    // libvirt's hook: libvirt itself is out of its reach.
    ("understudy-hook", &[]),
    ("understudy-libvirt", &["understudy-proto", "understudy-hook"]),
    ("understudy-primary", &["understudy-proto", "understudy-libvirt", "understudy-hook"]),
    ("understudy-backup", &["understudy-proto", "understudy-libvirt"]),
    // The supervisor needs nothing of the agents: it must work when they do not.
    ("understudy-watchdog", &["understudy-proto", "understudy-libvirt"]),
    // Knows of the admin service what reflection tells, and nothing else.
    ("understudy-generic", &[]),
    // Runs in guests.
    ("understudy-responder", &[]),
    ("understudy", &["understudy-proto", "understudy-libvirt", "understudy-hook", "understudy-responder"]),
    (
        "understudy-tests",
        &["understudy-proto", "understudy-libvirt", "understudy-primary", "understudy-backup"],
    ),
];

const MAX_LINES: usize = 800;

pub(super) fn check(report: &mut Report) -> Result<()> {
    let metadata = process::checked(
        workspace::cargo().args(["metadata", "--locked", "--format-version", "1", "--no-deps"]),
        Duration::from_secs(120),
    )?;
    let edges = edges(&metadata)?;
    let sources = sources(workspace::root())?;
    report.test("dependencies within the workspace", || none(wrong_edges(&edges)));
    report.test("unsafe code only in sys folders", || none(misplaced_unsafe(&sources)));
    report.test("no file is too long", || none(too_long(&sources)));
    Ok(())
}

fn none(violations: Vec<String>) -> Result<()> {
    if violations.is_empty() { Ok(()) } else { bail!("{}", violations.join("\n")) }
}

/// Each member with the members it depends on; dev-dependencies do not count.
fn edges(metadata: &str) -> Result<BTreeMap<String, Vec<String>>> {
    let metadata: serde_json::Value = serde_json::from_str(metadata)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap_or_default().to_owned();
    let members: Vec<String> = packages.iter().map(name).collect();
    let needs = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().into_iter().flatten();
        all.filter(|needed| needed["kind"] != "dev")
            .map(name)
            .filter(|needed| members.contains(needed))
            .collect()
    };
    Ok(packages.iter().map(|package| (name(package), needs(package))).collect())
}

fn wrong_edges(edges: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (from, needed) in edges {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| name == from) else {
            wrong.push(format!("{from} is a new crate: say in {} what it may depend on", file!()));
            continue;
        };
        let forbidden = needed.iter().filter(|to| !allowed.contains(&to.as_str()));
        wrong.extend(forbidden.map(|to| format!("{from} must not depend on {to}")));
    }
    wrong
}

/// A source file, its path as seen from the root.
struct Source {
    path: PathBuf,
    text: String,
}

fn sources(root: &Path) -> Result<Vec<Source>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)?.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text =
                    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
                found.push(Source { path: path.strip_prefix(root)?.to_owned(), text });
            }
        }
    }
    Ok(found)
}

/// Where unsafe code is: in `sys` folders (or `sys.rs`) right below `src`.
fn may_be_unsafe(path: &Path) -> bool {
    let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.windows(2).any(|pair| pair[0] == "src" && (pair[1] == "sys" || pair[1] == "sys.rs"))
}

fn misplaced_unsafe(sources: &[Source]) -> Vec<String> {
    let mut misplaced = Vec::new();
    for source in sources.iter().filter(|source| !may_be_unsafe(&source.path)) {
        for (number, line) in source.text.lines().enumerate() {
            // Comments and texts, such as this one, only speak of it.
            let code = line.split("//").next().unwrap_or_default();
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '"');
            let lifts = code.contains("allow(unsafe_code") || code.contains("expect(unsafe_code");
            if !code.contains('"') && (lifts || words.into_iter().any(|word| word == "unsafe")) {
                misplaced.push(format!(
                    "{}:{}: unsafe code outside */src/sys",
                    source.path.display(),
                    number + 1
                ));
            }
        }
    }
    misplaced
}

fn too_long(sources: &[Source]) -> Vec<String> {
    let lines = |source: &Source| source.text.lines().count();
    let generated = |source: &Source| source.path.components().any(|part| part.as_os_str() == "gen");
    let long = sources.iter().filter(|source| lines(source) > MAX_LINES && !generated(source));
    long.map(|source| format!("{}: {} lines, the limit is {MAX_LINES}", source.path.display(), lines(source)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.into(), text: text.into() }
    }

    #[test]
    fn an_edge_in_the_wrong_direction_is_found() {
        let metadata = r#"{"packages":[
            {"name":"understudy-proto","dependencies":[{"name":"understudy-primary","kind":null}]},
            {"name":"understudy-primary","dependencies":[{"name":"understudy-proto","kind":null},{"name":"understudy-backup","kind":"dev"}]},
            {"name":"understudy-backup","dependencies":[{"name":"serde","kind":null}]}]}"#;
        assert_eq!(
            wrong_edges(&edges(metadata).unwrap()),
            ["understudy-proto must not depend on understudy-primary"]
        );
    }

    #[test]
    fn a_crate_nobody_thought_of_is_found() {
        let metadata = r#"{"packages":[{"name":"drawer","dependencies":[]}]}"#;
        assert_eq!(wrong_edges(&edges(metadata).unwrap()).len(), 1);
    }

    #[test]
    fn unsafe_is_found_where_it_does_not_belong() {
        let code = "fn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(misplaced_unsafe(&[source("primary/src/engine.rs", code)]).len(), 1);
        assert_eq!(misplaced_unsafe(&[source("primary/src/sys/kvm.rs", code)]).len(), 0);
        assert_eq!(
            misplaced_unsafe(&[source("a/src/b.rs", "// unsafe\n#![forbid(unsafe_code)]\n")]).len(),
            0
        );
        assert_eq!(misplaced_unsafe(&[source("a/src/b.rs", "#![allow(unsafe_code)]\n")]).len(), 1);
    }

    #[test]
    fn a_long_file_is_found() {
        assert_eq!(
            too_long(&[source("a.rs", &"\n".repeat(801)), source("b.rs", &"\n".repeat(800))]).len(),
            1
        );
    }
}
