//! The hook. libvirt waits for it and holds the domain while it runs, so everything has one deadline.

use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use crate::call::{self, Answer, Call, clipped};
use crate::metadata::{self, Protect};

/// What the hook may take, from its start to its end.
pub const DEADLINE: Duration = Duration::from_millis(1800);

/// The end of a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// libvirt goes on; with a note for its log if something was not as it should be.
    GoOn(Option<String>),
    /// libvirt refuses the start, and tells this to whoever asked for it.
    Refuse(String),
}

/// What is known so far; it decides what a lack of an answer means.
enum Step {
    /// The document is read.
    Read { may_refuse: bool },
    /// The agent has answered, or cannot be asked.
    Answered(Result<Answer, String>),
}

/// Does what libvirt asks of a hook, within `deadline`. `arguments` are those after the name of the program.
pub fn run(
    arguments: &[String],
    document: impl Read + Send + 'static,
    socket: PathBuf,
    deadline: Duration,
) -> Verdict {
    let end = Instant::now() + deadline;
    let (steps, progress) = mpsc::channel();
    let argument = |index: usize| arguments.get(index).map(|text| clipped(text)).unwrap_or_default();
    let operation = argument(1);
    let refusable = matches!(operation.as_str(), "prepare" | "start");
    let call = Call {
        guest: argument(0),
        operation,
        phase: argument(2),
        extra: argument(3),
        may_refuse: false,
        backup: String::new(),
        insecure: false,
        mistake: String::new(),
    };
    // Left behind when it hangs: the process ends without it.
    std::thread::spawn(move || work(call, refusable, document, socket, end, &steps));
    let mut may_refuse = false;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let answer = match progress.recv_timeout(left) {
            Ok(Step::Read { may_refuse: now_known }) => {
                may_refuse = now_known;
                continue;
            }
            Ok(Step::Answered(answer)) => answer,
            Err(_) => Err(format!("the agent has not answered within {} ms", deadline.as_millis())),
        };
        return verdict(may_refuse, answer);
    }
}

/// Only a start that may be refused is ever refused: `reconnect` above all must not fail, libvirt would end the guest.
fn verdict(may_refuse: bool, answer: Result<Answer, String>) -> Verdict {
    match (may_refuse, answer) {
        (_, Ok(Answer::Ok)) => Verdict::GoOn(None),
        (false, Ok(Answer::Deny { reason }) | Err(reason)) => Verdict::GoOn(Some(reason)),
        (true, Ok(Answer::Deny { reason })) => Verdict::Refuse(reason),
        (true, Err(reason)) => Verdict::Refuse(format!(
            "required='yes' and it cannot be told whether the guest can be protected: {reason}; start \
             understudy-primary, or say required='no'"
        )),
    }
}

fn work(
    mut call: Call,
    refusable: bool,
    document: impl Read,
    socket: PathBuf,
    end: Instant,
    steps: &Sender<Step>,
) {
    let mut xml = Vec::new();
    // A document that ends early is judged by what came.
    let _ = document.take(metadata::MAX_XML_BYTES as u64 + 1).read_to_end(&mut xml);
    if refusable {
        let xml = String::from_utf8_lossy(&xml);
        call.may_refuse = metadata::asks_to_be_required(&xml);
        let _ = steps.send(Step::Read { may_refuse: call.may_refuse });
        match Protect::in_domain(&xml) {
            Ok(Some(wanted)) if wanted.enabled => {
                (call.backup, call.insecure) = (wanted.backup, wanted.insecure);
            }
            Ok(_) => {}
            Err(mistake) => call.mistake = clipped(&mistake.to_string()),
        }
    }
    let answer = ask(&call, &socket, end).map_err(|error| format!("{}: {error}", socket.display()));
    let _ = steps.send(Step::Answered(answer));
}

fn ask(call: &Call, socket: &PathBuf, end: Instant) -> std::io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    // A time limit of zero would mean none.
    let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))?;
    stream.write_all(&call::line(call)?)?;
    call::read_line(BufReader::new(stream))
}
