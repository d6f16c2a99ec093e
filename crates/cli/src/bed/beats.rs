//! A guest's heartbeats in order, and what can be read from them: rates, gaps, the way back to speed.
//!
//! A heartbeat comes about once a millisecond and says how much work was done by then. Between two
//! of them the work is taken to have grown evenly, so a rate over a window is exact to about two
//! beats. Times are those at which the monitor stamped the beat; only the gap that is seen from
//! outside uses the times of arrival.

use limosa_engine::Timestamp;
use std::time::Duration;

/// How long the guest must keep up its former speed to count as back.
pub(crate) const RESUME_WINDOW: Duration = Duration::from_millis(10);
/// The part of the former speed that counts as back.
const RESUME_SHARE: f64 = 0.9;

/// One heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beat {
    /// When it arrived here.
    pub arrived: Timestamp,
    /// When the VM process sent it.
    pub stamped: Timestamp,
    /// The guest's time stamp counter when it began to beat.
    pub guest_tsc: u64,
    /// Work done so far, over all vCPUs.
    pub work: u64,
}

/// Heartbeats in the order of their stamps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Beats(Vec<Beat>);

impl Beats {
    /// Puts them in order.
    pub(crate) fn new(mut beats: Vec<Beat>) -> Self {
        beats.sort_by_key(|beat| beat.stamped);
        Self(beats)
    }

    /// Those stamped within `from..=to`.
    pub(crate) fn between(&self, from: Timestamp, to: Timestamp) -> &[Beat] {
        let first = self.0.partition_point(|beat| beat.stamped < from);
        let end = self.0.partition_point(|beat| beat.stamped <= to);
        self.0.get(first..end).unwrap_or_default()
    }

    /// The longest time between two arrivals that reaches into `from..=to`; `None` if the window
    /// has no arrival before or none after it.
    pub(crate) fn longest_gap(&self, from: Timestamp, to: Timestamp) -> Option<Duration> {
        let is_framed = self.0.first().is_some_and(|beat| beat.arrived <= from)
            && self.0.last().is_some_and(|beat| beat.arrived >= to);
        if !is_framed {
            return None;
        }
        self.0
            .windows(2)
            .filter(|pair| pair[0].arrived <= to && pair[1].arrived >= from)
            .map(|pair| pair[1].arrived.since(pair[0].arrived))
            .max()
    }

    /// Work a second within the window; `None` for a window without length or beats.
    pub(crate) fn rate(&self, from: Timestamp, to: Timestamp) -> Option<f64> {
        let seconds = to.since(from).as_secs_f64();
        if seconds == 0.0 {
            return None;
        }
        Some((self.work_at(to)? - self.work_at(from)?) / seconds)
    }

    /// Work a second in each of so many slots from `from` on; `None` for those that do not lie between two beats.
    pub(crate) fn rates(&self, from: Timestamp, slot: Duration, slots: u32) -> Vec<Option<f64>> {
        let works: Vec<Option<f64>> = (0..=slots)
            .map(|edge| self.known_work_at(from.after(slot * edge)))
            .collect();
        let rate = |edges: &[Option<f64>]| Some((edges[1]? - edges[0]?) / slot.as_secs_f64());
        works.windows(2).map(rate).collect()
    }

    /// Time from `running` until the first beat from which on the guest worked for a
    /// [`RESUME_WINDOW`] at nine tenths of `rate_before`; `None` if no beat was such.
    pub(crate) fn resume(&self, running: Timestamp, rate_before: f64) -> Option<Duration> {
        let last = self.0.last()?.stamped;
        let wanted = RESUME_SHARE * rate_before * RESUME_WINDOW.as_secs_f64();
        let first = self.0.partition_point(|beat| beat.stamped < running);
        self.0[first..]
            .iter()
            .take_while(|beat| beat.stamped.after(RESUME_WINDOW) <= last)
            .find(|beat| {
                let then = self.work_at(beat.stamped.after(RESUME_WINDOW));
                then.is_some_and(|then| then - beat.work as f64 >= wanted)
            })
            .map(|beat| beat.stamped.since(running))
    }

    /// Work done at a moment that has a beat before and one after it.
    fn known_work_at(&self, moment: Timestamp) -> Option<f64> {
        let (first, last) = (self.0.first()?, self.0.last()?);
        let is_framed = first.stamped <= moment && moment <= last.stamped;
        self.work_at(moment).filter(|_| is_framed)
    }

    /// Work done at a moment, evenly between beats; before the first and after the last one as at
    /// that one.
    fn work_at(&self, moment: Timestamp) -> Option<f64> {
        let next = self.0.partition_point(|beat| beat.stamped < moment);
        let Some(after) = self.0.get(next) else {
            return self.0.last().map(|beat| beat.work as f64);
        };
        let Some(before) = next.checked_sub(1).and_then(|index| self.0.get(index)) else {
            return Some(after.work as f64);
        };
        let share = moment.since(before.stamped).as_secs_f64()
            / after.stamped.since(before.stamped).as_secs_f64();
        let grown = after.work.saturating_sub(before.work) as f64;
        Some(before.work as f64 + share * grown)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn at(micros: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000 + micros * 1000)
    }

    /// Beats at these microseconds with this work; they arrive 30 µs after their stamps.
    pub(crate) fn beats(series: &[(u64, u64)]) -> Beats {
        let beat = |&(micros, work): &(u64, u64)| Beat {
            arrived: at(micros + 30),
            stamped: at(micros),
            guest_tsc: 7_000_000 + micros * 2600,
            work,
        };
        Beats::new(series.iter().map(beat).collect())
    }

    /// 50 a millisecond for 100 ms, a switch from 100.4 ms to 105.4 ms, 2 ms of slow work, then
    /// as before.
    fn a_move() -> Beats {
        let mut series: Vec<(u64, u64)> = (0..=100).map(|ms| (ms * 1000, ms * 50)).collect();
        series.extend([(105_450, 5020), (106_450, 5030), (107_450, 5040)]);
        series.extend((1..=50).map(|ms| (107_450 + ms * 1000, 5040 + ms * 50)));
        beats(&series)
    }

    fn check(value: Option<Duration>, expect: &str) {
        let text = value.map_or(String::from("none"), |value| format!("{value:?}"));
        assert_eq!(text, expect);
    }

    #[test]
    fn the_gap_is_between_arrivals_around_the_window() {
        let beats = a_move();
        check(beats.longest_gap(at(100_400), at(105_400)), "5.45ms");
        check(beats.longest_gap(at(50_100), at(60_200)), "1ms");
        check(beats.longest_gap(at(50_100), at(200_000)), "none");
        check(Beats::default().longest_gap(at(0), at(1)), "none");
    }

    #[test]
    fn rates_are_interpolated() {
        let beats = a_move();
        let rate = |from, to| beats.rate(at(from), at(to)).map(f64::round);
        assert_eq!(rate(0, 100_000), Some(50_000.0));
        assert_eq!(rate(10_500, 20_500), Some(50_000.0));
        assert_eq!(rate(105_450, 107_450), Some(10_000.0));
        // Nothing is known beyond the last beat: no work is assumed.
        assert_eq!(rate(157_450, 200_000), Some(0.0));
        assert_eq!(rate(5, 5), None);
    }

    #[test]
    fn a_slot_has_the_work_that_was_done_in_it() {
        // 50 a millisecond; nothing is done for the last 6 ms of the second slot, and for 9 ms no beat arrives.
        let is_lost = |ms: &u64| !(22..=30).contains(ms);
        let early = (3..=14).map(|ms| (ms * 1000, ms * 50));
        let late = (20..=43)
            .filter(is_lost)
            .map(|ms| (ms * 1000, (ms - 6) * 50));
        let beats = beats(&early.chain(late).collect::<Vec<_>>());
        let check = |from: u64, slots: u32, expect: &str| {
            let rates = beats.rates(at(from), Duration::from_millis(10), slots);
            let rates: Vec<String> = rates
                .iter()
                .map(|rate| rate.map_or("unknown".to_owned(), |rate| format!("{rate:.0}")))
                .collect();
            assert_eq!(rates.join(" "), expect);
        };
        check(10_000, 3, "20000 50000 50000");
        check(5000, 3, "45000 25000 50000");
        // Beats begin at 3 ms and end at 43 ms.
        check(0, 6, "unknown 20000 50000 50000 unknown unknown");
        check(33_000, 2, "50000 unknown");
        assert_eq!(
            Beats::default().rates(at(0), Duration::from_millis(10), 1),
            [None]
        );
    }

    #[test]
    fn the_guest_is_back_when_it_stays_at_speed() {
        let beats = a_move();
        // A window that begins at 106.45 ms has 1 ms of slow work in it: 460 of 500, enough.
        check(beats.resume(at(105_400), 50_000.0), "1.05ms");
        check(beats.resume(at(105_400), 5000.0), "50µs");
        check(beats.resume(at(105_400), 60_000.0), "none");
        check(beats.resume(at(150_000), 50_000.0), "none");
    }
}
