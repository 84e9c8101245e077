//! Which encoding finishes an epoch soonest. Pure: it is told what the last epoch was like and says how the next one is
//! encoded, and why when that changes.
//!
//! For every plan it predicts the time from the first page to the backup's answer, from moving averages: what a page of
//! each class cost in CPU time and bytes under that plan, how many there are, how fast the link is. Encoding and sending
//! overlap as far as a CPU is free for it; where none is, encoding takes from the guest and counts in full. Averages of
//! plans that are not in use drift back to what is usual, so that a plan that failed is tried again some day.
//!
//! Where several threads may encode a guest's pages, a page still costs what all of them spent on it, and that is what counts
//! where no CPU is free. How long pages keep an epoch is that by the number of threads that worked at a time, which is measured
//! too: what is done in order, or waits for threads that others use, is in it. Before anything was encoded it is taken for the
//! CPUs that have nothing to do.
//!
//! The link is known from epochs that are sent as they are. What an epoch takes beyond what its parts let expect (a backup that
//! decodes, threads that wake each other), or less (encoding while QEMU still sends), is learnt for each plan apart, so the plan in
//! use is known by what it takes, and not by what it should take. If that were one with the link, a backup that is slow to decode
//! would look like a link that is slow for raw pages too. A link that changes while another plan is in use looks the same; so an
//! epoch is sent raw then, and now and then in any case, to tell.
//!
//! It holds to raw within [`MAX_LOSS`] at once, and otherwise changes only for [`MIN_GAIN`] and not within a number of
//! epochs that doubles with every change and halves with quiet ones. From raw, a plan is first tried with a part of the
//! pages of a few epochs: what is usual may be far from what this guest, host and link are like.

mod learn;
mod link;
mod plan;

use understudy_proto::codec::CodecSet;
use understudy_proto::limits::FRAME_TARGET_BYTES;

use link::Link;
pub use plan::{Change, Plan, Seen, Work};
use plan::{Cost, USUAL, USUAL_EXTRA, USUAL_KNOWN};

/// A plan predicted to take more than this, relative to raw, is left at once.
pub const MAX_LOSS: f64 = 1.05;

/// A plan must be predicted to take less than this, relative to the one in use, to replace it.
pub const MIN_GAIN: f64 = 0.9;

/// The same, after a trial, to replace raw: on a link that is no limit what an epoch takes moves by more than a tenth by itself.
pub const MIN_GAIN_OF_RAW: f64 = 0.8;

/// Nor is it worth a change, in seconds, where it saves less: so much of a link's delay may be taken for slowness, as
/// epochs of one size do not tell the two apart, and so much is lost again by trials.
const MIN_SAVING: f64 = 500e-6;

/// Weight of a new value in a moving average.
const WEIGHT: f64 = 0.2;

/// Weight of what is usual, each epoch, for a plan not in use.
const DRIFT: f64 = 0.002;

/// A value counts as at most so many times its average: one is a hiccup of the scheduler, several in a row move it.
const MAX_JUMP: f64 = 4.0;

/// Epochs between two changes, doubled by each change up to the longest.
const MIN_HOLD: u32 = 8;
const MAX_HOLD: u32 = 1024;

/// Epochs in which a cache that was just begun fills; what it finds in them says nothing.
const WARM_UP: u32 = 6;

/// Epochs of a trial: those in which its cache fills, and some that tell.
const TRIAL: u32 = WARM_UP + 6;

/// One page of so many takes part in it,
const TRIAL_PART: u64 = 16;

/// or fewer, so that it is predicted to make an epoch longer by no more than this part.
const TRIAL_LOSS: f64 = 0.03;

/// Under another plan than raw one epoch of so many is sent raw.
const PROBE: u32 = 256;

/// Where the plan is not predicted to take less than this, relative to raw, that is done the first time after so many epochs, then
/// after twice as many and so on, and with so many epochs.
const CLOSE: f64 = 0.6;
const FIRST_PROBE: u32 = 24;
const CLOSE_PROBES: u32 = 4;

/// Weight of an epoch of them: together they count for most of what is known of raw.
const PROBE_WEIGHT: f64 = 0.3;

/// Epochs of a plan after which it is known what they take beyond what is expected.
const KNOWN_EXTRA: u32 = 3;

/// Bytes a second that no link has: nothing was seen that would have told its speed.
const UNFELT: f64 = 1e12;

/// The governor of one guest's encoding.
#[derive(Debug, Clone)]
pub struct Governor {
    plan: Plan,
    is_fixed: bool,
    costs: [[Cost; 3]; 5],
    /// The same as it is; below 0 where epochs take less.
    extra: [f64; 5],
    /// Epochs from which that of the plan in use is known.
    extra_known: u32,
    /// The last epoch took another time than was expected.
    was_unusual: bool,
    /// So many epochs are sent raw, to see what that takes.
    probes: u32,
    /// Epochs after the change of plan, the next time.
    probe_at: u32,
    /// Pages of an epoch, and those of zeros.
    pages: f64,
    zeros: f64,
    /// Of the last one.
    last_pages: u64,
    /// Share of pages that the cache knows while it is used.
    known_share: f64,
    link: Link,
    spare_cpus: f64,
    /// Threads that may work on pages at a time, and how many do.
    max_threads: f64,
    threads: f64,
    warm_up: u32,
    hold: u32,
    since_change: u32,
    /// Epochs with pages of each class since the plan is in use.
    tried: [u32; 3],
    /// What is tried beside raw, and the epochs that are left for it.
    trial: Option<(Plan, u32)>,
}

impl Default for Governor {
    fn default() -> Self {
        Self::new()
    }
}

impl Governor {
    /// One that knows only what is usual and begins with raw.
    pub fn new() -> Self {
        Self {
            plan: Plan::Raw,
            is_fixed: false,
            costs: USUAL,
            extra: USUAL_EXTRA,
            extra_known: 0,
            was_unusual: false,
            probes: 0,
            probe_at: FIRST_PROBE,
            pages: 0.0,
            zeros: 0.0,
            last_pages: 0,
            known_share: USUAL_KNOWN,
            link: Link::default(),
            spare_cpus: 1.0,
            max_threads: 1.0,
            threads: 1.0,
            warm_up: 0,
            hold: MIN_HOLD,
            since_change: MIN_HOLD,
            tried: [0; 3],
            trial: None,
        }
    }

    /// One that never changes: for measurements.
    pub fn fixed(plan: Plan) -> Self {
        Self { plan, is_fixed: true, ..Self::new() }
    }

    /// Where so many threads may encode the guest's pages.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Self { max_threads: threads.max(1) as f64, ..self }
    }

    /// One that tries a plan for ever.
    #[cfg(test)]
    pub(super) fn trying(plan: Plan) -> Self {
        Self { trial: Some((plan, u32::MAX)), ..Self::new() }
    }

    /// The plan of the next epoch.
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// What the first pages of the next epoch are encoded with instead, and how many; of zeros not one counts.
    pub fn trial(&self) -> Option<(Plan, u64)> {
        if self.probes > 0 {
            return Some((self.plan, 0));
        }
        self.trial.map(|(plan, _)| (plan, self.trial_pages(plan)))
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    fn trial_pages(&self, plan: Plan) -> u64 {
        let [known, fresh, _] = self.costs[plan as usize];
        let dearest = known.nanos.max(fresh.nanos).max(1.0) / 1e9;
        let most = TRIAL_LOSS * self.predicted_seconds(Plan::Raw) / dearest;
        (self.last_pages / TRIAL_PART).min(most as u64).max(1)
    }

    /// The plan that is looked at.
    fn active(&self) -> Plan {
        self.trial.map_or(self.plan, |(plan, _)| plan)
    }

    /// Measured speed of the link, bytes a second.
    pub fn link_bytes_per_second(&self) -> Option<f64> {
        self.link.bytes_per_second()
    }

    /// Why the plan is what it is, for people.
    pub fn outlook(&self, codecs: CodecSet) -> String {
        if self.is_fixed {
            return "fixed".to_owned();
        }
        let Some(speed) = self.link_bytes_per_second() else {
            return "no epoch was acknowledged yet".to_owned();
        };
        let others = Plan::ALL.into_iter().filter(|plan| *plan != self.plan && plan.is_allowed(codecs));
        let times = others.map(|plan| (plan, self.predicted_seconds(plan)));
        let (next, time) = times.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((self.plan, f64::NAN));
        format!(
            "{:.0} pages an epoch {}: {:.2} ms, {:.2} ms by {}",
            self.pages,
            at(speed),
            self.predicted_seconds(self.plan) * 1e3,
            time * 1e3,
            next.name(),
        )
    }

    /// Takes an epoch in and decides on the next one.
    pub fn step(&mut self, seen: &Seen, codecs: CodecSet) -> Option<Change> {
        self.learn(seen);
        self.since_change = self.since_change.saturating_add(1);
        if self.since_change.is_multiple_of(16 * self.hold) {
            self.hold = (self.hold / 2).max(MIN_HOLD);
        }
        if let Some((plan, left)) = &mut self.trial
            && plan.is_allowed(codecs)
        {
            *left = left.saturating_sub(u32::from(seen.plan == *plan));
            if *left > 0 {
                return None;
            }
        }
        let tried = self.trial.take().map(|(plan, _)| plan);
        let raw = self.predicted_seconds(Plan::Raw);
        let now = self.predicted_seconds(self.plan);
        let allowed = Plan::ALL.into_iter().filter(|plan| plan.is_allowed(codecs));
        let times = allowed.map(|plan| (plan, self.predicted_seconds(plan)));
        let (best, time) = times.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((Plan::Raw, raw));
        // What saves too little of raw to be sure of it is no better than raw.
        let (best, time) = if raw - time < MIN_SAVING { (Plan::Raw, raw) } else { (best, time) };
        let must = !self.plan.is_allowed(codecs) || now > raw * MAX_LOSS;
        let gain = if tried.is_some() { MIN_GAIN_OF_RAW } else { MIN_GAIN };
        let may = (tried.is_some() || self.since_change >= self.hold) && time < now * gain;
        if tried.is_some() && !may {
            // It was no better: not again so soon.
            self.rest();
        }
        if self.is_fixed || best == self.plan || !(must || may) {
            self.probe_in_time(now > raw * CLOSE);
            return None;
        }
        (self.probes, self.probe_at) = (0, FIRST_PROBE);
        if self.plan == Plan::Raw && tried != Some(best) {
            self.begin(best);
            self.trial = Some((best, TRIAL));
            return None;
        }
        let reason = format!(
            "{:.0} pages an epoch {}: {:.2} ms instead of {:.2} ms, raw {:.2} ms",
            self.pages,
            at(self.link.bytes_per_second().unwrap_or_default()),
            time * 1e3,
            now * 1e3,
            raw * 1e3,
        );
        let change = Change { from: self.plan, to: best, reason };
        self.begin(best);
        self.plan = best;
        self.rest();
        Some(change)
    }

    /// Has the next epochs sent raw if it is time to know better what that takes.
    fn probe_in_time(&mut self, is_close: bool) {
        if self.is_fixed || self.plan == Plan::Raw {
            self.probes = 0;
        } else if self.since_change >= self.probe_at && self.probes == 0 {
            self.probes = if is_close { CLOSE_PROBES } else { u32::from(self.since_change >= PROBE) };
            self.probe_at = self.since_change + self.since_change.min(PROBE);
        }
    }

    /// A plan is about to be used.
    fn begin(&mut self, plan: Plan) {
        if plan.uses_cache() && !self.active().uses_cache() {
            self.warm_up = WARM_UP;
        }
        self.tried = [0; 3];
        (self.extra_known, self.was_unusual) = (0, false);
    }

    /// Nothing changes for a while, each time for longer.
    fn rest(&mut self) {
        self.since_change = 0;
        self.hold = (self.hold * 2).min(MAX_HOLD);
    }

    /// Seconds an average epoch takes under a plan, from its first page to the backup's answer.
    pub fn predicted_seconds(&self, plan: Plan) -> f64 {
        let known = if plan.uses_cache() { self.known_share } else { 0.0 };
        let [k, f, z] = self.costs[plan as usize];
        let bytes = self.pages * (known * k.bytes + (1.0 - known) * f.bytes) + self.zeros * z.bytes;
        let nanos = self.pages * (known * k.nanos + (1.0 - known) * f.nanos) + self.zeros * z.nanos;
        let pages = self.pages + self.zeros;
        (self.expected(plan, nanos / 1e9, bytes) + self.extra[plan as usize] * pages).max(0.0)
    }

    /// What so many bytes should take that are so many seconds of work.
    fn expected(&self, plan: Plan, encode: f64, bytes: f64) -> f64 {
        let send = self.link.seconds_per_byte * bytes;
        // The first frame cannot be sent before it is encoded; behind it both go on at once.
        let frames = (bytes / FRAME_TARGET_BYTES as f64).max(1.0);
        let passed = if plan == Plan::Raw { encode } else { encode / self.threads };
        let together = passed.max(send) + passed.min(send) / frames;
        let free = self.spare_cpus.clamp(0.0, 1.0);
        free * together + (1.0 - free) * (encode + send) + self.link.delay_seconds
    }
}

/// For people. Where only the delay of a link was felt, its line is almost flat.
fn at(bytes_per_second: f64) -> String {
    if bytes_per_second > UNFELT {
        return "at a speed that is no limit".to_owned();
    }
    format!("at {:.0} MB/s", bytes_per_second / 1e6)
}

fn average(value: &mut f64, new: f64) {
    *value += (new - *value) * WEIGHT;
}

#[cfg(test)]
mod tests;
