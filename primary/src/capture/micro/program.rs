//! What the guest's program does, told a second time and independently, so that its memory can be checked.
//!
//! Each step writes one page of the first `written` pages in turn; a round writes every one of them. The number of
//! steps taken decides the whole content of memory: see [`expected_page`]. The steps are counted by the integer
//! registers, by the FPU and by the vector registers, each written to every page, so that none of them can be lost
//! unseen.

use understudy_proto::units::{PAGE_BYTES, PageData};

/// Rounds whose steps a page remembers.
pub const SLOTS: u64 = SLOT_COUNT as u64;

const SLOT_COUNT: usize = 448;

/// Where the rounds' steps begin in a page.
const SLOTS_OFFSET: usize = 64;

/// Where the part of a page begins that the program never writes.
const UNTOUCHED_OFFSET: usize = SLOTS_OFFSET + 8 * SLOT_COUNT;

/// The chain: `x -> x * CHAIN_FACTOR + CHAIN_STEP`, once a step.
pub(super) const CHAIN_FACTOR: u64 = 0x5851_f42d_4c95_7f2d;
/// See [`CHAIN_FACTOR`].
pub(super) const CHAIN_STEP: u64 = 0x1405_7b7e_f767_814f;

/// What every step adds to the sums in the vector registers; the last two are in the half only AVX knows.
pub(super) const LANES: [u64; 4] = [1, 3, 0x1_0000_0001, 7];

/// The chain after so many steps.
fn chain(mut steps: u64) -> u64 {
    // Squares the affine step, as one squares in a power.
    let (mut factor, mut add) = (CHAIN_FACTOR, CHAIN_STEP);
    let mut value = 0u64;
    while steps > 0 {
        if steps & 1 == 1 {
            value = value.wrapping_mul(factor).wrapping_add(add);
        }
        add = add.wrapping_mul(factor).wrapping_add(add);
        factor = factor.wrapping_mul(factor);
        steps >>= 1;
    }
    value
}

/// A page before the program has run: only the part it never writes is not zero.
pub fn initial_page(page: u64) -> PageData {
    let mut content = [0; PAGE_BYTES];
    let mark = (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for word in content[UNTOUCHED_OFFSET..].chunks_exact_mut(8) {
        word.copy_from_slice(&mark.to_le_bytes());
    }
    content
}

/// A page after `rounds` whole rounds over `written` pages.
pub fn expected_page(page: u64, written: u64, rounds: u64) -> PageData {
    let mut content = initial_page(page);
    if page >= written || rounds == 0 {
        return content;
    }
    let step = |round: u64| round * written + page + 1;
    let last = step(rounds - 1);
    let mut put = |offset: usize, value: u64| {
        content[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(0, last);
    put(8, chain(last));
    put(16, last);
    for (lane, each) in LANES.iter().enumerate() {
        put(32 + 8 * lane, each.wrapping_mul(last));
    }
    for round in rounds.saturating_sub(SLOTS)..rounds {
        let slot = usize::try_from(round % SLOTS).unwrap_or_default();
        put(SLOTS_OFFSET + 8 * slot, step(round));
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_in_one_go_is_the_chain_step_by_step() {
        let mut value = 0u64;
        for steps in 0..1000 {
            assert_eq!(chain(steps), value);
            value = value.wrapping_mul(CHAIN_FACTOR).wrapping_add(CHAIN_STEP);
        }
    }

    #[test]
    fn a_page_remembers_the_last_rounds() {
        let page = expected_page(2, 5, SLOTS + 1);
        let slot = |n: usize| u64::from_le_bytes(page[64 + 8 * n..72 + 8 * n].try_into().unwrap());
        assert_eq!((slot(0), slot(1)), (SLOTS * 5 + 3, 5 + 3));
        assert_eq!(expected_page(5, 5, 9), initial_page(5));
    }
}
