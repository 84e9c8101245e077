//! Invariant 15: what is left of a guest on a host that has lost it is ended, and is no source of epochs.

use understudy_proto::ownership::Owner;
use understudy_proto::rpc::epoch::EpochRef;

use crate::world::guest::Kind;
use crate::world::{HOSTS, World};

/// When the world has come to rest.
pub(super) fn at_rest(world: &World) -> Option<String> {
    let record = world.arbiter.current()?;
    let (Owner::Pair { primary: owner, .. } | Owner::Solo { owner }) = &record.owner else { return None };
    let left = |h: &usize| {
        let qemu = world.hosts[*h].qemu.as_ref();
        HOSTS[*h] != owner
            && qemu.is_some_and(|qemu| qemu.kind == Kind::Active && qemu.generation < record.generation.0)
    };
    let h = (0..2).find(left)?;
    Some(format!("invariant 15 (a lost guest does not come back): an instance is left on {}", HOSTS[h]))
}

pub(super) fn acknowledged(world: &World, h: usize, at: EpochRef) -> Option<String> {
    let known = world.hosts[h].disk.control.as_ref()?.generation;
    (at.generation < known).then(|| {
        format!(
            "invariant 15 (a lost guest does not come back): {} commits {at:?} and knows generation {known}",
            HOSTS[h]
        )
    })
}
