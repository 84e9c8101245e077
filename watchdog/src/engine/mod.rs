//! What the supervisor decides, without clock, socket or file.
//!
//! The agent is **dead** when its sign of life says so, never because it is slow. From then on every guest of its list
//! whose QEMU is in COLO is told `x-colo-lost-heartbeat`. That starts one that is stopped, and it ends the checkpoints of
//! one that still runs: the word that stops it may be on its way already. `cont` is said only where QEMU has left COLO (or
//! ended the full copy as an ordinary migration) without starting the guest.
//!
//! A **living** agent that holds a guest in one and the same stop for longer than `hung_after` is treated for that guest as
//! if it had died. It may go on later: it then finds its stream at an end, cannot finish the epoch, and begins anew.
//!
//! A guest that anything else has stopped, an operator, a disk error, a panic, its own shutdown, is never touched:
//! lost-heartbeat would start it. Nor is any guest while no sign of life was ever seen, or one that is not on the agent's
//! list. When another agent lives, what was begun is left to it, as it frees guests first of all. Both at once do no
//! harm: QEMU refuses the second order.

mod event;
mod watch;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use understudy_proto::ids::GuestId;
use understudy_proto::protected::ProtectedGuest;

pub use event::{About, Cause, Command, Depth, Event, Facts, Order, Report, Seen, Trouble};

use crate::life::Life;
use watch::Watch;

/// See the module's description.
#[derive(Debug)]
pub struct Engine {
    hung_after: Duration,
    life: Life,
    guests: BTreeMap<GuestId, Watch>,
}

impl Engine {
    /// Knows of no agent and no guest yet.
    pub fn new(hung_after: Duration) -> Self {
        Self { hung_after, life: Life::Unknown, guests: BTreeMap::new() }
    }

    /// Takes an event and says what is to be done, in this order.
    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::Life(life) => self.life(life, now, &mut commands),
            Event::Record(list) => self.record(list, now, &mut commands),
            Event::Seen(guest, seen) => {
                if let Some(watch) = self.guests.get_mut(&guest) {
                    watch.seen(seen, self.life, self.hung_after, now, &mut commands);
                }
            }
            Event::Done(guest, done) => {
                if let Some(watch) = self.guests.get_mut(&guest) {
                    watch.done(done, now, &mut commands);
                }
            }
            Event::Tick => {}
        }
        for watch in self.guests.values_mut() {
            watch.due(self.life, now, &mut commands);
        }
        commands
    }

    /// When to send [`Event::Tick`] if nothing else happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.guests.values().filter_map(|watch| watch.deadline(self.life)).min()
    }

    fn life(&mut self, life: Life, now: Instant, commands: &mut Vec<Command>) {
        if life == self.life {
            return;
        }
        self.life = life;
        commands.push(Command::Report(Report::Agent { life, guests: self.guests.len() }));
        for watch in self.guests.values_mut() {
            watch.life(life, now, commands);
        }
    }

    fn record(&mut self, list: Vec<ProtectedGuest>, now: Instant, commands: &mut Vec<Command>) {
        let mut old = std::mem::take(&mut self.guests);
        for guest in list {
            let watch = match old.remove(&guest.guest) {
                Some(mut watch) => {
                    watch.name = guest.name;
                    watch
                }
                None => Watch::new(guest, self.life, now),
            };
            self.guests.insert(watch.guest, watch);
        }
        commands.extend(old.into_keys().map(Command::Forget));
    }
}

#[cfg(test)]
mod tests;
