//! From heartbeats and recorded stalls to what a move cost the guest.
//!
//! ```text
//!   a second │ begun                stopped   running        ended │ a second
//!  ──────────┼─────────────────────────┤         ├─────────────────┼──────────▶ host's clock
//!    before        during                guest gap,     resume, after
//!                                      heartbeat gap
//!            └────────────── worst stall, stall that one in a thousand meets ─┘
//! ```
//!
//! `stopped` and `running` come from the hosts' report; everything else is measured without its
//! help. The guest's stalls are on its own counter, which is laid beside the host's clock with the
//! beats of the source for what happened before the switch, with those of the target after it.

use crate::bed::beats::Beats;
use crate::bed::guest_clock::GuestClock;
use crate::bed::speed;
use crate::bed::stalls::{Stall, StallGroup, TscWindow, tail_wait};
use limosa_engine::Timestamp;
use limosa_lab::record::{Observed, WriteRates};
use std::time::Duration;

/// How long before a move and after its end the guest is watched.
pub(crate) const MARGIN: Duration = Duration::from_secs(1);
/// An absence that no guest overlooks: one that sleeps does so for a millisecond.
const NOTICED: Duration = Duration::from_millis(2);
/// A shorter window holds too few beats to tell a speed.
const RATE_WINDOW_MIN: Duration = Duration::from_millis(5);

/// The moments of a move on the host's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moments {
    /// The move was asked for.
    pub begun: Timestamp,
    /// The source held nothing any more, or the move had failed.
    pub ended: Timestamp,
    /// The guest's last instruction at the source and its first one at the target, if it moved.
    pub switch: Option<(Timestamp, Timestamp)>,
}

/// Every stall since the guest was told to forget them, by length.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counted {
    /// Of all vCPUs.
    pub groups: Vec<StallGroup>,
    /// For how long they were counted, times the number of vCPUs.
    pub watched: Duration,
}

impl Counted {
    /// The wait that one request in a thousand exceeds.
    fn tail_ms(&self, clock: &GuestClock) -> f64 {
        let wait = tail_wait(&self.groups, clock.ticks_in(self.watched));
        milliseconds(clock.time_of(wait as u64))
    }
}

/// The moment `by` earlier.
pub(crate) fn earlier(moment: Timestamp, by: Duration) -> Timestamp {
    let nanos = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
    Timestamp::from_nanos(moment.as_nanos().saturating_sub(nanos))
}

/// A duration in milliseconds, to the microsecond.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

/// What the guest and the observer saw. `beats` reach from before the move to a [`MARGIN`] after
/// its end, `stalls` are those of all vCPUs that its tables had, `counted` are all of them.
pub(crate) fn observe(
    moments: &Moments,
    beats: &Beats,
    stalls: &[Stall],
    counted: &Counted,
) -> Observed {
    let begin = earlier(moments.begun, MARGIN);
    let end = moments.ended.after(MARGIN);
    let before = beats.rate(begin, moments.begun);
    let Some((stopped, running)) = moments.switch else {
        let clock = GuestClock::fit(beats.between(begin, end));
        return Observed {
            worst_stall_ms: clock.map(|clock| {
                let window = TscWindow::new(moments.begun, &clock, end, &clock);
                milliseconds(window.longest(stalls, &clock))
            }),
            stall_p999_ms: clock.map(|clock| counted.tail_ms(&clock)),
            writes: WriteRates {
                before: before.map(f64::round),
                during: rate(beats, moments.begun, moments.ended),
                after: rate(beats, moments.ended, end),
            },
            speed: speed::through_move(moments, beats),
            ..Observed::default()
        };
    };
    let source = GuestClock::fit(beats.between(begin, stopped));
    let target = GuestClock::fit(beats.between(running, end));
    let longest = |from, to| {
        let (source, target) = (source?, target?);
        let window = TscWindow::new(from, &source, to, &target);
        Some(milliseconds(window.longest(stalls, &source)))
    };
    // A switch that long was noticed: its stall has been pushed out of the guest's tables.
    let is_forgotten = |gap: &f64| *gap == 0.0 && running.since(stopped) > NOTICED;
    let resume = before.and_then(|before| beats.resume(running, before));
    Observed {
        guest_gap_ms: longest(stopped, running).filter(|gap| !is_forgotten(gap)),
        heartbeat_gap_ms: beats.longest_gap(stopped, running).map(milliseconds),
        worst_stall_ms: longest(moments.begun, end),
        stall_p999_ms: source.map(|clock| counted.tail_ms(&clock)),
        resume_ms: resume.map(milliseconds),
        writes: WriteRates {
            before: before.map(f64::round),
            during: rate(beats, moments.begun, stopped),
            after: rate(beats, running, running.after(MARGIN)),
        },
        speed: speed::through_move(moments, beats),
        speed_at_switch: speed::at_switch(moments, beats),
        ..Observed::default()
    }
}

fn rate(beats: &Beats, from: Timestamp, to: Timestamp) -> Option<f64> {
    if to.since(from) < RATE_WINDOW_MIN {
        return None;
    }
    beats.rate(from, to).map(f64::round)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bed::beats::tests::{at, beats};

    /// Two seconds of 50 pages a millisecond; a move from 1 s on, with the guest away from 1.3 s to
    /// 1.306 s and slow during the move.
    fn series() -> Beats {
        let mut series = Vec::new();
        let mut work = 0;
        for ms in 0..2700 {
            work += match ms {
                1000..1300 => 40,
                1300..1306 => 0,
                _ => 50,
            };
            if !(1300..1306).contains(&ms) {
                series.push((ms * 1000, work));
            }
        }
        beats(&series)
    }

    fn stall(start_micros: u64, length_micros: u64) -> Stall {
        Stall {
            start_tsc: 7_000_000 + start_micros * 2600,
            length_tsc: length_micros * 2600,
        }
    }

    fn check(moments: &Moments, stalls: &[Stall], expect: &str) {
        let counted = Counted {
            groups: vec![StallGroup {
                count: 1,
                ticks: 8000 * 2600,
            }],
            watched: Duration::from_secs(2),
        };
        let seen = observe(moments, &series(), stalls, &counted);
        let writes = seen.writes;
        let text = format!(
            "gap {:?} heartbeat {:?} worst {:?} p99.9 {:?} resume {:?} writes {:?} {:?} {:?}",
            seen.guest_gap_ms,
            seen.heartbeat_gap_ms,
            seen.worst_stall_ms,
            seen.stall_p999_ms,
            seen.resume_ms,
            writes.before,
            writes.during,
            writes.after
        );
        let text = text.replace("Some(", "").replace(')', "");
        assert_eq!(text, expect);
        assert!(seen.speed.is_some(), "all of it is known over time, too");
        assert_eq!(seen.speed_at_switch.is_some(), moments.switch.is_some());
    }

    #[test]
    fn a_move_is_read_from_both_clocks() {
        let moments = Moments {
            begun: at(1_000_000),
            ended: at(1_400_000),
            switch: Some((at(1_300_100), at(1_305_800))),
        };
        let stalls = [
            stall(500_000, 30_000),
            stall(1_100_000, 8000),
            stall(1_300_090, 5800),
            stall(2_600_000, 20_000),
        ];
        check(
            &moments,
            &stalls,
            "gap 5.8 heartbeat 7.0 worst 8.0 p99.9 6.0 resume 0.2 writes 49990.0 39880.0 49991.0",
        );
        check(
            &moments,
            &[],
            "gap None heartbeat 7.0 worst 0.0 p99.9 6.0 resume 0.2 writes 49990.0 39880.0 49991.0",
        );
    }

    #[test]
    fn a_move_that_failed_has_no_switch() {
        let moments = Moments {
            begun: at(1_000_000),
            ended: at(1_200_000),
            switch: None,
        };
        check(
            &moments,
            &[stall(1_299_900, 6000)],
            "gap None heartbeat None worst 6.0 p99.9 6.0 resume None writes 49990.0 40000.0 48710.0",
        );
    }

    #[test]
    fn without_beats_nothing_is_made_up() {
        let moments = Moments {
            begun: at(1_000_000),
            ended: at(1_200_000),
            switch: Some((at(1_100_000), at(1_110_000))),
        };
        let seen = observe(
            &moments,
            &Beats::default(),
            &[stall(1_099_000, 12_000)],
            &Counted::default(),
        );
        assert_eq!(seen, Observed::default());
    }
}
