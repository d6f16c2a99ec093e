//! A virtual machine that can be paused, saved, restored, and whose memory can be lent out.
//!
//! [`machine::Machine`] is one machine with its vCPUs; [`process`] serves it on a socket, as the
//! process that each machine has to itself; [`client`] is the other end of that socket, in the
//! daemon. State travels as typed sections ([`state`]), what machine it is as a description
//! ([`config`]).
//!
//! The process never touches the network of a migration and parses nothing that came over it but its
//! own sections and description. Of migrations it knows one thing: the record of who may run the
//! guest, whose rules are the engine's.
//!
//! Deliberately absent: PCI, firmware.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod acpi;
mod allowance;
pub mod answer;
pub mod arrival_note;
mod board;
mod boot;
pub mod client;
pub mod config;
mod console;
pub mod cpu;
pub mod heartbeat;
mod layout;
pub mod machine;
pub mod process;
mod protocol;
pub mod state;
mod throttle;
mod virtio;

pub use boot::elf::ElfError;
pub use boot::linux::{CMDLINE_BYTES_MAX, LinuxError, LinuxImage};
pub use console::{ConsoleLine, Terminal};
pub use virtio::DeviceError;
