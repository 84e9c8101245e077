//! How fast checkpoints are read, beside a plain copy of the same bytes:
//! `cargo run --release -p understudy-proto --example throughput`
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::qemu::{
    CheckpointEvent, CheckpointReader, EndSeen, IncomingWriter, PrecopyReader, StreamBuffer,
};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

const PAGES: u64 = 1000;
const READ_BYTES: usize = 1 << 20;
const ROUNDS: usize = 1000;
const DEVICE: &[u8] = b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02payload\x7e\0\0\0\x05\0";

/// A reader behind a precopy, and a checkpoint of [`PAGES`] pages, every tenth of zeros.
fn checkpoint() -> (CheckpointReader, Vec<u8>) {
    let ram = RamBlock { name: "pc.ram".into(), used_bytes: 1 << 30 };
    let layout = Arc::new(MemoryLayout::new(vec![ram], b"\0\0\0\x06pc-7.2".to_vec(), 2).unwrap());
    let write = |pages: u64| {
        let mut writer = IncomingWriter::new(vec![], Arc::clone(&layout)).unwrap();
        for i in 0..pages {
            let fill = u8::try_from(i % 10).unwrap();
            let content = (fill != 0).then_some([fill; PAGE_BYTES]);
            writer.page(BlockIndex(0), PageIndex::new(i * 7), content.as_ref()).unwrap();
        }
        writer.finish(DEVICE).unwrap().0
    };
    let empty = write(0);
    let mut reader = PrecopyReader::new();
    let mut input = &empty[..];
    while reader.read(&mut input).unwrap().is_some() {}
    let reader = reader.finish(EndSeen::ColoState).unwrap().checkpoints;
    let full = write(PAGES);
    let end_bytes = DEVICE.len() + 5;
    let memory = &full[empty.len() - end_bytes - 13 - 5..full.len() - end_bytes];
    let size = (DEVICE.len() as u64).to_be_bytes();
    (reader, [&[0, 0, 0, 1, 0, 0, 0, 3], memory, &[0, 0, 0, 0, 4], &size, DEVICE].concat())
}

/// Reads a checkpoint as from a socket whose bytes are already in the buffer; `page` sees every page.
fn read(reader: &mut CheckpointReader, input: &mut &[u8], mut page: impl FnMut(&[u8; PAGE_BYTES])) {
    while let Some(event) = reader.read(input).unwrap() {
        if let CheckpointEvent::Page(record) = event
            && let Some(content) = record.content
        {
            page(content);
        }
    }
}

fn median(mut action: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            action();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[ROUNDS / 2]
}

fn main() {
    let (mut reader, bytes) = checkpoint();
    let mut copy = vec![0; bytes.len()];
    let mut buffer = StreamBuffer::new(READ_BYTES);
    let mut arena = vec![0; bytes.len()];
    let rows = [
        ("copy of the same bytes", median(|| black_box(&mut copy[..]).copy_from_slice(black_box(&bytes)))),
        (
            "reading, pages looked at by address only",
            median(|| read(&mut reader, &mut &bytes[..], |page| _ = black_box(page))),
        ),
        (
            "reading, pages copied into an arena",
            median(|| {
                let mut at = 0;
                read(&mut reader, &mut &bytes[..], |page| {
                    arena[at..at + PAGE_BYTES].copy_from_slice(page);
                    at += PAGE_BYTES;
                });
                black_box(&mut arena);
            }),
        ),
        (
            "filling a buffer of 1 MiB and reading from it",
            median(|| {
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let space = buffer.space();
                    let count = space.len().min(rest.len());
                    space[..count].copy_from_slice(&rest[..count]);
                    rest = &rest[count..];
                    buffer.filled(count);
                    let mut input = buffer.unread();
                    read(&mut reader, &mut input, |page| _ = black_box(page));
                    let left = input.len();
                    buffer.keep(left);
                }
            }),
        ),
    ];
    println!("{} pages, {} bytes, median of {ROUNDS}:", PAGES, bytes.len());
    for (name, time) in rows {
        let per_page = time.as_nanos() as f64 / PAGES as f64;
        let rate = bytes.len() as f64 / time.as_nanos() as f64;
        println!("{per_page:8.1} ns a page  {rate:7.1} GB/s  {name}");
    }
}
