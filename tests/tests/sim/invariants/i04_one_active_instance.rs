//! Invariant 4: only one host lets out what nobody has committed, and only the one that the arbiter names. A promoted
//! guest runs when its generation is on the disk.

use crate::world::{HOSTS, World};

pub(super) fn always(world: &World) -> Option<String> {
    let serving: Vec<usize> = (0..2).filter(|h| world.hosts[*h].serves()).collect();
    let what = match (serving.as_slice(), world.arbiter.alone()) {
        ([_, _], _) => "both hosts serve".to_owned(),
        ([h], Some(owner)) if owner != HOSTS[*h] => {
            format!("{} serves under {:?}", HOSTS[*h], world.arbiter.current())
        }
        _ => return None,
    };
    Some(format!("invariant 4 (one active instance): {what}"))
}

pub(super) fn activated(world: &World, h: usize, generation: u64) -> Option<String> {
    let written = world.hosts[h].disk.control.as_ref().map_or(0, |file| file.generation.0);
    (written < generation).then(|| {
        format!(
            "invariant 4 (one active instance): {} runs generation {generation}, its disk says {written}",
            HOSTS[h]
        )
    })
}
