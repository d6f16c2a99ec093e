//! What an experiment has come to: its files, its medians, its problems.

use crate::output::{Align, Output, count, table, time};
use anyhow::{Context, Result};
use limosa_lab::rows::{self, Comparison, FIGURES};
use limosa_lab::statistics::Spread;
use limosa_lab::store::Results;
use limosa_lab::summary::{self, CellSummary};
use limosa_lab::{csv, report};
use limosa_pages::ByteCount;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};

/// The answer of the command.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    /// Every run was measured and nothing was wrong.
    ok: bool,
    /// What was asked.
    question: String,
    /// Whether the moves happened in the simulator.
    simulated: bool,
    /// Runs of the plan.
    planned: usize,
    /// Of these, how many are measured.
    measured: usize,
    /// Of these, how many were made now.
    made_now: usize,
    /// Moves that were completed.
    completed: usize,
    /// Failed checks of guests.
    integrity_errors: u64,
    /// What must not happen, one line each.
    problems: Vec<String>,
    /// Moves that were not completed, one line each.
    unfinished: Vec<String>,
    /// A row a run.
    csv: PathBuf,
    /// For people.
    report: PathBuf,
    /// By cell.
    cells: Vec<CellSummary>,
    /// Limosa beside QEMU, by row.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    comparisons: Vec<Comparison>,
}

impl Outcome {
    /// Writes the files of these results.
    pub(crate) fn write(directory: &Path, results: &Results, made_now: usize) -> Result<Self> {
        let csv = directory.join("results.csv");
        write(&csv, &csv::csv(results))?;
        let report = directory.join("report.html");
        write(&report, &report::html(results)?)?;
        let cells = CellSummary::all(results);
        let comparisons = rows::comparisons(results);
        if !comparisons.is_empty() {
            write(&directory.join("pairs.csv"), &rows::csv(&comparisons))?;
        }
        let problems = summary::problems(results);
        let (planned, measured) = (
            results.plan.runs(),
            cells.iter().map(|cell| cell.measured).sum(),
        );
        Ok(Self {
            ok: problems.is_empty() && measured == planned,
            question: results.plan.question.clone(),
            simulated: results.are_simulated(),
            planned,
            measured,
            made_now,
            completed: cells.iter().map(|cell| cell.completed).sum(),
            integrity_errors: cells.iter().map(|cell| cell.integrity_errors).sum(),
            problems,
            unfinished: summary::unfinished(results),
            csv,
            report,
            cells,
            comparisons,
        })
    }

    /// Prints it.
    pub(crate) fn print(&self, output: Output) -> Result<()> {
        output.answer(self, Self::text)
    }

    /// The status of the command.
    pub(crate) fn verdict(&self) -> Result<()> {
        crate::output::verdict(&self.problems)
    }

    fn text(&self) -> String {
        let head = [
            ("WORKLOAD", Align::Left),
            ("LINK", Align::Left),
            ("MEMORY", Align::Right),
            ("VCPUS", Align::Right),
            ("STREAMS", Align::Right),
            ("COMPRESS", Align::Left),
            ("PAGES", Align::Left),
            ("TLS", Align::Left),
            ("TECHNIQUE", Align::Left),
            ("COMPLETED", Align::Right),
            ("GUEST GAP", Align::Right),
            ("DOWNTIME", Align::Right),
            ("TOTAL", Align::Right),
            ("ON THE WIRE", Align::Right),
        ];
        let rows: Vec<[String; 14]> = self.cells.iter().map(row).collect();
        let mut text = table(head, &rows);
        if self.simulated {
            text.insert_str(0, "SIMULATED: guest, link and hosts are models\n");
        }
        let served: Vec<[String; 12]> = self.cells.iter().filter_map(served_row).collect();
        if !served.is_empty() {
            text.push('\n');
            text.push_str(&table(SERVED, &served));
        }
        if !self.comparisons.is_empty() {
            text.push('\n');
            text.push_str(&pairs(&self.comparisons));
        }
        for line in &self.unfinished {
            text.push_str(&format!("{line}\n"));
        }
        text.push_str(&format!(
            "\nmedians; {} of {} runs measured, {} moves completed, {} integrity errors\n{}\n{}\n",
            self.measured,
            self.planned,
            self.completed,
            self.integrity_errors,
            self.csv.display(),
            self.report.display(),
        ));
        text
    }
}

fn row(summary: &CellSummary) -> [String; 14] {
    let cell = &summary.cell;
    let median =
        |spread: Option<Spread>| spread.map_or_else(|| "-".to_owned(), |one| time(one.median));
    let wire = summary
        .wire_bytes
        .map(|one| ByteCount::new(one.median as u64));
    [
        cell.workload.clone(),
        cell.link_text(),
        ByteCount::new(cell.memory_bytes).to_string(),
        cell.vcpus.to_string(),
        cell.streams.to_string(),
        cell.compress.name().to_owned(),
        cell.pages.name().to_owned(),
        if cell.tls { "on" } else { "off" }.to_owned(),
        cell.way(),
        format!("{} of {}", summary.completed, summary.runs),
        median(summary.guest_gap_ms),
        median(summary.downtime_ms),
        median(summary.total_ms),
        wire.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
    ]
}

/// What clients saw.
const SERVED: [(&str, Align); 12] = [
    ("WORKLOAD", Align::Left),
    ("LINK", Align::Left),
    ("TECHNIQUE", Align::Left),
    ("CLIENT GAP", Align::Right),
    ("GUEST GAP", Align::Right),
    ("DOWNTIME", Align::Right),
    ("LONGEST WAIT", Align::Right),
    ("P99.9 BEFORE", Align::Right),
    ("DURING", Align::Right),
    ("REQUESTS/S BEFORE", Align::Right),
    ("DURING", Align::Right),
    ("AFTER", Align::Right),
];

/// A row of it; `None` of a guest without clients.
fn served_row(summary: &CellSummary) -> Option<[String; 12]> {
    let seen = summary.clients.as_ref()?;
    let dash = || "-".to_owned();
    let wait = |spread: Option<Spread>| spread.map_or_else(dash, |one| time(one.median));
    let rate =
        |spread: Option<Spread>| spread.map_or_else(dash, |one| count(one.median.round() as u64));
    Some([
        summary.cell.workload.clone(),
        summary.cell.link_text(),
        summary.cell.way(),
        wait(seen.gap_ms),
        wait(summary.guest_gap_ms),
        wait(summary.downtime_ms),
        wait(seen.worst_wait_ms),
        wait(seen.before.p999_ms),
        wait(seen.during.p999_ms),
        rate(seen.requests_per_s_before),
        rate(seen.requests_per_s_during),
        rate(seen.requests_per_s_after),
    ])
}

/// A line for each figure of each comparison.
fn pairs(comparisons: &[Comparison]) -> String {
    let head = [
        ("ROW", Align::Left),
        ("LIMOSA", Align::Left),
        ("FIGURE", Align::Left),
        ("LIMOSA", Align::Right),
        ("BEST QEMU", Align::Right),
        ("VARIANT", Align::Left),
        ("RATIO", Align::Right),
        ("PAIRS", Align::Right),
    ];
    let mut rows = Vec::new();
    for comparison in comparisons {
        for (figure, line) in FIGURES.iter().zip(&comparison.lines) {
            let dash = || "-".to_owned();
            let number = |spread: Spread| {
                if figure.is_time {
                    time(spread.median)
                } else {
                    count(spread.median.round() as u64)
                }
            };
            let best = line.best.as_ref();
            let ratio = best.and_then(|best| best.ratio);
            rows.push([
                comparison.row.clone(),
                comparison.limosa.clone(),
                figure.title.to_owned(),
                line.limosa.map_or_else(dash, number),
                best.map_or_else(dash, |best| number(best.qemu)),
                best.map_or_else(dash, |best| best.variant.clone()),
                ratio.map_or_else(dash, |ratio| format!("{:.2}", ratio.median)),
                best.map_or_else(dash, |best| best.pairs.to_string()),
            ]);
        }
    }
    table(head, &rows)
}

/// Replaces a file in one step: whoever reads it never sees half of it.
fn write(path: &Path, text: &str) -> Result<()> {
    let draft = path.with_extension("new");
    fs::write(&draft, text)
        .and_then(|()| fs::rename(&draft, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
