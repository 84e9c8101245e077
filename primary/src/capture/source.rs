//! The source that is QEMU's COLO peer.

use std::fmt;
use std::sync::Arc;

use tracing::{info, warn};
use understudy_libvirt::{Monitor, QemuVersion, RunState, qmp};

use super::checkpoint::Checkpoints;
use super::exit::leave;
use super::link::Link;
use super::precopy::Precopy;
use super::settings::Settings;
use super::{
    Armed, CaptureError, Checkpoint, CheckpointSource, ColoOptions, Dialect, Interrupter, PageSink, Phase,
    channel,
};

/// Captures a guest of an unmodified QEMU as its COLO peer; see [the module](super).
pub struct ColoSource {
    monitor: Arc<dyn Monitor>,
    options: ColoOptions,
    interrupter: Interrupter,
    state: State,
    /// The next checkpoint leaves the guest stopped.
    hold: bool,
}

/// How far the guest's capture is.
enum State {
    Idle,
    /// Full copy complete, guest stopped.
    Stopped(Capture),
    /// Checkpoint complete, guest stopped.
    Held(Capture),
    /// Guest runs, no REQUEST yet.
    Running(Capture),
    /// Guest runs, REQUEST is here.
    Ready(Capture),
}

struct Capture {
    checkpoints: Checkpoints,
    settings: Settings,
}

impl State {
    fn label(&self) -> &'static str {
        match self {
            Self::Idle => "not armed",
            Self::Stopped(_) => "not started",
            Self::Held(_) => "held at a checkpoint",
            Self::Running(_) => "running",
            Self::Ready(_) => "ready for a checkpoint",
        }
    }
}

impl fmt::Debug for ColoSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ColoSource")
            .field("options", &self.options)
            .field("state", &self.state.label())
            .finish_non_exhaustive()
    }
}

impl ColoSource {
    /// A source for the guest behind `monitor`. Nothing is asked of QEMU yet.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new(monitor: Arc<dyn Monitor>, options: ColoOptions) -> Result<Self, CaptureError> {
        let interrupter =
            Interrupter::new().map_err(|source| CaptureError::Socket { phase: Phase::Setup, source })?;
        Ok(Self { monitor, options, interrupter, state: State::Idle, hold: false })
    }

    /// What can be refused without touching anything.
    fn check(&self) -> Result<(QemuVersion, Dialect), CaptureError> {
        let error = |source| CaptureError::Monitor { phase: Phase::Setup, source };
        if self.interrupter.is_interrupted() {
            return Err(CaptureError::Interrupted);
        }
        let monitor = self.monitor.as_ref();
        let version = qmp::query_version(monitor).map_err(error)?;
        let dialect = Dialect::choose(&version)?;
        // QEMU 7.2 takes a second `migrate` in state colo and destroys the first one's state.
        if qmp::query_colo_mode(monitor).map_err(error)? != "none" {
            let what = "QEMU is in COLO already; if no other agent protects this guest, end that one first \
                        (x-colo-lost-heartbeat)";
            return Err(CaptureError::Busy { what: what.to_owned() });
        }
        if qmp::query_yank_has_migration(monitor).map_err(error)? {
            let what = "another migration is under way; wait for its end or abort it (virsh domjobabort)";
            return Err(CaptureError::Busy { what: what.to_owned() });
        }
        Ok((version, dialect))
    }

    fn try_arm(
        &self,
        version: &QemuVersion,
        dialect: Dialect,
        settings: &mut Settings,
        sink: &mut dyn PageSink,
    ) -> Result<(Armed, Checkpoints), CaptureError> {
        let monitor = self.monitor.as_ref();
        let dialect = settings.apply(monitor, dialect, &self.options)?;
        let socket = channel::open(monitor, &self.options, &self.interrupter)?;
        // Closed if the rest fails, which ends the migration.
        let mut link = Link::new(socket, self.interrupter.clone());
        let precopy = Precopy::new(&self.monitor, &self.options, version, dialect, &mut link, sink);
        let (armed, reader) = precopy.run()?;
        Ok((armed, Checkpoints::new(link, reader)))
    }

    /// Runs one step of an active capture and ends the capture if it fails.
    fn step<T>(
        &mut self,
        mut capture: Capture,
        next: impl FnOnce(Capture) -> State,
        work: impl FnOnce(&mut Checkpoints, &ColoOptions) -> Result<T, CaptureError>,
    ) -> Result<T, CaptureError> {
        match work(&mut capture.checkpoints, &self.options) {
            Ok(value) => {
                self.state = next(capture);
                Ok(value)
            }
            Err(cause) => Err(self.give_up(Some(capture.checkpoints.link), capture.settings, cause)),
        }
    }

    /// Ends a capture that has failed; the guest must run on.
    fn give_up(&self, link: Option<Link>, settings: Settings, cause: CaptureError) -> CaptureError {
        match self.end(link, settings) {
            Ok(()) => cause,
            // Nothing is stopped where nothing is left.
            Err(reason) if reason.is_gone() => cause,
            Err(reason) => {
                CaptureError::GuestLeftStopped { cause: Box::new(cause), reason: Box::new(reason) }
            }
        }
    }

    fn end(&self, link: Option<Link>, mut settings: Settings) -> Result<(), CaptureError> {
        let monitor = self.monitor.as_ref();
        let state = leave(monitor, link, self.options.exit_limit)?;
        if let Err(error) = settings.restore(monitor) {
            // The guest runs; only a later migration would notice.
            warn!(%error, "migration settings of QEMU could not be put back");
        }
        info!(%state, "capture ended");
        Ok(())
    }

    /// Takes the state out; a call that fails leaves the source idle.
    fn take(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Idle)
    }

    fn out_of_turn(&mut self, call: &'static str, state: State) -> CaptureError {
        let error = CaptureError::OutOfTurn { call, state: state.label() };
        self.state = state;
        error
    }
}

impl CheckpointSource for ColoSource {
    fn arm(&mut self, sink: &mut dyn PageSink) -> Result<Armed, CaptureError> {
        let state = self.take();
        if !matches!(state, State::Idle) {
            return Err(self.out_of_turn("arm", state));
        }
        let (version, dialect) = self.check()?;
        let mut settings = Settings::default();
        match self.try_arm(&version, dialect, &mut settings, sink) {
            Ok((armed, checkpoints)) => {
                self.state = State::Stopped(Capture { checkpoints, settings });
                Ok(armed)
            }
            Err(cause) => Err(self.give_up(None, settings, cause)),
        }
    }

    fn start(&mut self) -> Result<(), CaptureError> {
        match self.take() {
            State::Stopped(capture) => self.step(capture, State::Running, |c, options| c.ready(options)),
            State::Held(capture) => self.step(capture, State::Running, |c, options| c.loaded(options)),
            other => Err(self.out_of_turn("start", other)),
        }
    }

    fn wait_ready(&mut self) -> Result<(), CaptureError> {
        match self.take() {
            State::Running(capture) => self.step(capture, State::Ready, |c, options| c.wait_request(options)),
            State::Ready(capture) => {
                self.state = State::Ready(capture);
                Ok(())
            }
            other => Err(self.out_of_turn("wait_ready", other)),
        }
    }

    fn checkpoint(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), String>,
        sink: &mut dyn PageSink,
    ) -> Result<Checkpoint, CaptureError> {
        let hold = std::mem::take(&mut self.hold);
        let next = if hold { State::Held } else { State::Running };
        match self.take() {
            State::Ready(capture) => {
                self.step(capture, next, |c, options| c.take(options, hold, barrier, sink))
            }
            other => Err(self.out_of_turn("checkpoint", other)),
        }
    }

    fn hold_next(&mut self) {
        self.hold = true;
    }

    fn still_stopped(&mut self) -> Result<(), CaptureError> {
        let monitor = self.monitor.as_ref();
        let error = |source| CaptureError::Monitor { phase: Phase::Hold, source };
        // QEMU enters COLO only by us, and nothing but the end of COLO or our word lets the guest run.
        let mode = qmp::query_colo_mode(monitor).map_err(error)?;
        let state = qmp::query_status(monitor).map_err(error)?;
        let ours = matches!(self.state, State::Stopped(_) | State::Held(_)) && mode == "primary";
        if ours && state != RunState::Running { Ok(()) } else { Err(CaptureError::RanOn { state }) }
    }

    fn disarm(&mut self) -> Result<(), CaptureError> {
        self.hold = false;
        let result = match self.take() {
            State::Idle => Ok(()),
            State::Stopped(capture)
            | State::Held(capture)
            | State::Running(capture)
            | State::Ready(capture) => self.end(Some(capture.checkpoints.link), capture.settings),
        };
        self.interrupter.clear();
        result
    }

    fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }
}

impl Drop for ColoSource {
    /// A source that is dropped while armed must not leave the guest stopped.
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            warn!(%error, "capture could not be ended");
        }
    }
}
