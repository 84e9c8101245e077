//! The paths that are frames: a thread hears everything the guest sends, a task asks on each path.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::task::JoinSet;
use understudy_responder::frame::{self, Direction, Protocol};
use understudy_responder::sys::{Hears, PacketSocket, tagged};

use super::Shared;
use crate::verify::segment::Segment;
use crate::verify::tape::Taped;

/// So many periods are between two questions on a path. There are six of them, and a guest may be slow.
const PERIODS: u32 = 3;

/// Longer frames are cut.
const FRAME_BYTES: usize = 65_536;

/// Where the guest's hardware address is in a frame of it.
const SOURCE: std::ops::Range<usize> = 6..12;

pub(super) fn start(shared: &Arc<Shared>, segment: Segment, paths: &mut JoinSet<()>) -> io::Result<()> {
    let socket = Arc::new(PacketSocket::open(Some(segment.card), Hears::All)?);
    let (hearing, ears) = (Arc::clone(shared), Arc::clone(&socket));
    std::thread::Builder::new().name("frames".to_owned()).spawn(move || hear(&hearing, &ears, segment))?;
    for protocol in Protocol::ALL {
        paths.spawn(ask(Arc::clone(shared), Arc::clone(&socket), segment, protocol));
    }
    Ok(())
}

async fn ask(shared: Arc<Shared>, socket: Arc<PacketSocket>, segment: Segment, protocol: Protocol) {
    let mut tick = tokio::time::interval(shared.period * PERIODS);
    let mut sent = 0;
    while !shared.is_over() {
        tick.tick().await;
        sent += 1;
        let line = shared.ask(protocol.name(), shared.number(sent)).line();
        let frame = protocol.frame(Direction::Question, segment.ours, segment.theirs, &line);
        // One that cannot be sent is one that is lost.
        let _ = socket.send(segment.card, &frame);
    }
}

fn hear(shared: &Shared, socket: &PacketSocket, segment: Segment) {
    let mut bytes = vec![0; FRAME_BYTES];
    while !shared.is_over() {
        // A card that is down comes back.
        let Ok(Some(received)) = socket.receive(&mut bytes) else { continue };
        let Some(bytes) = bytes.get(..received.length) else { continue };
        if received.is_ours || bytes.get(SOURCE) != Some(&segment.theirs) {
            continue;
        }
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let taped = Taped { at, bytes: tagged(bytes, received.tag) };
        shared.tape.lock().unwrap_or_else(PoisonError::into_inner).record(taped);
        if let Some(carried) = frame::read(bytes, received.tag) {
            shared.heard(carried.protocol.name(), carried.line.as_bytes());
        }
    }
}
