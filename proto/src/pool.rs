//! Threads that share out work on the pages of epochs: the thread that asks does a part itself and never waits for one that
//! has not begun with anything, as long as the pool has a thread free.

use std::sync::{Arc, Mutex, PoisonError};

/// The most threads that are used unless somebody asks for more: beyond, what is done in order is the limit.
const USUAL_MAX_THREADS: usize = 4;

/// Threads for all guests of an agent.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// `None`: whoever asks is the only thread.
    helpers: Option<Arc<rayon::ThreadPool>>,
}

impl Pool {
    /// No thread beside the one that asks.
    pub fn single() -> Self {
        Self::default()
    }

    /// So many threads, the one that asks among them.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn new(name: &'static str, threads: usize) -> Result<Self, String> {
        let helpers = match threads {
            0 | 1 => return Ok(Self::single()),
            more => more - 1,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(helpers)
            .thread_name(move |number| format!("{name}-{number}"))
            .build()
            .map_err(|error| format!("cannot start {helpers} threads: {error}"))?;
        Ok(Self { helpers: Some(Arc::new(pool)) })
    }

    /// Threads that an agent takes when it was not told how many: one CPU is left to the guests.
    pub fn usual_threads() -> usize {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        cpus.saturating_sub(1).clamp(1, USUAL_MAX_THREADS)
    }

    /// Threads that work at most for one who asks, it among them.
    pub fn threads(&self) -> usize {
        self.helpers.as_ref().map_or(1, |helpers| helpers.current_num_threads() + 1)
    }

    /// Has every piece worked on, by whichever thread comes to it first; returns when all are done. Each thread has one of
    /// `benches`, with what it needs and may keep; no more threads than there are of them, or pieces, take part.
    pub fn share<B: Send, P: Send>(
        &self,
        benches: &mut [B],
        pieces: impl ExactSizeIterator<Item = P> + Send,
        work: impl Fn(&mut B, P) + Sync,
    ) {
        self.share_beside(benches, pieces, work, || ());
    }

    /// [`Pool::share`] while this thread does something of its own first; gives what comes of that.
    pub fn share_beside<B: Send, P: Send, R>(
        &self,
        benches: &mut [B],
        pieces: impl ExactSizeIterator<Item = P> + Send,
        work: impl Fn(&mut B, P) + Sync,
        first: impl FnOnce() -> R,
    ) -> R {
        let count = pieces.len();
        let pieces = Mutex::new(pieces);
        let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = |bench: &mut B| {
            while let Some(piece) = next() {
                work(bench, piece);
            }
        };
        let Some((own, others)) = benches.split_first_mut() else { return first() };
        match &self.helpers {
            Some(helpers) if count > 1 => helpers.in_place_scope(|scope| {
                let most = helpers.current_num_threads().min(count - 1);
                for bench in others.iter_mut().take(most) {
                    scope.spawn(|_| work(bench));
                }
                let done = first();
                work(own);
                done
            }),
            _ => {
                let done = first();
                work(own);
                done
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_worked_on_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new("test", threads).unwrap();
            assert_eq!(pool.threads(), threads);
            let mut values = vec![0u32; 1001];
            let mut benches = vec![0usize; threads];
            pool.share(&mut benches, values.chunks_mut(10), |bench, chunk| {
                *bench += chunk.len();
                chunk.iter_mut().for_each(|value| *value += 1);
            });
            assert!(values.iter().all(|value| *value == 1));
            assert_eq!(benches.iter().sum::<usize>(), 1001);
        }
    }

    #[test]
    fn two_threads_work_at_once() {
        let pool = Pool::new("test", 2).unwrap();
        // Each waits for the other.
        let barrier = std::sync::Barrier::new(2);
        pool.share(&mut [(), ()], [(), ()].into_iter(), |(), ()| {
            barrier.wait();
        });
    }

    #[test]
    fn a_panic_comes_back_to_who_asked_and_the_pool_goes_on() {
        let pool = Pool::new("test", 2).unwrap();
        for _ in 0..3 {
            let fails = std::panic::AssertUnwindSafe(|| {
                pool.share(&mut [(), ()], 0..8, |(), number| assert_ne!(number, 5));
            });
            assert!(std::panic::catch_unwind(fails).is_err());
            pool.share(&mut [(), ()], 0..8, |(), number| assert_ne!(number, 8));
        }
    }
}
