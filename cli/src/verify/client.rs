//! Asks a guest all the time, over every path, and tells the judge.

mod frames;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};
use understudy_responder::wire::{Answer, MAX_BYTES, Request};

use super::judge::{Judge, Observation, Verdict};
use super::segment::Segment;
use super::tape::Tape;

/// Every so many datagrams or frames an old question is asked again.
const AGAIN: u64 = 4;

/// How old it is at most.
const AGO: u64 = 256;

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(200);

/// Who is asked, and for how long.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// Each over UDP and TCP.
    pub(super) addresses: &'a [IpAddr],
    pub(super) port: u16,
    /// Where frames are exchanged, if they are.
    pub(super) segment: Option<Segment>,
    /// The client's name.
    pub(super) client: u64,
    /// Between two questions on a path.
    pub(super) period: Duration,
    pub(super) lasts: Duration,
}

/// What all paths share.
#[derive(Debug)]
struct Shared {
    client: u64,
    period: Duration,
    began: Instant,
    end: Instant,
    /// Somebody wants the verdict now.
    enough: AtomicBool,
    next: AtomicU64,
    judge: Mutex<Judge>,
    tape: Mutex<Tape>,
}

impl Shared {
    fn see(&self, path: &str, observation: Observation) {
        let mut judge = self.judge.lock().unwrap_or_else(PoisonError::into_inner);
        let violation = judge.see(path, observation, self.began.elapsed());
        if let Some(violation) = violation.filter(|violation| !violation.evidence.is_empty()) {
            let mut tape = self.tape.lock().unwrap_or_else(PoisonError::into_inner);
            violation.evidence.iter().for_each(|answer| tape.want(&answer.line()));
        }
    }

    /// A question, which is on its way as far as the judge is concerned.
    fn ask(&self, path: &str, number: u64) -> Request {
        self.see(path, Observation::Asked(number));
        Request { client: self.client, number }
    }

    fn new_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A new one, or now and then an old one of any path.
    fn number(&self, sent: u64) -> u64 {
        match self.next.load(Ordering::Relaxed) {
            next if sent.is_multiple_of(AGAIN) && next > 1 => next - 1 - (sent * 31 % AGO).min(next - 2),
            _ => self.new_number(),
        }
    }

    fn heard(&self, path: &str, line: &[u8]) {
        let answer = std::str::from_utf8(line).ok().and_then(Answer::parse);
        if let Some(answer) = answer.filter(|answer| answer.request.client == self.client) {
            self.see(path, Observation::Heard(answer));
        }
    }

    fn is_over(&self) -> bool {
        self.enough.load(Ordering::Relaxed) || Instant::now() >= self.end
    }
}

/// Does it; gives what the guest has sent as well.
///
/// # Errors
/// If frames are to be exchanged and the system does not allow it.
pub(super) async fn run(plan: &Plan<'_>) -> std::io::Result<(Verdict, Tape)> {
    let began = Instant::now();
    let shared = Arc::new(Shared {
        client: plan.client,
        period: plan.period,
        began,
        end: began + plan.lasts,
        enough: AtomicBool::new(false),
        next: AtomicU64::new(1),
        judge: Mutex::default(),
        tape: Mutex::default(),
    });
    let mut paths = tokio::task::JoinSet::new();
    if let Some(segment) = plan.segment {
        frames::start(&shared, segment, &mut paths)?;
    }
    for address in plan.addresses {
        let to = SocketAddr::new(*address, plan.port);
        paths.spawn(datagrams(Arc::clone(&shared), to));
        paths.spawn(connections(Arc::clone(&shared), to));
    }
    tokio::select! {
        () = tokio::time::sleep_until(shared.end.into()) => {}
        interrupted = tokio::signal::ctrl_c() => match interrupted {
            Ok(()) => shared.enough.store(true, Ordering::Relaxed),
            // Then it takes its time.
            Err(_) => tokio::time::sleep_until(shared.end.into()).await,
        },
    }
    // A path whose last answer does not come is not waited for.
    let _ = tokio::time::timeout(RETRY, async { while paths.join_next().await.is_some() {} }).await;
    let judge = shared.judge.lock().unwrap_or_else(PoisonError::into_inner);
    let mut tape = shared.tape.lock().unwrap_or_else(PoisonError::into_inner);
    Ok((judge.verdict(began.elapsed()), std::mem::take(&mut tape)))
}

async fn datagrams(shared: Arc<Shared>, to: SocketAddr) {
    let path = format!("udp {}", to.ip());
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let Ok(socket) = UdpSocket::bind(any).await else { return };
    let mut bytes = [0; MAX_BYTES];
    let mut tick = tokio::time::interval(shared.period);
    let mut sent = 0;
    while !shared.is_over() {
        tokio::select! {
            received = socket.recv_from(&mut bytes) => if let Ok((length, from)) = received
                && from == to
            {
                shared.heard(&path, bytes.get(..length).unwrap_or_default());
            },
            _ = tick.tick() => {
                sent += 1;
                let number = shared.number(sent);
                // One that cannot be sent is one that is lost.
                let _ = socket.send_to(shared.ask(&path, number).line().as_bytes(), to).await;
            }
        }
    }
}

async fn connections(shared: Arc<Shared>, to: SocketAddr) {
    let path = format!("tcp {}", to.ip());
    while !shared.is_over() {
        let mut worked = false;
        if let Err(error) = connection(&shared, &path, to, &mut worked).await
            && worked
        {
            shared.see(&path, Observation::Broken(error.to_string()));
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn connection(shared: &Shared, path: &str, to: SocketAddr, worked: &mut bool) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.split();
    let mut lines = BufReader::new(read);
    while !shared.is_over() {
        let request = shared.ask(path, shared.new_number());
        write.write_all(request.line().as_bytes()).await?;
        let mut line = Vec::new();
        // However long it takes: TCP sends again what was lost, and a connection must outlive a failover.
        let length = (&mut lines).take(MAX_BYTES as u64).read_until(b'\n', &mut line).await?;
        if length == 0 {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the guest has closed it"));
        }
        *worked = true;
        shared.heard(path, &line);
        tokio::time::sleep(shared.period).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Over this machine's loopback, with the responder that a guest runs.
    #[tokio::test]
    async fn a_guest_that_keeps_its_word_is_found_to() {
        let probe = std::net::TcpListener::bind(("127.0.0.1", 0)).map(|listener| listener.local_addr());
        let port = probe.expect("a port").expect("an address").port();
        understudy_responder::start(port).expect("listens");
        let addresses = ["127.0.0.1".parse().expect("an address")];
        let plan = Plan {
            addresses: &addresses,
            port,
            segment: None,
            client: 7,
            period: Duration::from_millis(20),
            lasts: Duration::from_secs(1),
        };
        let (verdict, _) = run(&plan).await.expect("no frames, no error");
        assert_eq!(verdict.violations, []);
        for path in ["udp 127.0.0.1", "tcp 127.0.0.1"] {
            assert!(verdict.answers.get(path).is_some_and(|answers| *answers > 2), "{verdict:?}");
        }
    }
}
