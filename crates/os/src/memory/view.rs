//! Guest memory by guest-physical address, as the crates of rust-vmm want it.
//!
//! It is the same mapping, not a second one: on it missing pages are reported, and who loads a page
//! through another would make it. What is written through it is noted, so that a migration learns of it.

use crate::dirty::device::{DeviceWrites, PartNotes};
use crate::kvm::Region;
use crate::memory::SharedMemory;
use limosa_pages::PAGE_SIZE;
use std::sync::Arc;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, MemoryRegionAddress, VolatileSlice,
};

/// A guest's memory by guest-physical address. Keeps the memory alive.
pub type GuestView = GuestRegionCollection<ViewPart>;

/// What lies at one range of guest-physical addresses.
#[derive(Debug)]
pub struct ViewPart {
    memory: Arc<SharedMemory>,
    start: GuestAddress,
    /// Where in the memory file it begins.
    offset: u64,
    bytes: u64,
    notes: PartNotes,
}

/// The memory as the guest sees it; what is written through it is noted in `writes`.
///
/// # Panics
/// If the regions overlap, are not in order, or go beyond the memory.
pub fn view(
    memory: &Arc<SharedMemory>,
    regions: &[Region],
    writes: &Arc<DeviceWrites>,
) -> GuestView {
    let part = |region: &Region| {
        let (offset, bytes) = (
            region.pages.first.file_offset(),
            region.pages.count.get() * PAGE_SIZE,
        );
        let fits = offset
            .checked_add(bytes)
            .is_some_and(|end| end <= memory.size().get());
        assert!(fits && bytes > 0, "a region is a part of the memory");
        ViewPart {
            memory: Arc::clone(memory),
            start: GuestAddress(region.start.get()),
            offset,
            bytes,
            notes: PartNotes {
                writes: Arc::clone(writes),
                offset,
            },
        }
    };
    let parts = regions.iter().map(part).collect();
    GuestView::from_regions(parts).expect("regions are in order and apart")
}

impl GuestMemoryRegion for ViewPart {
    type B = PartNotes;

    fn len(&self) -> u64 {
        self.bytes
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.notes.slice_at(0)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>, GuestMemoryError> {
        let outside = || GuestMemoryError::InvalidBackendAddress;
        let within = usize::try_from(offset.0).map_err(|_| outside())?;
        let end = offset.0.checked_add(count as u64);
        end.filter(|&end| end <= self.bytes).ok_or_else(outside)?;
        let start = self.memory.mapping.at(self.offset + offset.0, count);
        let start = start.map_err(|_| outside())?;
        // SAFETY: the range lies within the mapping, which lives as long as `self.memory`, and so as
        // long as the slice borrows `self`. Everybody accesses it through volatile slices or by
        // address, never by reference.
        Ok(unsafe { VolatileSlice::with_bitmap(start, count, self.notes.slice_at(within), None) })
    }
}

impl GuestMemoryRegionBytes for ViewPart {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageKind;
    use limosa_pages::{ByteCount, Gpa, PageCount, PageRange, Pfn};
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn both_sides_of_a_hole_are_where_the_guest_sees_them() {
        let size = ByteCount::new(64 << 10);
        let memory = Arc::new(SharedMemory::create(size, PageKind::Small).unwrap());
        let region = |start, first, count| Region {
            start: Gpa::new(start),
            pages: PageRange::new(Pfn::new(first), PageCount::new(count)),
        };
        let writes = Arc::new(DeviceWrites::nothing(memory.page_count()));
        let regions = [region(0, 0, 4), region(0x10_0000, 4, 12)];
        let view = view(&memory, &regions, &writes);
        view.write_slice(b"low", GuestAddress(0x3ffd)).unwrap();
        view.write_slice(b"high", GuestAddress(0x10_0000)).unwrap();
        let mut seen = [0; 7];
        memory.read_at(0x3ffd, &mut seen).unwrap();
        assert_eq!(&seen, b"lowhigh");
        assert!(view.write_slice(b"over", GuestAddress(0x3ffd)).is_err());
        assert!(view.write_slice(b"x", GuestAddress(0x10_c000)).is_err());
        assert!(view.check_range(GuestAddress(0x10_b000), 4096));
        assert!(!view.check_range(GuestAddress(0x10_b001), 4096));
        // The first write went over the end of page 3 into the hole, and is not there.
        let written = |page: u64| writes_note(&view, page);
        let noted: Vec<u64> = (0..16).filter(|&page| written(page)).collect();
        assert_eq!(noted, [3, 4]);
    }

    fn writes_note(view: &GuestView, page: u64) -> bool {
        let address = if page < 4 {
            page * PAGE_SIZE
        } else {
            0x10_0000 + (page - 4) * PAGE_SIZE
        };
        let (region, at) = view.to_region_addr(GuestAddress(address)).unwrap();
        region.bitmap().dirty_at(usize::try_from(at.0).unwrap())
    }
}
