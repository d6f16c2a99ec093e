//! What the target's engine is told and what it asks for.

use crate::handover::{Phase, Resolution};
use crate::report::FaultReport;
use crate::time::Timestamp;
use crate::wire::{ControlFrame, Digest, Start};
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::PageCount;
use serde::{Deserialize, Serialize};

/// A fact for the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetEvent {
    /// A control frame arrived; the first one is [`ControlFrame::Start`].
    Frame(ControlFrame),
    /// The VM process exists, its phase is [`Phase::Preparing`], every stream is up.
    Created {
        /// Its page faults can be served.
        can_fault: bool,
    },
    /// It could not be made.
    CreateFailed {
        /// For the operator at the source.
        reason: String,
    },
    /// A stream delivered everything of a round.
    Barrier {
        /// Which.
        stream: u8,
        /// The round.
        round: u32,
        /// By how many streams the round goes.
        streams: u8,
    },
    /// The state was loaded.
    Loaded {
        /// How long it took.
        took: Duration,
    },
    /// The guest runs, and its commit is recorded.
    Running {
        /// When the last vCPU entered the guest.
        first_instruction_at: Timestamp,
    },
    /// Nothing is missing any more.
    AllPresent(FaultReport),
    /// The VM process lets its guest have the memory without asking.
    Disarmed,
    /// How many pages are missing, when the source has come back.
    StillMissing(PageCount),
    /// Digest of what was installed.
    Digested(Digest),
    /// The phase was recorded by the VM process.
    Recorded(Phase),
    /// The VM process failed or refused. In answer to [`TargetAction::CommitAndRun`] it means that
    /// nobody can say whether the guest ran: the process died, or its answer was lost.
    VmFailed {
        /// One line for the operator.
        reason: String,
    },
    /// The VM process did not record the commit, and it is certain that it never will: it said so,
    /// or it is dead and left no record.
    CommitRefused {
        /// One line for the operator.
        reason: String,
    },
    /// The VM process is gone.
    Destroyed,
    /// A stream or the control connection broke, or the peer sent nonsense.
    ConnectionLost {
        /// One line for the operator.
        reason: String,
    },
    /// The source asks on another connection how this attempt ended.
    Resolve,
    /// The source will never come back: its memory is gone, and with it the pages that are missing.
    SourceGone {
        /// One line for the operator.
        reason: String,
    },
    /// The operator at the target wants it to end.
    Abort,
    /// The timer that was set has run out.
    Timer,
}

/// Something that the world shall do for the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetAction {
    /// Check that the machine fits, make it, start the receivers. Answer: `Created`,
    /// `CreateFailed`.
    Create(Start),
    /// Send a control frame. No answer.
    Send(ControlFrame),
    /// Load a state. Answer: `Loaded` or `VmFailed`.
    Load {
        /// Sections.
        state: Vec<u8>,
        /// It will be overwritten by the real one.
        is_rehearsal: bool,
    },
    /// From here on page faults of the VM process are served: by pulls from the source where pages
    /// are missing. No answer; `AllPresent` when it is over.
    ServeFaults,
    /// Record [`Phase::Arrived`], then run: one request. Answer: `Running`, `CommitRefused` or
    /// `VmFailed`.
    CommitAndRun {
        /// When the guest stopped at the source, on this host's clock, to advance its time.
        stopped_at: Timestamp,
        /// Page faults are served afterwards, too.
        keeps_faults: bool,
    },
    /// All pages are there: the VM process need not report faults any more. Answer: `Disarmed` or
    /// `VmFailed`.
    Disarm,
    /// Close what is left of the connections; faults wait. No answer.
    Detach,
    /// The source has come back: ask it for what is missing. Answer: `StillMissing`.
    Reconcile {
        /// How many push streams it brings.
        streams: u8,
    },
    /// Digest the hashes of the installed pages and the state. Answer: `Digested`.
    Digest,
    /// Record the phase in the VM process. Answer: `Recorded`.
    Record(Phase),
    /// End the VM process. Answer: `Destroyed`.
    Destroy,
    /// Answer every open question about this attempt. No answer.
    AnswerResolve(Resolution),
    /// Tell `Timer` at this time; replaces an earlier timer.
    SetTimer(Timestamp),
    /// The migration is over here. The last action of all.
    Finish(TargetOutcome),
}

impl TargetAction {
    /// Name for logs and for tests that hold a migration at a point.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Send(frame) => frame.name(),
            Self::Load {
                is_rehearsal: true, ..
            } => "load-rehearsal",
            Self::Load { .. } => "load",
            Self::ServeFaults => "serve-faults",
            Self::CommitAndRun { .. } => "commit-and-run",
            Self::Disarm => "disarm",
            Self::Detach => "detach",
            Self::Reconcile { .. } => "reconcile",
            Self::Digest => "digest",
            Self::Record(_) => "record-running",
            Self::Destroy => "destroy",
            Self::AnswerResolve(_) => "answer-resolve",
            Self::SetTimer(_) => "set-timer",
            Self::Finish(_) => "finish",
        }
    }
}

/// How a migration ended at the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetOutcome {
    /// The guest runs here and the source said that it is done.
    Completed,
    /// The guest runs here, or ran; the source did not say that it is done, so the attempt stays
    /// recorded until it asks.
    Unconfirmed,
    /// The guest ran here and ended before all its pages had come.
    Lost {
        /// One line for the operator.
        reason: String,
    },
    /// The guest never ran here and its memory is gone.
    Dropped {
        /// One line for the operator.
        reason: String,
    },
}
