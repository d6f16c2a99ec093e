//! Clients of a guest that keeps values, and a network for them, the guest and two hosts.
//!
//! ```text
//!  Lan: host a, host b and the clients, each in a network namespace
//!   └─ redis::Connection ◀── Keeper: what to ask, and what must be answered
//!       └─ Load: asks as fast as it is answered, or when it is due; notes how long that took
//! ```
//!
//! Invariants: every answer is compared with what its client knows; an answer that is late is not a request
//! fewer, since times are taken from when a request was due.
//!
//! Deliberately absent: daemons, guests and moves. Who starts them in this network is above this crate, and so is
//! what is made of the times.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod keeper;
pub mod lan;
pub mod load;
pub mod redis;

pub use keeper::{Keeper, Keys};
pub use lan::{Lan, LanError};
pub use load::{Client, Load, Seen};
