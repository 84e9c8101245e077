//! A pair of stock QEMUs under COLO, as QEMU itself does it: what the capture is compared with.

use std::io;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use understudy_libvirt::{Monitor, SocketMonitor};

use crate::guest::Guest;
use crate::ms;
use crate::pause::EPOCH;

/// Until the secondary has a monitor, and until COLO runs.
const LIMIT: Duration = Duration::from_secs(120);
/// The first stops: of the full copy, and of caches that fill.
pub(crate) const WARM_UP: usize = 3;

/// What the pair is connected by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    Tcp,
    Unix,
}

impl Way {
    pub(crate) fn subject(self) -> &'static str {
        match self {
            Self::Tcp => "stock-colo-tcp",
            Self::Unix => "stock-colo-unix",
        }
    }
}

struct Secondary(Child);

impl Drop for Secondary {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A primary and a secondary; both end when dropped.
pub(crate) struct Pair {
    pub(crate) guest: Guest,
    monitor: SocketMonitor,
    uri: String,
    _secondary: Secondary,
}

impl Pair {
    /// Starts both, with the guest running and not yet protected.
    pub(crate) fn start(way: Way, pages: usize, mib: usize) -> anyhow::Result<Self> {
        let guest = Guest::start("pc", pages, &["-m", &mib.to_string()])?;
        let dir = guest.dir.path();
        let socket = dir.join("secondary.qmp");
        let program =
            std::env::var("UNDERSTUDY_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        let child = Command::new(program)
            .args(["-accel", "kvm", "-cpu", "qemu64", "-m", &mib.to_string(), "-display", "none"])
            .args(["-nodefaults", "-M", "pc", "-no-shutdown", "-incoming", "defer", "-kernel"])
            .arg(dir.join("flat-guest.elf"))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.join("secondary.stderr"))?)
            .spawn()
            .context("the secondary QEMU")?;
        let _secondary = Secondary(child);
        let deadline = Instant::now() + LIMIT;
        let monitor = loop {
            match SocketMonitor::connect(&socket) {
                Ok((monitor, _)) => break monitor,
                Err(error) if Instant::now() > deadline => return Err(error).context("no monitor"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let uri = match way {
            Way::Tcp => {
                // Free a moment ago.
                let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
                format!("tcp:127.0.0.1:{port}")
            }
            Way::Unix => format!("unix:{}", dir.join("colo").display()),
        };
        Ok(Self { guest, monitor, uri, _secondary })
    }

    /// Has them checkpoint; the full copy begins.
    pub(crate) fn protect(&self) -> anyhow::Result<()> {
        let secondary = |command: &str, arguments: Value| -> io::Result<Value> {
            self.monitor.execute(command, arguments).map_err(io::Error::other)
        };
        let delay = u64::try_from(EPOCH.as_millis()).unwrap_or(25);
        let capability = json!({"capabilities": [{"capability": "x-colo", "state": true}]});
        let parameters = json!({"x-checkpoint-delay": delay, "max-bandwidth": 1u64 << 40});
        for (command, arguments) in
            [("migrate-set-capabilities", capability), ("migrate-set-parameters", parameters)]
        {
            secondary(command, arguments.clone())?;
            self.guest.command(command, arguments)?;
        }
        secondary("migrate-incoming", json!({"uri": self.uri}))?;
        self.guest.stops();
        self.guest.command("migrate", json!({"uri": self.uri}))?;
        Ok(())
    }

    /// The next stops, at least so many.
    pub(crate) fn next_stops(&self, wanted: usize) -> anyhow::Result<Vec<Duration>> {
        let mut stops = Vec::new();
        let deadline = Instant::now() + LIMIT;
        while stops.len() < wanted {
            if Instant::now() > deadline {
                let status = self.guest.command("query-migrate", json!({}))?;
                bail!("{} stops of {wanted} in {LIMIT:?}; {status}", stops.len());
            }
            std::thread::sleep(Duration::from_millis(100));
            stops.extend(self.guest.stops());
        }
        Ok(stops)
    }
}

/// Stops of the primary, in ms.
pub(crate) fn stops(way: Way, rounds: usize, pages: usize, mib: usize) -> anyhow::Result<Vec<f64>> {
    let pair = Pair::start(way, pages, mib)?;
    pair.protect()?;
    let stops = pair.next_stops(WARM_UP + rounds)?;
    Ok(stops.into_iter().skip(WARM_UP).take(rounds).map(ms).collect())
}
