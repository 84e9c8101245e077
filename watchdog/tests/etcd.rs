//! etcd as arbiter, against a real etcd server, by mutual TLS. Skipped where etcd is not installed.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::ownership::{Owner, Ownership, Term};
use understudy_proto::rpc::transport::TlsFiles;
use understudy_watchdog::arbiter::{Arbiter, EtcdArbiter};

const ETCD: &str = "/usr/bin/etcd";
const UP: Duration = Duration::from_secs(60);
/// For answers that must come.
const PATIENT: Duration = Duration::from_secs(20);
/// For those that must not.
const IMPATIENT: Duration = Duration::from_secs(1);

/// A CA and one certificate of a folder, for both ends.
fn pki(folder: &Path) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let write = |file: &str, text: String| {
        let path = folder.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("CA/cacert.pem", ca);
    for side in ["server", "client"] {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        // etcd asks itself as a client, with the server's certificate.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        write(&format!("libvirt/{side}cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        write(&format!("libvirt/private/{side}key.pem"), key.serialize_pem());
    }
}

/// A server of its own, ended with the test.
struct Etcd {
    child: Option<Child>,
    folder: tempfile::TempDir,
    ports: [u16; 2],
    tls: bool,
}

impl Etcd {
    fn start(tls: bool) -> Option<Self> {
        if !Path::new(ETCD).exists() {
            println!(
                "skipped: {ETCD} is not installed (package etcd-server; `cargo xtask setup` installs it)"
            );
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        pki(&folder.path().join("pki"));
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = listeners.map(|listener| listener.local_addr().unwrap().port());
        let mut this = Self { child: None, folder, ports, tls };
        this.up();
        Some(this)
    }

    fn up(&mut self) {
        let [clients, peers] = self.ports;
        let (clients, peers) = (self.url(clients), format!("http://127.0.0.1:{peers}"));
        let mut command = Command::new(ETCD);
        command.args(["--data-dir", self.folder.path().join("data").to_str().unwrap(), "--name", "one"]);
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--initial-cluster", &format!("one={peers}"), "--log-level", "error"]);
        if self.tls {
            let file = |name: &str| self.pki().join(name).display().to_string();
            command.args(["--client-cert-auth", "--trusted-ca-file", &file("CA/cacert.pem")]);
            command.args(["--cert-file", &file("libvirt/servercert.pem")]);
            command.args(["--key-file", &file("libvirt/private/serverkey.pem")]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
    }

    fn pki(&self) -> PathBuf {
        self.folder.path().join("pki")
    }

    fn url(&self, port: u16) -> String {
        format!("{}://127.0.0.1:{port}", if self.tls { "https" } else { "http" })
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn arbiter(&self, timeout: Duration) -> Arc<EtcdArbiter> {
        let endpoint = self.url(self.ports[0]);
        Arc::new(EtcdArbiter::new(&[endpoint], &TlsFiles::client(&self.pki()), timeout).unwrap())
    }

    /// It answers: gives what it says.
    async fn answer(&self) -> Option<Ownership> {
        let (end, arbiter) = (Instant::now() + UP, self.arbiter(IMPATIENT));
        loop {
            match arbiter.read(GUEST).await {
                Ok(record) => return record,
                Err(failure) => assert!(Instant::now() < end, "{failure}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

const GUEST: GuestId = GuestId(uuid::Uuid::from_u128(1));

fn record(term: u64, owner: &str) -> Ownership {
    let owner = Owner::Solo { owner: owner.into() };
    Ownership { term: Term(term), generation: Generation(1), epoch: None, owner }
}

/// Two that want the same term at the same time, over and over; another guest is none of their business.
async fn race(etcd: &Etcd) {
    assert_eq!(etcd.answer().await, None);
    let (one, other) = (etcd.arbiter(PATIENT), etcd.arbiter(PATIENT));
    let mut won = [0; 2];
    for term in 1..=40 {
        let (a, b) = (record(term, "alpha"), record(term, "beta"));
        let (first, second) = tokio::join!(one.swap(GUEST, &a), other.swap(GUEST, &b));
        first.unwrap();
        second.unwrap();
        let found = one.read(GUEST).await.unwrap().unwrap();
        assert_eq!(other.read(GUEST).await.unwrap(), Some(found.clone()));
        assert!(found == a || found == b, "{found:?}");
        won[usize::from(found == b)] += 1;
        // The loser asks again, and so does one that has slept for long: nothing changes.
        one.swap(GUEST, &a).await.unwrap();
        other.swap(GUEST, &b).await.unwrap();
        one.swap(GUEST, &record(term.saturating_sub(1).max(1), "gamma")).await.unwrap();
        one.swap(GUEST, &record(term + 2, "gamma")).await.unwrap();
        assert_eq!(one.read(GUEST).await.unwrap(), Some(found));
    }
    println!("won: {won:?}");
    assert_eq!(one.read(GuestId(uuid::Uuid::from_u128(2))).await.unwrap(), None);
}

#[tokio::test]
async fn of_two_that_race_one_gets_a_term_and_a_stale_swap_changes_nothing() {
    let Some(etcd) = Etcd::start(true) else { return };
    race(&etcd).await;
}

#[tokio::test]
async fn without_tls_on_this_machine_it_is_the_same() {
    let Some(etcd) = Etcd::start(false) else { return };
    race(&etcd).await;
    // Longer than a server that is not ours lets itself be asked for signs of life.
    let arbiter = etcd.arbiter(PATIENT);
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(3)).await;
        arbiter.read(GUEST).await.unwrap();
    }
}

#[tokio::test]
async fn what_it_has_said_is_there_after_it_was_killed() {
    let Some(mut etcd) = Etcd::start(true) else { return };
    assert_eq!(etcd.answer().await, None);
    let arbiter = etcd.arbiter(PATIENT);
    for term in 1..=5 {
        arbiter.swap(GUEST, &record(term, "alpha")).await.unwrap();
        assert_eq!(arbiter.read(GUEST).await.unwrap(), Some(record(term, "alpha")));
        etcd.kill();
        // Dead it gives no answer.
        let impatient = etcd.arbiter(IMPATIENT);
        assert!(impatient.read(GUEST).await.is_err());
        assert!(impatient.swap(GUEST, &record(term + 1, "beta")).await.is_err());
        etcd.up();
        assert_eq!(etcd.answer().await, Some(record(term, "alpha")));
    }
}

#[tokio::test]
async fn while_it_hangs_there_is_no_answer_and_what_came_of_it_is_learnt_by_reading() {
    let Some(etcd) = Etcd::start(true) else { return };
    assert_eq!(etcd.answer().await, None);
    let arbiter = etcd.arbiter(IMPATIENT);
    arbiter.swap(GUEST, &record(1, "alpha")).await.unwrap();
    etcd.signal("-STOP");
    let began = Instant::now();
    assert!(arbiter.read(GUEST).await.is_err());
    assert!(arbiter.swap(GUEST, &record(2, "alpha")).await.is_err());
    assert!(began.elapsed() < PATIENT, "{:?}", began.elapsed());
    etcd.signal("-CONT");
    // It may have been done meanwhile, or not; afterwards one of the two is so, and stays so.
    let found = etcd.answer().await.unwrap();
    assert!(found == record(1, "alpha") || found == record(2, "alpha"), "{found:?}");
    let arbiter = etcd.arbiter(PATIENT);
    arbiter.swap(GUEST, &record(2, "beta")).await.unwrap();
    let second = arbiter.read(GUEST).await.unwrap().unwrap();
    assert_eq!(second.term, Term(2));
    arbiter.swap(GUEST, &record(3, "alpha")).await.unwrap();
    assert_eq!(arbiter.read(GUEST).await.unwrap(), Some(record(3, "alpha")));
}

#[tokio::test]
async fn a_member_that_hangs_or_is_gone_costs_its_share_of_the_time_and_no_more() {
    let Some(etcd) = Etcd::start(true) else { return };
    assert_eq!(etcd.answer().await, None);
    // Accepts connections and says nothing; and one where nobody is.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoints = [
        format!("https://{}", mute.local_addr().unwrap()),
        format!("https://{gone}"),
        etcd.url(etcd.ports[0]),
    ];
    let arbiter = EtcdArbiter::new(&endpoints, &TlsFiles::client(&etcd.pki()), PATIENT).unwrap();
    let began = Instant::now();
    arbiter.swap(GUEST, &record(1, "alpha")).await.unwrap();
    assert!(began.elapsed() < PATIENT, "{:?}", began.elapsed());
    let again = Instant::now();
    assert_eq!(arbiter.read(GUEST).await.unwrap(), Some(record(1, "alpha")));
    assert!(again.elapsed() < PATIENT / 3, "the one that answered is asked first");
}

#[tokio::test]
async fn a_stranger_is_refused() {
    let Some(etcd) = Etcd::start(true) else { return };
    assert_eq!(etcd.answer().await, None);
    let other = tempfile::tempdir().unwrap();
    pki(other.path());
    let endpoint = etcd.url(etcd.ports[0]);
    let stranger = EtcdArbiter::new(&[endpoint], &TlsFiles::client(other.path()), PATIENT).unwrap();
    assert!(stranger.read(GUEST).await.is_err());
    assert!(stranger.swap(GUEST, &record(1, "mallory")).await.is_err());
    assert_eq!(etcd.arbiter(PATIENT).read(GUEST).await.unwrap(), None);
}
