//! What a key-value guest decides: how memory is divided among texts, where a key is found, what a client's
//! bytes ask for and what is answered.
//!
//! ```text
//!  bytes of a client ─▶ Parser ─▶ Session ─▶ Store: table of keys ─▶ Blocks: all texts
//!                         └─ arguments are texts from their first byte ─┘
//! ```
//!
//! An argument is written into blocks as it arrives and a value becomes part of the store without being
//! copied, so the longest text is bounded by the memory that is left, and nothing is ever allocated because
//! somebody has announced it.

mod blocks;
mod parser;
mod session;
mod store;
#[cfg(test)]
mod tests;

pub use blocks::{Block, Blocks, Full, Text};
pub use parser::ARGUMENTS_MAX;
pub use session::{Output, REPLY_BYTES_MAX, Session};
pub use store::{Damage, GROUP_SLOTS, Shape, Slot, Store};
