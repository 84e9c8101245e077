//! The agent beside the protected guest: capture, pace, replicate.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use understudy_primary::admin::Admin;
use understudy_primary::agent::{Agent, Handover};
use understudy_primary::config::Config;
use understudy_primary::life::SignOfLife;
use understudy_primary::metadata;
use understudy_proto::rpc::owner::with_handover;
use understudy_proto::rpc::transport::{self, AdminTcp};
use understudy_proto::rpc::{Routes, admin_routes};

/// As in sysexits.h: the command was used incorrectly.
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let config = match Config::try_parse() {
        Ok(config) => config,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let mistakes = config.mistakes();
    if !mistakes.is_empty() {
        mistakes.iter().for_each(|mistake| eprintln!("understudy-primary: {mistake}"));
        return ExitCode::from(EXIT_USAGE);
    }
    let filter = EnvFilter::new(&config.log);
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if config.log_json {
        logger.json().init();
    } else {
        logger.with_ansi(false).init();
    }
    understudy_primary::keep_freed_memory();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(transport::runtime_threads()).enable_all().build();
    let served = runtime.context("cannot start the threads of this agent");
    match served.and_then(|runtime| runtime.block_on(serve(config))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("understudy-primary: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(config: Config) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let agent = Agent::new(config);
    let remembered = agent.remembered()?;
    let socket = agent.config.run_dir.join(transport::PRIMARY_SOCKET);
    let listener = listen(&socket).await?;
    let admin_tcp = agent.config.admin_tcp().map_err(anyhow::Error::msg)?;
    // Before any guest is touched, and until the process ends.
    let _life = SignOfLife::take(&agent.config.state_dir)?;
    info!(version = env!("CARGO_PKG_VERSION"), socket = %socket.display(), guests = remembered.len(), "started");

    let hooks = metadata::listen(&agent.config.run_dir)?;
    tokio::spawn(metadata::serve_hooks(hooks, agent.config.clone()));

    let routes = admin_routes(Arc::new(Admin::new(Arc::clone(&agent))));
    let by_tcp = serve_tcp(admin_tcp, routes.clone());
    // A handover is the watchdog's business, which is on this host.
    let routes = with_handover(routes, Arc::new(Handover(Arc::clone(&agent))));
    let serving =
        transport::server().add_routes(routes).serve_with_incoming(UnixListenerStream::new(listener));
    let working = async {
        agent.restart(remembered).await;
        metadata::run(Arc::clone(&agent)).await;
        std::future::pending::<()>().await
    };
    tokio::select! {
        result = serving => result.context("the admin socket failed")?,
        result = by_tcp => result.context("the admin service over TCP failed")?,
        () = working => {}
        _ = terminate.recv() => info!("SIGTERM: letting all guests go"),
        _ = interrupt.recv() => info!("SIGINT: letting all guests go"),
    }
    agent.shutdown().await;
    if let Err(error) = std::fs::remove_file(&socket) {
        warn!(%error, "cannot remove the socket");
    }
    Ok(())
}

/// Serves operators over TCP; for ever if nobody is to be served there.
async fn serve_tcp(tcp: Option<AdminTcp>, routes: Routes) -> Result<()> {
    match tcp {
        Some(tcp) => {
            info!(address = %tcp.address()?, "operators are served over TCP");
            Ok(tcp.serve(routes).await?)
        }
        None => std::future::pending().await,
    }
}

/// Binds the admin socket, for whoever may write to it; a socket nobody answers on is left over from a predecessor.
async fn listen(socket: &Path) -> Result<UnixListener> {
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    if tokio::net::UnixStream::connect(socket).await.is_ok() {
        anyhow::bail!("another understudy-primary answers on {}; end that one first", socket.display());
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", socket.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    // Whoever may write to it may end protections.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
