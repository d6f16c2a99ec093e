//! Where things lie in the guest's virtual memory.
//!
//! Virtual addresses are offsets into the memory file: a guest sees dense memory from zero to
//! its size, whatever holes the guest physical space has, so `address / 4096` is the page's
//! number in the memory file.

use crate::{PAGE_BYTES, VCPUS_MAX};

/// The page that holds the [`BootInfo`](crate::BootInfo).
pub const BOOT_INFO: u64 = 0x1000;

/// The command word (32 bits) of a guest whose monitor does not answer heartbeats: at the end of the
/// boot information's page, written from outside while the guest runs.
pub const COMMAND_WORD: u64 = BOOT_INFO + PAGE_BYTES - 8;

/// The first report page; vCPU `n` has the `n`-th page from here.
pub const REPORTS: u64 = 0x2000;

/// Start of the area that belongs to the monitor: task state segment, descriptor tables, page
/// tables. A guest neither reads nor writes it.
pub const MONITOR_START: u64 = 0x1_0000;

/// End (exclusive) of the monitor's area.
pub const MONITOR_END: u64 = STACKS;

/// The lowest stack; vCPU `n` has the `n`-th one from here.
pub const STACKS: u64 = 0x10_0000;

/// Bytes of the stack of one vCPU.
pub const STACK_BYTES: u64 = 0x1_0000;

/// Lowest address that a guest's image may occupy.
pub const IMAGE_START: u64 = 0x20_0000;

/// The heap starts at the first multiple of this after the image.
pub const HEAP_ALIGNMENT: u64 = 0x20_0000;

/// Registers of the first device, if the boot information counts any; they are behind all memory.
pub const DEVICES: u64 = 0x40_0000_0000;

/// From the registers of a device to those of the next one.
pub const DEVICE_BYTES: u64 = 0x1000;

/// Most devices.
pub const DEVICES_MAX: u32 = 8;

/// Address of the report page of a vCPU.
///
/// # Panics
/// If the index is not below [`VCPUS_MAX`].
#[must_use]
pub const fn report_address(vcpu: u32) -> u64 {
    assert!(vcpu < VCPUS_MAX, "a micro guest has at most 8 vCPUs");
    REPORTS + vcpu as u64 * PAGE_BYTES
}

/// Initial stack pointer of a vCPU: the end of its stack, a multiple of 16.
///
/// # Panics
/// If the index is not below [`VCPUS_MAX`].
#[must_use]
pub const fn stack_top(vcpu: u32) -> u64 {
    assert!(vcpu < VCPUS_MAX, "a micro guest has at most 8 vCPUs");
    STACKS + (vcpu as u64 + 1) * STACK_BYTES
}

/// Where the heap starts behind an image that ends (exclusive) at `image_end`.
#[must_use]
pub const fn heap_start(image_end: u64) -> u64 {
    image_end.next_multiple_of(HEAP_ALIGNMENT)
}

const _: () = assert!(BOOT_INFO + size_of::<crate::BootInfo>() as u64 <= COMMAND_WORD);
const _: () = assert!(BOOT_INFO + PAGE_BYTES <= REPORTS);
const _: () = assert!(report_address(VCPUS_MAX - 1) + PAGE_BYTES <= MONITOR_START);
const _: () = assert!(stack_top(VCPUS_MAX - 1) <= IMAGE_START);
