//! LZ4 blocks without their length, which records say elsewhere.

use crate::limits;
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

/// A compressor that keeps its buffers.
pub struct Lz4 {
    /// For pages and short batches; it fits into the first-level cache.
    small: CompressTable,
    /// For long batches. What comes out depends on the table, so the length alone decides which one is taken.
    large: Option<CompressTable>,
    out: Vec<u8>,
}

impl std::fmt::Debug for Lz4 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lz4").field("out_bytes", &self.out.len()).finish()
    }
}

impl Default for Lz4 {
    fn default() -> Self {
        Self::new()
    }
}

impl Lz4 {
    /// A compressor.
    pub fn new() -> Self {
        Self { small: CompressTable::small(), large: None, out: Vec::new() }
    }

    /// Compresses up to [`limits::MAX_BATCH_BYTES`]; `None` if they are more.
    pub fn compress(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        if bytes.len() > limits::MAX_BATCH_BYTES {
            return None;
        }
        let needed = get_maximum_output_size(bytes.len());
        if self.out.len() < needed {
            self.out.resize(needed, 0);
        }
        let table = if bytes.len() > limits::SHORT_BATCH_BYTES {
            self.large.get_or_insert_with(CompressTable::large)
        } else {
            &mut self.small
        };
        let len = compress_into_with_table(bytes, &mut self.out, table).ok()?;
        self.out.get(..len)
    }
}

/// Why bytes are not the LZ4 block of what was announced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Lz4Error {
    #[error("not an LZ4 block: {0}")]
    Block(String),
    #[error("the LZ4 block gives {got} bytes, announced are {announced}")]
    Short { got: usize, announced: usize },
}

/// Fills `out` from a block of exactly that length.
pub(crate) fn unpack(block: &[u8], out: &mut [u8]) -> Result<(), Lz4Error> {
    let got = decompress_into(block, out).map_err(|error| Lz4Error::Block(error.to_string()))?;
    if got == out.len() { Ok(()) } else { Err(Lz4Error::Short { got, announced: out.len() }) }
}
