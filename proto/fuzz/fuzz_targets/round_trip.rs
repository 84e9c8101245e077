//! A guest made from any bytes, written and read: the same pages and device state, and the same bytes again.
//!
//! Four bytes are a page record: block, page, page, fill. What is left over is device state.
#![no_main]

use understudy_proto::qemu::{EndSeen, IncomingWriter, PrecopyEvent, PrecopyReader};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};
use understudy_proto_fuzz::layout;

type Page = (BlockIndex, PageIndex, Option<u8>);

fn write(pages: &[Page], device: &[u8]) -> Vec<u8> {
    let mut writer = IncomingWriter::new(vec![], layout()).expect("a valid layout");
    for (block, page, fill) in pages {
        writer.page(*block, *page, fill.map(|f| [f; PAGE_BYTES]).as_ref()).expect("a page of the layout");
    }
    writer.finish(device).expect("a device buffer").0
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let layout = layout();
    let (records, rest) = data.as_chunks::<4>();
    let page = |&[block, high, low, fill]: &[u8; 4]| -> Page {
        let block = usize::from(block) % layout.blocks().len();
        let page = u64::from(u16::from_be_bytes([high, low])) % layout.blocks()[block].pages();
        (BlockIndex(block as u16), PageIndex::new(page), fill.checked_sub(1))
    };
    let pages: Vec<Page> = records.iter().take(64).map(page).collect();
    let device = [&[4], rest, &[0x7e, 0, 0, 0, 1, 0]].concat();
    let stream = write(&pages, &device);

    let mut reader = PrecopyReader::new();
    let (mut read, mut input) = (vec![], &stream[..]);
    while let Some(event) = reader.read(&mut input).expect("our own stream") {
        if let PrecopyEvent::Page(p) = event {
            read.push((p.block, p.page, p.content.map(|c| c[0])));
        }
    }
    let precopy = reader.finish(EndSeen::ColoState).expect("our own stream");
    assert_eq!((&read, &precopy.device), (&pages, &device));
    assert_eq!(precopy.layout, layout);
    assert!(write(&read, &precopy.device) == stream);
});
