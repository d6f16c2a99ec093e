//! The report: one HTML file that answers the question with a table and charts.
//!
//! It needs nothing but itself: no script, no style sheet, no picture from elsewhere, so that it can
//! be sent to somebody and opened years later. Charts are SVG within the text. Whatever comes from a
//! plan, a command line or a machine is escaped by [`page::Page`], which has no other way in.
//!
//! Invariants: every figure is of runs in the directory, and says how many they are; what was
//! simulated says so before anything else.
//!
//! Deliberately absent: conclusions.

mod axes;
mod charts;
mod facts;
mod page;
mod pairs;
mod quantity;
mod table;

use crate::store::Results;
use crate::summary::CellSummary;
use axes::Axes;
use page::Page;

/// The whole file.
///
/// # Errors
/// A chart cannot be drawn, which is a mistake of ours.
pub fn html(results: &Results) -> anyhow::Result<String> {
    let cells = CellSummary::all(results);
    let axes = Axes::of(&results.plan.cells);
    let mut page = Page::new(&results.plan.question, STYLE);
    page.element("h1", &results.plan.question);
    if results.are_simulated() {
        page.open("p", "simulated");
        page.element("strong", "Simulated.");
        page.text(
            " The decisions are the engine's own; guest, link and hosts are models. These figures \
             compare techniques, they predict no machine.",
        );
        page.close("p");
    }
    facts::verdict(&mut page, results, &cells);
    page.element("h2", "Medians");
    table::medians(&mut page, &axes, &cells);
    table::clients(&mut page, &axes, &cells);
    pairs::all(&mut page, results, &cells);
    page.element("h2", "Charts");
    charts::all(&mut page, results, &axes, &cells)?;
    page.element("h2", "How it was measured");
    facts::how(&mut page, results);
    Ok(page.finish())
}

/// Readable on a screen and on paper.
const STYLE: &str = "\
body { font: 15px/1.5 sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.25 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
.simulated { background: #fff3cd; border: 2px solid #b58900; padding: .6rem 1rem }
.warning { border-left: 4px solid #b00020; padding-left: .8rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
th, td { border: 1px solid #ccc; padding: .25rem .5rem; text-align: right; white-space: nowrap; vertical-align: top }
th.text, td.text { text-align: left }
thead th { background: #f3f3f3 }
small { color: #666 }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; flex: 1 1 30rem; max-width: 46rem }
figcaption { font-weight: bold }
svg { max-width: 100%; height: auto }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto }
dt { font-weight: bold }
";

#[cfg(test)]
mod tests;
