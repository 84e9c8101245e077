//! What the owner of a guest does with the guest's output.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use understudy_proto::epoch::Committed;
use understudy_proto::rpc::admin::GuestState;

use super::capturer::Call;
use super::guest::Guest;
use super::host::GuestHost;
use crate::egress::{GateError, HIGH_WATER_BYTES, Held, SharedKeeper, State, Watch};
use crate::engine::{Event, Outcome, OutcomeKind};

/// Output that waits longer is said to be held.
const LONG: Duration = Duration::from_secs(1);

/// Between two looks whether the gate still stands, where nothing has told that it may not.
const GUARD_INTERVAL: Duration = Duration::from_secs(1);

/// What makes a gate. It blocks.
type Maker = Box<dyn FnOnce() -> Result<Gate, GateError> + Send>;

/// What becomes of a guest's output while it is protected.
pub enum Output {
    /// It goes as it comes: the operator wanted it so.
    Ungated,
    /// It waits for commits in the gate that this makes.
    Gated(Maker),
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ungated => "Ungated",
            Self::Gated(_) => "Gated",
        })
    }
}

impl Output {
    pub(super) async fn make(self) -> Result<Option<Gate>, String> {
        let Self::Gated(maker) = self else { return Ok(None) };
        match tokio::task::spawn_blocking(maker).await {
            Ok(Ok(gate)) => Ok(Some(gate)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The gate as the owner has it.
#[derive(Debug)]
pub struct Gate {
    pub(super) keeper: SharedKeeper,
    watch: Option<Watch>,
    /// Nothing is known to wait since the last stop.
    listening: bool,
    /// Since when something waits, as far as it is known.
    waiting_since: Option<Instant>,
    /// When it was last seen to stand.
    guarded_at: Instant,
}

/// What others see of it.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) text: String,
    /// What belongs into the reason of the state.
    pub(super) remark: String,
    pub(super) held: Option<Held>,
}

impl Gate {
    /// With what tells of frames, if there is something.
    pub fn new(keeper: SharedKeeper, watch: Option<Watch>) -> Self {
        Self { keeper, watch, listening: false, waiting_since: None, guarded_at: Instant::now() }
    }

    /// Returns when a frame may wait that has come in since the last stop.
    ///
    /// # Cancel safety
    /// Nothing is taken.
    pub(super) async fn wait(gate: Option<&Self>) {
        match gate {
            Some(Self { watch: Some(watch), listening: true, .. }) => watch.frame().await,
            _ => std::future::pending().await,
        }
    }

    /// Returns when the gate may have been taken away.
    ///
    /// # Cancel safety
    /// Nothing is taken.
    pub(super) async fn doubt(gate: Option<&Self>) {
        match gate {
            Some(Self { watch: Some(watch), .. }) => watch.deletion().await,
            _ => std::future::pending().await,
        }
    }

    /// Looks whether a frame waits; says whether much does.
    pub(super) fn frame(&mut self) -> Option<bool> {
        let held = self.keeper.held().unwrap_or_default();
        if held.frames == 0 && self.watch.as_ref().is_some_and(Watch::is_asked) {
            return None;
        }
        self.listening = false;
        self.waiting_since.get_or_insert_with(Instant::now);
        Some(held.bytes >= HIGH_WATER_BYTES)
    }

    /// Bytes that wait, if anything is known to.
    pub(super) fn bytes(&self) -> Option<u64> {
        self.waiting_since?;
        self.keeper.held().ok().map(|held| held.bytes)
    }

    /// The guest runs on after a stop.
    pub(super) fn epoch_begins(&mut self) {
        self.listening = true;
    }

    /// What others are told.
    pub(super) fn seen(gate: Option<&mut Self>, state: GuestState, last: bool) -> Seen {
        let Some(gate) = gate else {
            let remark = if matches!(state, GuestState::Protected | GuestState::Degraded) {
                "its output is NOT held back (--ungated)".to_owned()
            } else {
                String::new()
            };
            let text =
                "NOT held back (--ungated): after a failover clients may have seen what the guest never said";
            return Seen { text: text.to_owned(), remark, held: None };
        };
        let held = match gate.keeper.held() {
            Ok(held) => held,
            // The devices of a guest that is gone are gone.
            Err(_) if last => Held::default(),
            Err(error) => return Seen { text: format!("not known: {error}"), ..Seen::default() },
        };
        if held.frames == 0 {
            gate.waiting_since = None;
        } else {
            gate.waiting_since.get_or_insert_with(Instant::now);
        }
        let mut seen = Seen { held: Some(held), ..Seen::default() };
        seen.text = match (gate.keeper.state(), gate.waiting_since.map(|since| since.elapsed())) {
            (State::Open, _) => "let through until the first epoch is committed".to_owned(),
            (_, Some(long)) if long >= LONG => {
                seen.remark = format!("its output is held for {} s", long.as_secs());
                format!("held for {} s: {} frames, {} bytes", long.as_secs(), held.frames, held.bytes)
            }
            _ => "let out when its epoch is committed".to_owned(),
        };
        seen
    }

    /// Protection is over.
    pub(super) async fn end(&self, outcome: &Outcome, told: bool) {
        match outcome.kind {
            OutcomeKind::Unprotected => let_out(Some(self.keeper.clone())).await,
            // Nobody can start the guest elsewhere.
            OutcomeKind::Failed if told || self.keeper.state() == State::Open => {
                let_out(Some(self.keeper.clone())).await
            }
            OutcomeKind::Failed => {
                error!(
                    "the guest's output is held: the backup was not told; `understudy unprotect` lets it out"
                );
            }
            OutcomeKind::Ended | OutcomeKind::Crashed | OutcomeKind::Superseded => {
                let keeper = self.keeper.clone();
                run(move || keeper.discard(), "throw away what the guest has sent").await;
            }
            OutcomeKind::AgentStopped => info!("the guest's output is held until an agent is back"),
        }
    }
}

async fn run(work: impl FnOnce() -> Result<(), GateError> + Send + 'static, what: &str) {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(%error, "cannot {what}"),
        Err(error) => error!(%error, "cannot {what}"),
    }
}

/// Lets everything out and takes the gate away.
pub(super) async fn let_out(keeper: Option<SharedKeeper>) {
    if let Some(keeper) = keeper {
        run(move || keeper.remove(), "take the output gate away").await;
    }
}

/// Gates the interfaces the guest has now.
fn adjust(keeper: &SharedKeeper, host: &dyn GuestHost) -> Result<(), String> {
    let ports = host.ports().inspect_err(|reason| keeper.unknown(reason.clone()))?;
    keeper.adjust(&ports).map_err(|error| error.to_string())
}

impl Guest {
    /// The epoch is committed: its output goes (invariant 1).
    pub(super) fn release(&mut self, committed: Committed) {
        let Some(gate) = &mut self.gate else { return };
        if gate.keeper.flushes() {
            // It takes a while, and must be over before the guest runs.
            self.capturer.call(Call::Flush(committed));
            return;
        }
        if let Err(error) = gate.keeper.committed(&committed) {
            warn!(%error, "output was not released");
            let failed = Event::OutputFailed(error.to_string());
            // The queue is for few answers, and this is the only one of its kind.
            let _ = self.answers_in.try_send(failed);
        }
        // What was heard since the last stop waits on.
        gate.waiting_since = if gate.listening { None } else { Some(Instant::now()) };
    }

    /// Looks whether the gate still stands, now and then or when that is in doubt, and mends it: others have a hand in the
    /// host's network too. The backup gets a full copy then, so that both sides and the network agree again.
    pub(super) fn guard_output(&mut self, doubt: bool) {
        let due = |gate: &&mut Gate| doubt || gate.guarded_at.elapsed() >= GUARD_INTERVAL;
        let Some(gate) = self.gate.as_mut().filter(due) else { return };
        gate.guarded_at = Instant::now();
        let (keeper, host) = (gate.keeper.clone(), Arc::clone(&self.host));
        self.in_background(move || {
            keeper.intact().map_err(|error| {
                let mended = adjust(&keeper, &*host);
                error!(%error, mended = mended.is_ok(), "the output gate was broken by somebody else");
                error.to_string()
            })
        });
    }

    /// An interface was plugged in or out: it gets its gate, or loses it.
    pub(super) fn follow_interfaces(&self) {
        let Some(gate) = &self.gate else { return };
        let (keeper, host) = (gate.keeper.clone(), Arc::clone(&self.host));
        self.in_background(move || {
            adjust(&keeper, &*host).inspect_err(|reason| {
                error!(
                    reason,
                    "an interface of the guest is not gated: it is protected again when it can be"
                );
            })
        });
    }

    /// Work on the gate that blocks; the engine hears of what fails.
    fn in_background(&self, work: impl FnOnce() -> Result<(), String> + Send + 'static) {
        let answers = self.answers_in.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(reason) = work() {
                let _ = answers.blocking_send(Event::OutputFailed(reason));
            }
        });
    }
}
