//! What must always hold, and what must be reached so that this says something.

use stateright::Property;

use super::super::Role;
use super::interleavings::Bounded;
use super::state::State;

pub(super) fn all() -> Vec<Property<Bounded>> {
    vec![
        Property::always("what was let out lies on one history", |_, s: &State| {
            // Sorted, so neighbours suffice.
            s.out.iter().zip(s.out.iter().skip(1)).all(|(a, b)| {
                let len = a.len().min(b.len());
                a[..len] == b[..len]
            })
        }),
        Property::always("one instance serves", |_, s: &State| {
            s.nodes.iter().filter(|node| node.serves()).count() <= 1
        }),
        Property::always("who serves has seen all that was let out", |_, s: &State| {
            s.nodes
                .iter()
                .filter(|node| node.serves())
                .all(|node| s.out.iter().all(|o| node.hist.starts_with(o)))
        }),
        Property::sometimes("the backup takes over", |_, s: &State| {
            s.nodes[1].runs && !s.nodes[1].gated && s.nodes[1].hist.contains(&1)
        }),
        Property::sometimes("the primary goes on alone", |_, s: &State| *s.nodes[0].dog.role() == Role::Solo),
        Property::sometimes("a claim is taken back", |_, s: &State| {
            *s.nodes[0].dog.role() == Role::Solo && s.nodes[0].generation == 1 && s.record.term.0 == 3
        }),
        Property::sometimes("protected again, the roles changed", |_, s: &State| {
            *s.nodes[1].dog.role() == Role::Protected && *s.nodes[0].dog.role() == Role::Standby
        }),
        Property::sometimes("the stale instance is ended", |_, s: &State| {
            *s.nodes[0].dog.role() == Role::Stale && !s.nodes[0].runs && s.crashes == 0
        }),
    ]
}
