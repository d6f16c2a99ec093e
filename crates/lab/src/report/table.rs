//! The tables: a row a cell, the median of its runs, and their range beside it.

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

/// What is behind some of these, in a table of its own, since a table of all of it is too wide to read.
const DETAIL_COLUMNS: &[Column] = &[
    ("preparation", Quantity::Time, |cell| cell.preparation_ms),
    ("predicted downtime", Quantity::Time, |cell| {
        cell.predicted_downtime_ms
    }),
    ("downtime", Quantity::Time, |cell| cell.downtime_ms),
    ("pulled pages", Quantity::Count, |cell| cell.pulled_pages),
    ("fault latency p50", Quantity::Time, |cell| {
        cell.fault_latency_p50_ms
    }),
    ("p99", Quantity::Time, |cell| cell.fault_latency_p99_ms),
];

/// What clients saw, beside what the guest and the hosts saw of the same moves.
const CLIENT_COLUMNS: &[Column] = &[
    ("client gap", Quantity::Time, |cell| {
        cell.clients.as_ref()?.gap_ms
    }),
    ("guest gap", Quantity::Time, |cell| cell.guest_gap_ms),
    ("downtime", Quantity::Time, |cell| cell.downtime_ms),
    ("longest wait", Quantity::Time, |cell| {
        cell.clients.as_ref()?.worst_wait_ms
    }),
    ("longest silence", Quantity::Time, |cell| {
        cell.clients.as_ref()?.silence_ms
    }),
    ("p50 before", Quantity::Time, |cell| {
        cell.clients.as_ref()?.before.p50_ms
    }),
    ("p99", Quantity::Time, |cell| {
        cell.clients.as_ref()?.before.p99_ms
    }),
    ("p99.9", Quantity::Time, |cell| {
        cell.clients.as_ref()?.before.p999_ms
    }),
    ("p50 during", Quantity::Time, |cell| {
        cell.clients.as_ref()?.during.p50_ms
    }),
    ("p99", Quantity::Time, |cell| {
        cell.clients.as_ref()?.during.p99_ms
    }),
    ("p99.9", Quantity::Time, |cell| {
        cell.clients.as_ref()?.during.p999_ms
    }),
    ("requests a second before", Quantity::Count, |cell| {
        cell.clients.as_ref()?.requests_per_s_before
    }),
    ("during", Quantity::Count, |cell| {
        cell.clients.as_ref()?.requests_per_s_during
    }),
    ("after", Quantity::Count, |cell| {
        cell.clients.as_ref()?.requests_per_s_after
    }),
    ("during of before", Quantity::Share, |cell| {
        cell.clients.as_ref()?.requests_share_during
    }),
];

/// A number that is added up over all runs.
type Sum = (&'static str, fn(&CellSummary) -> u64);

/// The whole table, and the details under it.
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
    let errors: &[Sum] = &[("integrity errors", |cell| cell.integrity_errors)];
    let cells: Vec<&CellSummary> = cells.iter().collect();
    table(page, axes, &cells, COLUMNS, errors);
    page.element(
        "p",
        "The same moves: how long they took to begin, the downtime that was expected when the guest was paused beside \
         the one that was measured, and how long the guest waited for pages that it pulled.",
    );
    table(page, axes, &cells, DETAIL_COLUMNS, &[]);
}

/// What clients saw; nothing if no guest had some.
pub(super) fn clients(page: &mut Page, axes: &Axes, cells: &[CellSummary]) {
    let cells = cells.iter().filter(|cell| cell.clients.is_some());
    let cells: Vec<&CellSummary> = cells.collect();
    if cells.is_empty() {
        return;
    }
    page.element("h2", "What clients saw");
    page.element(
        "p",
        "The same moves. Waits are those of requests that are due at fixed times, from then until they are answered, \
         so that each moment of a stop counts. The client gap is the longest of them around the switch, beside the \
         guest's own gap and the downtime; the longest wait is that of the whole move and of the second after it. While less is answered than is due, \
         requests queue up and wait for each other: the longest silence is how long none was answered. \
         Requests a second are those of connections that ask as soon as they are answered.",
    );
    let errors: &[Sum] = &[
        ("lost connections", |cell| {
            cell.clients.as_ref().map_or(0, |one| one.lost_connections)
        }),
        ("wrong answers", |cell| {
            cell.clients.as_ref().map_or(0, |one| one.wrong_answers)
        }),
    ];
    table(page, axes, &cells, CLIENT_COLUMNS, errors);
}

fn table(page: &mut Page, axes: &Axes, cells: &[&CellSummary], columns: &[Column], sums: &[Sum]) {
    page.open("div", "wide");
    page.open("table", "");
    page.open("thead", "");
    page.open("tr", "");
    for name in axes.names().chain(["technique"]) {
        page.classed("th", "text", name);
    }
    page.element("th", "completed");
    for (name, _, _) in columns {
        page.element("th", name);
    }
    for (name, _) in sums {
        page.element("th", name);
    }
    page.close("tr");
    page.close("thead");
    page.open("tbody", "");
    for cell in cells {
        row(page, axes, cell, columns, sums);
    }
    page.close("tbody");
    page.close("table");
    page.close("div");
}

fn row(page: &mut Page, axes: &Axes, summary: &CellSummary, columns: &[Column], sums: &[Sum]) {
    page.open("tr", "");
    for value in axes.values(&summary.cell) {
        page.classed("td", "text", &value);
    }
    page.classed("td", "text", &summary.cell.way());
    let (completed, runs) = (summary.completed, summary.runs);
    page.element("td", &format!("{completed} of {runs}"));
    for (_, quantity, value) in columns {
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
    for (_, sum) in sums {
        page.element("td", &sum(summary).to_string());
    }
    page.close("tr");
}
