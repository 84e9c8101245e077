//! [`ColoSource`] against a QEMU that fails in every way and at every place.

mod fake;

use std::sync::Arc;
use std::time::Duration;

use fake::{FakeQemu, Fault, Place, RAM_PAGES, SHORT, devices};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::{BlockIndex, PageData, PageIndex};

use super::*;

const V7: (u32, u32, u32) = (7, 2, 22);

/// The first byte of every page.
#[derive(Default)]
struct FirstBytes(Vec<u8>);

impl PageSink for FirstBytes {
    fn layout(&mut self, layout: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        assert_eq!(layout.blocks()[0].name, "pc.ram");
        self.0 = vec![0xee; usize::try_from(RAM_PAGES).unwrap()];
        Ok(())
    }

    fn page(&mut self, _: BlockIndex, page: PageIndex, content: Option<&PageData>) -> Result<(), SinkClosed> {
        self.0[usize::try_from(page.get()).unwrap()] = content.map_or(0, |content| content[0]);
        Ok(())
    }
}

fn options() -> ColoOptions {
    ColoOptions {
        silence_running: SHORT,
        silence_stopped: SHORT,
        checkpoint_delay: Duration::ZERO,
        exit_limit: SHORT,
        ..ColoOptions::default()
    }
}

fn source(qemu: &FakeQemu) -> ColoSource {
    ColoSource::new(Arc::new(qemu.clone()), options()).unwrap()
}

/// A whole capture with three checkpoints.
fn capture(qemu: &FakeQemu, source: &mut ColoSource) -> Result<(), CaptureError> {
    let mut pages = FirstBytes::default();
    let armed = source.arm(&mut pages)?;
    assert_eq!(armed.device, devices());
    assert_eq!(pages.0, (0..16).collect::<Vec<u8>>());
    assert_eq!(qemu.state().run_state, "finish-migrate");
    source.start()?;
    for n in 0..3 {
        source.wait_ready()?;
        let mut barrier = || {
            assert_eq!(qemu.state().run_state, "colo");
            qemu.state().barrier_done = true;
            Ok(())
        };
        let checkpoint = source.checkpoint(&mut barrier, &mut pages)?;
        assert_eq!((checkpoint.pages, checkpoint.device), (2, devices().into()));
        assert_eq!((pages.0[0], pages.0[1], pages.0[2], pages.0[3]), (0, 0, 100 + n, 3));
    }
    source.disarm()
}

/// The guest runs, nothing is left of capture, and it can begin anew.
fn check_left_well(qemu: &FakeQemu, source: &mut ColoSource, what: &str) {
    let fresh = FakeQemu::new(V7, Fault::None);
    {
        let mut state = qemu.state();
        assert_eq!((state.run_state, state.mode, state.yank), ("running", "none", false), "{what}");
        assert_eq!(state.capabilities, fresh.state().capabilities, "{what}");
        assert_eq!(state.parameters, fresh.state().parameters, "{what}");
        state.fault = Fault::None;
    }
    capture(qemu, source).unwrap_or_else(|error| panic!("armed again after {what}: {error}"));
    assert_eq!(qemu.state().complaints, [""; 0], "{what}");
}

#[test]
fn all_dialects_without_a_fault() {
    for (version, dialect) in [(V7, Dialect::V7_2), ((10, 0, 13), Dialect::V10_0), ((11, 1, 3), Dialect::V11)]
    {
        let qemu = FakeQemu::new(version, Fault::None);
        let mut source = source(&qemu);
        capture(&qemu, &mut source).unwrap();
        check_left_well(&qemu, &mut source, &dialect.to_string());
    }
}

#[test]
fn the_return_path_is_as_qemu_wants_it_whatever_its_version() {
    for (version, return_path) in [((10, 2, 0), true), ((11, 0, 0), false)] {
        let qemu = FakeQemu::new(version, Fault::None);
        qemu.state().return_path = return_path;
        let mut source = source(&qemu);
        capture(&qemu, &mut source).unwrap();
        check_left_well(&qemu, &mut source, &format!("{version:?} with return path {return_path}"));
    }
}

#[test]
fn late_acknowledgement_is_as_correct() {
    let qemu = FakeQemu::new(V7, Fault::None);
    let options = ColoOptions { acknowledge: Acknowledge::Late, ..options() };
    let mut source = ColoSource::new(Arc::new(qemu.clone()), options).unwrap();
    capture(&qemu, &mut source).unwrap();
    check_left_well(&qemu, &mut source, "late");
}

/// The reader must read on while it gives an order: QEMU answers when it has written what it is writing.
#[test]
fn a_full_copy_does_not_wait_for_a_monitor_that_waits_for_it() {
    let qemu = FakeQemu::new(V7, Fault::MonitorShut);
    let options =
        ColoOptions { socket_buffer_bytes: None, convergence_patience: Duration::ZERO, ..options() };
    let mut source = ColoSource::new(Arc::new(qemu.clone()), options).unwrap();
    capture(&qemu, &mut source).unwrap();
    check_left_well(&qemu, &mut source, "a monitor that was shut");
}

fn phase_of(place: Place) -> Phase {
    match place {
        Place::Precopy => Phase::Precopy,
        Place::Devices => Phase::Switchover,
        Place::Request => Phase::WaitReady,
        Place::Send => Phase::Stop,
        Place::Memory | Place::DeviceBuffer => Phase::Transfer,
    }
}

#[test]
fn qemu_hangs_anywhere() {
    for place in Place::ALL {
        let qemu = FakeQemu::new(V7, Fault::Hangs(place));
        let mut source = source(&qemu);
        let error = capture(&qemu, &mut source).unwrap_err();
        let wanted = phase_of(place);
        assert!(matches!(error, CaptureError::Silent { phase, .. } if phase == wanted), "{place:?}: {error}");
        check_left_well(&qemu, &mut source, &format!("a hang at {place:?}"));
    }
}

#[test]
fn qemu_sends_garbage_anywhere() {
    for place in Place::ALL {
        let qemu = FakeQemu::new(V7, Fault::Garbage(place));
        let mut source = source(&qemu);
        let error = capture(&qemu, &mut source).unwrap_err();
        let wanted = phase_of(place);
        assert!(matches!(error, CaptureError::Stream { phase, .. } if phase == wanted), "{place:?}: {error}");
        check_left_well(&qemu, &mut source, &format!("garbage at {place:?}"));
    }
}

#[test]
fn qemu_closes_the_socket_anywhere() {
    for place in Place::ALL {
        let qemu = FakeQemu::new(V7, Fault::Closes(place));
        let mut source = source(&qemu);
        let error = capture(&qemu, &mut source).unwrap_err();
        let wanted = phase_of(place);
        match error {
            CaptureError::Closed { phase, .. } if phase == wanted => {}
            // A migration that fails says so.
            CaptureError::NotEntered { status, .. } if status == "failed" => {}
            other => panic!("{place:?}: {other}"),
        }
        check_left_well(&qemu, &mut source, &format!("a close at {place:?}"));
    }
}

#[test]
fn qemu_dies_anywhere() {
    for place in Place::ALL {
        let qemu = FakeQemu::new(V7, Fault::Dies(place));
        let mut source = source(&qemu);
        let error = capture(&qemu, &mut source).unwrap_err();
        assert!(error.is_gone() || matches!(error, CaptureError::Closed { .. }), "{place:?}: {error}");
        assert!(!matches!(error, CaptureError::GuestLeftStopped { .. }), "{place:?}: {error}");
        assert!(source.disarm().is_ok());
        assert!(source.arm(&mut FirstBytes::default()).unwrap_err().is_gone());
    }
}

#[test]
fn request_instead_of_send() {
    let qemu = FakeQemu::new(V7, Fault::RequestTwice);
    let mut source = source(&qemu);
    let error = capture(&qemu, &mut source).unwrap_err();
    assert!(matches!(error, CaptureError::Stream { phase: Phase::Stop, .. }), "{error}");
    check_left_well(&qemu, &mut source, "a second request");
}

#[test]
fn a_migration_that_does_not_enter_colo_is_rescued() {
    for status in ["completed", "failed"] {
        let qemu = FakeQemu::new(V7, Fault::EndsAs(status));
        let mut source = source(&qemu);
        let error = capture(&qemu, &mut source).unwrap_err();
        assert!(matches!(&error, CaptureError::NotEntered { status: s, .. } if s == status), "{error}");
        assert!(error.to_string().starts_with("QEMU 7.2.22 ended the full copy"), "{error}");
        check_left_well(&qemu, &mut source, status);
    }
}

/// Its agent died before it could say `cont`.
#[test]
fn a_completed_capture_of_a_dead_agent_is_rescued_and_a_guest_that_moved_away_is_not() {
    for (colo, wanted) in [(true, "running"), (false, "postmigrate")] {
        let qemu = FakeQemu::new((10, 0, 2), Fault::None);
        qemu.state().run_state = "postmigrate";
        qemu.state().capabilities.insert("x-colo", colo);
        let rescue = rescue(&qemu).unwrap();
        assert_eq!(matches!(rescue, Rescue::Rescued { .. }), colo, "{rescue:?}");
        let state = qemu.state();
        assert_eq!((state.run_state, state.capabilities["x-colo"]), (wanted, false));
    }
}

#[test]
fn lost_heartbeat_refused_and_ignored() {
    let qemu = FakeQemu::new(V7, Fault::HeartbeatRefused);
    let mut source = source(&qemu);
    capture(&qemu, &mut source).unwrap();
    check_left_well(&qemu, &mut source, "a refused lost-heartbeat");

    qemu.state().fault = Fault::HeartbeatIgnored;
    let error = capture(&qemu, &mut source).unwrap_err();
    assert!(matches!(error, CaptureError::Silent { phase: Phase::Exit, .. }), "{error}");

    let mut pages = FirstBytes::default();
    let busy = source.arm(&mut pages).unwrap_err();
    assert!(matches!(busy, CaptureError::Busy { .. }), "{busy}");

    qemu.state().fault = Fault::None;
    assert!(matches!(rescue(&qemu), Ok(Rescue::Rescued { .. })));
    let state = qemu.state();
    assert_eq!((state.mode, state.capabilities["x-colo"]), ("none", false));
}

#[test]
fn the_cause_is_kept_when_the_guest_could_not_be_rescued() {
    let qemu = FakeQemu::new(V7, Fault::None);
    let mut source = source(&qemu);
    let mut pages = FirstBytes::default();
    source.arm(&mut pages).unwrap();
    source.start().unwrap();
    source.wait_ready().unwrap();
    qemu.state().fault = Fault::HeartbeatIgnored;
    let error = source.checkpoint(&mut || Err("no gate".into()), &mut pages).unwrap_err();
    let CaptureError::GuestLeftStopped { cause, reason } = error else { panic!("{error}") };
    assert!(matches!(*cause, CaptureError::Barrier { .. }), "{cause}");
    assert!(matches!(*reason, CaptureError::Silent { phase: Phase::Exit, .. }), "{reason}");
}

/// Closes after some pages.
struct Closing(u32);

impl PageSink for Closing {
    fn layout(&mut self, _: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        Ok(())
    }

    fn page(&mut self, _: BlockIndex, _: PageIndex, _: Option<&PageData>) -> Result<(), SinkClosed> {
        self.0 = self.0.checked_sub(1).ok_or(SinkClosed)?;
        Ok(())
    }
}

#[test]
fn a_sink_that_closes_and_a_barrier_that_fails() {
    let qemu = FakeQemu::new(V7, Fault::None);
    let mut source = source(&qemu);
    assert!(matches!(source.arm(&mut Closing(5)), Err(CaptureError::SinkClosed(_))));
    check_left_well(&qemu, &mut source, "a sink that closed in the full copy");
    for barrier in [Ok(()), Err("no".to_owned())] {
        source.arm(&mut FirstBytes::default()).unwrap();
        source.start().unwrap();
        source.wait_ready().unwrap();
        let mut called = || {
            qemu.state().barrier_done = true;
            barrier.clone()
        };
        let error = source.checkpoint(&mut called, &mut Closing(1)).unwrap_err();
        assert!(matches!(error, CaptureError::SinkClosed(_) | CaptureError::Barrier { .. }), "{error}");
        check_left_well(&qemu, &mut source, "a checkpoint that was given up");
    }
}

#[test]
fn calls_out_of_turn_change_nothing() {
    let qemu = FakeQemu::new(V7, Fault::None);
    let mut source = source(&qemu);
    let mut pages = FirstBytes::default();
    let refused = |result: Result<(), CaptureError>| {
        assert!(matches!(result, Err(CaptureError::OutOfTurn { .. })), "{result:?}");
    };
    refused(source.start());
    refused(source.wait_ready());
    source.arm(&mut pages).unwrap();
    refused(source.arm(&mut pages).map(drop));
    refused(source.checkpoint(&mut || Ok(()), &mut pages).map(drop));
    source.start().unwrap();
    source.wait_ready().unwrap();
    source.wait_ready().unwrap();
    refused(source.start());
    source.disarm().unwrap();
    source.disarm().unwrap();
    check_left_well(&qemu, &mut source, "calls out of turn");
}

#[test]
fn an_interruption_ends_a_wait_in_the_stopped_guest() {
    let qemu = FakeQemu::new(V7, Fault::Hangs(Place::Memory));
    let long = Duration::from_secs(600);
    let options = ColoOptions { silence_stopped: long, silence_running: long, ..options() };
    let mut source = ColoSource::new(Arc::new(qemu.clone()), options).unwrap();
    let interrupter = source.interrupter();
    let mut pages = FirstBytes::default();
    source.arm(&mut pages).unwrap();
    source.start().unwrap();
    source.wait_ready().unwrap();
    let mut barrier = || {
        interrupter.interrupt();
        Ok(())
    };
    let error = source.checkpoint(&mut barrier, &mut pages).unwrap_err();
    assert!(matches!(error, CaptureError::Interrupted), "{error}");
    source.disarm().unwrap();
    check_left_well(&qemu, &mut source, "an interruption");
}

#[test]
fn unusable_versions_are_refused_before_anything_is_touched() {
    let qemu = FakeQemu::new((10, 0, 2), Fault::None);
    let mut source = source(&qemu);
    let error = source.arm(&mut FirstBytes::default()).unwrap_err();
    assert!(matches!(error, CaptureError::Unsupported(_)), "{error}");
    assert!(!qemu.state().capabilities["x-colo"] && qemu.state().status.is_none());
}
