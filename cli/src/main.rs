//! `understudy`: protects a virtual machine, shows how it fares, fails it over. It asks the agents of this host
//! through their unix sockets, or those that `--connect` names, and does nothing by itself. It ends with 0 or 1.

mod args;
mod commands;
mod connect;
mod generate;
mod hook;
mod owner;
mod progress;
mod status;
mod verify;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;
use understudy_proto::rpc::Failure;
use understudy_proto::rpc::owner::Question;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version are no failure; clap would end with 2 where there is one.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("error: cannot start: {e}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", failure.reason);
            if !failure.remedy.is_empty() {
                eprintln!("  what to do: {}", failure.remedy.replace('\n', "\n              "));
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<(), Failure> {
    let sockets = &connect::Agents::new(&args.run_dir, args.connect.as_deref(), &args.pki_dir)?;
    match &args.command {
        Command::Protect(a) => commands::protect(sockets, a).await,
        Command::Set(a) => commands::set(sockets, a).await,
        Command::Unprotect { domain } => commands::unprotect(sockets, domain).await,
        Command::Failover(a) => commands::failover(sockets, a).await,
        Command::Switchover(a) => owner::ask(sockets.folder()?, Question::Switchover, a).await,
        Command::Failback(a) => owner::ask(sockets.folder()?, Question::Failback, a).await,
        Command::Report(a) => owner::ask(sockets.folder()?, Question::Report, a).await,
        Command::Explain(a) => owner::ask(sockets.folder()?, Question::Explain, a).await,
        Command::Status(a) => status::status(sockets, a).await,
        Command::Verify(a) => verify::verify(a).await,
        Command::Respond(a) => verify::respond(a).await,
        Command::Hook(a) => hook::run(&args.run_dir, a),
        Command::Completion { shell } => generate::completion(*shell),
        Command::Man { folder } => generate::manual(folder),
    }
}
