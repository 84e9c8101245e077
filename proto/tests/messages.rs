//! Messages survive the wire, and what does not fit is refused with the field named. Runs over real connections,
//! so that generated types stay inside the crate.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use tokio_stream::StreamExt;
use understudy_proto::control::Role;
use understudy_proto::digest::Digest;
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::ids::{EpochId, Generation, GuestId, Incarnation};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::limits;
use understudy_proto::negotiate::{Agreement, Offer};
use understudy_proto::rpc::epoch::*;
use understudy_proto::rpc::{
    EpochService, EpochsClient, Failure, Inbound, Outbound, async_trait, epoch_routes, transport,
};

/// Says what it is told to, and remembers what it hears.
struct Parrot {
    heard: Mutex<Vec<Result<PrimaryMessage, Failure>>>,
    says: Mutex<Vec<BackupMessage>>,
    reply: Mutex<Option<ProbeReply>>,
}

#[async_trait]
impl EpochService for Parrot {
    async fn replicate(
        &self,
        _: Option<std::net::SocketAddr>,
        mut inbound: Inbound,
    ) -> Result<Outbound, Failure> {
        while let Some(message) = inbound.next().await {
            self.heard.lock().unwrap().push(message);
        }
        let says = std::mem::take(&mut *self.says.lock().unwrap());
        Ok(Box::pin(tokio_stream::iter(says)))
    }

    async fn probe(&self, _: ProbeRequest) -> Result<ProbeReply, Failure> {
        Ok(self.reply.lock().unwrap().take().unwrap())
    }
}

type Heard = (Vec<Result<PrimaryMessage, Failure>>, Vec<Result<BackupMessage, Failure>>, ProbeReply);

/// Sends both ways.
async fn exchange(primary: Vec<PrimaryMessage>, backup: Vec<BackupMessage>, reply: ProbeReply) -> Heard {
    let incoming = transport::listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let parrot = Arc::new(Parrot {
        heard: Mutex::default(),
        says: Mutex::new(backup),
        reply: Mutex::new(Some(reply.clone())),
    });
    let server = tokio::spawn(
        transport::server().add_routes(epoch_routes(Arc::clone(&parrot))).serve_with_incoming(incoming),
    );
    let mut client = EpochsClient::new(transport::connect_plaintext(&address.to_string()).await.unwrap());
    let request = ProbeRequest { offer: reply.offer.clone(), guest: None, machine: None };
    let probed = client.probe(request).await.unwrap();
    let mut answers = client.replicate(tokio_stream::iter(primary)).await.unwrap();
    let mut said = Vec::new();
    while let Some(message) = answers.next().await {
        said.push(message);
    }
    server.abort();
    let heard = std::mem::take(&mut *parrot.heard.lock().unwrap());
    (heard, said, probed)
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9.-]{0,20}", "\\PC{0,200}"]
}

fn offer() -> impl Strategy<Value = Offer> {
    (prop::collection::btree_set(any::<u32>(), 1..9), prop::collection::btree_set("[a-z/0-9]{0,64}", 0..9))
        .prop_map(|(versions, features)| Offer::new(versions, features).unwrap())
}

fn reference() -> impl Strategy<Value = EpochRef> {
    (1..u64::MAX, 0..u64::MAX).prop_map(|(g, e)| EpochRef { generation: Generation(g), epoch: EpochId(e) })
}

fn kind() -> impl Strategy<Value = EpochKind> {
    prop_oneof![Just(EpochKind::Full), Just(EpochKind::Delta)]
}

fn bytes(max: usize) -> impl Strategy<Value = bytes::Bytes> {
    prop_oneof![9 => prop::collection::vec(any::<u8>(), 1..64), 1 => Just(vec![7; max])].prop_map(Into::into)
}

fn hello() -> impl Strategy<Value = Hello> {
    (offer(), any::<u128>(), reference(), any::<u64>(), [text(), text(), text(), text()], any::<bool>())
        .prop_map(
            |(offer, guest, at, session, [guest_name, primary_host, qemu_version, machine], persistent)| {
                Hello {
                    offer,
                    guest: GuestId(uuid::Uuid::from_u128(guest)),
                    guest_name,
                    generation: at.generation,
                    session,
                    primary_host,
                    qemu_version,
                    machine,
                    persistent,
                    lane_key: (session % 2 == 0).then(LaneKey::random),
                }
            },
        )
}

fn seed() -> impl Strategy<Value = Seed> {
    let blocks = prop::collection::btree_map("[a-z./@]{1,30}", 1..1_000_000u64, 1..20);
    (blocks, prop::collection::vec(any::<u8>(), 0..100), any::<u32>(), "<\\PC{1,99}").prop_map(
        |(blocks, config, section, domain_xml)| {
            let block = |(name, pages): (String, u64)| RamBlock { name, used_bytes: pages * 4096 };
            let blocks = blocks.into_iter().map(block).collect();
            Seed { layout: MemoryLayout::new(blocks, config, section).unwrap(), domain_xml }
        },
    )
}

fn manifest() -> impl Strategy<Value = EpochManifest> {
    (reference(), kind(), any::<[u64; 3]>(), 1..=limits::MAX_DEVICE_BYTES, any::<[u128; 2]>()).prop_map(
        |(at, kind, [frames, pages, frame_bytes], device_bytes, digests)| EpochManifest {
            generation: at.generation,
            epoch: at.epoch,
            kind,
            frames,
            pages,
            frame_bytes,
            pages_digest: Digest(digests[0]),
            device_bytes,
            device_digest: Digest(digests[1]),
        },
    )
}

fn primary_message() -> impl Strategy<Value = PrimaryMessage> {
    let offset = limits::MAX_DEVICE_BYTES - limits::DEVICE_CHUNK_BYTES as u64;
    prop_oneof![
        hello().prop_map(PrimaryMessage::Hello),
        seed().prop_map(PrimaryMessage::Seed),
        (reference(), kind()).prop_map(|(at, kind)| {
            PrimaryMessage::Begin(Begin { generation: at.generation, epoch: at.epoch, kind })
        }),
        (reference(), bytes(limits::MAX_FRAME_BYTES))
            .prop_map(|(at, frame)| PrimaryMessage::Pages(Pages { epoch: at.epoch, frame })),
        (reference(), 0..=offset, bytes(limits::DEVICE_CHUNK_BYTES)).prop_map(|(at, offset_bytes, data)| {
            PrimaryMessage::Device(DevicePiece { epoch: at.epoch, offset_bytes, data })
        }),
        manifest().prop_map(PrimaryMessage::Manifest),
        any::<u64>().prop_map(PrimaryMessage::Heartbeat),
        prop_oneof![Just(GoodbyeReason::Ended), Just(GoodbyeReason::Unprotected)]
            .prop_map(PrimaryMessage::Goodbye),
    ]
}

fn backup_message() -> impl Strategy<Value = BackupMessage> {
    use {RefusedCode as F, RejectCode as R, StandbyState as S};
    let hello_ack = (
        offer(),
        any::<u128>(),
        prop::option::of(reference()),
        text(),
        prop::option::of(text()),
        prop::option::of(text()),
    )
        .prop_map(|(offer, life, last_committed, host, qemu_version, libvirt_version)| {
            BackupMessage::HelloAck(HelloAck {
                agreement: Agreement {
                    version: offer.versions().next().unwrap(),
                    features: offer.features().map(str::to_owned).collect(),
                },
                incarnation: Incarnation(uuid::Uuid::from_u128(life)),
                last_committed,
                host,
                qemu_version,
                libvirt_version,
            })
        });
    let reject = prop::sample::select(vec![R::Corrupt, R::NoBase, R::OutOfOrder, R::TooLarge, R::Internal]);
    let refuse = prop::sample::select(vec![
        F::Superseded,
        F::Incompatible,
        F::Busy,
        F::Protocol,
        F::NoMemory,
        F::Conflict,
        F::Internal,
    ]);
    let state = prop::sample::select(vec![S::None, S::Preparing, S::Ready, S::Failed]);
    prop_oneof![
        hello_ack,
        reference().prop_map(BackupMessage::Ack),
        (reference(), reject, text()).prop_map(|(at, code, text)| BackupMessage::Reject(Reject {
            at,
            code,
            text
        })),
        (refuse, text(), text(), prop::option::of(reference())).prop_map(|(code, text, remedy, at)| {
            BackupMessage::Refused(Refused { code, text, remedy, generation: at.map(|a| a.generation) })
        }),
        (state, text()).prop_map(|(state, text)| BackupMessage::Standby(Standby { state, text })),
        any::<u64>().prop_map(BackupMessage::HeartbeatReply),
    ]
}

fn probe_reply() -> impl Strategy<Value = ProbeReply> {
    let role = prop::sample::select(vec![
        Role::Standby,
        Role::Promoting,
        Role::Promoted,
        Role::Stale,
        Role::Released,
    ]);
    let guest =
        (role, reference(), any::<bool>(), text()).prop_map(|(role, at, known, primary_host)| GuestRecord {
            role,
            generation: at.generation,
            last_committed: known.then_some(at.epoch),
            primary_host,
        });
    (offer(), text(), any::<u128>(), any::<Option<bool>>(), any::<u64>(), prop::option::of(guest), text())
        .prop_map(|(offer, host, life, machine_supported, free_memory_bytes, guest, trouble)| ProbeReply {
            offer,
            host,
            incarnation: Incarnation(uuid::Uuid::from_u128(life)),
            qemu_version: None,
            libvirt_version: Some("9.0.0".into()),
            machine_supported,
            free_memory_bytes,
            guest,
            trouble,
        })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn plain_reply() -> ProbeReply {
    ProbeReply {
        offer: Offer::ours(),
        host: "beta".into(),
        incarnation: Incarnation(uuid::Uuid::from_u128(1)),
        qemu_version: None,
        libvirt_version: None,
        machine_supported: None,
        free_memory_bytes: 0,
        guest: None,
        trouble: String::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn messages_survive_the_wire(
        primary in prop::collection::vec(primary_message(), 0..20),
        backup in prop::collection::vec(backup_message(), 0..20),
        reply in probe_reply(),
    ) {
        let (heard, said, probed) = runtime().block_on(exchange(primary.clone(), backup.clone(), reply.clone()));
        prop_assert_eq!(heard.into_iter().collect::<Result<Vec<_>, _>>().unwrap(), primary);
        prop_assert_eq!(said.into_iter().collect::<Result<Vec<_>, _>>().unwrap(), backup);
        prop_assert_eq!(probed, reply);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_field_named() {
    let pages = |epoch, frame_bytes| {
        PrimaryMessage::Pages(Pages { epoch: EpochId(epoch), frame: vec![0; frame_bytes].into() })
    };
    let piece = |offset_bytes, data_bytes| {
        PrimaryMessage::Device(DevicePiece {
            epoch: EpochId(1),
            offset_bytes,
            data: vec![0; data_bytes].into(),
        })
    };
    let begin = |generation, epoch| {
        PrimaryMessage::Begin(Begin {
            generation: Generation(generation),
            epoch: EpochId(epoch),
            kind: EpochKind::Full,
        })
    };
    let table = [
        (pages(1, limits::MAX_FRAME_BYTES + 1), "frame bytes is 524289, the limit is 524288"),
        (pages(1, 0), "page frame is missing"),
        (pages(u64::MAX, 1), "epoch is invalid: 18446744073709551615, which has no successor"),
        (piece(0, limits::DEVICE_CHUNK_BYTES + 1), "device piece bytes is 262145, the limit is 262144"),
        (piece(u64::MAX, 1), "end of device piece is 18446744073709551615, the limit is 268435456"),
        (piece(0, 0), "device piece is missing"),
        (begin(0, 1), "generation is invalid: 0, the first is 1"),
        (begin(u64::MAX, 1), "generation is invalid: 18446744073709551615, which has no successor"),
    ];
    for (message, error) in table {
        // After the error nothing more is heard.
        let messages = vec![PrimaryMessage::Heartbeat(1), message, PrimaryMessage::Heartbeat(2)];
        let (heard, _, _) = runtime().block_on(exchange(messages, vec![], plain_reply()));
        let [Ok(PrimaryMessage::Heartbeat(1)), Err(failure)] = heard.as_slice() else { panic!("{heard:?}") };
        assert_eq!((failure.code.as_ref(), failure.reason.as_str()), ("protocol", error));
    }
}

#[test]
fn texts_of_our_own_are_cut_to_what_the_other_side_takes() {
    let text = "é".repeat(limits::MAX_TEXT_BYTES);
    let standby = BackupMessage::Standby(Standby { state: StandbyState::Failed, text });
    let (_, said, _) = runtime().block_on(exchange(vec![], vec![standby], plain_reply()));
    assert!(
        matches!(said.as_slice(), [Ok(BackupMessage::Standby(s))] if s.text.len() == limits::MAX_TEXT_BYTES)
    );
}
