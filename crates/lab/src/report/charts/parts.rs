//! The downtime of each cell by its parts, as shares of the whole.

use super::Row;
use super::palette::Colour;
use super::rows::{self, chart as row_chart, colour, failed};
use crate::report::quantity::time;
use limosa_host::api::Downtime;
use plotters::prelude::*;

type Part = (&'static str, Colour, fn(&Downtime) -> f64);

/// The parts in the order in which they happen.
pub(super) const PARTS: [Part; 7] = [
    ("pause", (0, 0, 0), |downtime| downtime.pause),
    ("harvest", (230, 159, 0), |downtime| downtime.harvest),
    ("save", (86, 180, 233), |downtime| downtime.save),
    ("transfer", (0, 114, 178), |downtime| downtime.transfer),
    ("load", (0, 158, 115), |downtime| downtime.load),
    ("commit", (240, 228, 66), |downtime| downtime.commit),
    ("start", (204, 121, 167), |downtime| downtime.start),
];

/// The chart; `None` if nothing was measured.
pub(super) fn chart(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let downtimes: Vec<Option<Downtime>> = rows
        .iter()
        .map(|row| row.middle(|one| Some(one.downtime_ms?.total))?.downtime_ms)
        .collect();
    if downtimes.iter().all(Option::is_none) {
        return Ok(None);
    }
    let names: Vec<&str> = rows.iter().map(|row| row.label.as_str()).collect();
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let svg = row_chart(&names, 0.0..1.0, percent, |chart| {
        for (index, downtime) in downtimes.iter().enumerate() {
            let Some(downtime) = downtime else {
                rows::value_text(chart, index, 0.0, "not measured".to_owned())?;
                continue;
            };
            let parts = PARTS.map(|(_, ink, value)| (ink, value(downtime).max(0.0)));
            let whole: f64 = parts.iter().map(|(_, value)| value).sum();
            let mut begin = 0.0;
            for (ink, value) in parts.into_iter().filter(|(_, value)| *value > 0.0) {
                let end = begin + value / whole;
                let (top, bottom) = (index as f64 + 0.2, index as f64 + 0.8);
                let bar = Rectangle::new([(begin, top), (end, bottom)], colour(ink).filled());
                chart.plotting_area().draw(&bar).map_err(failed)?;
                begin = end;
            }
            rows::value_text(chart, index, 1.0, time(downtime.total))?;
        }
        Ok(())
    })?;
    Ok(Some(svg))
}
