//! When the next operation is due.
//!
//! Operations are due at equal distances from a start. One that is late stays due, so the average
//! rate is exact; but a guest that was stopped for long does not work off the whole past at full
//! speed: what is late by more than [`LATE_MICROSECONDS_MAX`] is dropped.

use crate::ticks::TickRate;

/// How often operations happen, over all vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// So many a second, at least one.
    PerSecond(u64),
    /// As often as possible.
    Max,
}

/// Backlog that is still worked off. Long enough for a host that runs something else for a few
/// time slices, short enough that a stall is not followed by a storm.
pub const LATE_MICROSECONDS_MAX: u64 = 20_000;

/// Spaces operations in time.
#[derive(Clone, Debug)]
pub struct Limiter {
    /// Ticks between two operations, with 32 binary places; zero at the highest rate.
    interval: u128,
    /// When the next one is due, with 32 binary places.
    due: u128,
    late_max: u64,
}

impl Limiter {
    /// A limiter for one vCPU of `vcpus` that share a rate.
    #[must_use]
    pub fn new(rate: Rate, vcpus: u32, ticks: TickRate, now: u64) -> Self {
        let interval = match rate {
            Rate::Max => 0,
            Rate::PerSecond(count) => {
                (u128::from(ticks.per_second()) << 32) * u128::from(vcpus)
                    / u128::from(count.max(1))
            }
        };
        Self {
            interval,
            due: u128::from(now) << 32,
            late_max: ticks.from_microseconds(LATE_MICROSECONDS_MAX),
        }
    }

    /// Forgets the backlog: the next operation is due now.
    pub fn restart(&mut self, now: u64) {
        self.due = u128::from(now) << 32;
    }

    /// Takes the next operation if it is due.
    #[inline]
    pub fn take(&mut self, now: u64) -> bool {
        if self.interval == 0 {
            return true;
        }
        let due = (self.due >> 32) as u64;
        if due > now {
            self.mend(due, now);
            return false;
        }
        if now - due > self.late_max {
            self.restart(now - self.late_max);
        }
        self.due += self.interval;
        true
    }

    /// Nothing can be due later than after one interval, unless the clock went backwards.
    #[inline]
    fn mend(&mut self, due: u64, now: u64) {
        let interval = (self.interval >> 32) as u64;
        if due - now > interval.saturating_add(self.late_max) {
            self.restart(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKS: TickRate = TickRate::from_khz(2_600_123);

    fn check(rate: Rate, vcpus: u32, look_every: u64, expected: u64) {
        let start = 12_345_678_901;
        let mut limiter = Limiter::new(rate, vcpus, TICKS, start);
        let mut taken = 0;
        let mut now = start;
        while now < start + TICKS.per_second() {
            while limiter.take(now) {
                taken += 1;
            }
            now += look_every;
        }
        assert!(
            expected.abs_diff(taken) <= 1 + expected / 500,
            "{taken} operations of {expected}"
        );
    }

    #[test]
    fn the_average_is_exact() {
        check(Rate::PerSecond(50_000), 1, 1000, 50_000);
        check(Rate::PerSecond(50_000), 1, 2_600_123, 50_000);
        check(Rate::PerSecond(50_000), 2, 2_600_123, 25_000);
        check(Rate::PerSecond(3), 1, 100_000, 3);
        check(Rate::PerSecond(1_000_000), 3, 5000, 333_333);
    }

    #[test]
    fn the_highest_rate_is_always_due() {
        let mut limiter = Limiter::new(Rate::Max, 1, TICKS, 0);
        assert!((0..100).all(|_| limiter.take(0)));
    }

    #[test]
    fn a_clock_that_went_backwards_does_not_stop_the_work() {
        let mut limiter = Limiter::new(Rate::PerSecond(50_000), 1, TICKS, 1 << 50);
        assert!(limiter.take(1 << 50));
        assert!(!limiter.take(1000));
        assert!(limiter.take(1001));
    }

    #[test]
    fn a_long_stop_leaves_a_bounded_backlog() {
        let mut limiter = Limiter::new(Rate::PerSecond(50_000), 1, TICKS, 0);
        let now = 100 * TICKS.per_second();
        let backlog = core::iter::from_fn(|| limiter.take(now).then_some(())).count();
        assert!((1000..=1001).contains(&backlog), "{backlog}");
        limiter.restart(now);
        assert!(limiter.take(now));
        assert!(!limiter.take(now));
    }
}
