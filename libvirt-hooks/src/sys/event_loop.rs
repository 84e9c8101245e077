//! libvirt's default event loop, on one thread for the whole process.

use std::sync::OnceLock;
use std::time::Duration;

/// Registers the loop and starts its thread, once per process; every connection that wants events must be opened
/// after this.
pub(crate) fn start_event_loop() -> Result<(), String> {
    // libvirt keeps the event implementation in a global of its own: once per process is its rule, not ours.
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl().map_err(|error| error.message().to_owned())?;
            std::thread::Builder::new()
                .name("libvirt-events".to_owned())
                .spawn(run)
                .map(drop)
                .map_err(|error| error.to_string())
        })
        .clone()
}

fn run() {
    loop {
        if let Err(error) = virt::event::event_run_default_impl() {
            tracing::error!(error = error.message(), "libvirt's event loop failed, trying again");
            // Not a wait for anything: it keeps a loop that fails at once from taking a whole CPU.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
