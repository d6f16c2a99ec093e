//! KVM's dirty rings (`KVM_CAP_DIRTY_LOG_RING`, Linux 5.11; with ordered flags, 5.20): KVM writes an
//! entry for each page that a vCPU dirties and stops the vCPU when its ring is nearly full. Taking an
//! entry and giving it back (`KVM_RESET_DIRTY_RINGS`) protects the page again.
//!
//! ```text
//!  vCPU writes ─▶ KVM: entry, flag *dirty* ─▶ taken here: page noted, flag *reset* ─▶ KVM protects it
//! ```
//!
//! How many pages a vCPU has dirtied is known without taking an entry, too: those that were not taken
//! lie in a row behind the last one that was.
//!
//! A page is noted before it is protected again, and protected before a harvest tells it. So a write
//! is either in what was told and copied after, or noticed anew.

use super::DirtyTracker;
use super::seen::Seen;
use crate::bitmap::SharedBitmap;
use crate::kvm::slots::{Region, Slots};
use crate::kvm::{KvmError, check, request};
use crate::mapping::{Access, Mapping};
use kvm_bindings as abi;
use limosa_pages::{PageCount, PageRange};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

/// Entries that we ask for: as many as KVM gives at most, a mebibyte for each vCPU. A vCPU that
/// writes 400,000 pages a second fills it in a sixth of a second.
pub(crate) const RING_BYTES_WANTED: u32 = 65536 * ENTRY_BYTES as u32;

const ENTRY_BYTES: usize = size_of::<abi::kvm_dirty_gfn>();
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// The rings of all vCPUs of a machine. Whoever finds a ring full may empty it.
#[derive(Debug)]
pub(crate) struct DirtyRings {
    ring_bytes: u32,
    rings: Mutex<Vec<Ring>>,
    memory: OnceLock<Memory>,
}

/// Known when the machine has its memory.
#[derive(Debug)]
struct Memory {
    regions: Vec<Region>,
    seen: Seen,
}

/// What one vCPU shares with KVM.
#[derive(Debug)]
struct Ring {
    mapping: Mapping,
    entries: u32,
    next: u32,
    /// Pages whose entries were taken since tracking began.
    taken: u64,
}

impl DirtyRings {
    pub(crate) fn new(ring_bytes: u32) -> Self {
        Self {
            ring_bytes,
            rings: Mutex::default(),
            memory: OnceLock::new(),
        }
    }

    /// Shares the ring of a vCPU, in the order of the vCPUs; its place in that order.
    pub(crate) fn add(&self, vcpu: BorrowedFd<'_>) -> Result<usize, KvmError> {
        let map = |source| KvmError::Call {
            what: "share a vCPU's dirty ring",
            source,
        };
        let len = self.ring_bytes as usize;
        let offset = i64::from(abi::KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        let mapping = Mapping::at_offset(vcpu, offset, len, Access::ReadWrite).map_err(map)?;
        let mut rings = self.lock();
        rings.push(Ring {
            mapping,
            entries: self.ring_bytes / ENTRY_BYTES as u32,
            next: 0,
            taken: 0,
        });
        Ok(rings.len() - 1)
    }

    /// Pages that the vCPU with that place has dirtied since tracking began; a page that it dirties
    /// anew after it was protected again counts anew. `None` while somebody empties the rings: a vCPU
    /// does not wait to be told.
    pub(crate) fn dirtied(&self, place: usize) -> Option<u64> {
        match self.rings.try_lock() {
            Ok(rings) => rings.get(place).map(Ring::dirtied),
            Err(TryLockError::Poisoned(rings)) => rings.into_inner().get(place).map(Ring::dirtied),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The same of each vCPU.
    pub(crate) fn all_dirtied(&self) -> Vec<u64> {
        self.lock().iter().map(Ring::dirtied).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all entries of all rings, and has their pages protected again.
    pub(crate) fn empty(&self, machine: BorrowedFd<'_>) -> Result<(), KvmError> {
        let Some(memory) = self.memory.get() else {
            return Ok(());
        };
        let mut rings = self.lock();
        let taken = rings
            .iter_mut()
            .fold(0, |sum, ring| sum + ring.take(memory));
        if taken == 0 {
            return Ok(());
        }
        // SAFETY: the descriptor is open; the call takes no argument. Under the lock, or entries of
        // another thread would be given back before their pages were noted.
        check("take dirty pages from its rings", unsafe {
            libc::ioctl(machine.as_raw_fd(), request::RESET_DIRTY_RINGS, 0)
        })
    }
}

impl Ring {
    /// Notes the pages of all entries; how many these were.
    fn take(&mut self, memory: &Memory) -> u64 {
        let mut taken = 0;
        while let Some((slot, offset)) = self.take_entry() {
            let region = memory.regions.get(slot as usize & 0xffff);
            if let Some(region) = region.filter(|region| offset < region.pages.count.get()) {
                let page = region.pages.first.advance(PageCount::new(offset));
                memory.seen.add(PageRange::new(page, PageCount::new(1)));
            }
            taken += 1;
        }
        self.taken += taken;
        taken
    }

    /// Pages of all entries, taken or not.
    fn dirtied(&self) -> u64 {
        self.taken + u64::from(self.waiting())
    }

    /// Entries that wait to be taken. They follow each other without a gap, so the first one that does
    /// not wait is found by halving.
    fn waiting(&self) -> u32 {
        let (mut waiting, mut end) = (0, self.entries);
        while waiting < end {
            let middle = waiting + (end - waiting) / 2;
            let flags = self.flags(self.next.wrapping_add(middle));
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                end = middle;
            } else {
                waiting = middle + 1;
            }
        }
        waiting
    }

    fn entry(&self, number: u32) -> *mut abi::kvm_dirty_gfn {
        let at = u64::from(number % self.entries) * ENTRY_BYTES as u64;
        let entry = self.mapping.at(at, ENTRY_BYTES).expect("within the ring");
        entry.cast()
    }

    fn flags(&self, number: u32) -> &AtomicU32 {
        let entry = self.entry(number);
        // SAFETY: the flags are a word of the mapping, which lives as long as the ring, aligned since
        // entries are of 16 bytes; the kernel accesses it atomically, too.
        unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) }
    }

    /// Slot and page of the next entry, which is given back; `None` if there is none.
    fn take_entry(&mut self) -> Option<(u32, u64)> {
        let entry = self.entry(self.next);
        let flags = self.flags(self.next);
        if flags.load(Ordering::Acquire) & DIRTY == 0 {
            return None;
        }
        // SAFETY: the kernel has written these fields before the flag and does not touch them again
        // before it was given back.
        let found = unsafe {
            (
                (&raw const (*entry).slot).read(),
                (&raw const (*entry).offset).read(),
            )
        };
        flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(found)
    }
}

/// Tracks by the rings.
#[derive(Debug)]
pub(crate) struct RingTracker(pub(crate) Arc<DirtyRings>);

impl RingTracker {
    fn memory(&self, slots: &Slots) -> &Memory {
        self.0.memory.get_or_init(|| Memory {
            regions: slots.regions().to_vec(),
            seen: Seen::nothing(slots.page_count()),
        })
    }
}

impl DirtyTracker for RingTracker {
    fn start(&self, slots: &Slots) -> Result<(), KvmError> {
        let memory = self.memory(slots);
        slots.set(abi::KVM_MEM_LOG_DIRTY_PAGES)?;
        for region in slots.regions() {
            memory.seen.add(region.pages);
        }
        self.0.lock().iter_mut().for_each(|ring| ring.taken = 0);
        Ok(())
    }

    fn stop(&self, slots: &Slots) -> Result<(), KvmError> {
        slots.set(0)?;
        // What is left in the rings would be told when tracking begins again.
        self.0.empty(slots.borrowed())?;
        self.memory(slots).seen.forget_all();
        Ok(())
    }

    fn harvest(&self, slots: &Slots, into: &SharedBitmap) -> Result<(), KvmError> {
        self.0.empty(slots.borrowed())?;
        self.memory(slots).seen.copy_to(into);
        Ok(())
    }

    fn clear(
        &self,
        slots: &Slots,
        harvested: &SharedBitmap,
        range: PageRange,
    ) -> Result<(), KvmError> {
        self.memory(slots).seen.forget(harvested, range);
        Ok(())
    }
}
