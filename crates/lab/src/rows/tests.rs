//! What is compared with what.

use super::*;
use crate::plan::Plan;
use crate::qemu::QemuFigures;
use crate::sample;
use crate::schedule;

const PLAN: &str = r#"
question = "Which?"
repeats = 3
[workloads.busy]
guest = "writer"
rest = "spin"
[[matrix]]
row = "busy, both"
techniques = ["pre-copy"]
workloads = ["busy"]
memory = ["512M"]
[[matrix]]
vmm = "qemu"
row = "busy, both"
variants = ["plain", "multifd", "auto-converge"]
downtime_limits = ["30ms"]
workloads = ["busy"]
memory = ["512M"]
[[matrix]]
techniques = ["auto"]
workloads = ["busy"]
memory = ["512M"]
"#;

/// Gaps of limosa are 10, 20 and 30 ms in the repeats; plain's are ten times as long, multifd's
/// twice; auto-converge has a short one but completes one move of three.
pub(crate) fn results() -> Results {
    let plan = Plan::parse(PLAN).unwrap();
    let made = schedule::runs(&plan).into_iter().map(|run| {
        let gap = f64::from(run.repeat) * 10.0;
        let mut record = sample::record(match run.cell_index {
            1 => gap * 10.0,
            2 => gap * 2.0,
            3 => 1.0,
            _ => gap,
        });
        if plan.cells[run.cell_index].qemu.is_some() {
            record.qemu = Some(QemuFigures {
                version: "10.0.2".to_owned(),
                ..QemuFigures::default()
            });
        }
        if run.cell_index == 3 && run.repeat > 1 {
            record.outcome = "cancelled".to_owned();
        }
        sample::result(&plan, &run, Ok(record))
    });
    Results {
        runs: made.collect(),
        plan_text: PLAN.to_owned(),
        starts: vec![sample::start(false)],
        plan,
    }
}

#[test]
fn moves_are_compared_repeat_by_repeat_with_the_best_variant() {
    let comparisons = comparisons(&results());
    assert_eq!(comparisons.len(), 1, "the cell without a row has no peer");
    let one = &comparisons[0];
    assert_eq!(
        format!("{}: {}: {}", one.row, one.limosa, one.completed),
        "busy, both: pre-copy, 2 streams: 3 of 3 moves of limosa, 7 of 9 of QEMU"
    );
    let best = one.lines[0].best.as_ref().unwrap();
    assert_eq!(best.variant, "multifd \u{2264} 30 ms");
    let ratio = best.ratio.unwrap();
    assert_eq!((ratio.min, ratio.median, ratio.max), (0.5, 0.5, 0.5));
    assert_eq!(best.pairs, 3);
    let text = csv(&comparisons);
    let second = text.lines().nth(1).unwrap();
    assert_eq!(
        second,
        "\"busy, both\",\"pre-copy, 2 streams\",guest_gap_ms,20,10,30,multifd \u{2264} 30 ms,40,20,60,0.5,0.5,0.5,3"
    );
}

#[test]
fn without_a_peer_there_is_nothing_to_compare() {
    assert!(comparisons(&sample::results()).is_empty());
}

#[test]
fn what_nobody_completed_stays_empty() {
    let mut results = results();
    for run in &mut results.runs {
        if let Some(record) = run.record.as_mut().filter(|_| run.cell.qemu.is_some()) {
            record.outcome = "cancelled".to_owned();
        }
    }
    let one = &comparisons(&results)[0];
    assert!(one.lines.iter().all(|line| line.best.is_none()));
    assert!(one.lines[0].limosa.is_some());
}
