//! What the guest will dirty in the round after the bulk round.
//!
//! After one round nothing is known but how much was dirtied in it, in a time that may be ten times
//! that of the round that comes: a guest that rewrites a small part of its memory looks as if it
//! could be caught up with. So the dirty log is looked at several times during the bulk round. Each
//! chunk of memory was cleared at its own moment, so each look gives a point of its curve: dirty
//! pages against time since the clear. In the next round a chunk that is sent early is dirtied for
//! nearly all of it and one that is sent late hardly at all; the sum of what the curves say for these
//! times is the forecast. Working sets and how they are sampled: `[Clark05 §5]`.
//!
//! Between two points the curve is taken as straight. It is bent downwards, so the forecast is
//! rather too low, and a further round is made rather than left out.
//!
//! Invariant: looks are taken in the bulk round only. A harvest says what may be cleared; in a later
//! round that would be pages that this round does not send.

use super::event::{Piece, SourceConfig};
use crate::time::Timestamp;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::{PageCount, PageRange};

/// Looks in a bulk round, evenly over its pages. A curve of some points is enough, and each look
/// reads the whole log.
const LOOKS: u64 = 16;
/// Time between two looks, for small guests.
const INTERVAL_MIN: Duration = Duration::from_millis(20);

/// The curves of a bulk round; see the module.
#[derive(Debug)]
pub(super) struct Forecast {
    chunk: u64,
    /// When each chunk was cleared.
    cleared: Vec<Option<Timestamp>>,
    /// Dirty pages of each chunk at these times, ascending.
    looks: Vec<(Timestamp, Vec<u32>)>,
    /// Pages that were sent when the next look is due, and how many more for the one after.
    due: u64,
    step: u64,
    asked: Timestamp,
}

impl Forecast {
    /// Of a bulk round of `planned` pages that begins `now`.
    pub(super) fn new(config: &SourceConfig, planned: PageCount, now: Timestamp) -> Self {
        let chunk = config.chunk.get();
        let chunks = config.pages().get().div_ceil(chunk);
        let step = (planned.get() / LOOKS).max(1);
        Self {
            chunk,
            cleared: vec![None; usize::try_from(chunks).expect("a count for each chunk")],
            looks: Vec::new(),
            due: step,
            step,
            asked: now,
        }
    }

    /// The log of a piece was cleared.
    pub(super) fn cleared(&mut self, piece: Piece, now: Timestamp) {
        for chunk in self.chunks(piece.range) {
            self.cleared[chunk] = Some(now);
        }
    }

    /// Whether to look now, `sent` pages being out; it is then asked for.
    pub(super) fn is_due(&mut self, sent: PageCount, now: Timestamp) -> bool {
        if sent.get() < self.due || now.since(self.asked) < INTERVAL_MIN {
            return false;
        }
        self.due = sent.get().saturating_add(self.step);
        self.asked = now;
        true
    }

    /// What a look has found.
    pub(super) fn looked(&mut self, dirty: Vec<u32>, now: Timestamp) {
        if dirty.len() == self.cleared.len() {
            self.looks.push((now, dirty));
        }
    }

    /// Pages that the guest will dirty during a round that sends the pages that are dirty `now`, by
    /// address, within `time`.
    pub(super) fn dirtied_in(&self, dirty: &[u32], now: Timestamp, time: Duration) -> PageCount {
        let total: u64 = dirty.iter().map(|&count| u64::from(count)).sum();
        let mut before = 0;
        let mut sum = 0;
        for (chunk, &count) in dirty.iter().enumerate() {
            let count = u64::from(count);
            // As old as the time that is left of the round when half of the chunk was sent.
            let left = total - before - count / 2;
            before += count;
            if let Some(cleared) = self.cleared.get(chunk).copied().flatten()
                && count > 0
            {
                let age = time.as_nanos() * u128::from(left) / u128::from(total);
                sum += self.dirty_at(chunk, cleared, (now.since(cleared), count), age);
            }
        }
        PageCount::new(sum)
    }

    /// Dirty pages of a chunk so many nanoseconds after its clear; `last` is the end of its curve.
    fn dirty_at(&self, chunk: usize, cleared: Timestamp, last: (Duration, u64), age: u128) -> u64 {
        let looks = self.looks.iter().filter(|(at, _)| *at > cleared);
        let points = looks.map(|(at, dirty)| (at.since(cleared), u64::from(dirty[chunk])));
        let mut from = (0, 0);
        for (time, count) in points.chain([last]) {
            let to = (time.as_nanos(), count.min(last.1));
            if age < to.0 {
                let rise = u128::from(to.1.saturating_sub(from.1));
                let part = rise * (age - from.0) / (to.0 - from.0).max(1);
                return from.1 + u64::try_from(part).unwrap_or(u64::MAX);
            }
            from = to;
        }
        last.1
    }

    fn chunks(&self, range: PageRange) -> core::ops::Range<usize> {
        let index = |chunk: u64| usize::try_from(chunk).unwrap_or(usize::MAX);
        let first = range.first.get() / self.chunk;
        let end = range.end().get().div_ceil(self.chunk);
        index(first)..index(end).min(self.cleared.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::Pfn;

    const CHUNKS: u64 = 40;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(milliseconds * 1_000_000)
    }

    /// A bulk round of 1000 ms over 40 chunks of 512 pages, of which the guest dirties the first
    /// ten, all of them within `sweep` ms after a clear; what the next round is said to leave, in
    /// percent of the pages that it sends.
    fn percent(sweep: u64, next: u64) -> u64 {
        let planned = PageCount::new(CHUNKS * 512);
        let config = SourceConfig::sample(planned, PageCount::new(512));
        let dirty = |now: u64| -> Vec<u32> {
            let age = |chunk: u64| now.saturating_sub(chunk * 25);
            (0..CHUNKS)
                .map(|chunk| (512 * age(chunk).min(sweep) / sweep) as u32 * u32::from(chunk < 10))
                .collect()
        };
        let mut forecast = Forecast::new(&config, planned, at(0));
        let mut looks = 0;
        for chunk in 0..CHUNKS {
            let range = PageRange::new(Pfn::new(chunk * 512), PageCount::new(512));
            let piece = Piece {
                round: 0,
                index: chunk as u32,
                range,
            };
            forecast.cleared(piece, at(chunk * 25));
            let (sent, now) = (PageCount::new((chunk + 1) * 512), chunk * 25 + 24);
            if forecast.is_due(sent, at(now)) {
                looks += 1;
                forecast.looked(dirty(now), at(now));
            }
        }
        assert!((8..=LOOKS).contains(&looks), "{looks} looks");
        forecast.looked(vec![1], at(999));
        let left = forecast.dirtied_in(&dirty(1000), at(1000), Duration::from_millis(next));
        left.get() * 100 / (10 * 512)
    }

    #[test]
    fn what_is_dirtied_faster_than_sent_is_told_from_what_is_not() {
        // Swept in a tenth of the next round: all but the chunks that go last.
        assert!(
            (80..=97).contains(&percent(25, 250)),
            "{}",
            percent(25, 250)
        );
        // Dirtied as slowly as the bulk round was long: half of what an eighth of it gives.
        assert!(
            (10..=15).contains(&percent(1000, 250)),
            "{}",
            percent(1000, 250)
        );
        assert!(percent(1000, 25) <= 2);
        // Longer than everything that was seen: no more than was dirty.
        assert_eq!(percent(25, 1_000_000), 100);
    }

    #[test]
    fn nothing_dirty_and_nothing_seen_is_nothing() {
        assert_eq!(percent(1_000_000_000, 250), 0);
    }
}
