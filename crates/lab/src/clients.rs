//! Clients of a guest that serves: how they are set up, and what they saw of a move.
//!
//! Some connections ask as soon as they are answered, which tells what the guest gets done. One asks when a request
//! is due, however long answers take, which tells how long somebody waits who comes at any moment.

use limosa_pages::ByteCount;
use serde::{Deserialize, Serialize};

/// More keys take more memory of the clients than of most guests.
const KEYS_MAX: u32 = 4_000_000;
/// What tells a value from others, and far more than any use of such a store.
const VALUE_BYTES_MIN: u64 = 16;
const VALUE_BYTES_MAX: u64 = 1 << 20;
/// The guest has 128 places.
const CONNECTIONS_MAX: u8 = 100;
/// More often no client asks in time, and more seldom a short stop falls between two requests.
const PERIOD_MS_MIN: f64 = 0.2;
const PERIOD_MS_MAX: f64 = 100.0;
/// A tenth of the requests counts, whatever the others do.
const SETS_PERCENT_MAX: u8 = 90;

/// What the guest has besides its keys: its places for clients, its network, and what is just being sent.
const BESIDES_BYTES: u64 = 16 << 20;
/// Of the guest's memory for keys, each takes so much of the table at least.
const TABLE_BYTES_PER_KEY: u64 = 160;
/// It keeps keys and values in blocks of this size, of which this much holds a value.
const BLOCK_BYTES: u64 = 64;
const BLOCK_TEXT_BYTES: u64 = 60;

/// What the clients of a guest do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Clients {
    /// Keys that the guest has before it works.
    pub keys: u32,
    /// How long each value is.
    pub value_bytes: u64,
    /// Connections that ask as soon as they are answered.
    pub connections: u8,
    /// How often the connection asks that does not wait for answers.
    pub period_ms: f64,
    /// Of a hundred requests, how many set a value; ten count, and the others get one.
    pub sets_percent: u8,
}

impl Default for Clients {
    fn default() -> Self {
        Self {
            keys: 100_000,
            value_bytes: 1024,
            connections: 4,
            period_ms: 1.0,
            sets_percent: 30,
        }
    }
}

impl Clients {
    /// What is wrong with it, and what would be right.
    pub(crate) fn problem(&self) -> Option<String> {
        let all = u32::from(self.connections) + 1;
        let (least, most) = (
            ByteCount::new(VALUE_BYTES_MIN),
            ByteCount::new(VALUE_BYTES_MAX),
        );
        let wrong = [
            (
                !(1..=CONNECTIONS_MAX).contains(&self.connections),
                format!(
                    "clients is {}: give 1 to {CONNECTIONS_MAX}",
                    self.connections
                ),
            ),
            (
                !(all..=KEYS_MAX).contains(&self.keys),
                format!(
                    "keys is {}: each of {all} connections has one at least, and all have at most {KEYS_MAX}",
                    self.keys
                ),
            ),
            (
                !(VALUE_BYTES_MIN..=VALUE_BYTES_MAX).contains(&self.value_bytes),
                format!(
                    "value_size is {}: a value has {least} to {most}",
                    ByteCount::new(self.value_bytes)
                ),
            ),
            (
                !(PERIOD_MS_MIN..=PERIOD_MS_MAX).contains(&self.period_ms),
                format!(
                    "period is {} ms: give {PERIOD_MS_MIN} to {PERIOD_MS_MAX} ms",
                    self.period_ms
                ),
            ),
            (
                self.sets_percent > SETS_PERCENT_MAX,
                format!(
                    "sets is {}: give 0 to {SETS_PERCENT_MAX} of a hundred requests",
                    self.sets_percent
                ),
            ),
        ];
        let first = wrong.into_iter().find(|(is_wrong, _)| *is_wrong);
        first.map(|(_, what)| what)
    }

    /// Memory that a guest needs for the keys, a little more rather than less.
    pub const fn memory_bytes(&self) -> u64 {
        let value_blocks = 1 + self.value_bytes.div_ceil(BLOCK_TEXT_BYTES);
        let keys = self.keys as u64;
        // The blocks of key and value, and a quarter more: a fifth of the memory is a table.
        let blocks = keys * (1 + value_blocks) * BLOCK_BYTES / 4 * 5;
        let table = keys * TABLE_BYTES_PER_KEY;
        BESIDES_BYTES + if blocks > table { blocks } else { table }
    }

    /// In words, for a report.
    pub(crate) fn explain(&self) -> String {
        format!(
            "{} keys with values of {}; {} connections ask as soon as they are answered, one asks every {} ms; of \
             100 requests {} set, 10 count and {} get a value",
            self.keys,
            ByteCount::new(self.value_bytes),
            self.connections,
            self.period_ms,
            self.sets_percent,
            SETS_PERCENT_MAX - self.sets_percent,
        )
    }
}

/// What the clients saw of a move. Waits are those of the connection that asks when a request is due: from then
/// until the answer. What no client could measure is `null`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClientFigures {
    /// Connections that there were.
    pub connections: u32,
    /// Of these, how many were lost.
    pub lost_connections: u32,
    /// Of these, how many were given a wrong answer, and ended by that.
    pub wrong_answers: u32,
    /// What the first of both was.
    pub problem: Option<String>,
    /// The longest wait around the switch.
    pub gap_ms: Option<f64>,
    /// The longest wait of a request that was due from the start of the move to a second after its end.
    pub worst_wait_ms: Option<f64>,
    /// In that time the longest between two answers one after the other.
    pub silence_ms: Option<f64>,
    /// Waits of requests that were due in the second before the move.
    pub waits_before_ms: Option<Waits>,
    /// From its start to its end.
    pub waits_during_ms: Option<Waits>,
    /// In the second after its end.
    pub waits_after_ms: Option<Waits>,
    /// Answers a second to all connections that ask as soon as they are answered.
    pub requests_per_s: Throughput,
    /// The same over time.
    pub series: Option<Series>,
}

/// Where waits lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Waits {
    /// How many there are.
    pub count: u64,
    /// Half of them are not longer.
    pub p50: f64,
    /// Nor are 99 of a hundred.
    pub p99: f64,
    /// Nor are 999 of a thousand.
    pub p999: f64,
    /// Nor is any.
    pub max: f64,
}

/// Answers a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// In the second before the move.
    pub before: Option<f64>,
    /// From its start to its end.
    pub during: Option<f64>,
    /// In the second after its end.
    pub after: Option<f64>,
}

/// What clients saw in equal slots of time, one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// When the first slot begins, in milliseconds since the request for the move.
    pub begin_ms: f64,
    /// How long a slot is.
    pub slot_ms: f64,
    /// Answers a second to all connections that ask as soon as they are answered.
    pub requests_per_s: Vec<f64>,
    /// The longest wait of the requests that were due in it; `null` if none was.
    pub worst_wait_ms: Vec<Option<f64>>,
}

impl Throughput {
    /// What is left of it during the move, 0 to 1 and sometimes a little more.
    pub fn share_during(&self) -> Option<f64> {
        share(self.during?, self.before?)
    }

    /// What is back after it.
    pub fn share_after(&self) -> Option<f64> {
        share(self.after?, self.before?)
    }
}

fn share(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

impl Waits {
    /// Of these, in any order; `None` if there are none. Percentiles are by nearest rank.
    pub fn of(mut waits: Vec<f64>) -> Option<Self> {
        waits.sort_by(f64::total_cmp);
        let rank = |thousandths: usize| {
            let rank = (waits.len() * thousandths).div_ceil(1000);
            waits.get(rank.checked_sub(1)?).copied()
        };
        Some(Self {
            count: waits.len() as u64,
            p50: rank(500)?,
            p99: rank(990)?,
            p999: rank(999)?,
            max: rank(1000)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_ranked() {
        assert_eq!(Waits::of(Vec::new()), None);
        let one = Waits::of(vec![3.0]).unwrap();
        assert_eq!((one.count, one.p50, one.max), (1, 3.0, 3.0));
        let many = Waits::of((1..=2000).rev().map(f64::from).collect()).unwrap();
        let found = (many.p50, many.p99, many.p999, many.max);
        assert_eq!(found, (1000.0, 1980.0, 1998.0, 2000.0));
    }

    #[test]
    fn shares_are_of_what_was_before() {
        let seen = Throughput {
            before: Some(200.0),
            during: Some(150.0),
            after: None,
        };
        assert_eq!(
            (seen.share_during(), seen.share_after()),
            (Some(0.75), None)
        );
        let nothing = Throughput {
            before: Some(0.0),
            ..seen
        };
        assert_eq!(nothing.share_during(), None);
    }

    #[test]
    fn keys_fit_into_what_is_asked_for_them() {
        let check = |keys, value_bytes, expect| {
            let clients = Clients {
                keys,
                value_bytes,
                ..Clients::default()
            };
            assert_eq!(clients.memory_bytes() >> 20, expect);
        };
        check(1, 16, 16);
        check(100_000, 16, 38);
        check(100_000, 1024, 168);
        check(1000, 1 << 20, 1349);
    }
}
