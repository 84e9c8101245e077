//! `understudy-backup`: the agent of a backup host.

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use std::io::IsTerminal;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use understudy_backup::agent::Agent;
use understudy_backup::config::Config;
use understudy_backup::control_store::ControlFolder;
use understudy_backup::guest::Tools;
use understudy_backup::image::AnonymousMemory;
use understudy_backup::libvirt::LibvirtPromoter;
use understudy_backup::server::Sockets;
use understudy_proto::pool::Pool;

fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    if let Err(mistakes) = config.validate() {
        Config::command().error(ErrorKind::ValueValidation, mistakes).exit();
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    understudy_backup::host::keep_freed_memory();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime
        .worker_threads(understudy_proto::rpc::transport::runtime_threads())
        .enable_all()
        .build()?
        .block_on(run(config))
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let store = ControlFolder::open(&config.state_dir)
        .with_context(|| format!("cannot use the state directory {}", config.state_dir.display()))?;
    let mut sockets = Sockets::bind(config.listen, &config.run_dir)?;
    if let Some(tcp) = config.admin_tcp().map_err(anyhow::Error::msg)? {
        tracing::info!(address = %tcp.address()?, "operators are served over TCP");
        sockets = sockets.with_admin(tcp);
    }
    let tools = Tools {
        promoter: Arc::new(LibvirtPromoter::new(&config.libvirt_uri, &config.run_dir, !config.cold_standby)),
        store: Arc::new(store),
        memory: Arc::new(AnonymousMemory),
        dump: config.dump(),
        pool: Pool::new("decode", config.decode_threads()).map_err(anyhow::Error::msg)?,
        versions: Default::default(),
    };
    let agent = Agent::start(tools, config.staging_mib << 20).await.context("cannot start the agent")?;
    tracing::info!(address = %sockets.address(), admin = %sockets.path().display(), "ready");
    if config.insecure {
        tracing::warn!("epochs come over plain TCP: the network between the hosts must be trusted");
    }
    sockets
        .serve(agent, config.security(), async {
            tokio::select! {
                _ = terminate.recv() => (),
                _ = interrupt.recv() => (),
            }
        })
        .await
        .context("the server failed")
}
