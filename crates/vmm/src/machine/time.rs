//! The guest's clocks across a move: they go on by exactly the time that passed.
//!
//! Host counter and monotonic clock are read together, once for the whole machine. From that pair,
//! the counter at any other moment follows by arithmetic, so no time between system calls gets into
//! the result, and all vCPUs keep the differences that they had.
//!
//! KVM's own clock is read and set by calls that take time, and now and then another process has the processor in
//! between. What a guest loses or wins by that it would lose at each move, so it is read between two looks at the
//! host's clock, and looked at after it was set.

use limosa_os::kvm::{KvmError, Vm};
use std::convert::Infallible;

/// A reading of the host's time stamp counter and of its monotonic clock at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClockPair {
    pub(super) nanos: u64,
    pub(super) tsc: u64,
}

impl ClockPair {
    /// Reads both.
    pub(super) fn sample() -> Self {
        let read = || Ok::<_, Infallible>(limosa_os::monotonic_nanos());
        let Ok((tsc, nanos)) = closest(limosa_os::tsc, read);
        Self { nanos, tsc }
    }

    /// The host's counter when its clock shows or showed `nanos`.
    pub(super) fn tsc_at(self, nanos: u64, khz: u32) -> u64 {
        self.tsc
            .wrapping_add_signed(ticks(i128::from(nanos) - i128::from(self.nanos), khz))
    }
}

/// A clock that is read and set by calls that take time.
pub(super) trait DistantClock {
    /// Why a call fails.
    type Error;

    /// What the host's monotonic clock shows.
    fn host_nanos(&self) -> u64;

    /// What this one shows, at some moment within the call.
    fn read(&self) -> Result<u64, Self::Error>;

    /// Has it show that, from some moment within the call on.
    fn set(&self, nanos: u64) -> Result<(), Self::Error>;
}

impl DistantClock for Vm {
    type Error = KvmError;

    fn host_nanos(&self) -> u64 {
        limosa_os::monotonic_nanos()
    }

    fn read(&self) -> Result<u64, KvmError> {
        self.clock_nanos()
    }

    fn set(&self, nanos: u64) -> Result<(), KvmError> {
        self.set_clock_nanos(nanos)
    }
}

/// What a distant clock shows when the host's clock shows `at`.
pub(super) fn shown_at<C: DistantClock>(clock: &C, at: u64) -> Result<u64, C::Error> {
    let ahead = ahead_of_host(clock)?;
    let shown = i128::from(at) + ahead;
    Ok(u64::try_from(shown).unwrap_or(0))
}

/// Sets a distant clock such that it shows `nanos` when the host's clock shows `at`.
pub(super) fn set_at<C: DistantClock>(clock: &C, nanos: u64, at: u64) -> Result<(), C::Error> {
    /// What is not worth another call.
    const CLOSE_NANOS: u128 = 2000;
    const TRIES: u32 = 4;
    let wanted = i128::from(nanos) - i128::from(at);
    let mut ahead = wanted;
    for _ in 0..TRIES {
        let now = i128::from(clock.host_nanos()) + ahead;
        clock.set(u64::try_from(now).unwrap_or(0))?;
        let missed = ahead_of_host(clock)? - wanted;
        if missed.unsigned_abs() <= CLOSE_NANOS {
            break;
        }
        ahead -= missed;
    }
    Ok(())
}

/// How far a distant clock is ahead of the host's.
fn ahead_of_host<C: DistantClock>(clock: &C) -> Result<i128, C::Error> {
    let (between, shown) = closest(|| clock.host_nanos(), || clock.read())?;
    Ok(i128::from(shown) - i128::from(between))
}

/// Reads something between two looks at a clock, and takes it for what was there in the middle of them. Of some tries
/// the closest counts: an interruption in between spreads them.
fn closest<E>(look: impl Fn() -> u64, read: impl Fn() -> Result<u64, E>) -> Result<(u64, u64), E> {
    const TRIES: u32 = 3;
    let mut closest = None;
    for _ in 0..TRIES {
        let before = look();
        let found = read()?;
        let spread = look().saturating_sub(before);
        if closest.is_none_or(|(least, _)| spread < least) {
            closest = Some((spread, (before + spread / 2, found)));
        }
    }
    Ok(closest
        .map(|(_, both)| both)
        .expect("there is at least one try"))
}

/// How far a counter of that rate goes in `nanos`, rounded towards zero.
pub(super) fn ticks(nanos: i128, khz: u32) -> i64 {
    let ticks = nanos * i128::from(khz) / 1_000_000;
    i64::try_from(ticks).unwrap_or(if ticks < 0 { i64::MIN } else { i64::MAX })
}

/// A vCPU's time stamp counter as it was found when it was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SavedTsc {
    /// What is added to the host's counter.
    Offset(u64),
    /// The guest's counter, and what the clock showed; where KVM tells no offset or scales.
    Value { tsc: u64, nanos: u64 },
}

impl SavedTsc {
    /// The guest's counter when the clock showed `nanos`.
    pub(super) fn guest_at(
        self,
        nanos: u64,
        pair: ClockPair,
        host_khz: u32,
        guest_khz: u32,
    ) -> u64 {
        match self {
            Self::Offset(offset) => pair.tsc_at(nanos, host_khz).wrapping_add(offset),
            Self::Value {
                tsc,
                nanos: read_at,
            } => tsc.wrapping_add_signed(ticks(i128::from(nanos) - i128::from(read_at), guest_khz)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;

    #[test]
    fn a_counter_goes_on_by_the_time_that_passed() {
        let source = ClockPair {
            nanos: 5_000_000_000,
            tsc: 1 << 40,
        };
        let saved = SavedTsc::Offset(0_u64.wrapping_sub(1 << 39));
        // The guest stopped 2 ms before the pair was read.
        let stopped = saved.guest_at(4_998_000_000, source, 2_000_000, 2_000_000);
        assert_eq!(stopped, (1 << 39) - 4_000_000);
        // The target's clocks have nothing to do with the source's: the offset makes up for it.
        let target = ClockPair {
            nanos: 77_000_000_000,
            tsc: 123,
        };
        let stopped_at = 76_990_000_000;
        let offset = stopped.wrapping_sub(target.tsc_at(stopped_at, 2_000_000));
        let guest_now = target.tsc.wrapping_add(offset);
        assert_eq!(guest_now - stopped, 20_000_000, "10 ms at 2 GHz");
        let value = SavedTsc::Value {
            tsc: 1000,
            nanos: 2_000_000,
        };
        assert_eq!(value.guest_at(1_000_000, source, 1, 500), 500);
    }

    /// A host and a clock, each call to which takes some time: half of it before anything happens.
    struct Slow {
        host: Cell<u64>,
        ahead: Cell<i64>,
        calls: RefCell<VecDeque<u64>>,
    }

    impl Slow {
        fn new(calls: &[u64]) -> Self {
            Self {
                host: Cell::new(1_000_000),
                ahead: Cell::new(500),
                calls: RefCell::new(calls.iter().copied().collect()),
            }
        }

        /// Half of a call; the other half is the caller's.
        fn pass_half(&self, half: u64) {
            self.host.set(self.host.get() + half);
        }

        fn next_half(&self) -> u64 {
            self.calls.borrow_mut().pop_front().unwrap_or(10) / 2
        }
    }

    impl DistantClock for Slow {
        type Error = Infallible;

        fn host_nanos(&self) -> u64 {
            self.host.get()
        }

        fn read(&self) -> Result<u64, Infallible> {
            let half = self.next_half();
            self.pass_half(half);
            let shown = self.host.get().wrapping_add_signed(self.ahead.get());
            self.pass_half(half);
            Ok(shown)
        }

        fn set(&self, nanos: u64) -> Result<(), Infallible> {
            let half = self.next_half();
            self.pass_half(half);
            self.ahead.set(nanos as i64 - self.host.get() as i64);
            self.pass_half(half);
            Ok(())
        }
    }

    #[test]
    fn calls_that_take_time_cost_the_guest_none() {
        // Read while another process has the processor once, and twice.
        for calls in [
            &[5_000_000, 10][..],
            &[5_000_000, 5_000_000, 10],
            &[40, 40, 40],
        ] {
            let clock = Slow::new(calls);
            assert_eq!(shown_at(&clock, 2_000_000), Ok(2_000_500));
        }
        // A set that is held up is seen and made good; so is one that always takes its time.
        for calls in [&[5_000_000][..], &[10], &[60_000, 10, 10, 10, 60_000]] {
            let clock = Slow::new(calls);
            assert_eq!(set_at(&clock, 9_000_000, 1_000_000), Ok(()));
            let missed = clock.ahead.get() - 8_000_000;
            assert!(missed.abs() <= 2000, "{missed} ns after calls of {calls:?}");
        }
    }

    #[test]
    fn pairs_agree_with_each_other() {
        let first = ClockPair::sample();
        let again = ClockPair::sample();
        assert!(again.nanos >= first.nanos && again.tsc >= first.tsc);
        assert_eq!(first.tsc_at(first.nanos, 3_000_000), first.tsc);
    }
}
