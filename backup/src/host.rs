//! What the kernel says about this host.

use std::io;

/// The name of this host.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Memory that can be had without swapping, bytes.
///
/// # Errors
/// If /proc/meminfo cannot be read or does not say.
pub fn free_memory_bytes() -> io::Result<u64> {
    available_bytes(&std::fs::read_to_string("/proc/meminfo")?)
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

/// Has this process keep some of what it frees; for the beginning of a program.
pub fn keep_freed_memory() {
    crate::sys::keep_freed_memory();
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_understood() {
        let text = "MemTotal:  100 kB\nMemAvailable:   2048 kB\nBuffers: 1 kB\n";
        assert_eq!(available_bytes(text), Some(2 << 20));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
        assert!(free_memory_bytes().unwrap() > 0);
    }
}
