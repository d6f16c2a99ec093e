//! A time of each cell: its median as a dot, its range as a line, on a logarithmic axis.

use super::Row;
use super::palette;
use super::rows::{self, chart as row_chart, colour, failed};
use super::scale::{decades, exponent, tick};
use crate::report::quantity::time;
use crate::statistics::Spread;
use crate::summary::CellSummary;
use plotters::prelude::*;

/// The chart; `None` if nothing was measured.
pub(super) fn chart(
    rows: &[Row<'_>],
    value: impl Fn(&CellSummary) -> Option<Spread>,
) -> anyhow::Result<Option<String>> {
    let spreads: Vec<Option<Spread>> = rows.iter().map(|row| value(row.summary)).collect();
    let ends = spreads
        .iter()
        .flatten()
        .flat_map(|spread| [spread.min, spread.max]);
    let Some(axis) = decades(ends) else {
        return Ok(None);
    };
    let names: Vec<&str> = rows.iter().map(|row| row.label.as_str()).collect();
    let ticks = |place: f64| tick(place, decade);
    let svg = row_chart(&names, axis.clone(), ticks, |chart| {
        for (index, (row, spread)) in rows.iter().zip(&spreads).enumerate() {
            let height = index as f64 + 0.5;
            let Some(spread) = spread else {
                rows::value_text(chart, index, axis.start, "not measured".to_owned())?;
                continue;
            };
            let place = |value: f64| (exponent(value, &axis), height);
            let ink = colour(palette::technique(row.technique));
            let range = [place(spread.min), place(spread.max)];
            let line = PathElement::new(range.to_vec(), ink.stroke_width(2));
            chart.plotting_area().draw(&line).map_err(failed)?;
            let dot = Circle::new(place(spread.median), 5, ink.filled());
            chart.plotting_area().draw(&dot).map_err(failed)?;
            let behind = exponent(spread.max, &axis);
            rows::value_text(chart, index, behind, time(spread.median))?;
        }
        Ok(())
    })?;
    Ok(Some(svg))
}

/// One, ten or a hundred of some unit.
fn decade(milliseconds: f64) -> String {
    match milliseconds {
        ..0.9 => format!("{:.0} µs", milliseconds * 1000.0),
        ..900.0 => format!("{milliseconds:.0} ms"),
        _ => format!("{:.0} s", milliseconds / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decades_have_round_names() {
        let names = [-2, -1, 0, 2, 3, 4].map(|exponent| decade(10f64.powi(exponent)));
        assert_eq!(names, ["10 µs", "100 µs", "1 ms", "100 ms", "1 s", "10 s"]);
    }
}
