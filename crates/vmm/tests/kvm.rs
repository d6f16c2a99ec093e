//! Tests with real virtual machines, in this process and in processes of their own. Without
//! `/dev/kvm` each of them says `skipped`.
#![allow(clippy::unwrap_used)]

#[path = "kvm/dirty_log.rs"]
mod dirty_log;
#[path = "kvm/faults.rs"]
mod faults;
#[path = "kvm/guests.rs"]
mod guests;
#[path = "kvm/linux.rs"]
mod linux;
#[path = "kvm/machines.rs"]
mod machines;
#[path = "kvm/moves.rs"]
mod moves;
#[path = "kvm/networks.rs"]
mod networks;
#[path = "kvm/processes.rs"]
mod processes;
#[path = "kvm/state.rs"]
mod state;
#[path = "kvm/throttle.rs"]
mod throttle;
#[path = "kvm/vm_process.rs"]
mod vm_process;
