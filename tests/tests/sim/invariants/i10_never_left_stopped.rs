//! Invariant 10: no guest is left stopped by a checkpoint. How long one may take while things fail is a matter of the
//! supervisor's; here: not for long when nothing fails.

use crate::world::{CHAOS, HOSTS, World};

/// Beyond what an agent holds a guest for a commit, and a rescue.
const LIMIT: u64 = 15_000;

pub(super) fn always(world: &World) -> Option<String> {
    let left = |h: &usize| {
        world.hosts[*h]
            .qemu
            .as_ref()
            .is_some_and(|qemu| qemu.stopped && world.now > qemu.stopped_since.max(CHAOS) + LIMIT)
    };
    let h = (0..2).find(left)?;
    Some(format!("invariant 10 (a guest is never left stopped): {} has stopped it for long", HOSTS[h]))
}
