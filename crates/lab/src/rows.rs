//! Rows of a comparison with QEMU: the same guest, moved by both in turn.
//!
//! Cells of limosa and of QEMU with the same row's name, workload, memory and link are compared. For
//! each figure the best variant of QEMU is taken, that with the best median among those that
//! completed at least half of their moves, and each move of limosa is divided by the move of that
//! variant in the same repeat: what slowly changes on a machine is in both.
//!
//! The best variant is chosen with the results at hand and for each figure anew, which nobody who
//! runs QEMU can: it is the strongest peer that there can be.

use crate::plan::Cell;
use crate::record::MoveRecord;
use crate::statistics::{Spread, median};
use crate::store::{Results, RunResult};
use limosa_pages::ByteCount;
use serde::Serialize;
use std::collections::BTreeMap;

/// A figure by which both are judged.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// Its name, as in `results.csv`.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// Whether it is a time in milliseconds; else it is a number a second.
    pub is_time: bool,
    value: fn(&MoveRecord) -> Option<f64>,
}

/// In the order in which a reader asks. Of times the smaller one is better, of work the larger one.
pub const FIGURES: [Figure; 7] = [
    Figure {
        name: "guest_gap_ms",
        title: "guest gap",
        is_time: true,
        value: |one| one.guest_gap_ms,
    },
    Figure {
        name: "worst_stall_ms",
        title: "worst stall",
        is_time: true,
        value: |one| one.worst_stall_ms,
    },
    Figure {
        name: "stall_p999_ms",
        title: "stall p99.9",
        is_time: true,
        value: |one| one.stall_p999_ms,
    },
    Figure {
        name: "heartbeat_gap_ms",
        title: "heartbeat gap",
        is_time: true,
        value: |one| one.heartbeat_gap_ms,
    },
    Figure {
        name: "total_ms",
        title: "total",
        is_time: true,
        value: |one| Some(one.total_ms),
    },
    Figure {
        name: "work_per_s_before",
        title: "work a second before",
        is_time: false,
        value: |one| one.guest_writes_per_s.before,
    },
    Figure {
        name: "work_per_s_during",
        title: "work a second during",
        is_time: false,
        value: |one| one.guest_writes_per_s.during,
    },
];

/// One cell of limosa beside all variants of QEMU in its row.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The row.
    pub row: String,
    /// The cell of limosa.
    #[serde(skip)]
    pub cell: Cell,
    /// The same in words: technique, streams, and what is not the default.
    pub limosa: String,
    /// How many moves of both were completed.
    pub completed: String,
    /// A line for each figure, in the order of [`FIGURES`].
    pub lines: Vec<Line>,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Its name.
    pub figure: &'static str,
    /// Of limosa's completed moves.
    pub limosa: Option<Spread>,
    /// Of the best variant of QEMU.
    pub best: Option<Best>,
}

/// The best variant of QEMU by one figure.
#[derive(Clone, Debug, Serialize)]
pub struct Best {
    /// Which one.
    pub variant: String,
    /// Of its completed moves.
    pub qemu: Spread,
    /// Limosa's over QEMU's, repeat by repeat; `null` if no pair was completed.
    pub ratio: Option<Spread>,
    /// How many pairs there are.
    pub pairs: usize,
}

/// The comparisons of an experiment, in the order of the plan; none without QEMU.
pub fn comparisons(results: &Results) -> Vec<Comparison> {
    let cells = &results.plan.cells;
    let ours = cells.iter().filter(|cell| cell.qemu.is_none());
    ours.filter_map(|cell| {
        let peers: Vec<&Cell> = cells
            .iter()
            .filter(|peer| peer.qemu.is_some() && key(peer) == key(cell))
            .collect();
        (!peers.is_empty()).then(|| compare(results, cell, &peers))
    })
    .collect()
}

/// Cells of one row have this in common.
pub fn key(cell: &Cell) -> (Option<&str>, &str, u64, Option<u64>) {
    let row = cell.row.as_deref();
    (row, &cell.workload, cell.memory_bytes, cell.link)
}

/// The row of a cell in words.
pub fn title(cell: &Cell) -> String {
    cell.row.clone().unwrap_or_else(|| {
        let memory = ByteCount::new(cell.memory_bytes);
        format!("{}, {memory}, link {}", cell.workload, cell.link_text())
    })
}

fn compare(results: &Results, ours: &Cell, peers: &[&Cell]) -> Comparison {
    let (done, measured) = counts(results, ours);
    let peers_counts = peers.iter().map(|peer| counts(results, peer));
    let (peers_done, peers_measured) =
        peers_counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    Comparison {
        row: title(ours),
        cell: ours.clone(),
        limosa: label(ours),
        completed: format!(
            "{done} of {measured} moves of limosa, {peers_done} of {peers_measured} of QEMU"
        ),
        lines: FIGURES
            .iter()
            .map(|figure| line(results, figure, ours, peers))
            .collect(),
    }
}

fn line(results: &Results, figure: &Figure, ours: &Cell, peers: &[&Cell]) -> Line {
    let own = values(results, ours, figure);
    let is_reliable = |peer: &&&Cell| {
        let (done, measured) = counts(results, peer);
        done * 2 >= measured
    };
    let candidates = peers.iter().filter(is_reliable).filter_map(|peer| {
        let values = values(results, peer, figure);
        let middle = median(&values.values().copied().collect::<Vec<_>>())?;
        Some((if figure.is_time { middle } else { -middle }, peer, values))
    });
    let best = candidates.min_by(|one, other| one.0.total_cmp(&other.0));
    Line {
        figure: figure.name,
        limosa: spread(&own),
        best: best.and_then(|(_, peer, values)| {
            let ratios: BTreeMap<u32, f64> = own
                .iter()
                .filter_map(|(repeat, own)| Some((*repeat, own / values.get(repeat)?)))
                .filter(|(_, ratio)| ratio.is_finite())
                .collect();
            Some(Best {
                variant: variant(peer),
                qemu: spread(&values)?,
                ratio: spread(&ratios),
                pairs: ratios.len(),
            })
        }),
    }
}

/// What tells a cell of limosa from the others of its row.
fn label(cell: &Cell) -> String {
    format!("{}, {}{}", cell.way(), cell.streams_text(), cell.unusual())
}

/// Variant and limit of a cell of QEMU.
fn variant(cell: &Cell) -> String {
    let way = cell.way();
    way.strip_prefix("QEMU ").unwrap_or(&way).to_owned()
}

fn spread(values: &BTreeMap<u32, f64>) -> Option<Spread> {
    Spread::of(values.values().map(|value| Some(*value)))
}

/// A figure of a cell's completed moves, by repeat.
fn values(results: &Results, cell: &Cell, figure: &Figure) -> BTreeMap<u32, f64> {
    runs(results, cell)
        .filter_map(|run| {
            let record = run.record.as_ref().filter(|one| one.is_completed())?;
            Some((run.repeat, (figure.value)(record)?))
        })
        .collect()
}

/// Completed and measured moves of a cell.
fn counts(results: &Results, cell: &Cell) -> (usize, usize) {
    let records: Vec<&MoveRecord> = runs(results, cell)
        .filter_map(|run| run.record.as_ref())
        .collect();
    let done = records.iter().filter(|one| one.is_completed()).count();
    (done, records.len())
}

fn runs<'a>(results: &'a Results, cell: &Cell) -> impl Iterator<Item = &'a RunResult> {
    results.runs.iter().filter(move |run| run.cell == *cell)
}

/// The comparisons as a table for other programs: a row a figure.
pub fn csv(comparisons: &[Comparison]) -> String {
    let mut text = String::from(
        "row,limosa,figure,limosa_median,limosa_min,limosa_max,qemu_variant,qemu_median,qemu_min,\
         qemu_max,ratio_median,ratio_min,ratio_max,pairs\n",
    );
    for comparison in comparisons {
        for line in &comparison.lines {
            let best = line.best.as_ref();
            let mut fields = vec![comparison.row.clone(), comparison.limosa.clone()];
            fields.push(line.figure.to_owned());
            fields.extend(numbers(line.limosa));
            fields.push(best.map_or_else(String::new, |best| best.variant.clone()));
            fields.extend(numbers(best.map(|best| best.qemu)));
            fields.extend(numbers(best.and_then(|best| best.ratio)));
            fields.push(best.map_or_else(String::new, |best| best.pairs.to_string()));
            text.push_str(&crate::csv::line(fields.into_iter()));
        }
    }
    text
}

fn numbers(spread: Option<Spread>) -> [String; 3] {
    spread.map_or_else(Default::default, |spread| {
        [spread.median, spread.min, spread.max].map(|value| value.to_string())
    })
}

#[cfg(test)]
pub(crate) mod tests;
