//! What a run of moves comes to: medians, growth of the daemons, and everything that went wrong.

use crate::demo::record::MoveRecord;
use crate::demo::statistics::{median, percentile};
use limosa_engine::policy::Mode;
use serde::Serialize;
use std::collections::BTreeMap;

/// Anonymous memory that a daemon may gain over a run without being suspected of a leak: arenas of
/// the allocator, buffers of past migrations.
const GROWTH_BYTES_MAX: u64 = 16 << 20;
/// The same for each move: a finished migration stays listed with its rounds.
const GROWTH_BYTES_MAX_PER_MOVE: u64 = 64 << 10;

/// Where a set of measurements lies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The smallest.
    pub min: f64,
    /// The middle one.
    pub median: f64,
    /// Nineteen of twenty are not larger.
    pub p95: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of the values that were measured; `None` if none was.
    pub(crate) fn of(values: impl IntoIterator<Item = Option<f64>>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().flatten().collect();
        Some(Self {
            min: values.iter().copied().reduce(f64::min)?,
            median: median(&values)?,
            p95: percentile(&values, 95)?,
            max: values.iter().copied().reduce(f64::max)?,
        })
    }
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
            resume_ms: spread(&|one| one.resume_ms),
            preparation_ms: spread(&|one| Some(one.preparation_ms)),
            total_ms: spread(&|one| Some(one.total_ms)),
            eviction_ms: spread(&|one| Some(one.eviction_ms)),
            rounds: spread(&|one| Some(one.rounds.len() as f64)),
            pages_sent: spread(&|one| Some(one.pages_sent as f64)),
            pages_resent: spread(&|one| Some(one.pages_resent as f64)),
            missing_at_switch: spread(&|one| Some(one.missing_at_switch as f64)),
            pulled_pages: spread(&|one| Some(one.pulled_pages? as f64)),
            network_fault_share: spread(&|one| one.network_fault_share),
            fault_latency_p50_us: spread(&|one| Some(one.fault_latency_us.as_ref()?.p50)),
            fault_latency_p99_us: spread(&|one| Some(one.fault_latency_us.as_ref()?.p99)),
            first_fault_stall_ms: spread(&|one| one.first_fault_stall_ms),
            mode_changes: spread(&|one| Some(one.mode_changes.len() as f64)),
            wire_bytes: spread(&|one| Some(one.wire_bytes as f64)),
            writes_per_s_before: spread(&|one| one.guest_writes_per_s.before),
            writes_per_s_during: spread(&|one| one.guest_writes_per_s.during),
            writes_per_s_after: spread(&|one| one.guest_writes_per_s.after),
            prediction_error_ms: spread(&|one| {
                Some(one.predicted_downtime_ms? - one.downtime_ms?.total)
            }),
        }
    }
}

/// What both daemons together hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Resources {
    /// Open file descriptors.
    pub open_fds: u64,
    /// Threads.
    pub threads: u64,
    /// Anonymous memory; guest memory is not in it.
    pub anonymous_bytes: u64,
}

impl Resources {
    /// Both.
    pub(crate) const fn plus(self, other: Self) -> Self {
        Self {
            open_fds: self.open_fds + other.open_fds,
            threads: self.threads + other.threads,
            anonymous_bytes: self.anonymous_bytes + other.anonymous_bytes,
        }
    }
}

/// What the daemons held over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Growth {
    /// Before the guest was made.
    pub idle: Resources,
    /// After the first moves, when everything that is made once had been made.
    pub first: Resources,
    /// After the last move.
    pub last: Resources,
    /// Moves between `first` and `last`.
    pub moves: u32,
    /// The most anonymous memory that was seen after any move.
    pub anonymous_bytes_max: u64,
}

impl Growth {
    /// What grew though it should not have, in words.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut compare = |what: &str, first: u64, last: u64, allowed: u64| {
            if last > first.saturating_add(allowed) {
                let moves = self.moves;
                problems.push(format!(
                    "the daemons' {what} grew from {first} to {last} over {moves} moves"
                ));
            }
        };
        let allowed = GROWTH_BYTES_MAX + u64::from(self.moves) * GROWTH_BYTES_MAX_PER_MOVE;
        let (first, last) = (&self.first, &self.last);
        compare("file descriptors", first.open_fds, last.open_fds, 0);
        compare("threads", first.threads, last.threads, 0);
        compare(
            "anonymous bytes",
            first.anonymous_bytes,
            last.anonymous_bytes,
            allowed,
        );
        problems
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
    use crate::demo::record::tests::record;

    fn growth(last: Resources, moves: u32) -> Growth {
        let first = Resources {
            open_fds: 40,
            threads: 8,
            anonymous_bytes: 5 << 20,
        };
        Growth {
            idle: first,
            first,
            last: first.plus(last),
            moves,
            anonymous_bytes_max: 0,
        }
    }

    fn check(open_fds: u64, threads: u64, anonymous_bytes: u64, expect: &str) {
        let last = Resources {
            open_fds,
            threads,
            anonymous_bytes,
        };
        assert_eq!(growth(last, 100).problems().join("; "), expect);
    }

    #[test]
    fn growth_is_a_problem() {
        check(0, 0, 0, "");
        check(0, 0, 20 << 20, "");
        check(
            1,
            2,
            0,
            "the daemons' file descriptors grew from 40 to 41 over 100 moves; \
             the daemons' threads grew from 8 to 10 over 100 moves",
        );
        check(
            0,
            0,
            23 << 20,
            "the daemons' anonymous bytes grew from 5242880 to 29360128 over 100 moves",
        );
    }

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
