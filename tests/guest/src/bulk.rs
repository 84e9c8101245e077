//! Much data whose content both sides know. Compiled into the guest's program and into the harness.

/// Bytes of a block.
pub(crate) const BLOCK: usize = 4096;

/// An endless stream, given by its seed.
#[derive(Debug)]
pub(crate) struct Stream(u64);

impl Stream {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Its next block.
    pub(crate) fn block(&mut self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        for word in block.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word.copy_from_slice(&(mixed ^ mixed >> 27).to_le_bytes());
        }
        block
    }
}

/// FNV-1a over words: no two blocks that differ in one place have the same.
#[derive(Debug)]
pub(crate) struct Hash(u64);

impl Hash {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn add(&mut self, block: &[u8; BLOCK]) {
        for word in block.chunks_exact(8) {
            let word = word.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            self.0 = (self.0 ^ word).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub(crate) fn value(&self) -> u64 {
        self.0
    }
}
