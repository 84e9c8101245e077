//! Memory of the encoder and of the image, beyond what they must have: anonymous resident memory of this process, which
//! has both, one after the other.

use std::sync::Arc;

use understudy_backup::image::{AnonymousMemory, Image};
use understudy_primary::encode::Recoder;
use understudy_primary::encode::governor::{Governor, Plan};
use understudy_proto::codec::CodecSet;
use understudy_proto::epoch::EpochKind;
use understudy_proto::frame::{Codec, FrameBuilder, Record};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::rpc::epoch::Seed;
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

use crate::Report;

/// Budget of the page cache.
const CACHE_MIB: usize = 128;
/// Pages of each epoch.
const EPOCH_PAGES: u64 = 4000;
const EPOCHS: u64 = 40;

pub(crate) fn run(guest_mib: u64) -> anyhow::Result<Report> {
    let mut report = Report::new("memory", format!("cargo xtask bench memory -- --mib {guest_mib}"));
    let guest_pages = guest_mib * 256;
    let block = RamBlock { name: "pc.ram".into(), used_bytes: guest_mib << 20 };
    let layout = MemoryLayout::new(vec![block], vec![], 2)?;
    let epoch_mib = (EPOCH_PAGES * PAGE_BYTES as u64) as f64 / f64::from(1 << 20);

    let before = resident_mib()?;
    let mut recoder =
        Recoder::new(Governor::fixed(Plan::DeltaBatch), CACHE_MIB << 20, Arc::default(), Arc::default());
    recoder.layout(&layout);
    let mut most = Vec::new();
    for number in 1..=EPOCHS {
        let kind = if number == 1 { EpochKind::Full } else { EpochKind::Delta };
        recoder.begin(Generation(1), EpochId(number), kind, CodecSet::ALL, 1.0);
        let (mut builder, mut frames) = (FrameBuilder::new(), Vec::new());
        for page in 0..EPOCH_PAGES {
            // A walk through memory with pages that come again.
            let page = if page % 2 == 0 { page } else { (number * EPOCH_PAGES + page) % guest_pages };
            if let Some(frame) =
                builder.push(BlockIndex(0), PageIndex::new(page), Some(&filled(page, number)))
            {
                recoder.frame(frame, &mut frames)?;
            }
        }
        let (last, totals) = builder.finish();
        if let Some(frame) = last {
            recoder.frame(frame, &mut frames)?;
        }
        frames.extend(recoder.finish(totals).0);
        most.push(resident_mib()? - before);
    }
    let largest = most.iter().copied().fold(0.0, f64::max);
    report.row("encoder", "understudy-primary", "MiB", most);
    report.at_most("encoder: cache + 2 epochs + 32 MiB", CACHE_MIB as f64 + 2.0 * epoch_mib + 32.0, largest);
    drop(recoder);

    let before = resident_mib()?;
    let mut image = Image::new(Arc::new(Seed { layout, domain_xml: String::new() }), &AnonymousMemory)?;
    for page in 0..guest_pages {
        let payload = filled(page, 1);
        let (block, page) = (BlockIndex(0), PageIndex::new(page));
        image.apply(&Record { block, page, codec: Codec::Raw, payload: &payload[..] })?;
    }
    let held = resident_mib()? - before;
    report.row("image", "understudy-backup", "MiB", vec![held]);
    report.at_most("image: guest + 64 MiB", guest_mib as f64 + 64.0, held);
    drop(image);
    Ok(report)
}

fn filled(page: u64, round: u64) -> Box<[u8; PAGE_BYTES]> {
    let mut content = Box::new([0x5a; PAGE_BYTES]);
    content[..8].copy_from_slice(&page.to_le_bytes());
    content[512..520].copy_from_slice(&round.to_le_bytes());
    content
}

/// What this process has that is in no file.
fn resident_mib() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<f64>()? / 1024.0)
}
