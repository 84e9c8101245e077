//! The network namespace of a lab, its bridges, taps and cables.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use rustix::thread::LinkNameSpaceType;

use super::plan::{HostName, Link, Net, guest_v6};
use crate::process;

const LIMIT: Duration = Duration::from_secs(20);

/// Where iproute2 keeps its handles.
fn handle(name: &str) -> String {
    format!("/run/netns/{name}")
}

pub(crate) fn exists(name: &str) -> bool {
    std::path::Path::new(&handle(name)).exists()
}

/// Puts the calling **thread** into the namespace.
pub(crate) fn enter(name: &str) -> Result<()> {
    let path = handle(name);
    let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("no network namespace {path}"))?;
    rustix::thread::move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&file),
        Some(LinkNameSpaceType::Network),
    )
    .with_context(|| format!("cannot enter {path}"))
}

/// A TCP connection made from inside the namespace. A thread goes in and makes it, so that ours stays out.
pub(crate) fn connect(netns: &str, to: SocketAddr, limit: Duration) -> Result<TcpStream> {
    let connecting = || {
        enter(netns)?;
        TcpStream::connect_timeout(&to, limit).with_context(|| format!("cannot connect to {to}"))
    };
    std::thread::scope(|scope| match scope.spawn(connecting).join() {
        Ok(result) => result,
        Err(_) => bail!("the thread that connects to {to} ended"),
    })
}

/// Makes the namespace with everything in it.
pub(crate) fn create(name: &str) -> Result<()> {
    process::checked(Command::new("ip").args(["netns", "add", name]), LIMIT)?;
    let mut script = String::from("link set lo up\n");
    for net in Net::ALL {
        let bridge = net.name();
        // Without a forwarding delay a cable carries frames as soon as it is plugged in.
        script += &format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0\n");
        script += &format!("address add {}/24 dev {bridge}\nlink set {bridge} up\n", net.client());
        if net == Net::Lan {
            script += &format!("address add {}/64 dev {bridge} nodad\n", guest_v6(net.client()));
        }
        for host in HostName::ALL {
            let tap = host.tap(net);
            script += &format!("tuntap add dev {tap} mode tap\nlink set {tap} master {bridge} up\n");
        }
    }
    batch(name, &script)
}

/// Plugs a cable in or out.
pub(crate) fn set(name: &str, link: Link, up: bool) -> Result<()> {
    let state = if up { "up" } else { "down" };
    let lines: Vec<String> = link.taps().iter().map(|tap| format!("link set {tap} {state}\n")).collect();
    batch(name, &lines.concat())
}

fn batch(name: &str, script: &str) -> Result<()> {
    for line in script.lines() {
        let mut command = Command::new("ip");
        process::checked(command.args(["-n", name]).args(line.split_whitespace()), LIMIT)?;
    }
    Ok(())
}

/// Ends every process in the namespace, then the namespace.
pub(crate) fn remove(name: &str) -> Result<()> {
    if !exists(name) {
        return Ok(());
    }
    let listed = process::checked(Command::new("ip").args(["netns", "pids", name]), LIMIT)?;
    for pid in listed
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .filter_map(rustix::process::Pid::from_raw)
    {
        // It may have ended meanwhile.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    process::checked(Command::new("ip").args(["netns", "delete", name]), LIMIT).map(drop)
}
