//! Answers over the guest's own sockets: UDP and TCP, IPv4 and IPv6.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use crate::memory::Memory;
use crate::wire::{MAX_BYTES, Request};

/// Listens on `port`, on threads of its own.
pub(crate) fn start(port: u16, memory: &Arc<Mutex<Memory>>) -> io::Result<()> {
    // IPv6 first: where it takes IPv4 as well the second attempt fails.
    let addresses: [SocketAddr; 2] =
        [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()];
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for address in addresses {
        match UdpSocket::bind(address).and_then(|udp| Ok((udp, TcpListener::bind(address)?))) {
            Ok((udp, tcp)) => {
                let (for_udp, for_tcp) = (Arc::clone(memory), Arc::clone(memory));
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
