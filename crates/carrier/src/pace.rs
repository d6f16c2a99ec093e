//! Room on the wire for page faults: pushes go a little slower than the wire takes them.
//!
//! An answer to a fault has a connection of its own, but no wire of its own: it stands behind whatever
//! pushes have put into queues on the way. A queue that never empties gains nothing, since the wire is as busy with
//! a short one. So a stream that pushes watches by how much its round trips are longer than the shortest one.
//! Where they stay longer it knows from what passed meanwhile how much the wire takes, and has the kernel send
//! less than that:
//!
//! ```text
//!  watching ──▶ free ── a queue ──▶ draining ── none left ──▶ paced ──▶ probing
//!      │          ▲                  │     ▲                  ▲  │         │
//!      │          └─ a while ─ off ◀─┘     └──── a queue ─────┼──┴─────────┘
//!      └── a queue in the rounds ─────────────────────────────┘
//! ```
//!
//! While it is *watching* nobody waits for pages yet. *Paced* is at nine tenths, *probing* at ever more.
//!
//! A queue that does not become shorter is somebody else's, and to yield to it would only make the guest
//! wait: then pushes go as fast as they can for a while. One that comes while no more was sent than before is
//! not the stream's either, and counts for little. The shortest round trip as a measure of standing queues is from
//! `[Nichols12]` and `[RFC6817]`, to drain and to probe from `[Cardwell16]`.

use limosa_os::socket::TcpStatus;
use limosa_pages::BytesPerSecond;
use std::time::{Duration, Instant};

/// What decides is the least delay in so long a time, or four looks: bursts come and go. In half of it while
/// nothing is known, or more is tried than is known to be taken.
const WINDOW: Duration = Duration::from_millis(20);
const LOOKS_MIN: u32 = 4;
/// A delay of more than this is a queue.
const DELAY_MAX: Duration = Duration::from_millis(1);
/// And of more than so many bytes of all streams take: twice what the kernel sends at once where ways are short,
/// at any rate.
const BURST_BYTES: f64 = 131_072.0;
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
/// A stream that gets less than this part of what it may through is not what fills the wire, or, if there is a queue,
/// the wire takes no more.
const USED_MIN: f64 = 0.8;
/// What is left of a rate after a queue that it may have had no part in.
const DOUBTED: f64 = 0.97;
/// What is left of it at least after any queue.
const FALL_MAX: f64 = 0.5;
/// Windows in which a queue has to have drained, a quarter of which is what it may hold.
const DRAIN_MAX: u32 = 25;
/// Windows in which it goes as fast as it can because it did not.
const OFF: u32 = 250;
/// No stream is made slower than this: what has been given to the kernel has to leave it within a second.
const RATE_MIN: f64 = 1e6;

/// Paces one stream.
#[derive(Debug)]
pub(crate) struct Pace {
    state: State,
    /// The kernel forgets it after some minutes.
    round_trip_min: Duration,
    window: Option<Window>,
}

/// Rates are in bytes a second; `takes` is what the wire takes of this stream.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// As fast as it goes: nobody waits for a page yet. What was learnt from a queue meanwhile.
    Watching { takes: Option<f64> },
    /// As fast as it goes: no queue was seen.
    Free,
    /// Windows that are left for the queue to drain, and to stay as it is after that.
    Draining { takes: f64, hold: u32, left: u32 },
    /// For so many windows more.
    Paced { takes: f64, hold: u32 },
    /// By which part the next window has more.
    Probing { takes: f64, rate: f64, step: f64 },
    /// As fast as it goes for so many windows more.
    Off { left: u32 },
}

#[derive(Debug)]
struct Window {
    began: Instant,
    acknowledged: u64,
    all: u64,
    delay_min: Duration,
    looks: u32,
}

impl Pace {
    pub(crate) const fn new() -> Self {
        Self {
            state: State::Watching { takes: None },
            round_trip_min: Duration::MAX,
            window: None,
        }
    }

    /// From now on pages may be waited for. `Some` if it is to be sent at another rate, or, with `None`, as fast
    /// as it goes.
    pub(crate) fn begin(&mut self) -> Option<Option<BytesPerSecond>> {
        let State::Watching { takes } = self.state else {
            return None;
        };
        self.rest();
        let paced = |takes| State::Paced { takes, hold: HOLD };
        self.enter(takes.map_or(State::Free, paced))
    }

    /// The stream had nothing to send.
    pub(crate) fn rest(&mut self) {
        self.window = None;
    }

    /// Looks at `now`; `all` bytes of all streams were acknowledged. Answers as [`Pace::begin`] does.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        status: &TcpStatus,
        all: u64,
    ) -> Option<Option<BytesPerSecond>> {
        self.round_trip_min = self.round_trip_min.min(status.round_trip_min);
        let delay = status.round_trip.saturating_sub(self.round_trip_min);
        let window = self
            .window
            .get_or_insert_with(|| Window::new(now, status.acknowledged, all));
        window.delay_min = window.delay_min.min(delay);
        window.looks += 1;
        let took = now.saturating_duration_since(window.began);
        if took < self.state.window() || window.looks < LOOKS_MIN {
            return None;
        }
        let passed = status.acknowledged.saturating_sub(window.acknowledged);
        let passed = (passed as f64 / took.as_secs_f64()).max(RATE_MIN);
        let all_passed = all.saturating_sub(window.all) as f64 / took.as_secs_f64();
        let burst = Duration::from_secs_f64(BURST_BYTES / all_passed.max(RATE_MIN));
        let delay_max = DELAY_MAX.max(burst).max(self.round_trip_min / DELAY_PART);
        let is_queue = window.delay_min > delay_max;
        self.window = Some(Window::new(now, status.acknowledged, all));
        self.enter(self.state.next(passed, is_queue))
    }

    fn enter(&mut self, state: State) -> Option<Option<BytesPerSecond>> {
        let before = self.state.rate();
        self.state = state;
        let rate = state.rate();
        (rate != before).then_some(rate)
    }
}

impl State {
    /// After a window in which so many bytes a second passed, with a queue on the way or without.
    fn next(self, passed: f64, is_queue: bool) -> Self {
        match self {
            Self::Watching { .. } if is_queue => Self::Watching {
                takes: Some(passed),
            },
            Self::Free if is_queue => Self::draining(passed, 0),
            Self::Watching { .. } | Self::Free => self,
            Self::Draining { takes, hold, .. } if !is_queue => Self::Paced { takes, hold },
            Self::Draining { left: 0, .. } => Self::Off { left: OFF },
            Self::Draining { takes, hold, left } => Self::Draining {
                takes,
                hold,
                left: left - 1,
            },
            Self::Paced { takes, .. } if is_queue => {
                let is_told = passed < USED_MIN * PACED * takes;
                Self::draining(Self::takes(takes, passed, is_told), 0)
            }
            Self::Paced { takes, hold: 0 } => Self::Probing {
                takes,
                rate: takes * PACED,
                step: PROBE,
            },
            Self::Paced { takes, hold } => Self::Paced {
                takes,
                hold: hold - 1,
            },
            Self::Probing { takes, rate, .. } if is_queue => {
                let is_told = rate > takes || passed < USED_MIN * rate;
                let now = Self::takes(takes, passed, is_told);
                let is_same = (now - takes).abs() < SAME * takes;
                Self::draining(now, if is_told && is_same { HOLD } else { 0 })
            }
            Self::Probing { rate, .. } if passed < USED_MIN * rate => self,
            Self::Probing { takes, rate, step } => Self::Probing {
                takes,
                rate: rate * (1.0 + step),
                step: PROBE_MAX.min(2.0 * step),
            },
            Self::Off { left: 0 } => Self::Free,
            Self::Off { left } => Self::Off { left: left - 1 },
        }
    }

    /// What the wire takes after a queue, if that is told by what passed, or else.
    fn takes(before: f64, passed: f64, is_told: bool) -> f64 {
        if is_told {
            // One that stood still for a moment has told nothing.
            passed.max(before * FALL_MAX)
        } else {
            before * DOUBTED
        }
    }

    const fn draining(takes: f64, hold: u32) -> Self {
        Self::Draining {
            takes,
            hold,
            left: DRAIN_MAX,
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
            Self::Watching { .. } | Self::Free | Self::Off { .. } => return None,
            Self::Draining { takes, .. } => takes * DRAINING,
            Self::Paced { takes, .. } => takes * PACED,
            Self::Probing { rate, .. } => rate,
        };
        Some(BytesPerSecond::new(rate.max(RATE_MIN) as u64))
    }
}

impl Window {
    const fn new(began: Instant, acknowledged: u64, all: u64) -> Self {
        Self {
            began,
            acknowledged,
            all,
            delay_min: Duration::MAX,
            looks: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that is paced, and what of it stands in front of the wire.
    struct Stream {
        pace: Pace,
        rate: Option<BytesPerSecond>,
        queue: f64,
        acknowledged: f64,
    }

    /// A wire, and the streams that share it.
    struct Wire {
        streams: Vec<Stream>,
        now: Instant,
        takes: f64,
        acknowledged: f64,
        /// Bytes that others have in the queue.
        others: f64,
    }

    const ROUND_TRIP: Duration = Duration::from_micros(100);

    impl Wire {
        /// One that takes 100 MB/s.
        fn new(streams: usize) -> Self {
            let stream = || Stream {
                pace: Pace::new(),
                rate: None,
                queue: 0.0,
                acknowledged: 0.0,
            };
            Self {
                streams: (0..streams).map(|_| stream()).collect(),
                now: Instant::now(),
                takes: 1e8,
                acknowledged: 0.0,
                others: 0.0,
            }
        }

        fn begin(&mut self) {
            for stream in &mut self.streams {
                if let Some(rate) = stream.pace.begin() {
                    stream.rate = rate;
                }
            }
        }

        fn state(&self) -> State {
            self.streams[0].pace.state
        }

        /// All send for some milliseconds as much as they may, together at most 150 MB/s and a queue of 3 ms.
        /// What part of the wire was used, and in which part of the time there was a queue.
        fn send(&mut self, milliseconds: u32) -> (f64, f64) {
            let count = self.streams.len() as f64;
            let (mut passed, mut queued) = (0.0, 0);
            for _ in 0..milliseconds {
                self.now += Duration::from_millis(1);
                for stream in &mut self.streams {
                    let rate = stream.rate.map_or(1.5e8, |rate| rate.get() as f64);
                    stream.queue += (rate / 1e3).min(1.5e5 / count);
                }
                let all: f64 = self.streams.iter().map(|stream| stream.queue).sum();
                let passes = (self.takes / 1e3).min(all) / all;
                let left = all * (1.0 - passes);
                let kept = (self.takes * 3e-3 / left).min(1.0);
                let delay = (left * kept + self.others) / self.takes;
                queued += u32::from(delay > 1e-3);
                self.acknowledged += all * passes;
                for stream in &mut self.streams {
                    passed += stream.queue * passes;
                    stream.acknowledged += stream.queue * passes;
                    stream.queue *= (1.0 - passes) * kept;
                    let status = TcpStatus {
                        acknowledged: stream.acknowledged as u64,
                        round_trip: ROUND_TRIP + Duration::from_secs_f64(delay),
                        round_trip_min: ROUND_TRIP,
                        ..TcpStatus::default()
                    };
                    if let Some(rate) =
                        stream
                            .pace
                            .look(self.now, &status, self.acknowledged as u64)
                    {
                        stream.rate = rate;
                    }
                }
            }
            let time = f64::from(milliseconds);
            (passed / (time / 1e3) / self.takes, f64::from(queued) / time)
        }

        #[track_caller]
        fn check(&mut self, milliseconds: u32, used_min: f64, queued_max: f64) {
            let (used, queued) = self.send(milliseconds);
            assert!(used >= used_min && queued <= queued_max, "{used} {queued}");
        }
    }

    #[test]
    fn a_queue_drains_and_the_wire_stays_busy() {
        let mut wire = Wire::new(1);
        wire.check(200, 1.0, 1.0);
        assert_eq!(wire.streams[0].rate, None, "nobody waits for pages");
        let mut wire = Wire::new(1);
        wire.begin();
        wire.check(2000, 0.88, 0.2);
        // What was learnt before counts from the first moment.
        let mut wire = Wire::new(1);
        wire.send(100);
        wire.streams[0].queue = 0.0;
        wire.begin();
        wire.check(100, 0.85, 0.0);
    }

    #[test]
    fn streams_share_a_wire() {
        let mut wire = Wire::new(4);
        wire.begin();
        wire.send(500);
        let before: Vec<f64> = wire
            .streams
            .iter()
            .map(|stream| stream.acknowledged)
            .collect();
        wire.check(5000, 0.85, 0.3);
        for (stream, before) in wire.streams.iter().zip(before) {
            let share = (stream.acknowledged - before) / 5e8;
            assert!((0.1..0.5).contains(&share), "{share}");
        }
    }

    #[test]
    fn a_wire_that_takes_more_or_less_is_followed() {
        let mut wire = Wire::new(1);
        wire.begin();
        wire.send(500);
        for takes in [5e7, 1e8, 9e7] {
            wire.takes = takes;
            wire.send(500);
            wire.check(2000, 0.85, 0.2);
        }
        // As fast as the stream can be: there is never a queue.
        wire.takes = 2e8;
        wire.send(500);
        wire.check(2000, 0.74, 0.0);
    }

    #[test]
    fn a_wire_without_a_queue_is_left_alone() {
        let mut wire = Wire::new(1);
        wire.takes = 2e8;
        wire.send(100);
        wire.begin();
        wire.send(1000);
        assert_eq!((wire.state(), wire.streams[0].rate), (State::Free, None));
    }

    #[test]
    fn a_stream_that_rests_learns_nothing_from_that() {
        let mut wire = Wire::new(1);
        // Bytes before and after a time without any, with a queue in front of both.
        wire.send(50);
        wire.now += Duration::from_millis(15);
        wire.streams[0].pace.rest();
        wire.send(5);
        wire.begin();
        let State::Paced { takes, .. } = wire.state() else {
            panic!("{:?}", wire.state());
        };
        assert!(takes > 0.9e8, "{takes}");
        assert_eq!(
            State::draining(0.0, 0).rate().unwrap().get(),
            RATE_MIN as u64
        );
    }

    #[test]
    fn a_machine_that_stood_still_makes_no_wire_slow_for_long() {
        let mut wire = Wire::new(1);
        wire.send(100);
        wire.begin();
        (wire.takes, wire.others) = (2e7, 1e5);
        wire.send(60);
        (wire.takes, wire.others) = (1e8, 0.0);
        wire.send(300);
        wire.check(100, 0.85, 1.0);
    }

    #[test]
    fn a_wire_that_stood_still_is_no_slow_one() {
        let state = State::Free.next(RATE_MIN, true);
        assert_eq!(state.rate().unwrap().get(), RATE_MIN as u64);
        let mut wire = Wire::new(1);
        wire.send(100);
        wire.begin();
        (wire.takes, wire.others) = (1e3, 1e5);
        wire.send(60);
        (wire.takes, wire.others) = (1e8, 0.0);
        wire.send(150);
        wire.check(100, 0.85, 1.0);
    }

    #[test]
    fn a_queue_of_somebody_else_is_not_yielded_to() {
        let mut wire = Wire::new(1);
        wire.begin();
        wire.send(300);
        // One that comes and goes.
        for _ in 0..50 {
            wire.others = 2e5;
            wire.check(30, 0.6, 1.0);
            wire.others = 0.0;
            wire.send(70);
        }
        // One that stays, and goes at last.
        wire.others = 1e6;
        wire.send(700);
        assert_eq!(wire.streams[0].rate, None);
        wire.others = 0.0;
        wire.send(6000);
        wire.check(1000, 0.85, 0.2);
    }
}
