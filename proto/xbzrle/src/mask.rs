//! Which bytes of a page differ, a bit for each, and the runs these make.

use crate::PAGE_BYTES;

/// Words of a mask.
pub(crate) const WORDS: usize = PAGE_BYTES / 64;

/// Words of a mask with one of zeros before and behind, so that no word needs another rule.
pub(crate) const PADDED_WORDS: usize = WORDS + 2;

/// A set bit per byte that differs; byte 0 is the lowest bit of the second word.
pub(crate) type Mask = [u64; PADDED_WORDS];

/// The borders of runs: a set bit where a run begins, and one where it ends (behind its last byte).
pub(crate) struct Borders {
    /// A word per 64 bytes. The end of a run that reaches the page's end is not in it.
    words: [u64; WORDS],
    /// A set bit per word of `words` that is not 0.
    used: u64,
    /// Bytes in runs.
    pub(crate) run_bytes: usize,
    /// Runs.
    pub(crate) runs: usize,
}

/// Eight bytes' worth of a mask, without vector instructions: a bit per byte of `x` that is not 0.
pub(crate) const fn nonzero_bytes(x: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    // The top bit of each byte that is not 0 ...
    let top = (((x & LOW) + LOW) | x) & !LOW;
    // ... gathered: the product has bit k of the result at 56 + k, and no two summands meet.
    (top >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// The mask of two pages, eight bytes at a time.
pub(crate) fn portable(old: &crate::Page, new: &crate::Page) -> Mask {
    let mut mask = [0; PADDED_WORDS];
    let ((old, _), (new, _)) = (old.as_chunks::<64>(), new.as_chunks::<64>());
    for ((word, old), new) in mask[1..].iter_mut().zip(old).zip(new) {
        if old == new {
            continue;
        }
        let ((old, _), (new, _)) = (old.as_chunks::<8>(), new.as_chunks::<8>());
        for (i, (old, new)) in old.iter().zip(new).enumerate() {
            *word |= nonzero_bytes(u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new)) << (8 * i);
        }
    }
    mask
}

/// `word` with every set bit set in the seven places above it as well; `before` is the word before it.
#[inline(always)]
const fn widened(before: u64, word: u64) -> u64 {
    // Doubling: by one place, by two, by four. What is shifted out of `before` is exact, its lower bits are not needed.
    let (b1, w1) = (before | before << 1, word | word << 1 | before >> 63);
    let (b2, w2) = (b1 | b1 << 2, w1 | w1 << 2 | b1 >> 62);
    w2 | w2 << 4 | b2 >> 60
}

/// The bits of `word` that are set and have the seven above them set too; `after` is the word behind it.
#[inline(always)]
const fn narrowed(word: u64, after: u64) -> u64 {
    let (w1, a1) = (word & (word >> 1 | after << 63), after & after >> 1);
    let (w2, a2) = (w1 & (w1 >> 2 | a1 << 62), a1 & a1 >> 2);
    w2 & (w2 >> 4 | a2 << 60)
}

impl Borders {
    /// The runs of a mask, with gaps up to [`crate::MAX_GAP`] closed: widening and narrowing by seven bits sets exactly
    /// the bits of such gaps. Loops without a branch, for the compiler to do many words at a time.
    #[inline(always)]
    pub(crate) fn of(mask: &Mask) -> Self {
        let mut wide = [0; PADDED_WORDS];
        for (wide, pair) in wide[1..].iter_mut().zip(mask.array_windows()) {
            let [before, word]: &[u64; 2] = pair;
            *wide = widened(*before, *word);
        }
        // One word of zeros before the first, as in the mask.
        let mut closed = [0; WORDS + 1];
        for (closed, [word, after]) in closed[1..].iter_mut().zip(wide[1..].array_windows()) {
            *closed = narrowed(*word, *after);
        }
        let mut borders = Self { words: [0; WORDS], used: 0, run_bytes: 0, runs: 0 };
        for (border, [before, word]) in borders.words.iter_mut().zip(closed.array_windows()) {
            *border = word ^ (word << 1 | before >> 63);
        }
        let mut edges = 0;
        for (i, (border, closed)) in borders.words.iter().zip(&closed[1..]).enumerate() {
            borders.used |= u64::from(*border != 0) << i;
            borders.run_bytes += closed.count_ones() as usize;
            edges += border.count_ones() as usize;
        }
        borders.runs = edges.div_ceil(2);
        borders
    }

    /// Gives every run to `run` as its first byte and the byte behind it, until it says false.
    #[inline(always)]
    pub(crate) fn each(&self, mut run: impl FnMut(usize, usize) -> bool) {
        let (mut start, mut used) = (None, self.used);
        while used != 0 {
            let i = used.trailing_zeros() as usize;
            used &= used - 1;
            let mut word = self.words[i % WORDS];
            while word != 0 {
                let at = i * 64 + word.trailing_zeros() as usize;
                word &= word - 1;
                start = match start {
                    None => Some(at),
                    Some(from) if run(from, at) => None,
                    Some(_) => return,
                };
            }
        }
        if let Some(from) = start {
            run(from, PAGE_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_that_is_not_zero_has_its_bit() {
        for bits in 0..=255u64 {
            for value in [1u64, 0x7f, 0x80, 0xff] {
                let x = (0..8).filter(|i| bits >> i & 1 == 1).map(|i| value << (8 * i)).sum();
                assert_eq!(nonzero_bytes(x), bits, "{x:016x}");
            }
        }
    }

    fn runs(changed: &[usize]) -> (Vec<(usize, usize)>, usize, usize) {
        let mut mask = [0; PADDED_WORDS];
        changed.iter().for_each(|at| mask[1 + at / 64] |= 1 << (at % 64));
        let borders = Borders::of(&mask);
        let mut runs = vec![];
        borders.each(|from, to| {
            runs.push((from, to));
            true
        });
        (runs, borders.runs, borders.run_bytes)
    }

    #[test]
    fn gaps_up_to_seven_are_closed_and_longer_ones_stay() {
        for start in [0, 1, 50, 55, 56, 57, 60, 63, 64, 4000] {
            for gap in 1..=20 {
                let expected = match gap {
                    ..=7 => vec![(start, start + gap + 2)],
                    _ => vec![(start, start + 1), (start + gap + 1, start + gap + 2)],
                };
                let bytes = expected.iter().map(|(from, to)| to - from).sum();
                assert_eq!(runs(&[start, start + gap + 1]), (expected.clone(), expected.len(), bytes));
            }
        }
    }

    #[test]
    fn runs_at_the_borders_of_a_page() {
        assert_eq!(runs(&[]), (vec![], 0, 0));
        assert_eq!(runs(&[0]), (vec![(0, 1)], 1, 1));
        assert_eq!(runs(&[7]), (vec![(7, 8)], 1, 1));
        assert_eq!(runs(&[4095]), (vec![(4095, 4096)], 1, 1));
        assert_eq!(runs(&[4087, 4095]), (vec![(4087, 4096)], 1, 9));
        assert_eq!(runs(&[4086, 4095]), (vec![(4086, 4087), (4095, 4096)], 2, 2));
        assert_eq!(runs(&(0..4096).collect::<Vec<_>>()), (vec![(0, 4096)], 1, 4096));
    }
}
