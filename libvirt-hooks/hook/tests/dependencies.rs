//! A hook that calls libvirt hangs the daemon, so nothing it is built from may be able to.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::collections::BTreeSet;
use std::process::Command;

/// The packages that `package` is built from, itself included; dev-dependencies do not count.
fn built_from(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |id: &str| {
        let packages = metadata["packages"].as_array().unwrap();
        let package = packages.iter().find(|package| package["id"] == id).unwrap();
        package["name"].as_str().unwrap().to_owned()
    };
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let mut found = BTreeSet::new();
    let first = nodes.iter().map(|node| node["id"].as_str().unwrap()).find(|id| name(id) == package);
    let mut open = vec![first.unwrap()];
    while let Some(id) = open.pop() {
        if !found.insert(name(id)) {
            continue;
        }
        let node = nodes.iter().find(|node| node["id"] == id).unwrap();
        for dependency in node["deps"].as_array().unwrap() {
            if dependency["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"] != "dev") {
                open.push(dependency["pkg"].as_str().unwrap());
            }
        }
    }
    found
}

#[test]
fn the_hook_cannot_call_libvirt() {
    let hook = built_from("understudy-hook");
    assert!(hook.contains("quick-xml"), "{hook:?}");
    let libvirt = |found: &BTreeSet<String>| found.iter().any(|name| name.contains("virt"));
    assert!(!libvirt(&hook), "{hook:?}");
    // The search finds what it looks for where it is.
    assert!(libvirt(&built_from("understudy-libvirt")));
}
