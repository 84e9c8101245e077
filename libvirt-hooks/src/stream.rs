//! The bounded queue between libvirt's event loop and the consumer of a domain's events.

use std::collections::VecDeque;
use std::sync::mpsc::{RecvError, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::connection::Connection;
use crate::event::DomainEvent;
use crate::sys::Subscription;

/// Events kept for a consumer that does not read. A checkpoint makes about five.
const CAPACITY: usize = 8192;

/// The events of one domain, in the order libvirt reported them. Unsubscribes when dropped, which asks the daemon and
/// so may block.
///
/// It is read like a [`std::sync::mpsc::Receiver`]. A consumer that falls behind finds [`DomainEvent::Lost`] at
/// the place where events are missing; [`DomainEvent::ConnectionClosed`] is never lost and is the last one.
#[derive(Debug)]
pub struct EventStream {
    queue: Arc<Queue>,
    qmp: bool,
    // Before the connection: subscriptions are taken back while it is open.
    _subscriptions: Vec<Subscription>,
    _connection: Connection,
}

impl EventStream {
    pub(crate) fn new(
        connection: Connection,
        queue: Arc<Queue>,
        subscriptions: Vec<Subscription>,
        qmp: bool,
    ) -> Self {
        Self { queue, qmp, _subscriptions: subscriptions, _connection: connection }
    }

    /// False if the driver behind the connection has no QEMU events: then only lifecycle events come.
    pub fn has_qmp_events(&self) -> bool {
        self.qmp
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// When the connection has closed and everything before that was delivered.
    pub fn recv(&self) -> Result<DomainEvent, RecvError> {
        self.queue.pop(None).map_err(|_| RecvError)
    }

    /// Waits for the next event, at most so long.
    ///
    /// # Errors
    /// [`RecvTimeoutError::Timeout`] after `timeout`; [`RecvTimeoutError::Disconnected`] as in [`Self::recv`].
    pub fn recv_timeout(&self, timeout: Duration) -> Result<DomainEvent, RecvTimeoutError> {
        self.queue.pop(Some(timeout))
    }

    /// The next event if there is one already.
    ///
    /// # Errors
    /// [`TryRecvError::Empty`] if there is none yet; [`TryRecvError::Disconnected`] as in [`Self::recv`].
    pub fn try_recv(&self) -> Result<DomainEvent, TryRecvError> {
        self.queue.pop(Some(Duration::ZERO)).map_err(|error| match error {
            RecvTimeoutError::Timeout => TryRecvError::Empty,
            RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
        })
    }
}

/// The queue itself. Pushing never waits for the consumer.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    events: VecDeque<DomainEvent>,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event; if there is no room, counts it as lost at this place. Nothing is added after the closing one.
    pub(crate) fn push(&self, event: DomainEvent) {
        let mut inner = self.lock();
        if inner.closed {
            return;
        }
        if matches!(event, DomainEvent::ConnectionClosed { .. }) {
            inner.closed = true;
            inner.events.push_back(event);
        } else if inner.events.len() < CAPACITY {
            inner.events.push_back(event);
        } else if let Some(DomainEvent::Lost { events }) = inner.events.back_mut() {
            *events = events.saturating_add(1);
        } else {
            inner.events.push_back(DomainEvent::Lost { events: 1 });
        }
        drop(inner);
        self.changed.notify_one();
    }

    fn pop(&self, timeout: Option<Duration>) -> Result<DomainEvent, RecvTimeoutError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut inner = self.lock();
        loop {
            if let Some(event) = inner.events.pop_front() {
                return Ok(event);
            }
            if inner.closed {
                return Err(RecvTimeoutError::Disconnected);
            }
            let Some(deadline) = deadline else {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RecvTimeoutError::Timeout);
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Lifecycle;

    fn event(n: i32) -> DomainEvent {
        DomainEvent::Lifecycle { kind: Lifecycle::Other(n), detail: String::new() }
    }

    fn closed() -> DomainEvent {
        DomainEvent::ConnectionClosed { reason: "eof".into() }
    }

    fn drain(queue: &Queue) -> (Vec<DomainEvent>, RecvTimeoutError) {
        let mut events = Vec::new();
        loop {
            match queue.pop(Some(Duration::ZERO)) {
                Ok(event) => events.push(event),
                Err(end) => return (events, end),
            }
        }
    }

    #[test]
    fn a_stream_can_go_to_a_thread_of_its_own() {
        fn can<T: Send + Sync>() {}
        can::<EventStream>();
    }

    #[test]
    fn overflow_is_told_where_it_happened_and_the_stream_goes_on() {
        let queue = Queue::default();
        let capacity = i32::try_from(CAPACITY).unwrap();
        (0..capacity + 3).for_each(|n| queue.push(event(n)));
        assert_eq!(queue.pop(None), Ok(event(0)));
        assert_eq!(queue.pop(None), Ok(event(1)));
        queue.push(event(-1));
        let (events, end) = drain(&queue);
        assert_eq!(end, RecvTimeoutError::Timeout);
        assert_eq!(events[CAPACITY - 3..], [event(capacity - 1), DomainEvent::Lost { events: 3 }, event(-1)]);
    }

    #[test]
    fn closing_is_never_lost_and_is_the_last() {
        let queue = Queue::default();
        (0..i32::try_from(CAPACITY).unwrap() + 5).for_each(|n| queue.push(event(n)));
        queue.push(closed());
        queue.push(event(7));
        queue.push(closed());
        let (events, end) = drain(&queue);
        assert_eq!(end, RecvTimeoutError::Disconnected);
        assert_eq!(events[CAPACITY..], [DomainEvent::Lost { events: 5 }, closed()]);
    }

    #[test]
    fn a_waiting_consumer_is_woken() {
        let queue = Arc::new(Queue::default());
        let consumer = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || queue.pop(None)
        });
        queue.push(event(1));
        assert_eq!(consumer.join().unwrap(), Ok(event(1)));
    }
}
