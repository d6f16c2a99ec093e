//! Pages that a guest gives up while it runs: they become holes again, which cost the host nothing and are
//! never sent.
//!
//! Two things must not happen. Whoever moves the guest must not find a page gone that it counts on: so
//! nothing is taken while writes are tracked, when a daemon reads the memory of the running guest. And no
//! page may be taken beside such as are missing: the guest would wait for it, and nobody would bring it.
//! Both hold off under the lock under which pages are taken, so that none is being taken afterwards.
//!
//! Nothing is taken of huge pages, either: an operator has reserved them for the guest, and one that is
//! given back may not be there when the guest touches it again, which would be the end of it.

use super::{PageKind, SharedMemory};
use crate::kvm::Region;
use limosa_pages::{PAGE_SIZE, PageCount, PageRange, Pfn};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Why nothing is taken at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldOff {
    /// Writes are tracked: the guest is being moved.
    Tracking,
    /// Pages are missing still.
    MissingPages,
}

/// Takes what a guest gives up.
#[derive(Debug)]
pub struct Reclaim {
    memory: Arc<SharedMemory>,
    regions: Vec<Region>,
    reasons: Mutex<[bool; 2]>,
}

impl Reclaim {
    pub(crate) fn new(memory: Arc<SharedMemory>, regions: &[Region]) -> Self {
        Self {
            memory,
            regions: regions.to_vec(),
            reasons: Mutex::new([false; 2]),
        }
    }

    /// Whether such memory can be given up at all.
    pub fn is_possible(&self) -> bool {
        self.memory.kind() == PageKind::Small
    }

    /// Takes nothing for that reason from now on, or no longer for that reason.
    pub fn hold_off(&self, why: HoldOff, is_so: bool) {
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        reasons[why as usize] = is_so;
    }

    /// Takes the whole pages among these bytes, by guest-physical address; they read as zeros. How many
    /// were taken: none while there is a reason not to. What is no memory is left out.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn take(&self, start: u64, bytes: u64) -> io::Result<PageCount> {
        let first = start.div_ceil(PAGE_SIZE);
        let end = start.saturating_add(bytes) / PAGE_SIZE;
        let reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = PageCount::ZERO;
        if !self.is_possible() || reasons.contains(&true) {
            return Ok(taken);
        }
        for region in &self.regions {
            let there = region.start.get() / PAGE_SIZE;
            let from = first.max(there);
            let to = end.min(there + region.pages.count.get());
            if from < to {
                let page = Pfn::new(region.pages.first.get() + (from - there));
                let pages = PageRange::new(page, PageCount::new(to - from));
                self.memory.punch_once(pages)?;
                taken = taken.saturating_add(pages.count);
            }
        }
        drop(reasons);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::Gpa;

    const PAGES: u64 = 16;

    /// Four pages from the start, the others behind a hole, all of them touched.
    fn reclaim() -> Reclaim {
        let size = PageCount::new(PAGES).bytes();
        let memory = Arc::new(SharedMemory::create(size, PageKind::Small).unwrap());
        memory.make_single_pages();
        let region = |start, first, count| Region {
            start: Gpa::new(start),
            pages: PageRange::new(Pfn::new(first), PageCount::new(count)),
        };
        for page in 0..PAGES {
            memory.write_at(page * PAGE_SIZE, b"x").unwrap();
        }
        Reclaim::new(memory, &[region(0, 0, 4), region(0x10_0000, 4, 12)])
    }

    fn check(reclaim: &Reclaim, (start, bytes): (u64, u64), taken: u64, left: &str) {
        assert_eq!(reclaim.take(start, bytes).unwrap().get(), taken);
        let all = PageRange::new(Pfn::new(0), PageCount::new(PAGES));
        let runs = reclaim.memory.data_extents(all).unwrap();
        let runs: Vec<String> = runs
            .iter()
            .map(|run| format!("{}+{}", run.first.get(), run.count.get()))
            .collect();
        assert_eq!(runs.join(" "), left);
    }

    #[test]
    fn whole_pages_of_the_memory_are_taken_and_nothing_else() {
        let reclaim = reclaim();
        check(&reclaim, (0x10_0000, 8192), 2, "0+4 6+10");
        // Only the page in the middle is there as a whole.
        check(&reclaim, (0x800, 0x1fff), 1, "0+1 2+2 6+10");
        check(&reclaim, (0x800, 0x7ff), 0, "0+1 2+2 6+10");
        // Over the hole of the address space, and far beyond the memory.
        check(&reclaim, (0x3000, 0xf_e000), 2, "0+1 2+1 6+10");
        check(&reclaim, (0x8000, 0x8000), 0, "0+1 2+1 6+10");
        check(&reclaim, (0x10_b000, u64::MAX), 1, "0+1 2+1 6+9");
        check(&reclaim, (u64::MAX - 1, 1), 0, "0+1 2+1 6+9");
        assert!(reclaim.memory.is_zero(Pfn::new(1)));
        check(&reclaim, (0, u64::MAX), PAGES, "");
    }

    #[test]
    fn nothing_is_taken_while_somebody_counts_on_it() {
        let reclaim = reclaim();
        reclaim.hold_off(HoldOff::Tracking, true);
        reclaim.hold_off(HoldOff::MissingPages, true);
        check(&reclaim, (0, 4096), 0, "0+16");
        reclaim.hold_off(HoldOff::Tracking, false);
        check(&reclaim, (0, 4096), 0, "0+16");
        reclaim.hold_off(HoldOff::MissingPages, false);
        check(&reclaim, (0, 4096), 1, "1+15");
    }
}
