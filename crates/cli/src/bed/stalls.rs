//! The stalls that a guest recorded itself, and which of them a move has to answer for.
//!
//! A guest keeps its last 64 stalls and the 16 longest since it was told to forget them, so the
//! longest one of a move is among them however many short ones came after it. A vCPU that was
//! never away for as long as it takes to count as a stall has none.
//!
//! The longest stall is one event, and may be the time slice of somebody else. So there is a second
//! figure, of all stalls since the guest was told to forget them, which it counts by length:
//!
//! ```text
//!  a request that comes here ──▼     waits until the end of the stall
//!  ── works ──┤████████████████████████├── works ──▶        P(wait > w) = Σ max(0, length − w) / time
//! ```
//!
//! Requests that come at any moment with equal chance wait for what is left of a stall, or not at all.
//! The wait that one in a thousand exceeds weighs stalls by number and length together, as somebody
//! would feel them who asks the guest something all the time; it does not depend on how fast the guest
//! works, as a percentile of its own operations would.

use crate::bed::guest_clock::GuestClock;
use limosa_engine::Timestamp;
use std::time::Duration;

/// A time in which a vCPU that wanted to run did not, on its own time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stall {
    /// The counter before it.
    pub start_tsc: u64,
    /// Its length in ticks.
    pub length_tsc: u64,
}

/// Stalls of about the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StallGroup {
    /// How many.
    pub count: u64,
    /// How long they were together, in ticks.
    pub ticks: u64,
}

/// The part of all requests that wait longer than what is told.
const TAIL_SHARE: f64 = 0.001;

/// The wait in ticks that one request in a thousand exceeds, of requests that come at any moment of
/// `watched_ticks` of one vCPU or of several together. Stalls of one group are taken to be equally long.
/// Zero if fewer than one in a thousand met a stall.
pub(crate) fn tail_wait(groups: &[StallGroup], watched_ticks: f64) -> f64 {
    let mean = |group: &StallGroup| group.ticks as f64 / group.count as f64;
    let mut groups: Vec<&StallGroup> = groups.iter().filter(|group| group.count > 0).collect();
    groups.sort_by(|one, other| mean(other).total_cmp(&mean(one)));
    let allowed = TAIL_SHARE * watched_ticks;
    let (mut count, mut ticks) = (0.0, 0.0);
    let mut wait = 0.0;
    for (index, group) in groups.iter().enumerate() {
        count += group.count as f64;
        ticks += group.ticks as f64;
        // With only these stalls: ticks - count * wait = allowed.
        wait = f64::max(0.0, (ticks - allowed) / count);
        // Shorter stalls have no part in it.
        if groups.get(index + 1).is_none_or(|next| mean(next) <= wait) {
            break;
        }
    }
    wait
}

/// A span of the guest's time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TscWindow {
    start: u64,
    end: u64,
}

impl TscWindow {
    /// The window between two moments of the host's clock. The guest's counter may have been set
    /// anew between them, so each moment has a clock that was fitted on its own side.
    pub(crate) fn new(
        from: Timestamp,
        from_clock: &GuestClock,
        to: Timestamp,
        to_clock: &GuestClock,
    ) -> Self {
        Self {
            start: from_clock.tsc_at(from),
            end: to_clock.tsc_at(to),
        }
    }

    /// The longest stall that reaches into the window; zero if none does, which means that no vCPU
    /// was away for long enough to notice.
    pub(crate) fn longest(&self, stalls: &[Stall], clock: &GuestClock) -> Duration {
        stalls
            .iter()
            .filter(|stall| stall.length_tsc > 0)
            .filter(|stall| {
                let end = stall.start_tsc.saturating_add(stall.length_tsc);
                stall.start_tsc <= self.end && end >= self.start
            })
            .map(|stall| clock.time_of(stall.length_tsc))
            .max()
            .unwrap_or(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bed::beats::tests::{at, beats};

    /// Microseconds of start and length of each stall; the counter runs at 2.6 GHz.
    fn check(stalls: &[(u64, u64)], from: u64, to: u64, expect: &str) {
        let beats = beats(&[(0, 0), (1000, 50), (200_000, 100)]);
        let clock = GuestClock::fit(beats.between(at(0), at(200_000))).unwrap();
        let stalls: Vec<Stall> = stalls
            .iter()
            .map(|&(start, length)| Stall {
                start_tsc: 7_000_000 + start * 2600,
                length_tsc: length * 2600,
            })
            .collect();
        let window = TscWindow::new(at(from), &clock, at(to), &clock);
        let longest = window.longest(&stalls, &clock);
        assert_eq!(format!("{longest:?}"), expect);
    }

    #[test]
    fn only_stalls_that_reach_into_the_window_count() {
        let stalls = [
            (1000, 9000),
            (99_950, 5100),
            (99_940, 5300),
            (120_000, 8000),
        ];
        check(&stalls, 100_000, 105_000, "5.3ms");
        check(&stalls, 100_000, 121_000, "8ms");
        check(&stalls, 0, 200_000, "9ms");
        check(&stalls, 50_000, 60_000, "0ns");
    }

    #[test]
    fn one_request_in_a_thousand_waits_longer() {
        let check = |groups: &[(u64, u64)], expect: f64| {
            let groups: Vec<StallGroup> = groups
                .iter()
                .map(|&(count, ticks)| StallGroup { count, ticks })
                .collect();
            // Of 2000 ticks a thousandth is for those that wait longer.
            let wait = tail_wait(&groups, 2_000_000.0);
            assert!((wait - expect).abs() < 1e-6, "{groups:?}: {wait}");
        };
        check(&[], 0.0);
        check(&[(1, 1999)], 0.0);
        // The last 2000 ticks before its end are theirs.
        check(&[(1, 10_000)], 8000.0);
        check(&[(2, 20_000)], 9000.0);
        // Shorter ones count only if the longer ones leave something.
        check(&[(10, 5000), (1, 10_000)], 8000.0);
        check(&[(1, 2500), (4, 4000)], 900.0);
        check(&[(0, 0), (1000, 1_000_000)], 998.0);
    }

    #[test]
    fn an_empty_slot_of_the_table_is_no_stall() {
        check(&[(0, 0), (100_500, 0)], 0, 200_000, "0ns");
        check(&[], 0, 200_000, "0ns");
    }
}
