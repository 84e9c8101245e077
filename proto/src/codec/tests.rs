use super::*;
use crate::ProtocolError;
use crate::digest::PagesDigest;
use crate::frame::{Codec, FrameBuilder, FrameReader, Record};
use crate::layout::{MemoryLayout, RamBlock};
use crate::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex, ZERO_PAGE};
use proptest::collection::vec;
use proptest::prelude::*;

const PAGES: usize = 64;

fn layout() -> MemoryLayout {
    let block = RamBlock { name: "pc.ram".into(), used_bytes: (PAGES * PAGE_BYTES) as u64 };
    MemoryLayout::new(vec![block], vec![], 2).unwrap()
}

fn page() -> impl Strategy<Value = Box<PageData>> {
    let text = vec(prop::sample::select(b"aabbcde ".to_vec()), PAGE_BYTES);
    prop_oneof![
        Just(vec![0; PAGE_BYTES]),
        any::<u8>().prop_map(|fill| vec![fill; PAGE_BYTES]),
        text,
        vec(any::<u8>(), PAGE_BYTES)
    ]
    .prop_map(|bytes| Box::new(<PageData>::try_from(bytes).unwrap()))
}

/// What the other side has of a page, and what it is now.
fn change() -> impl Strategy<Value = (Box<PageData>, Box<PageData>)> {
    let edits = vec((0..PAGE_BYTES, 1usize..300, any::<u8>()), 0..12);
    prop_oneof![
        (page(), page()),
        (page(), edits).prop_map(|(before, edits)| {
            let mut now = before.clone();
            for (at, len, fill) in edits {
                now[at..].iter_mut().take(len).for_each(|byte| *byte = fill);
            }
            (before, now)
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is used for it: the pages and the digest come out as they went in.
    #[test]
    fn epochs_come_out_as_they_went_in(
        changes in vec((change(), any::<bool>(), any::<bool>()), 1..PAGES),
        batched in any::<bool>(),
    ) {
        let mut encoder = PageEncoder::new();
        let mut builder = if batched { FrameBuilder::batched(CodecSet::ALL) } else { FrameBuilder::new() };
        let mut frames = vec![];
        for (i, ((before, now), known, lz4)) in changes.iter().enumerate() {
            let content = Some(&**now).filter(|now| **now != ZERO_PAGE);
            let encoded = encoder.encode(content, known.then_some(&**before), *lz4);
            prop_assert!(encoded.payload.len() <= PAGE_BYTES);
            prop_assert!(*known || !encoded.codec.is_by_reference());
            prop_assert!(*lz4 || encoded.codec != Codec::Lz4);
            frames.extend(builder.push_encoded(BlockIndex(0), PageIndex::new(i as u64), content, encoded));
        }
        let (last, totals) = builder.finish();
        frames.extend(last);

        let (layout, mut digest, mut next) = (layout(), PagesDigest::new(), 0);
        let mut reader = FrameReader::new();
        for frame in &frames {
            reader.read::<ProtocolError>(frame, &layout, |record| {
                let ((before, now), ..) = &changes[next];
                assert_eq!(record.page.get(), next as u64);
                let mut scratch = [0xee; PAGE_BYTES];
                let content = decode(&record, Some(before), &mut scratch)?;
                assert!(content.unwrap_or(&ZERO_PAGE) == &**now, "{:?}", record.codec);
                digest.update(record.block, record.page, content.filter(|page| **page != ZERO_PAGE));
                let mut in_place = **before;
                apply(&record, &mut in_place)?;
                assert!(in_place == **now, "{:?} in place", record.codec);
                next += 1;
                Ok(())
            }).unwrap();
        }
        prop_assert_eq!((next, totals.pages), (changes.len(), changes.len() as u64));
        prop_assert_eq!(digest.finish(), totals.digest);
        prop_assert_eq!(totals.frame_bytes, frames.iter().map(|frame| frame.len() as u64).sum::<u64>());
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(
        number in 0u16..5, payload in vec(any::<u8>(), 0..PAGE_BYTES + 2), before in page(),
    ) {
        let codec = Codec::from_number(number).unwrap();
        let record = Record { block: BlockIndex(0), page: PageIndex::new(1), codec, payload: &payload };
        let (mut scratch, mut in_place) = ([0; PAGE_BYTES], *before);
        let decoded = decode(&record, Some(&before), &mut scratch).map(|page| *page.unwrap_or(&ZERO_PAGE));
        let applied = apply(&record, &mut in_place);
        prop_assert_eq!(decoded.is_ok(), applied.is_ok());
        if let Ok(decoded) = decoded {
            prop_assert!(decoded == in_place);
        }
    }
}

#[test]
fn each_codec_is_taken_where_it_is_meant() {
    let mut encoder = PageEncoder::new();
    let text: PageData = std::array::from_fn(|i| b"understudy "[i % 11]);
    let mut random = 7u64;
    let noise: PageData = std::array::from_fn(|_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        random.to_le_bytes()[7]
    });
    let mut edited = noise;
    edited[100..108].fill(0);
    let mut codec = |content, before, lz4| encoder.encode(content, before, lz4).codec;
    assert_eq!(codec(None, Some(&text), true), Codec::Zero);
    assert_eq!(codec(Some(&ZERO_PAGE), None, true), Codec::Zero);
    assert_eq!(codec(Some(&text), Some(&text), true), Codec::Unchanged);
    assert_eq!(codec(Some(&edited), Some(&noise), false), Codec::Xbzrle);
    assert_eq!(codec(Some(&text), Some(&noise), true), Codec::Lz4);
    assert_eq!(codec(Some(&text), None, false), Codec::Raw);
    assert_eq!(codec(Some(&noise), Some(&text), true), Codec::Raw);
    assert_eq!(Codec::ALL.map(|codec| codec as u16), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn faults_name_the_page_and_the_reason() {
    let fault = |codec, payload: &[u8], before: Option<&PageData>| {
        let record = Record { block: BlockIndex(2), page: PageIndex::new(0x31), codec, payload };
        decode(&record, before, &mut [0; PAGE_BYTES]).unwrap_err().to_string()
    };
    let before = Some(&ZERO_PAGE);
    assert_eq!(
        fault(Codec::Xbzrle, &[0xff, 0x1f, 2, 9, 9], before),
        "page payload is invalid: the run at byte 2 ends at 4097 of the page, which has 4096 bytes \
         (page 0x31 of block 2, codec xbzrle)"
    );
    assert_eq!(
        fault(Codec::Unchanged, &[], None),
        "page payload is invalid: refers to the epoch before, where nothing may (page 0x31 of block 2, codec unchanged)"
    );
    assert!(fault(Codec::Xbzrle, &[0, 1, 9], None).contains("refers to the epoch before"));
    assert_eq!(
        fault(Codec::Lz4, &lz4_flex::block::compress(&[7; 4095]), before),
        "page payload is invalid: the LZ4 block gives 4095 bytes, announced are 4096 (page 0x31 of block 2, codec lz4)"
    );
    assert!(fault(Codec::Lz4, &lz4_flex::block::compress(&[7; 4097]), before).contains("not an LZ4 block"));
}
