//! The buffer between a socket and a reader.

use crate::limits;

/// One allocation for the life of a connection. Records are read in place; only a record that the last read
/// cut off is moved, to the front, before the next read.
#[derive(Debug)]
pub struct StreamBuffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl StreamBuffer {
    /// A buffer of this size, at least two of the largest records.
    pub fn new(capacity_bytes: usize) -> Self {
        let capacity_bytes = capacity_bytes.max(2 * limits::MAX_STREAM_RECORD_BYTES);
        Self { bytes: vec![0; capacity_bytes].into(), start: 0, end: 0 }
    }

    /// Where the next read goes. Never empty as long as the unread rest is an incomplete record.
    pub fn space(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Says that a read put `count` bytes at the beginning of [`Self::space`].
    pub fn filled(&mut self, count: usize) {
        self.end = self.bytes.len().min(self.end.saturating_add(count));
    }

    /// What was read from the socket and not yet by the reader.
    pub fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Says that all but the last `count` bytes of [`Self::unread`] were read.
    pub fn keep(&mut self, count: usize) {
        self.start = self.end.saturating_sub(count).max(self.start);
    }
}
