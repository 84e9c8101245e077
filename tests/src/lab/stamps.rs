//! Stamps of `understudy verify` in what a host's network devices carry, on the host's clock.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result};
use pcap_file::PcapError;
use pcap_file::pcap::PcapReader;

use super::Lab;
use super::plan::HostName;

/// Begins every answer.
const BEGIN: &[u8] = b"us1 ";

/// When each stamp was said first, and when it left first, microseconds.
#[derive(Debug)]
pub(crate) struct Stamps {
    pub(crate) said: BTreeMap<u64, u64>,
    pub(crate) left: BTreeMap<u64, u64>,
}

/// Two recordings: what a guest's network card sends, before the gate, and what of it the host sends into the LAN.
#[derive(Debug)]
pub(crate) struct Recorded {
    host: HostName,
    said: PathBuf,
    left: PathBuf,
}

impl Recorded {
    /// From now on.
    pub(crate) fn start(lab: &Lab, host: HostName, guest: &str) -> Result<Self> {
        let file = |what: &str| lab.dir().shared().join(format!("{what}-{host}.pcap"));
        let this = Self { host, said: file("said"), left: file("left") };
        let (said, left) = (this.said.display(), this.left.display());
        lab.shell(
            host,
            &format!(
                "card=$(virsh domiflist {guest} | awk '$2 == \"bridge\" {{ print $1 }}')
                nic=$(ls /sys/class/net/br0/brif | grep -v vnet)
                record() {{
                  rm -f $3 $3.log
                  tcpdump -i $1 -Q $2 --immediate-mode -U -n -s 400 -Z root -w $3 2> $3.log < /dev/null > /dev/null &
                  echo $! >> /run/lab/recorded.pid
                  for i in $(seq 100); do grep -q 'listening on' $3.log && return; sleep 0.1; done
                  cat $3.log >&2; exit 1
                }}
                rm -f /run/lab/recorded.pid; record $card in {said}; record $nic out {left}"
            ),
        )?;
        Ok(this)
    }

    /// Ends them and reads them.
    pub(crate) fn end(self, lab: &Lab) -> Result<Stamps> {
        let script = "for p in $(cat /run/lab/recorded.pid); do
              kill -INT $p; while kill -0 $p 2>/dev/null; do sleep 0.1; done
            done";
        lab.shell(self.host, script)?;
        self.read()
    }

    /// Reads them. They may have ended with the power of the host.
    pub(crate) fn read(self) -> Result<Stamps> {
        Ok(Stamps { said: first(&self.said)?, left: first(&self.left)? })
    }
}

fn first(path: &PathBuf) -> Result<BTreeMap<u64, u64>> {
    let file = File::open(path).with_context(|| format!("no recording {}", path.display()))?;
    let mut reader = PcapReader::new(file)?;
    let mut stamps = BTreeMap::new();
    while let Some(packet) = reader.next_packet() {
        let packet = match packet {
            // A power cut has fallen into its writing.
            Err(PcapError::IncompleteBuffer) => break,
            other => other?,
        };
        if let Some(stamp) = stamp(&packet.data) {
            stamps.entry(stamp).or_insert(u64::try_from(packet.timestamp.as_micros())?);
        }
    }
    Ok(stamps)
}

/// Of the answer in a frame: `us1 CLIENT NUMBER STAMP HEARD BOOT`. A question has fewer words.
fn stamp(frame: &[u8]) -> Option<u64> {
    let begin = frame.windows(BEGIN.len()).position(|window| window == BEGIN)?;
    let line = frame.get(begin..)?.split(|byte| *byte == b'\n').next()?;
    let words: Vec<&str> = std::str::from_utf8(line).ok()?.split_ascii_whitespace().collect();
    match words[..] {
        [_, _, _, stamp, _, _] => stamp.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_have_stamps() {
        assert_eq!(stamp(b"\x00\xffus1 00ff 7 12 6 00aa\n\0\0"), Some(12));
        assert_eq!(stamp(b"\x00\xffus1 00ff 7\n"), None);
        assert_eq!(stamp(b"us"), None);
    }
}
