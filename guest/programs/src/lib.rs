//! What every micro guest needs below its program: the entry, the ports, the report, time.
//!
//! A program implements [`Program`] and names itself with [`program!`]; [`start`] does the rest:
//! it reads the boot information, prepares the program, and then loops over a look at the clock,
//! commands, and single steps of the program. Other languages write the same against
//! `docs/micro-guests.md`.
//!
//! Invariants: a vCPU touches only its own report, stack and share of the heap, and the few
//! atomics of [`command_board`]; it never waits longer than until its next beat.
//!
//! Programs that need one have a network interface ([`network`]).
//!
//! Deliberately absent: interrupts, system calls, allocation, thread-local storage, floating
//! point. There is no kernel below.
#![no_std]

mod console;
mod entry;
mod memory;
mod panic;
mod port;
mod program;
mod vcpu;

pub mod command_board;
pub mod network;
pub mod virtio;

pub use console::refuse;
pub use entry::micro_entry_of;
pub use program::{Program, Refusal, Sound, Swept};
pub use vcpu::{Vcpu, claim};

/// Makes a type that implements [`Program`] the one that this image runs.
#[macro_export]
macro_rules! program {
    ($program:ty) => {
        /// Called by the entry code of the runtime on every vCPU.
        ///
        /// # Safety
        /// Only by that code: once a vCPU, with what the monitor left in the registers.
        // SAFETY: no other function of an image has this name; the runtime leaves it to us.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn micro_entry(boot: *const $crate::BootInfo, vcpu: u64) -> ! {
            // SAFETY: the obligations are the same and were passed on.
            unsafe { $crate::micro_entry_of::<$program>(boot, vcpu) }
        }
    };
}

#[doc(no_inline)]
pub use limosa_micro_abi::BootInfo;
