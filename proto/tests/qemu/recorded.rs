//! Streams recorded from QEMU, see `testdata/README.md`. What they hold is checked against what QEMU itself
//! dumped, where a part ends against where QEMU stopped to wait.

use crate::support::{Image, RECORDINGS, Recording, read_checkpoint, read_precopy};
use understudy_proto::qemu::{CheckpointReader, Command, Configuration, EndSeen, PrecopyReader};

fn crc_of_ram(recording: &Recording, image: &Image) -> u32 {
    let at = image.layout.blocks().iter().position(|b| b.name == "pc.ram").unwrap();
    let ram = &image.blocks[at];
    assert_eq!(ram.len() as u64, recording.known.memory_bytes);
    crc32fast::hash(&ram[recording.known.dump_from..])
}

fn precopy(recording: &Recording) -> (Image, CheckpointReader) {
    let (image, _, precopy) = read_precopy(recording.precopy(), EndSeen::Quiet).unwrap();
    (image, precopy.checkpoints)
}

#[test]
fn memory_equals_what_qemu_dumps_at_every_stop() {
    for name in RECORDINGS {
        let recording = Recording::load(name);
        let (mut image, mut reader) = precopy(&recording);
        assert_eq!(crc_of_ram(&recording, &image), recording.known.parts[0].crc, "{name}, precopy");
        let mut checkpoints = 0;
        for (part, bytes) in recording.checkpoints() {
            let before = image.clone();
            let pages = read_checkpoint(&mut reader, bytes, &mut image);
            assert!(pages >= 64, "{name}: the guest changes 64 pages all the time, {pages} were read");
            assert!(before.blocks != image.blocks);
            assert_eq!(crc_of_ram(&recording, &image), part.crc, "{name}, checkpoint {checkpoints}");
            checkpoints += 1;
        }
        assert_eq!(checkpoints, 4);
        assert_eq!(reader.offset_bytes(), recording.stream.len() as u64);
    }
}

#[test]
fn the_head_tells_machine_and_dialect() {
    for name in RECORDINGS {
        let recording = Recording::load(name);
        let (image, commands, _) = read_precopy(recording.precopy(), EndSeen::ColoState).unwrap();
        let machine = Configuration::parse(image.layout.config()).unwrap().machine;
        let version = recording.known.qemu.rsplit_once('.').unwrap().0;
        let model = if recording.known.machine == "q35" { "q35" } else { "i440fx" };
        assert_eq!(machine, format!("pc-{model}-{version}"));
        // The return path is opened where it is on, and only there COLO is not announced.
        let expected: &[Command] = match version {
            "7.2" => &[Command::EnableColo],
            "10.0" => &[Command::EnableColo, Command::SwitchoverStart],
            _ => &[Command::OpenReturnPath, Command::Ping(1), Command::SwitchoverStart],
        };
        assert_eq!(commands, expected, "{name}");
    }
}

#[test]
fn the_description_gives_every_device_section() {
    for name in RECORDINGS {
        let recording = Recording::load(name);
        let (image, _, precopy) = read_precopy(recording.precopy(), EndSeen::Quiet).unwrap();
        let sections = &precopy.sections;
        assert!(sections.len() > 30, "{name}: {} sections", sections.len());
        for expected in ["timer", "globalstate", "cpu", "apic"] {
            assert!(sections.iter().any(|s| s.name == expected), "{name}: no {expected}");
        }
        assert_eq!(sections.iter().any(|s| s.name.ends_with("virtio-rng")), name.ends_with("q35"));
        let mut at = 0;
        for section in sections {
            assert_eq!(section.bytes.start, at, "{name}: {section:?}");
            at = section.bytes.end;
        }
        assert_eq!(at + 1, image.device.len());
    }
}

/// What the opaque end of the precopy gives has the form of what checkpoints bring with a length.
#[test]
fn the_device_buffer_of_the_precopy_is_like_those_of_checkpoints() {
    for name in RECORDINGS {
        let recording = Recording::load(name);
        let (mut image, mut reader) = precopy(&recording);
        let first = image.device.clone();
        for (_, bytes) in recording.checkpoints() {
            read_checkpoint(&mut reader, bytes, &mut image);
            assert_eq!(image.device.len(), first.len(), "{name}");
            assert_eq!(image.device[..20], first[..20], "{name}");
        }
    }
}

#[test]
fn a_composed_stream_holds_the_whole_guest_and_is_canonical() {
    for name in RECORDINGS {
        let recording = Recording::load(name);
        let (mut image, mut reader) = precopy(&recording);
        recording.checkpoints().for_each(|(_, bytes)| _ = read_checkpoint(&mut reader, bytes, &mut image));
        let composed = image.compose();
        let (again, commands, precopy) = read_precopy(&composed, EndSeen::ColoState).unwrap();
        assert!(again == image, "{name}");
        assert_eq!((commands, precopy.sections), (vec![], vec![]));
        assert!(again.compose() == composed, "{name}");
    }
}

/// Where the precopy ends can only be told at its end: no shorter prefix may look complete.
#[test]
fn the_precopy_looks_complete_only_when_it_is() {
    for name in RECORDINGS {
        let recording = Recording::load(name);
        let (image, _) = precopy(&recording);
        let stream = recording.precopy();
        let mut reader = PrecopyReader::new();
        let tail_bytes = 3 * image.device.len() / 2;
        let mut fed = stream.len() - tail_bytes;
        let mut input = &stream[..fed];
        while reader.read(&mut input).unwrap().is_some() {}
        for end in (fed..=stream.len()).step_by(997).chain([stream.len() - 1]) {
            if end < fed {
                continue;
            }
            let mut input = &stream[fed - input.len()..end];
            while reader.read(&mut input).unwrap().is_some() {}
            fed = end;
            assert!(!reader.looks_complete(), "{name}: {} bytes are missing", stream.len() - end);
        }
        let mut input = &stream[fed..];
        assert!(reader.read(&mut input).unwrap().is_none());
        assert!(reader.looks_complete(), "{name}");
    }
}
