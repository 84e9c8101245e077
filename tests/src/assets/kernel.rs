//! Debian kernel packages, downloaded and unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::setup::apt;

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Everything as modules: a lab host needs KVM, 9p, qdiscs.
    Full,
    /// What a virtual machine needs, quick to boot: a lab guest.
    Cloud,
}

impl Flavour {
    fn meta_package(self) -> &'static str {
        match self {
            Self::Full => "linux-image-amd64",
            Self::Cloud => "linux-image-cloud-amd64",
        }
    }

    fn folder(self) -> &'static str {
        match self {
            Self::Full => "kernel-host",
            Self::Cloud => "kernel-guest",
        }
    }
}

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// For example `6.1.0-56-amd64`.
    pub(crate) release: String,
    /// Holds `boot` and `lib/modules`.
    pub(crate) tree: PathBuf,
}

impl Kernel {
    pub(crate) fn image(&self) -> PathBuf {
        self.tree.join(format!("boot/vmlinuz-{}", self.release))
    }

    pub(crate) fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }

    /// The kernel of this flavour: the one in the cache, or the newest one apt knows.
    pub(crate) fn ensure(cache: &Path, flavour: Flavour) -> Result<Self> {
        let tree = cache.join(flavour.folder());
        if let Some(kernel) = Self::unpacked(&tree) {
            return Ok(kernel);
        }
        let package = newest(flavour)?;
        eprintln!("Downloading {package} (unpacked into the lab's cache, not installed).");
        // Built beside and moved into place: a run that is interrupted leaves nothing half done.
        let work = cache.join(format!("{}.{}", flavour.folder(), std::process::id()));
        fs::create_dir_all(&work)?;
        process::checked(
            Command::new("apt-get").args(["download", &package]).current_dir(&work),
            Duration::from_secs(600),
        )?;
        let archive = fs::read_dir(&work)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "deb"))
            .with_context(|| format!("apt-get download {package} left no package"))?;
        let fresh = work.join("tree");
        process::checked(
            Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&fresh),
            Duration::from_secs(300),
        )?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        process::checked(
            Command::new("depmod").arg("-b").arg(&fresh).arg(&release),
            Duration::from_secs(120),
        )?;
        fs::write(fresh.join("release"), &release)?;
        if let Err(error) = fs::rename(&fresh, &tree) {
            // Another run may have been quicker.
            Self::unpacked(&tree).with_context(|| format!("cannot move the kernel into place: {error}"))?;
        }
        fs::remove_dir_all(&work).context("cannot remove the download")?;
        Self::unpacked(&tree).with_context(|| format!("{package} holds no kernel {release}"))
    }

    fn unpacked(tree: &Path) -> Option<Self> {
        let release = fs::read_to_string(tree.join("release")).ok()?;
        let kernel = Self { release, tree: tree.to_owned() };
        (kernel.image().is_file() && kernel.modules().join("modules.dep").is_file()).then_some(kernel)
    }

    /// The files of these modules and of what they need, in the order they can be inserted.
    pub(crate) fn module_files(&self, modules: &[&str]) -> Result<Vec<PathBuf>> {
        let path = self.modules().join("modules.dep");
        let table = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut files = Vec::new();
        for module in modules {
            for file in load_order(&table, module)
                .with_context(|| format!("{} has no module {module}", self.release))?
            {
                let file = self.modules().join(file);
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }
}

/// A line is `kernel/a.ko: kernel/c.ko kernel/b.ko`, where the last one has to go first. A module that is
/// built in has no line, and needs none.
fn load_order<'a>(table: &'a str, module: &str) -> Option<Vec<&'a str>> {
    let wanted = module.replace('_', "-");
    let named = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".ko");
        name.replace('_', "-") == wanted
    };
    let (file, needs) =
        table.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| named(file))?;
    let mut order: Vec<&str> = needs.split_whitespace().rev().collect();
    order.push(file);
    Some(order)
}

/// The package the meta package depends on.
fn newest(flavour: Flavour) -> Result<String> {
    let meta = flavour.meta_package();
    for attempt in 0..2 {
        let depends =
            process::checked(Command::new("apt-cache").args(["depends", meta]), Duration::from_secs(60));
        let found = depends.as_deref().ok().and_then(dependency).map(str::to_owned);
        match found {
            Some(package) => return Ok(package),
            // A fresh machine has no package lists yet.
            None if attempt == 0 => apt::update()?,
            None => break,
        }
    }
    bail!(
        "apt knows no package {meta}: the lab's kernels come from Debian 12's main archive, see /etc/apt/sources.list"
    )
}

fn dependency(depends: &str) -> Option<&str> {
    depends.lines().find_map(|line| {
        line.trim().strip_prefix("Depends: ").filter(|name| name.starts_with("linux-image-"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "kernel/virtio.ko:\nkernel/virtio_ring.ko: kernel/virtio.ko\n\
        kernel/net/virtio_net.ko: kernel/net_failover.ko kernel/failover.ko kernel/virtio_ring.ko kernel/virtio.ko\n\
        kernel/kvm-amd.ko: kernel/kvm.ko\n";

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let order = load_order(TABLE, "virtio_net").unwrap();
        assert_eq!(order.first(), Some(&"kernel/virtio.ko"));
        assert_eq!(order.last(), Some(&"kernel/net/virtio_net.ko"));
        assert_eq!(order.len(), 5);
    }

    #[test]
    fn a_dash_and_an_underscore_are_the_same() {
        assert_eq!(load_order(TABLE, "kvm_amd").unwrap(), ["kernel/kvm.ko", "kernel/kvm-amd.ko"]);
        assert!(load_order(TABLE, "net").is_none());
    }

    #[test]
    fn the_meta_package_names_the_newest_kernel() {
        assert_eq!(
            dependency("linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n"),
            Some("linux-image-6.1.0-56-amd64")
        );
        assert_eq!(dependency("linux-image-amd64\n"), None);
    }
}
