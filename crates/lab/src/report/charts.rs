//! The charts: a group for each workload over each link, with a row or a line for each cell of it.
//!
//! Times span five orders of magnitude between techniques, so their axes are logarithmic, and dots
//! with ranges are used in place of bars, which would need a zero to begin at. The downtime is shown
//! by the shares of its parts, each row with its total, since no common scale shows both 1 ms and 5 s.

mod fault_waits;
mod lines;
mod over_time;
mod palette;
mod parts;
mod rounds;
mod rows;
mod scale;
mod times;

use super::axes::Axes;
use super::page::Page;
use crate::plan::Cell;
use crate::record::MoveRecord;
use crate::store::Results;
use crate::summary::{CellSummary, records};
use limosa_engine::policy::Mode;

/// One cell as the charts see it.
struct Row<'a> {
    label: String,
    technique: Mode,
    summary: &'a CellSummary,
    records: Vec<&'a MoveRecord>,
}

impl Row<'_> {
    /// The completed move in the middle by this value, the lower one of two: a real move, whose parts
    /// belong together.
    fn middle(&self, value: impl Fn(&MoveRecord) -> Option<f64>) -> Option<&MoveRecord> {
        let completed = self.records.iter().filter(|one| one.is_completed());
        let mut moves: Vec<(f64, &MoveRecord)> = completed
            .filter_map(|one| Some((value(one)?, *one)))
            .collect();
        moves.sort_by(|one, other| one.0.total_cmp(&other.0));
        let middle = moves.len().checked_sub(1)? / 2;
        Some(moves[middle].1)
    }
}

/// All of them.
pub(super) fn all(
    page: &mut Page,
    results: &Results,
    axes: &Axes,
    cells: &[CellSummary],
) -> anyhow::Result<()> {
    page.open("p", "");
    page.text("Dots are medians, lines reach from the smallest to the largest run.");
    for technique in Mode::ALL {
        if cells.iter().any(|cell| cell.cell.technique == technique) {
            page.key(palette::technique(technique), technique.name());
        }
    }
    page.close("p");
    page.open("p", "");
    page.text("Parts of the downtime, in the order in which they happen:");
    for (name, colour, _) in parts::PARTS {
        page.key(colour, name);
    }
    page.close("p");
    for group in groups(cells) {
        let cell = &group[0].cell;
        let what = format!("{} over a link: {}", cell.workload, cell.link_text());
        page.element(
            "h3",
            &match &cell.row {
                Some(row) => format!("{row}: {what}"),
                None => what,
            },
        );
        let rows: Vec<Row<'_>> = group
            .iter()
            .map(|summary| Row {
                label: axes.label(&summary.cell),
                technique: summary.cell.technique,
                summary,
                records: records(results, &summary.cell),
            })
            .collect();
        page.open("div", "charts");
        figures(page, &rows)?;
        page.close("div");
    }
    Ok(())
}

/// The charts of one group.
fn figures(page: &mut Page, rows: &[Row<'_>]) -> anyhow::Result<()> {
    figure(
        page,
        "Guest gap: how long the guest stood still",
        times::chart(rows, |cell| cell.guest_gap_ms)?,
    );
    figure(
        page,
        "Client gap: how long a request around the switch waited at most",
        times::chart(rows, |cell| cell.clients.as_ref()?.gap_ms)?,
    );
    figure(
        page,
        "The guest's speed over time, of the run in the middle by its total; the time of its switch is shaded",
        over_time::speed(rows)?,
    );
    figure(
        page,
        "The same around the switch, which is shaded",
        over_time::speed_at_switch(rows)?,
    );
    figure(
        page,
        "Requests a second over time, of the run in the middle",
        over_time::requests(rows)?,
    );
    figure(
        page,
        "The longest wait of requests by when they were due, of the run in the middle",
        over_time::waits(rows)?,
    );
    figure(
        page,
        "Total: until the guest ran at the target with all its pages",
        times::chart(rows, |cell| cell.total_ms)?,
    );
    figure(
        page,
        "Downtime by parts, of the run in the middle",
        parts::chart(rows)?,
    );
    figure(
        page,
        "Pages of each round, of the run in the middle",
        rounds::chart(rows)?,
    );
    figure(
        page,
        "How long faults waited for their pages",
        fault_waits::chart(rows)?,
    );
    Ok(())
}

/// Cells of one row, workload and link, in the order of the plan.
fn groups(cells: &[CellSummary]) -> Vec<Vec<&CellSummary>> {
    let key = |cell: &Cell| (cell.row.clone(), cell.workload.clone(), cell.link);
    let mut groups: Vec<Vec<&CellSummary>> = Vec::new();
    for summary in cells {
        let group = groups
            .iter_mut()
            .find(|group| key(&group[0].cell) == key(&summary.cell));
        match group {
            Some(group) => group.push(summary),
            None => groups.push(vec![summary]),
        }
    }
    groups
}

/// A drawing with its caption; nothing if there was nothing to draw.
fn figure(page: &mut Page, caption: &str, svg: Option<String>) {
    let Some(svg) = svg else {
        return;
    };
    page.open("figure", "");
    page.element("figcaption", caption);
    page.drawing(&svg);
    page.close("figure");
}
