//! Any bytes as a page frame. What can be read and decoded can be encoded again, in every way, and reads the same.
#![no_main]

use understudy_proto::ProtocolError;
use understudy_proto::codec::{self, CodecSet, PageEncoder};
use understudy_proto::digest::{Digest, PagesDigest};
use understudy_proto::frame::{FrameBuilder, FrameReader};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex, ZERO_PAGE};

/// What the other side has of every page.
const BEFORE: PageData = [0x5a; PAGE_BYTES];

/// Pages read from one input: a batch of nothing but zero pages unpacks to very many.
const MAX_PAGES: usize = 512;

type Page = (BlockIndex, PageIndex, Option<Box<PageData>>);

fn read(frames: &[impl AsRef<[u8]>]) -> Option<(Vec<Page>, Digest)> {
    let (layout, mut reader) = (understudy_proto_fuzz::layout(), FrameReader::new());
    let (mut pages, mut digest) = (vec![], PagesDigest::new());
    for frame in frames {
        let read = reader.read::<ProtocolError>(frame.as_ref(), &layout, |record| {
            let (mut scratch, mut in_place) = ([0; PAGE_BYTES], BEFORE);
            let content = codec::decode(&record, Some(&BEFORE), &mut scratch)?;
            codec::apply(&record, &mut in_place)?;
            assert!(*content.unwrap_or(&ZERO_PAGE) == in_place);
            let content = content.filter(|content| **content != ZERO_PAGE);
            digest.update(record.block, record.page, content);
            if pages.len() == MAX_PAGES {
                return Err(ProtocolError::Missing { field: "end" });
            }
            pages.push((record.block, record.page, content.map(|content| Box::new(*content))));
            Ok(())
        });
        read.ok()?;
    }
    Some((pages, digest.finish()))
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((pages, digest)) = read(&[data]) else { return };
    for (batched, known, lz4) in [(false, false, false), (false, true, true), (true, true, false)] {
        let mut builder = if batched { FrameBuilder::batched(CodecSet::ALL) } else { FrameBuilder::new() };
        let (mut encoder, mut frames) = (PageEncoder::new(), vec![]);
        for (block, page, content) in &pages {
            let encoded = encoder.encode(content.as_deref(), known.then_some(&BEFORE), lz4);
            frames.extend(builder.push_encoded(*block, *page, content.as_deref(), encoded));
        }
        let (last, totals) = builder.finish();
        frames.extend(last);
        let again = read(&frames).expect("our own frames");
        assert!(again.0 == pages);
        assert_eq!((totals.pages, totals.digest, again.1), (pages.len() as u64, digest, digest));
    }
});
