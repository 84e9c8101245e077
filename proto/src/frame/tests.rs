use super::*;
use crate::ProtocolError;
use crate::codec::{self, CodecSet, Encoded};
use crate::digest::PagesDigest;
use crate::layout::{MemoryLayout, RamBlock};
use crate::limits;
use crate::units::{PAGE_BYTES, ZERO_PAGE};
use bytes::Bytes;

fn layout() -> MemoryLayout {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), used_bytes: pages * 4096 };
    MemoryLayout::new(vec![block("pc.ram", 512), block("pc.bios", 64)], vec![], 2).unwrap()
}

#[test]
fn frames_give_back_the_pages_and_the_digest() {
    let mut builder = FrameBuilder::new();
    let pages: Vec<_> = (0..300u64)
        .map(|i| {
            let fill = u8::try_from(i % 7).unwrap();
            (BlockIndex(0), PageIndex::new(i), (fill != 0).then_some([fill; PAGE_BYTES]))
        })
        .collect();
    let mut frames: Vec<Bytes> =
        pages.iter().filter_map(|(b, p, c)| builder.push(*b, *p, c.as_ref())).collect();
    let (last, totals) = builder.finish();
    frames.extend(last);
    assert_eq!(totals.frames, frames.len() as u64);
    assert_eq!(totals.frame_bytes, frames.iter().map(|f| f.len() as u64).sum::<u64>());

    let layout = layout();
    let mut digest = PagesDigest::new();
    let mut got = vec![];
    for frame in &frames {
        let read = FrameReader::new().read::<ProtocolError>(frame, &layout, |record| {
            let mut scratch = [0; PAGE_BYTES];
            let content = codec::decode(&record, None, &mut scratch)?;
            digest.update(record.block, record.page, content);
            got.push((record.block, record.page, content.copied()));
            Ok(())
        });
        read.unwrap();
    }
    assert_eq!(digest.finish(), totals.digest);
    assert!(got == pages);
}

#[test]
fn a_raw_page_of_zeros_becomes_a_zero_record() {
    let mut builder = FrameBuilder::new();
    assert!(builder.push(BlockIndex(1), PageIndex::new(3), Some(&ZERO_PAGE)).is_none());
    let (frame, totals) = builder.finish();
    assert_eq!(frame.unwrap().len(), RECORD_HEADER_BYTES);
    assert_eq!(totals.pages, 1);
}

#[test]
fn bad_frames_are_refused_with_the_field_at_fault() {
    let layout = layout();
    let first_error = |bytes: &[u8]| {
        FrameReader::new().read::<ProtocolError>(bytes, &layout, |_| Ok(())).unwrap_err().to_string()
    };
    let record = |page: u64, block: u16, codec: u16, len: u32| {
        let mut v = page.to_le_bytes().to_vec();
        v.extend(block.to_le_bytes());
        v.extend(codec.to_le_bytes());
        v.extend(len.to_le_bytes());
        v
    };
    assert_eq!(first_error(&[0; 5]), "page record header is truncated: 16 bytes announced, 5 present");
    assert_eq!(
        first_error(&record(512, 0, 0, 0)),
        "page index is invalid: 0x200 in pc.ram, which has 0x200 pages"
    );
    assert_eq!(first_error(&record(0, 2, 0, 0)), "block index is invalid: 2, the layout has 2");
    assert_eq!(first_error(&record(0, 0, 9, 0)), "page codec is invalid: 9, known are 0 to 5");
    assert_eq!(
        first_error(&record(0, 0, 0, 1)),
        "page payload bytes is invalid: 1 for codec 0, which takes 0"
    );
    assert_eq!(
        first_error(&record(0, 0, 1, 4096)),
        "page payload is truncated: 4096 bytes announced, 0 present"
    );
    assert_eq!(
        first_error(&record(0, 0, 3, 4096)),
        "page payload bytes is invalid: 4096 for codec 3, which takes 1 to 4095"
    );
    let batch = |bytes: u64, records: &[u8]| {
        let block = lz4_flex::block::compress(records);
        [record(bytes, 0, 5, u32::try_from(block.len()).unwrap()), block].concat()
    };
    let inner = record(512, 0, 0, 0);
    assert_eq!(
        first_error(&batch(16, &inner)),
        "page index is invalid: 0x200 in pc.ram, which has 0x200 pages"
    );
    assert_eq!(
        first_error(&batch(17, &inner)),
        "batch is invalid: the LZ4 block gives 16 bytes, announced are 17"
    );
    assert!(first_error(&batch(15, &inner)).starts_with("batch is invalid: not an LZ4 block: "));
    assert_eq!(first_error(&batch(300_000, &inner)), "batch bytes is 300000, the limit is 245760");
    let nested = batch(16, &inner);
    assert_eq!(first_error(&batch(nested.len() as u64, &nested)), "page codec is invalid: 5 within a batch");
    let too_long = vec![0; limits::MAX_FRAME_BYTES + 1];
    assert_eq!(first_error(&too_long), "frame bytes is 524289, the limit is 524288");
}

#[test]
fn batches_are_as_long_as_the_other_side_takes() {
    let layout = layout();
    let longest = |codecs: CodecSet| {
        let mut builder = FrameBuilder::batched(codecs);
        let mut frames: Vec<_> = (0..300)
            .filter_map(|page| {
                let encoded = Encoded { codec: Codec::Raw, payload: &[7; PAGE_BYTES] };
                builder.push_encoded(BlockIndex(0), PageIndex::new(page), Some(&[7; PAGE_BYTES]), encoded)
            })
            .collect();
        frames.extend(builder.finish().0);
        let sizes = frames.iter().flat_map(|frame| units(frame, &layout)).map(|unit| match unit.unwrap() {
            Unit::Batch(packed) => packed.records_bytes(),
            Unit::Page(_) => 0,
        });
        sizes.max().unwrap()
    };
    let short = longest(CodecSet { long_batches: false, ..CodecSet::ALL });
    assert!((limits::SHORT_BATCH_BYTES - 5000..=limits::SHORT_BATCH_BYTES).contains(&short), "{short}");
    let long = longest(CodecSet::ALL);
    assert!((limits::MAX_BATCH_BYTES - 5000..=limits::MAX_BATCH_BYTES).contains(&long), "{long}");
}
