//! Any bytes as a page frame. What can be read can be built again and reads the same.
#![no_main]

use understudy_proto::digest::PagesDigest;
use understudy_proto::frame::{FrameBuilder, FrameReader};
use understudy_proto::units::ZERO_PAGE;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let layout = understudy_proto_fuzz::layout();
    let Ok(reader) = FrameReader::new(data, &layout) else { return };
    let Ok(records) = reader.collect::<Result<Vec<_>, _>>() else { return };
    let mut builder = FrameBuilder::new();
    let mut frames: Vec<_> =
        records.iter().filter_map(|r| builder.push(r.block, r.page, r.content)).collect();
    let (last, totals) = builder.finish();
    frames.extend(last);
    let again = frames.iter().flat_map(|f| FrameReader::new(f, &layout).expect("our own frame"));
    let mut digest = PagesDigest::new();
    for (record, original) in again.map(|r| r.expect("our own record")).zip(&records) {
        assert_eq!((record.block, record.page), (original.block, original.page));
        // The builder finds pages of zeros that came as such.
        assert_eq!(record.content, original.content.filter(|c| **c != ZERO_PAGE));
        digest.update(record.block, record.page, record.content);
    }
    assert_eq!((totals.pages, totals.digest), (records.len() as u64, digest.finish()));
});
