//! AVX2 and AVX-512.

use std::arch::x86_64::{
    __m256i, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_cmpeq_epi8, _mm256_loadu_si256, _mm256_movemask_epi8,
    _mm512_cmpneq_epi8_mask, _mm512_loadu_si512,
};

use crate::encode::{Outcome, measure, write};
use crate::mask::{Mask, PADDED_WORDS, WORDS};
use crate::{PAGE_BYTES, Page};

const _: () = assert!(PAGE_BYTES == WORDS * 64);

/// How far ahead of what is compared the memory is asked for what comes then, in bytes. The processor's own look ahead ends with a
/// page, where callers mostly have the next one, and begins anew with it.
const AHEAD: usize = 1024;

/// Has the memory behind both on its way. What is not there, or nobody's, is left out by the processor.
#[inline]
#[target_feature(enable = "sse")]
fn ahead(old: &[u8], new: &[u8]) {
    for behind in [old.as_ptr().wrapping_add(AHEAD), new.as_ptr().wrapping_add(AHEAD)] {
        _mm_prefetch::<_MM_HINT_T0>(behind.cast());
    }
}

macro_rules! backend {
    ($(#[$about:meta])* $name:ident, $mask:ident, $($feature:tt),+) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct $name(());

        impl $name {
            /// If this processor has it.
            pub(crate) fn found() -> Option<Self> {
                ($(is_x86_feature_detected!($feature))&&+).then_some(Self(()))
            }

            pub(crate) fn encode(self, old: &Page, new: &Page, out: &mut [u8]) -> Outcome {
                $(#[target_feature(enable = $feature)])+
                fn compiled(old: &Page, new: &Page, out: &mut [u8]) -> Outcome {
                    write(&$mask(old, new), new, out)
                }
                // SAFETY: `self` proves that the processor has the features it is compiled for.
                unsafe { compiled(old, new, out) }
            }

            pub(crate) fn encoded_bytes(self, old: &Page, new: &Page) -> usize {
                $(#[target_feature(enable = $feature)])+
                fn compiled(old: &Page, new: &Page) -> usize {
                    measure(&$mask(old, new))
                }
                // SAFETY: `self` proves that the processor has the features it is compiled for.
                unsafe { compiled(old, new) }
            }
        }
    };
}

backend!(
    /// 32 bytes at a time.
    Avx2, mask_avx2, "avx2", "bmi1", "bmi2", "popcnt"
);
backend!(
    /// 64 bytes at a time.
    Avx512, mask_avx512, "avx512f", "avx512bw", "bmi1", "bmi2", "popcnt"
);

#[inline]
#[target_feature(enable = "avx2")]
fn mask_avx2(old: &Page, new: &Page) -> Mask {
    let mut mask = [0; PADDED_WORDS];
    let ((old, _), (new, _)) = (old.as_chunks::<32>(), new.as_chunks::<32>());
    let halves = old.as_chunks::<2>().0.iter().zip(new.as_chunks::<2>().0);
    for (word, (old, new)) in mask[1..].iter_mut().zip(halves) {
        ahead(old.as_flattened(), new.as_flattened());
        let equal = |half: usize| {
            // SAFETY: both are 32 bytes long, and the load needs no alignment.
            let (old, new) = unsafe {
                (
                    _mm256_loadu_si256(old[half].as_ptr().cast::<__m256i>()),
                    _mm256_loadu_si256(new[half].as_ptr().cast::<__m256i>()),
                )
            };
            u64::from(_mm256_movemask_epi8(_mm256_cmpeq_epi8(old, new)).cast_unsigned())
        };
        *word = !(equal(0) | equal(1) << 32);
    }
    mask
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn mask_avx512(old: &Page, new: &Page) -> Mask {
    let mut mask = [0; PADDED_WORDS];
    let ((old, _), (new, _)) = (old.as_chunks::<64>(), new.as_chunks::<64>());
    for ((word, old), new) in mask[1..].iter_mut().zip(old).zip(new) {
        ahead(old, new);
        // SAFETY: both are 64 bytes long, and the load needs no alignment.
        let (old, new) = unsafe {
            (
                _mm512_loadu_si512(old.as_ptr().cast::<__m512i>()),
                _mm512_loadu_si512(new.as_ptr().cast::<__m512i>()),
            )
        };
        *word = _mm512_cmpneq_epi8_mask(old, new);
    }
    mask
}
