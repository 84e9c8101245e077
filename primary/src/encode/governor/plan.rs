//! The plans, what an epoch was like under one, and what pages usually cost.

use std::time::Duration;

use understudy_proto::codec::CodecSet;
use understudy_proto::frame::RECORD_HEADER_BYTES;
use understudy_proto::units::PAGE_BYTES;

/// How an epoch is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plan {
    /// As captured. No cache is kept.
    Raw,
    /// Pages as LZ4 blocks. No cache is kept.
    Lz4,
    /// Known pages by reference, the others raw.
    Delta,
    /// Known pages by reference, the others as LZ4 blocks.
    DeltaLz4,
    /// Known pages by reference, the others raw, all of it in LZ4 batches.
    DeltaBatch,
}

impl Plan {
    /// All plans.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Lz4, Self::Delta, Self::DeltaLz4, Self::DeltaBatch];

    /// Whether known pages are sent by reference.
    pub fn uses_cache(self) -> bool {
        matches!(self, Self::Delta | Self::DeltaLz4 | Self::DeltaBatch)
    }

    /// Whether pages are sent as LZ4 blocks.
    pub fn compresses_pages(self) -> bool {
        matches!(self, Self::Lz4 | Self::DeltaLz4)
    }

    /// Whether both sides can do it.
    pub fn is_allowed(self, codecs: CodecSet) -> bool {
        let lz4 = matches!(self, Self::Lz4 | Self::DeltaLz4 | Self::DeltaBatch);
        (codecs.xbzrle || !self.uses_cache()) && (codecs.lz4 || !lz4)
    }

    /// Its name in logs and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Delta => "xbzrle",
            Self::DeltaLz4 => "xbzrle, else lz4",
            Self::DeltaBatch => "xbzrle in lz4 batches",
        }
    }
}

/// Pages of a class, what they became and what that took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Pages.
    pub pages: u64,
    /// Bytes of their records.
    pub bytes: u64,
    /// Time spent on them, by all threads together.
    pub time: Duration,
}

/// An epoch as it was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// How it was encoded.
    pub plan: Plan,
    /// Pages that were in the cache.
    pub known: Work,
    /// All others but those of zeros.
    pub fresh: Work,
    /// Pages of zeros.
    pub zeros: Work,
    /// Beside a trial of the plan: pages that went as they were, those of zeros not among them.
    pub rest: Work,
    /// How many threads worked on pages at a time.
    pub threads: f64,
    /// Bytes sent and how long the link took for them, until the answer; `None` if that is not known.
    pub transfer: Option<(u64, Duration)>,
    /// From the first page to the answer.
    pub whole: Option<Duration>,
    /// CPUs of the host that had nothing to do.
    pub spare_cpus: f64,
}

impl Seen {
    /// Pages with content that were encoded as the plan says.
    pub fn encoded(&self) -> u64 {
        self.known.pages + self.fresh.pages
    }
}

/// A change of plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Before.
    pub from: Plan,
    /// From now on.
    pub to: Plan,
    /// Why, for the log and the status.
    pub reason: String,
}

/// A page's cost, on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cost {
    pub(super) nanos: f64,
    pub(super) bytes: f64,
}

pub(super) const RECORD: f64 = (RECORD_HEADER_BYTES + PAGE_BYTES) as f64;

/// What pages cost usually: known ones, others, zeros. Measured with the crate's own encoder; see docs/PERFORMANCE.md.
pub(super) const USUAL: [[Cost; 3]; 5] = {
    const fn cost(nanos: f64, share: f64) -> Cost {
        Cost { nanos, bytes: RECORD * share }
    }
    const HEADER: f64 = RECORD_HEADER_BYTES as f64 / RECORD;
    [
        [cost(60.0, 1.0), cost(60.0, 1.0), cost(0.0, HEADER)],
        [cost(5000.0, 0.55), cost(5000.0, 0.55), cost(50.0, HEADER)],
        [cost(900.0, 0.25), cost(500.0, 1.0), cost(400.0, HEADER)],
        [cost(1700.0, 0.22), cost(5400.0, 0.55), cost(400.0, HEADER)],
        [cost(1900.0, 0.18), cost(5200.0, 0.55), cost(400.0, HEADER)],
    ]
};

/// Seconds that an epoch usually takes beyond what its parts let expect, for each page.
pub(super) const USUAL_EXTRA: [f64; 5] = [0.0, 0.5e-6, 0.2e-6, 0.4e-6, 0.3e-6];

/// Usual share of known pages.
pub(super) const USUAL_KNOWN: f64 = 0.7;
