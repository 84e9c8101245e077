//! Somebody outside, who asks, hears answers, and remembers them.

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Client {
    /// What was asked last.
    pub(crate) asked: u64,
    /// The last request that was answered, and the guest's history in the answer.
    pub(crate) answered: (u64, u64),
    pub(crate) asked_at: u64,
    pub(crate) answered_at: u64,
    pub(crate) answers: u64,
}

impl Client {
    /// Takes an answer.
    ///
    /// # Errors
    /// What it contradicts.
    pub(crate) fn hear(&mut self, request: u64, history: u64, now: u64) -> Result<(), String> {
        let (known, was) = self.answered;
        if request == known && history != was {
            return Err(format!("request {request} was answered before, by a guest with another history"));
        }
        if request == self.asked && request == known + 1 {
            self.answered = (request, history);
            self.answered_at = now;
            self.answers += 1;
        }
        Ok(())
    }
}
