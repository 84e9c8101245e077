//! Every backend against the byte-wise oracle, and so against each other.

#![allow(clippy::unwrap_used)]

mod common;

use proptest::collection::vec;
use proptest::prelude::*;
use xbzrle::{Backend, MAX_ENCODED_BYTES, MAX_GAP, Outcome, PAGE_BYTES, Page, decode};

/// Both versions hold to everything this crate promises of them.
fn check(old: &Page, new: &Page) {
    let expected = common::encode(old, new, MAX_GAP);
    for backend in Backend::available() {
        let name = backend.name();
        assert_eq!(backend.encoded_bytes(old, new), expected.len(), "{name}");
        let mut out = [0xee; MAX_ENCODED_BYTES];
        let outcome = backend.encode(old, new, &mut out);
        if old == new {
            assert_eq!((outcome, expected.len()), (Outcome::Unchanged, 0), "{name}");
            continue;
        }
        assert_eq!(outcome, Outcome::Encoded(expected.len()), "{name}");
        assert!(out[..expected.len()] == expected, "{name} writes other bytes");
        // A buffer that is just long enough, and every kind of too short one.
        let mut exact = vec![0; expected.len()];
        assert_eq!(backend.encode(old, new, &mut exact), outcome, "{name}");
        assert!(exact == expected, "{name} writes other bytes into a buffer without room to spare");
        for len in [0, 1, 2, 3, expected.len() / 2, expected.len() - 1] {
            if len < expected.len() {
                let short = &mut exact[..len];
                assert_eq!(backend.encode(old, new, short), Outcome::DoesNotPay, "{name}, {len} bytes");
            }
        }
    }
    assert!(common::decode(&expected, old).unwrap() == *new, "the oracle does not give the page back");
    let mut page = *old;
    decode(&expected, &mut page).unwrap();
    assert!(page == *new, "decoding does not give the page back");
    // QEMU's own encoding, that of no gap, is read as well.
    let mut page = *old;
    decode(&common::encode(old, new, 0), &mut page).unwrap();
    assert!(page == *new, "decoding QEMU's encoding does not give the page back");
}

fn page() -> impl Strategy<Value = Page> {
    prop_oneof![
        Just([0; PAGE_BYTES]),
        any::<u8>().prop_map(|b| [b; PAGE_BYTES]),
        vec(any::<u8>(), PAGE_BYTES).prop_map(|v| v.try_into().unwrap()),
    ]
}

/// Lengths at which something changes: words of 8, 32, 64 bytes, the gap that is closed, the longest one-byte length.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1usize..=10,
        2 => prop::sample::select(vec![15, 16, 17, 31, 32, 33, 63, 64, 65, 126, 127, 128, 129, 255, 256, 1000]),
        1 => 1usize..=4096,
    ]
}

/// A page with runs of changes at given distances.
fn edited() -> impl Strategy<Value = (Page, Page)> {
    (page(), 0usize..70, vec((length(), length(), any::<bool>()), 0..200)).prop_map(|(old, start, edits)| {
        let (mut new, mut at) = (old, start);
        for (run, gap, every) in edits {
            for byte in new.iter_mut().skip(at).take(run).step_by(if every { 1 } else { 2 }) {
                *byte ^= 0x41;
            }
            at += run + gap;
        }
        (old, new)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_two_pages(old in page(), new in page()) {
        check(&old, &new);
    }

    #[test]
    fn runs_of_every_length((old, new) in edited()) {
        check(&old, &new);
    }

    #[test]
    fn scattered_bytes(old in page(), places in vec((0..PAGE_BYTES, 1u8..), 0..600)) {
        let mut new = old;
        places.iter().for_each(|(at, change)| new[*at] ^= change);
        check(&old, &new);
    }

    #[test]
    fn any_bytes_decode_as_in_qemu(
        old in page(),
        pairs in vec((prop_oneof![0u8..4, any::<u8>()], 0u8..40, vec(any::<u8>(), 0..40)), 0..60),
        cut in 0usize..3,
    ) {
        // Mostly valid: lengths that fit the bytes that follow, then cut or with a length that does not.
        let mut encoded: Vec<u8> = pairs
            .iter()
            .flat_map(|(gap, run, bytes)| {
                let run = if *run < 36 { u8::try_from(bytes.len()).unwrap() } else { *run };
                [&[*gap, run][..], bytes].concat()
            })
            .collect();
        encoded.truncate(encoded.len().saturating_sub(cut));
        let mut page = old;
        let decoded = decode(&encoded, &mut page);
        let expected = common::decode(&encoded, &old);
        prop_assert_eq!(decoded.is_ok(), expected.is_some(), "{:?}", decoded);
        if let Some(expected) = expected {
            prop_assert!(page == expected);
        }
    }
}

/// A run that begins and ends anywhere, alone on its page.
#[test]
fn every_single_run() {
    let old = [0x55; PAGE_BYTES];
    for from in (0..200).chain(4000..PAGE_BYTES) {
        for to in [from + 1, from + 7, from + 8, from + 64, from + 127, from + 128, from + 129, PAGE_BYTES] {
            let mut new = old;
            new[from..to.min(PAGE_BYTES)].fill(0xaa);
            check(&old, &new);
        }
    }
}

/// The shortest and the longest there is.
#[test]
fn the_limits() {
    let (old, new) = ([0; PAGE_BYTES], [1; PAGE_BYTES]);
    check(&old, &old);
    check(&old, &new);
    let mut out = [0; MAX_ENCODED_BYTES];
    assert_eq!(xbzrle::encode(&old, &new, &mut out), Outcome::Encoded(MAX_ENCODED_BYTES));
    // One byte in nine: as many pairs as there can be.
    let mut sparse = old;
    sparse.iter_mut().step_by(MAX_GAP + 2).for_each(|byte| *byte = 1);
    check(&old, &sparse);
}
