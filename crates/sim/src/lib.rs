//! A deterministic world in virtual time in which the engines of limosa meet.
//!
//! The engines are the real ones. Around them everything is simulated: guests that write and read
//! and know what they must find, VM processes with their phases and dirty logs, daemons that die
//! and are restarted, a link that is slow, stalls and breaks. A seed decides all of it, so what was
//! seen once can be seen again. After every step a [`checker`] looks for what must never be; a
//! [`trial`] is one seed, and [`Planted`] faults show that the checker bites. [`run`] is one move
//! without faults, measured.
//!
//! Absent on purpose: threads, clocks, files. The world knows nothing of the real operating system,
//! and nothing here decides what the engines decide.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod checker;
mod fault;
mod guest;
mod link;
mod process;
mod random;
mod scenario;
pub mod trial;
mod workload;
mod world;

pub use fault::{Planted, WorldFault};
pub use link::LinkProfile;
pub use scenario::{Scenario, SimulatedMove, run};
pub use workload::Workload;
