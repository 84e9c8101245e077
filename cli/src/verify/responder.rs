//! Runs in the guest and answers from its memory, over UDP and TCP, IPv4 and IPv6. What it forgets was lost. Only the
//! standard library, as the guest may have nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::wire::{Answer, MAX_BYTES, Request};

/// Answers that are remembered for each client, to be given again.
const REMEMBERED: usize = 4096;

/// Clients that are remembered; the one with the lowest name goes first.
const CLIENTS: usize = 64;

/// Everything that was ever said.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    boot: u64,
    stamp: u64,
    clients: BTreeMap<u64, Client>,
}

#[derive(Debug, Default)]
struct Client {
    heard: u64,
    answers: VecDeque<Answer>,
}

impl Memory {
    /// Of a responder that starts, known by `boot`.
    pub(crate) fn new(boot: u64) -> Self {
        Self { boot, ..Self::default() }
    }

    /// The same answer for the same question.
    pub(crate) fn answer(&mut self, request: Request) -> Answer {
        if !self.clients.contains_key(&request.client) && self.clients.len() >= CLIENTS {
            self.clients.pop_first();
        }
        let client = self.clients.entry(request.client).or_default();
        if let Some(answer) = client.answers.iter().rev().find(|answer| answer.request == request) {
            return answer.clone();
        }
        self.stamp += 1;
        let answer = Answer { request, stamp: self.stamp, heard: client.heard, boot: self.boot };
        client.heard = client.heard.max(request.number);
        client.answers.push_back(answer.clone());
        if client.answers.len() > REMEMBERED {
            client.answers.pop_front();
        }
        answer
    }
}

/// Answers on `port` from now on, on threads of its own.
///
/// # Errors
/// If nothing can be listened on.
pub(crate) fn start(port: u16) -> io::Result<()> {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let boot = since_1970.as_secs() << 32 | u64::from(since_1970.subsec_nanos());
    let memory = Arc::new(Mutex::new(Memory::new(boot)));
    // IPv6 first: where it takes IPv4 as well the second attempt fails.
    let addresses: [SocketAddr; 2] =
        [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()];
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for address in addresses {
        match UdpSocket::bind(address).and_then(|udp| Ok((udp, TcpListener::bind(address)?))) {
            Ok((udp, tcp)) => {
                let (for_udp, for_tcp) = (Arc::clone(&memory), Arc::clone(&memory));
                std::thread::spawn(move || datagrams(&udp, &for_udp));
                std::thread::spawn(move || connections(&tcp, &for_tcp));
                result = Ok(());
            }
            Err(error) if result.is_err() => result = Err(error),
            Err(_) => {}
        }
    }
    result
}

fn reply(memory: &Mutex<Memory>, line: &str) -> Option<String> {
    let request = Request::parse(line)?;
    Some(memory.lock().unwrap_or_else(PoisonError::into_inner).answer(request).line())
}

fn datagrams(socket: &UdpSocket, memory: &Mutex<Memory>) {
    let mut bytes = [0; MAX_BYTES];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut bytes) else { continue };
        let line = bytes.get(..length).and_then(|line| std::str::from_utf8(line).ok());
        if let Some(answer) = line.and_then(|line| reply(memory, line)) {
            // One that cannot be sent is asked for again.
            let _ = socket.send_to(answer.as_bytes(), from);
        }
    }
}

fn connections(listener: &TcpListener, memory: &Arc<Mutex<Memory>>) {
    for stream in listener.incoming().flatten() {
        let memory = Arc::clone(memory);
        std::thread::spawn(move || {
            // A client that went away is no news here.
            drop(connection(&stream, &memory));
        });
    }
}

fn connection(mut stream: &TcpStream, memory: &Mutex<Memory>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let read = lines.by_ref().take(MAX_BYTES as u64).read_line(&mut line)?;
        let Some(answer) = (read > 0).then(|| reply(memory, &line)).flatten() else { return Ok(()) };
        stream.write_all(answer.as_bytes())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_that_is_asked_again_gets_the_same_answer() {
        let mut memory = Memory::new(1);
        let ask = |client, number| Request { client, number };
        let first = memory.answer(ask(1, 5));
        assert_eq!((first.stamp, first.heard), (1, 0));
        assert_eq!(memory.answer(ask(2, 9)).stamp, 2);
        let next = memory.answer(ask(1, 6));
        assert_eq!((next.stamp, next.heard), (3, 5));
        assert_eq!(memory.answer(ask(1, 5)), first);
        for client in 100..300 {
            memory.answer(ask(client, 1));
        }
        assert!(memory.clients.len() <= CLIENTS);
        for number in 0..10_000 {
            memory.answer(ask(299, number));
        }
        assert!(memory.clients[&299].answers.len() <= REMEMBERED);
    }
}
