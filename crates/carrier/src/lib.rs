//! Carries out what the engine decides: the world of sockets, threads and VM processes.
//!
//! A migration at the source is a [`Migration`]: one thread that owns the engine and talks to the
//! VM process, one that reads control frames, one a push stream. At the target a [`Listener`]
//! accepts connections and makes one such set a migration. Every thread only turns actions into
//! system calls and what happened into events: no decision is made here.
//!
//! Absent on purpose: policy, retries of a migration, names of VMs, HTTP.
#![cfg_attr(test, allow(clippy::unwrap_used))]

// Tests share what they need with those that see this crate from outside.
#[cfg(test)]
extern crate self as limosa_carrier;

mod bucket;
mod channel;
mod coding;
mod connection;
mod credentials;
mod deferral;
mod demanded;
mod digest;
mod disks;
mod faults;
mod guest;
mod hold;
mod installer;
mod journal_file;
mod missing;
mod modesty;
mod outcome;
mod pace;
mod preflight;
mod pull_server;
mod push_order;
mod receiver;
mod sender;
mod source;
mod target;
mod wire_meter;

pub use coding::Compression;
pub use connection::Dial;
pub use credentials::{CA_CERTIFICATE, Credentials, CredentialsError, HOST_CERTIFICATE, HOST_KEY};
pub use demanded::{Demanded, NoRecord, RUNS_MAX};
pub use guest::{CommitError, Guest, GuestError, LentDisks, Running, Saved};
pub use journal_file::{JournalError, replay_file};
pub use outcome::tell_memory_lost;
pub use preflight::{Preflight, PreflightRequest, preflight};
pub use push_order::PushOrder;
pub use source::{
    AbortTooLate, MigrateRequest, Migration, MigrationStatus, RATE_MIN, StartError, copied_disks,
    draw_id,
};
pub use target::{IncomingStatus, Listener, TargetHost};
