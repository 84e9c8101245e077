//! Invariant 8: released is only what is committed, which was sent, which was captured.

use crate::world::World;

pub(super) fn released(world: &World, generation: u64, epoch: u64) -> Option<String> {
    let committed = world
        .truth
        .values()
        .any(|truth| (truth.generation, truth.epoch) == (generation, epoch) && truth.committed);
    (!committed).then(|| {
        format!("invariant 8 (order): epoch {epoch} of generation {generation} is released and not committed")
    })
}
