//! What a stream announces is not allocated before it is there. A binary of its own, with one test: the
//! allocator counts for the whole process.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use std::sync::Arc;
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::qemu::{EndSeen, IncomingWriter, PrecopyReader, StreamError};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Far more than a few streams of a few KiB need, far less than any announced length of four bytes.
const ALLOWED_BYTES: usize = 1 << 20;

const DEVICE: &[u8] = b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02payload\x7e\0\0\0\x05\0";

fn stream() -> Vec<u8> {
    let blocks = vec![RamBlock { name: "pc.ram".into(), used_bytes: 1 << 30 }];
    let config = b"\0\0\0\x0apc-q35-7.2\x05\x12configuration/uuid\0\0\0\x010123456789abcdef".to_vec();
    let layout = Arc::new(MemoryLayout::new(blocks, config, 2).unwrap());
    IncomingWriter::new(vec![], layout).unwrap().finish(DEVICE).unwrap().0
}

/// A checkpoint without pages.
fn checkpoint() -> Vec<u8> {
    let mut v = b"\0\0\0\x01\0\0\0\x03\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0\0\0\0\x04".to_vec();
    v.extend((DEVICE.len() as u64).to_be_bytes());
    v.extend(DEVICE);
    v
}

fn read(precopy: &[u8], checkpoint: &[u8]) -> Result<(), StreamError> {
    let mut reader = PrecopyReader::new();
    let mut input = precopy;
    while reader.read(&mut input)?.is_some() {}
    let mut reader = reader.finish(EndSeen::ColoState)?.checkpoints;
    let mut input = checkpoint;
    while reader.read(&mut input)?.is_some() {}
    Ok(())
}

#[test]
fn announced_lengths_are_not_allocated() {
    let precopy = stream();
    let whole = [precopy.clone(), checkpoint()].concat();
    read(&precopy, &checkpoint()).unwrap();
    proptest!(ProptestConfig::with_cases(4000), |(at in any::<prop::sample::Index>(), bytes in any::<[u8; 4]>())| {
        let mut damaged = whole.clone();
        let at = at.index(whole.len() - 4);
        damaged[at..at + 4].copy_from_slice(&bytes);
        let (precopy, checkpoint) = damaged.split_at(precopy.len());
        ALLOCATOR.reset_peak_usage();
        let before = ALLOCATOR.current_usage();
        let _ = read(precopy, checkpoint);
        let peak = ALLOCATOR.peak_usage() - before;
        prop_assert!(peak < ALLOWED_BYTES, "{} bytes allocated at once", peak);
    });
}
