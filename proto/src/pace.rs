//! What an operator wants of epochs whose length is found while they run.

use serde::{Deserialize, Serialize};

use crate::ProtocolError;

/// The goals; `None` is no such goal. Without any, the guest stands still for a twentieth of its time at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EpochGoals {
    /// Output waits at most so many milliseconds.
    pub latency_ms: Option<u32>,
    /// The guest stands still for at most so many thousandths of its time.
    pub slowdown_permille: Option<u16>,
    /// So many bytes a second are sent to the backup, at most.
    pub bandwidth_bytes: Option<u64>,
}

impl EpochGoals {
    /// These, if they can be meant.
    ///
    /// # Errors
    /// Which goal cannot be reached by anything, and what could.
    pub fn checked(self) -> Result<Self, ProtocolError> {
        let Self { latency_ms, slowdown_permille, bandwidth_bytes } = self;
        if let Some(ms) = latency_ms.filter(|ms| !(1..=60_000).contains(ms)) {
            return Err(ProtocolError::invalid("latency goal", format!("{ms} ms, expected 1 to 60000")));
        }
        if let Some(permille) = slowdown_permille.filter(|permille| !(1..=900).contains(permille)) {
            let percent = f64::from(permille) / 10.0;
            return Err(ProtocolError::invalid("slowdown goal", format!("{percent} %, expected 0.1 to 90")));
        }
        if let Some(bytes) = bandwidth_bytes.filter(|bytes| *bytes < MIN_BANDWIDTH) {
            let text = format!("{bytes} bytes a second, expected at least {MIN_BANDWIDTH}");
            return Err(ProtocolError::invalid("bandwidth cap", text));
        }
        Ok(self)
    }
}

/// The device state of a single epoch a second is more.
const MIN_BANDWIDTH: u64 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_that_nothing_can_reach_are_refused_by_name() {
        let none = EpochGoals::default();
        for (goals, says) in [
            (EpochGoals { latency_ms: Some(0), ..none }, "latency goal"),
            (EpochGoals { latency_ms: Some(60_001), ..none }, "60001 ms"),
            (EpochGoals { slowdown_permille: Some(0), ..none }, "slowdown goal"),
            (EpochGoals { slowdown_permille: Some(950), ..none }, "95 %"),
            (EpochGoals { bandwidth_bytes: Some(99_999), ..none }, "bandwidth cap"),
        ] {
            let error = goals.checked().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let all = EpochGoals {
            latency_ms: Some(20),
            slowdown_permille: Some(50),
            bandwidth_bytes: Some(100_000_000),
        };
        assert_eq!(all.checked(), Ok(all));
        assert_eq!(none.checked(), Ok(none));
    }
}
