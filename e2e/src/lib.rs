//! What the end-to-end tests stand on: the real binary, real daemons, real guests, real TCP.
//!
//! ```text
//!  tests ─▶ Pair ─┬─ Daemon a ── VM processes        Hold: a migration waits at one action
//!                 ├─ Daemon b ── VM processes        peer: somebody who speaks the protocol badly
//!                 ├─ Beats: who runs the guest, seen from outside
//!                 └─ Link: a way between them that can be cut; strike: whom else to kill
//!  loads: clients of a guest in a network of its own
//! ```
//!
//! A test asks the daemons through their control interface, as an operator does, and believes them
//! only as far as the guest itself (sweeps), its heartbeats and `/proc` say the same.
//!
//! Nothing here waits by sleeping for a fixed time: every wait looks for a fact and has a limit. A
//! test that has no `/dev/kvm` says that it is skipped. Whatever happens, a daemon and all VM
//! processes of its state directory end with its [`Daemon`].
//!
//! Absent on purpose: knowledge of how daemon and VM process work inside.

pub mod beats;
pub mod binary;
pub mod cases;
pub mod daemon;
pub mod guest;
pub mod hold;
pub mod hosts;
pub mod link;
pub mod loads;
pub mod pair;
pub mod peer;
pub mod points;
pub mod process;
pub mod resources;
pub mod strike;
pub mod wait;

pub use beats::Beats;
pub use daemon::Daemon;
pub use hold::Hold;
pub use link::Link;
pub use pair::{Pair, VM};

use std::io::Write;

/// Whether guests can run here; says so if not, past the test runner's capture of output.
pub fn has_kvm() -> bool {
    let is_there = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !is_there {
        skip("no /dev/kvm");
    }
    is_there
}

/// Says that something was not tested. The line must be seen, and the runner keeps what `println!`
/// prints from being seen.
pub fn skip(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    writeln!(std::io::stderr(), "{name} ... skipped: {why}").expect("stderr takes a line");
}
