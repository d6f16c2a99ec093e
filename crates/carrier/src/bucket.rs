//! Token buckets: the operator's limit and the emulated link.
//!
//! A sender takes the bytes before it writes them. The bucket may go into debt by one write and
//! the next taker waits it off, so the long-run rate is exact whatever the sizes of the writes.

use limosa_pages::{ByteCount, BytesPerSecond};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much unused time a bucket remembers: a burst of this length at full rate after a silence.
const BURST: Duration = Duration::from_millis(2);

/// Shapes what all streams of a migration send together.
#[derive(Debug)]
pub(crate) struct Bucket {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    rate: Option<BytesPerSecond>,
    /// When everything taken so far will have passed at the rate.
    free_at: Instant,
    /// Counts changes of the rate: who waits for an old rate need not go on waiting.
    changes: u64,
}

impl Bucket {
    /// A bucket of this rate; `None` lets everything pass.
    pub(crate) fn new(rate: Option<BytesPerSecond>) -> Self {
        let state = State {
            rate,
            free_at: Instant::now(),
            changes: 0,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Changes the rate for what is taken from now on, and lets everybody pass who waits.
    pub(crate) fn set_rate(&self, rate: Option<BytesPerSecond>) {
        self.lock().rate = rate;
        self.hurry();
    }

    /// Lets everybody pass who waits.
    pub(crate) fn hurry(&self) {
        let mut state = self.lock();
        state.free_at = Instant::now();
        state.changes += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until earlier bytes have passed, then takes `bytes`. Whether it had to wait.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        let mut state = self.lock();
        let wait = state.book(bytes, Instant::now());
        let begun = state.changes;
        if !wait.is_zero() {
            let waits = |state: &mut State| state.changes == begun;
            let waited = self.changed.wait_timeout_while(state, wait, waits);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        !wait.is_zero()
    }

    /// Waits until all that was taken so far has passed: the last write of a round must not be paid for by who
    /// comes after it.
    pub(crate) fn settle(&self) {
        self.take(0);
    }

    /// Takes `bytes` at once: they go before all that waits, which passes so much later.
    pub(crate) fn take_first(&self, bytes: u64) {
        self.lock().book(bytes, Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Books `bytes` at `now` and says how long their sender has to wait before it sends.
    fn book(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        // A rate of zero would stop the migration for good; the slowest link is a byte a second.
        let rate = BytesPerSecond::new(rate.get().max(1));
        let time = rate
            .time_for(ByteCount::new(bytes))
            .unwrap_or(Duration::ZERO);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let begins = self.free_at.max(earliest);
        self.free_at = begins + time;
        begins.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_long_run_rate_is_exact() {
        let bucket = Bucket::new(Some(BytesPerSecond::new(1_000_000)));
        let start = Instant::now();
        let mut now = start;
        for _ in 0..100 {
            now += bucket.lock().book(50_000, now);
        }
        let passed = now - start;
        // 99 writes have passed when the last begins.
        let expect = Duration::from_millis(99 * 50);
        assert!(
            passed.abs_diff(expect) < Duration::from_millis(1),
            "{passed:?}"
        );
    }

    #[test]
    fn what_was_taken_has_passed_when_it_is_settled() {
        let bucket = Bucket::new(Some(BytesPerSecond::new(1_000_000)));
        let begun = Instant::now();
        bucket.take(50_000);
        bucket.settle();
        // A burst is free.
        assert!(begun.elapsed() >= Duration::from_millis(50) - BURST);
    }

    #[test]
    fn no_rate_means_no_wait() {
        let bucket = Bucket::new(None);
        assert_eq!(bucket.lock().book(u64::MAX, Instant::now()), Duration::ZERO);
    }
}
