//! Which pages of a memory file exist, remembered.

use super::SharedMemory;
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The pages of a memory that exist, as far as somebody has asked. A page that exists is asked about
/// once: an answer costs the kernel a look at each page of it.
///
/// Invariant: no page is taken away while this is in use. Then what existed exists, and only what
/// did not has to be asked about again. A guest may give up a page between the first question and the
/// beginning of tracking ([`super::Reclaim`]); that one is read, which makes it anew, and told as zeros.
#[derive(Debug)]
pub struct ExistingPages {
    memory: Arc<SharedMemory>,
    known: Mutex<PageSet>,
}

impl ExistingPages {
    /// Of a memory of which nothing is known yet.
    pub fn new(memory: Arc<SharedMemory>) -> Self {
        let known = Mutex::new(PageSet::empty(memory.page_count()));
        Self { memory, known }
    }

    /// The runs of pages within `range` that exist, ascending, as
    /// [`SharedMemory::data_extents`] has them.
    ///
    /// # Errors
    /// As there.
    pub fn runs_in(&self, range: PageRange) -> io::Result<Vec<PageRange>> {
        if range.end().get() > self.memory.page_count().get() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the memory",
            ));
        }
        let known: Vec<PageRange> = self.known().runs_in(range).collect();
        let mut found = Vec::new();
        let mut next = range.first.get();
        let end = PageRange::new(range.end(), PageCount::ZERO);
        for run in known.iter().copied().chain([end]) {
            let gap = PageCount::new(run.first.get() - next);
            if gap > PageCount::ZERO {
                let gap = PageRange::new(Pfn::new(next), gap);
                found.extend(self.memory.data_extents(gap)?);
            }
            next = run.end().get();
        }
        if found.is_empty() {
            return Ok(known);
        }
        let mut set = self.known();
        found.into_iter().for_each(|run| set.insert_range(run));
        Ok(set.runs_in(range).collect())
    }

    /// All pages that exist now.
    ///
    /// # Errors
    /// As [`SharedMemory::data_extents`].
    pub fn all(&self) -> io::Result<PageSet> {
        self.runs_in(PageRange::new(Pfn::new(0), self.memory.page_count()))?;
        Ok(self.known().clone())
    }

    fn known(&self) -> MutexGuard<'_, PageSet> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageKind;
    use limosa_pages::PAGE_SIZE;

    #[test]
    fn what_comes_into_being_is_found_and_what_was_found_stays() {
        let size = PageCount::new(4096).bytes();
        let memory = Arc::new(SharedMemory::create(size, PageKind::Small).unwrap());
        memory.make_single_pages();
        let existing = ExistingPages::new(Arc::clone(&memory));
        let touch = |page: u64| memory.write_at(page * PAGE_SIZE, b"x").unwrap();
        let check = |from: u64, to: u64, expect: &str| {
            let range = PageRange::new(Pfn::new(from), PageCount::new(to - from));
            let runs = existing.runs_in(range).unwrap();
            let runs: Vec<String> = runs
                .iter()
                .map(|run| format!("{}+{}", run.first.get(), run.count.get()))
                .collect();
            assert_eq!(runs.join(" "), expect);
        };
        check(0, 4096, "");
        [10, 11, 20, 4095].into_iter().for_each(touch);
        check(11, 30, "11+1 20+1");
        [9, 12, 19, 29, 30].into_iter().for_each(touch);
        check(11, 30, "11+2 19+2 29+1");
        check(30, 30, "");
        check(0, 4096, "9+4 19+2 29+2 4095+1");
        assert_eq!(existing.all().unwrap().count().get(), 9);
        let beyond = PageRange::new(Pfn::new(4096), PageCount::new(1));
        assert!(existing.runs_in(beyond).is_err());
    }
}
