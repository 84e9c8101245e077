//! Shows long work: a bar on a terminal, lines elsewhere. All of it on standard error.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;
use understudy_proto::rpc::admin::Progress;

/// Lines instead of a bar are written when the percentage has grown by this much.
const LINE_EVERY_PERCENT: u8 = 10;

/// Where progress is shown.
pub(crate) enum Display {
    Bar(ProgressBar),
    Lines(LineFilter),
}

impl Display {
    /// A bar if standard error is a terminal.
    pub(crate) fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines(LineFilter::default());
        }
        let bar = ProgressBar::new(100);
        // The template is ours and constant; a bar without style still shows progress.
        if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:30} {percent:>3}% {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self::Bar(bar)
    }

    /// Shows a step.
    pub(crate) fn show(&mut self, step: &Progress) {
        match self {
            Self::Bar(bar) => {
                if let Some(percent) = step.percent {
                    bar.set_position(percent.into());
                }
                bar.set_message(step.text.clone());
                if step.done {
                    bar.finish_and_clear();
                    eprintln!("{}", step.text);
                }
            }
            Self::Lines(filter) => {
                if let Some(line) = filter.line(step) {
                    eprintln!("{line}");
                }
            }
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// Decides which steps are worth a line of their own.
#[derive(Debug, Default)]
pub(crate) struct LineFilter {
    phase: String,
    percent: u8,
}

impl LineFilter {
    fn line(&mut self, step: &Progress) -> Option<String> {
        let percent = step.percent.unwrap_or(0);
        let grown = percent >= self.percent.saturating_add(LINE_EVERY_PERCENT) || percent == 100;
        if step.phase == self.phase && !step.done && !(step.percent.is_some() && grown) {
            return None;
        }
        self.phase.clone_from(&step.phase);
        self.percent = percent;
        Some(match step.percent {
            Some(p) => format!("{}: {} ({p} %)", step.phase, step.text),
            None => format!("{}: {}", step.phase, step.text),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_few_but_no_phase_is_left_out() {
        let mut filter = LineFilter::default();
        let mut steps = vec![Progress::step("preflight", "checking")];
        steps.extend((0..=100).map(|p| Progress { percent: Some(p), ..Progress::step("copy", "copying") }));
        steps.push(Progress { done: true, ..Progress::step("protected", "protected") });
        let lines: Vec<_> = steps.iter().filter_map(|s| filter.line(s)).collect();
        assert_eq!(lines.len(), 13, "{lines:?}");
        assert_eq!(lines[0], "preflight: checking");
        assert_eq!(lines[1], "copy: copying (0 %)");
        assert_eq!(lines[11], "copy: copying (100 %)");
        assert_eq!(lines[12], "protected: protected");
    }
}
