//! The events of all domains of a host, in a queue of their own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::connection::Connection;
use crate::event::{DomainEvent, HostEvent};
use crate::sys::{Sink, Subscription};

/// Events kept for a consumer that does not read. A host has some hundreds of domains, which seldom start or end.
const CAPACITY: usize = 4096;

/// Starts, ends and changes of metadata of all domains. Unsubscribes when dropped, which asks the daemon and so may
/// block.
#[derive(Debug)]
pub struct HostWatch {
    events: Receiver<HostEvent>,
    queue: Arc<HostQueue>,
    // Before the connection: subscriptions are taken back while it is open.
    _subscriptions: [Subscription; 2],
    _connection: Connection,
}

impl HostWatch {
    pub(crate) fn new(
        connection: Connection,
        (queue, events): (Arc<HostQueue>, Receiver<HostEvent>),
        subscriptions: [Subscription; 2],
    ) -> Self {
        Self { events, queue, _subscriptions: subscriptions, _connection: connection }
    }

    /// Waits for the next event, at most so long; `None` if none came. Once the connection has closed, everything after
    /// what was there before is [`HostEvent::ConnectionClosed`].
    pub fn next(&self, timeout: Duration) -> Option<HostEvent> {
        self.queue.next(&self.events, timeout)
    }
}

/// Where libvirt's event thread puts events. It never waits.
#[derive(Debug)]
pub(crate) struct HostQueue {
    events: SyncSender<HostEvent>,
    lost: AtomicBool,
    closed: Mutex<Option<String>>,
}

impl HostQueue {
    pub(crate) fn new() -> (Arc<Self>, Receiver<HostEvent>) {
        let (events, receiver) = sync_channel(CAPACITY);
        (Arc::new(Self { events, lost: AtomicBool::new(false), closed: Mutex::new(None) }), receiver)
    }

    fn next(&self, events: &Receiver<HostEvent>, timeout: Duration) -> Option<HostEvent> {
        if self.lost.swap(false, Ordering::AcqRel) {
            return Some(HostEvent::Lost);
        }
        // Before the look into the queue: what closes it wakes whoever waits there.
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let timeout = if closed.is_some() { Duration::ZERO } else { timeout };
        let closed = closed.map(|reason| HostEvent::ConnectionClosed { reason });
        events.recv_timeout(timeout).ok().or(closed)
    }
}

impl Sink for HostQueue {
    fn accept(&self, event: DomainEvent) {
        if let DomainEvent::ConnectionClosed { reason } = event {
            *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.clone());
            self.accept_host(HostEvent::ConnectionClosed { reason });
        }
    }

    fn accept_host(&self, event: HostEvent) {
        if self.events.try_send(event).is_err() {
            self.lost.store(true, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::DomainChange;

    fn event(n: u128) -> HostEvent {
        let change = DomainChange::Metadata { uri: String::new() };
        HostEvent::Domain { domain: uuid::Uuid::from_u128(n), change }
    }

    #[test]
    fn overflow_and_closing_are_told() {
        let (queue, events) = HostQueue::new();
        assert_eq!(queue.next(&events, Duration::ZERO), None);
        (0..CAPACITY as u128 + 1).for_each(|n| queue.accept_host(event(n)));
        assert_eq!(queue.next(&events, Duration::ZERO), Some(HostEvent::Lost));
        assert_eq!(queue.next(&events, Duration::ZERO), Some(event(0)));
        queue.accept(DomainEvent::ConnectionClosed { reason: "eof".into() });
        let rest: Vec<_> = (0..CAPACITY + 2).filter_map(|_| queue.next(&events, Duration::ZERO)).collect();
        let closed = HostEvent::ConnectionClosed { reason: "eof".into() };
        assert_eq!(rest[CAPACITY - 2], event(CAPACITY as u128 - 1));
        assert!(rest[CAPACITY - 1..].iter().all(|event| *event == closed), "{:?}", &rest[CAPACITY - 1..]);
    }
}
