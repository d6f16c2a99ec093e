//! Pages of disks, numbered behind those of a guest's memory.
//!
//! A disk that moves along with its guest is sent as memory is: in rounds, by what was written. So its parts
//! of 4 KiB are pages, too. Each disk begins at a multiple of [`DISK_ALIGNMENT`]: a part of a round, and a word
//! of a dirty log, is memory's or one disk's. What lies between is no page of anything.

use crate::{ByteCount, PageCount, PageRange, Pfn};
use alloc::vec::Vec;

/// Disks begin at multiples of so many pages, 2 MiB.
pub const DISK_ALIGNMENT: PageCount = PageCount::new(512);

/// Most bytes of all disks of a guest: the bitmaps for so many take 128 MiB each.
pub const DISK_BYTES_MAX: ByteCount = ByteCount::new(4 << 40);

/// Which pages are memory, and which are those of each disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbering {
    memory: PageCount,
    disks: Vec<PageRange>,
}

impl Numbering {
    /// Of a guest with so much memory and disks of these sizes; `None` if they are larger than
    /// [`DISK_BYTES_MAX`]. The last page of a disk may reach beyond its end.
    pub fn new(memory: PageCount, disks: impl IntoIterator<Item = ByteCount>) -> Option<Self> {
        let mut next = memory.get();
        let mut total = ByteCount::new(0);
        let mut ranges = Vec::new();
        for size in disks {
            total = total.saturating_add(size);
            if total > DISK_BYTES_MAX {
                return None;
            }
            let first = next.checked_next_multiple_of(DISK_ALIGNMENT.get())?;
            let range = PageRange::new(Pfn::new(first), size.pages_ceil());
            next = first.checked_add(range.count.get())?;
            ranges.push(range);
        }
        Some(Self {
            memory,
            disks: ranges,
        })
    }

    /// Pages of the memory: the first ones.
    pub const fn memory(&self) -> PageCount {
        self.memory
    }

    /// Pages of each disk, ascending.
    pub fn disks(&self) -> &[PageRange] {
        &self.disks
    }

    /// The memory, and each disk, ascending.
    pub fn parts(&self) -> impl Iterator<Item = PageRange> {
        let memory = PageRange::new(Pfn::new(0), self.memory);
        [memory].into_iter().chain(self.disks.iter().copied())
    }

    /// The memory, or the disk, that begins at this page or has it; `None` if it is no page of anything.
    pub fn part_of(&self, page: Pfn) -> Option<PageRange> {
        self.parts()
            .find(|part| (part.first..part.end()).contains(&page))
    }

    /// The parts of a range that are of memory or of one disk each, ascending; what is no page of anything is
    /// left out.
    pub fn split(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        self.parts().filter_map(move |part| {
            let (first, end) = (part.first.max(range.first), part.end().min(range.end()));
            let count = end
                .get()
                .checked_sub(first.get())
                .filter(|&count| count > 0)?;
            Some(PageRange::new(first, PageCount::new(count)))
        })
    }

    /// One more than the last page's number: what a set of all of them has to hold.
    pub fn end(&self) -> PageCount {
        let last = self.disks.last();
        last.map_or(self.memory, |disk| PageCount::new(disk.end().get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;
    use alloc::vec;

    fn check(memory: u64, disks: &[u64], expect: &str) {
        let sizes = disks.iter().copied().map(ByteCount::new);
        let text = match Numbering::new(PageCount::new(memory), sizes) {
            None => String::from("too large"),
            Some(numbering) => {
                let disks = numbering.disks().iter();
                let mut parts = vec![format!("{}", numbering.memory().get())];
                parts
                    .extend(disks.map(|disk| format!("{}+{}", disk.first.get(), disk.count.get())));
                parts.push(format!("{}", numbering.end().get()));
                for part in numbering.disks() {
                    assert_eq!(numbering.part_of(part.first), Some(*part));
                    assert_ne!(numbering.part_of(part.end()), Some(*part));
                }
                assert_eq!(numbering.part_of(Pfn::new(numbering.end().get())), None);
                let is_page = numbering.part_of(Pfn::new(memory)).is_some();
                assert_eq!(
                    is_page,
                    memory.is_multiple_of(512) && !numbering.disks().is_empty()
                );
                parts.join(" ")
            }
        };
        assert_eq!(text, expect);
    }

    #[test]
    fn ranges_are_split_where_something_else_begins() {
        let sizes = [4608, 1 << 21].map(ByteCount::new);
        let numbering = Numbering::new(PageCount::new(1024), sizes).unwrap();
        let check = |first: u64, count: u64, expect: &str| {
            let range = PageRange::new(Pfn::new(first), PageCount::new(count));
            let parts = numbering.split(range);
            let parts = parts.map(|part| format!("{}+{}", part.first.get(), part.count.get()));
            assert_eq!(parts.collect::<Vec<_>>().join(" "), expect);
        };
        check(0, 5000, "0+1024 1024+2 1536+512");
        check(1023, 2, "1023+1 1024+1");
        check(1025, 512, "1025+1 1536+1");
        check(1026, 510, "");
        check(7, 0, "");
    }

    #[test]
    fn disks_begin_behind_the_memory_where_a_part_of_a_round_may() {
        check(1024, &[], "1024 1024");
        check(1024, &[4096], "1024 1024+1 1025");
        check(
            1000,
            &[4608, 1 << 21, 512],
            "1000 1024+2 1536+512 2048+1 2049",
        );
        check(8, &[4 << 40], "8 512+1073741824 1073742336");
        check(8, &[1 << 42, 512], "too large");
        check(8, &[u64::MAX, u64::MAX], "too large");
        check(u64::MAX, &[512], "too large");
    }
}
