//! How many push streams are in use: as an operator asks for it, and the law of `auto`.
//!
//! More streams help where one of them is at its limit and something else is not: a processor, while
//! pages are coded or encrypted and others are idle; the window of a connection, where the way is
//! long; a queue of the network card. They do not help a link that is full, and they cost what threads
//! cost. Which of these is the case the law finds out by trying: one stream more, or one less, for as
//! long as it takes to see what is delivered.
//!
//! ```text
//!            ┌───────────────── a tenth more: keep it, go on up ──┐
//!            ▼                                                    │
//!  Base ─▶ one more ── no gain ─▶ Base ─▶ one less ── a loss ─▶ Base ─▶ rest, each time longer
//!                                            ▲    │
//!                                            └────┘ as much as before: keep it, go on down
//! ```
//!
//! A step up has to bring a tenth (of many streams, half of what one carries), a step down may cost a
//! thirtieth: of two numbers that do alike the smaller one is taken, and between them the law does not
//! swing. What is compared is the content of
//! pages, not bytes on the wire: a coding that saves bytes is no loss. After both steps have failed
//! the law rests, twice as long each time, unless what is delivered changes by itself.
//!
//! Idea of several streams: `[QEMU]` multifd. Differs: there their number is the operator's and fixed at
//! the start. Nor does it follow from the speed of a network card, which says nothing about processors,
//! coding or the way beyond it.

use crate::time::Timestamp;
use crate::wire::STREAMS_MAX;
use alloc::string::String;
use core::fmt;
use core::str::FromStr;
use core::time::Duration;
use limosa_pages::{ByteCount, BytesPerSecond};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Connections that are opened if no more are asked for, so that the number in use can grow: an idle one
/// costs a parked thread on either side, and a round does not wait for it.
pub const OPEN_MIN: u8 = 8;
/// In use at first: one core fills a link of 10 Gbit/s, two hide its pauses.
pub const FIRST: u8 = 2;
/// Shortest time over which is measured: longer than the pauses of a busy host.
const WINDOW_MIN: Duration = Duration::from_millis(100);
/// Fewest pieces of each stream in that time: what is counted is whole pieces.
const WINDOW_PIECES: u32 = 4;
/// Pieces that each stream may still have from before a change.
const SETTLING_PIECES: u32 = 2;
/// What one more has to bring, in thousandths of the rate before; half of what a stream carries on an
/// average, if that is less.
const GAIN: u64 = 100;
/// What one less may cost, in thousandths.
const LOSS: u64 = 30;
/// A rate outside of these, in per cent of what it was, ends a rest.
const USUAL: core::ops::RangeInclusive<u64> = 75..=133;
/// First and longest rest between two rounds of trying.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(16));

/// How many push streams are to be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Streams(
    /// 0 is `auto`.
    u8,
);

impl Streams {
    /// As many as pay.
    pub const AUTO: Self = Self(0);

    /// So many, 1 to [`STREAMS_MAX`]; `None` if that is out of range.
    pub const fn fixed(number: u8) -> Option<Self> {
        if number >= 1 && number <= STREAMS_MAX {
            Some(Self(number))
        } else {
            None
        }
    }

    /// How many, if that was said.
    pub const fn number(self) -> Option<u8> {
        match self.0 {
            0 => None,
            number => Some(number),
        }
    }

    /// Connections to open for a migration that begins with these: [`OPEN_MIN`], or as many as are
    /// asked for.
    pub const fn connections(self) -> u8 {
        if self.0 > OPEN_MIN { self.0 } else { OPEN_MIN }
    }
}

impl fmt::Display for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number() {
            None => f.write_str("auto"),
            Some(number) => number.fmt(f),
        }
    }
}

impl FromStr for Streams {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::AUTO);
        }
        let number = text.parse().ok().and_then(Self::fixed);
        number.ok_or_else(|| alloc::format!("expected auto, or a number from 1 to {STREAMS_MAX}"))
    }
}

impl Serialize for Streams {
    /// A number or `"auto"`; where nobody reads it, a byte.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.number() {
            None if serializer.is_human_readable() => serializer.serialize_str("auto"),
            _ => serializer.serialize_u8(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Streams {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return deserializer.deserialize_any(Reader);
        }
        let number = u8::deserialize(deserializer)?;
        let known = (number <= STREAMS_MAX).then_some(Self(number));
        known.ok_or_else(|| D::Error::custom("a number of streams out of range"))
    }
}

struct Reader;

impl Visitor<'_> for Reader {
    type Value = Streams;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"auto\" or a number of streams from 1 to {STREAMS_MAX}")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Streams, E> {
        let fixed = u8::try_from(number).ok().and_then(Streams::fixed);
        fixed.ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Streams, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &self)),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Streams, E> {
        if text == "auto" {
            return Ok(Streams::AUTO);
        }
        Err(E::invalid_value(Unexpected::Str(text), &self))
    }
}

/// Says how many streams pay, from what is delivered with how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Climber {
    in_use: u8,
    most: u8,
    step: Step,
    /// With one more, or one less, there was no better rate lately.
    has_failed: (bool, bool),
    rest: Duration,
    meter: Meter,
}

/// What the present rate will tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// What the number in use is good for.
    Base,
    /// Whether one more is better than this rate.
    More(BytesPerSecond),
    /// Whether one less does as well.
    Less(BytesPerSecond),
    /// Whether it is still what it was.
    Rest {
        until: Timestamp,
        rate: BytesPerSecond,
    },
}

/// Measures what is delivered while all streams in use are busy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Meter {
    /// Pieces that are not counted: the streams may have them from before.
    unsettled: u32,
    since: Option<Timestamp>,
    pieces: u32,
    content: ByteCount,
}

impl Climber {
    /// Begins with [`FIRST`] of at most `most` streams.
    pub fn new(most: u8) -> Self {
        Self {
            in_use: FIRST.min(most).max(1),
            most,
            step: Step::Base,
            has_failed: (false, false),
            rest: REST.0,
            meter: Meter::default(),
        }
    }

    /// How many to use now.
    pub const fn in_use(&self) -> u8 {
        self.in_use
    }

    /// Begins anew with so many, at most as many as there are.
    pub fn restart(&mut self, in_use: u8) {
        *self = Self {
            in_use: in_use.min(self.most).max(1),
            ..Self::new(self.most)
        };
    }

    /// What comes next says nothing together with what came before.
    pub fn interrupt(&mut self) {
        self.meter = Meter {
            unsettled: self.meter.unsettled,
            ..Meter::default()
        };
    }

    /// A piece with so much content, zero pages left out, was handed over by some stream. `all_busy` if
    /// every stream in use has something to go on with; otherwise a rate would say nothing.
    pub fn sent(&mut self, now: Timestamp, content: ByteCount, all_busy: bool) {
        if !all_busy {
            return self.interrupt();
        }
        let pieces = WINDOW_PIECES * u32::from(self.in_use);
        if let Some(rate) = self.meter.sent(now, content, pieces) {
            self.measured(now, rate);
        }
    }

    fn measured(&mut self, now: Timestamp, rate: BytesPerSecond) {
        match self.step {
            Step::Base => self.next(now, rate),
            Step::More(base) if is_at_least(rate, 1000 + self.gain(), base) => {
                self.has_failed = (false, true);
                self.rest = REST.0;
                self.next(now, rate);
            }
            Step::Less(base) if is_at_least(rate, 1000 - LOSS, base) => {
                self.has_failed = (true, false);
                self.next(now, rate);
            }
            Step::More(_) => {
                self.has_failed.0 = true;
                self.change(self.in_use - 1, Step::Base);
            }
            Step::Less(_) => {
                self.has_failed.1 = true;
                self.change(self.in_use + 1, Step::Base);
            }
            Step::Rest { until, rate: usual } => {
                let per_cent = rate.get().saturating_mul(100) / usual.get().max(1);
                let is_usual = USUAL.contains(&per_cent);
                if !is_usual {
                    self.rest = REST.0;
                }
                if !is_usual || now >= until {
                    self.has_failed = (false, false);
                    self.next(now, rate);
                }
            }
        }
    }

    /// What the stream that was added has to bring, in thousandths.
    fn gain(&self) -> u64 {
        GAIN.min(500 / u64::from(self.in_use - 1).max(1))
    }

    /// With the number in use such a rate is had: what to try next.
    fn next(&mut self, now: Timestamp, rate: BytesPerSecond) {
        let (more_failed, less_failed) = self.has_failed;
        if !more_failed && self.in_use < self.most {
            self.change(self.in_use + 1, Step::More(rate));
        } else if !less_failed && self.in_use > 1 {
            self.change(self.in_use - 1, Step::Less(rate));
        } else {
            let until = now.after(self.rest);
            self.step = Step::Rest { until, rate };
            self.rest = (self.rest * 2).min(REST.1);
        }
    }

    fn change(&mut self, in_use: u8, step: Step) {
        let pieces = SETTLING_PIECES * u32::from(in_use.max(self.in_use));
        self.in_use = in_use;
        self.step = step;
        self.meter = Meter {
            unsettled: pieces,
            ..Meter::default()
        };
    }
}

impl Meter {
    /// A rate, if so many pieces and enough time make one.
    fn sent(&mut self, now: Timestamp, content: ByteCount, pieces: u32) -> Option<BytesPerSecond> {
        if self.unsettled > 0 {
            self.unsettled -= 1;
            return None;
        }
        // From the end of a piece to the end of another.
        let Some(since) = self.since else {
            self.since = Some(now);
            return None;
        };
        self.pieces += 1;
        self.content = self.content.saturating_add(content);
        let time = now.since(since);
        if self.pieces < pieces || time < WINDOW_MIN {
            return None;
        }
        let content = self.content;
        *self = Self {
            since: Some(now),
            ..Self::default()
        };
        BytesPerSecond::measured(content, time)
    }
}

/// Whether a rate is at least so many thousandths of another one.
fn is_at_least(rate: BytesPerSecond, thousandths: u64, of: BytesPerSecond) -> bool {
    rate.get() >= of.get() / 1000 * thousandths
}

#[cfg(test)]
mod tests;
