//! The length of epochs, found while they run. Pure: it is told how each epoch went and says how long the next ones are,
//! and why when that changes.
//!
//! Two goals bound the length from below, one from above:
//!
//! - **slowdown**: the guest stands still for at most this share of its time, so an epoch is at least
//!   `stop * (1 - share) / share` long;
//! - **bandwidth**: epochs are long enough for pages that are written again and again to be sent once;
//! - **latency**: an epoch, its stop and its way to the backup together are at most this long, which is the longest that
//!   output waits.
//!
//! Between the bounds it takes their geometric mean, or the only bound there is. Where they contradict each other the
//! lower one holds, because a guest that stands still answers nobody, and the reason says which goal is missed.
//!
//! What it measures depends on what it sets, so it moves in small steps, not at all within a dead band, and turns round
//! at most twice a second.

use std::time::Duration;

use understudy_proto::pace::EpochGoals;

#[cfg(test)]
mod tests;

/// The shortest and the longest epoch it chooses.
pub const SHORTEST: Duration = Duration::from_millis(5);
/// See [`SHORTEST`].
pub const LONGEST: Duration = Duration::from_secs(1);

/// Share of its time a guest stands still when no goal is stated.
pub const USUAL_SLOWDOWN: f64 = 0.05;

/// Weight of a new value in a moving average.
const WEIGHT: f64 = 0.15;

/// A value counts as at most so many times its average: one is a hiccup, several in a row move it.
const MAX_JUMP: f64 = 4.0;

/// By how much the length changes at once, at most.
const MAX_STEP: f64 = 1.5;

/// Closer than this to the wanted length nothing changes.
const DEAD_BAND: f64 = 1.06;

/// Epochs between two changes: the averages have to hear of the one before...
const SETTLE_EPOCHS: u32 = 4;

/// ...or this long, where epochs are long: each of those is an average itself.
const SETTLE: Duration = Duration::from_millis(250);

/// Between two turns from longer to shorter or back.
const MIN_TURN: Duration = Duration::from_millis(600);

/// What an operator wants; `None` is no such goal.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Goals {
    /// The longest output may wait.
    pub latency: Option<Duration>,
    /// The largest share of its time the guest may stand still, 0 to 1.
    pub slowdown: Option<f64>,
    /// Bytes a second to the backup, at most.
    pub bandwidth_bytes: Option<f64>,
}

impl From<EpochGoals> for Goals {
    fn from(goals: EpochGoals) -> Self {
        Self {
            latency: goals.latency_ms.map(|ms| Duration::from_millis(ms.into())),
            slowdown: goals.slowdown_permille.map(|permille| f64::from(permille) / 1000.0),
            #[expect(clippy::cast_precision_loss, reason = "a rate, exact beyond any link's")]
            bandwidth_bytes: goals.bandwidth_bytes.map(|bytes| bytes as f64),
        }
    }
}

/// An epoch as it was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// How long the guest ran.
    pub ran: Duration,
    /// How long it was stopped at the end.
    pub stop: Duration,
    /// From the stop to the acknowledgement.
    pub transfer: Duration,
    /// Bytes sent.
    pub bytes: u64,
}

/// A change of the length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Before.
    pub from: Duration,
    /// From the next epoch on.
    pub to: Duration,
    /// Why, for the log and the status.
    pub reason: String,
}

/// Seconds and bytes of an epoch, on average.
#[derive(Debug, Clone, Copy, Default)]
struct Average {
    epochs: u32,
    ran: f64,
    stop: f64,
    transfer: f64,
    bytes: f64,
}

/// Finds the length of one guest's epochs.
#[derive(Debug, Clone)]
pub struct Autopilot {
    goals: Goals,
    length: f64,
    average: Average,
    epochs_since_change: u32,
    since_change: f64,
    /// 1 longer, -1 shorter, 0 not yet.
    direction: i8,
    since_turn: f64,
}

/// Where the length should be, in seconds, and why.
struct Wanted {
    length: f64,
    reason: String,
}

impl Autopilot {
    /// One that begins with this length.
    pub fn new(goals: Goals, begin: Duration) -> Self {
        Self {
            goals,
            length: begin.clamp(SHORTEST, LONGEST).as_secs_f64(),
            average: Average::default(),
            epochs_since_change: 0,
            since_change: 0.0,
            direction: 0,
            since_turn: f64::INFINITY,
        }
    }

    /// The length of the next epoch.
    pub fn length(&self) -> Duration {
        Duration::from_secs_f64(self.length)
    }

    /// The shortest epoch that output may ask for: an operator's goal for the slowdown holds for those as well.
    pub fn floor(&self) -> Duration {
        let share = self.goals.slowdown.unwrap_or(1.0);
        Duration::try_from_secs_f64(self.average.stop * (1.0 - share) / share).unwrap_or(LONGEST).min(LONGEST)
    }

    /// Takes an epoch in and decides on the next ones.
    pub fn step(&mut self, seen: &Seen) -> Option<Change> {
        self.average.learn(seen);
        let passed = (seen.ran + seen.stop).as_secs_f64();
        self.epochs_since_change = self.epochs_since_change.saturating_add(1);
        self.since_change += passed;
        self.since_turn += passed;
        if self.epochs_since_change < SETTLE_EPOCHS && self.since_change < SETTLE.as_secs_f64() {
            return None;
        }
        let wanted = self.wanted();
        let factor = wanted.length / self.length;
        if (1.0 / DEAD_BAND..=DEAD_BAND).contains(&factor) {
            return None;
        }
        let direction = if factor > 1.0 { 1 } else { -1 };
        if self.direction == -direction {
            if self.since_turn < MIN_TURN.as_secs_f64() {
                return None;
            }
            self.since_turn = 0.0;
        }
        let from = self.length();
        self.direction = direction;
        // Half of the way, on a scale of ratios: what it measures moves as well.
        self.length *= factor.sqrt().clamp(1.0 / MAX_STEP, MAX_STEP);
        self.length = self.length.clamp(SHORTEST.as_secs_f64(), LONGEST.as_secs_f64());
        self.epochs_since_change = 0;
        self.since_change = 0.0;
        let to = self.length();
        (from != to).then_some(Change { from, to, reason: wanted.reason })
    }

    fn wanted(&self) -> Wanted {
        let Average { ran, stop, transfer, bytes, .. } = self.average;
        let no_goal = self.goals == Goals::default();
        let share = self.goals.slowdown.or(no_goal.then_some(USUAL_SLOWDOWN));
        let for_slowdown = share.map(|share| {
            let share = share.clamp(0.001, 0.9);
            stop * (1.0 - share) / share
        });
        // The same pages in a longer epoch; where pages are new all the time this ends at the longest.
        let for_bandwidth = self.goals.bandwidth_bytes.map(|cap| {
            let rate = bytes / (ran + stop).max(1e-9);
            self.length * (rate / cap.max(1.0))
        });
        let lower = for_slowdown.into_iter().chain(for_bandwidth).fold(0.0, f64::max);
        let upper = self.goals.latency.map(|goal| goal.as_secs_f64() - stop - transfer);
        let ms = |seconds: f64| seconds * 1e3;
        let (length, why) = match upper {
            None => (lower, "as short as the goals allow".to_owned()),
            Some(upper) if upper < lower => {
                (lower, format!("the latency goal is missed: it allows {:.1} ms", ms(upper.max(0.0))))
            }
            Some(upper) if lower <= 0.0 => (upper, "as long as the latency goal allows".to_owned()),
            Some(upper) => {
                ((lower * upper).sqrt(), format!("between {:.1} and {:.1} ms", ms(lower), ms(upper)))
            }
        };
        let length = length.clamp(SHORTEST.as_secs_f64(), LONGEST.as_secs_f64());
        let reason = format!(
            "{why}; stop {:.2} ms, transfer {:.2} ms, {:.0} KiB an epoch",
            ms(stop),
            ms(transfer),
            bytes / 1024.0
        );
        Wanted { length, reason }
    }
}

impl Average {
    fn learn(&mut self, seen: &Seen) {
        let [ran, stop, transfer] = [seen.ran, seen.stop, seen.transfer].map(|time| time.as_secs_f64());
        let bytes = seen.bytes as f64;
        self.epochs = self.epochs.saturating_add(1);
        // The first ones count alike.
        let weight = WEIGHT.max(1.0 / f64::from(self.epochs)).max((ran / 2.0).min(0.5));
        for (value, new) in [
            (&mut self.ran, ran),
            (&mut self.stop, stop),
            (&mut self.transfer, transfer),
            (&mut self.bytes, bytes),
        ] {
            let new = if self.epochs > 1 { new.min(*value * MAX_JUMP + 1e-6) } else { new };
            *value += (new - *value) * weight;
        }
    }
}
