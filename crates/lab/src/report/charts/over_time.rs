//! What guests and their clients saw over time: a line for each cell, from a second before the move to a second after
//! its end, and the guests' speed closer around the switch.

use super::lines::{Axis, Mark, marked};
use super::scale::{decades, exponent, tick};
use super::{Row, palette};
use crate::clients::Series;
use crate::record::{MoveRecord, SpeedSeries};
use crate::report::quantity::{Quantity, time};
use std::ops::Range;

/// What most of the axes count.
const SINCE_REQUEST: &str = "since the request for the move";

type Line<'a, T> = (palette::Colour, &'a T);

/// Equal slots of time, one after the other.
#[derive(Clone, Copy, Debug)]
struct Slots {
    begin_ms: f64,
    slot_ms: f64,
    count: usize,
}

impl Slots {
    /// The middle of one of them, in seconds.
    fn middle(self, slot: usize) -> f64 {
        (self.begin_ms + self.slot_ms * (slot as f64 + 0.5)) / 1000.0
    }

    /// From the first one of all to the end of the last one, in seconds.
    fn span(all: impl Iterator<Item = Self> + Clone) -> Option<Range<f64>> {
        let begin = all.clone().map(|one| one.begin_ms).reduce(f64::min)?;
        let ends = all.map(|one| one.begin_ms + one.slot_ms * one.count as f64);
        let end = ends.reduce(f64::max)?;
        Some(begin / 1000.0..end.max(begin + 1.0) / 1000.0)
    }

    /// A point for each value.
    fn points(self, values: impl Iterator<Item = Option<f64>>) -> Vec<(f64, f64)> {
        let points = values.enumerate();
        let points = points.filter_map(|(slot, value)| Some((self.middle(slot), value?)));
        points.collect()
    }
}

impl From<&Series> for Slots {
    fn from(series: &Series) -> Self {
        Self {
            begin_ms: series.begin_ms,
            slot_ms: series.slot_ms,
            count: series.requests_per_s.len(),
        }
    }
}

impl From<&SpeedSeries> for Slots {
    fn from(series: &SpeedSeries) -> Self {
        Self {
            begin_ms: series.begin_ms,
            slot_ms: series.slot_ms,
            count: series.work_per_s.len(),
        }
    }
}

/// The guests' speed through the move, with their switches marked; `None` if nobody heard of any.
pub(super) fn speed(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series = of_rows(rows, |row| row.middle(heard)?.guest_speed.as_ref());
    speed_chart(&series, SINCE_REQUEST, |_| 0.0)
}

/// The same around the switch, where all have stopped at one place.
pub(super) fn speed_at_switch(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series = of_rows(rows, |row| {
        row.middle(heard)?.guest_speed_at_switch.as_ref()
    });
    speed_chart(&series, "since the guest stopped", |one| {
        one.stopped_ms.unwrap_or(0.0)
    })
}

/// By which the run in the middle is found, of those whose guests were heard.
fn heard(one: &MoveRecord) -> Option<f64> {
    one.guest_speed.as_ref().map(|_| one.total_ms)
}

/// A chart of speeds; `zero_ms` tells where the axis of a series begins to count.
fn speed_chart(
    series: &[Line<'_, SpeedSeries>],
    since: &str,
    zero_ms: impl Fn(&SpeedSeries) -> f64,
) -> anyhow::Result<Option<String>> {
    let mut highest: f64 = 1.0;
    let (mut all_slots, mut lines, mut marks) = (Vec::new(), Vec::new(), Vec::new());
    for (ink, one) in series {
        let zero_ms = zero_ms(one);
        let mut slots = Slots::from(*one);
        slots.begin_ms -= zero_ms;
        let values = one.work_per_s.iter().copied();
        highest = values.clone().flatten().fold(highest, f64::max);
        lines.push((*ink, slots.points(values)));
        all_slots.push(slots);
        let place = |moment_ms: f64| (moment_ms - zero_ms) / 1000.0;
        if let (Some(stopped), Some(running)) = (one.stopped_ms, one.running_ms) {
            let range = place(stopped)..place(running);
            marks.push(Mark { ink: *ink, range });
        }
    }
    let y = Axis {
        range: 0.0..highest,
        name: "work a second",
        ticks: &|value| Quantity::Count.text(value),
    };
    draw(all_slots.into_iter(), since, &y, &marks, &lines)
}

/// Answers a second; `None` if no guest had clients.
pub(super) fn requests(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series = of_clients(rows);
    let all = series.iter().flat_map(|(_, one)| &one.requests_per_s);
    let highest = all.copied().fold(1.0, f64::max);
    let lines: Vec<_> = series
        .iter()
        .map(|(ink, one)| {
            let values = one.requests_per_s.iter().copied();
            (*ink, Slots::from(*one).points(values.map(Some)))
        })
        .collect();
    let y = Axis {
        range: 0.0..highest,
        name: "requests a second",
        ticks: &|value| Quantity::Count.text(value),
    };
    draw(clients_slots(&series), SINCE_REQUEST, &y, &[], &lines)
}

/// The longest waits; `None` if no guest had clients.
pub(super) fn waits(rows: &[Row<'_>]) -> anyhow::Result<Option<String>> {
    let series = of_clients(rows);
    let all = series.iter().flat_map(|(_, one)| &one.worst_wait_ms);
    let Some(range) = decades(all.copied().flatten()) else {
        return Ok(None);
    };
    let lines: Vec<_> = series
        .iter()
        .map(|(ink, one)| {
            let waits = one.worst_wait_ms.iter();
            let heights = waits.map(|wait| Some(exponent((*wait)?, &range)));
            (*ink, Slots::from(*one).points(heights))
        })
        .collect();
    let y = Axis {
        range: range.clone(),
        name: "longest wait",
        ticks: &|place| tick(place, time),
    };
    draw(clients_slots(&series), SINCE_REQUEST, &y, &[], &lines)
}

/// The slots of each.
fn clients_slots(series: &[Line<'_, Series>]) -> impl Iterator<Item = Slots> + Clone {
    series.iter().map(|(_, one)| Slots::from(*one))
}

fn draw(
    slots: impl Iterator<Item = Slots> + Clone,
    since: &str,
    y: &Axis<'_>,
    marks: &[Mark],
    lines: &[(palette::Colour, Vec<(f64, f64)>)],
) -> anyhow::Result<Option<String>> {
    let Some(range) = Slots::span(slots) else {
        return Ok(None);
    };
    let x = Axis {
        range,
        name: since,
        // To the microsecond, or the axis would count from a little below zero.
        ticks: &|seconds| time((seconds * 1e6).round() / 1000.0),
    };
    marked(&x, y, marks, lines).map(Some)
}

/// What clients saw of the run in the middle of each row that has one.
fn of_clients<'a>(rows: &'a [Row<'_>]) -> Vec<Line<'a, Series>> {
    of_rows(rows, |row| {
        let middle = row.middle(|one| one.clients.as_ref()?.gap_ms)?;
        middle.clients.as_ref()?.series.as_ref()
    })
}

/// The series of each row that has one, with the colour of its technique.
fn of_rows<'a, 'r, T>(
    rows: &'a [Row<'r>],
    series: impl Fn(&'a Row<'r>) -> Option<&'a T>,
) -> Vec<Line<'a, T>> {
    let of_row = |row: &'a Row<'r>| Some((palette::technique(row.technique), series(row)?));
    rows.iter().filter_map(of_row).collect()
}
