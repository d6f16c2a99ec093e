//! Pages of disks that a guest has written: the same contract as that of its memory, kept by the device
//! that writes.
//!
//! Followed only from when somebody asks, since a bit for each 4 KiB of a large disk is not nothing. A
//! device writes first and notes then; so what is being written when somebody begins to follow, or looks,
//! is noted afterwards, and the last look comes when devices rest.

use super::seen::Seen;
use crate::bitmap::{BitmapError, SharedBitmap};
use crate::disk::bits::DiskBits;
use limosa_pages::{Numbering, PageRange};
use std::sync::{Arc, OnceLock};

/// The notes as the device of one disk has them.
#[derive(Debug)]
pub struct DiskNotes {
    /// Those of all.
    pub writes: Arc<DiskWrites>,
    /// Which of the disks it is.
    pub disk: usize,
}

impl DiskNotes {
    /// These bytes of the disk were written, or may have been.
    pub fn note(&self, offset: u64, bytes: u64) {
        self.writes.note(self.disk, offset, bytes);
    }
}

/// Notes of all disks of a machine.
#[derive(Debug, Default)]
pub struct DiskWrites(OnceLock<Followed>);

/// From when on somebody follows.
#[derive(Debug)]
struct Followed {
    bits: DiskBits,
    seen: Seen,
    /// Where a harvest goes.
    bitmap: SharedBitmap,
}

impl DiskWrites {
    /// Notes are kept from now on; where they are harvested to: a bit for each page from that of the first
    /// disk on. Whoever asks again gets the same.
    ///
    /// # Errors
    /// The kernel gives no memory.
    ///
    /// # Panics
    /// If the machine has no disk.
    pub fn follow(&self, numbering: &Numbering) -> Result<&SharedBitmap, BitmapError> {
        if self.0.get().is_none() {
            let bits = DiskBits::new(numbering);
            let followed = Followed {
                seen: Seen::nothing(bits.count()),
                bitmap: SharedBitmap::create(bits.count())?,
                bits,
            };
            // Whoever was first has the same numbering.
            drop(self.0.set(followed));
        }
        Ok(&self.0.get().expect("set just now").bitmap)
    }

    /// The bitmap, if somebody follows.
    pub fn bitmap(&self) -> Option<&SharedBitmap> {
        Some(&self.0.get()?.bitmap)
    }

    /// These bytes of the disk with that index were written, or may have been.
    fn note(&self, disk: usize, offset: u64, bytes: u64) {
        let Some(followed) = self.0.get() else { return };
        if let Some(bits) = followed.bits.of_bytes(disk, offset, bytes) {
            followed.seen.add(bits);
        }
    }

    /// Overwrites the bitmap with what was written since it was cleared.
    pub fn harvest(&self) {
        if let Some(followed) = self.0.get() {
            followed.seen.copy_to(&followed.bitmap);
        }
    }

    /// Clears, of the pages in `range`, those that the last harvest has told and that are not `kept`. False
    /// if these are no pages of disks that are followed.
    pub fn clear(&self, range: PageRange, kept: &[PageRange]) -> bool {
        let Some(followed) = self.0.get() else {
            return false;
        };
        let kept = kept.iter().map(|&run| followed.bits.of_pages(run));
        let kept = kept.collect::<Option<Vec<_>>>();
        let (Some(range), Some(kept)) = (followed.bits.of_pages(range), kept) else {
            return false;
        };
        for run in kept {
            followed.bitmap.take_range(run);
        }
        followed.seen.forget(&followed.bitmap, range);
        true
    }

    /// Forgets all that was noted.
    pub fn forget_all(&self) {
        if let Some(followed) = self.0.get() {
            followed.seen.forget_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::{ByteCount, PageCount, Pfn};

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(Pfn::new(first), PageCount::new(count))
    }

    /// What a harvest tells, by the numbers of the guest's pages.
    fn harvest(writes: &DiskWrites) -> String {
        writes.harvest();
        let bitmap = writes.bitmap().unwrap();
        let all = PageRange::new(Pfn::new(0), bitmap.page_count());
        let runs = bitmap.runs_in(all);
        let runs = runs
            .iter()
            .map(|run| format!("{}+{}", 1024 + run.first.get(), run.count.get()));
        runs.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_is_written_is_told_until_it_is_cleared() {
        // 1024 pages of memory; disks at 1024 (three pages, the last one short) and 1536.
        let sizes = [2 * 4096 + 512, 8 << 20].map(ByteCount::new);
        let numbering = Numbering::new(PageCount::new(1000), sizes).unwrap();
        let writes = DiskWrites::default();
        writes.note(0, 0, 512);
        writes.harvest();
        assert!(writes.bitmap().is_none() && !writes.clear(range(1024, 512), &[]));
        writes.follow(&numbering).unwrap();
        assert_eq!(harvest(&writes), "", "not before somebody follows");
        writes.note(0, 4095, 2);
        writes.note(0, 8192, 512);
        writes.note(1, 10 * 4096, 4096);
        writes.note(1, 12 * 4096, 0);
        // Beyond the end, and of no disk.
        writes.note(0, 3 * 4096, 4096);
        writes.note(1, 8 << 20, u64::MAX);
        writes.note(2, 0, 512);
        assert_eq!(harvest(&writes), "1024+3 1546+1");
        assert!(writes.clear(range(1024, 512), &[range(1025, 1)]));
        assert_eq!(harvest(&writes), "1025+1 1546+1");
        // What was written since the last harvest is not cleared.
        writes.note(1, 64 * 4096, 1);
        assert!(writes.clear(range(1536, 2048), &[]));
        assert_eq!(harvest(&writes), "1025+1 1600+1");
        for wrong in [range(0, 1024), range(1023, 1), range(1024, 4096)] {
            assert!(!writes.clear(wrong, &[]), "{wrong:?}");
        }
        assert!(!writes.clear(range(1024, 512), &[range(3, 1)]));
        writes.follow(&numbering).unwrap();
        assert_eq!(harvest(&writes), "1025+1 1600+1");
        writes.forget_all();
        assert_eq!(harvest(&writes), "");
    }
}
