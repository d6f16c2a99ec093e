//! Room on the wire for page faults: pushes go a little slower than the wire takes them.
//!
//! An answer to a fault has a connection of its own, but no wire of its own: it stands behind whatever
//! pushes have put into queues on the way. A queue that never empties gains nothing, since the wire is as busy with
//! a short one. So a stream that pushes watches by how much its round trips are longer than the shortest one.
//! Where they stay longer it knows from what passed meanwhile how much the wire takes, and has the kernel send
//! less than that:
//!
//! ```text
//!  free ──── a queue ───▶ draining ── none left ──▶ paced: nine tenths ──▶ probing: ever more
//!                          │     ▲                                            │
//!    off ◀── no end to it ─┘     └────────────────── a queue ─────────────────┘
//! ```
//!
//! A queue that does not become shorter is somebody else's, and to yield to it would only make the guest
//! wait: then pushes go as fast as they can. The shortest round trip as a measure of standing queues is from
//! `[Nichols12]` and `[RFC6817]`, to drain and to probe from `[Cardwell16]`.

use limosa_os::socket::TcpStatus;
use limosa_pages::BytesPerSecond;
use std::time::{Duration, Instant};

/// What decides is the least delay in so long a time: bursts come and go. In half of it while nothing is known, or
/// more is tried than is known to be taken.
const WINDOW: Duration = Duration::from_millis(20);
/// Fewer looks say nothing about the least.
const LOOKS_MIN: u32 = 4;
/// A delay of more than this is a queue: twice what the kernel sends at once takes over 1 Gbit/s, 64 KiB.
const DELAY_MAX: Duration = Duration::from_millis(1);
/// On long ways round trips differ by more: this part of the shortest one.
const DELAY_PART: u32 = 4;
/// Parts of what the wire takes: while a queue drains, and then.
const DRAINING: f64 = 0.75;
const PACED: f64 = 0.9;
/// Windows that it stays there, if a queue was met at about the same rate before, within this part of it.
const HOLD: u32 = 10;
const SAME: f64 = 0.15;
/// How much more is tried then, at first and at most; twice as much from one window to the next. It is that quick
/// since a machine that had no time for a stream makes a wire look slow.
const PROBE: f64 = 0.02;
const PROBE_MAX: f64 = 0.08;
/// A stream that sends less than this part of what it may is not what fills the wire.
const USED_MIN: f64 = 0.8;
/// Windows in which a queue has to have drained: an eighth of a second of it, then.
const DRAIN_MAX: u32 = 25;

/// Paces one stream.
#[derive(Debug)]
pub(crate) struct Pace {
    state: State,
    /// What the wire took when there was a queue last.
    takes: Option<f64>,
    window: Option<Window>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// As fast as it goes: nobody waits for a page yet.
    Watching,
    /// As fast as it goes: no queue was seen.
    Free,
    /// The wire takes so many bytes a second; windows that are left for the queue to drain, and to hold then.
    Draining { takes: f64, hold: u32, left: u32 },
    /// Bytes a second, for so many windows more.
    Paced { rate: f64, hold: u32 },
    /// Bytes a second, and by which part more in the next window.
    Probing { rate: f64, step: f64 },
    /// As fast as it goes, for good.
    Off,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    acknowledged: u64,
    delay_min: Duration,
    looks: u32,
}

impl Pace {
    pub(crate) const fn new() -> Self {
        Self {
            state: State::Watching,
            takes: None,
            window: None,
        }
    }

    /// From now on pages may be waited for. `Some` if it is to be sent at another rate, or, with `None`, as fast
    /// as it goes.
    pub(crate) fn begin(&mut self) -> Option<Option<BytesPerSecond>> {
        if self.state != State::Watching {
            return None;
        }
        self.window = None;
        self.enter(
            self.takes
                .map_or(State::Free, |takes| State::paced(takes, HOLD)),
        )
    }

    /// Looks at `now`. Answers as [`Pace::begin`] does.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        status: &TcpStatus,
    ) -> Option<Option<BytesPerSecond>> {
        let delay = status.round_trip.saturating_sub(status.round_trip_min);
        let window = self
            .window
            .get_or_insert_with(|| Window::new(now, status.acknowledged));
        window.delay_min = window.delay_min.min(delay);
        window.looks += 1;
        let took = now.saturating_duration_since(window.began);
        if took < self.state.window() || window.looks < LOOKS_MIN {
            return None;
        }
        let passed = status.acknowledged.saturating_sub(window.acknowledged);
        let passed = passed as f64 / took.as_secs_f64();
        let delay_max = DELAY_MAX.max(status.round_trip_min / DELAY_PART);
        let is_queue = window.delay_min > delay_max;
        self.window = Some(Window::new(now, status.acknowledged));
        let next = self.state.next(passed, is_queue, self.takes);
        if is_queue && !matches!(self.state, State::Draining { .. }) {
            self.takes = Some(passed);
        }
        self.enter(next)
    }

    fn enter(&mut self, state: State) -> Option<Option<BytesPerSecond>> {
        let before = self.state.rate();
        self.state = state;
        let rate = state.rate();
        (rate != before).then_some(rate)
    }
}

impl State {
    /// After a window in which so many bytes a second passed, with a queue on the way or without. `before`: what
    /// passed when there was one last.
    fn next(self, passed: f64, is_queue: bool, before: Option<f64>) -> Self {
        match self {
            Self::Watching | Self::Off => self,
            Self::Draining { takes, hold, .. } if !is_queue => Self::paced(takes, hold),
            Self::Draining { left: 0, .. } => Self::Off,
            Self::Draining { takes, hold, left } => Self::Draining {
                takes,
                hold,
                left: left - 1,
            },
            _ if is_queue => {
                let is_same = |before: f64| (passed - before).abs() < SAME * before;
                Self::Draining {
                    takes: passed,
                    hold: if before.is_some_and(is_same) { HOLD } else { 0 },
                    left: DRAIN_MAX,
                }
            }
            Self::Free => self,
            Self::Paced { rate, hold: 0 } => Self::Probing { rate, step: PROBE },
            Self::Paced { rate, hold } => Self::Paced {
                rate,
                hold: hold - 1,
            },
            Self::Probing { rate, .. } if passed < USED_MIN * rate => self,
            Self::Probing { rate, step } => Self::Probing {
                rate: rate * (1.0 + step),
                step: PROBE_MAX.min(2.0 * step),
            },
        }
    }

    const fn paced(takes: f64, hold: u32) -> Self {
        Self::Paced {
            rate: takes * PACED,
            hold,
        }
    }

    fn window(self) -> Duration {
        match self {
            Self::Free | Self::Probing { .. } => WINDOW / 2,
            _ => WINDOW,
        }
    }

    fn rate(self) -> Option<BytesPerSecond> {
        let rate = match self {
            Self::Watching | Self::Free | Self::Off => return None,
            Self::Draining { takes, .. } => takes * DRAINING,
            Self::Paced { rate, .. } | Self::Probing { rate, .. } => rate,
        };
        Some(BytesPerSecond::new(rate as u64))
    }
}

impl Window {
    const fn new(began: Instant, acknowledged: u64) -> Self {
        Self {
            began,
            acknowledged,
            delay_min: Duration::MAX,
            looks: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    /// A wire, what stands in front of it, and a stream that is paced.
    struct Wire {
        pace: Pace,
        now: Instant,
        takes: f64,
        /// Bytes that others have in the queue.
        others: f64,
        queue: f64,
        acknowledged: f64,
        rate: Option<BytesPerSecond>,
    }

    impl Wire {
        /// One that takes 100 MB/s.
        fn new() -> Self {
            Self {
                pace: Pace::new(),
                now: Instant::now(),
                takes: 1e8,
                others: 0.0,
                queue: 0.0,
                acknowledged: 0.0,
                rate: None,
            }
        }

        fn begin(&mut self) {
            if let Some(rate) = self.pace.begin() {
                self.rate = rate;
            }
        }

        /// Sends for some milliseconds as much as it may, at most 150 MB/s and a queue of 3 ms. What was sent and which
        /// parts of the time there was a queue, in words.
        fn send(&mut self, milliseconds: u32) -> (f64, f64) {
            let (begun, mut queued) = (self.acknowledged, 0);
            for _ in 0..milliseconds {
                self.now += Duration::from_millis(1);
                let rate = self.rate.map_or(1.5e8, |rate| rate.get() as f64);
                let sent = rate.min(1.5e8) / 1e3;
                let passed = (self.takes / 1e3).min(self.queue + sent);
                self.queue = (self.queue + sent - passed).min(self.takes * 3e-3);
                self.acknowledged += passed;
                let delay = (self.queue + self.others) / self.takes;
                queued += u32::from(delay > 1e-3);
                let status = TcpStatus {
                    acknowledged: self.acknowledged as u64,
                    round_trip: Duration::from_micros(100) + Duration::from_secs_f64(delay),
                    round_trip_min: Duration::from_micros(100),
                    unsent: 1,
                };
                if let Some(rate) = self.pace.look(self.now, &status) {
                    self.rate = rate;
                }
            }
            let seconds = f64::from(milliseconds) / 1e3;
            (
                (self.acknowledged - begun) / seconds / self.takes,
                f64::from(queued) / f64::from(milliseconds),
            )
        }
    }

    #[test]
    fn a_queue_drains_and_the_wire_stays_busy() {
        let mut wire = Wire::new();
        assert_eq!(wire.send(200).0, 1.0, "nobody waits for pages");
        wire.begin();
        let (used, queued) = wire.send(2000);
        assert!(used > 0.88, "{used}");
        assert!(queued < 0.2, "{queued}");
        // What was learnt before counts from the first moment.
        let mut log = String::new();
        let mut wire = Wire::new();
        wire.send(100);
        wire.queue = 0.0;
        wire.begin();
        for _ in 0..5 {
            write!(log, "{} ", (wire.send(20).1 * 20.0).round()).unwrap();
        }
        assert_eq!(log, "0 0 0 0 0 ");
    }

    #[test]
    fn a_wire_that_takes_more_or_less_is_followed() {
        let mut wire = Wire::new();
        wire.begin();
        wire.send(500);
        wire.takes = 5e7;
        wire.send(500);
        let (used, queued) = wire.send(2000);
        assert!(used > 0.88 && queued < 0.2, "{used} {queued}");
        wire.takes = 1e8;
        wire.send(1500);
        let (used, queued) = wire.send(2000);
        assert!(used > 0.85 && queued < 0.2, "{used} {queued}");
        // As fast as the stream can be: there is never a queue.
        wire.takes = 2e8;
        wire.send(1500);
        let (used, queued) = wire.send(2000);
        assert!(used > 0.7 && queued == 0.0, "{used} {queued}");
    }

    #[test]
    fn a_wire_without_a_queue_is_left_alone() {
        let mut wire = Wire::new();
        wire.takes = 2e8;
        wire.send(100);
        wire.begin();
        wire.send(1000);
        assert_eq!((wire.pace.state, wire.rate), (State::Free, None));
    }

    #[test]
    fn a_machine_that_stood_still_makes_no_wire_slow_for_long() {
        let mut wire = Wire::new();
        wire.begin();
        while !matches!(wire.pace.state, State::Paced { .. }) {
            wire.send(1);
        }
        (wire.takes, wire.others) = (2e7, 1e5);
        wire.send(60);
        (wire.takes, wire.others) = (1e8, 0.0);
        wire.send(300);
        let (used, _) = wire.send(100);
        assert!(used > 0.85, "{used}");
    }

    #[test]
    fn a_queue_of_somebody_else_is_not_yielded_to() {
        let mut wire = Wire::new();
        wire.begin();
        wire.others = 1e6;
        wire.send(700);
        assert_eq!((wire.pace.state, wire.rate), (State::Off, None));
    }
}
