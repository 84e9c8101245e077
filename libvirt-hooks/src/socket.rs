//! QMP straight over a unix socket, for tests and benchmarks with a QEMU that no libvirt runs.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use crate::event::QmpEvent;
use crate::monitor::{Monitor, MonitorError, outcome, request};

/// The longest line accepted from QEMU, in bytes. `query-qmp-schema`, the longest known, is about 300 KB.
const MAX_LINE_BYTES: u64 = 16 << 20;
/// Events kept for a consumer that does not read; beyond it the event channel is closed.
const MAX_EVENTS: usize = 65_536;
/// How long QEMU may take over a reply, or over taking in a request, unless told otherwise.
const REPLY_LIMIT: Duration = Duration::from_secs(30);

/// A QMP client on a unix socket (`-qmp unix:PATH,server=on,wait=off`). Closes the connection when dropped.
#[derive(Debug)]
pub struct SocketMonitor {
    writer: Mutex<UnixStream>,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    reply_limit: Duration,
}

/// What callers and the reader thread share.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_id: u64,
    pending: HashMap<u64, SyncSender<Value>>,
    /// Why no reply will ever come any more.
    gone: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SocketMonitor {
    /// Connects, reads the greeting and negotiates. Events come by the receiver; it is closed when QEMU goes
    /// away, and when 65536 events have not been fetched.
    ///
    /// # Errors
    /// [`MonitorError::Gone`] if nobody listens at `path`, [`MonitorError::Failed`] if it is not a QEMU.
    pub fn connect(path: impl AsRef<Path>) -> Result<(Self, Receiver<QmpEvent>), MonitorError> {
        let path = path.as_ref();
        let gone = |error: io::Error| MonitorError::gone("connect", format!("{}: {error}", path.display()));
        let stream = UnixStream::connect(path).map_err(gone)?;
        stream.set_write_timeout(Some(REPLY_LIMIT)).map_err(gone)?;
        stream.set_read_timeout(Some(REPLY_LIMIT)).map_err(gone)?;
        let mut lines = Lines::new(stream.try_clone().map_err(gone)?);
        let greeting = lines.next_message().map_err(gone)?;
        if greeting.get("QMP").is_none() {
            let reason = format!("{} does not greet like QMP", path.display());
            return Err(MonitorError::failed("connect", reason));
        }
        stream.set_read_timeout(None).map_err(gone)?;

        let shared = Arc::new(Shared::default());
        let (events, receiver) = sync_channel(MAX_EVENTS);
        let reader = std::thread::Builder::new()
            .name("qmp-reader".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || read_all(lines, &shared, events)
            })
            .map_err(gone)?;
        let monitor =
            Self { writer: Mutex::new(stream), shared, reader: Some(reader), reply_limit: REPLY_LIMIT };
        monitor.execute("qmp_capabilities", Value::Null)?;
        Ok((monitor, receiver))
    }

    /// Changes how long a command may take (30 s at first). A command that took longer may still take effect.
    pub fn set_reply_limit(&mut self, limit: Duration) {
        self.reply_limit = limit;
    }

    fn run(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, MonitorError> {
        let (sender, receiver) = sync_channel(1);
        let id = {
            let mut state = self.shared.lock();
            if let Some(reason) = &state.gone {
                return Err(MonitorError::gone(command, reason.clone()));
            }
            state.last_id += 1;
            let id = state.last_id;
            state.pending.insert(id, sender);
            id
        };
        let mut message = request(command, arguments);
        message.insert("id".to_owned(), Value::from(id));
        let mut line = Value::Object(message).to_string();
        line.push('\n');
        let sent = {
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            send(&mut writer, line.as_bytes(), fd)
        };
        if let Err(error) = sent {
            self.shared.lock().pending.remove(&id);
            return Err(MonitorError::gone(command, format!("cannot send: {error}")));
        }
        match receiver.recv_timeout(self.reply_limit) {
            Ok(reply) => outcome(command, reply),
            Err(RecvTimeoutError::Timeout) => {
                self.shared.lock().pending.remove(&id);
                Err(MonitorError::failed(command, format!("no reply within {:?}", self.reply_limit)))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let reason = self.shared.lock().gone.clone().unwrap_or_else(|| "closed".to_owned());
                Err(MonitorError::gone(command, reason))
            }
        }
    }
}

impl Monitor for SocketMonitor {
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.run(command, arguments, None)
    }

    fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError> {
        self.run(command, arguments, Some(fd))
    }
}

impl Drop for SocketMonitor {
    fn drop(&mut self) {
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It fails when QEMU was first: then the reader has ended as well.
        let _ = writer.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Writes the whole line, the descriptor with its first bytes.
fn send(stream: &mut UnixStream, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(fd) = fd else { return stream.write_all(line) };
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for one descriptor"));
    }
    let sent = sendmsg(stream.as_fd(), &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(line.get(sent..).unwrap_or_default())
}

/// Splits replies from events until the connection ends.
fn read_all(mut lines: Lines, shared: &Shared, events: SyncSender<QmpEvent>) {
    let mut events = Some(events);
    let reason = loop {
        let message = match lines.next_message() {
            Ok(message) => message,
            Err(error) => break error.to_string(),
        };
        if let Some(event) = QmpEvent::from_message(&message) {
            match events.as_ref().map(|events| events.try_send(event)) {
                Some(Err(TrySendError::Full(_))) => {
                    tracing::warn!(limit = MAX_EVENTS, "QMP events are not fetched, their channel is closed");
                    events = None;
                }
                Some(Err(TrySendError::Disconnected(_))) => events = None,
                Some(Ok(())) | None => {}
            }
            continue;
        }
        let waiting =
            message.get("id").and_then(Value::as_u64).and_then(|id| shared.lock().pending.remove(&id));
        match waiting {
            // The caller may have given up waiting in this very moment.
            Some(waiting) => drop(waiting.try_send(message)),
            None => tracing::debug!("QMP message that nobody waits for"),
        }
    };
    let mut state = shared.lock();
    state.gone = Some(reason);
    state.pending.clear();
}

/// QMP messages, one a line, with a bound on the length of a line.
#[derive(Debug)]
struct Lines {
    input: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Lines {
    fn new(stream: UnixStream) -> Self {
        Self { input: BufReader::with_capacity(64 << 10, stream), line: Vec::new() }
    }

    fn next_message(&mut self) -> io::Result<Value> {
        loop {
            self.line.clear();
            self.input.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut self.line)?;
            if self.line.last() != Some(&b'\n') {
                let ended = u64::try_from(self.line.len()).unwrap_or(u64::MAX) < MAX_LINE_BYTES;
                return Err(if ended {
                    io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed the connection")
                } else {
                    io::Error::other(format!("QEMU sent a line of more than {MAX_LINE_BYTES} bytes"))
                });
            }
            if !self.line.trim_ascii().is_empty() {
                return serde_json::from_slice(&self.line)
                    .map_err(|error| io::Error::other(format!("QEMU sent what is not JSON: {error}")));
            }
        }
    }
}

#[cfg(test)]
mod tests;
