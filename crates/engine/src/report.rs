//! What an engine knows about a migration: outcome, times, rounds.
//!
//! Only facts that the engine was told. What the guest and its clients saw is measured elsewhere
//! and laid beside it.

use crate::handover::MigrationId;
use crate::policy::{Mode, PauseReason};
use crate::throttle::Throttle;
use crate::time::Timestamp;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::{ByteCount, PageCount};
use serde::{Deserialize, Serialize};

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The guest runs at the target, the source holds nothing.
    Completed,
    /// The operator ended it; the guest runs at the source.
    Aborted,
    /// It could not be done; the guest runs at the source.
    Failed {
        /// One line that says what happened.
        reason: String,
    },
    /// The guest itself was lost: its VM process died.
    GuestLost {
        /// One line that says what happened.
        reason: String,
    },
}

impl Outcome {
    /// One word for tables and JSON.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Aborted => "aborted",
            Self::Failed { .. } => "failed",
            Self::GuestLost { .. } => "guest-lost",
        }
    }
}

/// One round of copying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages sent, zero pages included.
    pub pages: PageCount,
    /// Of these, pages that were zero and went as a range.
    pub zero_pages: PageCount,
    /// Of these, pages that had been sent in an earlier round.
    pub resent: PageCount,
    /// Bytes on the wire.
    pub bytes: ByteCount,
    /// From the first clear of the round to the target's word that all of it is in place.
    pub time: Duration,
    /// Pages found dirty when it was over; for the last round none are looked for.
    pub dirty_after: PageCount,
    /// Hot pages that it left out; they count as dirty when it was over.
    #[serde(default)]
    pub deferred: PageCount,
    /// Pages that were compressed by LZ4.
    pub lz4: Coded,
    /// Pages that were compressed by zstd.
    pub zstd: Coded,
    /// Pages that went as differences to what was sent before.
    pub delta: Coded,
    /// By so many push streams it went, at the most.
    #[serde(default)]
    pub streams: u8,
}

impl RoundReport {
    /// Bytes of the pages as the guest has them; zero pages count for nothing. `bytes` without a
    /// coding, but for the headers.
    pub const fn content(&self) -> ByteCount {
        self.pages.saturating_sub(self.zero_pages).bytes()
    }
}

/// Pages that went in a coding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coded {
    /// How many.
    pub pages: PageCount,
    /// Bytes on the wire, headers left out.
    pub bytes: ByteCount,
}

impl Coded {
    /// Adds more of the same coding.
    pub const fn add(&mut self, more: Self) {
        self.pages = self.pages.saturating_add(more.pages);
        self.bytes = self.bytes.saturating_add(more.bytes);
    }
}

/// The downtime by parts, in the order in which they happen. Their sum is the downtime: from the
/// first vCPU's last instruction at the source to the last vCPU's first one at the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the first to the last vCPU to stop.
    pub pause: Duration,
    /// The last reading of the dirty log.
    pub harvest: Duration,
    /// Saving vCPUs and devices.
    pub save: Duration,
    /// Until the last page and the state have arrived at the target.
    pub transfer: Duration,
    /// Loading the state.
    pub load: Duration,
    /// *Prepared* to the source, its record, *commit* to the target.
    pub commit: Duration,
    /// The target's record, until the last vCPU has entered the guest.
    pub start: Duration,
}

impl Downtime {
    /// The sum of the parts.
    pub fn total(&self) -> Duration {
        self.pause + self.harvest + self.save + self.transfer + self.load + self.commit + self.start
    }
}

/// Buckets of a [`FaultReport`]'s histogram: the last one holds everything from two seconds on.
pub const FAULT_BUCKETS: usize = 22;

/// How a guest that ran before its pages were there came by them, as the target saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Pages that came because a vCPU waited for them: network faults. `[Hines09 §5]`
    pub pulled: PageCount,
    /// Pages that were there before anybody needed them, those among them that never existed and were
    /// only told to be zero.
    pub pushed: PageCount,
    /// Bytes of the pulled pages on the wire, headers included.
    pub pulled_bytes: ByteCount,
    /// From a fault's notice to its page in place: half of them were faster.
    pub latency_p50: Duration,
    /// 99 of 100 were faster.
    pub latency_p99: Duration,
    /// The slowest.
    pub latency_max: Duration,
    /// Network faults by latency: bucket `n` counts those from 2^(n-1) up to 2^n microseconds,
    /// bucket 0 those below one.
    pub latency_log2_us: [u32; FAULT_BUCKETS],
    /// How long the first fault after the switch took.
    pub first_stall: Duration,
}

impl FaultReport {
    /// Network faults over all pages that were missing, in thousandths. `[Hines09 §5]` divides by
    /// all faults. Differs: a fault on a page that has come is served by the kernel, unseen.
    pub fn network_share_per_mille(&self) -> Option<u64> {
        let all = self.pulled.get().saturating_add(self.pushed.get());
        self.pulled.get().saturating_mul(1000).checked_div(all)
    }
}

/// The technique was changed on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeChange {
    /// Since the request.
    pub at: Duration,
    /// From this one.
    pub from: Mode,
    /// To this one.
    pub to: Mode,
    /// One line that says why.
    pub reason: String,
}

/// The guest's writers were slowed down on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleReport {
    /// When that began, since the request.
    pub first_at: Duration,
    /// For how long it was in force: until the guest was paused or let go, and as of the last harvest
    /// while it still is.
    pub time: Duration,
    /// What was asked for last.
    pub last: Throttle,
    /// The tightest of all.
    pub tightest: Throttle,
    /// How often it was set.
    pub changes: u32,
    /// How long vCPUs were held back, all together, as of the last harvest.
    pub held: Duration,
}

/// How well the two hosts' clocks could be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockOffset {
    /// Target's clock minus source's, in nanoseconds.
    pub nanos: i64,
    /// The true offset lies within this distance.
    pub error: Duration,
}

/// Everything that the source's engine has to say about one migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// The attempt.
    pub id: MigrationId,
    /// The technique that was asked for.
    pub mode: Mode,
    /// How it changed on the way, in order.
    pub mode_changes: Vec<ModeChange>,
    /// How the guest's writers were slowed down, if they were.
    pub throttle: Option<ThrottleReport>,
    /// `None` while it runs.
    pub outcome: Option<Outcome>,
    /// Why the guest was paused, once it was.
    pub pause_reason: Option<PauseReason>,
    /// From the request to the first page.
    pub preparation: Duration,
    /// From the request to the target's word that the guest runs there and has all its pages, or to
    /// the failure.
    pub total: Duration,
    /// From the request until the source holds nothing.
    pub eviction: Duration,
    /// Once the guest runs at the target.
    pub downtime: Option<Downtime>,
    /// The same as moments of the source's clock: the first vCPU's last instruction here, the last
    /// vCPU's first one there.
    pub switch: Option<(Timestamp, Timestamp)>,
    /// As predicted from the rehearsal when the guest was paused.
    pub predicted_downtime: Option<Duration>,
    /// The fixed part of that prediction.
    pub fixed_cost: Duration,
    /// How long the guest stood for the rehearsal.
    pub rehearsal_stall: Duration,
    /// For the times that compare both hosts' clocks.
    pub clock: ClockOffset,
    /// The rounds in order: the last one with the guest paused or, with a switch, running at the
    /// target.
    pub rounds: Vec<RoundReport>,
    /// Pages that the target did not have when the guest ran there.
    pub missing_at_switch: PageCount,
    /// Those of them that were pushed in the order in which earlier moves had seen them asked for.
    pub recorded: PageCount,
    /// Bytes that told the target which pages it does not have.
    pub missing_set_bytes: ByteCount,
    /// How the missing pages came, once they had.
    pub faults: Option<FaultReport>,
    /// Bytes of the state sections.
    pub state_bytes: ByteCount,
    /// With verification: whether source and target hashed the same memory and state.
    pub digest_equal: Option<bool>,
}

impl MigrationReport {
    /// Pages sent over all rounds and for faults, repetitions included.
    pub fn pages_sent(&self) -> PageCount {
        let pulled = self
            .faults
            .as_ref()
            .map_or(PageCount::ZERO, |faults| faults.pulled);
        self.sum(|round| round.pages).saturating_add(pulled)
    }

    /// Pages sent again after an earlier round had sent them.
    pub fn pages_resent(&self) -> PageCount {
        self.sum(|round| round.resent)
    }

    /// Bytes on the push and pull streams and of the state.
    pub fn wire_bytes(&self) -> ByteCount {
        let pulled = self
            .faults
            .as_ref()
            .map_or(ByteCount::ZERO, |faults| faults.pulled_bytes);
        let first = self
            .state_bytes
            .saturating_add(self.missing_set_bytes)
            .saturating_add(pulled);
        self.rounds
            .iter()
            .fold(first, |sum, round| sum.saturating_add(round.bytes))
    }

    fn sum(&self, of: impl Fn(&RoundReport) -> PageCount) -> PageCount {
        self.rounds
            .iter()
            .fold(PageCount::ZERO, |sum, round| sum.saturating_add(of(round)))
    }
}
