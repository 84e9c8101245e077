//! What the governor makes of an epoch that was.

use super::link::is_unusual;
use super::plan::{Plan, Seen, USUAL, USUAL_EXTRA, USUAL_KNOWN};
use super::{DRIFT, Governor, KNOWN_EXTRA, MAX_JUMP, PROBE_WEIGHT, WARM_UP, WEIGHT, average};

impl Governor {
    /// Takes in an epoch as it was.
    pub(super) fn learn(&mut self, seen: &Seen) {
        let encoded = seen.encoded() as f64;
        let pages = seen.encoded() + seen.rest.pages;
        // In a part of an epoch not all pages of zeros are counted.
        let is_whole = seen.rest.pages == 0;
        if pages > 0 {
            self.last_pages = pages;
        }
        if pages > 0 || seen.zeros.pages > 0 {
            average(&mut self.pages, pages as f64);
            let zeros = if is_whole { seen.zeros.pages as f64 } else { self.zeros };
            average(&mut self.zeros, zeros);
        }
        let active = self.active();
        if active.uses_cache() && !seen.plan.uses_cache() {
            // A full copy has emptied the cache.
            self.warm_up = WARM_UP;
        }
        average(&mut self.spare_cpus, seen.spare_cpus);
        // Raw says nothing of it.
        let threads = if seen.plan == Plan::Raw { self.spare_cpus } else { seen.threads };
        let least = if seen.plan == Plan::Raw { 1.0 } else { 1.0 / MAX_JUMP };
        average(&mut self.threads, threads.clamp(least, self.max_threads));
        if let Some((bytes, time)) = seen.transfer {
            self.learn_transfer(seen, bytes as f64, time.as_secs_f64());
        }
        let used = seen.plan as usize;
        for (class, work) in [seen.known, seen.fresh, seen.zeros].iter().enumerate() {
            if work.pages == 0 {
                continue;
            }
            let cost = &mut self.costs[used][class];
            let nanos = work.time.as_nanos() as f64 / work.pages as f64;
            let most = cost.nanos * MAX_JUMP;
            average(&mut cost.nanos, nanos.min(most));
            // What is usual gives way to the first epochs at once: sizes have no hiccups, and a plan that does not pay is left
            // after a few.
            let mut weight = WEIGHT;
            if seen.plan == active {
                self.tried[class] = self.tried[class].saturating_add(1);
                weight = weight.max(1.0 / f64::from(self.tried[class]));
            }
            cost.bytes += (work.bytes as f64 / work.pages as f64 - cost.bytes) * weight;
        }
        if seen.plan.uses_cache() && encoded > 0.0 {
            if self.warm_up > 0 {
                self.warm_up -= 1;
            } else {
                average(&mut self.known_share, seen.known.pages as f64 / encoded);
            }
        }
        if !seen.plan.uses_cache() {
            self.known_share += (USUAL_KNOWN - self.known_share) * DRIFT;
        }
        for plan in Plan::ALL.into_iter().filter(|plan| *plan != seen.plan) {
            let extra = &mut self.extra[plan as usize];
            *extra += (USUAL_EXTRA[plan as usize] - *extra) * DRIFT;
            for (usual, cost) in USUAL[plan as usize].iter().zip(&mut self.costs[plan as usize]) {
                cost.nanos += (usual.nanos - cost.nanos) * DRIFT;
                cost.bytes += (usual.bytes - cost.bytes) * DRIFT;
            }
        }
    }

    /// An epoch's way to the backup and back.
    fn learn_transfer(&mut self, seen: &Seen, bytes: f64, seconds: f64) {
        let encoded = seen.encoded();
        let is_probe = self.probes > 0 && seen.plan == self.plan && encoded == 0 && seen.rest.pages > 0;
        let plan = if is_probe { Plan::Raw } else { seen.plan };
        if plan == Plan::Raw {
            self.link.learn(bytes, seconds, is_probe);
        }
        let pages = if is_probe { seen.rest.pages } else { encoded + seen.zeros.pages } as f64;
        let whole = seen.whole.filter(|_| pages > 0.0 && (is_probe || seen.rest.pages == 0));
        // Else a full copy, or a trial: too little was encoded to tell it from the rest.
        let Some(whole) = whole.map(|whole| whole.as_secs_f64()) else { return };
        let work = [seen.known, seen.fresh, seen.zeros];
        let encode = match plan {
            Plan::Raw => pages * USUAL[Plan::Raw as usize][1].nanos / 1e9,
            _ => work.iter().map(|work| work.time.as_secs_f64()).sum(),
        };
        let expected = self.expected(plan, encode, bytes);
        let extra = &mut self.extra[plan as usize];
        if is_probe {
            self.probes -= 1;
            // The link may be another now, and the plan take another time.
            self.extra_known = 0;
            let most = expected * MAX_JUMP;
            *extra += ((whole.min(most) - expected) / pages - *extra) * PROBE_WEIGHT;
            return;
        }
        let known = self.extra_known >= KNOWN_EXTRA;
        if known && is_unusual(whole, (expected + *extra * pages).max(0.0)) {
            // One is a hiccup. With the next, the link or something else is another.
            if std::mem::replace(&mut self.was_unusual, true) {
                (self.probes, self.extra_known) = (u32::from(self.plan != Plan::Raw), 0);
            }
            return;
        }
        self.was_unusual = false;
        self.extra_known = self.extra_known.saturating_add(1);
        let weight = WEIGHT.max(1.0 / f64::from(self.extra_known));
        *extra += ((whole - expected) / pages - *extra) * weight;
        if plan != Plan::Raw {
            self.link.at_most(bytes, seconds);
        }
    }
}
