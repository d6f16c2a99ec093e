//! From what clients have seen to what a move cost them.
//!
//! ```text
//!   a second │ begun          stopped  running      ended │ a second
//!  ──────────┼────────────────────┤        ├──────────────┼──────────▶
//!    before  │                 during                     │   after
//!                            client gap
//! ```
//!
//! A request belongs to the time at which it was due. The client gap is the longest wait of a request that was due
//! before the guest ran again, and answered after it had stopped.

use crate::bed::observation::{MARGIN, Moments, earlier, milliseconds};
use limosa_clients::Seen;
use limosa_clients::load::Request;
use limosa_engine::Timestamp;
use limosa_lab::clients::{ClientFigures, Series, Throughput, Waits};
use std::time::Duration;

/// A slot of the series holds some requests of the usual period at least.
const SLOT_MS_MIN: usize = 10;
/// More slots than a chart has points to show.
const SLOTS_MAX: usize = 1000;

/// The moments of a move since the clients began to work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    from: Duration,
    begun: Duration,
    ended: Duration,
    to: Duration,
    switch: Option<(Duration, Duration)>,
}

impl Window {
    pub(super) fn new(moments: &Moments, began: Timestamp) -> Self {
        let since = |moment: Timestamp| moment.since(began);
        Self {
            from: since(earlier(moments.begun, MARGIN)),
            begun: since(moments.begun),
            ended: since(moments.ended),
            to: since(moments.ended.after(MARGIN)),
            switch: moments
                .switch
                .map(|(stopped, running)| (since(stopped), since(running))),
        }
    }
}

/// Adds what was measured.
pub(super) fn add(told: ClientFigures, seen: &Seen, window: &Window) -> ClientFigures {
    let Window {
        from,
        begun,
        ended,
        to,
        switch,
    } = *window;
    let waits = |from, to| {
        Waits::of(
            due(seen, from, to)
                .map(|one| milliseconds(one.wait))
                .collect(),
        )
    };
    let around = |(stopped, running): (Duration, Duration)| {
        let meets = |one: &&Request| one.due <= running && one.due + one.wait >= stopped;
        longest(seen.requests.iter().filter(meets))
    };
    ClientFigures {
        gap_ms: switch.and_then(around),
        worst_wait_ms: longest(due(seen, begun, to)),
        silence_ms: silence(due(seen, begun, to)),
        waits_before_ms: waits(from, begun),
        waits_during_ms: waits(begun, ended),
        waits_after_ms: waits(ended, to),
        requests_per_s: Throughput {
            before: rate(seen, from, begun),
            during: rate(seen, begun, ended),
            after: rate(seen, ended, to),
        },
        series: series(seen, window),
        ..told
    }
}

/// Requests that were due within `from..to`.
fn due(seen: &Seen, from: Duration, to: Duration) -> impl Iterator<Item = &Request> {
    let first = seen.requests.partition_point(|one| one.due < from);
    let end = seen.requests.partition_point(|one| one.due < to);
    seen.requests[first..end.max(first)].iter()
}

fn longest<'a>(requests: impl Iterator<Item = &'a Request>) -> Option<f64> {
    requests.map(|one| milliseconds(one.wait)).reduce(f64::max)
}

/// The longest time between two answers one after the other.
fn silence<'a>(requests: impl Iterator<Item = &'a Request>) -> Option<f64> {
    let answered = requests.map(|one| one.due + one.wait);
    let mut last = None;
    let gaps = answered.filter_map(|now| Some(now.saturating_sub(last.replace(now)?)));
    gaps.max().map(milliseconds)
}

/// Answers a second, in whole milliseconds; `None` of a time without length.
fn rate(seen: &Seen, from: Duration, to: Duration) -> Option<f64> {
    let (from, to) = (whole(from), whole(to));
    let length = to.checked_sub(from).filter(|length| *length > 0)?;
    Some((answers(seen, from, to) as f64 / length as f64 * 1000.0).round())
}

/// Answers within these milliseconds; there are none behind the last one that was noted.
fn answers(seen: &Seen, from: usize, to: usize) -> u64 {
    let end = to.min(seen.answers.len());
    let counts = seen.answers.get(from..end).unwrap_or_default();
    counts.iter().map(|count| u64::from(*count)).sum()
}

fn whole(time: Duration) -> usize {
    usize::try_from(time.as_millis()).unwrap_or(usize::MAX)
}

/// All of it over time, in slots that are as long as they must be to be few enough.
fn series(seen: &Seen, window: &Window) -> Option<Series> {
    let (from, to) = (whole(window.from), whole(window.to));
    let length = to.checked_sub(from)?;
    let slot = SLOT_MS_MIN.max(length.div_ceil(SLOTS_MAX).next_multiple_of(SLOT_MS_MIN));
    // The last one is left out unless it is whole.
    let slots = length / slot;
    let time = |slots: usize| Duration::from_millis((from + slots * slot) as u64);
    let begins = (0..slots).map(|index| from + index * slot);
    Some(Series {
        begin_ms: from as f64 - milliseconds(window.begun),
        slot_ms: slot as f64,
        requests_per_s: begins
            .map(|begin| answers(seen, begin, begin + slot) as f64 / slot as f64 * 1000.0)
            .map(f64::round)
            .collect(),
        worst_wait_ms: (0..slots)
            .map(|index| longest(due(seen, time(index), time(index + 1))))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(5_000_000_000 + milliseconds * 1_000_000)
    }

    /// A move from 1.5 s to 2.1 s after the clients began, with a stop of 20 ms at 1.7 s.
    fn moments() -> Moments {
        Moments {
            begun: at(1500),
            ended: at(2100),
            switch: Some((at(1700), at(1720))),
        }
    }

    /// 20 answers a millisecond, half of that during the move, none in the stop; a request each millisecond waits
    /// for 0.2 ms, and for the end of the stop; one waits for 9 ms after the move.
    fn seen() -> Seen {
        let answers = (0..3200).map(|ms| match ms {
            1700..1720 => 0,
            1500..2100 => 10,
            _ => 20,
        });
        let requests = (0..3200).map(|ms: u64| Request {
            due: Duration::from_millis(ms),
            wait: match ms {
                1700..1720 => Duration::from_millis(1720 - ms) + Duration::from_micros(500),
                2500 => Duration::from_millis(9),
                _ => Duration::from_micros(200),
            },
        });
        Seen {
            answers: answers.collect(),
            requests: requests.collect(),
        }
    }

    #[test]
    fn each_moment_of_a_stop_counts() {
        let window = Window::new(&moments(), at(0));
        let told = ClientFigures {
            connections: 5,
            ..ClientFigures::default()
        };
        let figures = add(told, &seen(), &window);
        let (before, during) = (
            figures.waits_before_ms.unwrap(),
            figures.waits_during_ms.unwrap(),
        );
        let text = format!(
            "{} gap {:?} worst {:?} silence {:?} before {} {} {} during {} {} {} {} {:?}",
            figures.connections,
            figures.gap_ms,
            figures.worst_wait_ms,
            figures.silence_ms,
            before.count,
            before.p50,
            before.p999,
            during.count,
            during.p50,
            during.p99,
            during.max,
            figures.requests_per_s,
        );
        assert_eq!(
            text,
            "5 gap Some(20.5) worst Some(20.5) silence Some(21.3) before 1000 0.2 0.2 during 600 0.2 14.5 20.5 Throughput { before: \
             Some(20000.0), during: Some(9667.0), after: Some(20000.0) }"
        );
        let series = figures.series.unwrap();
        assert_eq!((series.begin_ms, series.slot_ms), (-1000.0, 10.0));
        assert_eq!(series.requests_per_s.len(), 260);
        let slots: Vec<_> = (118..123)
            .map(|slot| (series.requests_per_s[slot], series.worst_wait_ms[slot]))
            .collect();
        assert_eq!(
            slots,
            [
                (10_000.0, Some(0.2)),
                (10_000.0, Some(0.2)),
                (0.0, Some(20.5)),
                (0.0, Some(10.5)),
                (10_000.0, Some(0.2))
            ]
        );
    }

    #[test]
    fn a_move_that_failed_has_no_gap_and_waits_all_the_same() {
        let moments = Moments {
            switch: None,
            ..moments()
        };
        let window = Window::new(&moments, at(0));
        let figures = add(ClientFigures::default(), &seen(), &window);
        assert_eq!((figures.gap_ms, figures.worst_wait_ms), (None, Some(20.5)));
    }

    #[test]
    fn a_long_move_has_long_slots_and_what_was_not_seen_is_not_made_up() {
        let moments = Moments {
            begun: at(1500),
            ended: at(61_500),
            switch: None,
        };
        let window = Window::new(&moments, at(0));
        let figures = add(ClientFigures::default(), &seen(), &window);
        let series = figures.series.unwrap();
        assert_eq!((series.slot_ms, series.requests_per_s.len()), (70.0, 885));
        assert_eq!(series.worst_wait_ms[884], None);
        assert_eq!(figures.waits_after_ms, None);
    }
}
