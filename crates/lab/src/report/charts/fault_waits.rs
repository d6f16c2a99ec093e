//! How long guests waited for missing pages: the share of the faults of all runs of a cell in each
//! power of two of microseconds.

use super::lines::{Axis, chart as line_chart};
use super::scale::at_whole;
use super::{Row, palette};
use crate::report::quantity::time;

/// The chart; `None` if no guest waited.
pub(super) fn chart(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series: Vec<(palette::Colour, Vec<f64>)> = rows
        .iter()
        .filter_map(|row| Some((palette::technique(row.technique), shares(row)?)))
        .collect();
    let Some(bins) = series.iter().map(|(_, shares)| shares.len()).max() else {
        return Ok(None);
    };
    let all = series.iter().flat_map(|(_, shares)| shares.iter().copied());
    let highest = all.fold(0.1, f64::max);
    // The empty bin before the first one that is not shows where the line begins.
    let empty = |shares: &[f64]| shares.iter().take_while(|share| **share == 0.0).count();
    let empty = series.iter().map(|(_, shares)| empty(shares)).min();
    let skipped = empty.unwrap_or(0).saturating_sub(1);
    let first = skipped as f64;
    let lines: Vec<_> = series
        .iter()
        .map(|(ink, shares)| {
            let points = (0..).zip(shares).skip(skipped);
            let points = points.map(|(bin, share)| (f64::from(bin), *share));
            (*ink, points.collect())
        })
        .collect();
    let x = Axis {
        range: first..(bins as f64 - 1.0).max(first + 1.0),
        name: "wait, up to",
        ticks: &|place| at_whole(place, |bin| time(bin.exp2() / 1000.0)),
    };
    let y = Axis {
        range: 0.0..highest,
        name: "share of faults",
        ticks: &|share| format!("{:.0} %", share * 100.0),
    };
    line_chart(&x, &y, &lines).map(Some)
}

/// Of each bin up to the last one that is not empty; `None` if there was no fault.
fn shares(row: &Row<'_>) -> Option<Vec<f64>> {
    let mut sums: Vec<u64> = Vec::new();
    for latency in row
        .records
        .iter()
        .filter_map(|one| one.fault_latency_us.as_ref())
    {
        let bins = latency.log2_histogram.len();
        sums.resize(sums.len().max(bins), 0);
        for (sum, count) in sums.iter_mut().zip(&latency.log2_histogram) {
            *sum += u64::from(*count);
        }
    }
    let last = sums.iter().rposition(|count| *count > 0)?;
    let whole = sums.iter().sum::<u64>() as f64;
    Some(
        sums[..=last]
            .iter()
            .map(|count| *count as f64 / whole)
            .collect(),
    )
}
