//! What the guest's time stamp counter showed at a moment of the host's clock.
//!
//! A heartbeat carries both: the counter as the guest read it, and the host's clock a little later,
//! when the beat had reached the monitor. The delay between the two is never negative and mostly
//! some ten microseconds, so the truth is a straight line below all points and close to the
//! quickest ones: an edge of their lower convex hull. [Moon99 §4] finds the skew of two clocks so.
//! The edge below the points' middle is taken, which is the line with the least sum of distances.

use crate::bed::beats::Beat;
use limosa_engine::Timestamp;
use std::time::Duration;

/// A line through counter and clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestClock {
    tsc: u64,
    nanos: u64,
    ticks_per_nano: f64,
}

impl GuestClock {
    /// The line for these beats, in order; `None` with fewer than two, or if the counter did not
    /// advance.
    pub(crate) fn fit(beats: &[Beat]) -> Option<Self> {
        let points: Vec<(u64, u64)> = beats
            .iter()
            .map(|beat| (beat.guest_tsc, beat.stamped.as_nanos()))
            .collect();
        let hull = lower_hull(&points);
        let sum: u128 = points.iter().map(|&(tsc, _)| u128::from(tsc)).sum();
        let middle = sum.checked_div(points.len() as u128)?;
        let edge = hull
            .windows(2)
            .find(|edge| u128::from(edge[1].0) >= middle)?;
        let (ticks, nanos) = (edge[1].0 - edge[0].0, edge[1].1.checked_sub(edge[0].1)?);
        if nanos == 0 {
            return None;
        }
        Some(Self {
            tsc: edge[0].0,
            nanos: edge[0].1,
            ticks_per_nano: ticks as f64 / nanos as f64,
        })
    }

    /// The counter at a moment.
    pub(crate) fn tsc_at(&self, moment: Timestamp) -> u64 {
        let nanos = i128::from(moment.as_nanos()) - i128::from(self.nanos);
        let ticks = (nanos as f64 * self.ticks_per_nano) as i64;
        self.tsc.saturating_add_signed(ticks)
    }

    /// How many ticks are in a time.
    pub(crate) fn ticks_in(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e9 * self.ticks_per_nano
    }

    /// How long so many ticks are.
    pub(crate) fn time_of(&self, ticks: u64) -> Duration {
        Duration::from_nanos((ticks as f64 / self.ticks_per_nano) as u64)
    }
}

/// The lower convex hull from left to right. A counter that went back is left out.
fn lower_hull(points: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut hull: Vec<(u64, u64)> = Vec::new();
    for &point in points {
        if hull.last().is_some_and(|last| point.0 <= last.0) {
            continue;
        }
        while let [.., first, second] = hull[..]
            && !turns_up(first, second, point)
        {
            hull.pop();
        }
        hull.push(point);
    }
    hull
}

/// Whether the way over `second` bends upwards there.
fn turns_up(first: (u64, u64), second: (u64, u64), third: (u64, u64)) -> bool {
    let difference = |a: u64, b: u64| i128::from(a) - i128::from(b);
    let before = difference(second.1, first.1) * difference(third.0, first.0);
    let after = difference(third.1, first.1) * difference(second.0, first.0);
    before < after
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1000 beats of a counter at 2.6 GHz that reads 5e12 at 1 s, with these delays in turn.
    fn beats(delays_nanos: &[u64]) -> Vec<Beat> {
        (0..1000u64)
            .map(|ms| {
                let delay = delays_nanos[ms as usize % delays_nanos.len()];
                let stamped = Timestamp::from_nanos(1_000_000_000 + ms * 1_000_000 + delay);
                Beat {
                    arrived: stamped,
                    stamped,
                    guest_tsc: 5_000_000_000_000 + ms * 2_600_000,
                    work: 0,
                }
            })
            .collect()
    }

    fn check(delays_nanos: &[u64], error_max_nanos: u64) {
        let clock = GuestClock::fit(&beats(delays_nanos)).unwrap();
        for ms in [0, 500, 1000, 1500] {
            let moment = Timestamp::from_nanos(1_000_000_000 + ms * 1_000_000);
            let tsc = clock.tsc_at(moment);
            let error = tsc.abs_diff(5_000_000_000_000 + ms * 2_600_000) * 10 / 26;
            assert!(error <= error_max_nanos, "{error} ns off at {ms} ms");
        }
        let time = clock.time_of(26_000_000).as_nanos();
        assert!(time.abs_diff(10_000_000) <= 1000, "{time}");
    }

    #[test]
    fn the_quickest_beats_tell_the_truth() {
        check(&[0], 1);
        check(&[20_000], 20_001);
        check(&[90_000, 4_000_000, 25_000, 700_000, 31_000], 26_000);
        check(
            &[20_000, 21_000, 9_000_000, 20_500, 22_000, 23_000, 20_100],
            21_000,
        );
    }

    #[test]
    fn too_little_is_no_clock() {
        assert!(GuestClock::fit(&[]).is_none());
        assert!(GuestClock::fit(&beats(&[0])[..1]).is_none());
        let mut stopped = beats(&[0]);
        stopped.iter_mut().for_each(|beat| beat.guest_tsc = 1);
        assert!(GuestClock::fit(&stopped).is_none());
    }

    #[test]
    fn a_counter_that_goes_back_does_not_spoil_the_rest() {
        let mut odd = beats(&[0]);
        odd[400].guest_tsc = 5;
        let clock = GuestClock::fit(&odd).unwrap();
        let tsc = clock.tsc_at(Timestamp::from_nanos(1_000_000_000));
        assert!(tsc.abs_diff(5_000_000_000_000) < 10, "{tsc}");
    }
}
