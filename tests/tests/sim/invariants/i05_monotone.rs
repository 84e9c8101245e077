//! Invariant 5: committed epochs of a generation, generations and terms never go back.

use understudy_proto::control::{ControlFile, Role};

use crate::world::{HOSTS, World};

pub(super) fn applied(world: &mut World, h: usize) -> Option<String> {
    let agent = world.hosts[h].backup.as_ref()?;
    let (life, at) = (agent.incarnation().0, agent.holds()?);
    let before = world.watchers.committed.insert(life, at)?;
    let back = (before.generation.0, before.epoch.0) >= (at.generation.0, at.epoch.0);
    back.then(|| format!("invariant 5 (monotone): {} commits {at:?} after {before:?}", HOSTS[h]))
}

pub(super) fn written(world: &mut World, h: usize, file: &ControlFile) -> Option<String> {
    if let Some(agent) = world.hosts[h].backup.as_ref().filter(|_| file.role == Role::Released) {
        // A protection that has ended: the next one counts anew.
        let life = agent.incarnation().0;
        world.watchers.committed.remove(&life);
    }
    let before = world.hosts[h].disk.control.as_ref()?.generation;
    (file.generation < before).then(|| {
        format!("invariant 5 (monotone): {} writes generation {} over {before}", HOSTS[h], file.generation)
    })
}

pub(super) fn record(world: &World) -> Option<String> {
    let [.., before, now] = world.arbiter.history.as_slice() else { return None };
    let back = now.generation < before.generation || now.term != before.term.next();
    back.then(|| format!("invariant 5 (monotone): {now:?} replaces {before:?}"))
}
