//! `understudy-responder [PORT]`: `understudy respond` as a program of its own, for a guest without libraries.

use std::process::ExitCode;

fn main() -> ExitCode {
    let port = match std::env::args().nth(1).map(|port| port.parse::<u16>()) {
        None => understudy_responder::PORT,
        Some(Ok(port)) => port,
        Some(Err(error)) => {
            eprintln!("the port is no number ({error}): understudy-responder [PORT]");
            return ExitCode::from(64);
        }
    };
    match understudy_responder::start(port) {
        Ok(started) => {
            if let Some(error) = started.without_frames {
                eprintln!("only UDP and TCP are answered, frames need CAP_NET_RAW: {error}");
            }
            println!("answering on port {port}");
            loop {
                std::thread::park();
            }
        }
        Err(error) => {
            eprintln!("cannot answer on port {port}: {error}");
            ExitCode::FAILURE
        }
    }
}
