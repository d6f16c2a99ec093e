//! The world's dice: a seeded generator, so that a world is a function of its seed.
//!
//! SplitMix64: one multiplication chain a number, any seed is a good seed, and independent streams
//! come from drawing a seed for each. Deliberately not shared with any other crate: a change of its
//! sequence changes what every printed seed means.

use core::time::Duration;

/// A seeded generator.
#[derive(Clone, Debug)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not zero. The bias of the multiplication is below 2^-32 for
    /// every range used here.
    pub(crate) const fn below(&mut self, end: u64) -> u64 {
        assert!(end > 0, "an empty range");
        ((self.next() as u128 * end as u128) >> 64) as u64
    }

    /// A number from `low` to `high`, both included.
    pub(crate) const fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in `count` of a thousand cases.
    pub(crate) const fn per_mille(&mut self, count: u64) -> bool {
        self.below(1000) < count
    }

    /// A duration of `low` to `high` microseconds.
    pub(crate) const fn micros(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_nanos(self.between(low * 1000, high * 1000))
    }

    /// One of `choices`, which are not none.
    pub(crate) fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        let index = self.below(choices.len() as u64);
        &choices[usize::try_from(index).expect("below a length")]
    }

    /// A generator of its own, for a part whose draws shall not depend on others'.
    pub(crate) const fn split(&mut self) -> Self {
        Self::new(self.next())
    }
}
