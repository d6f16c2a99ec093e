//! What clients saw over time: a line for each cell, from a second before the move to a second after its end.

use super::lines::{Axis, chart as line_chart};
use super::scale::{decades, exponent, tick};
use super::{Row, palette};
use crate::clients::Series;
use crate::report::quantity::{Quantity, time};
use std::ops::Range;

type Line<'a> = (palette::Colour, &'a Series);

/// Answers a second; `None` if no guest had clients.
pub(super) fn requests(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series = series(rows);
    let all = series.iter().flat_map(|(_, one)| &one.requests_per_s);
    let highest = all.copied().fold(1.0, f64::max);
    let lines: Vec<_> = series
        .iter()
        .map(|(ink, one)| {
            let values = one.requests_per_s.iter().enumerate();
            (
                *ink,
                values
                    .map(|(slot, value)| (middle(one, slot), *value))
                    .collect(),
            )
        })
        .collect();
    let y = Axis {
        range: 0.0..highest,
        name: "requests a second",
        ticks: &|value| Quantity::Count.text(value),
    };
    draw(&series, &y, &lines)
}

/// The longest waits; `None` if no guest had clients.
pub(super) fn waits(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series = series(rows);
    let all = series.iter().flat_map(|(_, one)| &one.worst_wait_ms);
    let Some(range) = decades(all.copied().flatten()) else {
        return Ok(None);
    };
    let lines: Vec<_> = series
        .iter()
        .map(|(ink, one)| {
            let values = one.worst_wait_ms.iter().enumerate();
            let points = values
                .filter_map(|(slot, wait)| Some((middle(one, slot), exponent((*wait)?, &range))));
            (*ink, points.collect())
        })
        .collect();
    let y = Axis {
        range: range.clone(),
        name: "longest wait",
        ticks: &|place| tick(place, time),
    };
    draw(&series, &y, &lines)
}

fn draw(
    series: &[Line<'_>],
    y: &Axis<'_>,
    lines: &[(palette::Colour, Vec<(f64, f64)>)],
) -> anyhow::Result<Option<String>> {
    let Some(range) = span(series) else {
        return Ok(None);
    };
    let x = Axis {
        range,
        name: "since the request for the move",
        ticks: &|seconds| time(seconds * 1000.0),
    };
    line_chart(&x, y, lines).map(Some)
}

/// That of the run in the middle of each row that has one.
fn series<'a>(rows: &'a [Row<'_>]) -> Vec<Line<'a>> {
    let of_row = |row: &'a Row<'_>| {
        let middle = row.middle(|one| one.clients.as_ref()?.gap_ms)?;
        let series = middle.clients.as_ref()?.series.as_ref()?;
        Some((palette::technique(row.technique), series))
    };
    rows.iter().filter_map(of_row).collect()
}

/// From the first slot of all to the end of the last one, in seconds.
fn span(series: &[Line<'_>]) -> Option<Range<f64>> {
    let begins = series.iter().map(|(_, one)| one.begin_ms);
    let ends = series
        .iter()
        .map(|(_, one)| one.begin_ms + one.slot_ms * one.requests_per_s.len() as f64);
    let (begin, end) = (begins.reduce(f64::min)?, ends.reduce(f64::max)?);
    Some(begin / 1000.0..end.max(begin + 1.0) / 1000.0)
}

/// The middle of a slot, in seconds.
fn middle(series: &Series, slot: usize) -> f64 {
    (series.begin_ms + series.slot_ms * (slot as f64 + 0.5)) / 1000.0
}
