//! What a guest asked for when it ran without its pages, in that order: what it will need first when it
//! moves the next time.
//!
//! `[Ustiugov21 §5]` records the pages that a function's first run faults on and fetches them at once before
//! the next ones. A guest that goes on from where it was needs much of the same again, too: its working
//! set. Differs: later moves add to the record, since pages that a good record brings early are not asked
//! for any more; and all pages come in the end, so the record only says which come first.
//!
//! Bounded by [`RUNS_MAX`]: what is asked for after that goes without. A record is a hint. One that is
//! wrong costs the guest some waits and nothing else, so it is kept without a checksum and without `fsync`.

use limosa_pages::{PageCount, PageRange, PageSet, Pfn};

/// Most runs of pages of a record: 512 KiB of it, in memory, on disk and in the first frame of a move.
/// They stand for 256 MiB that are asked for page by page, in an order without neighbours.
pub const RUNS_MAX: usize = 1 << 16;
/// Bytes of an encoded run: its first page and their number.
const RUN_BYTES: usize = 8;

/// Pages in the order in which they were asked for. No page is in it twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demanded {
    runs: Vec<PageRange>,
}

/// Bytes that are no record of this guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record of the pages that the guest asked for in earlier moves is malformed")]
pub struct NoRecord;

impl Demanded {
    /// Reads what [`Demanded::encode`] made, for a guest of `memory` pages.
    ///
    /// # Errors
    /// Half a run or too many of them, pages beyond the guest's memory, a page twice.
    pub fn decode(bytes: &[u8], memory: PageCount) -> Result<Self, NoRecord> {
        if !bytes.len().is_multiple_of(RUN_BYTES) || bytes.len() / RUN_BYTES > RUNS_MAX {
            return Err(NoRecord);
        }
        let mut fresh = PageSet::full(memory);
        let mut runs = Vec::with_capacity(bytes.len() / RUN_BYTES);
        for run in bytes.chunks_exact(RUN_BYTES) {
            let number =
                |at: usize| u32::from_le_bytes([run[at], run[at + 1], run[at + 2], run[at + 3]]);
            let (first, count) = (u64::from(number(0)), u64::from(number(4)));
            let run = PageRange::new(Pfn::new(first), PageCount::new(count));
            if count == 0 || first + count > memory.get() || fresh.count_range(run) != run.count {
                return Err(NoRecord);
            }
            fresh.remove_range(run);
            runs.push(run);
        }
        Ok(Self { runs })
    }

    /// As it is kept and sent: for each run its first page and how many they are, 32 bits each,
    /// little-endian. Empty if nothing is recorded.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.runs.len() * RUN_BYTES);
        for run in &self.runs {
            for number in [run.first.get(), run.count.get()] {
                let number = u32::try_from(number).expect("looked at when it was noted");
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        bytes
    }

    /// What was asked for in this move, then what `earlier` ones have recorded, of a guest of `memory`
    /// pages: a guest that is moved again and again keeps its record, the newest in front, and what is
    /// too old for [`RUNS_MAX`] is dropped.
    pub fn after(&self, earlier: &Self, memory: PageCount) -> Self {
        let mut record = Record::new(memory);
        let runs = self.runs.iter().chain(&earlier.runs);
        runs.for_each(|&run| record.note(run));
        record.demanded()
    }

    /// The pages, in order.
    pub fn runs(&self) -> &[PageRange] {
        &self.runs
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// A record that is being made.
#[derive(Debug)]
pub(crate) struct Record {
    runs: Vec<PageRange>,
    /// Pages that are not in it.
    fresh: PageSet,
}

impl Record {
    pub(crate) fn new(memory: PageCount) -> Self {
        Self {
            runs: Vec::new(),
            fresh: PageSet::full(memory),
        }
    }

    /// These are asked for now. What stands in the record stays where it is.
    pub(crate) fn note(&mut self, range: PageRange) {
        // Beyond 16 TiB a guest goes without.
        let limit = self.fresh.capacity().get().min(u64::from(u32::MAX));
        if range.end().get() > limit {
            return;
        }
        let parts: Vec<PageRange> = self.fresh.runs_in(range).collect();
        for part in parts {
            let is_full = self.runs.len() >= RUNS_MAX;
            match self.runs.last_mut() {
                Some(last) if last.end() == part.first => {
                    last.count = last.count.saturating_add(part.count);
                }
                _ if is_full => return,
                _ => self.runs.push(part),
            }
            self.fresh.remove_range(part);
        }
    }

    pub(crate) fn demanded(&self) -> Demanded {
        Demanded {
            runs: self.runs.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: PageCount = PageCount::new(1 << 18);

    fn demanded(runs: &[(u64, u64)]) -> Demanded {
        let mut record = Record::new(MEMORY);
        for &(first, count) in runs {
            record.note(PageRange::new(Pfn::new(first), PageCount::new(count)));
        }
        record.demanded()
    }

    /// The runs of a record, which survives its encoding.
    fn check(record: &Demanded, expect: &str) {
        let runs = record.runs().iter();
        let text: Vec<String> = runs
            .map(|run| format!("{}+{}", run.first.get(), run.count.get()))
            .collect();
        assert_eq!(text.join(" "), expect);
        assert_eq!(
            Demanded::decode(&record.encode(), MEMORY).as_ref(),
            Ok(record)
        );
    }

    #[test]
    fn pages_are_recorded_once_in_the_order_in_which_they_are_asked_for() {
        check(&demanded(&[]), "");
        check(&demanded(&[(7, 1), (5, 1), (6, 1), (5, 1)]), "7+1 5+2");
        // A huge page is asked for whole by each fault in it.
        check(
            &demanded(&[(512, 512), (512, 512), (500, 20)]),
            "512+512 500+12",
        );
        check(&demanded(&[(MEMORY.get() - 1, 2), (3, 1)]), "3+1");
    }

    #[test]
    fn a_later_move_goes_first_and_loses_nothing() {
        let first = demanded(&[(100, 10), (50, 1), (7, 1)]);
        let second = demanded(&[(50, 1), (200, 1), (105, 1)]);
        check(
            &second.after(&first, MEMORY),
            "50+1 200+1 105+1 100+5 106+4 7+1",
        );
        check(
            &Demanded::default().after(&first, MEMORY),
            "100+10 50+1 7+1",
        );
    }

    #[test]
    fn a_record_has_an_end() {
        let every_other: Vec<(u64, u64)> = (0..MEMORY.get() / 2).map(|n| (2 * n, 1)).collect();
        let full = demanded(&every_other);
        assert_eq!(full.runs().len(), RUNS_MAX);
        assert_eq!(full.encode().len(), 512 << 10);
        assert_eq!(Demanded::decode(&full.encode(), MEMORY), Ok(full.clone()));
        let newest = demanded(&[(1, 1)]).after(&full, MEMORY);
        assert_eq!(newest.runs().len(), RUNS_MAX);
        assert_eq!(newest.runs()[..2], demanded(&[(1, 1), (0, 1)]).runs()[..2]);
        let mut bytes = full.encode();
        bytes.extend_from_slice(&demanded(&[(1, 1)]).encode());
        assert_eq!(Demanded::decode(&bytes, MEMORY), Err(NoRecord));
    }

    #[test]
    fn foreign_bytes_are_no_record() {
        let check = |numbers: &[u32]| {
            let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            assert_eq!(
                Demanded::decode(&bytes, MEMORY),
                Err(NoRecord),
                "{numbers:?}"
            );
        };
        check(&[7]);
        check(&[7, 0]);
        check(&[1 << 18, 1]);
        check(&[0, (1 << 18) + 1]);
        check(&[u32::MAX, u32::MAX]);
        check(&[7, 2, 8, 1]);
        assert_eq!(Demanded::decode(&[0; 7], MEMORY), Err(NoRecord));
    }
}
