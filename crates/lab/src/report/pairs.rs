//! Limosa and QEMU side by side: a table for each row, with the ratios pair by pair at its end.

use super::page::Page;
use super::quantity::Quantity;
use crate::rows::{self, Comparison, FIGURES, Figure};
use crate::statistics::Spread;
use crate::store::Results;
use crate::summary::CellSummary;

/// All rows; nothing if QEMU has no part in the experiment.
pub(super) fn all(page: &mut Page, results: &Results, cells: &[CellSummary]) {
    let comparisons = rows::comparisons(results);
    if comparisons.is_empty() {
        return;
    }
    page.element("h2", "Limosa and QEMU");
    page.element(
        "p",
        "The same guest program, moved by both in turn; medians of completed moves, [smallest – \
         largest] where they differ. Best is the variant with the best median of a figure among \
         those that completed half of their moves, chosen for each figure anew. A ratio is \
         limosa's value over QEMU's of the same repeat: of times, less than one is in limosa's \
         favour, of work, more than one.",
    );
    page.element("p", &versions(results));
    for comparison in &comparisons {
        let title = format!("{}: {}", comparison.row, comparison.limosa);
        page.element("h3", &title);
        page.element("p", &format!("{}.", comparison.completed));
        row(page, comparison, cells);
    }
}

/// Every version of QEMU that made a move.
fn versions(results: &Results) -> String {
    let records = results.runs.iter().filter_map(|run| run.record.as_ref());
    let figures = records.filter_map(|record| record.qemu.as_ref());
    let mut versions: Vec<&str> = figures.map(|qemu| qemu.version.as_str()).collect();
    versions.sort_unstable();
    versions.dedup();
    format!("QEMU {}.", versions.join(", "))
}

fn row(page: &mut Page, comparison: &Comparison, cells: &[CellSummary]) {
    page.open("div", "wide");
    page.open("table", "");
    page.open("thead", "");
    page.open("tr", "");
    page.classed("th", "text", "way");
    page.element("th", "completed");
    for figure in &FIGURES {
        page.element("th", figure.title);
    }
    page.element("th", "integrity errors");
    page.close("tr");
    page.close("thead");
    page.open("tbody", "");
    let ours = &comparison.cell;
    for cell in cells {
        let is_peer = cell.cell.qemu.is_some() && rows::key(&cell.cell) == rows::key(ours);
        if is_peer || cell.cell == *ours {
            cell_line(page, cell);
        }
    }
    best_line(page, comparison);
    ratio_line(page, comparison);
    page.close("tbody");
    page.close("table");
    page.close("div");
}

fn cell_line(page: &mut Page, summary: &CellSummary) {
    page.open("tr", "");
    page.classed("td", "text", &summary.cell.way());
    let (completed, runs) = (summary.completed, summary.runs);
    page.element("td", &format!("{completed} of {runs}"));
    let spreads = [
        summary.guest_gap_ms,
        summary.worst_stall_ms,
        summary.stall_p999_ms,
        summary.heartbeat_gap_ms,
        summary.total_ms,
        summary.work_per_s_before,
        summary.work_per_s_during,
    ];
    for (figure, spread) in FIGURES.iter().zip(spreads) {
        let quantity = quantity(figure);
        value(page, spread, |number| quantity.text(number));
    }
    page.element("td", &summary.integrity_errors.to_string());
    page.close("tr");
}

fn best_line(page: &mut Page, comparison: &Comparison) {
    page.open("tr", "");
    page.classed("td", "text", "best of QEMU");
    page.element("td", "");
    for line in &comparison.lines {
        let variant = line.best.as_ref().map_or("–", |best| &best.variant);
        page.element("td", variant);
    }
    page.element("td", "");
    page.close("tr");
}

fn ratio_line(page: &mut Page, comparison: &Comparison) {
    page.open("tr", "");
    page.classed("td", "text", "limosa / best of QEMU");
    page.element("td", "");
    for line in &comparison.lines {
        let ratio = line.best.as_ref().and_then(|best| best.ratio);
        value(page, ratio, |number| format!("{number:.2}"));
    }
    page.element("td", "");
    page.close("tr");
}

fn value(page: &mut Page, spread: Option<Spread>, text: impl Fn(f64) -> String) {
    page.open("td", "");
    match spread {
        None => page.text("–"),
        Some(spread) => {
            page.text(&text(spread.median));
            let (min, max) = (text(spread.min), text(spread.max));
            if min != max {
                page.text(" ");
                page.element("small", &format!("[{min} – {max}]"));
            }
        }
    }
    page.close("td");
}

const fn quantity(figure: &Figure) -> Quantity {
    if figure.is_time {
        Quantity::Time
    } else {
        Quantity::Count
    }
}
