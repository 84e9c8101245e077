//! Ends and restarts of the guest: the power button, `reboot`, `poweroff`.

use std::fs::File;
use std::io::Read;
use std::process::Command;
use std::time::Duration;

/// `struct input_event` of a 64-bit kernel.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Powers off when the ACPI power button is pressed (`virsh shutdown`).
pub(crate) fn watch_button() {
    let Ok(devices) = std::fs::read_dir("/dev/input") else { return };
    for device in devices.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("event")) {
        std::thread::spawn(move || {
            let Ok(mut file) = File::open(device.path()) else { return };
            let mut event = [0_u8; EVENT_BYTES];
            while file.read_exact(&mut event).is_ok() {
                if is_power_key(&event) {
                    println!("GUEST POWER BUTTON");
                    leave("poweroff");
                }
            }
        });
    }
}

fn is_power_key(event: &[u8; EVENT_BYTES]) -> bool {
    let kind = u16::from_ne_bytes([event[16], event[17]]);
    let code = u16::from_ne_bytes([event[18], event[19]]);
    let value = u32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    (kind, code, value) == (EV_KEY, KEY_POWER, 1)
}

/// `reboot` or `poweroff`, a moment later, so that the answer to the request still leaves.
pub(crate) fn leave(how: &'static str) {
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        println!("GUEST {how}");
        // There is no file system to sync and no process to end.
        if let Err(error) = Command::new("/bin/busybox").args([how, "-f"]).status() {
            println!("GUEST cannot {how}: {error}");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_press_of_the_power_key_counts() {
        let mut event = [0_u8; EVENT_BYTES];
        event[16] = 1;
        event[18] = 116;
        event[20] = 1;
        assert!(is_power_key(&event));
        event[20] = 0;
        assert!(!is_power_key(&event), "its release does not");
        event[20] = 1;
        event[18] = 30;
        assert!(!is_power_key(&event), "another key does not");
    }
}
