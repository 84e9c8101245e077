//! Streams made by hand.

use crate::support::{DEVICE, layout};
use understudy_proto::qemu::{
    CheckpointEvent, CheckpointReader, EndSeen, IncomingWriter, Precopy, PrecopyEvent, PrecopyReader,
    SharedBlock,
};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

fn incoming() -> Vec<u8> {
    let mut ram = vec![0u8; 16 * PAGE_BYTES];
    ram[3 * PAGE_BYTES] = 7;
    let mut writer = IncomingWriter::new(vec![], layout()).unwrap();
    writer.block(BlockIndex(0), &ram).unwrap();
    writer.block(BlockIndex(1), &[9; 2 * PAGE_BYTES]).unwrap();
    let (stream, written) = writer.finish(DEVICE).unwrap();
    assert_eq!(written.pages, 18);
    assert_eq!(written.stream_bytes, stream.len() as u64);
    stream
}

fn read_precopy(stream: &[u8]) -> (Vec<String>, Precopy) {
    let mut reader = PrecopyReader::new();
    let mut events = vec![];
    let mut input = stream;
    while let Some(event) = reader.read(&mut input).unwrap() {
        events.push(match event {
            PrecopyEvent::Page(p) => {
                format!("page {} {} {:?}", p.block, p.page, p.content.map(|c| c[0]))
            }
            PrecopyEvent::Layout(_) => "layout".into(),
            other => format!("{other:?}"),
        });
    }
    assert!(input.is_empty());
    (events, reader.finish(EndSeen::ColoState).unwrap())
}

#[test]
fn a_composed_stream_reads_back() {
    let (events, precopy) = read_precopy(&incoming());
    assert_eq!(precopy.layout, layout());
    assert_eq!(precopy.device, DEVICE);
    assert_eq!(events[0], "layout");
    assert_eq!(events[1], "RamSection { pages: 0, last: false }");
    assert_eq!(events[2], "page 0 0x0 None");
    assert_eq!(events[5], "page 0 0x3 Some(7)");
    assert_eq!(events[19], "page 1 0x1 Some(9)");
    assert_eq!(events[20], "RamSection { pages: 18, last: true }");
}

#[test]
fn shared_blocks_stay_out_of_the_stream() {
    let shared = || vec![SharedBlock { block: BlockIndex(0), address: 0x1234 }];
    let begin = || IncomingWriter::with_shared(vec![], layout(), shared()).unwrap();
    let mut writer = begin();
    writer.block(BlockIndex(1), &[9; 2 * PAGE_BYTES]).unwrap();
    let (stream, written) = writer.finish(DEVICE).unwrap();
    assert_eq!(written.pages, 2);
    let find = |needle: &[u8]| stream.windows(needle.len()).position(|window| window == needle);
    // The capability ends the configuration; right behind it begins the section of memory.
    let capability = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared\x01";
    let memory = b"\x03ram";
    assert!(find(capability).unwrap() < find(memory).unwrap());
    let address = |block: usize, address: u64| {
        let layout = layout();
        let block = &layout.blocks()[block];
        let mut entry = vec![u8::try_from(block.name.len()).unwrap()];
        entry.extend(block.name.as_bytes());
        entry.extend(block.used_bytes.to_be_bytes());
        entry.extend(address.to_be_bytes());
        entry
    };
    assert!(find(&[address(0, 0x1234), address(1, 0)].concat()).is_some());
    let ordinary = incoming();
    assert!(!ordinary.windows(15).any(|window| window == b"x-ignore-shared"));
    assert!(begin().page(BlockIndex(0), PageIndex::new(0), None).unwrap_err().to_string().contains("shared"));
    let unknown = vec![SharedBlock { block: BlockIndex(9), address: 0 }];
    assert!(IncomingWriter::with_shared(vec![], layout(), unknown).is_err());
}

fn checkpoint(word: u64) -> Vec<u8> {
    let mut v = b"\0\0\0\x01\0\0\0\x03\x08\0\x0b\0\0\x03\0\0\0\x02".to_vec();
    v.extend((0x4000 | word).to_be_bytes());
    v.extend([5; PAGE_BYTES]);
    v.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0\0\0\0\x04");
    v.extend((DEVICE.len() as u64).to_be_bytes());
    v.extend(DEVICE);
    v
}

fn events<'a>(reader: &mut CheckpointReader, mut input: &'a [u8]) -> Vec<CheckpointEvent<'a>> {
    std::iter::from_fn(|| reader.read(&mut input).unwrap()).collect()
}

#[test]
fn the_current_block_lasts_from_the_precopy_into_the_checkpoints() {
    let (_, precopy) = read_precopy(&incoming());
    let mut reader = precopy.checkpoints;
    let outside = reader.clone().read(&mut &checkpoint(0x28)[18..]).unwrap_err();
    assert!(outside.to_string().contains("COLO messages"), "{outside}");
    // The last block was pc.bios, of two pages: offset 0x4000 is behind its end.
    let stream = checkpoint(0x28);
    let mut input = &stream[..];
    let mut r = reader.clone();
    let error = std::iter::from_fn(|| r.read(&mut input).transpose()).find_map(Result::err).unwrap();
    assert_eq!(
        error.to_string(),
        "QEMU stream, byte 0x3153, RAM pages: page at 0x4000 of RAM block \"pc.bios\", which has 0x2000 bytes"
    );
    let mut named = checkpoint(0x08);
    named.splice(26..26, *b"\x06pc.ram");
    let expected_pages = CheckpointEvent::MemoryEnd { pages: 1 };
    for stream in [named, checkpoint(0x28)] {
        let got = events(&mut reader, &stream);
        assert_eq!(got[..2], [CheckpointEvent::Requested, CheckpointEvent::Stopped]);
        let CheckpointEvent::Page(page) = &got[2] else { panic!("{:?}", got[2]) };
        assert_eq!((page.block, page.page), (BlockIndex(0), PageIndex::new(4)));
        assert_eq!(page.content, Some(&[5; PAGE_BYTES]));
        assert_eq!(got[3], expected_pages);
        assert_eq!(got[4], CheckpointEvent::DeviceSize(DEVICE.len() as u64));
        assert_eq!(got[5..], [CheckpointEvent::Device(DEVICE), CheckpointEvent::Complete]);
        assert!(reader.between_checkpoints());
    }
}
