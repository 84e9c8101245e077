//! The format once more, a byte at a time, written from its description: what the crate is measured against.

use xbzrle::{PAGE_BYTES, Page};

fn push_length(out: &mut Vec<u8>, value: usize) {
    if value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
    }
    out.push(u8::try_from(if value >= 0x80 { value >> 7 } else { value }).unwrap());
}

/// Encodes, sending along unchanged gaps of at most `max_gap` bytes. With 0 it is byte for byte what QEMU writes.
pub(crate) fn encode(old: &Page, new: &Page, max_gap: usize) -> Vec<u8> {
    let (mut out, mut at, mut done) = (vec![], 0, 0);
    while at < PAGE_BYTES {
        if old[at] == new[at] {
            at += 1;
            continue;
        }
        let from = at;
        // Behind the last changed byte of the run.
        let mut to = at + 1;
        while at < PAGE_BYTES && at <= to + max_gap {
            if old[at] != new[at] {
                to = at + 1;
            }
            at += 1;
        }
        push_length(&mut out, from - done);
        push_length(&mut out, to - from);
        out.extend_from_slice(&new[from..to]);
        done = to;
        at = to;
    }
    out
}

/// Decodes by QEMU's rules; `None` is a refusal.
pub(crate) fn decode(encoded: &[u8], old: &Page) -> Option<Page> {
    let mut page = *old;
    let (mut at, mut place) = (0usize, 0usize);
    let length = |at: &mut usize| -> Option<usize> {
        // Two bytes must be left wherever a length is.
        if encoded.len() - *at < 2 {
            return None;
        }
        let first = usize::from(encoded[*at]);
        *at += 1;
        if first & 0x80 == 0 {
            return Some(first);
        }
        let second = usize::from(encoded[*at]);
        *at += 1;
        (second & 0x80 == 0).then_some((first & 0x7f) + second * 128)
    };
    while at < encoded.len() {
        let is_first = at == 0;
        let gap = length(&mut at)?;
        if gap == 0 && !is_first {
            return None;
        }
        place += gap;
        if place > PAGE_BYTES {
            return None;
        }
        let run = length(&mut at)?;
        if run == 0 || place + run > PAGE_BYTES || at + run > encoded.len() {
            return None;
        }
        for _ in 0..run {
            page[place] = encoded[at];
            (place, at) = (place + 1, at + 1);
        }
    }
    Some(page)
}
