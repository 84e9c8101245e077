//! What the guest has sent lately, and those frames of it that are evidence. Pure, but for the file that it becomes.

use std::collections::VecDeque;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use pcap_file::pcap::{PcapPacket, PcapWriter};

/// Frames that are remembered until something is found out about them: those of some seconds.
const REMEMBERED: usize = 16_384;

/// Frames that are kept as evidence.
const KEPT: usize = 1000;

/// Lines that are looked for; each violation that is described has two at most.
const WANTED: usize = 64;

/// A frame and when it came, since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taped {
    pub(crate) at: Duration,
    pub(crate) bytes: Vec<u8>,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    recent: VecDeque<Taped>,
    wanted: Vec<Vec<u8>>,
    kept: Vec<Taped>,
    /// All there ever were.
    frames: u64,
}

impl Tape {
    /// A frame of the guest.
    pub(crate) fn record(&mut self, frame: Taped) {
        self.frames += 1;
        if self.wanted.iter().any(|line| contains(&frame.bytes, line)) || is_reset(&frame.bytes) {
            self.keep(frame);
            return;
        }
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(frame);
    }

    /// Frames with this in them are evidence, those that came already and those that are still to come.
    pub(crate) fn want(&mut self, line: &str) {
        let line = line.trim_end().as_bytes().to_vec();
        if line.is_empty() || self.wanted.contains(&line) || self.wanted.len() == WANTED {
            return;
        }
        let found: Vec<Taped> =
            self.recent.iter().filter(|frame| contains(&frame.bytes, &line)).cloned().collect();
        self.wanted.push(line);
        found.into_iter().for_each(|frame| self.keep(frame));
    }

    fn keep(&mut self, frame: Taped) {
        if self.kept.len() < KEPT && !self.kept.contains(&frame) {
            self.kept.push(frame);
        }
    }

    /// How many frames there were.
    pub(crate) fn frames(&self) -> u64 {
        self.frames
    }

    /// Writes the evidence, oldest first; says how many frames it is.
    pub(crate) fn write(&self, path: &Path) -> Result<usize, String> {
        let mut kept = self.kept.clone();
        kept.sort_by_key(|frame| frame.at);
        let file = File::create(path).map_err(|error| error.to_string())?;
        let mut writer = PcapWriter::new(file).map_err(|error| error.to_string())?;
        for frame in &kept {
            let length = u32::try_from(frame.bytes.len()).unwrap_or(u32::MAX);
            writer
                .write_packet(&PcapPacket::new(frame.at, length, &frame.bytes))
                .map_err(|error| error.to_string())?;
        }
        Ok(kept.len())
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Whether it is a TCP segment, without IP options, that resets its connection.
fn is_reset(bytes: &[u8]) -> bool {
    const TCP: u8 = 6;
    const RESET: u8 = 4;
    let byte = |at: usize| bytes.get(at).copied();
    let flags = match (byte(12), byte(13)) {
        (Some(0x08), Some(0x00)) if byte(14) == Some(0x45) && byte(23) == Some(TCP) => byte(34 + 13),
        (Some(0x86), Some(0xdd)) if byte(20) == Some(TCP) => byte(54 + 13),
        _ => None,
    };
    flags.is_some_and(|flags| flags & RESET != 0)
}

#[cfg(test)]
mod tests {
    use pcap_file::pcap::PcapReader;

    use super::*;

    fn frame(second: u64, bytes: &[u8]) -> Taped {
        Taped { at: Duration::from_secs(second), bytes: bytes.to_vec() }
    }

    fn written(tape: &Tape) -> Vec<Taped> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pcap");
        let count = tape.write(&path).unwrap();
        let mut reader = PcapReader::new(File::open(path).unwrap()).unwrap();
        let mut frames = Vec::new();
        while let Some(packet) = reader.next_packet() {
            let packet = packet.unwrap();
            frames.push(Taped { at: packet.timestamp, bytes: packet.data.to_vec() });
        }
        assert_eq!(frames.len(), count);
        frames
    }

    #[test]
    fn evidence_is_found_whether_it_came_before_or_comes_after() {
        let mut tape = Tape::default();
        let frames = [frame(1, b"..us1 a 1 7.."), frame(2, b"..us1 a 2 8.."), frame(3, b"..us1 a 1 9..")];
        tape.record(frames[0].clone());
        tape.record(frames[1].clone());
        tape.want("us1 a 1 9\n");
        tape.want("us1 a 1 7\n");
        tape.want("us1 a 1 7\n");
        tape.record(frames[2].clone());
        assert_eq!(written(&tape), [frames[0].clone(), frames[2].clone()]);
        assert_eq!(tape.frames(), 3);
    }

    #[test]
    fn a_reset_is_evidence_by_itself() {
        let mut segment = [0_u8; 54];
        segment[12..15].copy_from_slice(&[8, 0, 0x45]);
        segment[23] = 6;
        segment[47] = 0x14;
        let mut tape = Tape::default();
        tape.record(frame(1, &segment));
        segment[47] = 0x10;
        tape.record(frame(2, &segment));
        assert_eq!(written(&tape).len(), 1);
    }

    #[test]
    fn a_tape_is_bounded() {
        let mut tape = Tape::default();
        tape.want("x");
        for second in 0..20_000 {
            tape.record(frame(second, if second % 2 == 0 { b"x" } else { b"y" }));
        }
        assert!(tape.recent.len() <= REMEMBERED && tape.kept.len() <= KEPT);
    }
}
