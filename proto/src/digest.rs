//! Digests of an epoch: over what the pages *are* after decoding, so that a fault of the wire and a fault of a
//! codec both show.

use crate::units::{BlockIndex, PageData, PageIndex};
use xxhash_rust::xxh3::Xxh3;

/// A 128-bit XXH3 digest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub u128);

impl Digest {
    /// The digest of one buffer.
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxhash_rust::xxh3::xxh3_128(bytes))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Digests pages in the order in which they are sent.
#[derive(Default)]
pub struct PagesDigest(Xxh3);

impl std::fmt::Debug for PagesDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PagesDigest({:?})", self.clone().finish())
    }
}

impl Clone for PagesDigest {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl PagesDigest {
    /// A digest of no page.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a page; `None` is a page of zeros.
    pub fn update(&mut self, block: BlockIndex, page: PageIndex, content: Option<&PageData>) {
        let mut head = [0u8; 11];
        head[..2].copy_from_slice(&block.0.to_le_bytes());
        head[2..10].copy_from_slice(&page.get().to_le_bytes());
        head[10] = u8::from(content.is_some());
        self.0.update(&head);
        if let Some(c) = content {
            self.0.update(c);
        }
    }

    /// The digest of all pages added so far.
    pub fn finish(&self) -> Digest {
        Digest(self.0.digest128())
    }
}
