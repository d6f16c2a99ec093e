//! Which bit of a bitmap stands for which page of a disk: one for each page from the first disk's first on.

use limosa_pages::{Numbering, PAGE_SIZE, PageCount, PageRange, Pfn};

/// The places of the pages of a machine's disks in a bitmap.
#[derive(Debug)]
pub(crate) struct DiskBits {
    /// The page that the first bit stands for.
    base: u64,
    disks: Vec<PageRange>,
    count: PageCount,
}

impl DiskBits {
    /// Of a machine that has disks.
    ///
    /// # Panics
    /// If it has none.
    pub(crate) fn new(numbering: &Numbering) -> Self {
        let first = numbering.disks().first();
        let base = first.expect("a machine with disks").first.get();
        Self {
            base,
            disks: numbering.disks().to_vec(),
            count: PageCount::new(numbering.end().get() - base),
        }
    }

    /// How many bits there are.
    pub(crate) const fn count(&self) -> PageCount {
        self.count
    }

    /// The pages of each disk.
    pub(crate) fn disks(&self) -> &[PageRange] {
        &self.disks
    }

    /// The bits of the pages in which these bytes of a disk are; `None` if there are none.
    pub(crate) fn of_bytes(&self, disk: usize, offset: u64, bytes: u64) -> Option<PageRange> {
        let pages = self.disks.get(disk)?;
        let first = offset / PAGE_SIZE;
        let end = offset.saturating_add(bytes).div_ceil(PAGE_SIZE);
        let end = end.min(pages.count.get());
        let from = pages.first.get() - self.base + first;
        (first < end).then(|| PageRange::new(Pfn::new(from), PageCount::new(end - first)))
    }

    /// The bits of pages by their numbers; `None` if they are not all those of disks, or between them.
    pub(crate) fn of_pages(&self, range: PageRange) -> Option<PageRange> {
        let first = range.first.get().checked_sub(self.base)?;
        let end = self.count.get();
        let is_inside = first <= end && range.count.get() <= end - first;
        is_inside.then(|| PageRange::new(Pfn::new(first), range.count))
    }

    /// The page that a bit stands for.
    pub(crate) const fn page(&self, bit: Pfn) -> Pfn {
        Pfn::new(self.base + bit.get())
    }
}
