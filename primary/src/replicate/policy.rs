//! How many lanes a stream uses: one more is tried while sending is what epochs wait for, and kept if it made them faster.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;
use understudy_proto::epoch::EpochKind;

/// What a further connection must bring to be kept.
const GAIN: f64 = 1.15;

/// Samples that are compared with as many.
const SAMPLES: usize = 8;

/// Samples behind a change that count for nothing: a new connection starts slowly, and its buffers are empty.
const SKIPPED: usize = 2;

/// Fewer bytes say more of how long an answer takes than of the link.
const ENOUGH_BYTES: u64 = 1 << 20;

/// A shorter time is mostly the scheduler's.
const ENOUGH_TIME: Duration = Duration::from_millis(2);

/// Before the next trial when one has brought nothing; doubles.
const FIRST_WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// An epoch, or a part of a long one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) kind: EpochKind,
    pub(super) bytes: u64,
    /// In which the link had something to do.
    pub(super) busy: Duration,
    /// From its beginning to its end.
    pub(super) whole: Duration,
}

impl Sample {
    /// Whether the link was what it waited for.
    fn tells(&self) -> bool {
        self.bytes >= ENOUGH_BYTES && self.busy >= ENOUGH_TIME && self.busy * 2 >= self.whole
    }
}

/// What has happened.
#[derive(Debug, Clone)]
pub(super) enum Event {
    Sample(Sample),
    /// A lane is open.
    Opened,
    /// It could not be opened.
    Failed(String),
    /// A lane has ended of which nothing was under way.
    Broken(String),
    /// The stream has ended, and its lanes with it.
    Ended,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Open a lane.
    Open,
    /// Use so many.
    Use(usize),
}

#[derive(Debug)]
enum State {
    Watching,
    Opening,
    /// The rate before, and samples still to be passed over.
    Trying {
        before: f64,
        kind: EpochKind,
        skip: usize,
    },
}

#[derive(Debug)]
pub(super) struct Policy {
    most: usize,
    lanes: usize,
    state: State,
    samples: VecDeque<Sample>,
    wait: Duration,
    not_before: Option<Instant>,
}

impl Policy {
    /// For at most so many connections, the stream's own among them.
    pub(super) fn new(connections: usize) -> Self {
        let most = connections.saturating_sub(1).min(understudy_proto::limits::MAX_LANES);
        Self {
            most,
            lanes: 0,
            state: State::Watching,
            samples: VecDeque::new(),
            wait: FIRST_WAIT,
            not_before: None,
        }
    }

    /// Whether there may ever be a lane.
    pub(super) fn wants_lanes(&self) -> bool {
        self.most > 0
    }

    /// What follows from it, and why.
    pub(super) fn step(&mut self, event: Event, now: Instant) -> Option<(Command, String)> {
        match event {
            Event::Sample(sample) => self.sample(sample, now),
            Event::Opened => {
                if !matches!(self.state, State::Opening) {
                    return None;
                }
                let (before, kind) = (rate(&self.samples), self.samples.back()?.kind);
                self.samples.clear();
                self.lanes += 1;
                self.state = State::Trying { before, kind, skip: SKIPPED };
                let why = format!("trial, {} MB/s before", megabytes(before));
                Some((Command::Use(self.lanes), why))
            }
            Event::Failed(reason) => {
                self.samples.clear();
                self.state = State::Watching;
                let again = self.back_off(now);
                let why = format!("no further connection: {reason}; tried again in {again} s");
                Some((Command::Use(self.lanes), why))
            }
            Event::Broken(reason) => {
                self.samples.clear();
                self.lanes = self.lanes.saturating_sub(1);
                self.state = State::Watching;
                let again = self.back_off(now);
                Some((Command::Use(self.lanes), format!("{reason}; another is tried in {again} s")))
            }
            Event::Ended => {
                self.samples.clear();
                // It may have been a lane that has ended it.
                if self.lanes > 0 {
                    self.back_off(now);
                }
                self.lanes = 0;
                self.state = State::Watching;
                None
            }
        }
    }

    fn sample(&mut self, sample: Sample, now: Instant) -> Option<(Command, String)> {
        if self.most == 0 || !sample.tells() {
            return None;
        }
        match &mut self.state {
            State::Trying { before, kind, skip } => {
                // Full copies and deltas are not to be compared.
                if sample.kind != *kind {
                    return None;
                }
                if *skip > 0 {
                    *skip -= 1;
                    return None;
                }
                self.samples.push_back(sample);
                if self.samples.len() < SAMPLES {
                    return None;
                }
                let (before, after) = (*before, rate(&self.samples));
                self.samples.clear();
                self.state = State::Watching;
                let rates = format!("{} MB/s, {} MB/s before", megabytes(after), megabytes(before));
                if after >= before * GAIN {
                    self.wait = FIRST_WAIT;
                    return Some((Command::Use(self.lanes), format!("kept: {rates}")));
                }
                self.lanes = self.lanes.saturating_sub(1);
                let again = self.back_off(now);
                Some((Command::Use(self.lanes), format!("no gain: {rates}; next trial in {again} s")))
            }
            state => {
                if self.samples.back().is_some_and(|last| last.kind != sample.kind) {
                    self.samples.clear();
                }
                self.samples.push_back(sample);
                if self.samples.len() > SAMPLES {
                    self.samples.pop_front();
                }
                let due = self.not_before.is_none_or(|at| now >= at);
                if matches!(state, State::Opening)
                    || self.samples.len() < SAMPLES
                    || self.lanes >= self.most
                    || !due
                {
                    return None;
                }
                *state = State::Opening;
                let why = format!("epochs wait for the link: {} MB/s", megabytes(rate(&self.samples)));
                Some((Command::Open, why))
            }
        }
    }

    fn back_off(&mut self, now: Instant) -> u64 {
        let wait = self.wait;
        self.not_before = Some(now + wait);
        self.wait = (wait * 2).min(LONGEST_WAIT);
        wait.as_secs()
    }
}

/// Bytes a second.
fn rate(samples: &VecDeque<Sample>) -> f64 {
    let bytes: u64 = samples.iter().map(|sample| sample.bytes).sum();
    let busy: Duration = samples.iter().map(|sample| sample.busy).sum();
    bytes as f64 / busy.as_secs_f64().max(1e-9)
}

fn megabytes(rate: f64) -> String {
    format!("{:.0}", rate / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link on which each connection does so much, and all together at most so much, in MB/s.
    struct Link {
        policy: Policy,
        now: Instant,
        lanes: usize,
        trials: usize,
        each: f64,
        all: f64,
    }

    impl Link {
        fn new(connections: usize, each: f64, all: f64) -> Self {
            let (policy, now) = (Policy::new(connections), Instant::now());
            Self { policy, now, lanes: 0, trials: 0, each, all }
        }

        fn apply(&mut self, event: Event) {
            match self.policy.step(event, self.now) {
                Some((Command::Open, _)) => {
                    self.trials += 1;
                    self.apply(Event::Opened);
                }
                Some((Command::Use(lanes), _)) => self.lanes = lanes,
                None => {}
            }
        }

        fn epochs(&mut self, count: usize, bytes: u64) {
            for _ in 0..count {
                let rate = (self.each * (self.lanes + 1) as f64).min(self.all) * 1e6;
                let busy = Duration::from_secs_f64(bytes as f64 / rate);
                self.now += busy;
                let kind = EpochKind::Delta;
                self.apply(Event::Sample(Sample { kind, bytes, busy, whole: busy }));
            }
        }
    }

    #[test]
    fn a_limit_for_each_connection_is_met_with_more_of_them() {
        let mut link = Link::new(4, 100.0, 10_000.0);
        link.epochs(200, 16 << 20);
        assert_eq!((link.lanes, link.trials), (3, 3));
        link.epochs(1000, 16 << 20);
        assert_eq!((link.lanes, link.trials), (3, 3), "it stays");
    }

    #[test]
    fn a_limit_of_all_together_is_found() {
        let mut link = Link::new(16, 100.0, 310.0);
        link.epochs(100, 16 << 20);
        assert_eq!(link.lanes, 2, "the third brings 3 %");
    }

    #[test]
    fn without_gain_it_returns_and_waits_longer_each_time() {
        let mut link = Link::new(4, 100.0, 100.0);
        let mut trials = Vec::new();
        for _ in 0..(20 * 60 * 100 / 16) {
            let before = link.trials;
            link.epochs(1, 16_000_000);
            if link.trials > before {
                trials.push(link.now);
            }
        }
        assert_eq!(link.lanes, 0);
        let gaps: Vec<_> = trials.windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect();
        assert_eq!(gaps.len(), 5, "{gaps:?}");
        assert!(gaps.windows(2).all(|pair| pair[1] > pair[0] + pair[0] / 2), "{gaps:?}");
    }

    #[test]
    fn nothing_is_tried_that_cannot_tell_or_is_not_wanted() {
        let mut link = Link::new(4, 100.0, 1000.0);
        link.epochs(1000, 64 << 10);
        let mut one = Link::new(1, 100.0, 1000.0);
        one.epochs(1000, 16 << 20);
        assert_eq!((link.trials, one.trials), (0, 0));
        // The capture is what these wait for.
        for _ in 0..1000 {
            let (busy, whole) = (Duration::from_millis(10), Duration::from_millis(100));
            let sample = Sample { kind: EpochKind::Full, bytes: 16 << 20, busy, whole };
            link.apply(Event::Sample(sample));
        }
        assert_eq!(link.trials, 0);
    }

    #[test]
    fn a_lane_that_fails_is_not_tried_again_at_once() {
        let mut link = Link::new(4, 100.0, 1000.0);
        link.epochs(18, 16 << 20);
        assert_eq!((link.lanes, link.trials), (1, 1));
        for event in [Event::Broken("reset".into()), Event::Ended, Event::Failed("refused".into())] {
            link.epochs(100, 16 << 20);
            let trials = link.trials;
            link.apply(event);
            link.epochs(20, 16 << 20);
            assert_eq!(link.trials, trials);
            link.now += Duration::from_secs(400);
        }
    }
}
