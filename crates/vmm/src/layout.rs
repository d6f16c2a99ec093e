//! Where the memory file lies in the guest's physical address space.
//!
//! The file is dense; the address space has a hole from 3 to 4 GiB, where processors have their
//! interrupt controllers. So the file's first 3 GiB are where they are, the rest is 1 GiB higher.

use limosa_os::kvm::Region;
use limosa_pages::{ByteCount, Gpa, PAGE_SIZE, PageCount, PageRange, Pfn};

/// Start of the hole.
pub(crate) const HOLE_START: u64 = 3 << 30;
/// Size of the hole.
pub(crate) const HOLE_BYTES: u64 = 1 << 30;

/// The regions of a guest with that much memory.
pub(crate) fn regions(memory: ByteCount) -> Vec<Region> {
    let low = memory.get().min(HOLE_START);
    let region = |start, offset: u64, bytes: u64| Region {
        start: Gpa::new(start),
        pages: PageRange::new(
            Pfn::new(offset / PAGE_SIZE),
            PageCount::new(bytes / PAGE_SIZE),
        ),
    };
    let mut regions = vec![region(0, 0, low)];
    if memory.get() > low {
        regions.push(region(HOLE_START + HOLE_BYTES, low, memory.get() - low));
    }
    regions
}

/// Where the guest sees the byte at `offset` of the memory file.
pub(crate) const fn physical_address(offset: u64) -> Gpa {
    Gpa::new(if offset < HOLE_START {
        offset
    } else {
        offset + HOLE_BYTES
    })
}

/// Where in the memory file the byte lies that the guest sees there; `None` if there is no memory.
pub(crate) fn file_offset(address: Gpa, memory: ByteCount) -> Option<u64> {
    let address = address.get();
    let offset = match address {
        0..HOLE_START => address,
        _ => address
            .checked_sub(HOLE_BYTES)
            .filter(|&offset| offset >= HOLE_START)?,
    };
    (offset < memory.get()).then_some(offset)
}

/// An empty memory of that size as a guest and its devices see it, for tests.
#[cfg(test)]
pub(crate) fn empty_view(memory: ByteCount) -> limosa_os::memory::GuestView {
    use limosa_os::dirty::device::DeviceWrites;
    use limosa_os::{PageKind, SharedMemory};
    use std::sync::Arc;

    let shared = Arc::new(SharedMemory::create(memory, PageKind::Small).unwrap());
    let writes = Arc::new(DeviceWrites::nothing(shared.page_count()));
    limosa_os::memory::view(&shared, &regions(memory), &writes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mebibytes: u64, expect: &str) {
        let text: Vec<String> = regions(ByteCount::new(mebibytes << 20))
            .iter()
            .map(|region| {
                let pages = region.pages;
                format!(
                    "{:#x}: {:#x}+{:#x}",
                    region.start.get(),
                    pages.first.get(),
                    pages.count.get()
                )
            })
            .collect();
        assert_eq!(text.join(", "), expect);
    }

    #[test]
    fn memory_goes_round_the_hole() {
        check(4, "0x0: 0x0+0x400");
        check(3072, "0x0: 0x0+0xc0000");
        check(3074, "0x0: 0x0+0xc0000, 0x100000000: 0xc0000+0x200");
        assert_eq!(physical_address(HOLE_START - 1).get(), HOLE_START - 1);
        assert_eq!(physical_address(HOLE_START).get(), 4 << 30);
        let check = |address, expect| {
            let memory = ByteCount::new(3074 << 20);
            assert_eq!(file_offset(Gpa::new(address), memory), expect);
        };
        check(0, Some(0));
        check(HOLE_START - 1, Some(HOLE_START - 1));
        check(HOLE_START, None);
        check((4 << 30) - 1, None);
        check(4 << 30, Some(HOLE_START));
        check((4 << 30) + (2 << 20), None);
        check(u64::MAX, None);
    }
}
