use super::*;
use crate::epoch::EpochKind;
use crate::ids::{EpochId, Generation, GuestId};
use crate::negotiate::Offer;
use crate::rpc::epoch::{Begin, Hello, Pages};
use bytes::Bytes;
use proptest::prelude::*;

fn hello(key: Option<LaneKey>) -> PrimaryMessage {
    PrimaryMessage::Hello(Hello {
        offer: Offer::ours(),
        guest: GuestId(uuid::Uuid::from_u128(1)),
        guest_name: "web".into(),
        generation: Generation(1),
        session: 1,
        primary_host: "alpha".into(),
        qemu_version: String::new(),
        machine: "pc".into(),
        persistent: false,
        lane_key: key,
    })
}

fn pages(content: u64) -> Pages {
    Pages { epoch: EpochId(1), frame: Bytes::copy_from_slice(&content.to_le_bytes()) }
}

type Main = mpsc::Sender<Result<MainMessage, Failure>>;
type Frames = mpsc::Sender<Result<LaneMessage, Failure>>;

/// A stream that has said Hello.
async fn stream(lanes: &Lanes, key: Option<LaneKey>) -> (Main, Inbound) {
    let (main, messages) = mpsc::channel(4096);
    let mut merged = lanes.merged(Box::pin(ReceiverStream::new(messages)));
    main.send(Ok(hello(key).into())).await.unwrap();
    assert_eq!(merged.next().await.unwrap().unwrap(), hello(key));
    (main, merged)
}

async fn lane(
    lanes: &Lanes,
    key: LaneKey,
    lane: u32,
) -> Result<(Frames, ReceiverStream<Infallible>), Failure> {
    let (frames, messages) = mpsc::channel(4096);
    frames.send(Ok(LaneMessage::Open(LaneOpen { key, lane }))).await.unwrap();
    let end = lanes.attach(Box::pin(ReceiverStream::new(messages))).await?;
    Ok((frames, end))
}

fn by(lane: u32, number: u64) -> Result<MainMessage, Failure> {
    Ok(MainMessage::ByLane(ByLane { lane, number }))
}

fn frame(number: u64) -> Result<LaneMessage, Failure> {
    Ok(LaneMessage::Frame(LaneFrame { number, pages: pages(number) }))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

proptest! {
    /// Whoever is fast and whoever is slow, the order is that of the stream.
    #[test]
    fn the_order_is_that_of_the_stream(
        ways in prop::collection::vec(0..4_u32, 0..60),
        turns in prop::collection::vec(0..4_usize, 0..400),
    ) {
        runtime().block_on(async {
            let (lanes, key) = (Lanes::default(), LaneKey::random());
            let (main, mut merged) = stream(&lanes, Some(key)).await;
            let mut ends = Vec::new();
            // What each connection has yet to bring.
            let mut queues = [const { Vec::new() }; 4];
            let mut senders = Vec::new();
            for id in 1..4 {
                let (frames, end) = lane(&lanes, key, id).await.unwrap();
                senders.push(frames);
                ends.push(end);
            }
            let (mut number, mut expected) = (0, Vec::new());
            let mut mains = Vec::new();
            for (at, way) in (0..).zip(&ways) {
                if *way == 0 {
                    expected.push(1_000_000 + at);
                    mains.push(Ok(PrimaryMessage::Pages(pages(1_000_000 + at)).into()));
                } else {
                    expected.push(number);
                    mains.push(by(*way, number));
                    queues[*way as usize].push(number);
                    number += 1;
                }
            }
            queues.iter_mut().for_each(|queue| queue.reverse());
            mains.reverse();
            let reader = tokio::spawn(async move {
                let mut read = Vec::new();
                while let Some(item) = merged.next().await {
                    let PrimaryMessage::Pages(pages) = item.unwrap() else { panic!() };
                    read.push(u64::from_le_bytes(pages.frame.as_ref().try_into().unwrap()));
                }
                read
            });
            // First as the turns say, then what is left.
            for turn in turns.into_iter().chain([0, 1, 2, 3].into_iter().cycle().take(4 * 70)) {
                match turn {
                    0 => if let Some(message) = mains.pop() {
                        main.send(message).await.unwrap();
                    },
                    lane => if let Some(number) = queues[lane].pop() {
                        senders[lane - 1].send(frame(number)).await.unwrap();
                    },
                }
                tokio::task::yield_now().await;
            }
            drop(main);
            assert_eq!(reader.await.unwrap(), expected);
        });
    }
}

/// What ends a stream with these messages, whose lane 1 brings these frames and then stays open, or ends.
async fn end_of(
    messages: Vec<Result<MainMessage, Failure>>,
    frames: Vec<Result<LaneMessage, Failure>>,
    open: bool,
) -> Failure {
    let (lanes, key) = (Lanes::default(), LaneKey::random());
    let (main, mut merged) = stream(&lanes, Some(key)).await;
    let (sender, mut end) = lane(&lanes, key, 1).await.unwrap();
    for message in messages {
        main.send(message).await.unwrap();
    }
    for frame in frames {
        sender.send(frame).await.unwrap();
    }
    let sender = open.then_some(sender);
    let failure = loop {
        if let Err(failure) = merged.next().await.unwrap() {
            break failure;
        }
    };
    assert!(merged.next().await.is_none(), "nothing comes behind an error");
    drop(merged);
    assert!(end.next().await.is_none(), "the lane ends with its stream");
    assert!(lane(&lanes, key, 1).await.is_err(), "the key is worth nothing any more");
    drop(sender);
    failure
}

#[tokio::test]
async fn what_does_not_fit_ends_the_stream_in_words() {
    let broken = Failure::new(FailureKind::Unavailable, "x", "reset by peer");
    for (messages, frames, open, kind, says) in [
        (vec![by(1, 0)], vec![], true, FailureKind::Unavailable, "nothing came for 4 s"),
        (vec![by(1, 0), by(1, 1)], vec![frame(0)], false, FailureKind::Unavailable, "it has ended"),
        (vec![by(1, 0)], vec![Err(broken)], true, FailureKind::Unavailable, "reset by peer"),
        (
            vec![by(1, 0), by(1, 1)],
            vec![frame(0), frame(0)],
            true,
            FailureKind::InvalidArgument,
            "frame 0 in the place of 1",
        ),
        (vec![by(1, 0)], vec![frame(7)], true, FailureKind::InvalidArgument, "frame 7 in the place of 0"),
        (vec![by(1, 5)], vec![frame(5)], true, FailureKind::InvalidArgument, "the next one is 0"),
        (vec![by(1, 0), by(1, 0)], vec![frame(0)], true, FailureKind::InvalidArgument, "the next one is 1"),
        (vec![by(2, 0)], vec![frame(0)], true, FailureKind::InvalidArgument, "lane 2, which is not open"),
    ] {
        let failure = end_of(messages, frames, open).await;
        assert_eq!(failure.kind, kind, "{failure}");
        assert!(failure.reason.contains(says), "{failure}: {says}");
    }
}

#[tokio::test]
async fn a_lane_belongs_to_an_open_stream() {
    let (lanes, key) = (Lanes::default(), LaneKey::random());
    let refused = lane(&lanes, key, 1).await.unwrap_err();
    assert_eq!((refused.kind, &*refused.code), (FailureKind::NotFound, "no-stream"));
    let (_main, _merged) = stream(&lanes, Some(key)).await;
    assert!(lane(&lanes, LaneKey::random(), 1).await.is_err());
    let mut open = Vec::new();
    for _ in 0..limits::MAX_LANES {
        open.push(lane(&lanes, key, 1).await.unwrap());
    }
    assert!(lane(&lanes, key, 1).await.unwrap_err().reason.contains("too many"));
    // A key is of one stream only.
    let (main, messages) = mpsc::channel(4);
    let mut second = lanes.merged(Box::pin(ReceiverStream::new(messages)));
    main.send(Ok(hello(Some(key)).into())).await.unwrap();
    assert!(second.next().await.unwrap().is_err());
    // The first one still has it.
    drop(second);
    assert!(lanes.lock().contains_key(&key));
    // A lane that says nothing, and one that begins with a frame.
    let (_frames, messages) = mpsc::channel(1);
    assert!(lanes.attach(Box::pin(ReceiverStream::new(messages))).await.is_err());
    let (frames, messages) = mpsc::channel(1);
    frames.send(frame(0)).await.unwrap();
    assert!(lanes.attach(Box::pin(ReceiverStream::new(messages))).await.is_err());
}

#[tokio::test]
async fn without_a_key_there_are_no_lanes() {
    let lanes = Lanes::default();
    let (main, mut merged) = stream(&lanes, None).await;
    let begin =
        PrimaryMessage::Begin(Begin { generation: Generation(1), epoch: EpochId(1), kind: EpochKind::Full });
    main.send(Ok(begin.clone().into())).await.unwrap();
    assert_eq!(merged.next().await.unwrap().unwrap(), begin);
    main.send(by(1, 0)).await.unwrap();
    assert!(merged.next().await.unwrap().unwrap_err().reason.contains("no key"));
}

#[tokio::test]
async fn a_lane_that_has_ended_may_be_opened_again() {
    let (lanes, key) = (Lanes::default(), LaneKey::random());
    let (main, mut merged) = stream(&lanes, Some(key)).await;
    for number in 0..3 {
        let (frames, _end) = lane(&lanes, key, 1).await.unwrap();
        main.send(by(1, number)).await.unwrap();
        frames.send(frame(number)).await.unwrap();
        assert_eq!(merged.next().await.unwrap().unwrap(), PrimaryMessage::Pages(pages(number)));
    }
}
