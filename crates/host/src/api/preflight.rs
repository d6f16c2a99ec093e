//! What would come of a migration, as the control interface tells it.

use super::milliseconds;
use limosa_engine::estimate::{Ending, Estimate};
use limosa_engine::policy::Mode;
use limosa_pages::PageCount;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use utoipa::ToSchema;

/// Whether a target would take a virtual machine, and what each technique would take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PreflightInfo {
    /// The virtual machine.
    pub vm: String,
    /// The target daemon.
    pub to: String,
    /// All that is in the way of it there, each in one line; empty if it would be taken.
    pub differences: Vec<String>,
    /// The connection was encrypted, as those of the migration would be.
    pub encrypted: bool,
    /// The shortest way there and back that was seen.
    pub round_trip_ms: f64,
    /// Bytes a second that one connection carried.
    pub bandwidth: u64,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// What of it exists: all else is zero and is not sent.
    pub existing_bytes: u64,
    /// How many pages the guest wrote at least once, after growing times.
    pub dirtied: Vec<DirtyPoint>,
    /// How long the guest stood to be saved.
    pub save_ms: f64,
    /// Size of its state.
    pub state_bytes: u64,
    /// What each technique would take.
    pub estimates: Vec<EstimateInfo>,
}

/// A point of the curve of what a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DirtyPoint {
    /// Since the start.
    pub after_ms: f64,
    /// Pages written at least once until then.
    pub pages: u64,
}

impl DirtyPoint {
    pub(crate) fn new(after: Duration, pages: PageCount) -> Self {
        Self {
            after_ms: milliseconds(after),
            pages: pages.get(),
        }
    }
}

/// What one technique would take, from what was measured: without coding, slowed writers and deferred
/// pages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EstimateInfo {
    /// The technique.
    #[schema(value_type = String, example = "pre-copy")]
    pub mode: Mode,
    /// Rounds while the guest runs at the source.
    pub rounds: u32,
    /// Pages that are sent.
    pub pages: u64,
    /// How long the guest stands, apart from what its target takes to load it.
    pub downtime_ms: f64,
    /// Until nothing is left at the source; `null` if only an order ends it.
    pub total_ms: Option<f64>,
    /// How long the guest misses pages at the target; `null` as above.
    pub degraded_ms: Option<f64>,
    /// `copies`: the guest stands while what is left is copied, within the limit; `copies-late`: longer than
    /// that; `switches`: it goes on at the target without all its pages.
    #[schema(value_type = String, example = "copies")]
    pub verdict: Ending,
}

impl EstimateInfo {
    pub(crate) fn new(estimate: &Estimate) -> Self {
        Self {
            mode: estimate.mode,
            rounds: estimate.rounds,
            pages: estimate.pages.get(),
            downtime_ms: milliseconds(estimate.downtime),
            total_ms: estimate.total.map(milliseconds),
            degraded_ms: estimate.degraded.map(milliseconds),
            verdict: estimate.verdict,
        }
    }
}
