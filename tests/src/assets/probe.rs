//! Whether this machine's own KVM can run the lab hosts. Only booting something tells: there are machines
//! whose /dev/kvm answers every question and then does not run Linux.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::initramfs::{self, Recipe};
use super::kernel::Kernel;
use crate::process;

/// A kernel under a KVM that is worth using is up in a second or two.
const LIMIT: Duration = Duration::from_secs(12);

/// How the lab hosts are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Accelerator {
    Kvm,
    Tcg,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    /// The answer is good for one boot of this machine and one QEMU.
    boot_id: String,
    qemu: String,
    accelerator: Accelerator,
}

/// `UNDERSTUDY_LAB_ACCEL`, the answer of an earlier probe, or a probe.
pub(crate) fn accelerator(cache: &Path, kernel: &Kernel) -> Result<Accelerator> {
    match std::env::var("UNDERSTUDY_LAB_ACCEL").as_deref() {
        Ok("kvm") => return Ok(Accelerator::Kvm),
        Ok("tcg") => return Ok(Accelerator::Tcg),
        Ok(other) => anyhow::bail!("UNDERSTUDY_LAB_ACCEL is `{other}`: it can be `kvm` or `tcg`"),
        Err(_) => {}
    }
    let file = cache.join("kvm-probe.json");
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
    let qemu =
        process::checked(Command::new("qemu-system-x86_64").arg("--version"), Duration::from_secs(20))?;
    let qemu = qemu.lines().next().unwrap_or_default().to_owned();
    let known = fs::read(&file).ok().and_then(|text| serde_json::from_slice::<Answer>(&text).ok());
    if let Some(known) = known.filter(|known| known.boot_id == boot_id && known.qemu == qemu) {
        return Ok(known.accelerator);
    }
    let usable = Path::new("/dev/kvm").exists() && nested() && boots(cache, kernel)?;
    let accelerator = if usable { Accelerator::Kvm } else { Accelerator::Tcg };
    fs::write(&file, serde_json::to_vec(&Answer { boot_id, qemu, accelerator })?)?;
    Ok(accelerator)
}

/// The hosts need KVM of their own.
fn nested() -> bool {
    ["kvm_amd", "kvm_intel"].iter().any(|module| {
        let value = fs::read_to_string(format!("/sys/module/{module}/parameters/nested"));
        value.is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    })
}

fn boots(cache: &Path, kernel: &Kernel) -> Result<bool> {
    let init = include_str!("probe-initramfs.sh");
    let image =
        initramfs::build(cache, kernel, &Recipe { name: "probe.img", init, modules: &[], program: None })?;
    let log = cache.join(format!("probe.{}.log", std::process::id()));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", "512", "-display", "none"])
        .args(["-nodefaults", "-no-reboot", "-append", "console=ttyS0 quiet", "-serial"])
        .arg(format!("file:{}", log.display()))
        .arg("-kernel")
        .arg(kernel.image())
        .arg("-initrd")
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    process::wait(&mut qemu.spawn()?, LIMIT)?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    drop(fs::remove_file(&log));
    Ok(said.contains("LAB-PROBE-OK"))
}
