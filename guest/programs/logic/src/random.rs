//! A small fast random generator: SplitMix64, [Steele14].
//!
//! The programs need speed and a seed that repeats a run, not secrecy.

/// A stream of random words.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

/// The odd number nearest to 2^64 divided by the golden ratio.
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes all bits of a word with each other, a bijection.
#[inline]
#[must_use]
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl Random {
    /// The stream of a seed; `lane` tells apart the vCPUs of one guest.
    #[must_use]
    pub const fn new(seed: u64, lane: u32) -> Self {
        Self {
            state: mix(seed ^ mix(lane as u64 + 1)),
        }
    }

    /// The next word.
    #[inline]
    pub const fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A number below `bound`, as good as uniform for bounds far below 2^64.
    #[inline]
    pub const fn below(&mut self, bound: u64) -> u64 {
        ((self.word() as u128 * bound as u128) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_below_their_bound_and_spread() {
        let mut random = Random::new(7, 0);
        let mut seen = [0_u32; 10];
        for _ in 0..10_000 {
            seen[random.below(10) as usize] += 1;
        }
        assert!(seen.iter().all(|&count| (850..1150).contains(&count)));
    }

    #[test]
    fn lanes_differ_and_seeds_repeat() {
        assert_ne!(Random::new(7, 0).word(), Random::new(7, 1).word());
        assert_eq!(Random::new(7, 1).word(), Random::new(7, 1).word());
    }
}
