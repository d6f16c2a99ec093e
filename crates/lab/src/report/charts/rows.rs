//! A chart with a named row for each cell, one below the other.

use super::palette::{GRID, INK};
use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

/// Height of a row.
const ROW: u32 = 24;
/// Room for the axis below the rows, and above them.
const MARGINS: u32 = 44;
/// Room for the names of the rows; a character takes about [`CHARACTER`].
const CHARACTER: u32 = 6;
/// Room for a value behind the last dot.
const VALUE: u32 = 90;
const WIDTH: u32 = 640;

type Area<'a, 'b> = DrawingArea<SVGBackend<'a>, Shift>;
/// The coordinates of a chart: a value, and a row counted from above.
pub(super) type Chart<'a, 'b> =
    ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A text of a chart.
pub(super) fn style(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&colour(INK))
}

/// As the drawing crate wants it.
pub(super) const fn colour((red, green, blue): super::palette::Colour) -> RGBColor {
    RGBColor(red, green, blue)
}

/// Draws rows with these names over an axis; `draw` puts into row `n` what belongs between `n` and
/// `n + 1`.
pub(super) fn chart(
    names: &[&str],
    axis: Range<f64>,
    ticks: impl Fn(f64) -> String,
    draw: impl FnOnce(&mut Chart<'_, '_>) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let rows = u32::try_from(names.len()).unwrap_or(u32::MAX);
    let size = (WIDTH, ROW * rows + MARGINS);
    let longest = names.iter().map(|name| name.chars().count()).max();
    let names_width = CHARACTER * longest.and_then(|len| u32::try_from(len).ok()).unwrap_or(0) + 12;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_top(8)
            .margin_right(VALUE)
            .margin_left(names_width)
            .x_label_area_size(26)
            .build_cartesian_2d(axis, f64::from(rows)..0.0)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .bold_line_style(colour(GRID))
            .axis_style(colour(INK))
            .label_style(style(12))
            .x_labels(8)
            .x_label_formatter(&|place| ticks(*place))
            .draw()
            .map_err(failed)?;
        let left = chart.plotting_area().get_x_axis_pixel_range().start;
        for (row, name) in (0..).zip(names) {
            let middle = chart.backend_coord(&(0.0, f64::from(row) + 0.5)).1;
            write(&root, name, (left - 8, middle), HPos::Right)?;
        }
        draw(&mut chart)?;
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn write(root: &Area<'_, '_>, text: &str, place: (i32, i32), side: HPos) -> anyhow::Result<()> {
    let style = style(12).pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(text.to_owned(), place, style))
        .map_err(failed)
}

/// Writes a value behind a place of a row.
pub(super) fn value_text(
    chart: &mut Chart<'_, '_>,
    row: usize,
    place: f64,
    text: String,
) -> anyhow::Result<()> {
    let style = style(12).pos(Pos::new(HPos::Left, VPos::Center));
    let element = EmptyElement::at((place, row as f64 + 0.5)) + Text::new(text, (9, 0), style);
    let drawn = chart.plotting_area().draw(&element);
    drawn.map_err(failed)
}

/// Errors of the drawing crate hold a lock of the drawing, so only their text goes on.
pub(super) fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw a chart: {error}")
}
