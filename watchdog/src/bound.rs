//! How long it takes until a guest runs again: the sum of what can happen on the way.

mod failover;

use std::time::Duration;

pub use failover::{FailoverBound, Limits, Part, failover};

/// The sign of life is looked at this often; usually the end of the process wakes the supervisor before.
pub const NOTICE: Duration = Duration::from_millis(50);

/// What a monitor may take over one question or order. It takes a millisecond; a busy host takes longer.
pub const ANSWER: Duration = Duration::from_millis(400);

/// An order that had no effect is given again after this long.
pub const REPEAT: Duration = Duration::from_millis(200);

/// What QEMU may take to leave a checkpoint. It takes a few milliseconds.
pub const LEAVE: Duration = Duration::from_millis(400);

/// For a host that is so busy that the supervisor has to wait for a processor.
pub const BUSY: Duration = Duration::from_millis(750);

/// How often the guests of a living agent are looked at.
pub const LOOK: Duration = Duration::from_secs(1);

/// From the death of the agent to the guest running again: the death is noticed, a question that was under way is
/// answered, then another, the order is given, once more if it had no effect, and QEMU carries it out.
pub const DEAD: Duration = sum(&[NOTICE, ANSWER, ANSWER, ANSWER, REPEAT, ANSWER, LEAVE, BUSY]);

/// How long a living agent may hold a guest stopped, unless `--hung-after-ms` says otherwise. Not less than what an
/// agent that works permits itself: it gives a checkpoint up after 20 s and then has 10 s to let the guest run.
pub const HUNG_AFTER: Duration = Duration::from_secs(30);

/// From the moment a living agent has left a guest stopped to the guest running again. The stop is seen at the next
/// look, counts from there, and is too long at the look after `hung_after`.
pub const fn hung(hung_after: Duration) -> Duration {
    sum(&[LOOK, hung_after, LOOK, ANSWER, ANSWER, REPEAT, ANSWER, LEAVE, BUSY])
}

const fn sum(parts: &[Duration]) -> Duration {
    let (mut total, mut n) = (Duration::ZERO, 0);
    while n < parts.len() {
        total = total.saturating_add(parts[n]);
        n += 1;
    }
    total
}

/// The arithmetic in words.
pub fn explain() -> String {
    let ms = |duration: Duration| duration.as_millis();
    format!(
        "A guest whose agent has died while it was stopped runs again within {} ms: {} to notice, 3 x {} for a question \
         under way, a look and the order, {} + {} if it must be repeated, {} for QEMU to leave the checkpoint, {} for a \
         busy host. One that a living agent holds stopped runs again {} ms after --hung-after-ms has passed. Both hold \
         while libvirt and QEMU answer within {} ms; when they do not, they are asked again until they do.",
        ms(DEAD),
        ms(NOTICE),
        ms(ANSWER),
        ms(REPEAT),
        ms(ANSWER),
        ms(LEAVE),
        ms(BUSY),
        ms(hung(Duration::ZERO)),
        ms(ANSWER),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_in_the_text_add_up() {
        assert_eq!(DEAD, Duration::from_millis(50 + 3 * 400 + 200 + 400 + 400 + 750));
        assert_eq!(DEAD, Duration::from_secs(3));
        let text = explain();
        assert!(text.contains("within 3000 ms: 50 to notice, 3 x 400 for"), "{text}");
        assert!(text.contains("runs again 4550 ms after"), "{text}");
    }
}
