//! Any bytes as an encoded page, the first one as what the page was filled with. No panic; what decodes gives a page
//! whose difference every backend encodes alike, and which decodes to it again.
#![no_main]

use xbzrle::{Backend, MAX_ENCODED_BYTES, Outcome, PAGE_BYTES};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((fill, encoded)) = data.split_first() else { return };
    let mut old = [*fill; PAGE_BYTES];
    // So that gaps are told from runs that happen to hold the same.
    old.iter_mut().step_by(3).for_each(|byte| *byte ^= 0x5a);
    let mut new = old;
    if xbzrle::decode(encoded, &mut new).is_err() {
        return;
    }
    for backend in Backend::available() {
        let mut out = [0; MAX_ENCODED_BYTES];
        let bytes = match backend.encode(&old, &new, &mut out) {
            Outcome::Encoded(bytes) => bytes,
            Outcome::Unchanged => 0,
            Outcome::DoesNotPay => panic!("longer than the longest encoding"),
        };
        assert_eq!(bytes, backend.encoded_bytes(&old, &new));
        assert_eq!(bytes == 0, old == new);
        let mut again = old;
        xbzrle::decode(&out[..bytes], &mut again).expect("our own encoding");
        assert!(again == new);
    }
});
