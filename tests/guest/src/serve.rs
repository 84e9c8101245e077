//! The line protocol.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crate::bulk::{Hash, Stream};
use crate::counter::{self, Counter};
use crate::load::{Kind, Load, Report};
use crate::power;

/// A request line longer than this ends the connection.
const MAX_LINE: u64 = 4096;

/// Bytes of a datagram of a flood.
const DATAGRAM: usize = 1400;

/// Answers every connection on a thread of its own.
pub(crate) fn listen(port: u16, counter: &Arc<Counter>, load: &Arc<Load>) {
    let listener = match TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port))) {
        Ok(listener) => listener,
        Err(error) => return println!("GUEST cannot listen on port {port}: {error}"),
    };
    for stream in listener.incoming().flatten() {
        let (counter, load) = (Arc::clone(counter), Arc::clone(load));
        std::thread::spawn(move || {
            // A client that went away is no news here.
            drop(answer(&stream, &counter, &load));
        });
    }
}

fn answer(stream: &TcpStream, counter: &Counter, load: &Load) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream);
    let mut out = stream;
    loop {
        let mut line = String::new();
        if lines.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 || !line.ends_with('\n') {
            return Ok(());
        }
        let reply = match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["bulk", blocks, seed] => bulk(out, blocks, seed)?,
            _ => reply(line.trim(), counter, load),
        };
        out.write_all(format!("{reply}\n").as_bytes())?;
    }
}

fn bulk(mut out: &TcpStream, blocks: &str, seed: &str) -> std::io::Result<String> {
    let (Ok(blocks), Ok(seed)) = (blocks.parse::<u32>(), seed.parse()) else {
        return Ok(format!("bad numbers {blocks:?} {seed:?}"));
    };
    let (mut stream, mut hash) = (Stream::new(seed), Hash::new());
    for _ in 0..blocks {
        let block = stream.block();
        hash.add(&block);
        out.write_all(&block)?;
    }
    Ok(format!("ok hash={}", hash.value()))
}

/// What does not go now goes a moment later.
fn flood(to: &str, count: &str) -> String {
    let (Ok(to), Ok(count)) = (to.parse::<SocketAddr>(), count.parse::<u32>()) else {
        return format!("bad flood {to:?} {count:?}");
    };
    let socket = match UdpSocket::bind(("0.0.0.0", 0)) {
        Ok(socket) => socket,
        Err(error) => return format!("bad socket: {error}"),
    };
    let datagram = [0x55; DATAGRAM];
    for _ in 0..count {
        while socket.send_to(&datagram, to).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    format!("ok sent={count}")
}

fn reply(line: &str, counter: &Counter, load: &Load) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["count"] => {
            let ticks: Vec<String> = counter.ticks().iter().map(u64::to_string).collect();
            let (total, boot, ms) = (counter.total(), counter::boot_id(), counter::uptime_ms());
            format!("ok count={total} boot={boot} ticks={} ms={ms}", ticks.join(","))
        }
        ["id"] => {
            let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            let (name, boot, vcpus) = (guest_name(), counter::boot_id(), counter.vcpus());
            format!("ok name={name} boot={boot} vcpus={vcpus} kernel={}", kernel.trim())
        }
        ["dirty", pages, ms] => set(load, Kind::Whole, pages, ms),
        ["touch", pages, ms] => set(load, Kind::Stamp, pages, ms),
        ["load"] => {
            let Report { pages, every_ms, round, round_us, errors, .. } = load.report();
            format!("ok pages={pages} every_ms={every_ms} round={round} round_us={round_us} errors={errors}")
        }
        ["check"] => {
            let Report { pages, round, errors, first, .. } = load.check();
            let verdict = if errors == 0 { "ok" } else { "bad" };
            let first = first.map_or_else(String::new, |(page, word)| format!(" first={page}:{word}"));
            format!("{verdict} round={round} pages={pages} errors={errors}{first}")
        }
        ["flood", to, count] => flood(to, count),
        ["reboot"] => leave("reboot"),
        ["poweroff"] => leave("poweroff"),
        _ => format!("bad request {line:?}"),
    }
}

fn set(load: &Load, kind: Kind, pages: &str, ms: &str) -> String {
    match (pages.parse(), ms.parse()) {
        (Ok(pages), Ok(ms)) => format!("ok pages={}", load.set(kind, pages, Duration::from_millis(ms))),
        _ => format!("bad numbers {pages:?} {ms:?}"),
    }
}

fn leave(how: &'static str) -> String {
    power::leave(how);
    "ok".into()
}

/// `us.name=` of the kernel command line.
pub(crate) fn guest_name() -> String {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let name = cmdline.split_whitespace().find_map(|word| word.strip_prefix("us.name="));
    name.unwrap_or("guest").to_owned()
}
