//! The end of a guest that found itself in the wrong.

use core::panic::PanicInfo;

use limosa_micro_abi::port::EXIT_PANIC;
use limosa_micro_abi::{State, VCPUS_MAX, memory_map};

use crate::{console, port, vcpu};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    vcpu::publish_state(own_index(), State::Failed);
    console::line(format_args!("{info}"));
    port::exit(EXIT_PANIC)
}

/// Which vCPU this is: without thread-local storage the stack tells it.
fn own_index() -> u32 {
    let on_stack = 0_u8;
    let offset = (&raw const on_stack as u64).saturating_sub(memory_map::STACKS);
    let index = offset / memory_map::STACK_BYTES;
    // A stack that ran over could lie anywhere; the answer is then as good as any.
    index.min(u64::from(VCPUS_MAX) - 1) as u32
}
