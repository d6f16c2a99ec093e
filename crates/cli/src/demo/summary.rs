//! What the demo comes to, and the file that it writes: medians, growth of the daemons, and
//! everything that went wrong.

use crate::bed::Growth;
use limosa_engine::policy::Mode;
use limosa_lab::machine::Machine;
use limosa_lab::record::{MoveRecord, Setup};
use limosa_lab::statistics::Spread;
use serde::Serialize;
use std::collections::BTreeMap;

/// The file.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    /// The command line.
    pub command: String,
    /// Version of the program.
    pub version: &'static str,
    /// What it ran on.
    pub machine: Machine,
    /// Whether the moves happened in the simulator.
    pub simulated: bool,
    /// The guest and how it was moved.
    pub setup: Setup,
    /// The moves in order.
    pub moves: Vec<MoveRecord>,
    /// What they come to.
    pub summary: Summary,
}

/// The moves of one mode, or all of them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    /// How many.
    pub moves: usize,
    /// Of these, completed.
    pub completed: usize,
    /// Failed checks of the guest over all of them.
    pub integrity_errors: u64,
    /// Downtime as the hosts measured it.
    pub downtime_ms: Option<Spread>,
    /// Downtime as the guest saw it.
    pub guest_gap_ms: Option<Spread>,
    /// The latter minus the former, move by move.
    pub guest_gap_minus_downtime_ms: Option<Spread>,
    /// Downtime as an observer saw it.
    pub heartbeat_gap_ms: Option<Spread>,
    /// The guest's longest stall of each move.
    pub worst_stall_ms: Option<Spread>,
    /// The wait that one request in a thousand to the guest exceeds.
    pub stall_p999_ms: Option<Spread>,
    /// The share of the processors that others used, 0 to 1.
    pub others_cpu_share: Option<Spread>,
    /// Time back to speed.
    pub resume_ms: Option<Spread>,
    /// Time to the first page.
    pub preparation_ms: Option<Spread>,
    /// Time until the guest ran at the target.
    pub total_ms: Option<Spread>,
    /// Time until the source held nothing.
    pub eviction_ms: Option<Spread>,
    /// Rounds.
    pub rounds: Option<Spread>,
    /// Pages sent.
    pub pages_sent: Option<Spread>,
    /// Pages sent again.
    pub pages_resent: Option<Spread>,
    /// Pages that were missing when the guest ran at the target.
    pub missing_at_switch: Option<Spread>,
    /// Of these, pages that came because the guest waited for them.
    pub pulled_pages: Option<Spread>,
    /// The latter over the former, 0 to 1.
    pub network_fault_share: Option<Spread>,
    /// The middle wait for a page.
    pub fault_latency_p50_us: Option<Spread>,
    /// The wait that 99 of 100 are below.
    pub fault_latency_p99_us: Option<Spread>,
    /// The first wait for a page.
    pub first_fault_stall_ms: Option<Spread>,
    /// Changes of the technique.
    pub mode_changes: Option<Spread>,
    /// How long the guest's writers were slowed down.
    pub throttled_ms: Option<Spread>,
    /// Hot pages that rounds left out, over all rounds.
    pub deferred_pages: Option<Spread>,
    /// Bytes on the wire.
    pub wire_bytes: Option<Spread>,
    /// The guest's speed before the moves.
    pub writes_per_s_before: Option<Spread>,
    /// During the moves.
    pub writes_per_s_during: Option<Spread>,
    /// After the moves.
    pub writes_per_s_after: Option<Spread>,
    /// The downtime that was expected minus the one that came.
    pub prediction_error_ms: Option<Spread>,
}

impl Figures {
    /// Over these moves. Times and pages count those that were completed.
    pub(crate) fn of<'a>(moves: impl Iterator<Item = &'a MoveRecord>) -> Self {
        let all: Vec<&MoveRecord> = moves.collect();
        let completed = all.iter().copied().filter(|one| one.is_completed());
        let completed: Vec<&MoveRecord> = completed.collect();
        let spread = |value: &dyn Fn(&MoveRecord) -> Option<f64>| {
            Spread::of(completed.iter().map(|one| value(one)))
        };
        Self {
            moves: all.len(),
            completed: completed.len(),
            integrity_errors: all.iter().map(|one| one.integrity_errors).sum(),
            downtime_ms: spread(&|one| Some(one.downtime_ms?.total)),
            guest_gap_ms: spread(&|one| one.guest_gap_ms),
            guest_gap_minus_downtime_ms: spread(&MoveRecord::gap_minus_downtime_ms),
            heartbeat_gap_ms: spread(&|one| one.heartbeat_gap_ms),
            worst_stall_ms: spread(&|one| one.worst_stall_ms),
            stall_p999_ms: spread(&|one| one.stall_p999_ms),
            others_cpu_share: spread(&|one| one.others_cpu_share),
            resume_ms: spread(&|one| one.resume_ms),
            preparation_ms: spread(&|one| one.preparation_ms),
            total_ms: spread(&|one| Some(one.total_ms)),
            eviction_ms: spread(&|one| one.eviction_ms),
            rounds: spread(&|one| Some(one.rounds.as_ref()?.len() as f64)),
            pages_sent: spread(&|one| Some(one.pages_sent? as f64)),
            pages_resent: spread(&|one| Some(one.pages_resent? as f64)),
            missing_at_switch: spread(&|one| Some(one.missing_at_switch? as f64)),
            pulled_pages: spread(&|one| Some(one.pulled_pages? as f64)),
            network_fault_share: spread(&|one| one.network_fault_share),
            fault_latency_p50_us: spread(&|one| Some(one.fault_latency_us.as_ref()?.p50)),
            fault_latency_p99_us: spread(&|one| Some(one.fault_latency_us.as_ref()?.p99)),
            first_fault_stall_ms: spread(&|one| one.first_fault_stall_ms),
            mode_changes: spread(&|one| Some(one.mode_changes.as_ref()?.len() as f64)),
            throttled_ms: spread(&|one| Some(one.throttle.as_ref()?.time_ms)),
            deferred_pages: spread(&|one| Some(one.deferred_pages()? as f64)),
            wire_bytes: spread(&|one| Some(one.wire_bytes? as f64)),
            writes_per_s_before: spread(&|one| one.guest_writes_per_s.before),
            writes_per_s_during: spread(&|one| one.guest_writes_per_s.during),
            writes_per_s_after: spread(&|one| one.guest_writes_per_s.after),
            prediction_error_ms: spread(&|one| {
                Some(one.predicted_downtime_ms? - one.downtime_ms?.total)
            }),
        }
    }
}

/// What a run comes to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    /// Everything was as it should be.
    pub ok: bool,
    /// What was not, one line each.
    pub problems: Vec<String>,
    /// How long the demo ran.
    pub seconds: f64,
    /// Over all moves.
    pub all: Figures,
    /// By mode.
    pub by_mode: BTreeMap<&'static str, Figures>,
    /// The daemons; `null` in the simulator.
    pub daemons: Option<Growth>,
}

impl Summary {
    /// Of these moves, the last of which may have been ended by a `failure` of the demo itself.
    pub(crate) fn new(
        moves: &[MoveRecord],
        failure: Option<String>,
        verify: bool,
        daemons: Option<Growth>,
        seconds: f64,
    ) -> Self {
        let problems = moves.iter().filter_map(|one| one.problem(verify));
        let mut problems: Vec<String> = problems.collect();
        problems.extend(failure);
        problems.extend(daemons.iter().flat_map(Growth::problems));
        let modes = Mode::ALL.into_iter();
        let by_mode = modes
            .filter(|mode| moves.iter().any(|one| one.mode == *mode))
            .map(|mode| {
                let of_mode = moves.iter().filter(|one| one.mode == mode);
                (mode.name(), Figures::of(of_mode))
            });
        Self {
            ok: problems.is_empty(),
            problems,
            seconds,
            all: Figures::of(moves.iter()),
            by_mode: by_mode.collect(),
            daemons,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::sample::record;

    #[test]
    fn a_summary_has_medians_by_mode_and_all_problems() {
        let mut failed = record(Mode::PreCopy, 900.0, 900.0);
        failed.outcome = "failed".to_owned();
        let moves = [
            record(Mode::StopAndCopy, 150.25, 150.0),
            record(Mode::PreCopy, 3.5, 3.0),
            record(Mode::PreCopy, 5.0, 3.5),
            failed,
        ];
        let summary = Summary::new(&moves, Some("move 5: lost".to_owned()), true, None, 1.0);
        assert!(!summary.ok);
        assert_eq!(
            summary.problems,
            ["move 1 failed: no reason was given", "move 5: lost"]
        );
        let live = &summary.by_mode["pre-copy"];
        assert_eq!((live.moves, live.completed), (3, 2));
        let gap = live.guest_gap_ms.unwrap();
        assert_eq!(
            (gap.min, gap.median, gap.p95, gap.max),
            (3.5, 4.25, 5.0, 5.0)
        );
        let differences = summary.all.guest_gap_minus_downtime_ms.unwrap();
        assert_eq!((differences.median, differences.max), (0.5, 1.5));
        assert_eq!(summary.by_mode.len(), 2);
        assert!(Summary::new(&moves[..1], None, true, None, 1.0).ok);
    }
}
