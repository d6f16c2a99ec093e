//! How a guest's writers are slowed down, as the control interface tells it.

use super::milliseconds;
use limosa_engine::report;
use limosa_engine::throttle::Throttle;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whom a throttle slows down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ThrottleKind {
    /// Each vCPU that dirties more pages than its quota: its dirty tracker counts them.
    PerVcpu,
    /// All vCPUs alike: it is not known which of them writes.
    Equal,
}

/// How fast a guest may write.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ThrottleInfo {
    /// Whom it slows down.
    pub kind: ThrottleKind,
    /// Pages a second that each vCPU may dirty; only `per-vcpu` has it.
    pub quota_pages_per_s: Option<u64>,
    /// The share of the time for which each vCPU may run, 0 to 1; only `equal` has it.
    pub share: Option<f64>,
}

/// How a guest's writers were slowed down over a migration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ThrottleReport {
    /// When that began, since the request.
    pub first_at_ms: f64,
    /// For how long it has been in force, until the guest was paused or let go.
    pub time_ms: f64,
    /// How long vCPUs were held back, all together; as of the last harvest.
    pub held_ms: f64,
    /// How often it was set.
    pub changes: u32,
    /// The last one.
    pub last: ThrottleInfo,
    /// The one that let the guest write least.
    pub tightest: ThrottleInfo,
}

impl From<Throttle> for ThrottleInfo {
    fn from(throttle: Throttle) -> Self {
        match throttle {
            Throttle::PerVcpu { quota } => Self {
                kind: ThrottleKind::PerVcpu,
                quota_pages_per_s: Some(quota.get()),
                share: None,
            },
            Throttle::Equal { share } => Self {
                kind: ThrottleKind::Equal,
                quota_pages_per_s: None,
                share: Some(f64::from(share.thousandths()) / 1000.0),
            },
        }
    }
}

impl From<&report::ThrottleReport> for ThrottleReport {
    fn from(report: &report::ThrottleReport) -> Self {
        Self {
            first_at_ms: milliseconds(report.first_at),
            time_ms: milliseconds(report.time),
            held_ms: milliseconds(report.held),
            changes: report.changes,
            last: report.last.into(),
            tightest: report.tightest.into(),
        }
    }
}
