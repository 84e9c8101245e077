//! What a page costs: XBZRLE, a byte-wise encoder and `memcpy` over the same pages; LZ4; the page encoder as a whole.
//! Rounds of all subjects are interleaved, so that a busy machine slows all alike.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use understudy_proto::codec::{Lz4, PageEncoder};
use understudy_proto::units::{PAGE_BYTES, PageData};
use xbzrle::{Backend, MAX_ENCODED_BYTES, Outcome};

use crate::Report;
use crate::recorded::Recorded;
use crate::trace::{Epochs, Maker, Pages, Trace};
use crate::wire::RECORDED;

#[path = "../../../proto/xbzrle/tests/common/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "only its encoder is measured; it is a test's")]
mod bytewise;

/// A page before and after, each on its own page's border as in the cache.
type Pair = (Box<PageData>, Box<PageData>);

/// Epochs that pairs are taken from.
const EPOCHS: usize = 4;

/// Gives the bytes of a pair's encoding.
type Encode = Box<dyn FnMut(&PageData, &PageData) -> usize>;

struct Subject {
    name: &'static str,
    encode: Encode,
}

fn subjects() -> Vec<Subject> {
    let subject = |name, encode: Encode| Subject { name, encode };
    let mut out = vec![0; MAX_ENCODED_BYTES];
    let xbzrle = move |before: &PageData, now: &PageData| match Backend::best().encode(before, now, &mut out)
    {
        Outcome::Unchanged => 0,
        Outcome::Encoded(bytes) => bytes,
        Outcome::DoesNotPay => PAGE_BYTES,
    };
    let mut place = Box::new([0; PAGE_BYTES]);
    let copy = move |_: &PageData, now: &PageData| {
        place.copy_from_slice(now);
        black_box(&mut place);
        PAGE_BYTES
    };
    let mut lz4 = Lz4::new();
    let lz4 = move |_: &PageData, now: &PageData| lz4.compress(now).map_or(PAGE_BYTES, <[u8]>::len);
    let mut encoder = PageEncoder::new();
    let page =
        move |before: &PageData, now: &PageData| encoder.encode(Some(now), Some(before), true).payload.len();
    vec![
        subject("memcpy", Box::new(copy)),
        subject("byte-wise", Box::new(|before, now| bytewise::encode(before, now, 0).len())),
        subject("xbzrle", Box::new(xbzrle)),
        subject("lz4", Box::new(lz4)),
        subject("xbzrle, else lz4", Box::new(page)),
    ]
}

pub(crate) fn run(rounds: usize, threads_only: bool, traces: &Path) -> anyhow::Result<Report> {
    let only = if threads_only { " --threads-only" } else { "" };
    let mut report = Report::new("codec", format!("cargo xtask bench codec -- --rounds {rounds}{only}"));
    crate::threads::run(&mut report, rounds)?;
    if threads_only {
        return Ok(report);
    }
    for trace in Trace::ALL {
        let mut maker = Maker::new(trace, 0x5eed);
        let before = maker.all();
        let pairs = pairs(before, (0..EPOCHS).map(|_| maker.epoch()));
        measure(&mut report, trace.name(), &pairs, rounds, trace == Trace::Database);
    }
    // Every recorded page that was not sent before as it is.
    let mut mix = Vec::new();
    for (name, _) in RECORDED {
        let trace = Recorded::read(&traces.join(format!("{name}.trace.gz")))?;
        mix.extend(pairs(trace.base, trace.epochs.into_iter()));
    }
    measure(&mut report, "all recorded", &mix, rounds, true);
    Ok(report)
}

/// The subjects' speeds and sizes; with goals.
fn measure(report: &mut Report, name: &str, pairs: &[Pair], rounds: usize, with_goals: bool) {
    let bytes = (pairs.len() * PAGE_BYTES) as f64;
    let mut subjects = subjects();
    let (mut speeds, mut sizes) = (vec![Vec::new(); subjects.len()], vec![0; subjects.len()]);
    for _ in 0..rounds {
        for (at, subject) in subjects.iter_mut().enumerate() {
            let began = Instant::now();
            let encoded = pairs.iter().map(|(before, now)| (subject.encode)(black_box(before), now));
            sizes[at] = encoded.sum();
            speeds[at].push(bytes / began.elapsed().as_secs_f64() / 1e9);
        }
    }
    let medians: Vec<f64> = subjects
        .iter()
        .zip(speeds)
        .zip(sizes)
        .map(|((subject, speeds), size)| {
            report.row(name, &format!("{}, size", subject.name), "of raw", vec![size as f64 / bytes]);
            report.row(name, subject.name, "GB/s", speeds)
        })
        .collect();
    if let ([copy, plain, xbzrle, ..], true) = (&medians[..], with_goals) {
        report.at_least(&format!("XBZRLE against byte-wise, {name}"), 4.0, xbzrle / plain);
        report.at_least(&format!("XBZRLE against memcpy, {name}"), 0.25, xbzrle / copy);
    }
}

/// Every page of the epochs with what it was before.
fn pairs(memory: Pages, epochs: impl Iterator<Item = Pages>) -> Vec<Pair> {
    let mut memory: BTreeMap<u64, Box<PageData>> = memory.into_iter().collect();
    let mut pairs = Vec::new();
    for (number, now) in epochs.flatten() {
        let before = memory.insert(number, now.clone());
        pairs.extend(before.map(|before| (before, now)));
    }
    pairs
}
