//! Tells at once when a frame waits in the gate.
//!
//! A packet socket on the tap hears what comes in before the redirect takes it. It is left full: from the second frame
//! on the kernel finds no room and goes on, at the cost of one comparison, until the next epoch begins and the socket
//! is emptied. So an epoch costs one wake-up and one copied header, whatever is sent in it, and none if nothing is.
//! Asking the qdisc instead costs a request and the lock of all network configuration every millisecond, all the time,
//! to be half a millisecond late. The ifb is no place to listen: its sockets hear a frame when it is released. A
//! macvtap has no other place, so there the qdisc is asked.
//!
//! And tells at once that something was taken out of the host's network, which may have been the gate.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::net::{RecvFlags, recv};
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::GateError;
use super::netlink::link::Device;
use crate::sys;

/// Between two questions where nothing tells by itself.
const POLL: Duration = Duration::from_millis(5);

/// Frames that a full socket may hold, and some.
const READS: usize = 64;

/// The gate's side.
#[derive(Debug)]
pub(super) struct Watcher {
    /// Readable while one of the sockets is.
    epoll: OwnedFd,
    /// By the index of the device.
    sockets: Vec<(u32, OwnedFd)>,
    /// Devices that are not listened to.
    deaf: Vec<u32>,
    asked: Arc<AtomicBool>,
}

/// The owner's side: see [`Watch::frame`].
#[derive(Debug)]
pub struct Watch {
    epoll: AsyncFd<OwnedFd>,
    /// There is a device that is not listened to.
    asked: Arc<AtomicBool>,
    /// Of [`Watch::deletion`]; `None` if the system gives none.
    deletions: Option<AsyncFd<OwnedFd>>,
}

fn no_descriptor(error: rustix::io::Errno) -> GateError {
    GateError::Kernel { action: "watch for frames".to_owned(), source: error.into() }
}

impl Watcher {
    pub(super) fn new() -> Result<Self, GateError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(no_descriptor)?;
        Ok(Self { epoll, sockets: Vec::new(), deaf: Vec::new(), asked: Arc::default() })
    }

    pub(super) fn watch(&self) -> Result<Watch, GateError> {
        let epoll = self
            .epoll
            .try_clone()
            .and_then(sys::watched)
            .map_err(|source| GateError::Kernel { action: "watch for frames".to_owned(), source })?;
        let deletions = sys::deletions().and_then(sys::watched);
        let deletions = deletions.inspect_err(|error| warn!(%error, "cannot listen for deletions")).ok();
        Ok(Watch { epoll, asked: Arc::clone(&self.asked), deletions })
    }

    /// Listens to a device too. One that cannot be listened to costs latency, nothing else.
    pub(super) fn add(&mut self, device: &Device, hears: bool) {
        if !hears {
            self.ask(device);
            return;
        }
        let socket = sys::frames_of(device.index).and_then(|socket| {
            let data = epoll::EventData::new_u64(device.index.into());
            epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)?;
            Ok(socket)
        });
        match socket {
            Ok(socket) => self.sockets.push((device.index, socket)),
            Err(error) => {
                warn!(device = device.name, %error, "cannot listen for frames");
                self.ask(device);
            }
        }
    }

    fn ask(&mut self, device: &Device) {
        self.deaf.push(device.index);
        self.asked.store(true, Ordering::Relaxed);
    }

    pub(super) fn forget(&mut self, index: u32) {
        // Closing it takes it out of the epoll as well.
        self.sockets.retain(|(of, _)| *of != index);
        self.deaf.retain(|of| *of != index);
        self.asked.store(!self.deaf.is_empty(), Ordering::Relaxed);
    }

    /// What was heard belongs to an epoch that is over.
    pub(super) fn clear(&self) {
        for (_, socket) in &self.sockets {
            let mut byte = [0; 1];
            let mut reads = 0;
            while reads < READS && recv(socket, &mut byte, RecvFlags::DONTWAIT).is_ok() {
                reads += 1;
            }
        }
    }
}

impl Watch {
    /// For a gate that is not the kernel's: one of `descriptors` is readable while a frame has come in since the last stop.
    ///
    /// # Errors
    /// Outside of a runtime, or the system's.
    pub fn on(descriptors: &[BorrowedFd<'_>]) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, descriptor) in (0..).zip(descriptors) {
            epoll::add(&epoll, descriptor, epoll::EventData::new_u64(number), epoll::EventFlags::IN)?;
        }
        Ok(Self { epoll: sys::watched(epoll)?, asked: Arc::default(), deletions: None })
    }

    /// Returns when a frame has come in since the last stop of the guest, or when it is time to ask the qdisc.
    ///
    /// # Cancel safety
    /// Nothing is taken.
    pub async fn frame(&self) {
        let heard = async {
            loop {
                let Ok(mut ready) = self.epoll.readable().await else {
                    return std::future::pending().await;
                };
                if self.is_heard() {
                    return;
                }
                ready.clear_ready();
            }
        };
        if self.is_asked() {
            let _ = tokio::time::timeout(POLL, heard).await;
        } else {
            heard.await;
        }
    }

    /// Returns when somebody has deleted a device, a qdisc or a filter of this host, or made a filter.
    ///
    /// # Cancel safety
    /// Nothing is taken that is not returned.
    pub async fn deletion(&self) {
        let Some(deletions) = &self.deletions else { return std::future::pending().await };
        loop {
            let Ok(mut ready) = deletions.readable().await else { return std::future::pending().await };
            let mut byte = [0; 1];
            let mut heard = false;
            // Many at once are one.
            for _ in 0..READS {
                match recv(deletions.get_ref(), &mut byte, RecvFlags::DONTWAIT) {
                    // There were more than it has room for.
                    Ok(_) | Err(rustix::io::Errno::NOBUFS) => heard = true,
                    Err(_) => {
                        ready.clear_ready();
                        break;
                    }
                }
            }
            if heard {
                return;
            }
        }
    }

    /// Whether the qdisc has to be asked as well.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    fn is_heard(&self) -> bool {
        let mut fds = [PollFd::new(self.epoll.get_ref(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[tokio::test]
    async fn a_watch_on_descriptors_tells_while_one_of_them_is_readable() {
        let pairs = [UnixDatagram::pair().unwrap(), UnixDatagram::pair().unwrap()];
        let watch = Watch::on(&[pairs[0].0.as_fd(), pairs[1].0.as_fd()]).unwrap();
        let heard = || tokio::time::timeout(Duration::from_millis(20), watch.frame());
        assert!(heard().await.is_err());
        pairs[1].1.send(&[1]).unwrap();
        assert!(heard().await.is_ok() && heard().await.is_ok(), "nothing is taken");
        pairs[0].1.send(&[1]).unwrap();
        pairs[1].0.recv(&mut [0]).unwrap();
        assert!(heard().await.is_ok());
        pairs[0].0.recv(&mut [0]).unwrap();
        assert!(heard().await.is_err());
    }
}
