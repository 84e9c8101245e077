//! Several threads make of frames what one makes of them, in every byte and every word.

use super::*;
use crate::image::AnonymousMemory;
use proptest::prelude::*;
use understudy_proto::codec::{CodecSet, PageEncoder};
use understudy_proto::frame::{FrameBuilder, FrameTotals};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::RamBlock;
use understudy_proto::units::{BlockIndex, PageData, PageIndex};

const PAGES: u64 = 300;

fn seed() -> Arc<Seed> {
    let block = |name: &str| RamBlock { name: name.into(), used_bytes: PAGES * 4096 };
    let layout = MemoryLayout::new(vec![block("pc.ram"), block("pc.bios")], vec![], 2).unwrap();
    Arc::new(Seed { layout, domain_xml: "<domain/>".into() })
}

/// What a page has in the epoch before.
fn before(block: u16, page: u64) -> PageData {
    let mut content = [0x5a; PAGE_BYTES];
    content[..8].copy_from_slice(&(page * 2 + u64::from(block)).to_le_bytes());
    content
}

/// An image of an epoch before.
fn image(seed: &Arc<Seed>) -> Image {
    let mut image = Image::new(Arc::clone(seed), &AnonymousMemory).unwrap();
    for (block, page) in (0..2u16).flat_map(|block| (0..PAGES).map(move |page| (block, page))) {
        let payload = &before(block, page)[..];
        let (block, page) = (BlockIndex(block), PageIndex::new(page));
        image.apply(&Record { block, page, codec: Codec::Raw, payload }).unwrap();
    }
    image
}

/// A page that is written.
#[derive(Debug, Clone)]
struct Write {
    block: u16,
    page: u64,
    /// 0 zeros, 1 unchanged, 2 to 5 a few bytes, 6 and 7 a pattern, others without one.
    kind: u8,
    /// Sent as a difference, whether or not it may be.
    refers: bool,
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let page = prop_oneof![20 => 0..PAGES, 1 => 0..3u64];
    let refers = prop::bool::weighted(0.97);
    let write = (0..2u16, page, 0u8..10, refers).prop_map(|(block, page, kind, refers)| Write {
        block,
        page,
        kind,
        refers,
    });
    prop::collection::vec(write, 0..400)
}

fn frames(writes: &[Write], kind: EpochKind, batched: bool) -> (Vec<Bytes>, FrameTotals) {
    let mut builder = if batched { FrameBuilder::batched(CodecSet::ALL) } else { FrameBuilder::new() };
    let (mut encoder, mut frames, mut known) =
        (PageEncoder::new(), vec![], std::collections::BTreeSet::new());
    for (number, write) in writes.iter().enumerate() {
        let was = before(write.block, write.page);
        let mut content = was;
        match write.kind {
            0 => content = [0; PAGE_BYTES],
            1 => {}
            2..=5 => content.iter_mut().skip(number).step_by(500).for_each(|byte| *byte ^= 1),
            6 | 7 => content.fill(write.kind),
            _ => {
                let mut state = number as u64 + 1;
                for word in content.as_chunks_mut::<8>().0 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *word = state.to_le_bytes();
                }
            }
        }
        // Now and then again, where it is not the first of its page: a fault.
        let first = known.insert((write.block, write.page)) || !write.refers;
        let may = kind == EpochKind::Delta && first;
        let encoded = encoder.encode(Some(&content), may.then_some(&was), !batched);
        let (block, page) = (BlockIndex(write.block), PageIndex::new(write.page));
        let is_zero = encoded.codec == Codec::Zero;
        frames.extend(builder.push_encoded(block, page, (!is_zero).then_some(&content), encoded));
    }
    let (last, totals) = builder.finish();
    frames.extend(last);
    (frames, totals)
}

/// Everything that came of it: the fault, or the image.
fn whole(
    mut assembly: Assembly,
    frames: &[Bytes],
    totals: FrameTotals,
    mut image: Option<Arc<Image>>,
    crew: Option<(&mut Crew, usize)>,
) -> Result<Vec<Vec<u8>>, String> {
    let (at, kind) = (
        assembly.at(),
        if matches!(assembly.pages, Pages::Full(_)) { EpochKind::Full } else { EpochKind::Delta },
    );
    let manifest = EpochManifest::new(at.generation, at.epoch, kind, &totals, b"device");
    let before = image.as_deref();
    let (took, crew) = match crew {
        None => (frames.iter().try_for_each(|frame| assembly.frame(frame.clone(), before)), None),
        Some((crew, group)) => {
            (frames.chunks(group).try_for_each(|group| assembly.frames(group, before, crew)), Some(crew))
        }
    };
    took.map_err(|fault| fault.text)?;
    assembly.device(b"device");
    let (verified, proof) = assembly.verify(&manifest).map_err(|fault| fault.text)?;
    assert_eq!(proof.pages(), totals.pages);
    match crew {
        None => verified.apply(&mut image)?,
        Some(crew) => verified.apply_by(&mut image, crew)?,
    }
    let image = image.unwrap();
    assert_eq!(image.at(), Some(at));
    Ok(image.blocks().map(|(_, _, memory)| memory.to_vec()).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whole, with pages that come twice, with references that may not be, and with any byte another one.
    #[test]
    fn several_threads_verify_and_apply_what_one_does(
        writes in writes(), is_full: bool, batched: bool, threads in 2usize..5, group in 1usize..6,
        flip in prop::option::weighted(0.4, (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1u8..)),
    ) {
        let seed = seed();
        let kind = if is_full { EpochKind::Full } else { EpochKind::Delta };
        let (mut frames, totals) = frames(&writes, kind, batched);
        if let (Some((frame, byte, bits)), false) = (flip, frames.is_empty()) {
            let frame = frame.get_mut(&mut frames);
            let mut bytes = frame.to_vec();
            *byte.get_mut(&mut bytes) ^= bits;
            *frame = bytes.into();
        }
        let begin = Begin { generation: Generation(1), epoch: EpochId(2), kind };
        let assembly = || match kind {
            EpochKind::Full => Assembly::full(Attempt(1), begin, Arc::clone(&seed), &AnonymousMemory).unwrap(),
            EpochKind::Delta => Assembly::delta(Attempt(1), begin, Arc::clone(&seed)),
        };
        let image = || (!is_full).then(|| Arc::new(image(&seed)));
        let mut crew = Crew::eager(Pool::new("test", threads).unwrap());
        let one = whole(assembly(), &frames, totals, image(), None);
        let several = whole(assembly(), &frames, totals, image(), Some((&mut crew, group)));
        prop_assert!(one == several, "{:?} and {:?}", one.err(), several.err());
    }
}
