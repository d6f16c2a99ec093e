//! Which page comes next.
//!
//! All patterns choose among the pages of one vCPU, numbered from zero. Hot pages of the skewed
//! patterns are scattered over the memory, as they are in real guests.

use crate::random::{Random, mix};
use crate::ticks::TickRate;

/// The patterns by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after another, again and again.
    Sequential,
    /// Each with the same probability.
    Uniform,
    /// The page of rank k with a probability of about 1/k.
    Zipf,
    /// Uniform within an eighth of the pages, which moves every few seconds.
    Phases,
}

/// Part of the pages that is in use during one phase.
const PHASE_PARTS: u64 = 8;

/// How long a phase lasts, in microseconds.
pub const PHASE_MICROSECONDS: u64 = 3_000_000;

/// Chooses pages by a pattern.
#[derive(Clone, Debug)]
pub enum Chooser {
    /// See [`Pattern::Sequential`].
    Sequential {
        /// How many pages there are.
        pages: u64,
        /// The next one.
        next: u64,
    },
    /// See [`Pattern::Uniform`].
    Uniform {
        /// How many pages there are.
        pages: u64,
    },
    /// See [`Pattern::Zipf`].
    Zipf(Zipf),
    /// See [`Pattern::Phases`].
    Phases(Phases),
}

impl Chooser {
    /// A chooser among so many pages.
    ///
    /// # Panics
    /// If there are no pages.
    #[must_use]
    pub fn new(pattern: Pattern, pages: u64, rate: TickRate, now: u64) -> Self {
        assert!(pages > 0, "nothing to choose from");
        match pattern {
            Pattern::Sequential => Self::Sequential { pages, next: 0 },
            Pattern::Uniform => Self::Uniform { pages },
            Pattern::Zipf => Self::Zipf(Zipf::new(pages)),
            Pattern::Phases => Self::Phases(Phases::new(pages, rate, now)),
        }
    }

    /// The next page.
    #[inline]
    pub fn choose(&mut self, random: &mut Random, now: u64) -> u64 {
        match self {
            Self::Sequential { pages, next } => {
                let page = *next;
                *next = if page + 1 == *pages { 0 } else { page + 1 };
                page
            }
            Self::Uniform { pages } => random.below(*pages),
            Self::Zipf(zipf) => zipf.choose(random),
            Self::Phases(phases) => phases.choose(random, now),
        }
    }
}

/// Zipf's distribution with exponent 1.
///
/// The rank below which a share `u` of all choices falls is about (n+1)^u - 1, so a choice is a
/// power of two with a random exponent. Exponents are fixed point with 32 binary places, and the
/// power between two whole exponents is a parabola that is off by less than 0.4 %.
#[derive(Clone, Debug)]
pub struct Zipf {
    pages: u64,
    /// Logarithm to base 2 of the number of pages plus one.
    exponent_max: u64,
    /// Ranks are spread over the pages by multiplication with this, modulo their number.
    stride: u64,
}

impl Zipf {
    /// # Panics
    /// If there are 2^32 pages or more, for which the fixed point has no room.
    fn new(pages: u64) -> Self {
        assert!(pages < 1 << 32, "16 TiB of pages and more are not foreseen");
        Self {
            pages,
            exponent_max: logarithm(pages + 1),
            stride: coprime_stride(pages),
        }
    }

    #[inline]
    fn choose(&self, random: &mut Random) -> u64 {
        self.rank(random.word()) * self.stride % self.pages
    }

    /// The rank for a share of 2^64.
    #[inline]
    fn rank(&self, share: u64) -> u64 {
        // 2^f - 1 is about f * (LINEAR + (1 - LINEAR) * f) between 0 and 1.
        const ONE: u64 = 1 << 32;
        const LINEAR: u64 = 2_819_168_000;
        let exponent = ((u128::from(share) * u128::from(self.exponent_max)) >> 64) as u64;
        let (whole, part) = (exponent >> 32, exponent & (ONE - 1));
        let slope = LINEAR + ((part * (ONE - LINEAR)) >> 32);
        let mantissa = ONE + ((part * slope) >> 32);
        let power = ((u128::from(mantissa) << whole) >> 32) as u64;
        (power - 1).min(self.pages - 1)
    }
}

/// Logarithm to base 2 with 32 binary places, rounded down: each squaring of the mantissa yields
/// one more place.
fn logarithm(number: u64) -> u64 {
    assert!(number > 0, "zero has no logarithm");
    let whole = u64::from(number.ilog2());
    let mut mantissa = u128::from(number) << (63 - whole);
    let mut result = whole;
    for _ in 0..32 {
        mantissa = (mantissa * mantissa) >> 63;
        let place = (mantissa >> 64) as u64;
        mantissa >>= place;
        result = (result << 1) | place;
    }
    result
}

/// A step that reaches every one of `pages` places and keeps neighbours far apart.
fn coprime_stride(pages: u64) -> u64 {
    let golden = pages * 618 / 1000;
    (golden.max(1)..)
        .find(|&stride| greatest_common_divisor(stride, pages) == 1)
        .expect("pages + 1 and pages have no common divisor, so the search ends")
}

fn greatest_common_divisor(one: u64, other: u64) -> u64 {
    let (mut one, mut other) = (one, other);
    while other != 0 {
        (one, other) = (other, one % other);
    }
    one
}

/// A working set that moves.
#[derive(Clone, Debug)]
pub struct Phases {
    pages: u64,
    window: u64,
    start: u64,
    ends: u64,
    ticks: u64,
    phase: u64,
}

impl Phases {
    fn new(pages: u64, rate: TickRate, now: u64) -> Self {
        let ticks = rate.from_microseconds(PHASE_MICROSECONDS);
        Self {
            pages,
            window: pages.div_ceil(PHASE_PARTS),
            start: 0,
            ends: now.saturating_add(ticks),
            ticks,
            phase: 0,
        }
    }

    #[inline]
    fn choose(&mut self, random: &mut Random, now: u64) -> u64 {
        if now >= self.ends {
            self.advance(now);
        }
        let page = self.start + random.below(self.window);
        if page < self.pages {
            page
        } else {
            page - self.pages
        }
    }

    #[cold]
    fn advance(&mut self, now: u64) {
        self.phase += 1;
        self.ends = now.saturating_add(self.ticks);
        self.start = mix(self.phase) % self.pages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::vec;
    use std::vec::Vec;

    const RATE: TickRate = TickRate::from_khz(1000);

    fn choices(pattern: Pattern, pages: u64, count: usize) -> Vec<u64> {
        let mut chooser = Chooser::new(pattern, pages, RATE, 0);
        let mut random = Random::new(1, 0);
        (0..count).map(|_| chooser.choose(&mut random, 0)).collect()
    }

    #[test]
    fn every_pattern_stays_within_the_pages() {
        for pattern in [
            Pattern::Sequential,
            Pattern::Uniform,
            Pattern::Zipf,
            Pattern::Phases,
        ] {
            for pages in [1, 2, 3, 7, 8, 9, 1000, 65_536] {
                let chosen = choices(pattern, pages, 5000);
                assert!(
                    chosen.iter().all(|&page| page < pages),
                    "{pattern:?} of {pages}"
                );
            }
        }
    }

    #[test]
    fn sequential_goes_round() {
        assert_eq!(choices(Pattern::Sequential, 3, 5), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn uniform_reaches_all_pages() {
        let seen: BTreeSet<u64> = choices(Pattern::Uniform, 100, 2000).into_iter().collect();
        assert_eq!(seen.len(), 100);
    }

    #[test]
    fn logarithms_are_right() {
        for number in [1_u64, 2, 3, 10, 65_537, u64::from(u32::MAX)] {
            let expected = (number as f64).log2() * 4_294_967_296.0;
            let error = (logarithm(number) as f64 - expected).abs();
            assert!(error < 16.0, "log2({number}) is off by {error}");
        }
    }

    #[test]
    fn zipf_ranks_follow_their_law() {
        let pages = 10_000;
        let zipf = Zipf::new(pages);
        let mut counts = vec![0_u64; pages as usize];
        let samples = 400_000;
        let mut random = Random::new(3, 0);
        for _ in 0..samples {
            counts[zipf.rank(random.word()) as usize] += 1;
        }
        // Each doubling of the rank gets the same share of the choices, one in log2(10001).
        let share = samples as f64 / 10_001_f64.log2();
        for octave in 0..12 {
            let sum: u64 = counts[(1 << octave) - 1..(2 << octave) - 1].iter().sum();
            let ratio = sum as f64 / share;
            assert!(
                (0.97..1.03).contains(&ratio),
                "octave {octave} has {ratio} of its share"
            );
        }
        // And within one, a page gets twice as much at the lower end as at the upper.
        let low: u64 = counts[1023..1123].iter().sum();
        let high: u64 = counts[1947..2047].iter().sum();
        let ratio = low as f64 / high as f64;
        assert!((1.6..2.2).contains(&ratio), "ends of an octave: {ratio}");
    }

    #[test]
    fn zipf_scatters_ranks_without_collisions() {
        for pages in [1, 2, 10, 1000, 1024, 65_536] {
            let zipf = Zipf::new(pages);
            let seen: BTreeSet<u64> = (0..pages).map(|rank| rank * zipf.stride % pages).collect();
            assert_eq!(seen.len() as u64, pages);
        }
    }

    #[test]
    fn phases_move_the_window() {
        let mut chooser = Chooser::new(Pattern::Phases, 8000, RATE, 0);
        let mut random = Random::new(1, 0);
        let mut window = |now| -> BTreeSet<u64> {
            (0..5000)
                .map(|_| chooser.choose(&mut random, now))
                .collect()
        };
        let first = window(0);
        let same = window(PHASE_MICROSECONDS - 1);
        let moved = window(PHASE_MICROSECONDS);
        assert!(first.iter().all(|&page| page < 1000));
        assert!(same.iter().all(|&page| page < 1000));
        assert!(moved.intersection(&first).count() < 1000);
        assert_ne!(moved, first);
    }
}
