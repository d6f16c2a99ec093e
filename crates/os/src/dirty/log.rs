//! KVM's dirty bitmap, with manual protection and all pages initially set
//! (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, Linux 5.7): reading clears nothing, and switching it on
//! protects nothing. Clearing names the pages and protects them, a chunk at a time, just before they
//! are copied; so nobody waits for a pass over all memory.

use super::DirtyTracker;
use crate::bitmap::SharedBitmap;
use crate::kvm::slots::Slots;
use crate::kvm::{KvmError, check, request};
use kvm_bindings as abi;
use limosa_pages::PageRange;

/// Keeps nothing: KVM has it all.
#[derive(Debug)]
pub(crate) struct DirtyLog;

impl DirtyTracker for DirtyLog {
    fn start(&self, slots: &Slots) -> Result<(), KvmError> {
        slots.set(abi::KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn stop(&self, slots: &Slots) -> Result<(), KvmError> {
        slots.set(0)
    }

    fn harvest(&self, slots: &Slots, into: &SharedBitmap) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(slots.regions()) {
            let mut log = abi::kvm_dirty_log {
                slot,
                ..Default::default()
            };
            let place = into.kernel_address(region.pages.first.get(), region.pages.count.get());
            log.__bindgen_anon_1.dirty_bitmap = place.cast();
            // SAFETY: KVM writes one bit for each page of the slot, rounded up to whole words, and
            // the bitmap has that many at this place.
            check("read the dirty log", unsafe {
                libc::ioctl(slots.descriptor(), request::GET_DIRTY_LOG, &raw const log)
            })?;
        }
        Ok(())
    }

    fn clear(
        &self,
        slots: &Slots,
        harvested: &SharedBitmap,
        range: PageRange,
    ) -> Result<(), KvmError> {
        let (from, to) = (range.first.get(), range.end().get());
        for (slot, region) in (0..).zip(slots.regions()) {
            let (start, end) = (region.pages.first.get(), region.pages.end().get());
            let (first, stop) = (from.max(start), to.min(end));
            if first >= stop {
                continue;
            }
            let count = u32::try_from(stop - first).map_err(|_| KvmError::Call {
                what: "clear so much of the dirty log",
                source: std::io::ErrorKind::InvalidInput.into(),
            })?;
            let mut clear = abi::kvm_clear_dirty_log {
                slot,
                num_pages: count,
                first_page: first - start,
                ..Default::default()
            };
            let place = harvested.kernel_address(first, stop - first);
            clear.__bindgen_anon_1.dirty_bitmap = place.cast();
            // SAFETY: KVM reads one bit for each of the pages, and the bitmap has them there.
            check("clear the dirty log", unsafe {
                libc::ioctl(
                    slots.descriptor(),
                    request::CLEAR_DIRTY_LOG,
                    &raw const clear,
                )
            })?;
        }
        Ok(())
    }
}
