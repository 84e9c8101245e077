//! Invariant 7: while its agent is dead nothing leaves a gate that is shut.

use crate::world::host::Process;
use crate::world::plug;
use crate::world::{HOSTS, World};

pub(super) fn frame(world: &World, h: usize) -> Option<String> {
    let host = &world.hosts[h];
    let shut = host.plug.as_ref().is_some_and(|gate| !plug::lock(gate).is_open());
    let dead = !host.is_alive(Process::Primary);
    (shut && dead).then(|| {
        format!(
            "invariant 7 (fail closed): a frame leaves the shut gate of {}, whose agent is dead",
            HOSTS[h]
        )
    })
}
