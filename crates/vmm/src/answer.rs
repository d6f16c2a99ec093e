//! What a machine answers: where it is in its life, what a pause found, what a load refused.

use limosa_engine::Timestamp;
use limosa_engine::handover::Phase;
use limosa_engine::throttle::Throttle;
use limosa_pages::{ByteCount, PageCount, PageSet, Pfn};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Where a machine is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    /// It has memory and vCPUs, and waits for state.
    Empty,
    /// It could run and does not.
    Paused,
    /// Its vCPUs run.
    Running,
    /// It has ended and cannot run again.
    Exited(ExitReason),
}

/// Why a machine has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest said that it is finished.
    Finished {
        /// What it said; zero is success.
        status: u32,
    },
    /// It switched itself off.
    PoweredOff,
    /// It reset itself, which a machine does not outlive: a reboot, or the end of a panic.
    Reset,
    /// Its kernel panicked, and its driver said so.
    Panicked,
    /// A fault in a fault handler, or without one.
    TripleFault {
        /// Which vCPU.
        vcpu: u8,
    },
    /// It waits for an interrupt that cannot come.
    Halted {
        /// Which vCPU.
        vcpu: u8,
    },
    /// KVM could not go on.
    Failed {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said.
        what: String,
    },
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "empty"),
            Self::Paused => write!(f, "paused"),
            Self::Running => write!(f, "running"),
            Self::Exited(reason) => write!(f, "exited: {reason}"),
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished { status } => write!(f, "the guest finished with status {status}"),
            Self::PoweredOff => write!(f, "the guest switched itself off"),
            Self::Panicked => write!(f, "the guest's kernel panicked: its console has the reason"),
            Self::Reset => write!(f, "the guest reset itself: it rebooted, or panicked"),
            Self::TripleFault { vcpu } => write!(f, "triple fault on vCPU {vcpu}"),
            Self::Halted { vcpu } => write!(f, "vCPU {vcpu} halted with nothing to wake it"),
            Self::Failed { vcpu, what } => write!(f, "vCPU {vcpu}: {what}"),
        }
    }
}

/// A machine that is paused and saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The state, as [`crate::state`] has it.
    pub sections: Vec<u8>,
    /// What was written since the log was last cleared, if that was asked for.
    pub dirty: Option<PageSet>,
    /// When.
    pub times: SaveTimes,
    /// Pages that the vCPUs need to go on at once: their page tables, code, stacks, descriptor tables,
    /// and what they report in. Ascending, few, and within the memory.
    pub first_needed: Vec<Pfn>,
}

/// When a pause did what. vCPUs save themselves as soon as they have left the guest, and the dirty
/// log is read last, so that what saving itself writes is in it; the times put the reading right
/// after the stop, so that each part has its true length and the sum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveTimes {
    /// When the first vCPU left the guest.
    pub stopped_first: Timestamp,
    /// When the last one did.
    pub stopped_last: Timestamp,
    /// [`SaveTimes::stopped_last`] and the time that reading the dirty log took.
    pub harvested: Timestamp,
    /// When all was saved.
    pub saved: Timestamp,
    /// The guest's time stamp counter, on vCPU 0, at [`SaveTimes::stopped_first`].
    pub stopped_guest_tsc: u64,
}

/// A machine that has just begun to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// When the first vCPU entered the guest.
    pub first_instruction_at: Timestamp,
    /// When the last one did.
    pub last_entered_at: Timestamp,
}

/// A machine that has been given a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// How long that took within the VM process.
    pub took: Duration,
    /// Model-specific registers whose value this host's KVM did not take, none of which the guest
    /// depends on.
    pub refused_msrs: Vec<RefusedMsr>,
}

/// A model-specific register that lost its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedMsr {
    /// Of which vCPU.
    pub vcpu: u8,
    /// The register.
    pub index: u32,
    /// The value that it should have had.
    pub value: u64,
}

/// How a machine does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Who may run the guest.
    pub phase: Phase,
    /// Where the machine is in its life.
    pub run_state: RunState,
    /// How many pages are missing, as the process sees it; `None` if none can be.
    pub missing: Option<PageCount>,
    /// How fast the guest may write; `None` if as fast as it can.
    pub throttle: Option<Throttle>,
    /// What the guest has given up of its memory; `None` if it cannot.
    pub balloon: Option<BalloonInfo>,
}

/// What a guest has given up of its memory, and what it says of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// Whether its driver is there.
    pub has_driver: bool,
    /// How much its balloon is to hold.
    pub target: ByteCount,
    /// How much it holds, by its driver's word.
    pub held: ByteCount,
    /// How much was taken out of its memory since it is here, what it reported as free included; a page
    /// that was touched again and given up again counts twice.
    pub reclaimed: ByteCount,
    /// What its driver has told last, if it has; some seconds old, perhaps.
    pub memory: Option<GuestMemory>,
    /// How often it has told since it is here.
    pub tellings: u64,
}

/// A guest's memory as the guest sees it; what it does not tell is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// All, without what is in the balloon where the driver counts so.
    pub total: Option<ByteCount>,
    /// Used for nothing.
    pub free: Option<ByteCount>,
    /// What programs could have without swapping: free, and caches that can go.
    pub available: Option<ByteCount>,
}

/// A part of the state that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionInfo {
    /// What it is.
    pub name: String,
    /// Of which vCPU, or which of several.
    pub instance: u16,
    /// Version of its layout.
    pub version: u16,
    /// Its size.
    pub bytes: u32,
}
