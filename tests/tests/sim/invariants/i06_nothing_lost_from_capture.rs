//! Invariant 6: every page that was written is in a committed epoch, so the image after it is what the guest was.

use crate::world::guest::{Memory, capture_of};
use crate::world::{HOSTS, World};

pub(super) fn applied(world: &mut World, h: usize) -> Option<String> {
    let image = world.hosts[h].backup.as_ref()?.image()?;
    let (memory, capture) = (Memory::of(image), capture_of(image));
    let truth = world.truth.get_mut(&capture)?;
    truth.committed = true;
    let covered = world.watchers.committed_frames.entry(truth.instance).or_default();
    *covered = (*covered).max(truth.frames);
    (truth.memory != memory)
        .then(|| format!("invariant 6 (nothing lost from capture): {} has {memory:?} as {truth:?}", HOSTS[h]))
}
