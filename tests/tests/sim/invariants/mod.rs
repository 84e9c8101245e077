//! What must never happen: a file for each invariant of `docs/INVARIANTS.md`, by its number. Each gives what is wrong, if
//! something is.

mod i01_output_commit;
mod i02_all_or_nothing;
mod i03_ack_means_held;
mod i04_one_active_instance;
mod i05_monotone;
mod i06_nothing_lost_from_capture;
mod i07_fail_closed;
mod i08_order;
mod i09_stopped_only_while_it_runs;
mod i10_never_left_stopped;
mod i13_the_record_decides;
mod i14_not_before_the_confirmation;
mod i15_a_lost_guest_does_not_come_back;

use std::collections::HashMap;

use understudy_backup::image::Image;
use understudy_proto::control::ControlFile;
use understudy_proto::rpc::epoch::EpochRef;
use understudy_watchdog::owner::Role;

use crate::world::World;
use crate::world::plug::Frame;

/// Invariants this world cannot break, and what tests them.
#[cfg(test)]
const ELSEWHERE: [(u32, &str); 5] = [
    (11, "hooks of libvirt: libvirt-hooks/hook/tests/dependencies.rs"),
    (12, "reports in a domain's XML: primary/src/metadata/engine_tests.rs"),
    (16, "known names only: proto's tests of tls, primary/tests/admin_generic.rs, scenario admin"),
    (18, "ends that nobody has ordered here: primary/src/engine/tests.rs"),
    (17, "heartbeats: proto/src/sealed/tests.rs, watchdog/src/keeper/tests/forged.rs"),
];

/// What the checkers remember.
#[derive(Debug, Default)]
pub(crate) struct Watchers {
    /// Frames of each instance that committed epochs cover.
    pub(crate) committed_frames: HashMap<u16, u64>,
    /// What each life of a backup agent has committed last.
    pub(crate) committed: HashMap<uuid::Uuid, EpochRef>,
}

/// After everything that happens.
pub(crate) fn always(world: &World) -> Vec<String> {
    let found = [
        i01_output_commit::always(world),
        i04_one_active_instance::always(world),
        i10_never_left_stopped::always(world),
    ];
    found.into_iter().flatten().collect()
}

/// A frame is on the network.
pub(crate) fn frame(world: &World, h: usize, frame: Frame) -> Vec<String> {
    let found = [i01_output_commit::frame(world, h, frame), i07_fail_closed::frame(world, h)];
    found.into_iter().flatten().collect()
}

/// The arbiter has a new record.
pub(crate) fn record(world: &World) -> Vec<String> {
    i05_monotone::record(world).into_iter().collect()
}

/// A call of the capture begins.
pub(crate) fn capture(world: &World, h: usize, stops: bool) -> Vec<String> {
    let found = stops.then(|| i09_stopped_only_while_it_runs::checkpoint(world, h));
    found.flatten().into_iter().collect()
}

/// An epoch is in the image.
pub(crate) fn applied(world: &mut World, h: usize) -> Vec<String> {
    let found = [i06_nothing_lost_from_capture::applied(world, h), i05_monotone::applied(world, h)];
    found.into_iter().flatten().collect()
}

/// An epoch is acknowledged.
pub(crate) fn acknowledged(world: &World, h: usize, at: EpochRef) -> Vec<String> {
    let found = [
        i03_ack_means_held::acknowledged(world, h, at),
        i15_a_lost_guest_does_not_come_back::acknowledged(world, h, at),
    ];
    found.into_iter().flatten().collect()
}

/// Nothing fails any more, and the guest is served and protected.
pub(crate) fn at_rest(world: &World) -> Vec<String> {
    i15_a_lost_guest_does_not_come_back::at_rest(world).into_iter().collect()
}

/// The output of an epoch is let go.
pub(crate) fn released(world: &World, generation: u64, epoch: u64) -> Vec<String> {
    i08_order::released(world, generation, epoch).into_iter().collect()
}

/// A control file is written.
pub(crate) fn written(world: &mut World, h: usize, file: &ControlFile) -> Vec<String> {
    i05_monotone::written(world, h, file).into_iter().collect()
}

/// An image goes into a standby.
pub(crate) fn loaded(world: &World, h: usize, image: &Image) -> Vec<String> {
    i02_all_or_nothing::loaded(world, h, image).into_iter().collect()
}

/// A promoted guest runs.
pub(crate) fn activated(world: &World, h: usize, generation: u64) -> Vec<String> {
    let found = [
        i04_one_active_instance::activated(world, h, generation),
        i14_not_before_the_confirmation::activated(world, h),
    ];
    found.into_iter().flatten().collect()
}

/// A keeper takes its host for something else.
pub(crate) fn became(world: &World, h: usize, role: &Role) -> Vec<String> {
    i13_the_record_decides::became(world, h, role).into_iter().collect()
}

#[test]
fn every_invariant_of_the_document_has_a_checker_or_a_reason() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = std::fs::read_to_string(root.join("../docs/INVARIANTS.md")).unwrap();
    let files = std::fs::read_dir(root.join("tests/sim/invariants")).unwrap();
    let files: Vec<String> =
        files.map(|file| file.unwrap().file_name().to_string_lossy().into_owned()).collect();
    let numbers = document.lines().filter_map(|line| line.split_once(". **")?.0.parse::<u32>().ok());
    let mut count = 0;
    for number in numbers {
        count += 1;
        let checked = files.iter().any(|file| file.starts_with(&format!("i{number:02}_")));
        let elsewhere = ELSEWHERE.iter().any(|(other, _)| *other == number);
        assert!(checked != elsewhere, "invariant {number}: one of both");
    }
    assert!(count >= 14, "{count} invariants were found");
}
