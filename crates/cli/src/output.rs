//! What a command prints: tables and numbers for people, JSON for programs.

pub(crate) use limosa_lab::values::count;

use anyhow::bail;
use serde::Serialize;
use std::io::{self, ErrorKind, Write};

/// Where answers go, and in which form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of text.
    pub json: bool,
}

impl Output {
    /// Prints an answer: `value` as JSON, or what `text` makes of it.
    pub(crate) fn answer<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            print(&serde_json::to_string_pretty(value)?)
        } else {
            print(&text(value))
        }
    }

    /// Prints one line of JSON.
    pub(crate) fn json_line<T: Serialize>(value: &T) -> anyhow::Result<()> {
        print(&serde_json::to_string(value)?)
    }
}

/// Prints text and a line's end. A reader that has seen enough and left is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => Ok(printed?),
    }
}

/// The end of a command that found these problems: all of them a line each, unless there is only one,
/// which is the error then.
pub(crate) fn verdict(problems: &[String]) -> anyhow::Result<()> {
    match problems {
        [] => Ok(()),
        [only] => bail!("{only}"),
        [first, rest @ ..] => {
            let more = rest.len();
            for problem in problems {
                eprintln!("problem: {problem}");
            }
            bail!("{first} (and {more} more)")
        }
    }
}

/// How a column is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Sets rows under a head; columns are two blanks apart, no line ends in blanks.
pub(crate) fn table<const N: usize>(head: [(&str, Align); N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(|(title, _)| title.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let titles = head.map(|(title, _)| title.to_owned());
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(widths).zip(head) {
            let blanks = " ".repeat(width - cell.chars().count());
            match align {
                Align::Left => line.push_str(&format!("{cell}{blanks}  ")),
                Align::Right => line.push_str(&format!("{blanks}{cell}  ")),
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A time with a fitting unit: `870 µs`, `4.21 ms`, `12.3 s`, `2 min 5 s`.
pub(crate) fn time(milliseconds: f64) -> String {
    let digits = |value: f64| match value {
        ..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    match milliseconds {
        0.0 => "0 ms".to_owned(),
        ..1.0 => format!("{:.0} µs", milliseconds * 1000.0),
        ..1000.0 => format!("{milliseconds:.*} ms", digits(milliseconds)),
        ..120_000.0 => format!(
            "{:.*} s",
            digits(milliseconds / 1000.0),
            milliseconds / 1000.0
        ),
        _ => {
            let seconds = (milliseconds / 1000.0).round() as u64;
            format!("{} min {} s", seconds / 60, seconds % 60)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let row = |name: &str, size: &str| [name.to_owned(), size.to_owned()];
        let text = table(
            [("NAME", Align::Left), ("SIZE", Align::Right)],
            &[row("a", "1"), row("longer", "1000"), row("é", "")],
        );
        assert_eq!(text, "NAME    SIZE\na          1\nlonger  1000\né\n");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
        let times = [0.0, 0.87, 4.213, 12.34, 123.4, 1234.0, 61_000.0, 125_000.0].map(time);
        assert_eq!(
            times,
            [
                "0 ms",
                "870 µs",
                "4.21 ms",
                "12.3 ms",
                "123 ms",
                "1.23 s",
                "61.0 s",
                "2 min 5 s"
            ]
        );
    }
}
