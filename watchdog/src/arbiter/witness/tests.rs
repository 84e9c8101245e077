use std::net::SocketAddr;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use understudy_proto::ids::Generation;
use understudy_proto::ownership::{Owner, Term};
use understudy_proto::rpc::transport::TlsFiles;

use super::*;
use crate::witness::{Store, serve_on};

const GUEST: GuestId = GuestId(uuid::Uuid::from_u128(1));

fn record(term: u64, owner: &str) -> Ownership {
    let owner = Owner::Solo { owner: owner.into() };
    Ownership { term: Term(term), generation: Generation(1), epoch: None, owner }
}

/// A witness with a runtime of its own, whose end takes every connection with it.
struct Running {
    at: SocketAddr,
    stop: tokio::sync::oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Running {
    fn start(folder: &Path, security: Security) -> Self {
        let store = Store::open(folder).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let incoming = transport::listen("127.0.0.1:0".parse().unwrap()).unwrap();
                tell.send(incoming.local_addr().unwrap()).unwrap();
                tokio::select! {
                    ended = serve_on(incoming, store, security) => ended.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        let at = told.recv_timeout(Duration::from_secs(60)).unwrap();
        Self { at, stop, thread }
    }

    fn arbiter(&self, security: Security) -> WitnessArbiter {
        WitnessArbiter::new(&self.at.to_string(), security, Duration::from_secs(20))
    }

    fn end(self) {
        drop(self.stop);
        self.thread.join().unwrap();
    }
}

/// Certificates for these names, all of one CA.
fn pki(folder: &Path, names: &[&str]) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    for name in names {
        let write = |file: &str, text: &str| {
            let path = folder.join(name).join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("CA/cacert.pem", &ca);
        for (side, usage) in
            [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
        {
            let mut params = CertificateParams::new([(*name).to_owned()]).unwrap();
            params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate().unwrap();
            write(&format!("libvirt/{side}cert.pem"), &params.signed_by(&key, &issuer).unwrap().pem());
            write(&format!("libvirt/private/{side}key.pem"), &key.serialize_pem());
        }
    }
}

async fn is_read_and_swapped(arbiter: &WitnessArbiter) {
    assert_eq!(arbiter.read(GUEST).await.unwrap(), None);
    arbiter.swap(GUEST, &record(1, "alpha")).await.unwrap();
    // The loser is not told by an error: it reads.
    arbiter.swap(GUEST, &record(1, "beta")).await.unwrap();
    assert_eq!(arbiter.read(GUEST).await.unwrap(), Some(record(1, "alpha")));
}

#[tokio::test]
async fn a_real_witness_is_read_and_swapped_and_its_absence_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let witness = Running::start(folder.path(), Security::Plain);
    let arbiter = witness.arbiter(Security::Plain);
    is_read_and_swapped(&arbiter).await;
    witness.end();
    let failure = arbiter.read(GUEST).await.unwrap_err();
    assert!(!failure.reason.is_empty());
}

#[tokio::test]
async fn only_who_is_of_the_ca_and_listed_reads_or_swaps() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    pki(&ours, &["witness", "alpha", "gamma"]);
    pki(&theirs, &["alpha"]);
    let client = |folder: &Path| Security::Tls(TlsFiles::client(folder));
    let serves = Security::Tls(TlsFiles::server(&ours.join("witness"), vec!["alpha".into()]));
    let witness = Running::start(&folder.path().join("store"), serves);
    for refused in [Security::Plain, client(&theirs.join("alpha")), client(&ours.join("gamma"))] {
        let arbiter = witness.arbiter(refused);
        arbiter.read(GUEST).await.unwrap_err();
        arbiter.swap(GUEST, &record(1, "mallory")).await.unwrap_err();
    }
    is_read_and_swapped(&witness.arbiter(client(&ours.join("alpha")))).await;
    witness.end();
    // Nor is a witness believed that is none of ours.
    let impostor = Security::Tls(TlsFiles::server(&theirs.join("alpha"), vec![]));
    let witness = Running::start(&folder.path().join("impostor"), impostor);
    let failure = witness.arbiter(client(&ours.join("alpha"))).read(GUEST).await.unwrap_err();
    assert_eq!(failure.code, "tls", "{failure}");
    witness.end();
}

#[test]
fn the_port_of_the_witness_is_its_own() {
    for (given, at) in [
        ("w", "w:7421"),
        ("w:9", "w:9"),
        ("127.0.0.1:9", "127.0.0.1:9"),
        ("fe80::1", "[fe80::1]:7421"),
        ("[::1]:5", "[::1]:5"),
    ] {
        assert_eq!(WitnessArbiter::new(given, Security::Plain, Duration::ZERO).at, at);
    }
}
