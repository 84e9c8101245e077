//! Traces of real guests: what their memory was, and which pages each epoch made of it. Written by `record`, replayed by `wire`.
//!
//! A file is gzip of: magic, pages of the guest, pages that are touched with what they held before, number of epochs, and for each
//! epoch its pages as differences to what they were before.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use understudy_proto::units::{PAGE_BYTES, PageData};
use xbzrle::{Backend, MAX_ENCODED_BYTES, Outcome};

use crate::trace::{Epochs, Pages};

const MAGIC: &[u8; 8] = b"USTRACE1";

/// A trace to replay.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) guest_pages: u64,
    pub(crate) base: Pages,
    pub(crate) epochs: Vec<Pages>,
    next: usize,
}

impl Recorded {
    /// Pages with what they became; `before` is all of memory at the beginning.
    pub(crate) fn new(guest_pages: u64, base: Pages, epochs: Vec<Pages>) -> Self {
        Self { guest_pages, base, epochs, next: 0 }
    }

    pub(crate) fn write(&self, file: &Path) -> anyhow::Result<()> {
        let mut out = GzEncoder::new(std::fs::File::create(file)?, flate2::Compression::best());
        out.write_all(MAGIC)?;
        let word = |out: &mut GzEncoder<_>, value: u64| out.write_all(&value.to_le_bytes());
        word(&mut out, self.guest_pages)?;
        word(&mut out, self.base.len() as u64)?;
        let mut memory = BTreeMap::new();
        for (number, content) in &self.base {
            word(&mut out, *number)?;
            out.write_all(&content[..])?;
            memory.insert(*number, content.clone());
        }
        word(&mut out, self.epochs.len() as u64)?;
        let mut encoded = [0; MAX_ENCODED_BYTES];
        for pages in &self.epochs {
            word(&mut out, pages.len() as u64)?;
            for (number, content) in pages {
                let before = memory.get_mut(number).context("a page without a past")?;
                word(&mut out, *number)?;
                let (kind, body) = match Backend::best().encode(before, content, &mut encoded) {
                    Outcome::Encoded(bytes) => (1u64, encoded.get(..bytes).unwrap_or_default()),
                    Outcome::Unchanged => (1, &[][..]),
                    Outcome::DoesNotPay => (0, &content[..]),
                };
                word(&mut out, kind << 32 | body.len() as u64)?;
                out.write_all(body)?;
                before.clone_from(content);
            }
        }
        out.finish()?;
        Ok(())
    }

    pub(crate) fn read(file: &Path) -> anyhow::Result<Self> {
        let opened = std::fs::File::open(file).with_context(|| file.display().to_string())?;
        let mut input = GzDecoder::new(std::io::BufReader::new(opened));
        let mut magic = [0; 8];
        input.read_exact(&mut magic)?;
        ensure!(&magic == MAGIC, "{} is no trace", file.display());
        let word = |input: &mut GzDecoder<_>| -> anyhow::Result<u64> {
            let mut bytes = [0; 8];
            input.read_exact(&mut bytes)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let guest_pages = word(&mut input)?;
        let mut memory = BTreeMap::new();
        for _ in 0..word(&mut input)? {
            let number = word(&mut input)?;
            let mut content: Box<PageData> = Box::new([0; PAGE_BYTES]);
            input.read_exact(&mut content[..])?;
            memory.insert(number, content);
        }
        let base = memory.iter().map(|(number, content)| (*number, content.clone())).collect();
        let mut epochs = Vec::new();
        for _ in 0..word(&mut input)? {
            let mut pages = Pages::new();
            for _ in 0..word(&mut input)? {
                let number = word(&mut input)?;
                let content = memory.get_mut(&number).context("a page without a past")?;
                let (kind, bytes) = {
                    let head = word(&mut input)?;
                    (head >> 32, usize::try_from(head & 0xffff_ffff)?)
                };
                ensure!(bytes <= MAX_ENCODED_BYTES, "a record of {bytes} bytes");
                let mut body = vec![0; bytes];
                input.read_exact(&mut body)?;
                match kind {
                    0 if bytes == PAGE_BYTES => content.copy_from_slice(&body),
                    1 if bytes == 0 => {}
                    1 => xbzrle::decode(&body, content).map_err(|error| anyhow::anyhow!("{error:?}"))?,
                    _ => bail!("a record of kind {kind}"),
                }
                pages.push((number, content.clone()));
            }
            epochs.push(pages);
        }
        Ok(Self::new(guest_pages, base, epochs))
    }
}

impl Epochs for Recorded {
    fn guest_pages(&self) -> u64 {
        self.guest_pages
    }

    fn all(&self) -> Pages {
        self.base.clone()
    }

    fn epoch(&mut self) -> Pages {
        self.next += 1;
        self.epochs.get(self.next - 1).cloned().unwrap_or_default()
    }
}
