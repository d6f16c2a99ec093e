//! Pages that were seen written and not cleared yet: what trackers keep that track pages anew at
//! once, and what devices note.
//!
//! Whoever notes a page has written it before; whoever forgets one copies it afterwards. The words
//! carry that order from thread to thread.

use crate::bitmap::{SharedBitmap, masks};
use limosa_pages::{PageCount, PageRange, Pfn};
use std::sync::atomic::{AtomicU64, Ordering};

/// A bit a page. Several threads may set bits while one harvests.
#[derive(Debug)]
pub(super) struct Seen {
    words: Vec<AtomicU64>,
    pages: PageCount,
}

impl Seen {
    pub(super) fn nothing(pages: PageCount) -> Self {
        let words = usize::try_from(pages.get().div_ceil(64)).expect("fits the address space");
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            pages,
        }
    }

    /// Adds pages; those beyond the memory are none.
    pub(super) fn add(&self, range: PageRange) {
        if range.end().get() > self.pages.get() {
            return;
        }
        for (index, mask) in masks(range) {
            self.words[index].fetch_or(mask, Ordering::Release);
        }
    }

    pub(super) fn contains(&self, page: Pfn) -> bool {
        let one = PageRange::new(page, PageCount::new(1));
        let is_inside = page.get() < self.pages.get();
        is_inside
            && masks(one).all(|(index, mask)| self.words[index].load(Ordering::Acquire) & mask != 0)
    }

    pub(super) fn forget_all(&self) {
        for word in &self.words {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Overwrites the bitmap.
    pub(super) fn copy_to(&self, bitmap: &SharedBitmap) {
        for (index, word) in self.words.iter().enumerate() {
            bitmap.store(index, word.load(Ordering::Acquire));
        }
    }

    /// Adds to the bitmap.
    pub(super) fn add_to(&self, bitmap: &SharedBitmap) {
        for (index, word) in self.words.iter().enumerate() {
            let seen = word.load(Ordering::Acquire);
            if seen != 0 {
                bitmap.store(index, bitmap.load(index) | seen);
            }
        }
    }

    /// Forgets those pages of `range` that are set in the bitmap.
    pub(super) fn forget(&self, harvested: &SharedBitmap, range: PageRange) {
        for (index, mask) in masks(range) {
            let told = harvested.load(index) & mask;
            self.words[index].fetch_and(!told, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_told_is_forgotten() {
        let pages = PageCount::new(130);
        let seen = Seen::nothing(pages);
        let bitmap = SharedBitmap::create(pages).unwrap();
        let range = |first, count| PageRange::new(Pfn::new(first), PageCount::new(count));
        let now = || {
            let bitmap = SharedBitmap::create(pages).unwrap();
            seen.copy_to(&bitmap);
            let runs = bitmap.runs_in(range(0, 130));
            runs.iter()
                .map(|run| format!("{}+{}", run.first.get(), run.count.get()))
                .collect::<Vec<_>>()
                .join(" ")
        };
        seen.add(range(62, 5));
        seen.add(range(129, 1));
        seen.add(range(129, 2));
        seen.copy_to(&bitmap);
        seen.add(range(70, 1));
        assert_eq!(now(), "62+5 70+1 129+1");
        seen.forget(&bitmap, range(64, 64));
        assert_eq!(now(), "62+2 70+1 129+1");
        seen.forget_all();
        assert_eq!(now(), "");
    }
}
