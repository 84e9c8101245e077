//! The admin service of a real primary agent as a generic client sees it. libvirt is its own test driver, whose domain
//! cannot be protected: what is refused, and how.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Code;
use understudy_generic::{Client, error_info};
use understudy_primary::admin::Admin;
use understudy_primary::agent::Agent;
use understudy_primary::config::Config;
use understudy_proto::ids::GuestId;
use understudy_proto::ownership::Term;
use understudy_proto::rpc::{admin_routes, transport};

const ADMIN: &str = "understudy.admin.v1.Admin";

fn agent(folder: &Path) -> Arc<Agent> {
    let state = folder.display().to_string();
    let config = Config::try_parse_from([
        "understudy-primary",
        "--libvirt-uri",
        "test:///default",
        "--host-name",
        "alpha",
        "--state-dir",
        &state,
        "--run-dir",
        &state,
    ]);
    Agent::new(config.unwrap())
}

async fn serve(folder: &Path) -> Client {
    let routes = admin_routes(Arc::new(Admin::new(agent(folder))));
    let socket = folder.join(transport::PRIMARY_SOCKET);
    let listener = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    tokio::spawn(transport::server().add_routes(routes).serve_with_incoming(listener));
    Client::unix(&socket).await.unwrap()
}

async fn call(client: &Client, name: &str, request: Value) -> Result<Vec<Value>, tonic::Status> {
    let method = format!("{ADMIN}/{name}");
    let calling = client.call(&method, request);
    tokio::time::timeout(Duration::from_secs(60), calling).await.expect(name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_answers_and_refuses_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let client = serve(folder.path()).await;
    let health = client.first("grpc.health.v1.Health/Check", json!({"service": ADMIN})).await.unwrap();
    assert_eq!(health["status"], "SERVING");
    let list = call(&client, "List", json!({})).await.unwrap().remove(0);
    assert_eq!((&list["host"], &list["role"]), (&json!("alpha"), &json!("AGENT_ROLE_PRIMARY")));
    let seen = client.first(&format!("{ADMIN}/Watch"), json!({})).await.unwrap();
    assert_eq!(seen["host"], "alpha");

    let refused = async |name: &str, request: Value| {
        let status = call(&client, name, request).await.unwrap_err();
        let (reason, domain, _) = error_info(&status).unwrap_or_else(|| panic!("{name}: {status:?}"));
        assert_eq!(domain, "understudy");
        (status.code(), reason, status.message().to_owned())
    };
    let long = "x".repeat(16 << 10);
    for name in ["Protect", "Get", "Set", "Unprotect", "Failover", "Confirm"] {
        let (code, reason, message) = refused(name, json!({})).await;
        assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "PROTOCOL"), "{name}: {message}");
        let (code, ..) = refused(name, json!({"domain": "x".repeat(1 << 20)})).await;
        assert_eq!(code, Code::InvalidArgument, "{name}");
    }
    for name in ["Get", "Unprotect", "Status", "Watch"] {
        for domain in [long.as_str(), "nobody", "1", "a\u{0}b"] {
            let (code, reason, _) = refused(name, json!({"domain": domain})).await;
            assert_eq!((code, reason.as_str()), (Code::NotFound, "NOT_PROTECTED"), "{name}");
        }
    }
    // The guest of the test driver, by its name and by its number.
    for domain in ["test", "1"] {
        let (code, reason, message) =
            refused("Protect", json!({"domain": domain, "to": "127.0.0.1:1", "insecure": true})).await;
        assert!(matches!(code, Code::FailedPrecondition | Code::Internal), "{reason}: {message}");
    }
    let (code, reason, _) =
        refused("Protect", json!({"domain": "nobody", "to": "127.0.0.1:1", "insecure": true})).await;
    assert_eq!((code, reason.as_str()), (Code::NotFound, "NO_DOMAIN"));
    let (code, reason, message) =
        refused("Protect", json!({"domain": "test", "to": "beta", "insecure": true})).await;
    assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "INSECURE_NOT_LOOPBACK"), "{message}");
    for to in ["", "bad host", &long] {
        let (code, _, message) =
            refused("Protect", json!({"domain": "test", "to": to, "insecure": true})).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
    }
    for epoch in [0, 4, 60_001, u32::MAX] {
        let request = json!({"domain": "test", "to": "127.0.0.1:1", "insecure": true, "epochMs": epoch});
        let (code, reason, _) = refused("Protect", request).await;
        assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "EPOCH_LENGTH"), "{epoch}");
        let (code, reason, _) = refused("Set", json!({"domain": "test", "epochMs": epoch})).await;
        assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "EPOCH_LENGTH"), "{epoch}");
    }
    let (code, reason, _) = refused("Set", json!({"domain": "test"})).await;
    assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "NOTHING_TO_SET"));
    let (code, reason, _) = refused("Set", json!({"domain": "test", "epochMs": 50})).await;
    assert_eq!((code, reason.as_str()), (Code::NotFound, "NOT_PROTECTED"));
    for name in ["Failover", "Confirm"] {
        let (code, reason, _) = refused(name, json!({"domain": "test"})).await;
        assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "WRONG_AGENT"));
    }
    for name in client.methods(ADMIN) {
        for bytes in [&b"\xff\xff\xff\xff"[..], b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe"] {
            let broken = client.raw(&format!("{ADMIN}/{name}"), bytes).await;
            assert!(name == "List" || broken.is_err(), "{name} {bytes:?}: {broken:?}");
        }
    }
    // And it still serves.
    call(&client, "List", json!({})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_of_the_past_does_not_end_a_protection() {
    let (folder, guest) = (tempfile::tempdir().unwrap(), GuestId(uuid::Uuid::from_u128(7)));
    let agent = agent(folder.path());
    agent.hold(guest, Term(4)).unwrap();
    let failure = agent.unprotect(guest, Some(Term(4))).await.unwrap_err();
    assert_eq!((failure.code.as_ref(), failure.retryable), ("order-outdated", false), "{failure}");
    let status = tonic::Status::from(failure);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(error_info(&status).unwrap().0, "ORDER_OUTDATED");
    assert_eq!(agent.take_order(guest, Some(Term(3))).unwrap_err().code, "order-outdated");
    // What is newer is done, and so is what an operator says.
    agent.unprotect(guest, Some(Term(5))).await.unwrap();
    agent.unprotect(guest, None).await.unwrap();
    assert_eq!(agent.hold(guest, Term(4)).unwrap_err().code, "order-outdated");
}
