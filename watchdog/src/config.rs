//! What the supervisor is told at its start.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::bound;

/// Lets guests run that a primary agent of this host has left stopped, because it died or hangs.
#[derive(Debug, Clone, Parser)]
#[command(name = "understudy-watchdog", version, after_help = bound::explain())]
pub struct Config {
    /// The libvirt whose guests are protected.
    #[arg(long, value_name = "URI", alias = "libvirt-uri", default_value = "qemu:///system")]
    pub connect: String,

    /// The agent's folder of what must survive a restart, as given to understudy-primary.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/understudy")]
    pub state_dir: PathBuf,

    /// How long a living agent may hold a guest stopped, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = default_hung_after_ms())]
    pub hung_after_ms: u64,

    /// Log filter as for tracing, for example `info,understudy_watchdog=debug`.
    #[arg(long, value_name = "FILTER", env = "UNDERSTUDY_LOG", default_value = "info")]
    pub log: String,

    /// Log lines as JSON.
    #[arg(long)]
    pub log_json: bool,
}

/// Below this an ordinary stop could be taken for one that hangs.
const MIN_HUNG_AFTER_MS: u64 = 1000;
/// A day. A guest stopped for longer than that is nobody's whose agent matters.
const MAX_HUNG_AFTER_MS: u64 = 24 * 3600 * 1000;

fn default_hung_after_ms() -> u64 {
    u64::try_from(bound::HUNG_AFTER.as_millis()).unwrap_or(MAX_HUNG_AFTER_MS)
}

impl Config {
    /// How long a living agent may hold a guest stopped.
    pub fn hung_after(&self) -> Duration {
        Duration::from_millis(self.hung_after_ms)
    }

    /// Everything that is wrong with it, one sentence each.
    pub fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if !self.state_dir.is_absolute() {
            mistakes.push(format!("--state-dir is {:?}: give an absolute path", self.state_dir.display()));
        }
        if !(MIN_HUNG_AFTER_MS..=MAX_HUNG_AFTER_MS).contains(&self.hung_after_ms) {
            mistakes.push(format!(
                "--hung-after-ms is {}: give {MIN_HUNG_AFTER_MS} to {MAX_HUNG_AFTER_MS}",
                self.hung_after_ms
            ));
        }
        if let Err(error) = self.log.parse::<tracing_subscriber::EnvFilter>() {
            mistakes.push(format!("--log is {:?}: {error}", self.log));
        }
        mistakes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let args = ["understudy-watchdog", "--state-dir", "s", "--hung-after-ms", "5", "--log", "a=b=c"];
        let config = Config::try_parse_from(args).unwrap();
        assert_eq!(config.mistakes().len(), 3, "{:?}", config.mistakes());
        assert_eq!(Config::try_parse_from(["understudy-watchdog"]).unwrap().mistakes(), Vec::<String>::new());
    }

    #[test]
    fn help_states_the_bound() {
        let help = <Config as clap::CommandFactory>::command().render_help().to_string();
        assert!(help.contains("runs again within 3000 ms"), "{help}");
    }
}
