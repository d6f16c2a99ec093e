//! The pages of each round: whether rounds get smaller is whether pre-copy comes to an end.

use super::lines::{Axis, chart as line_chart};
use super::scale::{at_whole, decades, exponent, tick};
use super::{Row, palette};
use crate::report::quantity::Quantity;

/// The chart; `None` if no move had more than one round.
pub(super) fn chart(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series: Vec<(palette::Colour, Vec<f64>)> = rows
        .iter()
        .filter_map(|row| {
            let middle = row.middle(|one| Some(one.total_ms))?;
            let rounds = middle.rounds.as_ref()?;
            let pages = rounds.iter().map(|round| round.pages as f64);
            Some((palette::technique(row.technique), pages.collect()))
        })
        .filter(|(_, pages): &(_, Vec<f64>)| pages.len() > 1)
        .collect();
    let Some(longest) = series.iter().map(|(_, pages)| pages.len()).max() else {
        return Ok(None);
    };
    let all = series.iter().flat_map(|(_, pages)| pages.iter().copied());
    // One page, or none, lies on the axis.
    let range = decades(all.chain([1.0])).unwrap_or(0.0..1.0);
    let lines: Vec<_> = series
        .iter()
        .map(|(ink, pages)| {
            let points = (1..).zip(pages);
            let points = points.map(|(round, pages)| (f64::from(round), exponent(*pages, &range)));
            (*ink, points.collect())
        })
        .collect();
    let x = Axis {
        range: 1.0..(longest as f64).max(2.0),
        name: "round",
        ticks: &|place| at_whole(place, |round| round.to_string()),
    };
    let y = Axis {
        range: range.clone(),
        name: "pages",
        ticks: &|place| tick(place, |pages| Quantity::Count.text(pages)),
    };
    line_chart(&x, &y, &lines).map(Some)
}
