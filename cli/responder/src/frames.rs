//! Answers frames, on every network card.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::frame::{self, Direction, Frame};
use crate::memory::Memory;
use crate::sys::{Hears, PacketSocket};
use crate::wire::Request;

/// Frames are no longer.
const FRAME_BYTES: usize = 2048;

/// Hears from now on, on a thread of its own.
pub(crate) fn start(memory: &Arc<Mutex<Memory>>) -> io::Result<()> {
    let socket = PacketSocket::open(None, Hears::Questions)?;
    socket.take_every_vlan();
    let memory = Arc::clone(memory);
    std::thread::spawn(move || {
        let mut bytes = [0; FRAME_BYTES];
        loop {
            // A card may go and come.
            let Ok(Some(received)) = socket.receive(&mut bytes) else { continue };
            let heard = bytes.get(..received.length).filter(|_| received.is_for_us);
            if let Some(answer) = heard.and_then(|heard| answer(heard, received.tag, &memory)) {
                // One that cannot be sent is asked for again.
                let _ = socket.send(received.card, &answer);
            }
        }
    });
    Ok(())
}

fn answer(bytes: &[u8], tag: Option<u16>, memory: &Mutex<Memory>) -> Option<Frame> {
    let question = frame::read(bytes, tag)?;
    let request = Request::parse(question.line)?;
    let line = memory.lock().unwrap_or_else(PoisonError::into_inner).answer(request).line();
    Some(question.protocol.frame(Direction::Answer, question.to, question.from, &line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Protocol, read};
    use crate::wire::Answer;

    #[test]
    fn every_protocol_is_answered_in_kind_from_one_counter() {
        let memory = Mutex::new(Memory::new(1));
        for (number, protocol) in (1..).zip(Protocol::ALL) {
            let line = Request { client: 1, number }.line();
            let question = protocol.frame(Direction::Question, [2; 6], [4; 6], &line);
            let answered = answer(&question.bytes, question.tag, &memory).expect("an answer");
            let carried = read(&answered.bytes, answered.tag).expect("one of ours");
            assert_eq!((carried.protocol, carried.from), (protocol, [4; 6]));
            assert_eq!(Answer::parse(carried.line).map(|answer| answer.stamp), Some(number));
            assert_eq!(answer(&answered.bytes, answered.tag, &memory), None, "an answer is no question");
        }
    }
}
