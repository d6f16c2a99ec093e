//! The guest's time stamp counter across a move: it goes on by exactly the time that passed.
//!
//! Host counter and monotonic clock are read together, once for the whole machine. From that pair,
//! the counter at any other moment follows by arithmetic, so no time between system calls gets into
//! the result, and all vCPUs keep the differences that they had.

/// A reading of the host's time stamp counter and of its monotonic clock at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClockPair {
    pub(super) nanos: u64,
    pub(super) tsc: u64,
}

impl ClockPair {
    /// Reads both. Of some tries the closest counts: an interruption in between spreads them.
    pub(super) fn sample() -> Self {
        const TRIES: u32 = 3;
        (0..TRIES)
            .map(|_| {
                let before = limosa_os::tsc();
                let nanos = limosa_os::monotonic_nanos();
                let spread = limosa_os::tsc().saturating_sub(before);
                (
                    spread,
                    Self {
                        nanos,
                        tsc: before + spread / 2,
                    },
                )
            })
            .min_by_key(|(spread, _)| *spread)
            .map(|(_, pair)| pair)
            .expect("there is at least one try")
    }

    /// The host's counter when its clock shows or showed `nanos`.
    pub(super) fn tsc_at(self, nanos: u64, khz: u32) -> u64 {
        self.tsc
            .wrapping_add_signed(ticks(i128::from(nanos) - i128::from(self.nanos), khz))
    }
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

    #[test]
    fn pairs_agree_with_each_other() {
        let first = ClockPair::sample();
        let again = ClockPair::sample();
        assert!(again.nanos >= first.nanos && again.tsc >= first.tsc);
        assert_eq!(first.tsc_at(first.nanos, 3_000_000), first.tsc);
    }
}
