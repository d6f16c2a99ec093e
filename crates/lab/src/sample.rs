//! Results that tests can talk about.

use crate::clients::ClientFigures;
use crate::machine::Machine;
use crate::plan::Plan;
use crate::record::MoveRecord;
use crate::schedule::{Run, runs};
use crate::store::{Results, RunResult, Start};
use serde_json::{Value, json};

/// A plan of two cells, with texts in it that must be escaped.
pub(crate) const PLAN: &str = r#"# <b>"Quoted" & 'so'</b>
question = "Is <pre-copy> worth it, & when?"
repeats = 2

[workloads.busy]
guest = "writer"
working_set = "64M"

[[matrix]]
techniques = ["pre-copy", "post-copy"]
workloads = ["busy"]
memory = ["256M"]
links = ["125M"]
"#;

/// A start of the program.
pub(crate) fn start(simulated: bool) -> Start {
    Start {
        begun: "2025-01-01T00:00:00Z".to_owned(),
        command: "limosa lab run <plan.toml> --out results".to_owned(),
        version: "0.1.0".to_owned(),
        commit: "unknown".to_owned(),
        machine: Machine {
            kernel: "6.1.0".to_owned(),
            cpu: "Some <CPU> @ 2.60GHz".to_owned(),
            cpus: 2,
            memory_bytes: 24 << 30,
            kvm_modules: vec!["kvm_intel".to_owned()],
            load: 0.25,
        },
        simulated,
    }
}

/// A move that went well, with this gap.
pub(crate) fn record(guest_gap_ms: f64) -> MoveRecord {
    let round = |pages: u64, dirty: u64| {
        json!({
            "pages": pages, "zero_pages": 0, "resent_pages": 0, "bytes": pages * 4100,
            "time_ms": 12.5, "dirty_after_pages": dirty,
        })
    };
    serde_json::from_value(json!({
        "number": 1, "from": "a", "to": "b", "mode": "pre-copy", "outcome": "completed",
        "reason": null, "pause_reason": "within-budget", "preparation_ms": 1.5,
        "downtime_ms": {
            "total": 2.5, "pause": 0.25, "harvest": 0.25, "save": 0.5, "transfer": 0.75,
            "load": 0.25, "commit": 0.25, "start": 0.25,
        },
        "guest_gap_ms": guest_gap_ms, "heartbeat_gap_ms": 4.0, "worst_stall_ms": 6.0, "stall_p999_ms": 4.5,
        "resume_ms": null, "total_ms": 100.0, "eviction_ms": 120.0,
        "rounds": [round(16384, 900), round(900, 12), round(12, 0)], "mode_changes": [],
        "missing_at_switch": 7, "missing_set_bytes": 16, "pulled_pages": 3,
        "pushed_before_need": 4, "network_fault_share": 0.4,
        "fault_latency_us": {
            "p50": 100.0, "p99": 300.5, "max": 400.0, "log2_histogram": [0, 0, 0, 0, 0, 0, 0, 2, 0, 1],
        },
        "first_fault_stall_ms": 0.2, "pages_sent": 17296, "pages_resent": 912,
        "wire_bytes": 70913600u64, "state_bytes": 4096,
        "guest_writes_per_s": { "before": 50000.0, "during": 40000.0, "after": null },
        "guest_speed": speed(), "guest_speed_at_switch": speed_at_switch(),
        "others_cpu_share": 0.0125, "integrity_errors": 0, "swept_pages": 16384, "memory_digest_equal": true,
        "predicted_downtime_ms": 2.25, "fixed_cost_ms": 0.5, "rehearsal_stall_ms": 0.125,
    }))
    .unwrap()
}

/// Its guest's speed: 50,000 a second, but half of that in the slot of the switch; the last one is not known.
fn speed() -> Value {
    let mut work_per_s = vec![Some(50_000.0); 210];
    work_per_s[107] = Some(25_000.0);
    work_per_s[209] = None;
    json!({
        "begin_ms": -1000.0, "slot_ms": 10.0, "stopped_ms": 72.5, "running_ms": 75.0, "work_per_s": work_per_s,
    })
}

/// The same around the switch, where it did nothing for one slot and then what was due.
fn speed_at_switch() -> Value {
    let mut work_per_s = vec![Some(50_000.0); 101];
    work_per_s[50] = Some(0.0);
    work_per_s[51] = Some(100_000.0);
    json!({
        "begin_ms": -27.5, "slot_ms": 2.0, "stopped_ms": 72.5, "running_ms": 75.0, "work_per_s": work_per_s,
    })
}

/// What the clients of such a move saw.
pub(crate) fn seen() -> ClientFigures {
    serde_json::from_value(json!({
        "connections": 5, "lost_connections": 0, "wrong_answers": 0, "problem": null,
        "gap_ms": 7.25, "worst_wait_ms": 9.5, "silence_ms": 7.0,
        "waits_before_ms": { "count": 1000, "p50": 0.125, "p99": 0.5, "p999": 1.5, "max": 2.0 },
        "waits_during_ms": { "count": 100, "p50": 0.25, "p99": 6.5, "p999": 7.25, "max": 7.25 },
        "waits_after_ms": null,
        "requests_per_s": { "before": 20000.0, "during": 15000.0, "after": 19000.0 },
        "series": {
            "begin_ms": -1000.0, "slot_ms": 10.0, "requests_per_s": vec![20000.0; 210],
            "worst_wait_ms": vec![Some(0.5); 210],
        },
    }))
    .unwrap()
}

/// All runs, with clients in the moves that went well.
pub(crate) fn served() -> Results {
    let mut results = results();
    let records = results
        .runs
        .iter_mut()
        .filter_map(|run| run.record.as_mut());
    for record in records.filter(|one| one.is_completed()) {
        record.clients = Some(seen());
    }
    results
}

/// The result of a run of the plan.
pub(crate) fn result(plan: &Plan, run: &Run, measured: Result<MoveRecord, &str>) -> RunResult {
    let failure = measured.as_ref().err().map(|failure| (*failure).to_owned());
    RunResult {
        number: run.number,
        start: 1,
        cell: plan.cells[run.cell_index].clone(),
        repeat: run.repeat,
        finished: "2025-01-01T00:01:00Z".to_owned(),
        failure,
        record: measured.ok(),
    }
}

/// All runs: two moves that went well, one that was refused, and a run without a measurement.
pub(crate) fn results() -> Results {
    let plan = Plan::parse(PLAN).unwrap();
    let mut gap = 1.0;
    let made = runs(&plan).into_iter().map(|run| {
        let measured = match (run.cell_index, run.repeat) {
            (0, _) => {
                gap += 2.0;
                Ok(record(gap))
            }
            (_, 1) => Ok(MoveRecord {
                outcome: "failed".to_owned(),
                reason: Some("the target <refused>, \"no memory\"".to_owned()),
                ..record(0.0)
            }),
            _ => Err("a daemon does not answer"),
        };
        result(&plan, &run, measured)
    });
    Results {
        runs: made.collect(),
        plan_text: PLAN.to_owned(),
        starts: vec![start(false)],
        plan,
    }
}
