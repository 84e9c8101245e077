//! A guest's memory rebuilt from events, and recordings with what is known of them.

use serde::Deserialize;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use understudy_proto::digest::{Digest, PagesDigest};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::qemu::{
    CheckpointEvent, CheckpointReader, Command, EndSeen, IncomingWriter, PageRecord, Precopy, PrecopyEvent,
    PrecopyReader, StreamError,
};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, ZERO_PAGE};

/// The shortest device state.
pub(crate) const DEVICE: &[u8] = b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02payload\x7e\0\0\0\x05\0";
/// A CONFIGURATION body.
pub(crate) const CONFIG: &[u8] = b"\0\0\0\x0apc-q35-7.2";

/// A guest of two small blocks.
pub(crate) fn layout() -> Arc<MemoryLayout> {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), used_bytes: pages * 4096 };
    let blocks = vec![block("pc.ram", 16), block("pc.bios", 2)];
    Arc::new(MemoryLayout::new(blocks, CONFIG.to_vec(), 2).unwrap())
}

/// The reader of that guest's connection after an empty precopy.
pub(crate) fn checkpoint_reader() -> CheckpointReader {
    let (stream, _) = IncomingWriter::new(vec![], layout()).unwrap().finish(DEVICE).unwrap();
    read_precopy(&stream, EndSeen::ColoState).unwrap().2.checkpoints
}

/// What `record.py` knows of a recording without reading it.
#[derive(Debug, Deserialize)]
pub(crate) struct Known {
    pub(crate) qemu: String,
    pub(crate) machine: String,
    pub(crate) memory_bytes: u64,
    pub(crate) dump_from: usize,
    pub(crate) parts: Vec<Part>,
}

/// The precopy or a checkpoint.
#[derive(Debug, Deserialize)]
pub(crate) struct Part {
    pub(crate) bytes: usize,
    /// CRC-32 of the memory from `dump_from` on, dumped by QEMU at that moment.
    pub(crate) crc: u32,
}

pub(crate) const RECORDINGS: [&str; 6] =
    ["qemu-7.2-pc", "qemu-7.2-q35", "qemu-10.0-pc", "qemu-10.0-q35", "qemu-11.1-pc", "qemu-11.1-q35"];

pub(crate) struct Recording {
    pub(crate) known: Known,
    pub(crate) stream: Vec<u8>,
}

impl Recording {
    pub(crate) fn load(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/streams");
        let known = std::fs::read(folder.join(format!("{name}.json"))).unwrap();
        let packed = std::fs::File::open(folder.join(format!("{name}.stream.gz"))).unwrap();
        let mut stream = vec![];
        flate2::read::GzDecoder::new(packed).read_to_end(&mut stream).unwrap();
        Self { known: serde_json::from_slice(&known).unwrap(), stream }
    }

    pub(crate) fn precopy(&self) -> &[u8] {
        &self.stream[..self.known.parts[0].bytes]
    }

    /// The bytes of each checkpoint.
    pub(crate) fn checkpoints(&self) -> impl Iterator<Item = (&Part, &[u8])> {
        let mut at = self.known.parts[0].bytes;
        self.known.parts[1..].iter().map(move |part| {
            at += part.bytes;
            (part, &self.stream[at - part.bytes..at])
        })
    }
}

/// A guest's memory and device state.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) layout: Arc<MemoryLayout>,
    pub(crate) blocks: Vec<Vec<u8>>,
    pub(crate) device: Vec<u8>,
}

impl Image {
    pub(crate) fn new(layout: &Arc<MemoryLayout>) -> Self {
        let block = |bytes| vec![0; usize::try_from(bytes).unwrap()];
        let blocks = layout.blocks().iter().map(|b| block(b.used_bytes)).collect();
        Self { layout: Arc::clone(layout), blocks, device: vec![] }
    }

    pub(crate) fn apply(&mut self, page: &PageRecord<'_>) {
        let at = usize::try_from(page.page.offset_bytes()).unwrap();
        let target = &mut self.blocks[usize::from(page.block.0)][at..at + PAGE_BYTES];
        target.copy_from_slice(page.content.unwrap_or(&ZERO_PAGE));
    }

    /// The stream for a fresh QEMU.
    pub(crate) fn compose(&self) -> Vec<u8> {
        let mut writer = IncomingWriter::new(vec![], Arc::clone(&self.layout)).unwrap();
        for (index, block) in (0..).zip(&self.blocks) {
            writer.block(BlockIndex(index), block).unwrap();
        }
        writer.finish(&self.device).unwrap().0
    }
}

/// Reads a whole precopy and rebuilds the guest.
pub(crate) fn read_precopy(
    stream: &[u8],
    seen: EndSeen,
) -> Result<(Image, Vec<Command>, Precopy), StreamError> {
    let mut reader = PrecopyReader::new();
    let (mut image, mut commands) = (None, vec![]);
    let mut input = stream;
    while let Some(event) = reader.read(&mut input)? {
        match event {
            PrecopyEvent::Command(command) => commands.push(command),
            PrecopyEvent::Layout(layout) => image = Some(Image::new(&layout)),
            PrecopyEvent::Page(page) => image.as_mut().unwrap().apply(&page),
            PrecopyEvent::RamSection { .. } => (),
        }
    }
    let precopy = reader.finish(seen)?;
    let mut image = image.unwrap();
    image.device.clone_from(&precopy.device);
    Ok((image, commands, precopy))
}

/// Reads one whole checkpoint into the image; gives the number of pages.
pub(crate) fn read_checkpoint(reader: &mut CheckpointReader, mut input: &[u8], image: &mut Image) -> u64 {
    let mut pages = 0;
    image.device.clear();
    while let Some(event) = reader.read(&mut input).unwrap() {
        match event {
            CheckpointEvent::Page(page) => {
                pages += 1;
                image.apply(&page);
            }
            CheckpointEvent::MemoryEnd { pages: counted } => assert_eq!(pages, counted),
            CheckpointEvent::Device(piece) => image.device.extend_from_slice(piece),
            CheckpointEvent::Requested
            | CheckpointEvent::Stopped
            | CheckpointEvent::DeviceSize(_)
            | CheckpointEvent::Complete => (),
        }
    }
    assert!(input.is_empty() && reader.between_checkpoints());
    pages
}

/// A trace of events that does not depend on where the input was cut, and is small.
#[derive(Default)]
pub(crate) struct Trace {
    lines: Vec<String>,
    pages: PagesDigest,
    device: Vec<u8>,
}

impl Trace {
    pub(crate) fn line(&mut self, text: impl Into<String>) {
        self.lines.push(text.into());
    }

    pub(crate) fn page(&mut self, page: &PageRecord<'_>) {
        self.pages.update(page.block, page.page, page.content);
    }

    pub(crate) fn device(&mut self, piece: &[u8]) {
        self.device.extend_from_slice(piece);
    }

    pub(crate) fn finish(mut self) -> Vec<String> {
        let digests = format!("pages {:?}, device {:?}", self.pages.finish(), Digest::of(&self.device));
        self.lines.push(digests);
        self.lines
    }
}
