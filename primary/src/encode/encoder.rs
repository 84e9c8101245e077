//! What the owner of a guest holds of its encoding.

use std::sync::{Arc, PoisonError};

use understudy_proto::codec::CodecSet;
use understudy_proto::negotiate::Agreement;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::EncodingReport;

use super::governor::{Governor, Plan};
use super::thread::EncodeThread;
use super::{Compress, LinkMeter, SharedCounters};

/// How the pages of a guest are encoded.
#[derive(Debug, Clone, Default)]
pub struct Encoding {
    /// Whether at all.
    pub compress: Compress,
    /// Bytes the page cache may take.
    pub cache_bytes: usize,
    /// Threads that the guest's own may have to help it.
    pub pool: Pool,
}

/// The encoding of one guest.
#[derive(Debug)]
pub struct Encoder {
    compress: Compress,
    /// `None` if pages are not to be encoded.
    thread: Option<EncodeThread>,
    /// What the backup of the last stream can decode.
    codecs: CodecSet,
    counters: SharedCounters,
    threads: usize,
}

impl Encoder {
    /// Starts it for a guest of that name.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(name: &str, encoding: Encoding, link: Arc<LinkMeter>) -> Result<Self, String> {
        let counters = SharedCounters::default();
        let governor = match encoding.compress {
            Compress::Off => None,
            Compress::Auto => Some(Governor::new()),
            Compress::Always => Some(Governor::fixed(Plan::DeltaBatch)),
        };
        let threads = encoding.pool.threads();
        let thread = governor.map(|governor| {
            let counters = SharedCounters::clone(&counters);
            EncodeThread::spawn(name, governor, encoding.cache_bytes, link, counters, encoding.pool)
        });
        let thread = thread.transpose().map_err(|error| format!("cannot start a thread: {error}"))?;
        Ok(Self { compress: encoding.compress, thread, codecs: CodecSet::NONE, counters, threads })
    }

    /// A stream was accepted: from the next epoch on only what it has agreed on is used. Whatever was encoded for another
    /// life of the backup is not sent to this one: the engine begins with a full copy.
    pub fn agreed(&mut self, agreement: &Agreement) {
        self.codecs = CodecSet::agreed(agreement);
    }

    /// The thread and the codecs for the next epoch; `None` if it goes as it is.
    pub(crate) fn for_epoch(&self) -> Option<(&EncodeThread, CodecSet)> {
        self.thread.as_ref().filter(|_| self.codecs != CodecSet::NONE).map(|thread| (thread, self.codecs))
    }

    /// For the status.
    pub fn report(&self) -> EncodingReport {
        let counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let threads = u32::try_from(self.threads).unwrap_or(u32::MAX);
        let report = EncodingReport { threads, ..counters.report(self.compress) };
        let why = match &self.thread {
            None => "--compress off",
            Some(_) if self.codecs == CodecSet::NONE => "the backup has none of the codecs of this agent",
            Some(_) => return report,
        };
        EncodingReport { plan: Plan::Raw.name().to_owned(), reason: why.to_owned(), ..report }
    }
}

#[cfg(test)]
mod tests {
    use understudy_proto::negotiate::{FEATURE_LONG_BATCHES, FEATURE_LZ4, FEATURE_XBZRLE, Offer, select};

    use super::*;

    /// What is used with a backup that offers these features.
    fn with(theirs: &[&str]) -> CodecSet {
        let theirs: Vec<_> = theirs.iter().map(|name| (*name).to_owned()).collect();
        let agreement = select(&Offer::ours(), &Offer::new(vec![1], theirs).unwrap()).unwrap();
        let encoding = Encoding { compress: Compress::Auto, ..Encoding::default() };
        let mut encoder = Encoder::start("test", encoding, Arc::default()).unwrap();
        encoder.agreed(&agreement);
        assert_eq!(encoder.for_epoch().is_some(), encoder.codecs != CodecSet::NONE);
        encoder.codecs
    }

    #[test]
    fn only_what_the_backup_can_decode_is_used() {
        let both = CodecSet { long_batches: false, ..CodecSet::ALL };
        assert_eq!(with(&[]), CodecSet::NONE);
        assert_eq!(with(&["codec/zstd", "codec/xbzrle2", "codec", ""]), CodecSet::NONE);
        assert_eq!(with(&[FEATURE_XBZRLE, "codec/zstd"]), CodecSet { lz4: false, ..both });
        assert_eq!(with(&[FEATURE_LZ4]), CodecSet { xbzrle: false, ..both });
        assert_eq!(with(&[FEATURE_LZ4, FEATURE_XBZRLE]), both);
        assert_eq!(with(&[FEATURE_XBZRLE, FEATURE_LONG_BATCHES]), CodecSet { lz4: false, ..both });
        assert_eq!(with(&[FEATURE_LZ4, FEATURE_LONG_BATCHES, FEATURE_XBZRLE]), CodecSet::ALL);
    }

    #[test]
    fn the_status_says_why_nothing_is_encoded() {
        let off = Encoding { compress: Compress::Off, ..Encoding::default() };
        let encoder = Encoder::start("test", off.clone(), Arc::default()).unwrap();
        assert!(encoder.for_epoch().is_none());
        let report = encoder.report();
        assert_eq!((&*report.mode, &*report.plan, &*report.reason), ("off", "raw", "--compress off"));
        let auto = Encoding { compress: Compress::Auto, ..off };
        let encoder = Encoder::start("test", auto, Arc::default()).unwrap();
        assert!(encoder.report().reason.contains("none of the codecs"), "{:?}", encoder.report());
    }
}
