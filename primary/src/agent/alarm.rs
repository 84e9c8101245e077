//! A clock that goes off in time. The runtime's own counts whole milliseconds and is one late on average: as much as a stop.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Zero would switch it off.
const SHORTEST: Duration = Duration::from_nanos(1);

#[derive(Debug)]
pub(super) struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// # Errors
    /// If the system gives no descriptor.
    pub(super) fn new() -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        sys::watched(timer).map(Self)
    }

    /// Returns at `due` or soon after, or if the system fails. One wait at a time.
    ///
    /// # Cancel safety
    /// The next wait begins anew.
    pub(super) async fn wait(&self, due: Instant) {
        let left = due.saturating_duration_since(Instant::now()).max(SHORTEST);
        let it_value = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        if timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once).is_err() {
            return tokio::time::sleep_until(due.into()).await;
        }
        loop {
            let Ok(mut ready) = self.0.readable().await else { return };
            match rustix::io::read(self.0.get_ref(), &mut [0; 8]) {
                // The readiness was of an earlier wait.
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_goes_off_when_it_is_due_and_not_before() {
        let alarm = Alarm::new().unwrap();
        for micros in [0, 300, 2500, 1] {
            let due = Instant::now() + Duration::from_micros(micros);
            alarm.wait(due).await;
            assert!(Instant::now() >= due);
        }
    }

    #[tokio::test]
    async fn a_wait_that_was_given_up_does_not_end_the_next_one() {
        let alarm = Alarm::new().unwrap();
        let soon = alarm.wait(Instant::now() + Duration::from_millis(5));
        assert!(tokio::time::timeout(Duration::from_millis(1), soon).await.is_err());
        std::thread::sleep(Duration::from_millis(10));
        let due = Instant::now() + Duration::from_millis(20);
        alarm.wait(due).await;
        assert!(Instant::now() >= due);
        // Over, and nothing is left of it.
        alarm.wait(due).await;
        let later = Instant::now() + Duration::from_millis(5);
        alarm.wait(later).await;
        assert!(Instant::now() >= later);
    }
}
