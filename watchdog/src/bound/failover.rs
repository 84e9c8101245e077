//! How long a failover without anybody takes: the sum of what can happen on the way, from the configured values.

use std::time::Duration;

use serde::Serialize;

use super::{ANSWER, BUSY};
use crate::owner::Timing;

/// What the bound is made of beside [`Timing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long the arbiter may take over a question.
    pub arbiter: Duration,
    /// How long a load may take before the claim is given back.
    pub load: Duration,
}

/// Writing the generation, letting the guest run, announcing it: one answer of the disk, of libvirt and of QEMU each.
const ANNOUNCE: Duration = Duration::from_millis(3 * 400);
const _: () = assert!(ANNOUNCE.as_millis() == 3 * ANSWER.as_millis());

/// Questions to the arbiter for one step: one that was under way, the swap, the read behind it.
const QUESTIONS: u32 = 3;

/// One summand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// In a word.
    pub name: &'static str,
    /// Milliseconds at most.
    pub ms: u64,
    /// Why so much.
    pub why: String,
}

/// The bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailoverBound {
    /// From the last sign of life of the primary to the guest running on the backup.
    pub bound_ms: u64,
    /// Its summands.
    pub parts: Vec<Part>,
    /// The same for a QEMU that hangs while its host lives, from its last sign of life.
    pub qemu_hangs_ms: u64,
    /// The same for a QEMU that dies while its host lives.
    pub qemu_dies_ms: u64,
    /// What must be so for the bound to hold.
    pub condition: String,
}

/// From the configured values.
pub fn failover(timing: &Timing, limits: &Limits) -> FailoverBound {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let part = |name, time: Duration, why: String| Part { name, ms: ms(time), why };
    let questions = limits.arbiter.saturating_mul(QUESTIONS);
    let asked = format!(
        "{QUESTIONS} x {} ms: a question under way, the swap, the read behind it",
        limits.arbiter.as_millis()
    );
    let parts = vec![
        part(
            "detect",
            timing.primary_silent,
            format!(
                "--suspect-after-ms, with a heartbeat every {} ms on every path",
                timing.heartbeat.as_millis()
            ),
        ),
        part("claim", questions, asked.clone()),
        part("load", limits.load, "--load-limit-ms; a warm standby takes milliseconds".to_owned()),
        part("confirm", questions, asked),
        part(
            "announce",
            ANNOUNCE,
            format!("3 x {} ms: the generation on disk, libvirt, QEMU", ANSWER.as_millis()),
        ),
        part("busy", BUSY, "for a host that has to wait for a processor".to_owned()),
    ];
    let bound_ms = parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.ms));
    let instead =
        |detect: Duration| bound_ms.saturating_sub(ms(timing.primary_silent)).saturating_add(ms(detect));
    FailoverBound {
        bound_ms,
        parts,
        qemu_hangs_ms: instead(timing.qemu_silent.saturating_add(LOOK)),
        qemu_dies_ms: instead(LOOK),
        condition: "the arbiter and the backup answer, and the backup holds a committed image; while the arbiter does not \
                    answer nothing changes hands"
            .to_owned(),
    }
}

/// Until the host beside a QEMU has seen what became of it and has said so: a look every 200 ms, which waits 2 s for an
/// answer.
const LOOK: Duration = Duration::from_millis(200 + 2000 + 100);

impl FailoverBound {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "The guest runs on the backup within {} ms of the last sign of life of its primary:\n",
            self.bound_ms
        );
        for Part { name, ms, why } in &self.parts {
            text.push_str(&format!("  {name:<9}{ms:>8} ms  {why}\n"));
        }
        text.push_str(&format!("  {:<9}{:>8} ms\n", "sum", self.bound_ms));
        text.push_str(&format!(
            "When QEMU hangs and its host lives: {} ms from QEMU's last sign of life. When QEMU dies: {} ms.\nIt holds if {}.\n",
            self.qemu_hangs_ms, self.qemu_dies_ms, self.condition
        ));
        text
    }

    /// For programs.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_the_parts_and_follows_the_values() {
        let limits = Limits { arbiter: Duration::from_secs(1), load: Duration::from_secs(20) };
        let timing = Timing::default();
        let bound = failover(&timing, &limits);
        assert_eq!(bound.bound_ms, 1500 + 3000 + 20_000 + 3000 + 1200 + 750);
        assert_eq!(bound.qemu_hangs_ms, bound.bound_ms - 1500 + 5000 + 2300);
        let slow = Timing { primary_silent: Duration::from_millis(9000), ..timing };
        assert_eq!(failover(&slow, &limits).bound_ms, bound.bound_ms + 7500);
        let text = bound.text();
        assert!(text.contains("within 29450 ms") && text.contains("load        20000 ms"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&bound.json()).unwrap();
        assert_eq!(json["parts"][0]["ms"], 1500);
    }
}
