//! Invariant 2: what is promoted is exactly what the guest was at the end of one epoch, memory and device state.

use understudy_backup::image::Image;

use crate::world::guest::{Memory, capture_of};
use crate::world::{HOSTS, World};

pub(super) fn loaded(world: &World, h: usize, image: &Image) -> Option<String> {
    let (memory, capture) = (Memory::of(image), capture_of(image));
    let truth = world.truth.get(&capture);
    let at = image.at();
    let whole = truth.is_some_and(|truth| {
        truth.memory == memory
            && at.is_some_and(|at| (at.generation.0, at.epoch.0) == (truth.generation, truth.epoch))
    });
    (!whole).then(|| {
        format!(
            "invariant 2 (all or nothing): {} loads {memory:?} with the devices of capture {capture}, which was {truth:?}",
            HOSTS[h]
        )
    })
}
