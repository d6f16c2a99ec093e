//! The live migration engine: decides, never acts.
//!
//! One migration is two state machines, [`source`] and [`target`], that meet over control frames
//! ([`wire`]). Each takes facts ([`source::SourceEvent`], [`target::TargetEvent`]) with the time at
//! which they were learnt, and answers with actions. What carries the actions out (sockets, threads,
//! KVM) is not known here: the same engine runs in `carrier` and, in virtual time, in `sim`.
//! Techniques differ by their [`policy`] alone; who may run the guest is a record of the
//! [`handover`]; what happened is in the [`report`] and can be replayed from the [`journal`].
#![no_std]
#![cfg_attr(test, allow(clippy::unwrap_used))]

extern crate alloc;

pub mod deferral;
pub mod estimate;
pub mod handover;
pub mod journal;
pub mod policy;
pub mod report;
pub mod source;
pub mod streams;
pub mod target;
pub mod throttle;
mod time;
pub mod wire;

pub use time::Timestamp;
