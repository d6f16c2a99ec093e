//! Asynchronous write protection by userfaultfd (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7): the kernel
//! lifts the protection of a page by itself at its first write and tells nobody. `PAGEMAP_SCAN` finds
//! the pages without protection and protects them again in the same step, page by page, under the
//! lock of the page table: no write falls between.
//!
//! What is seen is what this process's page tables see: KVM writes through them, and so does the
//! process itself for its devices. Other processes that map the memory, such as the daemon, are not
//! seen. A page that gets mapped counts as written once, also if it was only read.
//!
//! A page that is swapped out after it was written would look like one that was never touched. So
//! this tracker is refused on hosts that swap.

use super::DirtyTracker;
use super::scan::{self, Which};
use super::seen::Seen;
use crate::bitmap::SharedBitmap;
use crate::kvm::KvmError;
use crate::kvm::slots::Slots;
use crate::userfault::request::{Userfault, feature, mode};
use limosa_pages::{PageRange, Pfn};
use std::fs::{self, File};
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Tracks by write protection.
#[derive(Debug)]
pub(crate) struct WriteProtect {
    pagemap: File,
    seen: OnceLock<Seen>,
    /// There while tracking is on.
    protection: Mutex<Option<Userfault>>,
}

impl WriteProtect {
    /// # Errors
    /// The kernel cannot, this user may not, or the host swaps.
    pub(crate) fn new() -> Result<Self, KvmError> {
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().count() > 1 {
            return Err(KvmError::Lacks {
                what: "a host without swap, on which alone write protection finds every page \
                       (swapoff -a, or another dirty tracker)",
            });
        }
        // Found out now, not when a migration begins.
        Userfault::open(feature::WRITE_PROTECT_ASYNC, true).map_err(no_protection)?;
        let pagemap = File::open("/proc/self/pagemap").map_err(|source| KvmError::Call {
            what: "look at the process's page tables",
            source,
        })?;
        Ok(Self {
            pagemap,
            seen: OnceLock::new(),
            protection: Mutex::new(None),
        })
    }

    fn seen(&self, slots: &Slots) -> &Seen {
        self.seen.get_or_init(|| Seen::nothing(slots.page_count()))
    }

    /// Protects the pages that match, and notes those that were written.
    fn scan(&self, slots: &Slots, which: Which) -> Result<(), KvmError> {
        let seen = self.seen(slots);
        let (base, bytes) = slots.place();
        scan::protect(&self.pagemap, base..base + bytes, which, |pages| {
            seen.add(pages)
        })
        .map_err(|source| KvmError::Call {
            what: "find out which pages were written",
            source,
        })
    }
}

impl DirtyTracker for WriteProtect {
    fn start(&self, slots: &Slots) -> Result<(), KvmError> {
        let protection = Userfault::open(feature::WRITE_PROTECT_ASYNC, true);
        let protection = protection.map_err(no_protection)?;
        let (base, bytes) = slots.place();
        protection
            .register(base, bytes, mode::WRITE_PROTECT)
            .map_err(no_protection)?;
        *self
            .protection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(protection);
        self.scan(slots, Which::Present)?;
        self.seen(slots)
            .add(PageRange::new(Pfn::new(0), slots.page_count()));
        Ok(())
    }

    fn stop(&self, slots: &Slots) -> Result<(), KvmError> {
        let mut protection = self
            .protection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(protection) = protection.take() {
            let (base, bytes) = slots.place();
            protection.unregister(base, bytes).map_err(no_protection)?;
        }
        self.seen(slots).forget_all();
        Ok(())
    }

    fn harvest(&self, slots: &Slots, into: &SharedBitmap) -> Result<(), KvmError> {
        self.scan(slots, Which::Written)?;
        self.seen(slots).copy_to(into);
        Ok(())
    }

    fn clear(
        &self,
        slots: &Slots,
        harvested: &SharedBitmap,
        range: PageRange,
    ) -> Result<(), KvmError> {
        self.seen(slots).forget(harvested, range);
        Ok(())
    }
}

fn no_protection(source: io::Error) -> KvmError {
    KvmError::Call {
        what: "protect the guest's memory against unnoticed writes (Linux 6.7 can, for users with \
               CAP_SYS_PTRACE or access to /dev/userfaultfd)",
        source,
    }
}
