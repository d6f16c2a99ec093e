//! What a guest may have written to the log of its VM process: it could fill the disk of its host.

use std::time::Instant;

/// At once, and in a second in the long run, in bytes.
const BURST_BYTES: u64 = 4 << 20;
const BYTES_PER_SECOND: u64 = 32 << 10;
/// What the log has in a line beside its text.
const FRAME_BYTES: u64 = 128;

/// What is left of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowance {
    bytes: u64,
    at: Instant,
    /// Lines that were left out since the last one that was not.
    left_out: u64,
}

impl Allowance {
    pub(crate) fn new() -> Self {
        Self::since(Instant::now())
    }

    const fn since(now: Instant) -> Self {
        Self {
            bytes: BURST_BYTES,
            at: now,
            left_out: 0,
        }
    }

    /// Whether a line with a text of so many bytes may be written, and then how many before it were not.
    pub(crate) fn spend(&mut self, bytes: usize) -> Option<u64> {
        self.spend_at(bytes, Instant::now())
    }

    fn spend_at(&mut self, bytes: usize, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.at).as_millis();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        let earned = passed.saturating_mul(BYTES_PER_SECOND) / 1000;
        if earned > 0 {
            self.bytes = self.bytes.saturating_add(earned).min(BURST_BYTES);
            self.at = now;
        }
        // That lines were left out is a line, too.
        let frames = if self.left_out > 0 { 2 } else { 1 };
        match self.bytes.checked_sub(frames * FRAME_BYTES + bytes as u64) {
            Some(left) => {
                self.bytes = left;
                Some(std::mem::take(&mut self.left_out))
            }
            None => {
                self.left_out += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_guest_does_not_fill_the_log() {
        let begin = Instant::now();
        let mut allowance = Allowance::since(begin);
        let line = 896;
        let mut fill = |seconds: u64| {
            let now = begin + Duration::from_secs(seconds);
            let noted: Vec<u64> = (0..10_000)
                .filter_map(|_| allowance.spend_at(line, now))
                .collect();
            (noted.len(), noted.first().copied())
        };
        assert_eq!(fill(0), (4096, Some(0)));
        assert_eq!(fill(0), (0, None));
        // A second later, and after a long silence: that lines were left out was told, too.
        assert_eq!(fill(1), (31, Some(5904 + 10_000)));
        assert_eq!(fill(10_000), (4095, Some(9969)));
    }
}
