//! Time from the first message of an epoch to its acknowledgement, over loopback, against plain TCP of the same bytes
//! with a one-byte answer.
//!
//! `cargo xtask bench transfer --json FILE`, or `cargo bench -p understudy-backup --bench loopback -- [--json FILE] [--decode-threads N]`
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use support::*;
use understudy_proto::epoch::EpochKind::{self, Delta, Full};
use understudy_proto::pool::Pool;
use understudy_proto::units::PAGE_BYTES;

const ROUNDS: usize = 30;

/// Part of plain TCP's speed that an epoch of 64 MiB should reach.
const GOAL: f64 = 0.7;

/// Pages with content that no codec could shorten, all different.
fn pages(count: u64, salt: u64) -> Vec<Page> {
    (0..count)
        .map(|i| {
            let mut content = Box::new([0; PAGE_BYTES]);
            let mut state = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt;
            for word in content.as_chunks_mut::<8>().0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            (0, i, Some(content))
        })
        .collect()
}

async fn epochs(
    guest_pages: u64,
    epoch_pages: u64,
    kind: EpochKind,
    threads: usize,
) -> (Vec<Duration>, Vec<bytes::Bytes>) {
    let backup = Backup::with_threads(threads).await;
    let layout = layout(&[guest_pages]);
    let mut primary = Primary::connect(&backup, hello(1)).await.unwrap();
    primary.commit(&Epoch::new(at(1, 1), Full, &layout, &pages(guest_pages, 0), &[1; 150_000])).await;
    let (mut times, mut frames) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS as u64 {
        let epoch =
            Epoch::new(at(1, round + 2), kind, &layout, &pages(epoch_pages, round + 1), &[1; 150_000]);
        let began = Instant::now();
        primary.commit(&epoch).await;
        times.push(began.elapsed());
        frames = epoch.frames;
    }
    (times, frames)
}

fn plain_tcp(frames: &[bytes::Bytes]) -> Vec<Duration> {
    let total: usize = frames.iter().map(bytes::Bytes::len).sum();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let receiver = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.set_nodelay(true).unwrap();
        let mut buffer = vec![0; 1 << 20];
        for _ in 0..ROUNDS {
            let mut left = total;
            while left > 0 {
                let most = left.min(buffer.len());
                left -= socket.read(&mut buffer[..most]).unwrap();
            }
            socket.write_all(&[1]).unwrap();
        }
    });
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    let times = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            frames.iter().for_each(|f| socket.write_all(f).unwrap());
            socket.read_exact(&mut [0]).unwrap();
            began.elapsed()
        })
        .collect();
    receiver.join().unwrap();
    times
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    let argument = |name| arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1));
    let json = argument("--json");
    let threads = argument("--decode-threads").map_or_else(Pool::usual_threads, |n| n.parse().unwrap());
    // As in the agent, whose process this is, and the primary's.
    understudy_backup::host::keep_freed_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (mut rows, mut goals) = (Vec::new(), Vec::new());
    for (name, guest_pages, epoch_pages, kind) in [
        ("full 64 MiB", 16384, 16384, Full),
        ("delta 60 MiB", 16384, 15360, Delta),
        ("delta 4 MiB", 16384, 1024, Delta),
        ("delta 64 KiB", 16384, 16, Delta),
    ] {
        let (times, frames) = runtime.block_on(epochs(guest_pages, epoch_pages, kind, threads));
        let mut medians = Vec::new();
        for (subject, mut times) in [("understudy", times), ("raw", plain_tcp(&frames))] {
            times.sort();
            let ms = |d: Duration| d.as_secs_f64() * 1000.0;
            let (median, p99) = (ms(times[ROUNDS / 2]), ms(times[ROUNDS * 99 / 100]));
            medians.push(median);
            println!("{name:14} {subject:12} median {median:8.3} ms   p99 {p99:8.3} ms");
            rows.push(serde_json::json!({
                "name": name, "subject": subject, "unit": "ms", "n": ROUNDS, "median": median, "p99": p99
            }));
        }
        if let ([understudy, raw], true) = (&medians[..], epoch_pages >= 15360) {
            let (value, goal) = (raw / understudy, format!("{name}, part of plain TCP's speed"));
            println!("goal: {goal}: at least {GOAL}, is {value:.3}");
            goals.push(serde_json::json!({
                "name": goal, "bound": "at least", "limit": GOAL, "value": value, "met": value >= GOAL
            }));
        }
    }
    if let Some(file) = json {
        let cpus = std::thread::available_parallelism().map_or(0, |n| n.get());
        let report = serde_json::json!({
            "bench": "transfer",
            "command": "cargo xtask bench transfer",
            "host": { "cpus": cpus },
            "decode_threads": threads,
            "rows": rows,
            "goals": goals,
        });
        std::fs::write(file, report.to_string()).unwrap();
    }
}
