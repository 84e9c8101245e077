//! Memory of both agents as whole processes, while they protect a guest in the lab that rewrites much.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::cli::booted;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::roots::Roots;
use crate::lab::state::LabDir;
use crate::lab::understudy::Role;
use crate::process;
use crate::scenarios;
use crate::ui::Steps;

const LIFETIME: Duration = Duration::from_secs(900);

/// How long epochs go by.
const WHILE: Duration = Duration::from_secs(60);

/// The lab's guest, and what it rewrites every 20 ms.
const GUEST_MIB: f64 = 128.0;
const PAGES: u32 = 2000;
const EPOCH_MIB: f64 = PAGES as f64 * 4096.0 / 1048576.0;

/// The default of `--page-cache-mib`.
const CACHE_MIB: f64 = 128.0;

pub(super) fn run(file: Option<&Path>) -> Result<i32> {
    process::ensure_root()?;
    let lab = booted(LabDir::unique(), Roots::default(), LIFETIME, true, false, &Steps::start())?;
    scenarios::busy(&lab, PAGES)?;
    std::thread::sleep(WHILE);
    let bounds = [
        ("primary", Alpha, Role::Primary, CACHE_MIB + 2.0 * EPOCH_MIB + 32.0),
        ("backup", Beta, Role::Backup, GUEST_MIB + 2.0 * EPOCH_MIB + 64.0),
    ];
    let mut rows = Vec::new();
    for (name, host, role, limit) in bounds {
        let status = lab.shell(host, &format!("cat /proc/$(cat /run/lab/{}.pid)/status", role.program()))?;
        let [now, peak] = ["VmRSS:", "VmHWM:"].map(|field| mib(&status, field));
        let (now, peak) = (now?, peak?);
        let met = peak <= limit;
        println!(
            "goal: {name} at its peak: at most {limit:.0} MiB, is {peak:.0} (now {now:.0}): {}",
            if met { "met" } else { "NOT MET" }
        );
        rows.push(json!({"name": format!("{name}, whole process"), "subject": "understudy", "unit": "MiB",
            "value": peak, "now": now, "bound": "at most", "limit": limit, "met": met}));
    }
    lab.down()?;
    if let Some(file) = file {
        let whole = json!({"bench": "agents", "command": "cargo xtask bench agents", "guest_mib": GUEST_MIB,
            "pages_rewritten": PAGES, "rows": rows.clone(), "goals": Value::from(rows)});
        std::fs::write(file, format!("{whole:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(0)
}

fn mib(status: &str, field: &str) -> Result<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0).with_context(|| format!("no {field} in the status of a process"))
}
