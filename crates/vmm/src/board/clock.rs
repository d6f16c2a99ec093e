//! The real-time clock of a PC, as far as kernels read it: the time of day, by two ports.
//!
//! Its time is the host's, so it is right wherever the guest is; a guest that sets it is not obeyed.
//! Alarms and periodic interrupts are not there. Layout: Motorola MC146818.

use std::time::{SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;

/// Registers, of which the first bit of the index port is none: it masks an interrupt.
const INDEX_MASK: u8 = 0x7f;
const REGISTERS: usize = 128;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// A divider that is running at 32.768 kHz.
const DIVIDER: u8 = 0x26;
/// Hours count to 24.
const HOURS_24: u8 = 1 << 1;
/// Numbers are binary and not decimal digits.
const BINARY: u8 = 1 << 2;
/// The battery is good.
const VALID: u8 = 1 << 7;

/// The clock, and the memory beside it.
#[derive(Debug)]
pub(crate) struct RealTimeClock {
    index: u8,
    status_b: u8,
    memory: [u8; REGISTERS],
}

impl RealTimeClock {
    /// Bytes of its state.
    pub(crate) const STATE_BYTES: usize = 2 + REGISTERS;

    pub(crate) const fn new() -> Self {
        Self {
            index: 0,
            status_b: HOURS_24,
            memory: [0; REGISTERS],
        }
    }

    pub(crate) const fn set_index(&mut self, value: u8) {
        self.index = value & INDEX_MASK;
    }

    /// The register that was chosen, at this moment.
    pub(crate) fn read(&self, now: SystemTime) -> u8 {
        let moment = moment_of(now);
        let year = moment.year().unsigned_abs();
        let digits = |number: u8| match self.status_b & BINARY {
            0 => ((number / 10) << 4) | (number % 10),
            _ => number,
        };
        let part = |of: u32| u8::try_from(of % 100).expect("below a hundred");
        match self.index {
            0 => digits(moment.second()),
            2 => digits(moment.minute()),
            4 if self.status_b & HOURS_24 == 0 => {
                let afternoon = u8::from(moment.hour() >= 12) << 7;
                afternoon | digits((moment.hour() + 11) % 12 + 1)
            }
            4 => digits(moment.hour()),
            6 => moment.weekday().number_from_sunday(),
            7 => digits(moment.day()),
            8 => digits(moment.month().into()),
            9 => digits(part(year)),
            CENTURY => digits(part(year / 100)),
            STATUS_A => DIVIDER,
            STATUS_B => self.status_b,
            STATUS_D => VALID,
            other => self.memory[usize::from(other)],
        }
    }

    pub(crate) fn write(&mut self, value: u8) {
        match self.index {
            STATUS_B => self.status_b = value,
            other => self.memory[usize::from(other)] = value,
        }
    }

    pub(crate) fn save(&self) -> [u8; Self::STATE_BYTES] {
        let mut bytes = [0; Self::STATE_BYTES];
        (bytes[0], bytes[1]) = (self.index, self.status_b);
        bytes[2..].copy_from_slice(&self.memory);
        bytes
    }

    pub(crate) fn load(&mut self, state: &[u8; Self::STATE_BYTES]) {
        self.set_index(state[0]);
        self.status_b = state[1];
        self.memory.copy_from_slice(&state[2..]);
    }
}

/// In universal time; a host whose clock is before 1970 or far beyond any calendar shows 1970.
fn moment_of(now: SystemTime) -> OffsetDateTime {
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |seconds, expect: [u64; 7]| {
            let mut clock = RealTimeClock::new();
            clock.set_index(STATUS_B);
            clock.write(HOURS_24 | BINARY);
            let mut read = |index| {
                clock.set_index(index);
                u64::from(clock.read(at(seconds)))
            };
            let year = read(CENTURY) * 100 + read(9);
            let found = [year, read(8), read(7), read(6), read(4), read(2), read(0)];
            assert_eq!(found, expect);
        };
        check(0, [1970, 1, 1, 5, 0, 0, 0]);
        check(951_782_399, [2000, 2, 28, 2, 23, 59, 59]);
        check(951_782_400, [2000, 2, 29, 3, 0, 0, 0]);
        check(1_709_251_199, [2024, 2, 29, 5, 23, 59, 59]);
        check(4_107_542_400, [2100, 3, 1, 2, 0, 0, 0]);
    }

    #[test]
    fn registers_have_the_form_that_was_chosen() {
        let mut clock = RealTimeClock::new();
        let read = |clock: &mut RealTimeClock, index| {
            clock.set_index(index);
            clock.read(at(1_709_251_199))
        };
        let both = |clock: &mut RealTimeClock| [0, 4, 9, CENTURY].map(|index| read(clock, index));
        assert_eq!(both(&mut clock), [0x59, 0x23, 0x24, 0x20]);
        clock.set_index(STATUS_B);
        clock.write(BINARY);
        assert_eq!(both(&mut clock), [59, 0x80 | 11, 24, 20]);
        let mut moved = RealTimeClock::new();
        moved.load(&clock.save());
        assert_eq!(both(&mut moved), both(&mut clock));
    }
}
