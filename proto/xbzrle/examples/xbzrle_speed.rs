//! How fast pages are encoded, against a plain byte-wise encoder and `memcpy`, all in one run.
//!
//! `cargo run --release -p xbzrle --example xbzrle_speed [PAIRS]`
//!
//! PAIRS is a file of page pairs, old then new, 4096 bytes each. Without it the pages are made: kinds of changes as guests
//! make them, from a fixed seed. Rounds of all subjects are interleaved and the median counts, so that a busy machine
//! slows all alike.

use std::hint::black_box;
use std::time::Instant;

use xbzrle::{Backend, MAX_ENCODED_BYTES, Outcome, PAGE_BYTES, Page};

/// Pairs of each kind: more than the caches hold.
const COLD_PAIRS: usize = 4096;
/// Of these the first so many fit into the second-level cache.
const HOT_PAIRS: usize = 64;
const ROUNDS: usize = 15;
/// What an encoding may cost: three quarters of a page.
const LIMIT: usize = PAGE_BYTES * 3 / 4;

#[repr(align(4096))]
#[derive(Clone)]
struct Aligned(Page);

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap_or(0) % below
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.next(256)).unwrap_or(0)
    }
}

type Pairs = Vec<(Aligned, Aligned)>;

fn pairs(random: &mut Random, mut change: impl FnMut(&mut Random, &mut Page)) -> Pairs {
    let mut pair = |random: &mut Random| {
        let mut old = [0; PAGE_BYTES];
        // As in a heap: words, half of their bytes 0.
        old.iter_mut().for_each(|byte| *byte = random.byte());
        old.chunks_mut(8).for_each(|word| word[4..].fill(0));
        let mut new = old;
        change(random, &mut new);
        (Aligned(old), Aligned(new))
    };
    (0..COLD_PAIRS).map(|_| pair(random)).collect()
}

fn write(random: &mut Random, page: &mut Page, len: usize, times: usize) {
    for _ in 0..times {
        let at = random.next(PAGE_BYTES - len);
        page[at..at + len].iter_mut().for_each(|byte| *byte = random.byte());
    }
}

fn kinds() -> Vec<(&'static str, Pairs)> {
    let mut random = Random(0x5eed_5eed_5eed);
    let r = &mut random;
    let mut kinds: Vec<(&'static str, Pairs)> = vec![
        ("a few words", pairs(r, |r, page| write(r, page, 8, 4))),
        (
            "counters",
            pairs(r, |r, page| {
                for at in (0..PAGE_BYTES).step_by(64) {
                    page[at] = page[at].wrapping_add(1);
                    page[at + 8] ^= r.byte() | 1;
                }
            }),
        ),
        ("rows of 16 bytes", pairs(r, |r, page| write(r, page, 16, 6))),
        ("records", pairs(r, |r, page| write(r, page, 120, 8))),
        ("text moved", pairs(r, |r, page| page.copy_within(0..3000, 1 + r.next(40)))),
        ("half new", pairs(r, |r, page| write(r, page, 2048, 1))),
        ("all new", pairs(r, |r, page| page.iter_mut().for_each(|byte| *byte = r.byte()))),
        ("unchanged", pairs(r, |_, _| ())),
    ];
    // Shares as of the recorded guests: most dirty pages change little.
    let shares = [("a few words", 8), ("counters", 3), ("rows of 16 bytes", 6), ("records", 3)];
    let rest = [("text moved", 2), ("half new", 1), ("all new", 2), ("unchanged", 3)];
    let mut mix = vec![];
    let of = |name: &str| kinds.iter().find(|(kind, _)| *kind == name).map(|(_, pairs)| pairs);
    for i in 0..COLD_PAIRS {
        let mut at = (i * 11) % 28;
        for (name, share) in shares.iter().chain(&rest) {
            if at < *share {
                mix.extend(of(name).map(|pairs| pairs[i].clone()));
                break;
            }
            at = at.wrapping_sub(*share);
        }
    }
    kinds.push(("mix", mix));
    kinds
}

fn recorded(path: &str) -> std::io::Result<Vec<(&'static str, Pairs)>> {
    let bytes = std::fs::read(path)?;
    let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
    let pairs = pages.as_chunks::<2>().0.iter().map(|[old, new]| (Aligned(*old), Aligned(*new)));
    Ok(vec![("recorded", pairs.collect())])
}

fn low(value: usize) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

/// The format, one byte at a time: what a first implementation looks like.
fn plain(old: &Page, new: &Page, out: &mut [u8]) -> Outcome {
    let (mut at, mut written) = (0, 0);
    let length = |out: &mut [u8], written: &mut usize, value: usize| {
        let bytes = [low(value & 0x7f) | if value < 128 { 0 } else { 0x80 }, low(value >> 7)];
        for byte in &bytes[..1 + usize::from(value >= 128)] {
            let Some(to) = out.get_mut(*written) else { return false };
            (*to, *written) = (*byte, *written + 1);
        }
        true
    };
    while at < PAGE_BYTES {
        let start = at;
        while at < PAGE_BYTES && old[at] == new[at] {
            at += 1;
        }
        if at == PAGE_BYTES {
            break;
        }
        let from = at;
        while at < PAGE_BYTES && old[at] != new[at] {
            at += 1;
        }
        if !length(out, &mut written, from - start) || !length(out, &mut written, at - from) {
            return Outcome::DoesNotPay;
        }
        let Some(to) = out.get_mut(written..written + at - from) else { return Outcome::DoesNotPay };
        to.copy_from_slice(&new[from..at]);
        written += at - from;
    }
    if written == 0 { Outcome::Unchanged } else { Outcome::Encoded(written) }
}

type Encode = Box<dyn Fn(&Page, &Page, &mut [u8]) -> Outcome>;

struct Subject {
    name: String,
    encode: Encode,
}

fn subjects() -> Vec<Subject> {
    let copy = |_: &Page, new: &Page, out: &mut [u8]| {
        out[..PAGE_BYTES].copy_from_slice(new);
        Outcome::DoesNotPay
    };
    let bytes = |old: &Page, new: &Page, out: &mut [u8]| plain(old, new, &mut out[..LIMIT]);
    let subject = |name: &str, encode: Encode| Subject { name: name.to_owned(), encode };
    let mut subjects = vec![subject("memcpy", Box::new(copy)), subject("byte-wise", Box::new(bytes))];
    for backend in Backend::available() {
        let encode =
            move |old: &Page, new: &Page, out: &mut [u8]| backend.encode(old, new, &mut out[..LIMIT]);
        subjects.push(subject(backend.name(), Box::new(encode)));
    }
    subjects
}

/// Seconds of a round, and bytes out.
fn round(pairs: &[(Aligned, Aligned)], times: usize, subject: &Subject, out: &mut [u8]) -> (f64, usize) {
    let started = Instant::now();
    let mut bytes = 0;
    for _ in 0..times {
        bytes = 0;
        for (old, new) in pairs {
            bytes += match (subject.encode)(black_box(&old.0), black_box(&new.0), out) {
                Outcome::Unchanged => 0,
                Outcome::Encoded(bytes) => bytes,
                Outcome::DoesNotPay => PAGE_BYTES,
            };
            black_box(&mut *out);
        }
    }
    (started.elapsed().as_secs_f64() / times as f64, bytes)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> std::io::Result<()> {
    let kinds = match std::env::args().nth(1) {
        Some(path) => recorded(&path)?,
        None => kinds(),
    };
    for cold in [false, true] {
        println!("\n{}", if cold { "pages from memory" } else { "pages in the second-level cache" });
        println!(
            "{:<17} {:<15} {:>7} {:>6} {:>12} {:>9}",
            "pages", "subject", "GB/s", "out %", "x byte-wise", "/ memcpy"
        );
        for (kind, pairs) in &kinds {
            table(kind, if cold { pairs } else { &pairs[..HOT_PAIRS.min(pairs.len())] }, cold);
        }
    }
    Ok(())
}

fn table(kind: &str, pairs: &[(Aligned, Aligned)], cold: bool) {
    let subjects = subjects();
    let (mut times, mut bytes) = (vec![vec![]; subjects.len()], vec![0; subjects.len()]);
    let mut out = vec![0; MAX_ENCODED_BYTES];
    for _ in 0..ROUNDS {
        for (i, subject) in subjects.iter().enumerate() {
            let (seconds, out_bytes) = round(pairs, if cold { 1 } else { 8 }, subject, &mut out);
            times[i].push(seconds);
            bytes[i] = out_bytes;
        }
    }
    let times: Vec<f64> = times.into_iter().map(median).collect();
    let page_bytes = (pairs.len() * PAGE_BYTES) as f64;
    for (i, subject) in subjects.iter().enumerate() {
        println!(
            "{kind:<17} {:<15} {:>7.2} {:>6.1} {:>12.2} {:>9.2}",
            subject.name,
            page_bytes / times[i] / 1e9,
            bytes[i] as f64 / page_bytes * 100.0,
            times[1] / times[i],
            times[0] / times[i],
        );
    }
    println!("{kind:<17} {:<15} {:>7.2}", "decode", decode_speed(pairs));
}

/// GB/s of pages decoded in place.
fn decode_speed(pairs: &[(Aligned, Aligned)]) -> f64 {
    let mut out = [0; MAX_ENCODED_BYTES];
    let encoded: Vec<_> = pairs
        .iter()
        .map(|(old, new)| match xbzrle::encode(&old.0, &new.0, &mut out) {
            Outcome::Encoded(bytes) => out[..bytes].to_vec(),
            _ => vec![],
        })
        .collect();
    let mut pages: Vec<_> = pairs.iter().map(|(old, _)| old.clone()).collect();
    let times = (0..ROUNDS).map(|_| {
        let started = Instant::now();
        for (page, encoded) in pages.iter_mut().zip(&encoded) {
            // Over the new version it gives the new version: rounds are alike.
            if xbzrle::decode(black_box(encoded), &mut page.0).is_err() {
                return f64::NAN;
            }
        }
        started.elapsed().as_secs_f64()
    });
    (pairs.len() * PAGE_BYTES) as f64 / median(times.collect()) / 1e9
}
