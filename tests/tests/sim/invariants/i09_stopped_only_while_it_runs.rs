//! Invariant 9: a checkpoint begins only while the guest is known to run.

use crate::world::{HOSTS, World};

pub(super) fn checkpoint(world: &World, h: usize) -> Option<String> {
    let qemu = world.hosts[h].qemu.as_ref()?;
    (qemu.paused || qemu.stopped).then(|| {
        format!("invariant 9 (the guest is stopped only while it runs): {} stops it again", HOSTS[h])
    })
}
