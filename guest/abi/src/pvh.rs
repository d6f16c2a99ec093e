//! Where a micro guest's image has what limosa's monitor would set in registers, if another one
//! loads it: between the program and its heap.
//!
//! The program `pvh` of the guests is linked to [`START`] and takes everything else from these
//! addresses. Whoever composes an image fills them; the tables map the guest's dense addresses to
//! wherever that monitor has its memory.

use crate::PAGE_BYTES;

/// The code, and end (exclusive) of what the program beside it may use.
pub const START: u64 = 0x30_0000;

/// Segment descriptors; the first 8 bytes, which no selector can mean, stay zero.
pub const GDT: u64 = START + PAGE_BYTES;

/// Size and address of the descriptors as `lgdt` takes them.
pub const GDT_POINTER: u64 = GDT + 0x100;

/// The task state segment and its I/O bitmap of zeros.
pub const TSS: u64 = GDT + PAGE_BYTES;

/// What is copied to [`memory_map::BOOT_INFO`](crate::memory_map::BOOT_INFO).
pub const BOOT_INFO: u64 = TSS + 3 * PAGE_BYTES;

/// The page table of the highest level; the others follow it.
pub const ROOT_TABLE: u64 = BOOT_INFO + PAGE_BYTES;

/// End (exclusive) of all of this at most; a heap begins here.
pub const END: u64 = 0x40_0000;

/// Selector of code at privilege level 0.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of data at privilege level 0.
pub const KERNEL_DATA: u16 = 0x10;
/// Selector of data at privilege level 3.
pub const USER_DATA: u16 = 0x2b;
/// Selector of code at privilege level 3.
pub const USER_CODE: u16 = 0x33;
/// Selector of the task state segment, two descriptors long.
pub const TASK: u16 = 0x40;
/// Size of the descriptors.
pub const GDT_BYTES: u16 = 0x50;

/// Protected mode, monitored coprocessor, extension type, numeric errors, write protection,
/// alignment mask, paging.
pub const CR0: u32 = 0x8005_0033;
/// Large addresses, and vector instructions with their exceptions.
pub const CR4: u32 = 0x620;
/// The bit that is always one, and I/O privilege level 3.
pub const FLAGS: u32 = 0x3002;

const _: () = assert!(size_of::<crate::BootInfo>().is_multiple_of(8));
const _: () = assert!(GDT_BYTES as u64 <= GDT_POINTER - GDT);
const _: () = assert!(crate::memory_map::heap_start(START + 1) == END);
