//! What the guest programs decide, without ports or raw memory: so it is tested on the host.
//!
//! [`page`] is a page that proves itself, [`pattern`] chooses the next one, [`limiter`] says when,
//! [`stall`] notices that time passed without us, [`arguments`] and [`layout`] say what belongs to
//! whom, [`kv`] keeps values for clients, [`ring`] calls devices. Time is always an argument, in ticks of
//! the time stamp counter.
//!
//! Deliberately absent: unsafe code, floating point, allocation.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(test)]
extern crate std;

pub mod arguments;
pub mod kv;
pub mod layout;
pub mod limiter;
pub mod page;
pub mod pattern;
pub mod random;
pub mod ring;
pub mod stall;
pub mod table;
pub mod ticks;
