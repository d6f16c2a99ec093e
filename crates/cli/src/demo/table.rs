//! What the demo prints: a line as each move ends, a table with a column for each mode at the end.

use crate::demo::summary::{Figures, Summary};
use crate::follow::how_slow;
use crate::output::count;
use limosa_lab::record::MoveRecord;
use limosa_lab::statistics::Spread;
use limosa_pages::ByteCount;
use std::fmt::Write as _;

/// One line about one move.
pub(crate) fn move_line(record: &MoveRecord) -> String {
    let mut line = format!(
        "{:>4}  {} → {}  {:<14}",
        record.number,
        record.from,
        record.to,
        record.mode.name()
    );
    let mut add = |text: String| {
        line.push_str("  ");
        line.push_str(&text);
    };
    add(record.outcome.clone());
    let downtime = record.downtime_ms.map(|downtime| downtime.total);
    add(format!("downtime {}", ms(downtime)));
    add(format!("guest gap {}", ms(record.guest_gap_ms)));
    add(format!("total {}", ms(Some(record.total_ms))));
    add(format!("{} rounds", record.rounds.iter().flatten().count()));
    if let Some(pulled) = record.pulled_pages {
        add(format!("{} pages pulled", count(pulled)));
    }
    if let Some(change) = record.mode_changes.iter().flatten().next() {
        add(format!("{} → {}", change.from, change.to));
    }
    if let Some(throttle) = &record.throttle {
        add(format!(
            "throttled {}, {}",
            ms(Some(throttle.time_ms)),
            how_slow(&throttle.last)
        ));
    }
    if let Some(bytes) = record.wire_bytes {
        add(ByteCount::new(bytes).to_string());
    }
    add(format!("errors {}", record.integrity_errors));
    add(match record.memory_digest_equal {
        Some(true) => "digests equal".to_owned(),
        Some(false) => "DIGESTS DIFFER".to_owned(),
        None => "digests not compared".to_owned(),
    });
    line
}

/// The table over all moves.
pub(crate) fn table(summary: &Summary, verify: bool) -> String {
    let mut rows = vec![vec![String::new()]];
    for (name, value) in ROWS {
        let mut row = vec![(*name).to_owned()];
        row.extend(summary.by_mode.values().map(value));
        rows.push(row);
    }
    rows[0].extend(summary.by_mode.keys().map(|mode| (*mode).to_owned()));
    let mut text = columns(&rows);
    let all = &summary.all;
    let digests = if verify { "compared" } else { "not compared" };
    writeln!(
        text,
        "\n{} of {} moves completed, {} integrity errors, digests {digests}",
        all.completed, all.moves, all.integrity_errors
    )
    .expect("a string takes any text");
    if let Some(spread) = all.guest_gap_minus_downtime_ms {
        writeln!(
            text,
            "guest gap minus downtime: median {} ms, p95 {} ms",
            two_digits(spread.median),
            two_digits(spread.p95)
        )
        .expect("a string takes any text");
    }
    if let Some(daemons) = &summary.daemons {
        let (first, last) = (&daemons.first, &daemons.last);
        writeln!(
            text,
            "both daemons: {} → {} file descriptors, {} → {} threads, {} → {} of anonymous memory",
            first.open_fds,
            last.open_fds,
            first.threads,
            last.threads,
            ByteCount::new(first.anonymous_bytes),
            ByteCount::new(last.anonymous_bytes),
        )
        .expect("a string takes any text");
    }
    text
}

type Row = (&'static str, fn(&Figures) -> String);

/// What the table shows, in the order of a move.
const ROWS: &[Row] = &[
    ("moves completed", |of| {
        format!("{} of {}", of.completed, of.moves)
    }),
    ("preparation", |of| times(of.preparation_ms)),
    ("downtime, measured by the hosts", |of| {
        times(of.downtime_ms)
    }),
    ("downtime expected minus measured", |of| {
        times(of.prediction_error_ms)
    }),
    ("guest gap, seen by the guest", |of| times(of.guest_gap_ms)),
    ("heartbeat gap, seen from outside", |of| {
        times(of.heartbeat_gap_ms)
    }),
    ("worst stall of the guest", |of| times(of.worst_stall_ms)),
    ("1 request in 1000 waits longer", |of| {
        times(of.stall_p999_ms)
    }),
    ("back at 90 % of its speed after", |of| times(of.resume_ms)),
    ("total", |of| times(of.total_ms)),
    ("source holds nothing after", |of| times(of.eviction_ms)),
    ("rounds", |of| counts(of.rounds)),
    ("pages sent", |of| counts(of.pages_sent)),
    ("pages sent again", |of| counts(of.pages_resent)),
    ("hot pages left out of rounds", |of| {
        counts(of.deferred_pages)
    }),
    ("mode changes", |of| counts(of.mode_changes)),
    ("writers slowed down for", |of| times(of.throttled_ms)),
    ("pages missing at the switch", |of| {
        counts(of.missing_at_switch)
    }),
    ("pages pulled by the guest", |of| counts(of.pulled_pages)),
    ("network fault share", |of| {
        shown(
            of.network_fault_share,
            |share| two_digits(share * 100.0),
            " %",
        )
    }),
    ("wait for a page, median", |of| {
        micros(of.fault_latency_p50_us)
    }),
    ("wait for a page, 99 of 100 below", |of| {
        micros(of.fault_latency_p99_us)
    }),
    ("first wait for a page", |of| times(of.first_fault_stall_ms)),
    ("bytes on the wire", |of| sizes(of.wire_bytes)),
    ("work a second before", |of| counts(of.writes_per_s_before)),
    ("work a second during", |of| counts(of.writes_per_s_during)),
    ("work a second after", |of| counts(of.writes_per_s_after)),
    ("integrity errors", |of| of.integrity_errors.to_string()),
];

fn ms(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2} ms"))
}

fn times(spread: Option<Spread>) -> String {
    shown(spread, two_digits, " ms")
}

fn micros(spread: Option<Spread>) -> String {
    shown(spread, |value| count(value.round() as u64), " µs")
}

/// Two digits behind the point, and no minus before a zero.
fn two_digits(value: f64) -> String {
    let text = format!("{value:.2}");
    if text == "-0.00" {
        "0.00".to_owned()
    } else {
        text
    }
}

fn counts(spread: Option<Spread>) -> String {
    shown(spread, |value| count(value.round() as u64), "")
}

fn sizes(spread: Option<Spread>) -> String {
    shown(spread, |value| ByteCount::new(value as u64).to_string(), "")
}

/// The median, and the range if there is one.
fn shown(spread: Option<Spread>, format: impl Fn(f64) -> String, unit: &str) -> String {
    let Some(spread) = spread else {
        return "-".to_owned();
    };
    let [min, median, max] = [spread.min, spread.median, spread.max].map(format);
    if min == max {
        format!("{median}{unit}")
    } else {
        format!("{median}{unit} [{min} – {max}]")
    }
}

/// Rows as wide as their widest cells.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::sample::record;
    use limosa_engine::policy::Mode;
    use limosa_host::api::ModeChange;

    #[test]
    fn a_line_says_what_matters() {
        let mut one = record(Mode::PreCopy, 3.456, 3.0);
        one.wire_bytes = Some(257 << 20);
        assert_eq!(
            move_line(&one),
            "   1  a → b  pre-copy        completed  downtime 3.00 ms  guest gap 3.46 ms  \
             total 100.00 ms  0 rounds  257 MiB  errors 0  digests equal"
        );
    }

    #[test]
    fn a_line_tells_of_pages_that_were_waited_for_and_of_a_change() {
        let mut one = record(Mode::Auto, 3.456, 3.0);
        one.pulled_pages = Some(1234);
        one.mode_changes = Some(vec![ModeChange {
            at_ms: 1.0,
            from: Mode::PreCopy,
            to: Mode::Hybrid,
            reason: String::new(),
        }]);
        let line = move_line(&one);
        assert!(
            line.contains("0 rounds  1,234 pages pulled  pre-copy → hybrid  "),
            "{line}"
        );
    }

    #[test]
    fn the_table_has_a_column_for_each_mode() {
        let moves = [
            record(Mode::StopAndCopy, 150.0, 150.0),
            record(Mode::PreCopy, 3.5, 3.0),
            record(Mode::PreCopy, 4.0, 3.0),
        ];
        let text = table(&Summary::new(&moves, None, true, None, 1.0), true);
        for line in [
            "                                  pre-copy               stop-and-copy",
            "guest gap, seen by the guest      3.75 ms [3.50 – 4.00]  150.00 ms",
            "heartbeat gap, seen from outside  -                      -",
            "3 of 3 moves completed, 0 integrity errors, digests compared",
            "guest gap minus downtime: median 0.50 ms, p95 1.00 ms",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn columns_are_aligned() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = columns(&[row(["a", "b"]), row(["long é", "c"])]);
        assert_eq!(text, "a       b\nlong é  c\n");
    }
}
