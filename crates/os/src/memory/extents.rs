//! Which parts of a memory file were ever touched.
//!
//! Small pages: the file system knows (`SEEK_DATA`, `SEEK_HOLE`). Huge pages: hugetlbfs knows no
//! holes, but UFFDIO_CONTINUE on a mapping that is registered for minor faults maps a page that
//! exists and fails with `EFAULT` on one that does not, without making it. So a second mapping, made
//! for the question and never read, answers it. Where the kernel offers no such thing, all is data,
//! which is right and slow.

use super::{HUGE_PAGE_BYTES, PageKind, SharedMemory};
use crate::holes::seek;
use crate::mapping::{Access, Mapping};
use crate::userfault::request::{Step, Userfault, feature, mode};
use limosa_pages::{PAGE_SIZE, PageCount, PageRange, Pfn};
use std::io;

/// Ranges of at most so many pages are asked about page by page. `SEEK_HOLE` walks to the end of the
/// data however far that is, which takes milliseconds in a gigabyte; `SEEK_DATA` answers for a page
/// that exists at once.
const STEPPED_PAGES_MAX: PageCount = PageCount::new(512);

impl SharedMemory {
    /// The runs of pages within `range` that exist, ascending. All other pages are zero and were
    /// never touched. Pages that come into being meanwhile may be missing.
    ///
    /// # Errors
    /// The range is not within the memory, or the kernel refuses.
    pub fn data_extents(&self, range: PageRange) -> io::Result<Vec<PageRange>> {
        self.check_within(range)?;
        match self.kind() {
            PageKind::Small => self.seek_extents(range),
            PageKind::Huge => Ok(self.huge_extents(range).unwrap_or_else(|_| vec![range])),
        }
    }

    /// Whether any page within `range` exists, of memory of small pages.
    ///
    /// # Errors
    /// As [`SharedMemory::data_extents`].
    pub(super) fn has_data(&self, range: PageRange) -> io::Result<bool> {
        self.check_within(range)?;
        let data = seek(self.file(), range.first.file_offset(), libc::SEEK_DATA)?;
        Ok(data.is_some_and(|data| data < range.end().file_offset()))
    }

    fn check_within(&self, range: PageRange) -> io::Result<()> {
        if range.end() > Pfn::new(self.page_count().get()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the memory",
            ));
        }
        Ok(())
    }

    fn seek_extents(&self, range: PageRange) -> io::Result<Vec<PageRange>> {
        let end = range.end().file_offset();
        let mut extents: Vec<PageRange> = Vec::new();
        let mut next = range.first.file_offset();
        while next < end {
            let Some(data) = seek(self.file(), next, libc::SEEK_DATA)?.filter(|&data| data < end)
            else {
                break;
            };
            let first = data / PAGE_SIZE;
            let stop = if range.count <= STEPPED_PAGES_MAX {
                first + 1
            } else {
                let hole = seek(self.file(), data, libc::SEEK_HOLE)?
                    .unwrap_or(end)
                    .min(end);
                hole.div_ceil(PAGE_SIZE)
            };
            match extents.last_mut().filter(|last| last.end().get() == first) {
                Some(last) => last.count = PageCount::new(stop - last.first.get()),
                None => extents.push(PageRange::new(
                    Pfn::new(first),
                    PageCount::new(stop - first),
                )),
            }
            next = stop * PAGE_SIZE;
        }
        Ok(extents)
    }

    fn huge_extents(&self, range: PageRange) -> io::Result<Vec<PageRange>> {
        const PAGES: u64 = HUGE_PAGE_BYTES / PAGE_SIZE;
        let probe = Probe::new(self)?;
        let mut extents: Vec<PageRange> = Vec::new();
        let (from, to) = (range.first.get(), range.end().get());
        for huge in from / PAGES..to.div_ceil(PAGES) {
            if !probe.exists(huge * HUGE_PAGE_BYTES)? {
                continue;
            }
            let (first, stop) = ((huge * PAGES).max(from), ((huge + 1) * PAGES).min(to));
            match extents.last_mut().filter(|last| last.end().get() == first) {
                Some(last) => last.count = PageCount::new(stop - last.first.get()),
                None => extents.push(PageRange::new(
                    Pfn::new(first),
                    PageCount::new(stop - first),
                )),
            }
        }
        Ok(extents)
    }
}

/// A second mapping of huge-page memory, registered for minor faults.
struct Probe {
    mapping: Mapping,
    faults: Userfault,
}

impl Probe {
    fn new(memory: &SharedMemory) -> io::Result<Self> {
        let mapping = Mapping::new(memory.file(), memory.mapping.len(), Access::ReadWrite, 0)?;
        let faults = Userfault::open(feature::MINOR_HUGETLBFS, false)?;
        let start = mapping.at(0, 0)?.addr() as u64;
        faults.register(start, mapping.len() as u64, mode::MINOR)?;
        Ok(Self { mapping, faults })
    }

    fn exists(&self, offset: u64) -> io::Result<bool> {
        let start = self.mapping.at(offset, HUGE_PAGE_BYTES as usize)?.addr() as u64;
        // Mapping an existing page changes no content.
        Ok(self.faults.map_existing(start, HUGE_PAGE_BYTES)? != Step::Absent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::ByteCount;

    fn check(memory: &SharedMemory, from: u64, to: u64, expect: &str) {
        let range = PageRange::new(Pfn::new(from), PageCount::new(to - from));
        let extents = memory.data_extents(range).unwrap();
        let text: Vec<String> = extents
            .iter()
            .map(|extent| format!("{}+{}", extent.first.get(), extent.count.get()))
            .collect();
        assert_eq!(text.join(" "), expect);
    }

    #[test]
    fn only_touched_pages_exist() {
        let memory = SharedMemory::create(ByteCount::new(64 << 20), PageKind::Small).unwrap();
        memory.make_single_pages();
        let last = memory.page_count().get();
        check(&memory, 0, last, "");
        for page in [3, 4, 5, 100, last - 1] {
            memory.write_at(page * PAGE_SIZE, b"x").unwrap();
        }
        check(&memory, 0, last, "3+3 100+1 16383+1");
        check(&memory, 4, 101, "4+2 100+1");
        check(&memory, 5, 5, "");
        check(&memory, 6, 100, "");
        let beyond = PageRange::new(Pfn::new(1), PageCount::new(last));
        assert!(memory.data_extents(beyond).is_err());
    }

    /// Needs some reserved huge pages, which only root can see to.
    #[test]
    fn only_touched_huge_pages_exist() {
        let memory = match SharedMemory::create(ByteCount::new(8 << 20), PageKind::Huge) {
            Ok(memory) => memory,
            Err(error) => return println!("skipped: {error}"),
        };
        assert_eq!(memory.kind(), PageKind::Huge);
        memory.write_at(3 * HUGE_PAGE_BYTES + 5, b"x").unwrap();
        memory.write_at(HUGE_PAGE_BYTES, b"x").unwrap();
        check(&memory, 0, 2048, "512+512 1536+512");
        check(&memory, 600, 1600, "600+424 1536+64");
        memory.write_at(2 * HUGE_PAGE_BYTES, b"x").unwrap();
        check(&memory, 0, 2048, "512+1536");
        memory
            .populate(PageRange::new(Pfn::new(5), PageCount::new(1)))
            .unwrap();
        check(&memory, 0, 2048, "0+2048");
    }
}
