//! Units, sets and codecs of guest pages.
//!
//! Everything that counts, names or groups pages without touching one: the newtypes that keep an
//! index, a count and a size apart, and the dense page set that dirty tracking fills and a round
//! sends. Nothing here does I/O, reads a clock or knows what a virtual machine is.
#![no_std]
#![cfg_attr(test, allow(clippy::unwrap_used))]

extern crate alloc;

pub mod codec;
mod numbering;
mod set;
mod units;

pub use numbering::{DISK_ALIGNMENT, DISK_BYTES_MAX, Numbering};
pub use set::{PageSet, Runs};
pub use units::{
    ByteCount, BytesPerSecond, Gpa, PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange,
    PagesPerSecond, Pfn,
};
