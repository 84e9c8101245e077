//! What is between the guest's card and its clients: a stand-in for tap, `ifb` and `plug`, which are not in every kernel.
//!
//! The card's frames arrive at a datagram socket and stay there, as in the kernel's gate, until somebody looks or a stop seals
//! them: no thread is in the way. What is released goes to the client's socket.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use understudy_primary::agent::{Gate, Output};
use understudy_primary::egress::engine::Kind;
use understudy_primary::egress::{
    GateEngine, GateError, Held, LIMIT_BYTES, Op, OutputGate, Port, SharedKeeper, Watch,
};

const FRAME_BYTES: usize = 128;
/// Where the number of a request is in its frame, behind addresses and type.
const NUMBER: std::ops::Range<usize> = 14..22;
const HEAD: [u8; 14] = [0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 0x88, 0xb5];
/// Only a bound for a bench that hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// When an answer passed what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passage {
    number: u64,
    /// The engine looked at the gate, or sealed it.
    pub(crate) seen: Instant,
    /// The guest was stopped for its epoch.
    pub(crate) sealed: Instant,
    /// Its epoch was committed.
    pub(crate) released: Instant,
}

/// An answer: when it was asked for and came, and how it passed the gate, if there was one.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) asked: Instant,
    pub(crate) came: Instant,
    pub(crate) passage: Option<Passage>,
}

/// The client's side, and the gate when it is wanted.
pub(crate) struct Lan {
    tap: UnixDatagram,
    card: PathBuf,
    client: UnixDatagram,
    held: Arc<Mutex<Waiting>>,
    number: u64,
}

struct Frame {
    bytes: Vec<u8>,
    seen: Instant,
    sealed: Option<Instant>,
}

/// The state of the gate.
struct Waiting {
    tap: UnixDatagram,
    /// A datagram is in it while a frame that was taken from the tap has come since the last stop.
    heard: (UnixDatagram, UnixDatagram),
    to_client: UnixDatagram,
    frames: VecDeque<Frame>,
    sealed: usize,
    passages: VecDeque<Passage>,
}

impl Lan {
    /// With the sockets in `dir`; QEMU is to be given [`Lan::arguments`].
    pub(crate) fn new(dir: &Path) -> io::Result<Self> {
        let tap = UnixDatagram::bind(dir.join("tap"))?;
        let (client, to_client) = UnixDatagram::pair()?;
        client.set_read_timeout(Some(ANSWER_LIMIT))?;
        tap.set_read_timeout(Some(ANSWER_LIMIT))?;
        let heard = UnixDatagram::pair()?;
        heard.0.set_nonblocking(true)?;
        let waiting = Waiting {
            tap: tap.try_clone()?,
            heard,
            to_client,
            frames: VecDeque::new(),
            sealed: 0,
            passages: VecDeque::new(),
        };
        Ok(Self { tap, card: dir.join("card"), client, held: Arc::new(Mutex::new(waiting)), number: 0 })
    }

    /// The card and what it is plugged into.
    pub(crate) fn arguments(dir: &Path) -> [String; 4] {
        let (card, tap) = (dir.join("card"), dir.join("tap"));
        let (card, tap) = (card.display(), tap.display());
        [
            "-netdev".to_owned(),
            format!("dgram,id=lan,local.type=unix,local.path={card},remote.type=unix,remote.path={tap}"),
            "-device".to_owned(),
            "rtl8139,netdev=lan,romfile=".to_owned(),
        ]
    }

    /// The gate for a protection that begins.
    pub(crate) fn gate(&self) -> io::Result<Output> {
        self.tap.set_nonblocking(true)?;
        let held = Arc::clone(&self.held);
        Ok(Output::Gated(Box::new(move || {
            let watch = {
                let waiting = lock(&held);
                let watched = Watch::on(&[waiting.tap.as_fd(), waiting.heard.0.as_fd()]);
                watched.map_err(|source| failed("watch for frames", source))?
            };
            let gate = Box::new(Relay(held));
            Ok(Gate::new(SharedKeeper::new(GateEngine::open(), gate), Some(watch)))
        })))
    }

    /// Asks the guest once; `gated` says where its answer comes from.
    pub(crate) fn ask(&mut self, gated: bool) -> anyhow::Result<Answer> {
        self.number += 1;
        let mut frame = [0; FRAME_BYTES];
        frame[..HEAD.len()].copy_from_slice(&HEAD);
        frame[NUMBER].copy_from_slice(&self.number.to_be_bytes());
        if !gated {
            self.tap.set_nonblocking(false)?;
        }
        let from = if gated { &self.client } else { &self.tap };
        let asked = Instant::now();
        self.tap.send_to(&frame, &self.card)?;
        let mut answer = [0; 2048];
        loop {
            let bytes = from.recv(&mut answer)?;
            if number(&answer[..bytes]) == Some(self.number) {
                break;
            }
        }
        let came = Instant::now();
        let passages = std::mem::take(&mut lock(&self.held).passages);
        let passage = passages.into_iter().find(|passage| passage.number == self.number);
        anyhow::ensure!(passage.is_some() == gated, "an answer has passed the gate by, or was held by none");
        Ok(Answer { asked, came, passage })
    }
}

fn number(frame: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(frame.get(NUMBER)?.try_into().ok()?))
}

fn lock(held: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(action: &str, source: io::Error) -> GateError {
    GateError::Kernel { action: action.to_owned(), source }
}

impl Waiting {
    /// Takes what has come; says whether anything has.
    fn look(&mut self) -> Result<bool, GateError> {
        let (mut frame, before) = ([0; 2048], self.frames.len());
        loop {
            match self.tap.recv(&mut frame) {
                Ok(bytes) => {
                    let bytes = frame[..bytes].to_vec();
                    self.frames.push_back(Frame { bytes, seen: Instant::now(), sealed: None });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(failed("read from the tap", error)),
            }
        }
        Ok(self.frames.len() > before)
    }

    /// What has come belongs to an epoch that is over.
    fn forget_heard(&self) {
        while self.heard.0.recv(&mut [0]).is_ok() {}
    }

    fn let_go(&mut self, frames: usize) -> Result<(), GateError> {
        for frame in self.frames.drain(..frames) {
            let released = Instant::now();
            let sealed = frame.sealed.unwrap_or(released);
            if let Some(number) = number(&frame.bytes) {
                self.passages.push_back(Passage { number, seen: frame.seen, sealed, released });
            }
            self.to_client.send(&frame.bytes).map_err(|error| failed("release a frame", error))?;
        }
        Ok(())
    }
}

/// The gate as the agent has it.
struct Relay(Arc<Mutex<Waiting>>);

impl OutputGate for Relay {
    fn apply(&mut self, op: Op) -> Result<(), GateError> {
        let mut waiting = lock(&self.0);
        match op.kind() {
            Kind::Seal => {
                waiting.look()?;
                waiting.forget_heard();
                waiting.sealed = waiting.frames.len();
                let now = Instant::now();
                waiting.frames.iter_mut().for_each(|frame| frame.sealed = Some(now));
            }
            Kind::ReleaseSealed => {
                let sealed = std::mem::take(&mut waiting.sealed);
                waiting.let_go(sealed)?;
            }
            Kind::Flush => {
                waiting.look()?;
                waiting.forget_heard();
                waiting.sealed = 0;
                let all = waiting.frames.len();
                waiting.let_go(all)?;
            }
        }
        Ok(())
    }

    fn held(&mut self) -> Result<Held, GateError> {
        let mut waiting = lock(&self.0);
        if waiting.look()? {
            // A frame is heard until the next stop, whoever has looked.
            let _ = waiting.heard.1.send(&[1]);
        }
        let bytes = waiting.frames.iter().map(|frame| frame.bytes.len() as u64).sum();
        debug_assert!(bytes < u64::from(LIMIT_BYTES));
        Ok(Held { frames: waiting.frames.len() as u64, bytes, dropped: 0 })
    }

    fn adjust(&mut self, _: &[Port], _: bool) -> Result<(), GateError> {
        Ok(())
    }

    fn intact(&mut self) -> Result<(), GateError> {
        Ok(())
    }

    fn remove(&mut self) -> Result<(), GateError> {
        let mut waiting = lock(&self.0);
        waiting.look()?;
        waiting.forget_heard();
        let all = waiting.frames.len();
        waiting.let_go(all)
    }

    fn discard(&mut self) -> Result<(), GateError> {
        let mut waiting = lock(&self.0);
        waiting.look()?;
        waiting.forget_heard();
        waiting.frames.clear();
        Ok(())
    }
}
