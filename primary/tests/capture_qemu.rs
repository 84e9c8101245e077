//! Capture of a real guest under KVM. Says why and passes where there is no KVM or no QEMU.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Guest, Image, RAM_BYTES, dump, skip_reason};
use understudy_libvirt::{DomainEvent, Monitor, MonitorError, RunState, SocketMonitor, qmp};
use understudy_primary::capture::run_state::{RunTracker, Verdict, WaitReason};
use understudy_primary::capture::{
    Acknowledge, CaptureError, Checkpoint, CheckpointSource, ColoOptions, ColoSource, Rescue, rescue,
};

/// A guest, or the reason why there is none.
macro_rules! guest {
    ($machine:expr, $pages:expr) => {{
        if let Some(reason) = skip_reason() {
            println!("skipped: {reason}");
            return;
        }
        Guest::start($machine, $pages, &[]).unwrap()
    }};
}

fn source(guest: &Guest, options: ColoOptions) -> ColoSource {
    ColoSource::new(guest.monitor.clone(), options).unwrap()
}

fn settings(guest: &Guest) -> (Value, Value) {
    let query = |command| guest.command(command, Value::Null).unwrap();
    (query("query-migrate-capabilities"), query("query-migrate-parameters"))
}

/// One checkpoint, with the guest's memory dumped while it is stopped.
fn dumped_checkpoint(guest: &Guest, source: &mut ColoSource, image: &mut Image) -> (Checkpoint, Vec<u8>) {
    source.wait_ready().unwrap();
    let mut dumped = Vec::new();
    let mut barrier = || {
        dumped = guest.dump(0, RAM_BYTES as u64).map_err(|e| e.to_string())?;
        Ok(())
    };
    let checkpoint = source.checkpoint(&mut barrier, image).unwrap();
    (checkpoint, dumped)
}

fn plain_checkpoint(source: &mut ColoSource, image: &mut Image) -> Result<Checkpoint, CaptureError> {
    source.wait_ready()?;
    source.checkpoint(&mut || Ok(()), image)
}

#[test]
fn every_epoch_equals_what_qemu_dumps_at_the_stop() {
    let guest = guest!("pc", 500);
    let before = settings(&guest);
    let (mut pages, mut zero_pages) = (0, 0);
    for (acknowledge, checkpoints) in [(Acknowledge::Early, 50), (Acknowledge::Late, 5)] {
        // The second round arms the same QEMU again, with its guest running on.
        let mut source = source(&guest, ColoOptions { acknowledge, ..ColoOptions::default() });
        let mut image = Image::default();
        let armed = source.arm(&mut image).unwrap();
        assert_eq!(armed.layout.blocks()[0].used_bytes, RAM_BYTES as u64);
        assert!(armed.device.len() > 10_000 && armed.device.ends_with(&[0]), "{}", armed.device.len());
        assert_eq!(image.differences(&guest.dump(0, RAM_BYTES as u64).unwrap()), [0usize; 0], "full copy");
        source.start().unwrap();

        for n in 0..checkpoints {
            let before = image.zero_pages;
            // On a busy machine the guest might not come to anything between two stops.
            assert!(guest.counts().unwrap());
            let (checkpoint, dumped) = dumped_checkpoint(&guest, &mut source, &mut image);
            zero_pages += image.zero_pages - before;
            assert_eq!(image.differences(&dumped), [0usize; 0], "checkpoint {n} of {acknowledge:?}");
            assert_eq!(checkpoint.device.len(), armed.device.len());
            pages += checkpoint.pages;
        }
        if acknowledge == Acknowledge::Late {
            guest.command("system_reset", Value::Null).unwrap();
            for n in 0..3 {
                let (_, dumped) = dumped_checkpoint(&guest, &mut source, &mut image);
                assert_eq!(image.differences(&dumped), [0usize; 0], "checkpoint {n} after the reset");
            }
        }
        source.disarm().unwrap();
        assert_eq!(qmp::query_status(guest.monitor.as_ref()), Ok(RunState::Running));
        assert_eq!(settings(&guest), before, "settings are as they were");
    }
    // Every other round of the guest leaves a page of zeros, so a few checkpoints alone may have met none.
    assert!(pages > 1000 && zero_pages > 0, "{pages} pages and {zero_pages} of zeros");
}

/// A monitor as a dead agent has it: nothing gets through any more.
struct Mortal {
    monitor: Arc<SocketMonitor>,
    dead: AtomicBool,
}

impl Mortal {
    fn check(&self, command: &str) -> Result<(), MonitorError> {
        if self.dead.load(Ordering::SeqCst) {
            return Err(MonitorError::Gone { command: command.to_owned(), reason: "agent died".to_owned() });
        }
        Ok(())
    }
}

impl Monitor for Mortal {
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.check(command)?;
        self.monitor.execute(command, arguments)
    }

    fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError> {
        self.check(command)?;
        self.monitor.execute_with_fd(command, arguments, fd)
    }
}

#[test]
fn a_guest_whose_agent_died_is_rescued() {
    let guest = guest!("q35", 100);
    let monitor = guest.monitor.as_ref();
    assert_eq!(rescue(monitor).unwrap(), Rescue::NotNeeded);

    // Where the agent dies, and what it leaves the guest in.
    for (place, left_in) in [
        ("full copy read", RunState::FinishMigrate),
        ("guest stopped", RunState::Colo),
        ("guest running", RunState::Running),
    ] {
        let mortal = Arc::new(Mortal { monitor: guest.monitor.clone(), dead: AtomicBool::new(false) });
        let die = || mortal.dead.store(true, Ordering::SeqCst);
        let mut source = ColoSource::new(mortal.clone(), ColoOptions::default()).unwrap();
        let mut image = Image::default();
        source.arm(&mut image).unwrap();
        if place != "full copy read" {
            source.start().unwrap();
            for _ in 0..3 {
                plain_checkpoint(&mut source, &mut image).unwrap();
            }
            // With a REQUEST the guest runs for sure: the last byte of a checkpoint is read before that.
            source.wait_ready().unwrap();
        }
        if place == "guest stopped" {
            let mut barrier = || {
                die();
                Err("dead".to_owned())
            };
            let error = source.checkpoint(&mut barrier, &mut image).unwrap_err();
            assert!(matches!(error, CaptureError::Barrier { .. }), "{error}");
        }
        die();
        drop(source);

        assert_eq!(qmp::query_status(monitor), Ok(left_in.clone()), "{place}");
        let rescued = rescue(monitor).unwrap();
        assert_eq!(rescued, Rescue::Rescued { found: left_in, now: RunState::Running }, "{place}");
        assert!(guest.counts().unwrap(), "{place}");
        assert_eq!(rescue(monitor).unwrap(), Rescue::NotNeeded);
        assert_eq!(qmp::query_capabilities(monitor).unwrap().get("x-colo"), Some(&false));
    }

    let mut source = source(&guest, ColoOptions::default());
    let mut image = Image::default();
    source.arm(&mut image).unwrap();
    source.start().unwrap();
    plain_checkpoint(&mut source, &mut image).unwrap();
    source.disarm().unwrap();
}

#[test]
fn failures_and_interruptions_leave_the_guest_running() {
    let guest = guest!("pc", 100);
    let running = || {
        assert_eq!(qmp::query_status(guest.monitor.as_ref()), Ok(RunState::Running));
        assert!(!qmp::query_yank_has_migration(guest.monitor.as_ref()).unwrap());
    };
    let mut source = source(&guest, ColoOptions::default());
    let mut image = Image::default();

    // The barrier fails while the guest is stopped.
    source.arm(&mut image).unwrap();
    source.start().unwrap();
    plain_checkpoint(&mut source, &mut image).unwrap();
    source.wait_ready().unwrap();
    let error = source.checkpoint(&mut || Err("no".to_owned()), &mut image).unwrap_err();
    assert_eq!(error.to_string(), "the barrier of a checkpoint failed: no");
    running();
    assert!(matches!(source.wait_ready(), Err(CaptureError::OutOfTurn { .. })));

    // Interrupted while it waits for a REQUEST that is far away.
    let far = ColoOptions { checkpoint_delay: Duration::from_secs(600), ..ColoOptions::default() };
    let mut source = ColoSource::new(guest.monitor.clone(), far).unwrap();
    source.arm(&mut image).unwrap();
    source.start().unwrap();
    let interrupter = source.interrupter();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            interrupter.interrupt();
        });
        assert!(matches!(source.wait_ready(), Err(CaptureError::Interrupted)));
    });
    assert!(begun.elapsed() < Duration::from_secs(20));
    running();
    assert!(matches!(source.arm(&mut image), Err(CaptureError::Interrupted)), "in force until disarm");
    source.disarm().unwrap();
    drop(source);

    // Disarmed before it was started.
    let mut source = self::source(&guest, ColoOptions::default());
    source.arm(&mut image).unwrap();
    source.disarm().unwrap();
    running();

    // Suspended by an operator: stays so when capture ends.
    source.arm(&mut image).unwrap();
    source.start().unwrap();
    // Before the REQUEST it may still be on its way to running, and would go on to run.
    source.wait_ready().unwrap();
    guest.command("stop", Value::Null).unwrap();
    source.disarm().unwrap();
    assert_eq!(qmp::query_status(guest.monitor.as_ref()), Ok(RunState::Paused));
    guest.command("cont", Value::Null).unwrap();

    // Dropped while armed.
    source.arm(&mut image).unwrap();
    drop(source);
    running();
    assert!(guest.counts().unwrap());
}

/// A monitor that cannot carry descriptors.
struct NoFds(Arc<SocketMonitor>);

impl Monitor for NoFds {
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.0.execute(command, arguments)
    }

    fn execute_with_fd(&self, command: &str, _: Value, _: BorrowedFd<'_>) -> Result<Value, MonitorError> {
        Err(MonitorError::FdUnsupported { command: command.to_owned(), reason: "remote".to_owned() })
    }
}

#[test]
fn the_run_tracker_follows_real_events_and_the_socket_may_be_a_path() {
    let guest = guest!("pc", 100);
    let socket_dir: PathBuf = guest.dir.path().to_owned();
    let options = ColoOptions { socket_dir: Some(socket_dir.clone()), ..ColoOptions::default() };
    let mut source = ColoSource::new(Arc::new(NoFds(guest.monitor.clone())), options).unwrap();
    let mut image = Image::default();
    let mut tracker = RunTracker::new();
    source.arm(&mut image).unwrap();
    source.start().unwrap();
    tracker.started();

    let feed = |tracker: &mut RunTracker| {
        guest.events.try_iter().for_each(|event| tracker.event(&DomainEvent::Qmp(event)));
    };
    // What an agent does between two checkpoints; the last verdict if it is not Yes within 2 s.
    let settle = |tracker: &mut RunTracker| {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            feed(tracker);
            match tracker.verdict() {
                Verdict::AskQemu(question) => {
                    let state = qmp::query_status(guest.monitor.as_ref()).unwrap();
                    tracker.answer(question, &state);
                }
                Verdict::Yes => return Verdict::Yes,
                other if Instant::now() > deadline => return other,
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let checkpoint = |tracker: &mut RunTracker, source: &mut ColoSource, image: &mut Image| {
        source.wait_ready().unwrap();
        assert_eq!(settle(tracker), Verdict::Yes);
        tracker.reply_sent();
        source.checkpoint(&mut || Ok(()), image).unwrap();
        tracker.checkpoint_done();
    };
    for _ in 0..20 {
        checkpoint(&mut tracker, &mut source, &mut image);
    }
    assert_eq!(
        std::fs::read_dir(&socket_dir).unwrap().filter(|e| name_of(e).starts_with("capture-")).count(),
        0
    );

    source.wait_ready().unwrap();
    guest.command("stop", Value::Null).unwrap();
    assert_eq!(settle(&mut tracker), Verdict::Wait(WaitReason::StoppedByOthers));
    guest.command("cont", Value::Null).unwrap();
    checkpoint(&mut tracker, &mut source, &mut image);

    guest.command("system_reset", Value::Null).unwrap();
    checkpoint(&mut tracker, &mut source, &mut image);
    source.disarm().unwrap();
    assert!(dump(guest.monitor.as_ref(), guest.dir.path(), 0, 4096).is_ok());
    assert_eq!(guest.command("query-colo-status", Value::Null).unwrap()["mode"], json!("none"));
}

fn name_of(entry: &std::io::Result<std::fs::DirEntry>) -> String {
    entry.as_ref().map(|e| e.file_name().to_string_lossy().into_owned()).unwrap_or_default()
}
