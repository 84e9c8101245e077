//! When a guest that runs alone is to be protected again, and by whom. Pure.

use std::time::{Duration, Instant};

/// Before the first attempt: the host that has just lost the guest has to put itself in order.
const FIRST: Duration = Duration::from_secs(2);

/// The longest wait between two attempts.
const LONGEST: Duration = Duration::from_secs(15);

/// See the module's description.
#[derive(Debug)]
pub(super) struct Renewal {
    spares: Vec<String>,
    /// How many there were when one was asked last.
    asked: usize,
    /// `None`: nothing is to be renewed.
    at: Option<Instant>,
    attempts: u32,
    under_way: bool,
    said: String,
}

impl Renewal {
    /// By one of `spares`, the first that can.
    pub(super) fn new(spares: Vec<String>) -> Self {
        Self { spares, asked: 0, at: None, attempts: 0, under_way: false, said: String::new() }
    }

    /// The guest runs alone; gives the host to ask now: one of its own spares, if it has some.
    pub(super) fn next(&mut self, own: &[String], now: Instant) -> Option<String> {
        let at = *self.at.get_or_insert(now + FIRST);
        let spares = if own.is_empty() { self.spares.as_slice() } else { own };
        // Without any of the watchdog's it is to be left alone, unless it says otherwise itself.
        if self.under_way || now < at || spares.is_empty() {
            return None;
        }
        self.under_way = true;
        self.asked = spares.len();
        let number = usize::try_from(self.attempts).unwrap_or_default() % spares.len();
        spares.get(number).cloned()
    }

    /// There is nothing to renew.
    pub(super) fn rest(&mut self, now: Instant) {
        if !self.under_way {
            (self.at, self.attempts) = (None, 0);
        } else if let Some(at) = &mut self.at {
            *at = (*at).max(now);
        }
    }

    /// The attempt is over. Every host is asked before the wait becomes longer.
    pub(super) fn ended(&mut self, done: bool, now: Instant) {
        self.under_way = false;
        self.attempts = if done { 0 } else { self.attempts.saturating_add(1) };
        let rounds = self.attempts / u32::try_from(self.asked.max(1)).unwrap_or(u32::MAX);
        self.at = Some(now + FIRST.saturating_mul(1 << rounds.min(8)).min(LONGEST));
    }

    /// Whether that was not said before.
    pub(super) fn is_news(&mut self, reason: &str) -> bool {
        let news = self.said != reason;
        reason.clone_into(&mut self.said);
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spare_is_asked_in_turn_and_never_two_at_once() {
        let mut renewal = Renewal::new(vec!["a".into(), "b".into()]);
        let mut now = Instant::now();
        let mut asked = Vec::new();
        assert_eq!(renewal.next(&[], now), None, "the other host is given a moment");
        let mut waits = Vec::new();
        for _ in 0..6 {
            let since = now;
            while asked.len() == waits.len() {
                now += Duration::from_millis(100);
                asked.extend(renewal.next(&[], now));
            }
            assert_eq!(renewal.next(&[], now + LONGEST), None);
            waits.push((now - since).as_secs());
            renewal.ended(false, now);
        }
        assert_eq!(asked, ["a", "b", "a", "b", "a", "b"]);
        assert_eq!(waits, [2, 2, 4, 4, 8, 8]);
        // A success, or no need, begins anew.
        renewal.rest(now);
        assert_eq!(renewal.next(&[], now), None);
        assert_eq!(renewal.next(&[], now + FIRST).as_deref(), Some("a"));
    }

    #[test]
    fn the_spares_of_the_guest_itself_are_asked_instead() {
        let (own, now) = (["c".to_owned()], Instant::now());
        let mut renewal = Renewal::new(vec!["a".into(), "b".into()]);
        assert_eq!(renewal.next(&own, now), None);
        for n in 1..4 {
            assert_eq!(renewal.next(&own, now + LONGEST * n).as_deref(), Some("c"));
            renewal.ended(false, now + LONGEST * n - FIRST * 8);
        }
        let mut none = Renewal::new(vec![]);
        assert_eq!(none.next(&own, now), None);
        assert_eq!(none.next(&own, now + FIRST).as_deref(), Some("c"));
    }

    #[test]
    fn without_spares_nobody_is_asked() {
        let mut renewal = Renewal::new(vec![]);
        let now = Instant::now();
        assert_eq!((renewal.next(&[], now), renewal.next(&[], now + LONGEST)), (None, None));
    }
}
