//! `understudy verify`: an observer outside, who finds out whether clients ever saw what a failover took back.

mod client;
mod judge;
mod segment;
mod tape;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use judge::Verdict;
use segment::Segment;
pub(crate) use segment::parse_mac;
use understudy_proto::rpc::{Failure, FailureKind};

use crate::args::{RespondArgs, VerifyArgs};

/// Asks, and says what it came to; a violation is a failure.
pub(crate) async fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    // Seeded by the system, which is all the randomness this needs.
    let client = RandomState::new().build_hasher().finish();
    let segment = match &args.interface {
        Some(interface) => {
            let found = Segment::find(interface, args.mac, &args.addresses, args.port);
            Some(found.map_err(|reason| Failure::new(FailureKind::FailedPrecondition, "interface", reason))?)
        }
        None => None,
    };
    let lasts = Duration::from_secs(args.seconds.into());
    let period = Duration::from_millis(args.every_ms.into());
    let plan = client::Plan { addresses: &args.addresses, port: args.port, segment, client, period, lasts };
    let (verdict, tape) = client::run(&plan).await.map_err(|error| {
        let reason = format!("frames cannot be exchanged: {error}");
        Failure::new(FailureKind::Unavailable, "frames", reason)
            .with_remedy("run it as root or with CAP_NET_RAW, or leave --interface out")
    })?;
    if let Some(path) = &args.pcap {
        let evidence = tape.write(path).map_err(|error| {
            let reason = format!("cannot write {}: {error}", path.display());
            Failure::new(FailureKind::Unavailable, "pcap", reason)
        })?;
        eprintln!("{evidence} of {} frames are in {}", tape.frames(), path.display());
    }
    if args.json {
        let json = serde_json::to_string(&verdict)
            .map_err(|error| Failure::new(FailureKind::Internal, "json", error.to_string()))?;
        println!("{json}");
    } else {
        print!("{}", text(&verdict));
    }
    if verdict.violations_total > 0 {
        let reason = format!("the guest took back what it had said, {} times", verdict.violations_total);
        return Err(Failure::new(FailureKind::FailedPrecondition, "violation", reason));
    }
    if verdict.answers.values().all(|answers| *answers == 0) {
        let remedy = "run `understudy respond` in the guest, and let its port through";
        return Err(
            Failure::new(FailureKind::Unavailable, "no-answer", "nobody has answered").with_remedy(remedy)
        );
    }
    Ok(())
}

fn text(verdict: &Verdict) -> String {
    let mut text = format!(
        "{} questions, longest time without an answer {} ms\n",
        verdict.questions, verdict.longest_silence_ms
    );
    for (path, answers) in &verdict.answers {
        text.push_str(&format!("  {path}: {answers} answers\n"));
    }
    for violation in &verdict.violations {
        let seconds = Duration::from_millis(violation.at_ms).as_secs_f64();
        text.push_str(&format!("VIOLATION at {seconds:.3} s, {}: {}\n", violation.path, violation.text));
    }
    let more = verdict.violations_total - verdict.violations.len() as u64;
    if more > 0 {
        text.push_str(&format!("and {more} more\n"));
    }
    if verdict.violations_total == 0 {
        text.push_str("no violation\n");
    }
    text
}

/// Answers, in the guest, for as long as the process lives.
pub(crate) async fn respond(args: &RespondArgs) -> Result<(), Failure> {
    let started = understudy_responder::start(args.port).map_err(|error| {
        let reason = format!("cannot answer on port {}: {error}", args.port);
        Failure::new(FailureKind::Unavailable, "port", reason)
            .with_remedy("give another --port, to both sides")
    })?;
    match started.without_frames {
        None => println!("answering on port {}, and frames", args.port),
        Some(error) => {
            println!("answering on port {}; frames need CAP_NET_RAW: {error}", args.port);
        }
    }
    std::future::pending().await
}
