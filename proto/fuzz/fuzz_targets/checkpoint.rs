//! Any bytes as checkpoints, whole and cut: the outcome is the same, and no panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let whole = understudy_proto_fuzz::read_checkpoints(data, data.len());
    let piece_bytes = 1 + data.len() % 61;
    assert_eq!(whole, understudy_proto_fuzz::read_checkpoints(data, piece_bytes));
});
