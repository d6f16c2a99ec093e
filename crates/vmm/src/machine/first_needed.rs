//! Which pages a guest needs to go on at once, told from its registers.
//!
//! For each vCPU: the page tables that its instruction and its stack are found by, those pages
//! themselves, its descriptor tables and task state, and what a micro guest reports in. Each of them
//! that has to be fetched over a network after the switch is a stall, one behind the other.
//!
//! Page tables are the guest's to write: the walk ends after five levels, leaves the memory never, and
//! reads the file, so that a wild entry makes no page exist.

use crate::layout;
use crate::protocol::FIRST_NEEDED_MAX;
use limosa_micro_abi::memory_map;
use limosa_os::SharedMemory;
use limosa_os::kvm::{VcpuPart, kvm_regs, kvm_sregs};
use limosa_pages::{Gpa, PAGE_SIZE, Pfn};
use std::collections::BTreeSet;
use std::mem::offset_of;

const PAGING: u64 = 1 << 31;
const FIVE_LEVELS: u64 = 1 << 12;
const LONG_MODE_ACTIVE: u64 = 1 << 10;
const PRESENT: u64 = 1 << 0;
const LARGE: u64 = 1 << 7;
/// The address in an entry of a page table.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where a vCPU is in its guest's memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    rip: u64,
    rsp: u64,
    gdt: u64,
    idt: u64,
    task: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

impl Place {
    /// Picks what is of interest out of a part that was just read.
    pub(super) fn note(&mut self, part: VcpuPart, bytes: &[u8]) {
        let word = |at: usize| {
            let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
            word.map_or(0, u64::from_le_bytes)
        };
        match part {
            VcpuPart::Registers => {
                self.rip = word(offset_of!(kvm_regs, rip));
                self.rsp = word(offset_of!(kvm_regs, rsp));
            }
            // The newer form of the structure begins with the older one.
            VcpuPart::SpecialRegisters => {
                self.gdt = word(offset_of!(kvm_sregs, gdt.base));
                self.idt = word(offset_of!(kvm_sregs, idt.base));
                self.task = word(offset_of!(kvm_sregs, tr.base));
                self.cr0 = word(offset_of!(kvm_sregs, cr0));
                self.cr3 = word(offset_of!(kvm_sregs, cr3));
                self.cr4 = word(offset_of!(kvm_sregs, cr4));
                self.efer = word(offset_of!(kvm_sregs, efer));
            }
            _ => {}
        }
    }

    /// The addresses that are needed first, as the vCPU sees them.
    fn addresses(&self) -> [u64; 6] {
        let below = self.rsp.wrapping_sub(PAGE_SIZE);
        [self.rip, self.rsp, below, self.gdt, self.idt, self.task]
    }
}

/// The pages that vCPUs at these places need first, ascending.
pub(super) fn pages(memory: &SharedMemory, places: &[Place]) -> Vec<Pfn> {
    let mut found = BTreeSet::new();
    let mut add = |offset: u64| {
        if offset < memory.size().get() && found.len() < FIRST_NEEDED_MAX {
            found.insert(Pfn::new(offset / PAGE_SIZE));
        }
    };
    for place in places {
        for address in place.addresses() {
            walk(memory, place, address, &mut add);
        }
    }
    add(memory_map::BOOT_INFO);
    for vcpu in (0..).take(places.len()) {
        add(memory_map::REPORTS + vcpu * PAGE_SIZE);
    }
    found.into_iter().collect()
}

/// Adds the file offsets of the page tables on the way to an address, and of what is there.
fn walk(memory: &SharedMemory, place: &Place, address: u64, add: &mut impl FnMut(u64)) {
    let mut visit = |physical: u64| {
        let offset = layout::file_offset(Gpa::new(physical), memory.size())?;
        add(offset);
        Some(offset)
    };
    if place.cr0 & PAGING == 0 {
        visit(address);
        return;
    }
    if place.efer & LONG_MODE_ACTIVE == 0 {
        // Older forms of page tables: no guest stays in them for long.
        visit(place.cr3 & 0xffff_ffe0);
        return;
    }
    let levels: u32 = if place.cr4 & FIVE_LEVELS != 0 { 5 } else { 4 };
    let mut table = place.cr3 & ADDRESS;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let index = address >> shift & 0x1ff;
        let mut entry = [0; 8];
        let read = |offset: u64| memory.read_file_at(offset, &mut entry).ok();
        if visit(table + index * 8).and_then(read).is_none() {
            return;
        }
        let entry = u64::from_le_bytes(entry);
        if entry & PRESENT == 0 {
            return;
        }
        table = entry & ADDRESS;
        let is_page = level == 0 || (level <= 2 && entry & LARGE != 0);
        if is_page {
            let within = (1 << shift) - 1;
            visit(table & !within | address & within);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_os::PageKind;
    use limosa_pages::{ByteCount, PageCount, PageRange};

    fn check(entries: &[(u64, u64)], place: Place, expect: &[u64]) {
        let memory = SharedMemory::create(ByteCount::new(4 << 20), PageKind::Small).unwrap();
        for (at, entry) in entries {
            memory.write_at(*at, &entry.to_le_bytes()).unwrap();
        }
        let all = PageRange::new(Pfn::new(0), memory.page_count());
        let exist = |memory: &SharedMemory| -> PageCount {
            let extents = memory.data_extents(all).unwrap();
            PageCount::new(extents.iter().map(|extent| extent.count.get()).sum())
        };
        let before = exist(&memory);
        let found: Vec<u64> = pages(&memory, &[place]).into_iter().map(Pfn::get).collect();
        // Page 0 is where the descriptor tables are; 1 and 2 are what a micro guest reports in.
        assert_eq!(found, expect);
        assert_eq!(exist(&memory), before, "looking makes no page");
    }

    #[test]
    fn tables_are_walked_and_wild_ones_are_harmless() {
        let flat = Place {
            rip: 0x20_0123,
            rsp: 0x11_0000,
            ..Place::default()
        };
        check(&[], flat, &[0, 1, 2, 0x10f, 0x110, 0x200]);
        let paged = Place {
            cr0: PAGING,
            cr3: 0x1_0018,
            efer: LONG_MODE_ACTIVE,
            ..flat
        };
        check(&[], paged, &[1, 2, 0x10]);
        let large = [
            (0x1_0000, 0x1_1007),
            (0x1_1000, 0x1_2007),
            (0x1_2000, 0x87),
            (0x1_2008, 0x20_0087),
        ];
        check(
            &large,
            paged,
            &[0, 1, 2, 0x10, 0x11, 0x12, 0x10f, 0x110, 0x200],
        );
        let small = [
            (0x1_0000, 0x1_1007),
            (0x1_1000, 0x1_2007),
            (0x1_2008, 0x1_3007),
            (0x1_3000, 0x8000_0000_0030_0007),
        ];
        check(&small, paged, &[1, 2, 0x10, 0x11, 0x12, 0x13, 0x300]);
        // A table that is its own entry, and entries that lead out of the memory.
        check(&[(0x1_0000, 0x1_0007)], paged, &[1, 2, 0x10]);
        let wild = [(0x1_0000, !LARGE)];
        check(&wild, paged, &[1, 2, 0x10]);
        let five = Place {
            cr4: FIVE_LEVELS,
            cr3: u64::MAX,
            rip: u64::MAX,
            ..paged
        };
        check(&[], five, &[1, 2]);
    }
}
