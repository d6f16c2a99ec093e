//! What a micro guest and the monitor that runs it agree on: where things lie in the guest's
//! memory, what the ports mean, and the two structures that they exchange there.
//!
//! The monitor fills one [`BootInfo`] before the first instruction. Each vCPU writes its own
//! [`Report`], which the monitor reads straight from the memory file, without asking the guest.
//! Everything else goes through five I/O ports, and the registers of devices (virtio 1.2) if the guest has
//! any ([`memory_map::DEVICES`]). Another monitor than limosa's can do with less ([`pvh`],
//! [`memory_map::COMMAND_WORD`]). The whole contract in words is
//! `docs/micro-guests.md`.
//!
//! Invariants: every structure has a fixed size and no padding, so any bytes are a value of it and
//! neither side needs unsafe code to read what the other wrote. A change of a layout or of a
//! meaning changes [`ABI_VERSION`]; what guests of that version need not know does not.
//!
//! Deliberately absent: port instructions (they belong to the guest), page tables and segments
//! (they belong to the monitor), and every policy about when a command is sent.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod command;
pub mod memory_map;
pub mod port;
pub mod pvh;
pub mod report;

mod boot;

pub use boot::{ArgsError, BootInfo};
pub use command::{Command, CommandKind};
pub use report::{ErrorKind, FirstError, Report, Stall, StallGroup, State};

/// Version of this contract. Both sides refuse another one.
pub const ABI_VERSION: u32 = 2;

/// Bytes of a guest page.
pub const PAGE_BYTES: u64 = 4096;

/// Most vCPUs that a micro guest can have; report pages and stacks are laid out for this many.
pub const VCPUS_MAX: u32 = 8;

/// Bytes of argument text that fit into a [`BootInfo`].
pub const ARGS_BYTES_MAX: usize = 2048;
