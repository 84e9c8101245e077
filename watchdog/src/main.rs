//! The supervisor of the primary agent of this host.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tracing::info;
use tracing_subscriber::EnvFilter;
use understudy_watchdog::bound;
use understudy_watchdog::config::Config;
use understudy_watchdog::monitor::Libvirt;
use understudy_watchdog::supervisor::Supervisor;

/// As in sysexits.h: the command was used incorrectly.
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let config = match Config::try_parse() {
        Ok(config) => config,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let mistakes = config.mistakes();
    if !mistakes.is_empty() {
        mistakes.iter().for_each(|mistake| eprintln!("understudy-watchdog: {mistake}"));
        return ExitCode::from(EXIT_USAGE);
    }
    let filter = EnvFilter::new(&config.log);
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if config.log_json {
        logger.json().init();
    } else {
        logger.with_ansi(false).init();
    }
    info!(
        version = env!("CARGO_PKG_VERSION"), state_dir = %config.state_dir.display(), libvirt = config.connect,
        dead_ms = bound::DEAD.as_millis(), hung_ms = bound::hung(config.hung_after()).as_millis(), "started"
    );
    let libvirt = Arc::new(Libvirt { uri: config.connect.clone() });
    // There is nothing to put in order at its end: SIGTERM just ends it.
    match Supervisor::new(config.state_dir.clone(), libvirt, config.hung_after()).run(|_| {}) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("understudy-watchdog: cannot start a thread: {error}");
            ExitCode::FAILURE
        }
    }
}
