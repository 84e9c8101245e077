//! What the readers refuse, and what they say.

use crate::support::{CONFIG, DEVICE, checkpoint_reader, layout, read_precopy};
use proptest::prelude::*;
use std::sync::Arc;
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::qemu::{CheckpointReader, EndSeen, IncomingWriter, PrecopyReader, StreamError};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex, ZERO_PAGE};

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07";
const START: &[u8] = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04";
const END: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
const PART: &[u8] = b"\x02\0\0\0\x02";

/// Header, configuration and a block table of two blocks, then `rest`.
fn precopy(rest: &[&[u8]]) -> String {
    let table = b"\0\0\0\0\0\x01\x20\x04\x06pc.ram\0\0\0\0\0\x01\0\0\x07pc.bios\0\0\0\0\0\0\x20\0";
    // The word holds 0x12004: 0x10000 and 0x2000 bytes, and the flag.
    let table = [&[0, 0, 0, 0, 0, 1, 0x20, 4], &table[8..]].concat();
    error(&[&[HEAD, CONFIG, START, &table, END], rest].concat())
}

fn error(parts: &[&[u8]]) -> String {
    read(&parts.concat()).expect_err("should be refused").to_string()
}

fn read(stream: &[u8]) -> Result<(), StreamError> {
    let mut reader = PrecopyReader::new();
    let mut input = stream;
    while reader.read(&mut input)?.is_some() {}
    reader.finish(EndSeen::ColoState).map(|_| ())
}

#[test]
fn heads() {
    assert_eq!(
        error(&[b"QEVM\0\0\0\x02"]),
        "QEMU stream, byte 0x0, file header: magic 0x5145564d and version 2 found, 0x5145564d and 3 expected"
    );
    assert_eq!(
        error(&[b"QEVM\0\0\0\x03\x01"]),
        "QEMU stream, byte 0x8, CONFIGURATION section: section type 0x01 found, expected CONFIGURATION (0x07)"
    );
    let capabilities = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
    assert_eq!(
        error(&[HEAD, CONFIG, capabilities]),
        "QEMU stream, byte 0x17, CONFIGURATION section: migration capability \"x-ignore-shared\" is on (listed in \
         configuration/capabilities); switch it off with migrate-set-capabilities"
    );
    let many = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\xff\xff\xff\xff";
    assert!(error(&[HEAD, CONFIG, many]).ends_with("capability count is 4294967295, the limit is 16"));
    let uuid = b"\x05\x12configuration/uuid\0\0\0\x010123456789abcdef";
    let uuids = uuid.repeat(2000);
    assert!(error(&[HEAD, CONFIG, &uuids]).contains("CONFIGURATION bytes is 65"));
}

#[test]
fn commands() {
    assert_eq!(
        error(&[HEAD, CONFIG, b"\x08\0\x07\0\x04"]),
        "QEMU stream, byte 0x17, start of a section: command 7 (PACKAGED) is not supported here"
    );
    assert!(
        error(&[HEAD, CONFIG, b"\x08\0\x03\0\0"]).contains("capability \"postcopy-ram\" is on (command 3")
    );
    // An unknown one is skipped, however long.
    let unknown = [b"\x08\0\x63\xff\xff".as_slice(), &[8; 65535], b"\x09"].concat();
    assert!(error(&[HEAD, CONFIG, &unknown]).contains("byte 0x1001b, start of a section: section type 0x09"));
}

#[test]
fn sections() {
    assert_eq!(
        error(&[HEAD, CONFIG, b"\x04\0\0\0\x09\x0avirtio-mem\0\0\0\x01\0\0\0\x02"]),
        "QEMU stream, byte 0x17, start of a section: section 9 of \"virtio-mem\", instance 1, version 2: only \
         \"ram\" version 4 may come before the end of memory; a device that sends its state early or in parts is \
         not supported"
    );
    assert!(error(&[HEAD, CONFIG, PART]).ends_with("section id 2, but \"ram\" is not announced yet"));
    assert!(precopy(&[b"\x02\0\0\0\x03"]).ends_with("section id 3, but \"ram\" is 2"));
    assert!(precopy(&[START]).contains("section 2 of \"ram\""));
    assert!(precopy(&[PART, &END[..8], b"\x7e\0\0\0\x03"]).ends_with("footer 0x7e 3 found, 0x7e 2 expected"));
    assert!(precopy(&[PART, &END[..8], b"\x04\0\0\0\x02"]).ends_with("footer 0x04 2 found, 0x7e 2 expected"));
    assert!(precopy(&[b"\0"]).ends_with("section type 0x00 found, expected a command or a section of ram"));
}

#[test]
fn block_tables() {
    let table = |bytes: &[u8]| error(&[HEAD, CONFIG, START, bytes]);
    assert!(table(END).ends_with("the RAM section does not start with its block table"));
    assert!(table(b"\0\0\0\0\0\0\x20\x04\x01a\0\0\0\0\0\0\x30\0").ends_with(
        "RAM block table: RAM block \"a\" has 0x3000 bytes, only 0x2000 of the announced sum are left"
    ));
    assert!(
        table(b"\x7f\0\0\0\0\0\0\x04")
            .ends_with("guest RAM bytes is 9151314442816847872, the limit is 17592186044416")
    );
    assert!(
        table(b"\0\0\0\0\0\0\x20\x04\x01a\0\0\0\0\0\0\x10\0\x01a\0\0\0\0\0\0\x10\0")
            .ends_with("a appears twice")
    );
    assert!(table(b"\0\0\0\0\0\0\x20\x04\x01\xff\0\0\0\0\0\0\x10\0").contains("is not valid UTF-8"));
    assert!(
        table(b"\0\0\0\0\0\0\x10\x04\x01a\0\0\0\0\0\0\x08\0\x01b\0\0\0\0\0\0\x08\0")
            .contains("a has 2048 bytes")
    );
    // Blocks of no size never add up.
    let empty = [b"\0\0\0\0\0\0\x10\x04".as_slice(), &b"\x01a\0\0\0\0\0\0\0\0".repeat(600)].concat();
    assert!(table(&empty).ends_with("number of RAM blocks is 513, the limit is 512"));
    assert!(
        precopy(&[PART, b"\0\0\0\0\0\0\x10\x04"])
            .ends_with("a block table outside the start of the RAM section")
    );
}

#[test]
fn ram_records() {
    let record = |word: u64, rest: &[u8]| precopy(&[PART, &word.to_be_bytes(), rest]);
    for (flag, text) in [
        (0x040, "capability \"xbzrle\" is on (RAM record flag 0x040, XBZRLE); switch it off"),
        (0x060, "capability \"xbzrle\" is on"),
        (0x080, "RAM record flag 0x080, HOOK"),
        (0x100, "capability \"compress\" is on (RAM record flag 0x100, COMPRESS_PAGE)"),
        (0x200, "capability \"multifd\" is on (RAM record flag 0x200, MULTIFD_FLUSH)"),
    ] {
        let error = record(0x1000 | flag, b"");
        assert!(error.contains(text), "{error}");
    }
    for flags in [0x00a, 0x001, 0x400, 0x000, 0x020] {
        let error = record(0x1000 | flags, b"");
        assert!(error.contains("which is no known record"), "{error}");
    }
    assert!(record(0x1010, b"").contains("0x0000000000001010 has flags 0x010"));
    assert!(
        record(0x28, b"").contains("continues the previous block, but there was none on this connection")
    );
    assert!(record(0x08, b"\x03abc").ends_with("RAM block \"abc\" is not in the block table"));
    assert!(
        record(0x1_0002, b"\x06pc.ram\0")
            .ends_with("page at 0x10000 of RAM block \"pc.ram\", which has 0x10000 bytes")
    );
    assert!(record(0x02, b"\x06pc.ram\x01").ends_with("zero page with fill byte 0x01"));
}

#[test]
fn ends() {
    let end = [b"\x03\0\0\0\x02", END].concat();
    assert!(precopy(&[]).ends_with("the last section of memory was not read"));
    assert!(precopy(&[&end]).ends_with("device sections: the stream is not complete: no device sections"));
    assert!(
        precopy(&[&end, b"\x01"])
            .ends_with("first byte of the device sections: byte 0x01 found, 0x04 expected")
    );
    assert!(precopy(&[&end, &DEVICE[..20]]).contains("no end mark, nor a description"));
    let described = |json: &str| {
        let bytes = u32::try_from(json.len()).unwrap().to_be_bytes();
        precopy(&[&end, DEVICE, b"\x06", &bytes, json.as_bytes()])
    };
    let timer = |page: u32, version: u32, size: u32| {
        described(&format!(
            r#"{{"page_size":{page},"devices":[{{"name":"timer","instance_id":0,"version":{version},
                "fields":[{{"name":"x","size":{size}}}]}}]}}"#
        ))
    };
    let start = HEAD.len() + CONFIG.len() + START.len() + 8 + 7 + 8 + 8 + 8 + END.len() + end.len();
    let at = format!("QEMU stream, byte {start:#x}, ");
    let check = |error: String, text: &str| assert_eq!(error, format!("{at}{text}"));
    check(
        timer(4096, 3, 7),
        "device sections: description of device \"timer\": instance 0, version 3 announced, section of \"timer\", \
         instance 0, version 2 found",
    );
    check(timer(4096, 2, 6), "device sections: footer 0x64 2113929216 found, 0x7e 5 expected");
    // Devices of the old style announce no version; their length still counts.
    check(
        described(
            r#"{"page_size":4096,"devices":[{"name":"timer","instance_id":0,"fields":[{"name":"x","size":6}]}]}"#,
        ),
        "device sections: footer 0x64 2113929216 found, 0x7e 5 expected",
    );
    check(
        timer(4096, 2, 70),
        "VMDESCRIPTION: description of device \"timer\": longer than the device sections",
    );
    check(
        timer(8192, 2, 7),
        "VMDESCRIPTION: description of device \"page_size\": 8192, only 4096 is supported",
    );
    assert!(described(r#"{"page_size":4096,"devices":[]}"#).contains("bytes behind the last device"));
    let overflow = r#"{"page_size":4096,"devices":[{"name":"timer","instance_id":0,"version":2,
        "fields":[{"size":18446744073709551615,"array_len":2}]}]}"#;
    assert!(described(overflow).ends_with("its sizes overflow"));
    let json = r#"{"page_size":4096,"devices":[]}  "#;
    let short = [&[0, 0, 0, 31], json.as_bytes()].concat();
    assert!(precopy(&[&end, DEVICE, b"\x06", &short]).contains("no end mark, nor a description"));
    assert!(precopy(&[&end, b"\x04device state\0"]).contains("no end mark, nor a description"));
    // Bytes that only resemble a description are device state, and devices do not end so.
    assert!(described("{}").contains("no end mark, nor a description"));
}

fn checkpoint(parts: &[&[u8]]) -> String {
    fn read(mut reader: CheckpointReader, mut input: &[u8]) -> Result<(), StreamError> {
        while reader.read(&mut input)?.is_some() {}
        Ok(())
    }
    read(checkpoint_reader(), &parts.concat()).expect_err("should be refused").to_string()
}

#[test]
fn checkpoints() {
    const SEND: &[u8] = b"\0\0\0\x01\0\0\0\x03";
    let memory = [b"\x03\0\0\0\x02", END].concat();
    assert!(
        checkpoint(&[b"\0\0\0\x07"])
            .ends_with("COLO messages: COLO message 7 is not known, known are 0 to 6")
    );
    assert!(
        checkpoint(&[b"\0\0\0\x02"])
            .ends_with("COLO message CHECKPOINT_REPLY (sent to QEMU), expected CHECKPOINT_REQUEST")
    );
    assert!(
        checkpoint(&[b"\0\0\0\x01\0\0\0\x04"])
            .ends_with("COLO message VMSTATE_SIZE (sent by QEMU), expected VMSTATE_SEND")
    );
    assert!(checkpoint(&[SEND, b"\0"]).ends_with("0x00 found, expected a command or the SECTION_END of ram"));
    assert!(checkpoint(&[SEND, b"\x03\0\0\0\x05"]).ends_with("section id 5, but \"ram\" is 2"));
    assert!(
        checkpoint(&[SEND, &memory, &memory])
            .ends_with("0x03 found, expected the end mark (0x00), after ram")
    );
    let size =
        |bytes: u64, rest: &[u8]| checkpoint(&[SEND, &memory, b"\0\0\0\0\x04", &bytes.to_be_bytes(), rest]);
    assert!(size(0, b"").ends_with("a device buffer of 0 bytes"));
    assert!(size(1 << 40, b"").ends_with("device buffer bytes is 1099511627776, the limit is 268435456"));
    assert!(size(5, b"\x05").ends_with("first byte of the device sections: byte 0x05 found, 0x04 expected"));
    assert!(
        size(3, b"\x04\0\x01").ends_with("last byte of the device sections: byte 0x01 found, 0x00 expected")
    );
}

/// Silence proves nothing without a description; only QEMU's state does.
#[test]
fn an_end_without_description_needs_the_state() {
    let composed = IncomingWriter::new(vec![], layout()).unwrap().finish(DEVICE).unwrap().0;
    let suppressed = &composed[..composed.len() - 5];
    for stream in [&composed[..], suppressed] {
        let mut reader = PrecopyReader::new();
        let mut input = stream;
        while reader.read(&mut input).unwrap().is_some() {}
        assert!(!reader.looks_complete());
        let error = reader.finish(EndSeen::Quiet).unwrap_err().to_string();
        assert!(error.ends_with("no description, and QEMU did not say that it is in state colo"), "{error}");
        assert_eq!(read_precopy(stream, EndSeen::ColoState).unwrap().0.device, DEVICE);
    }
}

#[test]
fn the_writer_refuses_what_no_qemu_would_load() {
    let error = |r: Result<_, understudy_proto::qemu::WriteError>| r.map(|_: ()| ()).unwrap_err().to_string();
    let writer = || IncomingWriter::new(vec![], layout()).unwrap();
    assert_eq!(
        error(writer().page(BlockIndex(0), PageIndex::new(16), None)),
        "cannot compose a stream for the incoming QEMU: page index is invalid: 0x10 in pc.ram, which has 0x10 pages"
    );
    assert!(
        error(writer().block(BlockIndex(0), &[0; 9]))
            .ends_with("9 for block 0, which has 65536 in the layout")
    );
    assert!(error(writer().finish(&[]).map(|_| ())).ends_with("no device sections"));
    assert!(error(writer().finish(&DEVICE[..9]).map(|_| ())).contains("last byte of the device sections"));
    let with = |config: &[u8], id| {
        let blocks = vec![RamBlock { name: "pc.ram".into(), used_bytes: 4096 }];
        let layout = MemoryLayout::new(blocks, config.to_vec(), id).unwrap();
        IncomingWriter::new(vec![], Arc::new(layout)).map(|_| ())
    };
    assert!(error(with(CONFIG, 0)).contains("RAM section id is invalid: 0"));
    assert!(error(with(b"\0\0\0\x09pc", 2)).ends_with("the CONFIGURATION body is cut off"));
}

/// The capabilities of the primary's QEMU are not those of the incoming one.
#[test]
fn the_writer_drops_capabilities() {
    let capabilities = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
    let blocks = layout().blocks().to_vec();
    let with = MemoryLayout::new(blocks, [CONFIG, capabilities].concat(), 2).unwrap();
    let stream = |layout| IncomingWriter::new(vec![], layout).unwrap().finish(DEVICE).unwrap().0;
    assert!(stream(Arc::new(with)) == stream(layout()));
}

proptest! {
    /// Pages of zeros are found whatever surrounds them.
    #[test]
    fn a_block_is_written_as_its_pages(fills in prop::collection::vec(0u8..3, 16)) {
        let memory: Vec<u8> = fills.iter().flat_map(|f| [*f; PAGE_BYTES]).collect();
        let mut whole = IncomingWriter::new(vec![], layout()).unwrap();
        whole.block(BlockIndex(0), &memory).unwrap();
        let mut single = IncomingWriter::new(vec![], layout()).unwrap();
        for (page, fill) in (0..).zip(&fills) {
            let content = Some([*fill; PAGE_BYTES]).filter(|c| *c != ZERO_PAGE);
            single.page(BlockIndex(0), PageIndex::new(page), content.as_ref()).unwrap();
        }
        let (whole, single) = (whole.finish(DEVICE).unwrap(), single.finish(DEVICE).unwrap());
        prop_assert!(whole == single);
        let (image, ..) = read_precopy(&whole.0, EndSeen::ColoState).unwrap();
        prop_assert!(image.blocks[0] == memory);
    }
}
