//! What a person sees while something long is going on.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Steps, each with the time since the start; a spinner on a terminal, plain lines elsewhere.
pub(crate) struct Steps {
    started: Instant,
    spinner: Option<ProgressBar>,
    quiet: bool,
}

impl Steps {
    pub(crate) fn start() -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { started: Instant::now(), spinner, quiet: false }
    }

    /// Says nothing: for what is done again and again.
    pub(crate) fn quiet() -> Self {
        Self { started: Instant::now(), spinner: None, quiet: true }
    }

    /// Something is done, or known: one line that stays.
    pub(crate) fn say(&self, text: impl AsRef<str>) {
        if self.quiet {
            return;
        }
        let line = format!("[{:>6.1} s] {}", self.started.elapsed().as_secs_f64(), text.as_ref());
        match &self.spinner {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// What is being waited for now; only a terminal shows it.
    pub(crate) fn waiting(&self, text: impl Into<String>) {
        if let Some(bar) = &self.spinner {
            bar.set_message(text.into());
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
    }
}
