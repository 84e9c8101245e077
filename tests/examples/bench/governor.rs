//! What the governor makes of a link: epochs through the recoder it steers, over loopback with and without a limit, beside the same
//! epochs raw. Frames are encoded, sent and applied at once, as between two agents; both kinds take turns, so that a busy machine
//! slows both alike.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_primary::encode::governor::{Governor, Plan};
use understudy_primary::encode::{LinkMeter, Recoder, SharedCounters};
use understudy_proto::ProtocolError;
use understudy_proto::codec::CodecSet;
use understudy_proto::epoch::EpochKind;
use understudy_proto::frame::FrameReader;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::rpc::epoch::Seed;
use understudy_proto::units::PAGE_BYTES;

use crate::connections::pair::throttle;
use crate::trace::{Epochs, GUEST_PAGES, Maker, Pages, Trace};
use crate::wire::captured;
use crate::{Report, ms};

/// 1 Gbit/s.
const LIMIT: f64 = 125e6;
/// Frames between encoder and link, as in the agent.
const FRAMES: usize = 8;
/// Epochs in which the governor gets to know the link and the pages.
const LEARNING: usize = 40;
const CACHE_BYTES: usize = 128 << 20;

/// A link without a limit is so fast that where its buffers lie decides over more than the goal is: so many pairs of connections
/// are opened one after the other, and their median counts.
const ROUNDS: usize = 21;
/// With a limit it is the limit that decides.
const LIMITED_ROUNDS: usize = 2;

pub(crate) fn run(epochs: usize) -> anyhow::Result<Report> {
    let mut report = Report::new("governor", format!("cargo xtask bench governor -- --epochs {epochs}"));
    let (mut worst, mut learning, mut noise) = (0.0f64, 0.0f64, 1.0f64);
    for trace in Trace::ALL {
        let ratios = rows(&mut report, &format!("{}, no limit", trace.name()), trace, None, epochs)?;
        worst = worst.max(ratios.settled);
        learning = learning.max(ratios.learning);
        noise = noise.max(ratios.noise).max(1.0 / ratios.noise);
    }
    report.row("no limit, the worst trace", "raw / raw", "ratio", vec![noise]);
    report.at_most("no limit, an epoch against raw, the worst trace", 1.05, worst);
    report.at_most("the same while it learns", 1.05, learning);
    for trace in [Trace::Database, Trace::Random] {
        let ratios = rows(&mut report, &format!("{}, 1 Gbit/s", trace.name()), trace, Some(LIMIT), epochs)?;
        if trace == Trace::Database {
            report.at_least("1 Gbit/s, database, epochs/s of raw's", 3.0, 1.0 / ratios.settled);
        } else {
            report.at_most("1 Gbit/s, random, an epoch against raw", 1.05, ratios.settled);
        }
    }
    Ok(report)
}

/// Of what comes after the learning and before, against raw; and raw against raw. Medians of the rounds.
struct Ratios {
    settled: f64,
    learning: f64,
    noise: f64,
}

fn rows(
    report: &mut Report,
    name: &str,
    trace: Trace,
    limit: Option<f64>,
    epochs: usize,
) -> anyhow::Result<Ratios> {
    let rounds = if limit.is_some() { LIMITED_ROUNDS } else { ROUNDS };
    let mut times: [Vec<f64>; 3] = Default::default();
    let mut early: [Vec<f64>; 3] = Default::default();
    let [mut settled, mut learning, mut noise, mut early_noise, mut plans] = [(); 5].map(|()| Vec::new());
    for round in 0..rounds {
        let all = measure(trace, limit, LEARNING + epochs, round)?;
        let part = |kind: usize| all.times[kind].split_at(LEARNING);
        settled.push(ratio(part(GOVERNED).1, part(RAW).1));
        learning.push(ratio(part(GOVERNED).0, part(RAW).0));
        noise.push(ratio(part(AGAIN).1, part(RAW).1));
        early_noise.push(ratio(part(AGAIN).0, part(RAW).0));
        plans.push(f64::from(all.plan));
        for kind in [RAW, AGAIN, GOVERNED] {
            early[kind].extend(part(kind).0);
            times[kind].extend(part(kind).1);
        }
    }
    let [raw, _, governed] = early;
    report.row(name, "raw, learning", "ms", raw);
    report.row(name, "understudy, learning", "ms", governed);
    let [raw, _, governed] = times;
    report.row(name, "raw", "ms", raw);
    report.row(name, "understudy", "ms", governed);
    report.row(name, "understudy, plan", "index", plans);
    report.row(name, "raw / raw, learning", "ratio", early_noise);
    Ok(Ratios {
        learning: report.row(name, "understudy / raw, learning", "ratio", learning),
        settled: report.row(name, "understudy / raw", "ratio", settled),
        noise: report.row(name, "raw / raw", "ratio", noise),
    })
}

/// Of the sums over the epochs in which neither took longer than all but a thirtieth: those are the scheduler's.
fn ratio(ours: &[f64], theirs: &[f64]) -> f64 {
    let limit = |times: &[f64]| {
        let mut sorted = times.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted.get(sorted.len() - sorted.len() / 30 - 1).copied().unwrap_or(f64::INFINITY)
    };
    let (most, their_most) = (limit(ours), limit(theirs));
    let kept = || ours.iter().zip(theirs).filter(|(ours, theirs)| **ours <= most && **theirs <= their_most);
    kept().map(|(ours, _)| ours).sum::<f64>() / kept().map(|(_, theirs)| theirs).sum::<f64>()
}

/// Kinds of epochs.
const RAW: usize = 0;
/// To see what the machine makes of one and the same.
const AGAIN: usize = 1;
const GOVERNED: usize = 2;

struct Measured {
    /// Of every delta of each kind, in ms, from its first page to the answer.
    times: [Vec<f64>; 3],
    /// The governor's at the end; its place in [`Plan::ALL`].
    plan: u8,
}

fn measure(trace: Trace, limit: Option<f64>, epochs: usize, round: usize) -> anyhow::Result<Measured> {
    let mut maker = Maker::new(trace, 0x5eed + 2 * round as u64);
    let fixed = || Way::open(Governor::fixed(Plan::Raw), limit);
    let mut ways = [fixed()?, fixed()?, Way::open(Governor::new(), limit)?];
    let all = maker.all();
    for way in &mut ways {
        way.epoch(EpochKind::Full, &all)?;
    }
    let mut times = [(); 3].map(|()| Vec::with_capacity(epochs));
    for epoch in 0..epochs {
        let pages = maker.epoch();
        // Who comes first finds the pages in no cache.
        for turn in 0..ways.len() {
            let kind = (epoch + turn) % ways.len();
            times[kind].push(ms(ways[kind].epoch(EpochKind::Delta, &pages)?));
        }
    }
    Ok(Measured { times, plan: ways[GOVERNED].plan() })
}

/// From pages to an image on the other side.
struct Way {
    recoder: Recoder,
    counters: SharedCounters,
    epoch: u64,
    frames: SyncSender<Option<Bytes>>,
    answers: Receiver<()>,
}

impl Way {
    fn open(governor: Governor, limit: Option<f64>) -> anyhow::Result<Self> {
        let block = RamBlock { name: "pc.ram".into(), used_bytes: GUEST_PAGES * PAGE_BYTES as u64 };
        let layout = MemoryLayout::new(vec![block], vec![], 2)?;
        let (link, counters) = (Arc::<LinkMeter>::default(), SharedCounters::default());
        let mut recoder = Recoder::new(governor, CACHE_BYTES, Arc::clone(&link), Arc::clone(&counters));
        recoder.layout(&layout);
        let (ours, theirs) = connection(limit)?;
        std::thread::spawn(move || backup(theirs, layout));
        let (frames, inbox) = sync_channel(FRAMES);
        let (done, answers) = sync_channel(1);
        std::thread::spawn(move || send(ours, &inbox, &link, &done));
        Ok(Self { recoder, counters, epoch: 0, frames, answers })
    }

    fn epoch(&mut self, kind: EpochKind, pages: &Pages) -> anyhow::Result<Duration> {
        let (raw, totals) = captured(pages);
        self.epoch += 1;
        let began = Instant::now();
        self.recoder.begin(Generation(1), EpochId(self.epoch), kind, CodecSet::ALL, 1.0);
        let mut ready = Vec::new();
        for frame in raw {
            self.recoder.frame(frame, &mut ready)?;
            for frame in ready.drain(..) {
                self.frames.send(Some(frame)).context("the link is gone")?;
            }
        }
        let (last, _) = self.recoder.finish(totals);
        for part in last.into_iter().map(Some).chain([None]) {
            self.frames.send(part).context("the link is gone")?;
        }
        self.answers.recv().context("no answer")?;
        Ok(began.elapsed())
    }

    fn plan(&self) -> u8 {
        let name = self.counters.lock().map(|counters| counters.plan).unwrap_or_default();
        (0..).zip(Plan::ALL).find(|(_, plan)| plan.name() == name).map_or(0, |(at, _)| at)
    }
}

/// Sends frames behind their lengths and tells how long the link took; an epoch ends with a length of 0.
fn send(mut socket: TcpStream, frames: &Receiver<Option<Bytes>>, link: &LinkMeter, done: &SyncSender<()>) {
    let (mut bytes, mut busy) = (0, Duration::ZERO);
    while let Ok(frame) = frames.recv() {
        let began = Instant::now();
        let body = frame.as_deref().unwrap_or_default();
        let head = u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes();
        if socket.write_all(&head).and_then(|()| socket.write_all(body)).is_err() {
            return;
        }
        bytes += body.len() as u64;
        if frame.is_none() {
            if socket.read_exact(&mut [0]).is_err() {
                return;
            }
            link.set(std::mem::take(&mut bytes), std::mem::take(&mut busy) + began.elapsed());
            if done.send(()).is_err() {
                return;
            }
        } else {
            busy += began.elapsed();
        }
    }
}

/// Applies what comes, and answers to each epoch.
fn backup(mut socket: TcpStream, layout: MemoryLayout) -> anyhow::Result<()> {
    let seed = Arc::new(Seed { layout: layout.clone(), domain_xml: String::new() });
    let mut image = Image::new(seed, &AnonymousMemory)?;
    let mut reader = FrameReader::new();
    let mut frame = Vec::new();
    loop {
        let mut head = [0; 4];
        socket.read_exact(&mut head)?;
        frame.resize(usize::try_from(u32::from_le_bytes(head))?, 0);
        if frame.is_empty() {
            socket.write_all(&[1])?;
            continue;
        }
        socket.read_exact(&mut frame)?;
        let body = Bytes::copy_from_slice(&frame);
        reader.read::<ProtocolError>(&body, &layout, |record| image.apply(&record))?;
    }
}

/// Two ends of a connection over loopback; with a limit there is a relay between them.
fn connection(limit: Option<f64>) -> anyhow::Result<(TcpStream, TcpStream)> {
    let pair = || -> std::io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let ours = TcpStream::connect(listener.local_addr()?)?;
        let (theirs, _) = listener.accept()?;
        ours.set_nodelay(true)?;
        theirs.set_nodelay(true)?;
        Ok((ours, theirs))
    };
    let (ours, theirs) = pair()?;
    let Some(rate) = limit else { return Ok((ours, theirs)) };
    if rate <= 0.0 {
        bail!("a link without any speed");
    }
    let (near, far) = (theirs, pair()?);
    let (mut from, mut to) = (near.try_clone()?, far.0.try_clone()?);
    std::thread::spawn(move || throttle(&mut from, &mut to, rate));
    // Answers are small.
    let (mut from, mut to) = (far.0, near);
    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    Ok((ours, far.1))
}
