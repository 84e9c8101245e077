//! The process that owns a lab: its hosts are its children and die with it, and it ends when its time is
//! over, when it is told to, or when the process that wanted the lab is gone.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::control::{self, Reply, Request};
use super::machine::{Hardware, Machine};
use super::network;
use super::plan::{HostName, Link};
use super::state::LabDir;
use crate::assets::probe::Accelerator;
use crate::process;

/// How often children that ended by themselves are noticed.
const TICK: Duration = Duration::from_millis(100);

/// What a supervisor is started with, on its command line as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) name: String,
    pub(crate) hardware: Hardware,
    /// The lab ends after this, whatever happens.
    pub(crate) lifetime: Duration,
    /// Whether the lab ends when standard input does.
    pub(crate) lifeline: bool,
}

enum Event {
    Asked(Request, UnixStream),
    LifelineCut,
}

/// Runs a lab until it ends. Must be the main thread: the children are tied to the thread that made them.
pub(crate) fn run(order: &Order) -> Result<()> {
    let lab = LabDir::new(&order.name)?;
    // Neither a closed terminal nor its Ctrl-C ends us before we have cleaned up.
    let _ = rustix::process::setsid();
    let _lock = lab.create()?;
    network::create(&lab.netns())?;
    let (sender, events) = sync_channel(16);
    let listener = UnixListener::bind(lab.control()).context("cannot listen for requests")?;
    listen(listener, sender.clone());
    if order.lifeline {
        watch_lifeline(sender);
    }
    let mut supervisor = Supervisor {
        lab,
        order: order.clone(),
        end: Instant::now() + order.lifetime,
        machines: BTreeMap::new(),
        ended: BTreeMap::new(),
        cut: Vec::new(),
        recorders: Vec::new(),
    };
    let waiting = supervisor.serve(&events);
    let done = supervisor.take_down();
    if let Some(stream) = waiting {
        let error = done.as_ref().err().map(|error| format!("{error:#}"));
        drop(control::send(&stream, &Reply { error, ..Reply::default() }));
    }
    done
}

fn listen(listener: UnixListener, sender: SyncSender<Event>) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                drop(stream.set_read_timeout(Some(Duration::from_secs(10))));
                if let Ok(request) = control::receive(&stream) {
                    drop(sender.send(Event::Asked(request, stream)));
                }
            });
        }
    });
}

/// The one who wanted the lab holds the other end of our standard input, and so tells us how it ended.
fn watch_lifeline(sender: SyncSender<Event>) {
    std::thread::spawn(move || {
        let mut byte = [0];
        while std::io::stdin().read(&mut byte).is_ok_and(|count| count > 0) {}
        drop(sender.send(Event::LifelineCut));
    });
}

struct Supervisor {
    lab: LabDir,
    order: Order,
    end: Instant,
    machines: BTreeMap<HostName, Machine>,
    ended: BTreeMap<HostName, String>,
    cut: Vec<Link>,
    recorders: Vec<(Link, Child)>,
}

impl Supervisor {
    /// Gives back whoever waits for the end.
    fn serve(&mut self, events: &Receiver<Event>) -> Option<UnixStream> {
        loop {
            self.reap();
            if Instant::now() >= self.end {
                eprintln!("the lab's time is over");
                return None;
            }
            match events.recv_timeout(TICK) {
                Ok(Event::Asked(Request::Down, stream)) => return Some(stream),
                Ok(Event::Asked(request, stream)) => {
                    let error = self.apply(&request).err().map(|error| format!("{error:#}"));
                    // Who asked may have gone.
                    drop(control::send(&stream, &self.reply(error)));
                }
                Ok(Event::LifelineCut) | Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn reap(&mut self) {
        for host in HostName::ALL {
            let status = self.machines.get_mut(&host).and_then(Machine::ended);
            if let Some(status) = status {
                eprintln!("host {host} ended: {status}");
                self.ended.insert(host, status.to_string());
                self.machines.remove(&host);
            }
        }
    }

    fn apply(&mut self, request: &Request) -> Result<()> {
        match request {
            Request::Status | Request::Down => Ok(()),
            Request::PowerOn(host) => self.power_on(*host),
            Request::PowerOff(host) => match self.machines.remove(host) {
                Some(machine) => machine.power_off(),
                None => bail!("host {host} has no power"),
            },
            Request::Cut(link) => self.plug(*link, false),
            Request::Heal(link) => self.plug(*link, true),
            Request::Pcap(link, file) => self.record(*link, file),
            Request::PcapStop(link) => {
                for (_, recorder) in self.recorders.extract_if(.., |(of, _)| of == link) {
                    stop(recorder)?;
                }
                Ok(())
            }
        }
    }

    fn power_on(&mut self, host: HostName) -> Result<()> {
        if self.machines.contains_key(&host) {
            bail!("host {host} has power already");
        }
        self.ended.remove(&host);
        fs::create_dir_all(self.lab.disk(host))?;
        let machine = Machine::power_on(&self.lab, host, &self.order.hardware)?;
        self.machines.insert(host, machine);
        Ok(())
    }

    fn plug(&mut self, link: Link, up: bool) -> Result<()> {
        network::set(&self.lab.netns(), link, up)?;
        let single = |host| Link { net: link.net, host: Some(host) };
        for one in HostName::ALL.map(single).into_iter().filter(|one| link.host.is_none() || *one == link) {
            self.cut.retain(|cut| *cut != one);
            if !up {
                self.cut.push(one);
            }
        }
        Ok(())
    }

    fn record(&mut self, link: Link, file: &std::path::Path) -> Result<()> {
        let log = File::create(self.lab.logs().join(format!("tcpdump-{}", link.device())))?;
        let said = self.lab.logs().join(format!("tcpdump-{}", link.device()));
        let mut command = process::tied(&self.lab.helper(), Some(&self.lab.netns()), "tcpdump");
        command.args(["-i", &link.device(), "--immediate-mode", "-U", "-Z", "root", "-n", "-w"]).arg(file);
        let recorder = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        self.recorders.push((link, recorder));
        // The caller's next step must not come before the recording.
        for _ in 0..100 {
            if fs::read_to_string(&said).is_ok_and(|text| text.contains("listening on")) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("tcpdump does not listen on {link}: {}", fs::read_to_string(&said).unwrap_or_default().trim())
    }

    fn reply(&self, error: Option<String>) -> Reply {
        Reply {
            error,
            emulated: self.order.hardware.accelerator == Accelerator::Tcg,
            powered: self.machines.iter().map(|(host, machine)| (*host, machine.pid())).collect(),
            ended: self.ended.clone(),
            cut: self.cut.iter().map(Link::to_string).collect(),
            roots: self.order.hardware.roots,
            supervisor: std::process::id(),
            seconds_left: self.end.saturating_duration_since(Instant::now()).as_secs(),
        }
    }

    fn take_down(self) -> Result<()> {
        for (_, recorder) in self.recorders {
            stop(recorder)?;
        }
        for machine in self.machines.into_values() {
            machine.power_off()?;
        }
        self.lab.clean()
    }
}

/// Lets tcpdump write what it still has.
fn stop(mut recorder: Child) -> Result<()> {
    if let Some(pid) = i32::try_from(recorder.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    }
    process::wait(&mut recorder, Duration::from_secs(5)).map(drop)
}

/// Starts the supervisor of `order`; with a lifeline, dropping the child's stdin ends the lab.
pub(crate) fn spawn(lab: &LabDir, order: &Order) -> Result<Child> {
    // The folder is the supervisor's, but its helper must be there before it can run from it.
    fs::create_dir_all(lab.logs())?;
    fs::create_dir_all(lab.path().join("bin"))?;
    // Not by name: a build may have replaced the file since we were started.
    fs::copy("/proc/self/exe", lab.helper()).context("cannot copy this program")?;
    let log = File::create(lab.supervisor_log())?;
    let stdin = if order.lifeline { Stdio::piped() } else { Stdio::null() };
    Command::new(lab.helper())
        .arg("__supervise")
        .arg(serde_json::to_string(order)?)
        .stdin(stdin)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the lab's supervisor")
}
