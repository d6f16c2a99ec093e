//! Fresh pages on their way into the memory file.
//!
//! A file is written fastest by what the kernel makes at once: where shared memory is backed by
//! transparent huge pages, a write of a whole one makes it without zeroing anything first. Pages come
//! in smaller parts, so those that follow one another wait here until their huge page is complete or
//! something else comes.

use limosa_pages::{PAGE_SIZE_USIZE, PageCount, PageRange, Pfn};

/// Pages in a row, received and not written yet.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    first: Pfn,
    /// Room for as many as ever were here; what lies behind the first `length` bytes is old.
    room: Vec<u8>,
    length: usize,
}

impl Gathered {
    pub(super) const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Which pages they are.
    pub(super) const fn range(&self) -> PageRange {
        let pages = self.length / PAGE_SIZE_USIZE;
        PageRange::new(self.first, PageCount::new(pages as u64))
    }

    /// What is in them.
    pub(super) fn content(&self) -> &[u8] {
        &self.room[..self.length]
    }

    /// True if `range` is what comes next.
    pub(super) fn is_continued_by(&self, range: PageRange) -> bool {
        self.is_empty() || self.range().end() == range.first
    }

    /// Makes room for pages that come next, all of it to be filled: it holds what was there before.
    pub(super) fn append(&mut self, range: PageRange) -> &mut [u8] {
        debug_assert!(self.is_continued_by(range), "pages in a row");
        if self.is_empty() {
            self.first = range.first;
        }
        let at = self.length;
        let bytes = usize::try_from(range.bytes().get()).expect("limited by the header");
        self.length = at + bytes;
        if self.room.len() < self.length {
            self.room.resize(self.length, 0);
        }
        &mut self.room[at..self.length]
    }

    /// True if the last page is the last of its unit of so many pages.
    pub(super) const fn ends_unit(&self, unit: PageCount) -> bool {
        !self.is_empty() && self.range().end().get().is_multiple_of(unit.get())
    }

    /// Forgets them and keeps the room.
    pub(super) fn clear(&mut self) {
        self.length = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_a_row_wait_for_the_end_of_their_unit() {
        let range = |first, count| PageRange::new(Pfn::new(first), PageCount::new(count));
        let unit = PageCount::new(8);
        let mut gathered = Gathered::default();
        assert!(gathered.is_continued_by(range(100, 1)) && !gathered.ends_unit(unit));
        gathered.append(range(10, 2)).fill(1);
        assert!(gathered.is_continued_by(range(12, 1)) && !gathered.is_continued_by(range(11, 1)));
        assert!(!gathered.ends_unit(unit) && gathered.ends_unit(PageCount::new(1)));
        gathered.append(range(12, 4)).fill(2);
        assert_eq!(gathered.range(), range(10, 6));
        assert!(gathered.ends_unit(unit));
        assert_eq!(gathered.content()[2 * PAGE_SIZE_USIZE - 1..][..2], [1, 2]);
        gathered.clear();
        assert!(gathered.is_empty() && gathered.is_continued_by(range(3, 1)));
        gathered.append(range(3, 1)).fill(3);
        assert_eq!(
            (gathered.range(), gathered.content()),
            (range(3, 1), &[3; 4096][..])
        );
    }
}
