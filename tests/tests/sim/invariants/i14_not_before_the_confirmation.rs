//! Invariant 14: a claimed guest runs only when the arbiter says that it is its new host's.

use understudy_proto::ownership::Owner;

use crate::world::{HOSTS, World};

pub(super) fn activated(world: &World, h: usize) -> Option<String> {
    let owner = world.arbiter.current().map(|record| &record.owner);
    let confirmed = matches!(owner, Some(Owner::Solo { owner }) if owner == HOSTS[h]);
    (!confirmed).then(|| {
        format!(
            "invariant 14 (no serving before the confirmation): {} runs the guest under {owner:?}",
            HOSTS[h]
        )
    })
}
