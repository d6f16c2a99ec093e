//! The ports and the time stamp counter as functions.

use core::arch::asm;

use limosa_micro_abi::{memory_map, port};

fn read(port: u16) -> u32 {
    let value;
    // SAFETY: the monitor opens its ports to us and answers each of them with a number; the
    // default options tell the compiler that memory may be read meanwhile, as the monitor does.
    unsafe {
        asm!("in eax, dx", out("eax") value, in("dx") port, options(nostack, preserves_flags))
    };
    value
}

fn write(port: u16, value: u32) {
    // SAFETY: as for `read`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags))
    };
}

/// Tells the monitor that we live and returns its command word.
pub fn heartbeat() -> u32 {
    read(port::HEARTBEAT)
}

/// Tells a monitor that has only a console that we live; the command word that stands in memory.
pub fn heartbeat_on_console() -> u32 {
    console(port::CONSOLE_BEAT);
    let word = memory_map::COMMAND_WORD as *const u32;
    // SAFETY: the page of the boot information is always there, the word is aligned and lies behind
    // what a reference to that information covers; it is written from outside, hence volatile.
    unsafe { word.read_volatile() }
}

/// Sleeps for at most so long.
pub fn wait(microseconds: u32) {
    write(port::WAIT_MICROSECONDS, microseconds);
    // Both answers mean the same here: the caller looks at the clock.
    read(port::WAIT);
}

/// Writes a byte of text to the monitor's log.
pub fn console(byte: u8) {
    // SAFETY: as for `read`.
    unsafe {
        asm!("out dx, al", in("dx") port::CONSOLE, in("al") byte, options(nostack, preserves_flags));
    }
}

/// Ends the virtual machine.
pub fn exit(status: u32) -> ! {
    loop {
        write(port::EXIT, status);
        wait(1_000_000);
    }
}

/// The time stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: the counter can be read at every privilege level here (CR4.TSD is clear).
    unsafe { core::arch::x86_64::_rdtsc() }
}
