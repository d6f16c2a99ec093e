//! From the first instruction to the program.

use core::arch::global_asm;

use limosa_micro_abi::{BootInfo, memory_map};

use crate::console::refuse;
use crate::program::{self, Program};
use crate::vcpu::Vcpu;

// The monitor leaves the boot information in rdi, the index in rsi and an aligned stack: just what
// a C function takes. The section lets the linker script put the entry first and keep it.
global_asm!(
    ".pushsection .text.start, \"ax\", @progbits",
    ".globl _start",
    "_start:",
    "cld",
    "xor ebp, ebp",
    "call micro_entry",
    "ud2",
    ".popsection",
);

/// Runs a program on this vCPU.
///
/// # Safety
/// Called once on each vCPU by the entry code, with what the monitor left in the registers.
pub unsafe fn micro_entry_of<P: Program>(boot: *const BootInfo, vcpu: u64) -> ! {
    if boot.addr() as u64 != memory_map::BOOT_INFO {
        refuse(format_args!("boot information is not where it has to be"));
    }
    // SAFETY: the page at this address is always there, any bytes of it are a `BootInfo`, and the
    // monitor does not write it after the start.
    let boot = unsafe { &*boot };
    if !boot.is_usable() || vcpu >= u64::from(boot.vcpu_count) {
        refuse(format_args!(
            "boot information is not usable: this guest follows version {}, it says {}",
            limosa_micro_abi::ABI_VERSION,
            boot.abi_version,
        ));
    }
    program::run::<P>(Vcpu::new(boot, vcpu as u32), boot)
}
