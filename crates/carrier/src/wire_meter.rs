//! How fast the wire takes the bytes of a stream.
//!
//! How long a write takes says little. While pages are coded the buffer drains, and the next write finds
//! room and returns at once, on the slowest wire. So a stream looks before each write at what has been
//! acknowledged since the look before. If bytes waited all that time, so many passed because the wire took no more;
//! otherwise the wire could have taken more, and no more than that is known.

use limosa_os::socket::TcpStatus;
use std::time::{Duration, Instant};

/// Shorter than this acknowledgements come too unevenly to tell a rate.
const WINDOW_MIN: Duration = Duration::from_millis(2);

/// One stream's.
#[derive(Debug, Default)]
pub(crate) struct WireMeter {
    window: Option<Window>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    acknowledged: u64,
    buffer_limited: Duration,
    /// Bytes have waited at each look since.
    is_full: bool,
}

/// What passed in some time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Passed {
    /// Bytes that were acknowledged.
    pub(crate) bytes: u64,
    /// Within this time, longer than nothing.
    pub(crate) took: Duration,
    /// The wire was never without something to send, so that it takes no more than this.
    pub(crate) is_full: bool,
}

impl WireMeter {
    /// Looks at `now`, before the next bytes are written. With `waited`, these had to wait for what came before them.
    /// `None` while there is nothing to tell.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        status: &TcpStatus,
        waited: bool,
    ) -> Option<Passed> {
        let is_full = waited || status.unsent > 0;
        let Some(window) = &mut self.window else {
            self.window = Some(Window::new(now, status));
            return None;
        };
        window.is_full &= is_full;
        let bytes = status.acknowledged.saturating_sub(window.acknowledged);
        let took = now.saturating_duration_since(window.began);
        if took < WINDOW_MIN || bytes == 0 {
            return None;
        }
        // On a long way nothing is unsent, since all that the buffer holds is on its way.
        let limited = status.buffer_limited.saturating_sub(window.buffer_limited);
        let is_full = window.is_full || limited > took / 2;
        self.window = Some(Window::new(now, status));
        Some(Passed {
            bytes,
            took,
            is_full,
        })
    }

    /// The stream had nothing to send.
    pub(crate) fn rest(&mut self) {
        self.window = None;
    }
}

impl Window {
    const fn new(began: Instant, status: &TcpStatus) -> Self {
        Self {
            began,
            acknowledged: status.acknowledged,
            buffer_limited: status.buffer_limited,
            is_full: true,
        }
    }
}

impl Passed {
    /// Seconds a byte.
    pub(crate) fn cost(&self) -> f64 {
        self.took.as_secs_f64() / self.bytes.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(acknowledged: u64, unsent: u64) -> TcpStatus {
        TcpStatus {
            acknowledged,
            unsent,
            ..TcpStatus::default()
        }
    }

    #[test]
    fn a_rate_is_told_while_something_waits_and_a_bound_otherwise() {
        let mut meter = WireMeter::default();
        let begin = Instant::now();
        let mut look = |milliseconds, acknowledged, unsent, waited| {
            let now = begin + Duration::from_millis(milliseconds);
            let passed = meter.look(now, &status(acknowledged, unsent), waited)?;
            Some((
                passed.took.as_millis(),
                passed.bytes,
                if passed.is_full { "full" } else { "not full" },
            ))
        };
        assert_eq!(look(0, 1, 0, false), None);
        assert_eq!(look(1, 100, 5, false), None, "too short");
        assert_eq!(look(3, 301, 5, false), Some((3, 300, "full")));
        assert_eq!(look(5, 501, 0, true), Some((2, 200, "full")));
        assert_eq!(look(6, 601, 0, false), None);
        assert_eq!(look(8, 801, 5, false), Some((3, 300, "not full")));
        assert_eq!(look(20, 801, 5, false), None, "nothing passed");
        assert_eq!(look(30, 802, 5, false), Some((22, 1, "full")));
    }

    #[test]
    fn a_wire_is_full_that_takes_all_of_the_buffer() {
        let mut meter = WireMeter::default();
        let begin = Instant::now();
        for (milliseconds, limited, expect) in
            [(0, 7, None), (10, 13, Some(true)), (20, 17, Some(false))]
        {
            let status = TcpStatus {
                buffer_limited: Duration::from_millis(limited),
                ..status(1 + milliseconds, 0)
            };
            let passed = meter.look(begin + Duration::from_millis(milliseconds), &status, false);
            assert_eq!(passed.map(|passed| passed.is_full), expect);
        }
    }

    #[test]
    fn what_lies_before_a_rest_counts_for_nothing() {
        let mut meter = WireMeter::default();
        let begin = Instant::now();
        assert_eq!(meter.look(begin, &status(1, 0), true), None);
        meter.rest();
        let later = begin + Duration::from_secs(1);
        assert_eq!(meter.look(later, &status(100, 0), true), None);
    }
}
