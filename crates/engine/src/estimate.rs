//! What a migration would take, before it is begun: the policies, run on what was measured.
//!
//! A guest's writes are told by its curve: pages that it dirtied at least once within some time, which
//! bends as its working set is through (`[Clark05 §5]`). A round that takes so long leaves so many. The
//! policy of the mode decides after each round as it does in a migration, from the same numbers.
//!
//! Deliberately left out is what changes on the way: pages that are zero or shrink when coded, slowed
//! writers, deferred pages, streams that take turns. The estimate is of a migration without them.

use crate::policy::{Limits, Mode, Progress, Verdict};
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::{ByteCount, BytesPerSecond, PageCount};
use serde::{Deserialize, Serialize};

/// What was measured of a guest and the way to its target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Pages that exist: all others are zero and are not sent.
    pub existing: PageCount,
    /// The curve: pages dirtied at least once since tracking began, after so long. Ascending.
    pub dirtied: Vec<(Duration, PageCount)>,
    /// Payload that the way carries.
    pub bandwidth: BytesPerSecond,
    /// There and back.
    pub round_trip: Duration,
    /// How long the guest stood to be saved.
    pub save: Duration,
    /// Size of its state.
    pub state: ByteCount,
}

/// What one technique would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// The technique.
    pub mode: Mode,
    /// Rounds while the guest runs at the source.
    pub rounds: u32,
    /// Pages that are sent, those that are sent again counted again.
    pub pages: PageCount,
    /// How long the guest stands, apart from what its target takes to load it.
    pub downtime: Duration,
    /// Until the source holds nothing any more; `None` if only an order ends it.
    pub total: Option<Duration>,
    /// How long the guest runs at the target while pages are missing there; `None` as above.
    pub degraded: Option<Duration>,
    /// How it ends.
    pub verdict: Ending,
}

/// How the rounds end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The guest stands while all that is left is copied, within the limit.
    Copies,
    /// The same, and that takes longer than the limit.
    CopiesLate,
    /// It goes on at the target without all its pages.
    Switches,
}

impl Sample {
    /// What a technique would take within these limits.
    pub fn estimate(&self, mode: Mode, limits: &Limits) -> Estimate {
        let bandwidth = match limits.bandwidth_max {
            Some(limit) => limit.min(self.bandwidth),
            None => self.bandwidth,
        };
        let time = |pages: PageCount| {
            let time = bandwidth.time_for(pages.bytes());
            time.unwrap_or(Duration::MAX)
        };
        let fixed = self.fixed_cost(bandwidth);
        let mut progress = Progress {
            fixed_cost: fixed,
            ..Progress::before(self.existing)
        };
        let mut pages = PageCount::ZERO;
        let verdict = loop {
            match mode.policy().verdict(&progress, limits) {
                Verdict::AnotherRound => {
                    pages = pages.saturating_add(progress.remaining);
                    let took = time(progress.remaining);
                    progress.keep_least();
                    progress = self.after_round(&progress, took, bandwidth);
                }
                verdict => break verdict,
            }
        };
        let left = progress.remaining;
        let pages = pages.saturating_add(left);
        let copied = time(left);
        let downtime = match verdict {
            Verdict::SwitchNow(_) => fixed,
            _ => fixed.saturating_add(copied),
        };
        let ending = match verdict {
            Verdict::SwitchNow(_) => Ending::Switches,
            _ if downtime > limits.downtime_max => Ending::CopiesLate,
            _ => Ending::Copies,
        };
        let degraded = match ending {
            Ending::Switches if !mode.pushes() => None,
            Ending::Switches => Some(copied),
            Ending::Copies | Ending::CopiesLate => Some(Duration::ZERO),
        };
        let before = progress.elapsed.saturating_add(downtime);
        Estimate {
            mode,
            rounds: progress.rounds,
            pages,
            downtime,
            total: degraded.map(|degraded| before.saturating_add(degraded)),
            degraded,
            verdict: ending,
        }
    }

    /// What a pause takes without its pages: saving, the state on the way, and the answers to *state* and
    /// to *commit*.
    fn fixed_cost(&self, bandwidth: BytesPerSecond) -> Duration {
        let state = bandwidth.time_for(self.state).unwrap_or(Duration::MAX);
        let answers = self.round_trip.saturating_mul(2);
        self.save.saturating_add(state).saturating_add(answers)
    }

    fn after_round(&self, before: &Progress, took: Duration, rate: BytesPerSecond) -> Progress {
        let remaining = self.dirtied_in(took);
        let next_round = rate
            .time_for(remaining.bytes())
            .map(|time| self.dirtied_in(time));
        let mut progress = Progress {
            rounds: before.rounds + 1,
            remaining,
            last_round: before.remaining,
            next_round: next_round.filter(|_| before.rounds == 0),
            bandwidth: Some(rate),
            elapsed: before.elapsed.saturating_add(took),
            ..*before
        };
        // The bulk round's size says nothing about the guest's dirty rate.
        if before.rounds > 0 {
            progress.count_progress(Progress::is_fewer(remaining, before.remaining));
        }
        progress.compare_with_least();
        progress
    }

    /// Pages that are dirtied at least once in `time`: by the curve, which goes on as it ended, up to all
    /// that exist.
    pub fn dirtied_in(&self, time: Duration) -> PageCount {
        let mut from = (Duration::ZERO, PageCount::ZERO);
        let mut slope = from;
        for &to in &self.dirtied {
            if time < to.0 {
                return between(from, to, time).min(self.existing);
            }
            slope = from;
            from = to;
        }
        if slope.0 == from.0 {
            return from.1.min(self.existing);
        }
        let beyond = between(slope, from, time);
        beyond.max(from.1).min(self.existing)
    }
}

/// The straight line through two points, at `time`.
fn between(from: (Duration, PageCount), to: (Duration, PageCount), time: Duration) -> PageCount {
    let rise = u128::from(to.1.saturating_sub(from.1).get());
    let run = to.0.saturating_sub(from.0).as_nanos().max(1);
    let since = time.saturating_sub(from.0).as_nanos();
    let part = rise.saturating_mul(since) / run;
    let more = PageCount::new(u64::try_from(part).unwrap_or(u64::MAX));
    from.1.saturating_add(more)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    /// 256 MiB that exist, of which the guest rewrites `set` pages at `rate` pages a second, over a way
    /// of 1 GB/s.
    fn sample(set: u64, rate: u64) -> Sample {
        let point = |milliseconds: u32| {
            let pages = (rate * u64::from(milliseconds) / 1000).min(set);
            (milliseconds * MS, PageCount::new(pages))
        };
        Sample {
            existing: PageCount::new(65_536),
            dirtied: [50, 100, 200, 400, 800].map(point).to_vec(),
            bandwidth: BytesPerSecond::new(1_000_000_000),
            round_trip: MS / 10,
            save: MS,
            state: ByteCount::new(100_000),
        }
    }

    fn estimate(set: u64, rate: u64, mode: Mode) -> Estimate {
        sample(set, rate).estimate(mode, &Limits::default())
    }

    #[test]
    fn a_calm_guest_is_copied_within_the_limit() {
        let calm = estimate(0, 0, Mode::PreCopy);
        assert_eq!((calm.rounds, calm.verdict), (1, Ending::Copies));
        assert_eq!(calm.downtime, MS + MS / 10 + MS / 5);
        // 268 MB at 1 GB/s.
        assert_eq!(calm.total.unwrap().as_millis(), 268 + 1);
        let stopped = estimate(0, 0, Mode::StopAndCopy);
        assert_eq!((stopped.rounds, stopped.verdict), (0, Ending::CopiesLate));
        assert_eq!(stopped.downtime, stopped.total.unwrap());
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_way_carries_is_not_caught_up_with() {
        // The way carries 244,000 pages a second, the guest goes through 32,768 in a twelfth of one.
        let (set, rate) = (32_768, 400_000);
        let late = estimate(set, rate, Mode::PreCopy);
        assert_eq!(late.verdict, Ending::CopiesLate);
        assert!(late.downtime > 130 * MS, "{late:?}");
        let auto = estimate(set, rate, Mode::Auto);
        assert_eq!(auto.verdict, Ending::Switches);
        assert!(
            auto.downtime < 2 * MS && auto.pages < late.pages,
            "{auto:?}"
        );
        assert_eq!(auto.degraded.unwrap().as_millis(), 134);
        let demand = estimate(set, rate, Mode::Demand);
        assert_eq!((demand.total, demand.degraded), (None, None));
        let post = estimate(set, rate, Mode::PostCopy);
        assert_eq!((post.rounds, post.pages), (0, PageCount::new(65_536)));
    }

    #[test]
    fn a_small_working_set_is_caught_up_with_in_rounds() {
        let rounds = estimate(40_000, 50_000, Mode::PreCopy);
        assert_eq!(rounds.verdict, Ending::Copies);
        assert!((3..=5).contains(&rounds.rounds), "{rounds:?}");
        assert_eq!(estimate(40_000, 50_000, Mode::Auto).rounds, rounds.rounds);
    }

    #[test]
    fn the_curve_is_followed_and_goes_on() {
        let curve = sample(4_000, 20_000);
        let at = |time: Duration| curve.dirtied_in(time).get();
        assert_eq!(
            (at(Duration::ZERO), at(25 * MS), at(75 * MS)),
            (0, 500, 1500)
        );
        assert_eq!(at(3600 * 1000 * MS), 4_000);
        let steady = sample(u64::MAX, 20_000);
        assert_eq!(steady.dirtied_in(1600 * MS).get(), 32_000);
        assert_eq!(steady.dirtied_in(3600 * 1000 * MS).get(), 65_536);
        let unknown = Sample {
            dirtied: Vec::new(),
            ..steady
        };
        assert_eq!(unknown.dirtied_in(MS), PageCount::ZERO);
    }

    proptest! {
        #[test]
        fn every_estimate_ends(existing in 0..1u64 << 40, rates in prop::collection::vec(0..1u64 << 40, 0..6),
                               bandwidth in 0..u64::MAX, limit in 0..1u64 << 40) {
            let mut pages = 0u64;
            let dirtied = (1u32..).zip(rates).map(|(at, more)| {
                pages += more;
                (at * 100 * MS, PageCount::new(pages))
            });
            let sample = Sample {
                existing: PageCount::new(existing),
                dirtied: dirtied.collect(),
                bandwidth: BytesPerSecond::new(bandwidth),
                ..sample(0, 0)
            };
            let limits = Limits {
                bandwidth_max: Some(BytesPerSecond::new(limit)),
                ..Limits::default()
            };
            for mode in Mode::ALL {
                let estimate = sample.estimate(mode, &limits);
                prop_assert!(estimate.rounds <= limits.rounds_max);
                prop_assert!(estimate.total.is_none_or(|total| total >= estimate.downtime));
            }
        }
    }
}
