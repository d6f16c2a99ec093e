//! What the runs of each cell come to, and everything that was not as it should be.
//!
//! A technique that does not complete a move is a result: it is listed and nothing more. A guest
//! whose memory is not what it wrote is a problem, and so is a run that could not be measured.

use crate::clients::{ClientFigures, Waits};
use crate::plan::{Cell, Plan};
use crate::record::MoveRecord;
use crate::statistics::Spread;
use crate::store::{Results, RunResult};
use serde::Serialize;

/// The runs of one cell. Figures are over the moves that were completed.
#[derive(Clone, Debug, Serialize)]
pub struct CellSummary {
    /// What was moved, and how.
    pub cell: Cell,
    /// How many runs the plan wants.
    pub runs: u32,
    /// Of these, how many were measured.
    pub measured: usize,
    /// Of these, how many moves were completed.
    pub completed: usize,
    /// Failed checks of the guest over all of them.
    pub integrity_errors: u64,
    /// From the request to the first page.
    pub preparation_ms: Option<Spread>,
    /// The switch as the guest saw it.
    pub guest_gap_ms: Option<Spread>,
    /// The switch as the hosts measured it.
    pub downtime_ms: Option<Spread>,
    /// The same as it was expected when the guest was paused.
    pub predicted_downtime_ms: Option<Spread>,
    /// The switch as an observer saw it.
    pub heartbeat_gap_ms: Option<Spread>,
    /// The guest's longest stall of each move.
    pub worst_stall_ms: Option<Spread>,
    /// The wait that one request in a thousand to the guest exceeds, of each move.
    pub stall_p999_ms: Option<Spread>,
    /// Until the guest ran at the target with all its pages.
    pub total_ms: Option<Spread>,
    /// Bytes on the wire.
    pub wire_bytes: Option<Spread>,
    /// Pages sent again.
    pub pages_resent: Option<Spread>,
    /// Pages that the guest waited for.
    pub pulled_pages: Option<Spread>,
    /// These over all that were missing, 0 to 1.
    pub network_fault_share: Option<Spread>,
    /// How long it waited for them: half of its faults not longer.
    pub fault_latency_p50_ms: Option<Spread>,
    /// Nor 99 of a hundred.
    pub fault_latency_p99_ms: Option<Spread>,
    /// The guest's speed before the move.
    pub work_per_s_before: Option<Spread>,
    /// During the move.
    pub work_per_s_during: Option<Spread>,
    /// After the move.
    pub work_per_s_after: Option<Spread>,
    /// The share of the processors that others used, 0 to 1.
    pub others_cpu_share: Option<Spread>,
    /// What clients saw, if the guest had some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clients: Option<ClientSummary>,
}

/// What clients saw of the completed moves of a cell.
#[derive(Clone, Debug, Serialize)]
pub struct ClientSummary {
    /// Connections that were lost, over all measured moves.
    pub lost_connections: u64,
    /// Wrong answers, over all measured moves.
    pub wrong_answers: u64,
    /// The longest wait around the switch.
    pub gap_ms: Option<Spread>,
    /// The longest wait of all.
    pub worst_wait_ms: Option<Spread>,
    /// The longest time without an answer.
    pub silence_ms: Option<Spread>,
    /// Waits before the move.
    pub before: WaitSpreads,
    /// During the move.
    pub during: WaitSpreads,
    /// Answers a second before the move.
    pub requests_per_s_before: Option<Spread>,
    /// During the move.
    pub requests_per_s_during: Option<Spread>,
    /// After the move.
    pub requests_per_s_after: Option<Spread>,
    /// Those during over those before, move by move.
    pub requests_share_during: Option<Spread>,
}

/// Percentiles of waits.
#[derive(Clone, Debug, Serialize)]
pub struct WaitSpreads {
    /// Half of them are not longer.
    pub p50_ms: Option<Spread>,
    /// Nor are 99 of a hundred.
    pub p99_ms: Option<Spread>,
    /// Nor are 999 of a thousand.
    pub p999_ms: Option<Spread>,
}

impl ClientSummary {
    fn of(measured: &[&MoveRecord], completed: &[&MoveRecord]) -> Option<Self> {
        let all: Vec<&ClientFigures> = figures(measured);
        let completed = figures(completed);
        if all.is_empty() {
            return None;
        }
        let spread = |value: &dyn Fn(&ClientFigures) -> Option<f64>| {
            Spread::of(completed.iter().map(|one| value(one)))
        };
        let waits = |waits: &dyn Fn(&ClientFigures) -> Option<Waits>| WaitSpreads {
            p50_ms: spread(&|one| Some(waits(one)?.p50)),
            p99_ms: spread(&|one| Some(waits(one)?.p99)),
            p999_ms: spread(&|one| Some(waits(one)?.p999)),
        };
        let sum = |count: &dyn Fn(&ClientFigures) -> u32| -> u64 {
            all.iter().map(|one| u64::from(count(one))).sum()
        };
        Some(Self {
            lost_connections: sum(&|one| one.lost_connections),
            wrong_answers: sum(&|one| one.wrong_answers),
            gap_ms: spread(&|one| one.gap_ms),
            worst_wait_ms: spread(&|one| one.worst_wait_ms),
            silence_ms: spread(&|one| one.silence_ms),
            before: waits(&|one| one.waits_before_ms),
            during: waits(&|one| one.waits_during_ms),
            requests_per_s_before: spread(&|one| one.requests_per_s.before),
            requests_per_s_during: spread(&|one| one.requests_per_s.during),
            requests_per_s_after: spread(&|one| one.requests_per_s.after),
            requests_share_during: spread(&|one| one.requests_per_s.share_during()),
        })
    }
}

fn figures<'a>(records: &[&'a MoveRecord]) -> Vec<&'a ClientFigures> {
    let records = records.iter();
    records.filter_map(|one| one.clients.as_ref()).collect()
}

impl CellSummary {
    /// Of all cells, in the order of the plan.
    pub fn all(results: &Results) -> Vec<Self> {
        let cells = results.plan.cells.iter();
        cells
            .map(|cell| Self::of(cell, &results.plan, &records(results, cell)))
            .collect()
    }

    fn of(cell: &Cell, plan: &Plan, records: &[&MoveRecord]) -> Self {
        let completed = records.iter().copied().filter(|one| one.is_completed());
        let completed: Vec<&MoveRecord> = completed.collect();
        let spread = |value: &dyn Fn(&MoveRecord) -> Option<f64>| {
            Spread::of(completed.iter().map(|one| value(one)))
        };
        Self {
            cell: cell.clone(),
            runs: plan.repeats,
            measured: records.len(),
            completed: completed.len(),
            integrity_errors: records.iter().map(|one| one.integrity_errors).sum(),
            preparation_ms: spread(&|one| one.preparation_ms),
            guest_gap_ms: spread(&|one| one.guest_gap_ms),
            downtime_ms: spread(&|one| Some(one.downtime_ms?.total)),
            predicted_downtime_ms: spread(&|one| one.predicted_downtime_ms),
            heartbeat_gap_ms: spread(&|one| one.heartbeat_gap_ms),
            worst_stall_ms: spread(&|one| one.worst_stall_ms),
            stall_p999_ms: spread(&|one| one.stall_p999_ms),
            total_ms: spread(&|one| Some(one.total_ms)),
            wire_bytes: spread(&|one| Some(one.wire_bytes? as f64)),
            pages_resent: spread(&|one| Some(one.pages_resent? as f64)),
            pulled_pages: spread(&|one| Some(one.pulled_pages? as f64)),
            network_fault_share: spread(&|one| one.network_fault_share),
            fault_latency_p50_ms: spread(&|one| Some(one.fault_latency_us.as_ref()?.p50 / 1000.0)),
            fault_latency_p99_ms: spread(&|one| Some(one.fault_latency_us.as_ref()?.p99 / 1000.0)),
            work_per_s_before: spread(&|one| one.guest_writes_per_s.before),
            work_per_s_during: spread(&|one| one.guest_writes_per_s.during),
            work_per_s_after: spread(&|one| one.guest_writes_per_s.after),
            others_cpu_share: spread(&|one| one.others_cpu_share),
            clients: ClientSummary::of(records, &completed),
        }
    }
}

/// The measurements of a cell, in the order in which they were planned.
pub fn records<'a>(results: &'a Results, cell: &Cell) -> Vec<&'a MoveRecord> {
    let runs = results.runs.iter().filter(|run| run.cell == *cell);
    runs.filter_map(|run| run.record.as_ref()).collect()
}

/// What must not happen, a line each: a changed byte, a client that lost its guest, or a run that could not be measured.
pub fn problems(results: &Results) -> Vec<String> {
    let verify = results.plan.verify;
    let runs = results.runs.iter();
    runs.filter_map(|run| Some(format!("{}: {}", named(run), problem(run, verify)?)))
        .collect()
}

/// Moves that were not completed, a line each.
pub fn unfinished(results: &Results) -> Vec<String> {
    let runs = results.runs.iter();
    runs.filter_map(|run| {
        let record = run.record.as_ref().filter(|one| !one.is_completed())?;
        let reason = record.reason.as_deref().unwrap_or("no reason was given");
        Some(format!("{}: {}: {reason}", named(run), record.outcome))
    })
    .collect()
}

fn problem(run: &RunResult, verify: bool) -> Option<String> {
    let Some(record) = &run.record else {
        let failure = run.failure.as_deref().unwrap_or("nobody knows why");
        return Some(format!("not measured: {failure}"));
    };
    if record.integrity_errors > 0 {
        let errors = record.integrity_errors;
        return Some(format!("the guest found {errors} errors in its memory"));
    }
    if let Some(problem) = record.clients_problem() {
        return Some(problem);
    }
    match record.memory_digest_equal {
        Some(false) => Some("source and target hashed different memory or state".to_owned()),
        // QEMU hashes nothing; its guest's sweep has to do.
        None if verify && record.is_completed() && record.qemu.is_none() => {
            Some("the digests were not compared".to_owned())
        }
        _ if record.outcome == "guest-lost" => Some("the guest was lost".to_owned()),
        _ => None,
    }
}

fn named(run: &RunResult) -> String {
    format!("run {} ({}, repeat {})", run.number, run.cell, run.repeat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn a_technique_that_does_not_complete_is_data_and_a_changed_byte_is_a_problem() {
        let mut results = sample::results();
        let cells = CellSummary::all(&results);
        assert_eq!(cells.len(), 2);
        assert_eq!((cells[0].measured, cells[0].completed), (2, 2));
        let gap = cells[0].guest_gap_ms.unwrap();
        assert_eq!((gap.min, gap.median, gap.max), (3.0, 4.0, 5.0));
        assert_eq!((cells[1].measured, cells[1].completed), (1, 0));
        assert_eq!(cells[1].guest_gap_ms, None);
        assert_eq!(
            unfinished(&results),
            [
                "run 2 (post-copy of busy with 256 MiB and 1 vCPU, link 125 MiB/s, 2 streams, repeat \
              1): failed: the target <refused>, \"no memory\""
            ]
        );
        let check = |results: &Results, expect: &str| {
            let problems = problems(results).join("; ");
            assert_eq!(problems.replace(&named(&results.runs[0]), "first"), expect);
        };
        check(
            &results,
            "run 4 (post-copy of busy with 256 MiB and 1 vCPU, link 125 MiB/s, 2 streams, repeat 2): \
             not measured: a daemon does not answer",
        );
        results.runs.truncate(1);
        check(&results, "");
        let record = |results: &mut Results| results.runs[0].record.clone().unwrap();
        let mut changed = record(&mut results);
        changed.integrity_errors = 3;
        results.runs[0].record = Some(changed);
        check(&results, "first: the guest found 3 errors in its memory");
        let mut changed = record(&mut results);
        changed.integrity_errors = 0;
        changed.memory_digest_equal = Some(false);
        results.runs[0].record = Some(changed);
        check(
            &results,
            "first: source and target hashed different memory or state",
        );
        let mut changed = record(&mut results);
        changed.memory_digest_equal = None;
        results.runs[0].record = Some(changed);
        check(&results, "first: the digests were not compared");
    }
}
