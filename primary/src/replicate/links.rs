//! What the replicator does about its connections: it measures, asks the policy, and opens and closes lanes.

use std::sync::atomic::Ordering;

use tokio::time::Instant;
use tracing::{debug, info};

use super::Replicator;
use super::lanes::{self, Happened};
use super::policy::{Command, Event, Sample};

impl Replicator {
    /// The link has done a part of its work.
    pub(super) fn measured(&mut self, sample: Option<Sample>) {
        let agreed = self.live.as_ref().is_some_and(|live| live.lane_key.is_some());
        if let Some(sample) = sample.filter(|_| agreed) {
            self.decide(Event::Sample(sample));
        }
    }

    /// The stream is gone, and its lanes with it.
    pub(super) fn lanes_gone(&mut self) {
        self.connections.store(0, Ordering::Relaxed);
        self.decide(Event::Ended);
    }

    pub(super) async fn lane(&mut self, happened: Happened) {
        let Some(live) = &mut self.live else { return };
        match happened {
            Happened::Opened(opened) => {
                live.ends.opening = None;
                match opened {
                    Ok((lane, end)) => {
                        live.ends.add(&lane, end);
                        live.outbound.add(lane);
                        self.decide(Event::Opened);
                    }
                    Err(reason) => self.decide(Event::Failed(reason)),
                }
            }
            Happened::Ended(lane, why) => {
                let why = format!("lane {lane} has ended: {why}");
                if live.outbound.ended(lane) {
                    self.decide(Event::Broken(why));
                } else {
                    // Frames are lost with it, and nobody knows which.
                    self.lost(why).await;
                }
            }
        }
    }

    fn decide(&mut self, event: Event) {
        let Some((command, why)) = self.policy.step(event, Instant::now()) else { return };
        let Some(live) = &mut self.live else { return };
        match command {
            Command::Open => {
                let Some((key, id)) = live.lane_key.zip(live.outbound.free_id()) else { return };
                debug!(lane = id, why, "opening a further connection");
                live.ends.opening = Some(lanes::open(self.host.clone(), self.security.clone(), key, id));
            }
            Command::Use(lanes) => {
                live.outbound.use_lanes(lanes);
                live.ends.retain(&live.outbound);
                let connections = live.outbound.count();
                self.connections.store(connections, Ordering::Relaxed);
                info!(connections, why, "connections to the backup");
            }
        }
    }
}
