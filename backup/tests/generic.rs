//! The admin service of a real agent as a tool sees it that knows nothing of it but what reflection tells.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

mod support;

use serde_json::{Value, json};
use support::*;
use tonic::Code;
use understudy_generic::{Client, error_info};
use understudy_proto::epoch::EpochKind::{Delta, Full};
use understudy_proto::rpc::transport;

const ADMIN: &str = "understudy.admin.v1.Admin";

async fn client(backup: &Backup) -> Client {
    Client::unix(&backup.dir.path().join(transport::BACKUP_SOCKET)).await.unwrap()
}

fn method(name: &str) -> String {
    format!("{ADMIN}/{name}")
}

async fn call(client: &Client, name: &str, request: Value) -> Result<Vec<Value>, tonic::Status> {
    in_time(name, client.call(&method(name), request)).await
}

#[tokio::test]
async fn a_generic_client_finds_out_watches_and_fails_over() {
    let backup = Backup::start().await;
    let mut primary = Primary::connect(&backup, hello(1)).await.unwrap();
    let layout = layout(&[4]);
    primary.commit(&Epoch::new(at(1, 1), Full, &layout, &[page(0, 0, 1)], b"device 1")).await;
    let client = client(&backup).await;

    for service in [ADMIN, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"] {
        assert!(client.services().iter().any(|known| known == service), "{:?}", client.services());
    }
    for name in ["List", "Get", "Set", "Protect", "Unprotect", "Status", "Watch", "Failover", "Confirm"] {
        assert!(client.methods(ADMIN).iter().any(|known| known == name), "{name}");
        assert!(client.comment(&method(name)).is_some_and(|text| text.contains("agent")), "{name}");
    }
    let fields = client.describe(&method("Protect")).unwrap();
    assert!(fields.iter().any(|(name, kind)| name == "epoch_ms" && kind == "uint32"), "{fields:?}");

    for service in ["", ADMIN] {
        let health = client.first("grpc.health.v1.Health/Check", json!({"service": service})).await.unwrap();
        assert_eq!(health["status"], "SERVING", "{service:?}");
    }

    let list = call(&client, "List", json!({})).await.unwrap().remove(0);
    assert_eq!((&list["guests"][0]["domain"], &list["role"]), (&json!("web"), &json!("AGENT_ROLE_BACKUP")));
    let get = call(&client, "Get", json!({"domain": GUEST.to_string()})).await.unwrap().remove(0);
    assert_eq!((&get["domain"], &get["state"]), (&json!("web"), &json!("standby")));
    // libvirt's numbers name guests, too.
    let by_id = call(&client, "Get", json!({"domain": FAKE_ID.to_string()})).await.unwrap().remove(0);
    assert_eq!(by_id["domain"], "web");

    primary.commit(&Epoch::new(at(1, 2), Delta, &layout, &[page(0, 1, 2)], b"device 2")).await;
    let epoch = |reply: &Value| reply["guests"][0]["committedEpoch"].as_str().map(str::to_owned);
    let watch = method("Watch");
    let seen = client.until(&watch, json!({"domain": "web"}), |reply| epoch(reply).as_deref() == Some("2"));
    in_time("watch", seen).await.unwrap();

    let refused = call(&client, "Failover", json!({"domain": "web"})).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(error_info(&refused).unwrap().0, "PRIMARY_ALIVE");
    drop(primary);
    let steps = call(&client, "Failover", json!({"domain": "web", "iHaveFenced": true})).await.unwrap();
    let last = steps.last().unwrap();
    assert_eq!((&last["done"], &last["failover"]["epoch"]), (&json!(true), &json!("2")));
    let after = call(&client, "Get", json!({"domain": "web"})).await.unwrap().remove(0);
    assert_eq!(after["state"], "promoted");
}

#[tokio::test]
async fn bad_input_is_refused_by_code_and_reason() {
    let backup = Backup::start().await;
    let client = client(&backup).await;
    let huge = "x".repeat(1 << 20);
    let long = "x".repeat(16 << 10);
    let wants_domain = ["Get", "Set", "Unprotect", "Failover", "Confirm", "Protect"];
    for name in wants_domain {
        let empty = call(&client, name, json!({})).await.unwrap_err();
        assert_eq!(empty.code(), Code::InvalidArgument, "{name}: {empty:?}");
        let (reason, domain, retryable) = error_info(&empty).unwrap();
        assert_eq!(
            (reason.as_str(), domain.as_str(), retryable),
            ("PROTOCOL", "understudy", false),
            "{name}"
        );
        assert!(empty.message().contains("domain"), "{name}: {empty:?}");
        let huge = call(&client, name, json!({"domain": huge})).await.unwrap_err();
        assert_eq!(huge.code(), Code::InvalidArgument, "{name}: {huge:?}");
    }
    for name in ["Get", "Unprotect", "Failover", "Confirm", "Status", "Watch"] {
        // As long as a name may be: the answer, which names it, fits into what a client takes.
        for domain in
            [long.as_str(), "nobody", "4711", "00000000-0000-0000-0000-000000000000", "\u{0}", "a\nb é"]
        {
            let unknown = call(&client, name, json!({"domain": domain})).await.unwrap_err();
            assert_eq!(unknown.code(), Code::NotFound, "{name} {domain:.9}: {unknown:?}");
            assert_eq!(error_info(&unknown).unwrap().0, "NO_GUEST");
        }
    }
    for (name, request) in
        [("Protect", json!({"domain": "web", "to": "beta"})), ("Set", json!({"domain": "web", "epochMs": 1}))]
    {
        let wrong = call(&client, name, request).await.unwrap_err();
        assert_eq!(
            (wrong.code(), error_info(&wrong).unwrap().0.as_str()),
            (Code::FailedPrecondition, "WRONG_AGENT")
        );
    }
    // What is no message at all, a field of another type, and fields nobody knows.
    for name in client.methods(ADMIN) {
        for bytes in [&b"\xff\xff\xff\xff"[..], b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe"] {
            let broken = in_time("broken", client.raw(&method(&name), bytes)).await;
            // A method without fields takes what it does not look into.
            assert!(name == "List" || broken.is_err(), "{name} {bytes:?}: {broken:?}");
        }
        let too_large =
            in_time("too large", client.raw(&method(&name), &vec![0; 5 << 20])).await.unwrap_err();
        assert_eq!(too_large.code(), Code::OutOfRange, "{name}: {too_large:?}");
    }
    let unknown_field = in_time("unknown field", client.raw(&method("List"), b"\xfa\x3f\x01x")).await;
    assert!(unknown_field.is_ok(), "{unknown_field:?}");
    // And it still serves.
    call(&client, "List", json!({})).await.unwrap();
    assert_eq!(client.methods("no.such.Service"), Vec::<String>::new());
}
