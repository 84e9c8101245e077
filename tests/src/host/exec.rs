//! The exec server of a host. It trusts everybody who can reach `mgmt`, which only the lab's owner can.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};

use super::Progress;
use crate::lab::plan::EXEC_PORT;
use crate::lab::wire::{self, Frame, Wish};
use crate::process;

const PATH: &str = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin";
const CHUNK: usize = 32 << 10;

pub(super) fn listen(address: Ipv4Addr, progress: Progress) -> Result<()> {
    let listener = TcpListener::bind((address, EXEC_PORT)).context("the exec server cannot listen")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let progress = progress.clone();
            std::thread::spawn(move || {
                if let Err(error) = serve(&stream, &progress) {
                    // The caller has the same news, if there still is a caller.
                    drop(Frame::Failed(format!("{error:#}")).write(&mut &stream));
                }
            });
        }
    });
    Ok(())
}

fn serve(stream: &TcpStream, progress: &Progress) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::new(stream.try_clone()?);
    match wire::read_line(&mut input)? {
        Wish::Phase => wire::write_line(&mut &*stream, &progress.get()).context("the caller is gone"),
        Wish::Exec { argv, env, input: wanted, limit_ms } => {
            let [program, arguments @ ..] = argv.as_slice() else { anyhow::bail!("no command given") };
            let mut command = Command::new(program);
            command
                .args(arguments)
                .env_clear()
                .envs(env)
                .env("PATH", PATH)
                .env("HOME", "/root")
                .env("LC_ALL", "C.UTF-8");
            command.current_dir("/").process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.stdin(if wanted { Stdio::piped() } else { Stdio::null() });
            let child = command.spawn().with_context(|| format!("cannot run {program}"))?;
            run(child, stream, input, Duration::from_millis(limit_ms))
        }
    }
}

fn run(mut child: Child, stream: &TcpStream, input: BufReader<TcpStream>, limit: Duration) -> Result<()> {
    let out = Arc::new(Mutex::new(stream.try_clone()?));
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let copies = [
        copy(child.stdout.take(), Arc::clone(&out), Frame::Output),
        copy(child.stderr.take(), Arc::clone(&out), Frame::Error),
    ];
    let stdin = child.stdin.take();
    let forward = stdin.is_some();
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    std::thread::spawn(move || {
        let gone = feed(input, stdin);
        // A caller that is gone takes its program along; one that has only said all it had to say does not.
        // What a program that has ended left in the background stays.
        if (gone || !forward) && !is_over.load(Ordering::SeqCst) {
            kill(group);
        }
    });
    let status = process::wait(&mut child, limit)?;
    over.store(true, Ordering::SeqCst);
    if status.is_none() {
        kill(group);
    }
    // Something left in the background may hold the pipes open for ever; what it still says is not awaited.
    let patience = Instant::now() + Duration::from_millis(500);
    for copy in copies {
        while !copy.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let last = match status {
        Some(status) => Frame::Exit(process::exit_code(status)),
        None => Frame::Failed(format!("took longer than {limit:?} and was killed")),
    };
    let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
    last.write(&mut *out)?;
    out.shutdown(std::net::Shutdown::Both).context("the caller is gone")
}

fn copy(
    pipe: Option<impl Read + Send + 'static>,
    out: Arc<Mutex<TcpStream>>,
    frame: fn(Vec<u8>) -> Frame,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let Some(mut pipe) = pipe else { return };
        let mut buffer = [0; CHUNK];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            if frame(buffer[..count].to_vec()).write(&mut *out).is_err() {
                return;
            }
        }
    })
}

/// Passes input on; says whether the caller is gone rather than done.
fn feed(mut from: BufReader<TcpStream>, mut to: Option<impl Write>) -> bool {
    loop {
        match Frame::read(&mut from) {
            Ok(Some(Frame::Input(bytes))) => {
                if to.as_mut().is_some_and(|to| to.write_all(&bytes).is_err()) {
                    to = None;
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

fn kill(group: Option<Pid>) {
    if let Some(group) = group {
        // All of it may be gone already.
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
}
