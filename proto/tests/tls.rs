//! TLS between agents: who is let in, who is not, and what both are told. Certificates are made here.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use understudy_proto::ids::Incarnation;
use understudy_proto::negotiate::Offer;
use understudy_proto::rpc::admin::{
    AgentRole, FailoverRequest, Progress, ProtectRequest, StatusReply, StatusRequest, UnprotectReply,
    UnprotectRequest,
};
use understudy_proto::rpc::epoch::{ProbeReply, ProbeRequest};
use understudy_proto::rpc::transport::{self, AdminTcp, Security, TlsFiles};
use understudy_proto::rpc::{
    AdminClient, AdminService, EpochService, EpochsClient, Failure, FallibleStream, Inbound, Outbound,
    admin_routes, async_trait, epoch_routes,
};

/// Counts what gets through to it.
#[derive(Default)]
struct Counter(AtomicU32);

#[async_trait]
impl EpochService for Counter {
    async fn replicate(&self, _: Option<SocketAddr>, _: Inbound) -> Result<Outbound, Failure> {
        Ok(Box::pin(tokio_stream::empty()))
    }

    async fn probe(&self, _: ProbeRequest) -> Result<ProbeReply, Failure> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(ProbeReply {
            offer: Offer::ours(),
            host: "beta".into(),
            incarnation: Incarnation(uuid::Uuid::nil()),
            qemu_version: None,
            libvirt_version: None,
            machine_supported: None,
            free_memory_bytes: 0,
            guest: None,
            trouble: String::new(),
        })
    }
}

#[async_trait]
impl AdminService for Counter {
    async fn protect(&self, _: ProtectRequest) -> Result<FallibleStream<Progress>, Failure> {
        Err(Failure::wrong_agent("protect", "primary"))
    }
    async fn unprotect(&self, _: UnprotectRequest) -> Result<UnprotectReply, Failure> {
        Err(Failure::wrong_agent("unprotect", "primary"))
    }
    async fn status(&self, _: StatusRequest) -> Result<StatusReply, Failure> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(StatusReply { guests: Vec::new(), host: "beta".into(), role: AgentRole::Backup })
    }
    async fn watch(&self, _: StatusRequest) -> Result<FallibleStream<StatusReply>, Failure> {
        Ok(Box::pin(tokio_stream::empty()))
    }
    async fn failover(&self, _: FailoverRequest) -> Result<FallibleStream<Progress>, Failure> {
        Ok(Box::pin(tokio_stream::empty()))
    }
}

struct Authority(Issuer<'static, KeyPair>, String);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self(Issuer::new(params, key), pem)
    }

    /// A folder in libvirt's layout for a host of that name, with certificates good until that year.
    fn host(&self, folder: &Path, name: &str, until: i32) -> PathBuf {
        let pki = folder.join(format!("{name}-{until}"));
        std::fs::create_dir_all(pki.join("CA")).unwrap();
        std::fs::create_dir_all(pki.join("libvirt/private")).unwrap();
        std::fs::write(pki.join("CA/cacert.pem"), &self.1).unwrap();
        for (side, usage) in
            [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
        {
            let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
            params.extended_key_usages = vec![usage];
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(until, 1, 1);
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &self.0).unwrap();
            std::fs::write(pki.join(format!("libvirt/{side}cert.pem")), certificate.pem()).unwrap();
            std::fs::write(pki.join(format!("libvirt/private/{side}key.pem")), key.serialize_pem()).unwrap();
        }
        pki
    }
}

const GOOD: i32 = 2400;

async fn serve(security: Security) -> (SocketAddr, Arc<Counter>) {
    let incoming = transport::listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let counter = Arc::new(Counter::default());
    drop(tokio::spawn(transport::serve(epoch_routes(Arc::clone(&counter)), incoming, security)));
    (address, counter)
}

async fn probe(host: &str, security: &Security) -> Result<ProbeReply, Failure> {
    let channel = transport::connect(host, security).await?;
    let request = ProbeRequest { offer: Offer::ours(), guest: None, machine: None };
    EpochsClient::new(channel).probe(request).await
}

fn client(pki: &Path) -> Security {
    Security::Tls(TlsFiles::client(pki))
}

#[tokio::test]
async fn only_both_sides_together_let_a_connection_through() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let namesake = Authority::new("ours").host(&folder.path().join("namesake"), "alpha", GOOD);
    let server = ours.host(folder.path(), "beta", GOOD);
    let alpha = ours.host(folder.path(), "alpha", GOOD);
    let gamma = ours.host(folder.path(), "gamma", GOOD);
    let expired = ours.host(folder.path(), "alpha", 2001);
    let stranger = theirs.host(&folder.path().join("theirs"), "alpha", GOOD);
    let allowed = vec!["alpha".to_owned()];
    let (address, counter) = serve(Security::Tls(TlsFiles::server(&server, allowed))).await;
    let here = address.to_string();

    assert_eq!(probe(&here, &client(&alpha)).await.unwrap().host, "beta");
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);

    // Each of them is refused before anything is sent, and told why.
    let knows_us = folder.path().join("knows-us");
    std::fs::create_dir_all(knows_us.join("CA")).unwrap();
    std::fs::copy(alpha.join("CA/cacert.pem"), knows_us.join("CA/cacert.pem")).unwrap();
    let foreign = TlsFiles { ca: knows_us.join("CA/cacert.pem"), ..TlsFiles::client(&stranger) };
    for (security, words) in [
        (client(&stranger), "its certificate is not of our CA"),
        (client(&namesake), "its certificate is not of our CA"),
        (Security::Tls(foreign), "UnknownCA"),
        (client(&expired), "CertificateExpired"),
        (client(&gamma), "AccessDenied"),
    ] {
        let failure = probe(&here, &security).await.unwrap_err();
        assert_eq!(failure.code, "tls", "{failure:?}");
        assert!(failure.reason.contains(words), "{words}: {failure:?}");
        assert!(failure.reason.contains(&here) && !failure.remedy.is_empty(), "{failure:?}");
    }
    let plain = probe(&here, &Security::Plain).await.unwrap_err();
    assert_eq!(plain.kind, understudy_proto::rpc::FailureKind::Unavailable, "{plain:?}");
    assert!(transport::wants_tls(&here).await);
    assert_eq!(counter.0.load(Ordering::SeqCst), 1, "something got through");
    // Nobody is kept out by those.
    assert!(probe(&here, &client(&alpha)).await.is_ok());
}

#[tokio::test]
async fn a_client_accepts_only_the_server_it_called() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new("ours");
    let alpha = ours.host(folder.path(), "alpha", GOOD);
    let beta = ours.host(folder.path(), "beta", GOOD);
    let (address, counter) = serve(Security::Tls(TlsFiles::server(&beta, Vec::new()))).await;
    // An address that is not in its certificate.
    let failure = probe(&format!("localhost:{}", address.port()), &client(&alpha)).await.unwrap_err();
    assert!(failure.reason.contains("does not have the name"), "{failure:?}");
    let expired = ours.host(folder.path(), "beta", 2001);
    let (late, _) = serve(Security::Tls(TlsFiles::server(&expired, Vec::new()))).await;
    let failure = probe(&late.to_string(), &client(&alpha)).await.unwrap_err();
    assert!(failure.reason.contains("has expired"), "{failure:?}");
    let (plain, through) = serve(Security::Plain).await;
    let failure = probe(&plain.to_string(), &client(&alpha)).await.unwrap_err();
    assert!(failure.reason.contains("does not speak TLS"), "{failure:?}");
    assert!(!transport::wants_tls(&plain.to_string()).await);
    assert_eq!((counter.0.load(Ordering::SeqCst), through.0.load(Ordering::SeqCst)), (0, 0));
}

#[tokio::test]
async fn files_are_named_when_they_cannot_be_used_and_renewed_ones_count_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new("ours");
    let alpha = ours.host(folder.path(), "alpha", GOOD);
    let beta = ours.host(folder.path(), "beta", 2001);
    let (address, _) = serve(Security::Tls(TlsFiles::server(&beta, Vec::new()))).await;
    let here = address.to_string();
    assert!(probe(&here, &client(&alpha)).await.is_err());
    let renewed = ours.host(folder.path(), "beta", GOOD);
    for file in ["libvirt/servercert.pem", "libvirt/private/serverkey.pem"] {
        std::fs::copy(renewed.join(file), beta.join(file)).unwrap();
    }
    assert!(probe(&here, &client(&alpha)).await.is_ok());

    std::fs::write(alpha.join("libvirt/clientcert.pem"), "nonsense").unwrap();
    let failure = probe(&here, &client(&alpha)).await.unwrap_err();
    assert_eq!(failure.code, "tls-files");
    assert!(failure.reason.contains("clientcert.pem"), "{failure:?}");
    let missing = probe(&here, &client(Path::new("/nonexistent"))).await.unwrap_err();
    assert!(missing.reason.contains("/nonexistent/CA/cacert.pem"), "{missing:?}");
    let other = ours.host(&folder.path().join("other"), "beta", GOOD);
    let mixed =
        TlsFiles { key: other.join("libvirt/private/serverkey.pem"), ..TlsFiles::server(&beta, Vec::new()) };
    assert!(mixed.server_config().unwrap_err().contains("do not go together"));
    let odd = TlsFiles::server(&beta, vec!["no name".into()]);
    assert!(odd.server_config().unwrap_err().contains("no name"));
}

#[tokio::test]
async fn only_operators_that_are_named_command_an_agent_over_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new("ours");
    let pki = |name: &str| ours.host(folder.path(), name, GOOD);
    let beta = pki("beta");
    let nobody = AdminTcp::bind("127.0.0.1:0".parse().unwrap(), TlsFiles::server(&beta, Vec::new()));
    assert!(nobody.unwrap_err().contains("--admin-allow"));
    let files = TlsFiles::server(&beta, vec!["operator".to_owned()]);
    let tcp = AdminTcp::bind("127.0.0.1:0".parse().unwrap(), files).unwrap();
    let here = tcp.address().unwrap().to_string();
    let counter = Arc::new(Counter::default());
    tokio::spawn(tcp.serve(admin_routes(Arc::clone(&counter))));

    let ask = async |pki: &Path| {
        let channel = transport::connect_admin(here.clone(), &TlsFiles::client(pki)).await?;
        AdminClient::new(channel).status(StatusRequest::default()).await
    };
    assert_eq!(ask(&pki("operator")).await.unwrap().host, "beta");
    // A host that may send epochs, but is no operator; one of another CA; and one without any certificate.
    let failure = ask(&pki("alpha")).await.unwrap_err();
    assert!(failure.code == "tls" && failure.reason.contains("AccessDenied"), "{failure:?}");
    let stranger = Authority::new("theirs").host(&folder.path().join("theirs"), "operator", GOOD);
    assert_eq!(ask(&stranger).await.unwrap_err().code, "tls");
    let plain = transport::connect_plaintext(&here).await;
    let plain = match plain {
        Ok(channel) => AdminClient::new(channel).status(StatusRequest::default()).await.map(drop),
        Err(failure) => Err(failure),
    };
    assert!(plain.is_err());
    assert_eq!(counter.0.load(Ordering::SeqCst), 1, "something got through");
}
