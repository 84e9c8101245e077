//! The hook as libvirt calls it.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use understudy_hook::call::{Answer, Call, HOOK_SOCKET, MAX_LINE_BYTES, line, read_line};

/// Far beyond the hook's own limit: it fails on a hook that waits for ever, not on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn marked(attributes: &str) -> String {
    format!(
        "<domain><metadata><u:protect xmlns:u='urn:understudy:domain:1' {attributes}/></metadata></domain>"
    )
}

fn hook(folder: &Path, arguments: &[&str], xml: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_understudy-hook"))
        .args(arguments)
        .env_clear()
        .env("UNDERSTUDY_RUN_DIR", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The hook may end before it has read everything.
    let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
    let begun = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(begun.elapsed() < PATIENCE, "the hook does not end");
    assert!(output.stdout.is_empty(), "libvirt would take it for an XML: {output:?}");
    output
}

/// An agent that does `act` with each of `count` connections.
fn agent(
    folder: &Path,
    count: usize,
    act: impl Fn(UnixStream) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(folder.join(HOOK_SOCKET)).unwrap();
    std::thread::spawn(move || (0..count).for_each(|_| act(listener.accept().unwrap().0)))
}

fn says(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const OPERATIONS: [&str; 9] =
    ["prepare", "start", "started", "stopped", "release", "migrate", "restore", "reconnect", "attach"];

#[test]
fn without_an_agent_nothing_fails_but_what_is_required() {
    let folder = tempfile::tempdir().unwrap();
    for operation in OPERATIONS.into_iter().chain(["something-new", ""]) {
        let optional =
            hook(folder.path(), &["web", operation, "begin", "-"], &marked("enabled='yes' backup='b'"));
        assert!(optional.status.success(), "{operation}: {optional:?}");
        let required = marked("enabled='yes' backup='b' required='yes'");
        let required = hook(folder.path(), &["web", operation, "begin", "-"], &required);
        let may_fail = ["prepare", "start"].contains(&operation);
        assert_eq!(required.status.success(), !may_fail, "{operation}: {required:?}");
    }
    assert!(hook(folder.path(), &[], "").status.success());
}

#[test]
fn the_agent_is_told_and_decides() {
    let folder = tempfile::tempdir().unwrap();
    let (calls, heard) = std::sync::mpsc::channel();
    let agent = agent(folder.path(), 3, move |mut stream| {
        let call: Call = read_line(std::io::BufReader::new(&stream)).unwrap();
        let answer = match call.operation.as_str() {
            "started" => Answer::Ok,
            _ => Answer::Deny { reason: "the backup b does not answer".into() },
        };
        calls.send(call).unwrap();
        stream.write_all(&line(&answer).unwrap()).unwrap();
    });
    let required = marked("enabled='yes' backup='b' insecure='yes' required='yes'");
    let denied = hook(folder.path(), &["web", "prepare", "begin", "-"], &required);
    assert!(!denied.status.success() && says(&denied).contains("the backup b does not answer"), "{denied:?}");
    // A denial of what may not be denied is only a note.
    let reconnect = hook(folder.path(), &["web", "reconnect", "begin", "-"], &required);
    assert!(reconnect.status.success() && says(&reconnect).contains("does not answer"), "{reconnect:?}");
    assert!(hook(folder.path(), &["web", "started", "begin", "-"], &required).status.success());
    let call = heard.recv().unwrap();
    assert_eq!((call.guest.as_str(), call.backup.as_str(), call.insecure), ("web", "b", true));
    assert!(call.may_refuse);
    let call = heard.recv().unwrap();
    assert_eq!((call.operation.as_str(), call.may_refuse), ("reconnect", false));
    agent.join().unwrap();
}

#[test]
fn an_agent_that_hangs_or_babbles_does_not_hold_libvirt() {
    let folder = tempfile::tempdir().unwrap();
    let (keep, kept) = std::sync::mpsc::channel();
    let agent = agent(folder.path(), 6, move |mut stream| {
        let mut byte = [0];
        let _ = stream.read(&mut byte);
        // Now and then an endless answer instead of none.
        if byte[0] == b'{' {
            let _ = stream.write_all(&vec![b'x'; 2 * MAX_LINE_BYTES]);
        }
        keep.send(stream).unwrap();
    });
    for operation in ["prepare", "reconnect", "release"] {
        assert!(
            hook(folder.path(), &["web", operation], &marked("enabled='yes' backup='b'")).status.success()
        );
    }
    let required = marked("enabled='yes' backup='b' required='yes'");
    assert!(!hook(folder.path(), &["web", "start"], &required).status.success());
    assert!(hook(folder.path(), &["web", "reconnect"], &required).status.success());
    // A guest whose element is broken but says that it is required.
    let broken = hook(folder.path(), &["web", "start"], &marked("enabld='yes' required='yes'"));
    assert!(!broken.status.success(), "{broken:?}");
    agent.join().unwrap();
    drop(kept);
}

#[test]
fn a_silent_agent_and_an_open_standard_input_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join(HOOK_SOCKET)).unwrap();
    for (xml, fine) in
        [("enabled='yes' backup='b'", true), ("enabled='yes' backup='b' required='yes'", false)]
    {
        // Nobody accepts: the kernel's queue takes the connection, and no answer comes.
        assert_eq!(hook(folder.path(), &["web", "prepare"], &marked(xml)).status.success(), fine);
    }
    drop(listener);
    let mut child = Command::new(env!("CARGO_BIN_EXE_understudy-hook"))
        .args(["web", "prepare"])
        .env_clear()
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // Standard input is never closed.
    let _input = child.stdin.take().unwrap();
    assert!(child.wait().unwrap().success());
}
