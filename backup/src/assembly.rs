//! One epoch while it arrives, and what it is once it is verified.
//!
//! A delta is kept as the frames it came in; a full epoch is written straight into an image of its own. Either
//! way nothing of it is visible before it is verified whole (invariant 2).
//!
//! Records of a delta may refer to the epoch before. They are decoded twice, both times over the image as that epoch
//! left it: for the digest when they arrive, and when the epoch is applied. The image cannot change in between, because
//! one thread does all of this in order and opens an epoch only behind the one before; and a record by reference that
//! is not the first of its page is refused, so what is applied before it does not matter either.

use crate::decode::Crew;
use crate::image::{Image, MemoryProvider};
use bytes::Bytes;
use std::sync::Arc;
use understudy_proto::ProtocolError;
use understudy_proto::codec;
use understudy_proto::digest::{Digest, PagesDigest};
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::frame::{Codec, FrameReader, Record};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::epoch::{Begin, EpochRef, RejectCode, Seed};
use understudy_proto::units::PAGE_BYTES;

/// Numbers the attempts at receiving an epoch, so that an answer to an abandoned one is never taken for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attempt(pub u64);

/// Why an epoch is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// For the primary.
    pub code: RejectCode,
    /// In words.
    pub text: String,
}

impl Fault {
    fn corrupt(text: String) -> Self {
        Self { code: RejectCode::Corrupt, text }
    }
}

impl From<ProtocolError> for Fault {
    fn from(e: ProtocolError) -> Self {
        Self::corrupt(e.to_string())
    }
}

/// Proof that an epoch is held whole and matches its manifest; an acknowledgement is made of one (invariant 3).
/// Neither `Clone` nor to be had otherwise.
#[derive(Debug, PartialEq, Eq)]
pub struct Proof {
    attempt: Attempt,
    at: EpochRef,
    kind: EpochKind,
    pages: u64,
    bytes: u64,
}

impl Proof {
    /// Which attempt at it.
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// The epoch that is held.
    pub fn at(&self) -> EpochRef {
        self.at
    }

    /// Full or delta.
    pub fn kind(&self) -> EpochKind {
        self.kind
    }

    /// Its page records.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of frames and device buffer.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    #[cfg(test)]
    pub(crate) fn for_test(attempt: Attempt, at: EpochRef, kind: EpochKind) -> Self {
        Self { attempt, at, kind, pages: 1, bytes: 1 }
    }
}

enum Pages {
    Full(Box<Image>),
    Delta { seed: Arc<Seed>, frames: Vec<Bytes>, seen: SeenPages },
}

/// The pages a delta has said something of: a bit for each. Memory of bits nobody sets costs nothing.
struct SeenPages(Vec<Vec<u64>>);

impl SeenPages {
    fn none(layout: &MemoryLayout) -> Self {
        let words = |pages: u64| usize::try_from(pages / 64 + 1).unwrap_or(0);
        Self(layout.blocks().iter().map(|block| vec![0; words(block.pages())]).collect())
    }

    /// Adds a record's page.
    ///
    /// # Errors
    /// If the record is by reference and the page is there already.
    fn add(&mut self, record: &Record<'_>) -> Result<(), ProtocolError> {
        let index = usize::try_from(record.page.get()).unwrap_or(usize::MAX);
        let Record { block, page, codec, .. } = record;
        let word = self.0.get_mut(usize::from(block.0)).and_then(|words| words.get_mut(index / 64));
        // The reader has checked the page against the layout.
        let word =
            word.ok_or_else(|| ProtocolError::invalid("page index", format!("{page} of block {block}")))?;
        let bit = 1 << (index % 64);
        if *word & bit != 0 && codec.is_by_reference() {
            return Err(ProtocolError::invalid(
                "page codec",
                format!(
                    "{} for page {page} of block {block}, which the epoch has given before",
                    codec.name()
                ),
            ));
        }
        *word |= bit;
        Ok(())
    }
}

/// An epoch that arrives.
pub struct Assembly {
    attempt: Attempt,
    at: EpochRef,
    pages: Pages,
    digest: PagesDigest,
    frame_count: u64,
    page_count: u64,
    frame_bytes: u64,
    device: Vec<u8>,
    reader: FrameReader,
}

impl std::fmt::Debug for Assembly {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assembly").field("at", &self.at).field("pages", &self.page_count).finish()
    }
}

/// A verified epoch; can only be applied.
#[derive(Debug)]
pub struct Verified(Assembly);

impl Assembly {
    /// Begins a full epoch in an image of its own.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn full(
        attempt: Attempt,
        begin: Begin,
        seed: Arc<Seed>,
        provider: &dyn MemoryProvider,
    ) -> Result<Self, Fault> {
        let image = Image::new(seed, provider).map_err(|e| Fault {
            code: RejectCode::TooLarge,
            text: format!("no memory for the image: {e}"),
        })?;
        Ok(Self::new(attempt, begin, Pages::Full(Box::new(image))))
    }

    /// Begins a delta upon an image seeded with `seed`.
    pub fn delta(attempt: Attempt, begin: Begin, seed: Arc<Seed>) -> Self {
        let seen = SeenPages::none(&seed.layout);
        Self::new(attempt, begin, Pages::Delta { seed, frames: Vec::new(), seen })
    }

    fn new(attempt: Attempt, begin: Begin, pages: Pages) -> Self {
        Self {
            attempt,
            at: EpochRef { generation: begin.generation, epoch: begin.epoch },
            pages,
            digest: PagesDigest::new(),
            frame_count: 0,
            page_count: 0,
            frame_bytes: 0,
            device: Vec::new(),
            reader: FrameReader::new(),
        }
    }

    /// The epoch.
    pub fn at(&self) -> EpochRef {
        self.at
    }

    /// Which attempt at it.
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// Takes a frame, decoding every record of it; those of a delta that refer to the epoch before over `before`, the
    /// image of that epoch.
    ///
    /// # Errors
    /// If a record is not valid.
    pub fn frame(&mut self, frame: Bytes, before: Option<&Image>) -> Result<(), Fault> {
        self.frame_count += 1;
        self.frame_bytes += frame.len() as u64;
        let Self { reader, digest, page_count, .. } = self;
        let mut scratch = [0; PAGE_BYTES];
        match &mut self.pages {
            Pages::Full(image) => {
                let seed = Arc::clone(image.seed());
                reader.read::<ProtocolError>(&frame, &seed.layout, |record| {
                    if record.codec.is_by_reference() {
                        // Says what is wrong with it.
                        codec::decode(&record, None, &mut scratch)?;
                    }
                    image.apply(&record)?;
                    let content = image.page(record.block, record.page);
                    let content = content.filter(|_| record.codec != Codec::Zero);
                    digest.update(record.block, record.page, content);
                    *page_count += 1;
                    Ok(())
                })?;
            }
            Pages::Delta { seed, frames, seen } => {
                let before = before.filter(|image| Arc::ptr_eq(image.seed(), seed));
                reader.read::<ProtocolError>(&frame, &seed.layout, |record| {
                    seen.add(&record)?;
                    let before = before.and_then(|image| image.page(record.block, record.page));
                    digest.update(record.block, record.page, codec::decode(&record, before, &mut scratch)?);
                    *page_count += 1;
                    Ok(())
                })?;
                frames.push(frame);
            }
        }
        Ok(())
    }

    /// [`Assembly::frame`] for several frames, by several threads if they are worth it.
    ///
    /// # Errors
    /// If a record is not valid.
    pub fn frames(&mut self, frames: &[Bytes], before: Option<&Image>, crew: &mut Crew) -> Result<(), Fault> {
        let layout = match &self.pages {
            Pages::Full(image) => &image.seed().layout,
            Pages::Delta { seed, .. } => &seed.layout,
        };
        if !crew.decodes(frames, layout) {
            return frames.iter().try_for_each(|frame| self.frame(frame.clone(), before));
        }
        self.frame_count += frames.len() as u64;
        self.frame_bytes += frames.iter().map(|frame| frame.len() as u64).sum::<u64>();
        let Self { digest, page_count, .. } = self;
        match &mut self.pages {
            Pages::Full(image) => {
                let seed = Arc::clone(image.seed());
                crew.read(frames, &seed.layout, |records, pool, decoded| {
                    *page_count += records.len() as u64;
                    // What refers to the epoch before is refused: there is none.
                    decoded.decode(records, pool, None, |record, content| {
                        let Record { block, page, codec, .. } = *record;
                        let (codec, payload) = match content {
                            Some(content) => (Codec::Raw, &content[..]),
                            None => (codec, record.payload),
                        };
                        image.apply(&Record { block, page, codec, payload })?;
                        digest.update(block, page, content);
                        Ok(())
                    })
                })?;
            }
            Pages::Delta { seed, frames: kept, seen } => {
                let before = before.filter(|image| Arc::ptr_eq(image.seed(), seed));
                crew.read(frames, &seed.layout, |records, pool, decoded| {
                    *page_count += records.len() as u64;
                    decoded.decode(records, pool, before, |record, content| {
                        seen.add(record)?;
                        digest.update(record.block, record.page, content);
                        Ok(())
                    })
                })?;
                kept.extend_from_slice(frames);
            }
        }
        Ok(())
    }

    /// Takes the next piece of the device buffer; the caller has checked order and size.
    pub fn device(&mut self, piece: &[u8]) {
        self.device.extend_from_slice(piece);
    }

    /// Compares everything with the manifest.
    ///
    /// # Errors
    /// Naming the first field that differs.
    pub fn verify(self, manifest: &EpochManifest) -> Result<(Verified, Proof), Fault> {
        let kind = match self.pages {
            Pages::Full(_) => EpochKind::Full,
            Pages::Delta { .. } => EpochKind::Delta,
        };
        let at = EpochRef { generation: manifest.generation, epoch: manifest.epoch };
        if (at, manifest.kind) != (self.at, kind) {
            return Err(Fault::corrupt(format!(
                "the manifest is of {:?} epoch {} of generation {}, received was {kind:?} epoch {} of generation {}",
                manifest.kind, at.epoch, at.generation, self.at.epoch, self.at.generation
            )));
        }
        for (what, received, announced) in [
            ("frames", self.frame_count, manifest.frames),
            ("pages", self.page_count, manifest.pages),
            ("bytes of frames", self.frame_bytes, manifest.frame_bytes),
            ("bytes of device state", self.device.len() as u64, manifest.device_bytes),
        ] {
            if received != announced {
                return Err(Fault::corrupt(format!(
                    "{received} {what} received, the manifest says {announced}"
                )));
            }
        }
        for (what, received, announced) in [
            ("pages", self.digest.finish(), manifest.pages_digest),
            ("device state", Digest::of(&self.device), manifest.device_digest),
        ] {
            if received != announced {
                return Err(Fault::corrupt(format!(
                    "the digest of the {what} is {received:?}, the manifest says {announced:?}"
                )));
            }
        }
        let bytes = self.frame_bytes + self.device.len() as u64;
        let proof = Proof { attempt: self.attempt, at: self.at, kind, pages: self.page_count, bytes };
        Ok((Verified(self), proof))
    }
}

impl Verified {
    /// Whether it replaces the image.
    pub fn is_full(&self) -> bool {
        matches!(self.0.pages, Pages::Full(_))
    }

    /// Makes the epoch the image's: a full one replaces it, a delta is written into it.
    ///
    /// # Errors
    /// If a delta meets no image, or one of another layout, or one in use. Then the image is gone or unchanged,
    /// never half written: every record was decoded against the same layout and the same pages before.
    pub fn apply(self, image: &mut Option<Arc<Image>>) -> Result<(), String> {
        self.apply_by(image, &mut Crew::new(Pool::single()))
    }

    /// [`Verified::apply`] by several threads, if the epoch is worth it.
    ///
    /// # Errors
    /// As of [`Verified::apply`].
    pub fn apply_by(self, image: &mut Option<Arc<Image>>, crew: &mut Crew) -> Result<(), String> {
        let Assembly { at, pages, device, mut reader, .. } = self.0;
        match pages {
            Pages::Full(mut full) => {
                full.set_epoch(at, device.into());
                *image = Some(Arc::from(full));
            }
            Pages::Delta { seed, frames, .. } => {
                let target = image.as_mut().and_then(Arc::get_mut).ok_or("the image is gone or in use")?;
                if !Arc::ptr_eq(target.seed(), &seed) {
                    return Err("the image has another layout than the epoch".into());
                }
                let written = if crew.applies(&frames) {
                    crew.read(&frames, &seed.layout, |records, pool, _| target.apply_all(pool, records))
                } else {
                    frames.iter().try_for_each(|frame| {
                        reader.read(frame, &seed.layout, |record| target.apply(&record))
                    })
                };
                written.map_err(|e: ProtocolError| e.to_string())?;
                target.set_epoch(at, device.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
