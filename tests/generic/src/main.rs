//! `understudy-generic SOCKET [SERVICE/METHOD [JSON]]`: lists what a server offers, or calls it. Answers are JSON, one a
//! line; an error is one line with code, reason and whether a retry helps, and the exit status 1.

use std::path::Path;
use std::process::ExitCode;

use understudy_generic::{Client, error_info};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match (runtime, arguments.as_slice()) {
        (Ok(runtime), [socket, rest @ ..]) => runtime.block_on(run(Path::new(socket), rest)),
        (Err(error), _) => Err(error.to_string()),
        (_, []) => Err("give SOCKET [SERVICE/METHOD [JSON]]".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(socket: &Path, arguments: &[String]) -> Result<(), String> {
    let client = Client::unix(socket).await?;
    let [method, rest @ ..] = arguments else {
        for service in client.services() {
            client.methods(service).iter().for_each(|method| println!("{service}/{method}"));
        }
        return Ok(());
    };
    let request = rest.first().map_or("{}", String::as_str);
    let request = serde_json::from_str(request).map_err(|error| format!("not JSON: {error}"))?;
    let answers = client.call(method, request).await.map_err(|status| {
        let (reason, _, retryable) = error_info(&status).unwrap_or_default();
        format!("{:?} {reason} retryable={retryable} {}", status.code(), status.message())
    })?;
    answers.iter().for_each(|answer| println!("{answer}"));
    Ok(())
}
