//! Invariant 3: what is acknowledged is here, whole.

use understudy_proto::rpc::epoch::EpochRef;

use crate::world::{HOSTS, World};

pub(super) fn acknowledged(world: &World, h: usize, at: EpochRef) -> Option<String> {
    let agent = world.hosts[h].backup.as_ref()?;
    (agent.holds() != Some(at) || !agent.is_whole()).then(|| {
        format!(
            "invariant 3 (an acknowledgement means the epoch is held): {} acknowledges {at:?} and holds {:?}",
            HOSTS[h],
            agent.holds()
        )
    })
}
