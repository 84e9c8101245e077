use super::*;
use crate::ids::{EpochId, Generation, GuestId};
use crate::ownership::Term;

fn beat(number: u64) -> Heartbeat {
    Heartbeat {
        guest: GuestId(Uuid::from_u128(7)),
        host: "alpha".into(),
        life: 5,
        number,
        term: Term(7),
        generation: Generation(8),
        epoch: EpochId(9),
        qemu_age: None,
        image: None,
        ended: false,
        yields: false,
        crashed: false,
        settings: None,
    }
}

fn key(text: &str) -> HeartbeatKey {
    HeartbeatKey::new(text.repeat(32).as_bytes()).unwrap()
}

fn seal(start: u128) -> Seal {
    Seal::new(key("k"), Uuid::from_u128(start))
}

/// `to` gets to know `from`; gives what was on the wire.
fn meet(from: &mut Seal, to: &mut Seal) -> Vec<Vec<u8>> {
    let mut wire = vec![from.seal(&beat(0)).unwrap()];
    let (mut here, mut there) = (to, from);
    loop {
        match here.open(wire.last().unwrap()).unwrap() {
            Opened::Reply(reply) => wire.push(reply),
            Opened::Known => return wire,
            Opened::Heartbeat(_) => panic!("a stranger's heartbeat was taken"),
        }
        std::mem::swap(&mut here, &mut there);
    }
}

#[test]
fn strangers_get_to_know_each_other_and_then_heartbeats_are_taken_both_ways() {
    let (mut a, mut b) = (seal(1), seal(2));
    // The heartbeat, B's answer, A's, and B's, which knows A now.
    assert_eq!(meet(&mut a, &mut b).len(), 4);
    for n in 1..300 {
        assert_eq!(b.open(&a.seal(&beat(n)).unwrap()).unwrap(), Opened::Heartbeat(beat(n)));
        assert_eq!(a.open(&b.seal(&beat(n)).unwrap()).unwrap(), Opened::Heartbeat(beat(n)));
    }
    assert!(a.seal(&beat(0)).unwrap().len() <= MAX_BYTES);
}

#[test]
fn what_is_forged_or_damaged_does_not_count() {
    let (mut a, mut b) = (seal(1), seal(2));
    meet(&mut a, &mut b);
    let mut forger = Seal::new(key("x"), Uuid::from_u128(1));
    forger.sent = 1000;
    assert!(matches!(b.open(&forger.seal(&beat(1)).unwrap()), Err(Refused::NotAuthentic)));
    let answer = forger.made(ANSWER, Uuid::from_u128(2), &[]);
    assert!(matches!(b.open(&answer), Err(Refused::NotAuthentic)));
    let mut nobody = Seal::new(HeartbeatKey::none(), Uuid::from_u128(1));
    nobody.sent = 1000;
    assert!(matches!(b.open(&nobody.seal(&beat(1)).unwrap()), Err(Refused::NotAuthentic)));
    let good = a.seal(&beat(2)).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(b.open(&bad), Err(Refused::NotAuthentic)), "bit {bit}");
    }
    for len in 0..good.len() {
        assert!(matches!(b.open(&good[..len]), Err(Refused::NotAuthentic)), "{len} bytes");
    }
    assert_eq!(b.open(&good).unwrap(), Opened::Heartbeat(beat(2)));
}

/// A recording of everything that was ever sent, played back: after the death of the sender, to a receiver that knows it,
/// to one that was started anew, and beside a sender that was started anew.
#[test]
fn what_is_replayed_neither_keeps_a_dead_host_alive_nor_is_in_the_way_of_a_live_one() {
    let (mut a, mut b) = (seal(1), seal(2));
    let mut wire = meet(&mut a, &mut b);
    for n in 1..300 {
        let sent = a.seal(&beat(n)).unwrap();
        assert!(matches!(b.open(&sent), Ok(Opened::Heartbeat(_))));
        wire.push(sent);
    }
    let taken = |seal: &mut Seal| {
        wire.iter().filter(|bytes| matches!(seal.open(bytes), Ok(Opened::Heartbeat(_)))).count()
    };
    assert_eq!(taken(&mut b), 0, "known");
    let mut anew = seal(3);
    assert_eq!(taken(&mut anew), 0, "started anew");
    assert_eq!(taken(&mut anew), 0, "and again");
    // A is started anew too, while the recording is played between any two of its datagrams.
    let mut again = seal(4);
    let first = again.seal(&beat(1)).unwrap();
    let Opened::Reply(asked) = anew.open(&first).unwrap() else { panic!("taken") };
    assert_eq!(taken(&mut anew) + taken(&mut again), 0);
    let Opened::Reply(answer) = again.open(&asked).unwrap() else { panic!("no answer") };
    assert_eq!(taken(&mut anew) + taken(&mut again), 0);
    assert!(matches!(anew.open(&answer).unwrap(), Opened::Reply(_)));
    let sent = again.seal(&beat(2)).unwrap();
    assert_eq!(taken(&mut anew) + taken(&mut again), 0);
    assert_eq!(anew.open(&sent).unwrap(), Opened::Heartbeat(beat(2)));
    // Our own, sent back to us.
    assert!(matches!(again.open(&sent), Err(Refused::Own)));
}

#[test]
fn a_number_counts_once_in_any_order_of_slow_and_fast_paths() {
    let (mut a, mut b) = (seal(1), seal(2));
    meet(&mut a, &mut b);
    let sent: Vec<Vec<u8>> = (1..=200).map(|n| a.seal(&beat(n)).unwrap()).collect();
    let fresh = |b: &mut Seal, at: usize| matches!(b.open(&sent[at]), Ok(Opened::Heartbeat(_)));
    assert!(fresh(&mut b, 120));
    assert!((0..120).rev().all(|at| fresh(&mut b, at)), "late");
    assert!(!(0..=120).any(|at| fresh(&mut b, at)), "again");
    assert!(fresh(&mut b, 199));
    assert!(!fresh(&mut b, 60), "too late");
    assert!(fresh(&mut b, 199 - 50));
}

/// A receiver that was started anew is played what the sender, whom it has just got to know, had sent before.
#[test]
fn what_was_sent_before_two_knew_each_other_does_not_count_afterwards() {
    let (mut a, mut b, mut anew) = (seal(1), seal(2), seal(3));
    meet(&mut a, &mut b);
    let mut recorded: Vec<Vec<u8>> = (1..=100).map(|n| a.seal(&beat(n)).unwrap()).collect();
    recorded.extend(meet(&mut a, &mut anew));
    for bytes in &recorded {
        let opened = anew.open(bytes);
        assert!(!matches!(opened, Ok(Opened::Heartbeat(_))), "{opened:?}");
    }
    assert_eq!(anew.open(&a.seal(&beat(101)).unwrap()).unwrap(), Opened::Heartbeat(beat(101)));
}

#[test]
fn a_short_key_is_refused_and_none_is_shown() {
    assert!(HeartbeatKey::new(&[7; MIN_KEY_BYTES - 1]).is_err());
    assert_eq!(format!("{:?}", key("k")), "HeartbeatKey(..)");
}
