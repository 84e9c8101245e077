//! Invariant 13: a host takes itself for the guest's owner, or for the one that loads it, only by a record that was there.

use understudy_proto::ownership::Owner;
use understudy_watchdog::owner::Role;

use crate::world::{HOSTS, World};

pub(super) fn became(world: &World, h: usize, role: &Role) -> Option<String> {
    let record = world.hosts[h].keeper.as_ref().and_then(|keeper| keeper.record());
    let stood = record.is_some_and(|record| world.arbiter.of(record.term) == Some(record));
    let fits = match (role, record.map(|record| &record.owner)) {
        (Role::Solo, Some(Owner::Solo { owner })) => owner == HOSTS[h],
        (Role::Loading | Role::Loaded, Some(Owner::Claim { by, .. })) => by == HOSTS[h],
        (Role::Protected, Some(Owner::Pair { primary, .. })) => primary == HOSTS[h],
        (Role::Solo | Role::Loading | Role::Loaded | Role::Protected, _) => false,
        _ => return None,
    };
    (!stood || !fits).then(|| {
        format!("invariant 13 (the record decides): {} becomes {} by {record:?}", HOSTS[h], role.label())
    })
}
