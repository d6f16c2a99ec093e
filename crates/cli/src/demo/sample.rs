//! A move that tests can talk about.

use limosa_engine::policy::Mode;
use limosa_host::api::{Downtime, Report};
use limosa_lab::record::{Checked, MoveRecord, Observed};

/// A move that went well, with these gaps.
pub(crate) fn record(mode: Mode, guest_gap_ms: f64, downtime_ms: f64) -> MoveRecord {
    let report = Report {
        outcome: Some("completed".to_owned()),
        reason: None,
        pause_reason: None,
        preparation_ms: 1.0,
        total_ms: 100.0,
        eviction_ms: 120.0,
        downtime_ms: Some(Downtime {
            total: downtime_ms,
            pause: 0.0,
            harvest: 0.0,
            save: 0.0,
            transfer: downtime_ms,
            load: 0.0,
            commit: 0.0,
            start: 0.0,
        }),
        switch_ns: None,
        predicted_downtime_ms: None,
        fixed_cost_ms: 0.5,
        rehearsal_stall_ms: 0.25,
        clock_offset_ns: 0,
        clock_error_ms: 0.0,
        rounds: Vec::new(),
        mode_changes: Vec::new(),
        missing_at_switch: 0,
        missing_set_bytes: 0,
        pulled_pages: None,
        pushed_before_need: None,
        network_fault_share: None,
        fault_latency_us: None,
        first_fault_stall_ms: None,
        pages_sent: 0,
        pages_resent: 0,
        wire_bytes: 0,
        state_bytes: 0,
        digest_equal: Some(true),
    };
    let observed = Observed {
        guest_gap_ms: Some(guest_gap_ms),
        ..Observed::default()
    };
    let checked = Checked::default();
    MoveRecord::new(1, ("a", "b"), mode, report, observed, checked)
}
