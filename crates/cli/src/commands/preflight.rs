//! What `migrate --dry-run` shows: what is in the way at the target, and what each technique would take.

use crate::follow::Follower;
use crate::output::{Align, count, table, time, verdict};
use anyhow::Result;
use limosa_engine::estimate::Ending;
use limosa_host::api::{EstimateInfo, MigrateBody, PreflightInfo};
use limosa_pages::{ByteCount, BytesPerSecond, PageCount};
use std::fmt::Write as _;

/// Asks and shows; differences are an error, for nothing can be moved then.
pub(super) fn show(follower: &Follower, vm: &str, body: &MigrateBody) -> Result<()> {
    let info = follower.client().preflight(vm, body)?;
    follower.output().answer(&info, text)?;
    verdict(&info.differences)
}

fn text(info: &PreflightInfo) -> String {
    let mut text = String::new();
    let (vm, to) = (&info.vm, &info.to);
    let answer = match info.differences.len() {
        0 => format!("{to} would take {vm}"),
        1 => format!("{to} would not take {vm}, for one reason"),
        more => format!("{to} would not take {vm}, for {more} reasons"),
    };
    let encrypted = if info.encrypted { ", encrypted" } else { "" };
    let size = |bytes: u64| ByteCount::new(bytes);
    let mut line = |name: &str, value: String| {
        writeln!(text, "{name:<10}  {value}").expect("a text takes more");
    };
    line("target", answer);
    line(
        "way",
        format!(
            "{} by one stream{encrypted}, {} there and back",
            BytesPerSecond::new(info.bandwidth),
            time(info.round_trip_ms)
        ),
    );
    line(
        "memory",
        format!(
            "{} of {} exist",
            size(info.existing_bytes),
            size(info.memory_bytes)
        ),
    );
    line(
        "state",
        format!(
            "{}, the guest stood {} to be saved",
            size(info.state_bytes),
            time(info.save_ms)
        ),
    );
    let dirtied = info.dirtied.iter().map(|point| {
        let pages = PageCount::new(point.pages);
        format!("{} in {}", pages.bytes(), time(point.after_ms))
    });
    line("dirtied", dirtied.collect::<Vec<_>>().join(", "));
    let head = [
        ("MODE", Align::Left),
        ("ROUNDS", Align::Right),
        ("PAGES", Align::Right),
        ("DOWNTIME", Align::Right),
        ("TIME", Align::Right),
        ("HOW IT ENDS", Align::Left),
    ];
    let rows: Vec<_> = info.estimates.iter().map(row).collect();
    let note = "estimated without coding, slowed writers and deferred pages; what the target takes to load \
                the state comes on top";
    format!("{text}\n{}\n{note}", table(head, &rows))
}

fn row(estimate: &EstimateInfo) -> [String; 6] {
    let dash = || "-".to_owned();
    [
        estimate.mode.to_string(),
        estimate.rounds.to_string(),
        count(estimate.pages),
        time(estimate.downtime_ms),
        estimate.total_ms.map_or_else(dash, time),
        match (estimate.verdict, estimate.degraded_ms) {
            (Ending::Copies, _) => "the rest is copied within the limit".to_owned(),
            (Ending::CopiesLate, _) => {
                "the rest is copied, which takes longer than allowed".to_owned()
            }
            (Ending::Switches, Some(degraded)) => {
                format!("runs there without all its pages for {}", time(degraded))
            }
            (Ending::Switches, None) => "each page comes when it is needed".to_owned(),
        },
    ]
}
