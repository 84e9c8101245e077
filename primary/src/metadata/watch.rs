//! The thread that waits for libvirt's events.

use std::time::Duration;

use tokio::sync::mpsc::Sender;
use tracing::{info, warn};
use understudy_hook::metadata::{COMMAND_NAMESPACE, PROTECT_NAMESPACE};
use understudy_libvirt::{Connection, DomainChange, HostEvent, HostWatch, LibvirtError, Lifecycle};
use understudy_proto::ids::GuestId;

use super::engine::Event;

/// How often the thread looks whether the agent still wants events, and before another attempt to connect.
const POLL: Duration = Duration::from_secs(1);

/// Starts it. It ends when the receiver is gone.
pub(super) fn spawn(uri: String, events: Sender<Event>) -> std::io::Result<()> {
    std::thread::Builder::new().name("domains".to_owned()).spawn(move || follow(&uri, &events)).map(drop)
}

fn follow(uri: &str, events: &Sender<Event>) {
    let mut silent = false;
    while !events.is_closed() {
        match open(uri) {
            Ok(watch) => {
                info!("following what domains say in their XML");
                silent = false;
                // After the subscription, so that nothing falls between.
                if events.blocking_send(Event::Began).is_err() {
                    return;
                }
                pump(&watch, events);
            }
            Err(error) if !silent => {
                warn!(%error, "cannot follow what domains say in their XML; trying on");
                silent = true;
            }
            Err(_) => {}
        }
        std::thread::sleep(POLL);
    }
}

fn open(uri: &str) -> Result<HostWatch, LibvirtError> {
    // A connection of its own: it is not shared with calls that may take long.
    Connection::open(uri)?.watch()
}

/// Until the connection closes or nobody listens.
fn pump(watch: &HostWatch, events: &Sender<Event>) {
    while !events.is_closed() {
        let event = match watch.next(POLL) {
            None => continue,
            Some(HostEvent::ConnectionClosed { reason }) => return warn!(reason, "libvirt is gone"),
            Some(HostEvent::Lost) => Some(Event::Began),
            Some(HostEvent::Domain { domain, change }) => translated(GuestId(domain), &change),
        };
        if let Some(event) = event
            && events.blocking_send(event).is_err()
        {
            return;
        }
    }
}

/// What concerns us. Our own reports are changes of metadata too: they are not answered.
fn translated(guest: GuestId, change: &DomainChange) -> Option<Event> {
    match change {
        DomainChange::Lifecycle { kind: Lifecycle::Started, .. } => {
            Some(Event::Changed { guest, started: true })
        }
        DomainChange::Lifecycle { kind: Lifecycle::Stopped, .. } => Some(Event::Stopped(guest)),
        DomainChange::Lifecycle { .. } => None,
        DomainChange::Metadata { uri } => [PROTECT_NAMESPACE, COMMAND_NAMESPACE]
            .contains(&uri.as_str())
            .then_some(Event::Changed { guest, started: false }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_hook::metadata::STATE_NAMESPACE;

    #[test]
    fn our_own_reports_are_no_news() {
        let guest = GuestId(uuid::Uuid::from_u128(7));
        let metadata = |uri: &str| translated(guest, &DomainChange::Metadata { uri: uri.to_owned() });
        assert_eq!(metadata(STATE_NAMESPACE), None);
        assert_eq!(metadata("urn:other"), None);
        assert_eq!(metadata(""), None);
        assert_eq!(metadata(PROTECT_NAMESPACE), Some(Event::Changed { guest, started: false }));
        assert_eq!(metadata(COMMAND_NAMESPACE), Some(Event::Changed { guest, started: false }));
        let life = |kind| translated(guest, &DomainChange::Lifecycle { kind, detail: String::new() });
        assert_eq!(life(Lifecycle::Started), Some(Event::Changed { guest, started: true }));
        assert_eq!(life(Lifecycle::Stopped), Some(Event::Stopped(guest)));
        assert_eq!(life(Lifecycle::Suspended), None);
    }
}
