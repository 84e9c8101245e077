//! A client on the LAN that sends ICMP echo requests to a guest, numbered, and remembers which were answered when.
//! Nobody repeats an answer, so one that the guest has said and nobody heard was lost. That a request is lost on its way in
//! is no fault: QEMU throws away what it has read for a guest when that is stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with,
};

use super::plan::{HostName, guest_address};
use super::state::LabDir;
use super::{Lab, network};

/// Between two requests.
const PERIOD: Duration = Duration::from_millis(50);
/// Ours, among whatever else is pinged from here.
const IDENTIFIER: u16 = 0x7573;
/// Length of an IPv4 header without options, and of an echo.
const IP_BYTES: usize = 20;
const ECHO_BYTES: usize = 8;

/// The client; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Pinger {
    /// When each number was answered first.
    replies: Arc<Mutex<BTreeMap<u16, Instant>>>,
    sent: Arc<AtomicU16>,
    silent: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pinger {
    pub(crate) fn start(lab: &LabDir, guest: &str) -> Result<Self> {
        let netns = lab.netns();
        let opening = || {
            network::enter(&netns)?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP)).context("no ICMP")
        };
        // A thread goes into the namespace, so that ours stays out.
        let socket = std::thread::scope(|scope| match scope.spawn(opening).join() {
            Ok(socket) => socket,
            Err(_) => anyhow::bail!("the thread that opens a socket ended"),
        })?;
        let mut pinger = Self {
            replies: Arc::default(),
            sent: Arc::default(),
            silent: Arc::default(),
            stop: Arc::default(),
            thread: None,
        };
        let (replies, sent) = (Arc::clone(&pinger.replies), Arc::clone(&pinger.sent));
        let (silent, stop) = (Arc::clone(&pinger.silent), Arc::clone(&pinger.stop));
        let to = guest_address(guest);
        pinger.thread = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if !silent.load(Ordering::Relaxed) {
                    send(&socket, to, sent.fetch_add(1, Ordering::Relaxed));
                }
                std::thread::sleep(PERIOD);
                while let Some(number) = receive(&socket, to) {
                    let mut replies = replies.lock().unwrap_or_else(PoisonError::into_inner);
                    replies.entry(number).or_insert_with(Instant::now);
                }
            }
        }));
        Ok(pinger)
    }

    /// Replies that came after `from`.
    pub(crate) fn replies_since(&self, from: Instant) -> usize {
        let replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        replies.values().filter(|at| **at >= from).count()
    }

    /// Waits until requests are being answered.
    pub(crate) fn wait(&self, limit: Duration) -> Result<()> {
        let (from, end) = (Instant::now(), Instant::now() + limit);
        while self.replies_since(from) < 5 {
            ensure!(Instant::now() < end, "the guest answers no ping");
            std::thread::sleep(PERIOD);
        }
        Ok(())
    }

    /// Sends no more, and waits until everything that the guest has `said` was heard; gives its number.
    pub(crate) fn all_heard(&self, said: &Said, limit: Duration) -> Result<usize> {
        self.silent.store(true, Ordering::Relaxed);
        let end = Instant::now() + limit;
        loop {
            let said = said.numbers()?;
            let missing: Vec<u16> = {
                let replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
                said.iter().copied().filter(|number| !replies.contains_key(number)).collect()
            };
            if missing.is_empty() && !said.is_empty() {
                return Ok(said.len());
            }
            ensure!(Instant::now() < end, "of {} answers these were never heard: {missing:?}", said.len());
            std::thread::sleep(PERIOD);
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say beyond its replies.
            drop(thread.join());
        }
    }
}

fn send(socket: &OwnedFd, to: Ipv4Addr, number: u16) {
    let words = [0x0800, 0, IDENTIFIER, number];
    let sum = words.iter().fold(0u32, |sum, word| sum + u32::from(*word));
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(0);
    let mut echo = [0_u8; ECHO_BYTES];
    for (bytes, word) in echo.chunks_exact_mut(2).zip([words[0], checksum, words[2], words[3]]) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    // One that cannot be sent shows as one that is not answered.
    let _ = sendto(socket, &echo, SendFlags::empty(), &SocketAddrV4::new(to, 0));
}

/// The number of the next reply, if there is one.
fn receive(socket: &OwnedFd, from: Ipv4Addr) -> Option<u16> {
    loop {
        let mut packet = [0_u8; 256];
        let (length, _) = recv(socket, &mut packet, RecvFlags::empty()).ok()?;
        let (source, echo) = (packet.get(12..16)?, packet.get(IP_BYTES..IP_BYTES + ECHO_BYTES)?);
        let ours = echo[0] == 0 && echo[4..6] == IDENTIFIER.to_be_bytes() && source == from.octets();
        if length >= IP_BYTES + ECHO_BYTES && ours {
            return Some(u16::from_be_bytes([echo[6], echo[7]]));
        }
    }
}

/// What a guest answers, heard on its network card: before the gate, but on a macvtap, which has the gate itself, behind it.
#[derive(Debug)]
pub(crate) struct Said(PathBuf);

impl Said {
    /// From now on, until the host is switched off or a new one is started there.
    pub(crate) fn start(lab: &Lab, host: HostName, guest: &str) -> Result<Self> {
        let file = lab.dir().shared().join(format!("said-{host}"));
        let path = file.display();
        lab.shell(
            host,
            &format!(
                "kill $(cat /run/lab/said.pid 2>/dev/null) 2>/dev/null; rm -f {path} {path}.log
                set -- $(virsh -q domiflist {guest} | awk '{{ print $1, $2 == \"direct\" ? \"out\" : \"in\"; exit }}')
                tcpdump -i $1 -Q $2 --immediate-mode -l -n -Z root icmp > {path} 2> {path}.log < /dev/null &
                echo $! > /run/lab/said.pid
                for i in $(seq 100); do grep -q 'listening on' {path}.log && exit 0; sleep 0.1; done
                cat {path}.log >&2; exit 1"
            ),
        )?;
        Ok(Self(file))
    }

    fn numbers(&self) -> Result<BTreeSet<u16>> {
        let lines = std::fs::read_to_string(&self.0).context("no recording of the guest's answers")?;
        let number = |line: &str| {
            let rest = line.split_once("echo reply, ")?.1.split_once("seq ")?.1;
            rest.split_once(',')?.0.parse().ok()
        };
        Ok(lines.lines().filter_map(number).collect())
    }
}
