//! Invariant 1: what the guest sent in an epoch leaves only when that epoch is committed. The other way out is the
//! arbiter's word that the guest runs here alone. What follows for those outside: nobody is ever told of something the
//! guest then does not know.

use crate::world::plug::Frame;
use crate::world::{HOSTS, World};

pub(super) fn frame(world: &World, h: usize, frame: Frame) -> Option<String> {
    let covered = world.watchers.committed_frames.get(&frame.instance).copied().unwrap_or(0);
    if frame.number <= covered || alone(world, h) {
        return None;
    }
    Some(format!(
        "invariant 1 (output commit): frame {} of instance {} leaves {}, {covered} are committed",
        frame.number, frame.instance, HOSTS[h]
    ))
}

/// Whether output may go as it comes.
fn alone(world: &World, h: usize) -> bool {
    world.arbiter.alone().is_none_or(|owner| owner == HOSTS[h])
}

pub(super) fn always(world: &World) -> Option<String> {
    let lacking = (0..2).find_map(|h| world.lacks(h))?;
    Some(format!("invariant 1 (output commit): {lacking}"))
}
