//! A move that tests can talk about.

use limosa_engine::policy::Mode;
use limosa_host::api::{Downtime, Report};
use limosa_lab::record::{Checked, MoveRecord, Observed};

/// A move that went well, with these gaps.
pub(crate) fn record(mode: Mode, guest_gap_ms: f64, downtime_ms: f64) -> MoveRecord {
    let report = Report {
        outcome: Some("completed".to_owned()),
        preparation_ms: 1.0,
        total_ms: 100.0,
        eviction_ms: 120.0,
        downtime_ms: Some(Downtime {
            total: downtime_ms,
            transfer: downtime_ms,
            ..Downtime::default()
        }),
        fixed_cost_ms: 0.5,
        rehearsal_stall_ms: 0.25,
        digest_equal: Some(true),
        ..Report::default()
    };
    let observed = Observed {
        guest_gap_ms: Some(guest_gap_ms),
        ..Observed::default()
    };
    let checked = Checked::default();
    MoveRecord::new(1, ("a", "b"), mode, report, observed, checked)
}
