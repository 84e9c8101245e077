//! What a page costs: XBZRLE, a byte-wise encoder and `memcpy` over the same pages; LZ4; the page encoder as a whole.
//! Rounds of all subjects are interleaved, so that a busy machine slows all alike.

use std::hint::black_box;
use std::time::Instant;

use understudy_proto::codec::{Lz4, PageEncoder};
use understudy_proto::units::{PAGE_BYTES, PageData};
use xbzrle::{Backend, MAX_ENCODED_BYTES, Outcome};

use crate::Report;
use crate::trace::{Epochs, Maker, Trace};

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

pub(crate) fn run(rounds: usize, threads_only: bool) -> anyhow::Result<Report> {
    let only = if threads_only { " --threads-only" } else { "" };
    let mut report = Report::new("codec", format!("cargo xtask bench codec -- --rounds {rounds}{only}"));
    crate::threads::run(&mut report, rounds)?;
    for trace in Trace::ALL.into_iter().filter(|_| !threads_only) {
        let pairs = pairs(trace);
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
                report.row(
                    trace.name(),
                    &format!("{}, size", subject.name),
                    "of raw",
                    vec![size as f64 / bytes],
                );
                report.row(trace.name(), subject.name, "GB/s", speeds)
            })
            .collect();
        if let ([copy, plain, xbzrle, ..], Trace::Database) = (&medians[..], trace) {
            report.at_least("XBZRLE against byte-wise, database", 4.0, xbzrle / plain);
            report.at_least("XBZRLE against memcpy, database", 0.25, xbzrle / copy);
        }
    }
    Ok(report)
}

fn pairs(trace: Trace) -> Vec<Pair> {
    let mut maker = Maker::new(trace, 0x5eed);
    let mut pairs = Vec::new();
    for _ in 0..EPOCHS {
        let before = maker.all();
        for (number, now) in maker.epoch() {
            let before = usize::try_from(number).ok().and_then(|number| before.get(number));
            pairs.extend(before.map(|(_, before)| (before.clone(), now)));
        }
    }
    pairs
}
