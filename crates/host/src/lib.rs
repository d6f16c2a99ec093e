//! The daemon of a host, its control interface and a client for it.
//!
//! ```text
//!  http ──▶ host ──▶ registry     names and what may be done to them
//!             │  └─▶ migrations   running and past ones
//!             ├────▶ machine      VM processes
//!  arrivals ──┴────▶ ledger       how attempts to arrive here ended
//! ```
//!
//! [`api`] is what stands in the JSON, [`client`] asks for it, [`daemon`] is the life of the
//! process. Nothing here decides how a guest moves: the engine does, and the carrier does it.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod api;
pub mod certificates;
pub mod client;
pub mod daemon;
mod departures;
pub mod state_dir;

mod arrivals;
mod host;
mod http;
mod ledger;
mod machine;
mod migrations;
mod new_disks;
mod notes;
mod records;
mod refusal;
mod registry;

pub use http::openapi;
pub use limosa_carrier::{JournalError, replay_file as replay_journal};

pub use limosa_vmm::heartbeat::Heartbeat;

pub use limosa_vmm::process::ServeOptions;

/// The life of one VM process.
///
/// # Errors
/// Its socket cannot be opened, or its daemon breaks the protocol.
pub fn serve_vm(options: &ServeOptions) -> anyhow::Result<()> {
    limosa_vmm::process::serve(options).map_err(Into::into)
}
