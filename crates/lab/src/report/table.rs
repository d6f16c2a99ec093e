//! The table: a row a cell, the median of its runs, and their range below it.

use super::axes::Axes;
use super::page::Page;
use super::quantity::Quantity;
use crate::statistics::Spread;
use crate::summary::CellSummary;

type Column = (&'static str, Quantity, fn(&CellSummary) -> Option<Spread>);

/// In the order in which a reader asks.
const COLUMNS: &[Column] = &[
    ("guest gap", Quantity::Time, |cell| cell.guest_gap_ms),
    ("downtime", Quantity::Time, |cell| cell.downtime_ms),
    ("worst stall", Quantity::Time, |cell| cell.worst_stall_ms),
    ("stall p99.9", Quantity::Time, |cell| cell.stall_p999_ms),
    ("total", Quantity::Time, |cell| cell.total_ms),
    ("on the wire", Quantity::Size, |cell| cell.wire_bytes),
    ("pages sent again", Quantity::Count, |cell| {
        cell.pages_resent
    }),
    ("pulled pages", Quantity::Count, |cell| cell.pulled_pages),
    ("network fault share", Quantity::Share, |cell| {
        cell.network_fault_share
    }),
    ("work a second before", Quantity::Count, |cell| {
        cell.work_per_s_before
    }),
    ("during", Quantity::Count, |cell| cell.work_per_s_during),
    ("after", Quantity::Count, |cell| cell.work_per_s_after),
    ("processors used by others", Quantity::Share, |cell| {
        cell.others_cpu_share
    }),
];

/// The whole table.
pub(super) fn medians(page: &mut Page, axes: &Axes, cells: &[CellSummary]) {
    let same = if axes.same.is_empty() {
        String::new()
    } else {
        format!(" In all of them: {}.", axes.same)
    };
    page.element(
        "p",
        &format!(
            "Each row is one way to move one guest: the median of its completed moves and, where \
             they differ, [smallest – largest]. A dash is what was not measured.{same}"
        ),
    );
    page.open("div", "wide");
    page.open("table", "");
    page.open("thead", "");
    page.open("tr", "");
    for name in axes.names().chain(["technique"]) {
        page.classed("th", "text", name);
    }
    page.element("th", "completed");
    for (name, _, _) in COLUMNS {
        page.element("th", name);
    }
    page.element("th", "integrity errors");
    page.close("tr");
    page.close("thead");
    page.open("tbody", "");
    for cell in cells {
        row(page, axes, cell);
    }
    page.close("tbody");
    page.close("table");
    page.close("div");
}

fn row(page: &mut Page, axes: &Axes, summary: &CellSummary) {
    page.open("tr", "");
    for value in axes.values(&summary.cell) {
        page.classed("td", "text", &value);
    }
    page.classed("td", "text", &summary.cell.way());
    let (completed, runs) = (summary.completed, summary.runs);
    page.element("td", &format!("{completed} of {runs}"));
    for (_, quantity, value) in COLUMNS {
        page.open("td", "");
        match value(summary) {
            None => page.text("–"),
            Some(spread) => {
                page.text(&quantity.text(spread.median));
                if let Some(range) = quantity.range(spread) {
                    page.text(" ");
                    page.element("small", &range);
                }
            }
        }
        page.close("td");
    }
    page.element("td", &summary.integrity_errors.to_string());
    page.close("tr");
}
