//! A chart with a line for each cell.

use super::palette::{Colour, GRID, INK};
use super::rows::{colour, failed, style};
use plotters::prelude::*;
use std::ops::Range;

const SIZE: (u32, u32) = (640, 300);
/// Points of a line with more of them would be one thick line.
const DOTS_MAX: usize = 60;
/// How much of its colour a mark has, so that lines are seen through it, and its edge.
const SHADE: f64 = 0.15;
const EDGE: f64 = 0.6;

/// An axis: its range, its name, and what stands at a place of it.
pub(super) struct Axis<'a> {
    /// From where to where.
    pub range: Range<f64>,
    /// What it counts.
    pub name: &'a str,
    /// What stands there.
    pub ticks: &'a dyn Fn(f64) -> String,
}

/// A time that is marked from the bottom of a chart to its top.
pub(super) struct Mark {
    /// Of the line to which it belongs.
    pub ink: Colour,
    /// From where to where.
    pub range: Range<f64>,
}

/// Draws lines through these points.
pub(super) fn chart(
    x: &Axis<'_>,
    y: &Axis<'_>,
    lines: &[(Colour, Vec<(f64, f64)>)],
) -> anyhow::Result<String> {
    marked(x, y, &[], lines)
}

/// The same over marks: each is shaded, and has an edge where it begins, or a short one would not be seen.
pub(super) fn marked(
    x: &Axis<'_>,
    y: &Axis<'_>,
    marks: &[Mark],
    lines: &[(Colour, Vec<(f64, f64)>)],
) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(40)
            .y_label_area_size(80)
            .build_cartesian_2d(x.range.clone(), y.range.clone())
            .map_err(failed)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(colour(GRID))
            .axis_style(colour(INK))
            .label_style(style(12))
            .x_labels(12)
            .y_labels(8)
            .x_desc(x.name)
            .y_desc(y.name)
            .x_label_formatter(&|place| (x.ticks)(*place))
            .y_label_formatter(&|place| (y.ticks)(*place))
            .draw()
            .map_err(failed)?;
        for Mark { ink, range } in marks {
            let ink = colour(*ink);
            let (top, bottom) = (y.range.end, y.range.start);
            let shade = Rectangle::new(
                [(range.start, top), (range.end, bottom)],
                ink.mix(SHADE).filled(),
            );
            chart.plotting_area().draw(&shade).map_err(failed)?;
            let edge = [(range.start, top), (range.start, bottom)];
            let edge = PathElement::new(edge.to_vec(), ink.mix(EDGE).stroke_width(1));
            chart.plotting_area().draw(&edge).map_err(failed)?;
        }
        for (ink, points) in lines {
            let ink = colour(*ink);
            let width = if points.len() > DOTS_MAX { 1 } else { 2 };
            let line = PathElement::new(points.clone(), ink.stroke_width(width));
            chart.plotting_area().draw(&line).map_err(failed)?;
            for point in points.iter().filter(|_| points.len() <= DOTS_MAX) {
                let dot = Circle::new(*point, 3, ink.filled());
                chart.plotting_area().draw(&dot).map_err(failed)?;
            }
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}
