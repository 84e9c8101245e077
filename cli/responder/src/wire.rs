//! What the client of `understudy verify` and the responder in the guest say to each other: one line each way, the same in
//! a UDP datagram, on a TCP connection and in a frame.

/// Begins every line; changes with the protocol.
const MAGIC: &str = "us1";

/// Bytes of the longest line.
pub const MAX_BYTES: usize = 256;

/// A question. Asked again, it has the same number and must get the same answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub client: u64,
    /// Which question of this client it is; larger than that of every question it has asked before.
    pub number: u64,
}

/// What the guest says, from its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What was asked.
    pub request: Request,
    /// Number of this answer among all that this guest has ever given.
    pub stamp: u64,
    /// Largest number that this client had asked before.
    pub heard: u64,
    /// Which start of the responder it is.
    pub boot: u64,
}

impl Request {
    /// With its line feed.
    pub fn line(self) -> String {
        format!("{MAGIC} {:016x} {}\n", self.client, self.number)
    }

    /// `None` if it is none.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some(MAGIC) {
            return None;
        }
        let client = u64::from_str_radix(words.next()?, 16).ok()?;
        let number = words.next()?.parse().ok()?;
        words.next().is_none().then_some(Self { client, number })
    }
}

impl Answer {
    /// With its line feed.
    pub fn line(&self) -> String {
        let Self { request, stamp, heard, boot } = self;
        format!("{MAGIC} {:016x} {} {stamp} {heard} {boot:016x}\n", request.client, request.number)
    }

    /// `None` if it is none.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some(MAGIC) {
            return None;
        }
        let client = u64::from_str_radix(words.next()?, 16).ok()?;
        let mut number = || words.next()?.parse::<u64>().ok();
        let (number, stamp, heard) = (number()?, number()?, number()?);
        let boot = u64::from_str_radix(words.next()?, 16).ok()?;
        let request = Request { client, number };
        words.next().is_none().then_some(Self { request, stamp, heard, boot })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written_and_nothing_else_is() {
        let request = Request { client: 0xfeed, number: 7 };
        let answer = Answer { request, stamp: 9, heard: 6, boot: u64::MAX };
        assert_eq!(Request::parse(&request.line()), Some(request));
        assert_eq!(Answer::parse(&answer.line()), Some(answer.clone()));
        assert!(answer.line().len() <= MAX_BYTES);
        for line in ["", "us1", "us2 1 2", "us1 x 2", "us1 1 2 3", "us1 1 -2", &answer.line()] {
            assert_eq!(Request::parse(line), None, "{line:?}");
        }
        assert_eq!(Answer::parse(&request.line()), None);
    }
}
