//! The supervisor of the primary agent of this host.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use understudy_proto::sealed::Seal;
use understudy_watchdog::arbiter::{Arbiter, WitnessArbiter};
use understudy_watchdog::bound;
use understudy_watchdog::config::Config;
use understudy_watchdog::keeper::{self, AgentHost, Asked, Paths, Reports, Settings};
use understudy_watchdog::monitor::Libvirt;
use understudy_watchdog::supervisor::Supervisor;
use understudy_watchdog::witness;

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
        mistakes.iter().for_each(|mistake| eprintln!("understudy-watchdog: {mistake}"));
        return ExitCode::from(EXIT_USAGE);
    }
    let filter = EnvFilter::new(&config.log);
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if config.log_json {
        logger.json().init();
    } else {
        logger.with_ansi(false).init();
    }
    if let Some(address) = config.witness {
        return witness(&config, address);
    }
    info!(
        version = env!("CARGO_PKG_VERSION"), state_dir = %config.state_dir.display(), libvirt = config.connect,
        dead_ms = bound::DEAD.as_millis(), hung_ms = bound::hung(config.hung_after()).as_millis(), "started"
    );
    let libvirt = Arc::new(Libvirt { uri: config.connect.clone() });
    if config.is_automatic()
        && let Err(error) = keep_guests(&config, libvirt.clone())
    {
        eprintln!("understudy-watchdog: {error}");
        return ExitCode::FAILURE;
    }
    // There is nothing to put in order at its end: SIGTERM just ends it.
    match Supervisor::new(config.state_dir.clone(), libvirt, config.hung_after()).run(|_| {}) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("understudy-watchdog: cannot start a thread: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How long the arbiter may take over a question.
const ARBITER_ANSWER: Duration = Duration::from_secs(1);

fn witness(config: &Config, address: std::net::SocketAddr) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("understudy-watchdog: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(witness::serve(&config.witness_dir, address, config.serves())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("understudy-watchdog: {failure}; {}", failure.remedy);
            ExitCode::FAILURE
        }
    }
}

fn arbiter(config: &Config) -> Result<Arc<dyn Arbiter>, String> {
    #[cfg(feature = "etcd")]
    if !config.etcd.is_empty() {
        let files = understudy_proto::rpc::transport::TlsFiles::client(&config.pki_dir);
        let etcd = understudy_watchdog::arbiter::EtcdArbiter::new(&config.etcd, &files, ARBITER_ANSWER);
        return Ok(Arc::new(etcd.map_err(|failure| format!("{failure}; {}", failure.remedy))?));
    }
    let Some(at) = &config.witness_at else { return Err("--witness-at is not given".to_owned()) };
    Ok(Arc::new(WitnessArbiter::new(at, config.asks(), ARBITER_ANSWER)))
}

/// Starts the claim protocol beside the supervisor. When it ends the process does: a watchdog that only looks alive is
/// worse than none, and whoever started it starts it again.
fn keep_guests(config: &Config, libvirt: Arc<Libvirt>) -> Result<(), String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let arbiter = arbiter(config)?;
    let seal = Seal::new(config.key()?, uuid::Uuid::new_v4());
    if config.unauthenticated_heartbeats {
        warn!("heartbeats are taken from anybody (--unauthenticated-heartbeats)");
    }
    let host = AgentHost {
        run_dir: config.run_dir.clone(),
        state_dir: config.state_dir.clone(),
        uri: libvirt.uri.clone(),
        monitors: libvirt,
        load_limit: config.load_limit(),
        insecure: config.insecure,
        asked: Asked::default(),
    };
    let settings = Settings {
        host: name,
        policies: config.policies(),
        timing: config.timing(),
        limits: bound::Limits { arbiter: ARBITER_ANSWER, load: config.load_limit() },
        fence: config.fence()?,
        spares: config.spares(),
        reports: Reports::new(config.state_dir.join("reports")),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let (listen, peers) = (config.listen_heartbeats, config.peer.clone());
    let opened = runtime.block_on(Paths::open(listen, peers, seal));
    let paths = opened.map_err(|error| format!("cannot listen for heartbeats on {listen}: {error}"))?;
    let questions = runtime
        .block_on(keeper::listen(&config.run_dir))
        .map_err(|error| format!("cannot listen in {}: {error}", config.run_dir.display()))?;
    let keep = move || {
        let ended = runtime.block_on(keeper::run(settings, arbiter, Arc::new(host), paths, questions));
        eprintln!("understudy-watchdog: guests are no longer kept: {ended:?}");
        std::process::exit(1);
    };
    std::thread::Builder::new().name("keeper".to_owned()).spawn(keep).map_err(|error| error.to_string())?;
    Ok(())
}
