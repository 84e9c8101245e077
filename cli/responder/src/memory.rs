//! What the guest remembers of its answers. What it forgets was lost.

use std::collections::{BTreeMap, VecDeque};

use crate::wire::{Answer, Request};

/// Answers that are remembered for each client, to be given again.
const REMEMBERED: usize = 4096;

/// Clients that are remembered; the one with the lowest name goes first.
const CLIENTS: usize = 64;

/// Everything that was ever said.
#[derive(Debug, Default)]
pub struct Memory {
    boot: u64,
    stamp: u64,
    clients: BTreeMap<u64, Client>,
}

#[derive(Debug, Default)]
struct Client {
    heard: u64,
    answers: VecDeque<Answer>,
}

impl Memory {
    /// Of a responder that starts, known by `boot`.
    pub fn new(boot: u64) -> Self {
        Self { boot, ..Self::default() }
    }

    /// The same answer for the same question.
    pub fn answer(&mut self, request: Request) -> Answer {
        if !self.clients.contains_key(&request.client) && self.clients.len() >= CLIENTS {
            self.clients.pop_first();
        }
        let client = self.clients.entry(request.client).or_default();
        // Only what is not above all that was asked can have been asked.
        if request.number <= client.heard
            && let Some(answer) = client.answers.iter().rev().find(|answer| answer.request == request)
        {
            return answer.clone();
        }
        self.stamp += 1;
        let answer = Answer { request, stamp: self.stamp, heard: client.heard, boot: self.boot };
        client.heard = client.heard.max(request.number);
        client.answers.push_back(answer.clone());
        if client.answers.len() > REMEMBERED {
            client.answers.pop_front();
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_that_is_asked_again_gets_the_same_answer() {
        let mut memory = Memory::new(1);
        let ask = |client, number| Request { client, number };
        let first = memory.answer(ask(1, 5));
        assert_eq!((first.stamp, first.heard), (1, 0));
        assert_eq!(memory.answer(ask(2, 9)).stamp, 2);
        let next = memory.answer(ask(1, 6));
        assert_eq!((next.stamp, next.heard), (3, 5));
        assert_eq!(memory.answer(ask(1, 5)), first);
        for client in 100..300 {
            memory.answer(ask(client, 1));
        }
        assert!(memory.clients.len() <= CLIENTS);
        for number in 0..10_000 {
            memory.answer(ask(299, number));
        }
        assert!(memory.clients[&299].answers.len() <= REMEMBERED);
    }
}
