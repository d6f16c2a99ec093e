//! From where a PVH loader leaves a machine to where a micro guest begins: for monitors other than
//! limosa's own.
//!
//! A loader enters here in 32-bit mode without paging, at privilege level 0. Whoever composes the
//! image has put descriptors, page tables and boot information behind this code, at the addresses
//! of `limosa_micro_abi::pvh`; all that is left are the registers that only privileged code can
//! set. No stack is used before the guest's own, and no memory but that one and the page of the boot
//! information is written.
//!
//! [PVH] has the state at the entry. Software KVM emulates each of these instructions, so there
//! are few of them; `iretq` is taken since such an emulator knows no `sysretq`.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;
use limosa_micro_abi::{BootInfo, memory_map, pvh};

global_asm!(
    ".pushsection .text.start, \"ax\", @progbits",
    ".code32",
    ".globl _start",
    "_start:",
    "cli",
    "cld",
    "lgdt [{gdt_pointer}]",
    "mov eax, {cr4}",
    "mov cr4, eax",
    "mov eax, {root}",
    "mov cr3, eax",
    "mov ecx, 0xc0000080", // EFER: system calls and long mode
    "mov eax, 0x101",
    "xor edx, edx",
    "wrmsr",
    "mov eax, {cr0}",
    "mov cr0, eax",
    ".byte 0xea", // A far jump, which the assembler's other syntax has no word for.
    ".long 2f",
    ".word {kernel_code}",
    ".code64",
    "2:",
    "mov eax, {kernel_data}",
    "mov ss, eax",
    "mov ds, eax",
    "mov es, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov eax, {task}",
    "ltr ax",
    // Firmware may use low memory until it jumps here, so its place was not filled before.
    "mov esi, {boot_info_copy}",
    "mov edi, {boot_info}",
    "mov ecx, {boot_info_words}",
    "rep movsq",
    "mov esp, {stack}",
    "push {user_data}",
    "push {stack}",
    "push {flags}",
    "push {user_code}",
    "push {entry}",
    "mov edi, {boot_info}",
    "xor esi, esi",
    "iretq",
    ".popsection",
    gdt_pointer = const pvh::GDT_POINTER,
    cr4 = const pvh::CR4,
    cr0 = const pvh::CR0,
    root = const pvh::ROOT_TABLE,
    kernel_code = const pvh::KERNEL_CODE,
    kernel_data = const pvh::KERNEL_DATA,
    user_code = const pvh::USER_CODE,
    user_data = const pvh::USER_DATA,
    task = const pvh::TASK,
    flags = const pvh::FLAGS,
    boot_info = const memory_map::BOOT_INFO,
    boot_info_copy = const pvh::BOOT_INFO,
    boot_info_words = const size_of::<BootInfo>() / 8,
    stack = const memory_map::stack_top(0),
    entry = const memory_map::IMAGE_START,
);

/// Nothing here can panic; a program has to say what would happen.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
