//! Decides, from what a client has sent and heard, whether the guest ever took back what it had said. Pure: no clock, no
//! socket.
//!
//! Every rule compares an answer with what had been heard **before its question was asked**, so answers may overtake each
//! other, get lost or come twice without being taken for a violation:
//! - the same question gets the same answer for ever;
//! - the guest's stamp is above every stamp heard before the question;
//! - the guest has heard every question of this client that was answered before;
//! - it is the same start of the responder;
//! - no connection is broken.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use understudy_responder::wire::Answer;

/// Violations that are described; all are counted.
const DESCRIBED: usize = 20;

/// Questions that are remembered.
const REMEMBERED: usize = 1 << 16;

/// What was seen. Times are since the start of the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Observation {
    /// A question was asked, for the first time or again.
    Asked(u64),
    /// An answer came.
    Heard(Answer),
    /// A connection that had worked was reset or closed by the guest.
    Broken(String),
}

/// What must not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// A question got two different answers.
    Changed,
    /// The guest's stamp is not above one that was heard before.
    WentBack,
    /// A question that was answered is not known any more.
    Forgotten,
    /// The responder was started anew.
    Restarted,
    /// A connection was broken.
    Broken,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Violation {
    pub(crate) at_ms: u64,
    /// Protocol and address.
    pub(crate) path: String,
    pub(crate) kind: Kind,
    /// In words.
    pub(crate) text: String,
    /// The answers that contradict each other.
    #[serde(skip)]
    pub(crate) evidence: Vec<Answer>,
}

/// What it came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Verdict {
    /// Questions, each counted once.
    pub(crate) questions: u64,
    /// Answers, repeated ones as well, by protocol and address; 0 where all questions were in vain.
    pub(crate) answers: BTreeMap<String, u64>,
    /// Between two answers.
    pub(crate) longest_silence_ms: u64,
    pub(crate) violations_total: u64,
    /// The first of them.
    pub(crate) violations: Vec<Violation>,
}

/// What had been heard when a question was asked first, and what came of it.
#[derive(Debug)]
struct Question {
    stamp: u64,
    answered: u64,
    answer: Option<Answer>,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    questions: BTreeMap<u64, Question>,
    asked: u64,
    /// The answer with the highest stamp, and the highest number that was answered.
    highest: Option<Answer>,
    answered: u64,
    boot: Option<u64>,
    answers: BTreeMap<String, u64>,
    last: Option<Duration>,
    silence: Duration,
    violations_total: u64,
    violations: Vec<Violation>,
}

impl Judge {
    /// Takes what was seen on `path` at `at`; gives what is wrong with it, if that is new and to be described.
    pub(crate) fn see(&mut self, path: &str, observation: Observation, at: Duration) -> Option<&Violation> {
        let described = self.violations.len();
        match observation {
            Observation::Asked(number) => {
                self.answers.entry(path.to_owned()).or_default();
                self.asked(number);
            }
            Observation::Heard(answer) => {
                *self.answers.entry(path.to_owned()).or_default() += 1;
                self.silence = self.silence.max(at.saturating_sub(self.last.unwrap_or(at)));
                self.last = Some(at);
                self.heard(path, answer, at);
            }
            Observation::Broken(reason) => {
                self.object(path, at, Kind::Broken, format!("the connection was broken: {reason}"), vec![]);
            }
        }
        self.violations.get(described)
    }

    fn stamp(&self) -> u64 {
        self.highest.as_ref().map_or(0, |answer| answer.stamp)
    }

    fn asked(&mut self, number: u64) {
        let (stamp, answered) = (self.stamp(), self.answered);
        let asked = &mut self.asked;
        self.questions.entry(number).or_insert_with(|| {
            *asked += 1;
            Question { stamp, answered, answer: None }
        });
        if self.questions.len() > REMEMBERED {
            self.questions.pop_first();
        }
    }

    fn heard(&mut self, path: &str, answer: Answer, at: Duration) {
        let number = answer.request.number;
        let boot = *self.boot.get_or_insert(answer.boot);
        if boot != answer.boot {
            let text =
                format!("the responder was started anew: {boot:016x} before, {:016x} now", answer.boot);
            self.object(path, at, Kind::Restarted, text, vec![answer.clone()]);
        }
        // Too old, or none of ours.
        let Some(question) = self.questions.get_mut(&number) else { return };
        let objection = match &question.answer {
            Some(before) if *before != answer => Some((
                Kind::Changed,
                format!(
                    "question {number} was answered with stamp {}, and again with {}",
                    before.stamp, answer.stamp
                ),
            )),
            Some(_) => None,
            None if answer.stamp <= question.stamp => Some((
                Kind::WentBack,
                format!(
                    "question {number} has stamp {}, {} was heard before it was asked",
                    answer.stamp, question.stamp
                ),
            )),
            None if answer.heard < question.answered => Some((
                Kind::Forgotten,
                format!(
                    "at question {number} the guest knew of {}, it had answered {} before",
                    answer.heard, question.answered
                ),
            )),
            None => None,
        };
        self.answered = self.answered.max(number);
        let before = question.answer.clone().filter(|before| *before != answer);
        question.answer.get_or_insert_with(|| answer.clone());
        if let Some((kind, text)) = objection {
            let evidence =
                before.or_else(|| self.highest.clone()).into_iter().chain([answer.clone()]).collect();
            self.object(path, at, kind, text, evidence);
        }
        if answer.stamp > self.stamp() {
            self.highest = Some(answer);
        }
    }

    fn object(&mut self, path: &str, at: Duration, kind: Kind, text: String, evidence: Vec<Answer>) {
        self.violations_total += 1;
        if self.violations.len() < DESCRIBED {
            let at_ms = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
            self.violations.push(Violation { at_ms, path: path.to_owned(), kind, text, evidence });
        }
    }

    /// At `at`, when nothing more is awaited.
    pub(crate) fn verdict(&self, at: Duration) -> Verdict {
        let silence = self.silence.max(at.saturating_sub(self.last.unwrap_or_default()));
        Verdict {
            questions: self.asked,
            answers: self.answers.clone(),
            longest_silence_ms: u64::try_from(silence.as_millis()).unwrap_or(u64::MAX),
            violations_total: self.violations_total,
            violations: self.violations.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_responder::memory::Memory;
    use understudy_responder::wire::Request;

    const PATH: &str = "udp guest";

    /// A client of a guest that is a value: it can be copied, and so put back to what it was.
    struct World {
        judge: Judge,
        guest: Memory,
    }

    impl World {
        fn new() -> Self {
            Self { judge: Judge::default(), guest: Memory::new(1) }
        }

        fn see(&mut self, observation: Observation) {
            self.judge.see(PATH, observation, Duration::ZERO);
        }

        fn ask(&mut self, number: u64) -> Answer {
            self.see(Observation::Asked(number));
            self.guest.answer(Request { client: 1, number })
        }

        /// Asks, and hears the answer.
        fn talk(&mut self, numbers: std::ops::Range<u64>) {
            for number in numbers {
                let answer = self.ask(number);
                self.see(Observation::Heard(answer));
            }
        }

        fn kinds(&self) -> Vec<Kind> {
            self.judge.verdict(Duration::ZERO).violations.iter().map(|violation| violation.kind).collect()
        }
    }

    /// The guest as it was after so many questions: what a failover brings back.
    fn guest_after(numbers: std::ops::Range<u64>) -> Memory {
        let mut guest = Memory::new(1);
        for number in numbers {
            guest.answer(Request { client: 1, number });
        }
        guest
    }

    #[test]
    fn answers_that_are_lost_late_or_repeated_are_no_violation() {
        let mut world = World::new();
        world.talk(1..10);
        let (late, later) = (world.ask(10), world.ask(11));
        world.see(Observation::Heard(later.clone()));
        world.see(Observation::Heard(late));
        world.see(Observation::Heard(later));
        world.ask(12);
        world.talk(13..20);
        world.talk(12..13);
        assert_eq!(world.kinds(), []);
        let verdict = world.judge.verdict(Duration::from_millis(70));
        assert_eq!((verdict.questions, verdict.longest_silence_ms), (19, 70));
    }

    #[test]
    fn a_failover_that_keeps_what_was_heard_is_no_violation() {
        let mut world = World::new();
        world.talk(1..50);
        // What nobody heard may be lost.
        world.ask(50);
        world.ask(51);
        world.guest = guest_after(1..50);
        world.talk(50..100);
        assert_eq!(world.kinds(), []);
    }

    #[test]
    fn a_guest_that_goes_back_is_noticed_by_every_rule() {
        // Asked again, what was answered gets another answer.
        let mut world = World::new();
        world.talk(1..50);
        world.guest = guest_after(1..40);
        world.talk(49..50);
        assert_eq!(world.kinds(), [Kind::Changed]);
        // A new question shows the old stamp.
        let mut world = World::new();
        world.talk(1..50);
        world.guest = guest_after(1..40);
        world.talk(50..51);
        assert_eq!(world.kinds(), [Kind::WentBack]);
        // Another client has brought the stamp up meanwhile: the guest has still forgotten this one.
        let mut world = World::new();
        world.talk(1..50);
        world.guest = guest_after(1..40);
        for number in 0..100 {
            world.guest.answer(Request { client: 2, number });
        }
        world.talk(50..51);
        assert_eq!(world.kinds(), [Kind::Forgotten]);
    }

    #[test]
    fn a_new_start_and_a_broken_connection_are_noticed() {
        let mut world = World::new();
        world.talk(1..5);
        world.see(Observation::Broken("reset".to_owned()));
        world.guest = Memory::new(2);
        world.talk(5..6);
        assert_eq!(world.kinds(), [Kind::Broken, Kind::Restarted, Kind::WentBack]);
        for _ in 0..1000 {
            world.see(Observation::Broken("reset".to_owned()));
        }
        let verdict = world.judge.verdict(Duration::ZERO);
        assert_eq!((verdict.violations_total, verdict.violations.len()), (1003, DESCRIBED));
    }
}
