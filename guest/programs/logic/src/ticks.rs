//! Microseconds and ticks of the time stamp counter.

/// The rate of the time stamp counter.
#[derive(Clone, Copy, Debug)]
pub struct TickRate {
    khz: u64,
}

impl TickRate {
    /// A counter that makes so many thousand ticks a second.
    ///
    /// # Panics
    /// If the rate is zero.
    #[must_use]
    pub const fn from_khz(khz: u64) -> Self {
        assert!(khz > 0, "a counter that stands still measures nothing");
        Self { khz }
    }

    /// Ticks in so many microseconds, rounded down.
    #[must_use]
    pub const fn from_microseconds(self, microseconds: u64) -> u64 {
        (microseconds as u128 * self.khz as u128 / 1000) as u64
    }

    /// Whole microseconds in so many ticks.
    #[must_use]
    pub const fn to_microseconds(self, ticks: u64) -> u64 {
        (ticks as u128 * 1000 / self.khz as u128) as u64
    }

    /// Ticks in a second.
    #[must_use]
    pub const fn per_second(self) -> u64 {
        self.khz * 1000
    }
}
