//! Datagrams that somebody else sends: made up, or recorded and sent again.

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};

use super::*;

/// Passes datagrams on between two, and keeps what the first has sent.
pub(super) struct Relay {
    socket: UdpSocket,
    recorded: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Relay {
    fn new() -> Self {
        Self { socket: UdpSocket::bind("127.0.0.1:0").unwrap(), recorded: Arc::default() }
    }

    /// Gives where the first is to send.
    pub(super) fn between(&self, first: SocketAddr, second: SocketAddr) -> SocketAddr {
        let (socket, recorded) = (self.socket.try_clone().unwrap(), Arc::clone(&self.recorded));
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                let (to, bytes) = (if from == first { second } else { first }, &buffer[..len]);
                if from == first {
                    recorded.lock().unwrap().push(bytes.to_vec());
                }
                let _ = socket.send_to(bytes, to);
            }
        });
        self.socket.local_addr().unwrap()
    }
}

#[tokio::test]
async fn a_recording_does_not_keep_a_dead_primary_alive() {
    let relay = Relay::new();
    let pair = pair_with(Policies::default(), Some(&relay), None).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    pair.keepers[0].abort();
    let recorded = relay.recorded.lock().unwrap().clone();
    assert!(recorded.len() > 5);
    // Beta knows this start of alpha; a beta that is started anew knows none.
    let (asked, folder) = (questions(), tempfile::tempdir().unwrap());
    let anew = Paths::open("127.0.0.1:0".parse().unwrap(), vec![], seal()).await.unwrap();
    let towards = [pair.second, anew.address().unwrap()];
    let player = std::thread::spawn(move || {
        for _ in 0..400 {
            for bytes in &recorded {
                for to in towards {
                    let _ = relay.socket.send_to(bytes, to);
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let heard = tokio::time::timeout(Duration::from_secs(2), anew.receive()).await;
    assert!(heard.is_err(), "{heard:?}");
    pair.until("taken over", |record| matches!(&record.owner, Owner::Solo { owner } if owner == "beta"))
        .await;
    drop((asked, folder));
    player.join().unwrap();
}

/// Bytes before the heartbeat in a sealed datagram.
const HEAD: usize = 50;

/// A heartbeat behind the head of a datagram of alpha, numbered as the newest, without the MAC that it cannot have.
fn in_the_name_of_alpha(datagram: &[u8], heartbeat: &Heartbeat) -> Vec<u8> {
    let mut bytes = datagram[..HEAD].to_vec();
    let newest = u64::MAX / 2 + heartbeat.number;
    bytes[9] = 0;
    bytes[HEAD - 8..].copy_from_slice(&newest.to_le_bytes());
    bytes.extend(heartbeat.encode().unwrap());
    bytes.extend([0; 32]);
    bytes
}

#[tokio::test]
async fn who_lacks_the_key_cannot_have_a_guest_taken_over() {
    let relay = Relay::new();
    let pair = pair_with(Policies::default(), Some(&relay), None).await;
    pair.standby().await;
    let before = pair.record.get();
    let alphas = relay.recorded.lock().unwrap().last().cloned().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let key = HeartbeatKey::new(&[8; MIN_KEY_BYTES]).unwrap();
    let mut forger = Seal::new(key, uuid::Uuid::new_v4());
    for number in 0..100 {
        let forged = Heartbeat {
            guest: GUEST,
            host: "alpha".into(),
            life: u64::MAX,
            number,
            term: Term(u64::MAX),
            generation: Generation(u64::MAX),
            epoch: EpochId(7),
            qemu_age: None,
            image: None,
            ended: false,
            yields: true,
            crashed: true,
            settings: None,
        };
        // By a stranger, without a seal, and by whoever sees what alpha sends.
        let named = in_the_name_of_alpha(&alphas, &forged);
        for bytes in [forger.seal(&forged).unwrap(), forged.encode().unwrap(), named] {
            socket.send_to(&bytes, pair.second).unwrap();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pair.record.get(), before);
}
