use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::json;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}"#;

/// A QEMU of one connection: greets, then `answer` gets every request and writes what it likes.
fn qemu<F>(greeting: &'static str, mut answer: F) -> (tempfile::TempDir, std::path::PathBuf, JoinHandle<()>)
where
    F: FnMut(&mut UnixStream, Value) + Send + 'static,
{
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{greeting}").unwrap();
        let mut lines = Lines::new(stream.try_clone().unwrap());
        while let Ok(request) = lines.next_message() {
            answer(&mut stream, request);
        }
    });
    (dir, path, thread)
}

fn reply(stream: &mut UnixStream, request: &Value, value: &Value) {
    writeln!(stream, "{}", json!({"return": value, "id": request["id"]})).unwrap();
}

#[test]
fn replies_find_their_callers_and_events_their_channel() {
    let mut held: Option<Value> = None;
    let (_dir, path, _qemu) = qemu(GREETING, move |stream, request| match request["execute"].as_str() {
        // The first of two concurrent commands is answered after the second one.
        Some("slow") => held = Some(request),
        Some("fast") => {
            writeln!(stream, r#"{{"event": "STOP", "timestamp": {{"seconds": 5, "microseconds": 7}}}}"#)
                .unwrap();
            reply(stream, &request, &json!("fast"));
            if let Some(slow) = held.take() {
                reply(stream, &slow, &json!("slow"));
            }
        }
        _ => reply(stream, &request, &json!({})),
    });
    let (monitor, events) = SocketMonitor::connect(&path).unwrap();
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| monitor.execute("slow", Value::Null));
        while monitor.shared.lock().pending.is_empty() {
            std::thread::yield_now();
        }
        // Whichever order the two arrive in, each gets its own.
        let fast = loop {
            let fast = monitor.execute("fast", Value::Null);
            if slow.is_finished() {
                break fast;
            }
        };
        assert_eq!(fast, Ok(json!("fast")));
        assert_eq!(slow.join().unwrap(), Ok(json!("slow")));
    });
    let event = events.recv().unwrap();
    assert_eq!((event.name.as_str(), event.timestamp), ("STOP", Duration::new(5, 7000)));
}

#[test]
fn an_end_of_the_connection_fails_waiting_and_later_commands() {
    let (_dir, path, _qemu) = qemu(GREETING, |stream, request| {
        if request["execute"] == "quit" {
            stream.shutdown(Shutdown::Both).unwrap();
        } else {
            reply(stream, &request, &json!({}));
        }
    });
    let (monitor, events) = SocketMonitor::connect(&path).unwrap();
    for _ in 0..2 {
        assert!(matches!(monitor.execute("quit", Value::Null), Err(MonitorError::Gone { .. })));
    }
    assert!(events.recv().is_err());
}

#[test]
fn a_reply_that_does_not_come_is_an_error_and_may_come_later() {
    let mut held: Option<Value> = None;
    let (_dir, path, _qemu) = qemu(GREETING, move |stream, request| {
        if request["execute"] == "never" {
            held = Some(request);
        } else {
            if let Some(late) = held.take() {
                reply(stream, &late, &json!("late"));
            }
            reply(stream, &request, &json!("now"));
        }
    });
    let (mut monitor, _events) = SocketMonitor::connect(&path).unwrap();
    monitor.set_reply_limit(Duration::from_millis(1));
    let error = monitor.execute("never", Value::Null).unwrap_err();
    assert_eq!(error.to_string(), "never failed: no reply within 1ms");
    monitor.set_reply_limit(REPLY_LIMIT);
    assert_eq!(monitor.execute("next", Value::Null), Ok(json!("now")));
}

#[test]
fn what_is_not_qmp_is_refused() {
    let (_dir, path, _qemu) = qemu(r#"{"SSH": 2}"#, |_, _| {});
    assert!(matches!(SocketMonitor::connect(&path), Err(MonitorError::Failed { .. })));
    let (_dir, path, _qemu) = qemu("hello", |_, _| {});
    assert!(SocketMonitor::connect(&path).unwrap_err().to_string().contains("not JSON"));
    let nobody = SocketMonitor::connect("/nonexistent/qmp").unwrap_err();
    assert!(nobody.to_string().contains("/nonexistent/qmp"), "{nobody}");
}

#[test]
fn a_line_without_end_is_cut_off() {
    let (_dir, path, _qemu) = qemu(GREETING, |stream, request| {
        if request["execute"] == "endless" {
            let chunk = vec![b' '; 1 << 20];
            while stream.write_all(&chunk).is_ok() {}
        } else {
            reply(stream, &request, &json!({}));
        }
    });
    let (monitor, _events) = SocketMonitor::connect(&path).unwrap();
    let error = monitor.execute("endless", Value::Null).unwrap_err();
    assert!(error.to_string().contains("more than 16777216 bytes"), "{error}");
}

#[test]
fn a_descriptor_arrives_with_its_command() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let qemu = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{GREETING}").unwrap();
        let mut received = None;
        let mut buffer = [0; 4096];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let slice = &mut [std::io::IoSliceMut::new(&mut buffer)];
            let bytes = recvmsg(&stream, slice, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
            if bytes == 0 {
                break received;
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                    received = fds.next();
                }
            }
            let request: Value = serde_json::from_slice(&buffer[..bytes]).unwrap();
            reply(&mut stream, &request, &json!({}));
        }
    });
    let (monitor, _events) = SocketMonitor::connect(&path).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    crate::qmp::getfd(&monitor, "x", theirs.as_fd()).unwrap();
    drop((monitor, theirs));
    let mut received = UnixStream::from(qemu.join().unwrap().unwrap());
    received.write_all(b"hello").unwrap();
    drop(received);
    let mut text = String::new();
    ours.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
}
