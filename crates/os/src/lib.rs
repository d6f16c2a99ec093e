//! The Linux kernel for the rest of the project: memory files and their mappings, KVM, descriptors
//! over sockets, signals, clocks.
//!
//! Every piece wraps a kernel interface at once in a type that cannot be misused, so that no other
//! crate of the host side needs unsafe code. Guest memory is never lent out as a slice, because it
//! changes while one looks: it is copied, hashed, or handed to the kernel by address.
//!
//! Deliberately absent: what a migration is, what a machine looks like, any policy.
#![cfg(target_os = "linux")]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod alarm;
pub mod bitmap;
mod clock;
pub mod descriptor;
pub mod dirty;
pub mod disk;
mod holes;
pub mod kvm;
mod mapping;
pub mod memory;
pub mod process;
pub mod socket;
pub mod tap;
pub mod thread;
pub mod userfault;

pub use bitmap::SharedBitmap;
pub use clock::{boot_id, monotonic_nanos, thread_nanos, tsc};
pub use memory::{MemoryError, PageKind, SharedMemory};
