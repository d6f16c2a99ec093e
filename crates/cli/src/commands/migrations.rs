//! Commands about migrations: migrate, status, set, drain, abort, resolve.

use super::machines::{self, short};
use super::preflight;
use crate::arguments::{Migrate, Resolve, Set, Status};
use crate::follow::{Follower, headline, how_slow, numbers, outcome_line, stage_name};
use crate::output::{Align, Output, count, table, time};
use anyhow::{Result, anyhow, bail};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::{
    IncomingInfo, LimitsPatch, MigrateAnswer, MigrateBody, MigrationInfo, ModeChange, Report,
    ResolveWord, ThrottleReport, VmInfo,
};
use limosa_host::client::Client;
use limosa_lab::values::{Milliseconds, OrNone, Rate};
use limosa_pages::{ByteCount, BytesPerSecond};
use serde::Serialize;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Fewest characters of an id that name a migration: fewer would name it by accident.
const ID_CHARS_MIN: usize = 4;
/// How long the end is waited for of what was told to end. It takes milliseconds unless the target is
/// stuck.
const END_MAX: Duration = Duration::from_secs(20);

/// Moves a virtual machine.
pub(super) fn migrate(follower: &Follower, migrate: &Migrate) -> Result<()> {
    let body = MigrateBody {
        to: migrate.to.clone(),
        mode: migrate.mode,
        downtime_max_ms: migrate.downtime_max.map(Milliseconds::get),
        bandwidth_max: migrate.bandwidth_max.map(Rate::get),
        deadline_ms: migrate.deadline.map(Milliseconds::get),
        rounds_max: migrate.rounds_max,
        streams: Some(migrate.streams),
        compress: migrate.compress,
        throttle: migrate.throttle,
        defer: migrate.defer,
        push_order: migrate.push_order,
        verify: migrate.verify,
        copy_disks: migrate.copy_disks,
        link: migrate.link.map(Rate::get),
        balloon: migrate.balloon,
        insecure: migrate.insecure,
    };
    if migrate.dry_run {
        return preflight::show(follower, &migrate.vm, &body);
    }
    let id = follower.client().migrate(&migrate.vm, &body)?;
    if migrate.detach {
        return follower
            .output()
            .answer(&MigrateAnswer { id }, |answer| answer.id.clone());
    }
    follower.follow(&id, true)
}

/// What `status` answers when nothing is named.
#[derive(Serialize)]
struct Overview {
    outgoing: Vec<MigrationInfo>,
    incoming: Vec<IncomingInfo>,
}

/// Shows migrations.
pub(super) fn status(follower: &Follower, status: &Status) -> Result<()> {
    let client = follower.client();
    let Some(which) = &status.which else {
        let overview = Overview {
            outgoing: client.migrations()?,
            incoming: client.incoming()?,
        };
        return follower.output().answer(&overview, overview_text);
    };
    let found = select(client, which)?;
    if status.follow {
        return follower.follow(&found.id, false);
    }
    follower.output().answer(&found, details)
}

/// Changes limits.
pub(super) fn set(client: &Client, set: &Set, output: Output) -> Result<()> {
    if let Some(size) = set.balloon {
        let vm = client.set_balloon(&set.which, size.bytes())?;
        return output.answer(&vm, |vm| match &vm.balloon {
            Some(balloon) => format!("{}: {}", vm.name, machines::balloon(balloon)),
            None => vm.name.clone(),
        });
    }
    let patch = LimitsPatch {
        mode: set.mode,
        downtime_max_ms: set.downtime_max.map(Milliseconds::get),
        bandwidth_max: set.bandwidth_max.map(|limit| match limit {
            OrNone::Some(rate) => rate.get(),
            OrNone::None => 0,
        }),
        deadline_ms: set.deadline.map(|limit| match limit {
            OrNone::Some(deadline) => deadline.get(),
            OrNone::None => 0.0,
        }),
        rounds_max: set.rounds_max,
        compress: set.compress,
        throttle: set.throttle,
        streams: set.streams,
        defer: set.defer,
    };
    let found = select(client, &set.which)?;
    let changed = client.set(&found.id, &patch)?;
    output.answer(&changed, |info| {
        format!("{}: {}, {}", info.vm, info.mode, limits(info))
    })
}

/// Sends what a guest that runs at the target still misses, and shows that until it is over.
pub(super) fn drain(follower: &Follower, which: &str) -> Result<()> {
    let client = follower.client();
    let found = select(client, which).map_err(|error| explain_residue(client, which, error))?;
    match found.stage {
        Stage::Serving | Stage::Unresolved => {}
        Stage::Finished => bail!("nothing to drain: {}", outcome_line(&found)),
        stage => bail!(
            "nothing to drain yet: the migration of {} is {}, its guest has not been seen running at \
             the target",
            found.vm,
            stage_name(stage)
        ),
    }
    let patch = LimitsPatch {
        mode: Some(Mode::PostCopy),
        ..LimitsPatch::default()
    };
    client.set(&found.id, &patch)?;
    follower.follow(&found.id, false)
}

/// Says where to go with a guest that arrived here without all its pages.
fn explain_residue(client: &Client, which: &str, error: anyhow::Error) -> anyhow::Error {
    match client.vm(which) {
        Ok(VmInfo {
            residual_dependency: Some(residue),
            ..
        }) => anyhow!("{which} is {residue}: 'limosa drain' is a command for that host"),
        _ => error,
    }
}

/// What a decision of the operator comes to.
#[derive(Serialize)]
struct Resolved<'a> {
    id: &'a str,
    word: ResolveWord,
}

/// Tells the daemon how a migration ended, in the operator's word.
pub(super) fn resolve(client: &Client, resolve: &Resolve, output: Output) -> Result<()> {
    let word = if resolve.gone {
        ResolveWord::Gone
    } else {
        ResolveWord::RunsHere
    };
    let which = &resolve.which;
    // A guest that misses pages here is what is meant, even if it was here and left before.
    let arrival = client
        .vm(which)
        .ok()
        .filter(|vm| vm.residual_dependency.is_some());
    if let Some(id) = arrival.and_then(|vm| vm.migration) {
        client.resolve(&id, word)?;
        return output.answer(&Resolved { id: &id, word }, |_| {
            format!("{which} is given up: 'limosa stop {which}' removes it from the list")
        });
    }
    let found = select(client, which)?;
    client.resolve(&found.id, word)?;
    let info = wait_for_end(client, &found.id)?;
    let Some(info) = info else {
        bail!(
            "it is decided but not over: 'limosa status {}' tells more",
            short(&found.id)
        )
    };
    output.answer(&info, |info| match word {
        ResolveWord::RunsHere => format!("decided: {} runs on here", info.vm),
        ResolveWord::Gone => format!("decided: nothing of {} is left here", info.vm),
    })
}

/// Waits until a migration is over that has been told to end; `None` if that takes too long.
fn wait_for_end(client: &Client, id: &str) -> Result<Option<MigrationInfo>> {
    let begun = Instant::now();
    while begun.elapsed() <= END_MAX {
        let info = client.wait(id, Duration::from_secs(1))?;
        if info.stage == Stage::Finished {
            return Ok(Some(info));
        }
    }
    Ok(None)
}

/// Ends a migration and waits until it is over.
pub(super) fn abort(client: &Client, which: &str, output: Output) -> Result<()> {
    let found = select(client, which)?;
    client.abort(&found.id)?;
    match wait_for_end(client, &found.id)? {
        Some(info) if info.report.outcome.as_deref() == Some("aborted") => {
            output.answer(&info, |info| format!("aborted: {} runs on here", info.vm))
        }
        Some(info) => bail!("not aborted: {}", outcome_line(&info)),
        None => bail!(
            "the abort is under way but not over: 'limosa status {}' tells more",
            short(&found.id)
        ),
    }
}

/// Finds a migration by the name of its virtual machine (the newest one) or by its id.
fn select(client: &Client, which: &str) -> Result<MigrationInfo> {
    pick(client.migrations()?, which)
}

fn pick(migrations: Vec<MigrationInfo>, which: &str) -> Result<MigrationInfo> {
    let by_name = migrations.iter().rev().find(|info| info.vm == which);
    if let Some(info) = by_name {
        return Ok(info.clone());
    }
    let lower = which.to_ascii_lowercase();
    let mut by_id: Vec<MigrationInfo> = migrations
        .into_iter()
        .filter(|info| which.len() >= ID_CHARS_MIN && info.id.starts_with(&lower))
        .collect();
    match (by_id.pop(), by_id.len()) {
        (Some(info), 0) => Ok(info),
        (Some(_), others) => bail!(
            "'{which}' begins {} ids of migrations: give more of it",
            others + 1
        ),
        (None, _) => bail!(
            "no migration of a VM '{which}' and none with such an id: 'limosa status' lists them"
        ),
    }
}

fn overview_text(overview: &Overview) -> String {
    if overview.outgoing.is_empty() && overview.incoming.is_empty() {
        return "no migrations on this host yet".to_owned();
    }
    let mut text = String::new();
    if !overview.outgoing.is_empty() {
        let head = [
            ("ID", Align::Left),
            ("VM", Align::Left),
            ("TO", Align::Left),
            ("MODE", Align::Left),
            ("STAGE", Align::Left),
            ("ROUNDS", Align::Right),
            ("DOWNTIME", Align::Right),
            ("TIME", Align::Right),
        ];
        let rows: Vec<_> = overview.outgoing.iter().map(outgoing_row).collect();
        text = table(head, &rows);
    }
    if !overview.incoming.is_empty() {
        let head = [
            ("INCOMING", Align::Left),
            ("FROM", Align::Left),
            ("PAGES", Align::Right),
            ("RECEIVED", Align::Right),
            ("STAGE", Align::Left),
        ];
        let rows: Vec<_> = overview.incoming.iter().map(incoming_row).collect();
        text.push_str(&table(head, &rows));
    }
    text
}

fn outgoing_row(info: &MigrationInfo) -> [String; 8] {
    let stage = match (&info.report.outcome, info.stage) {
        (Some(outcome), Stage::Finished) => outcome.clone(),
        (_, stage) => stage_name(stage).to_owned(),
    };
    let downtime = info
        .report
        .downtime_ms
        .map_or_else(|| "-".to_owned(), |parts| time(parts.total));
    [
        short(&info.id).to_owned(),
        info.vm.clone(),
        info.to.clone(),
        info.mode.to_string(),
        stage,
        info.report.rounds.len().to_string(),
        downtime,
        time(info.elapsed_ms),
    ]
}

fn incoming_row(info: &IncomingInfo) -> [String; 5] {
    let alone = if info.is_connected {
        ""
    } else {
        ", its source is not connected"
    };
    let stuck = info.stuck.as_ref();
    let stuck = stuck.map_or_else(String::new, |stuck| format!(", {stuck}"));
    [
        short(&info.id).to_owned(),
        info.from.clone().unwrap_or_else(|| "-".to_owned()),
        count(info.pages_received),
        ByteCount::new(info.bytes_received).to_string(),
        match (info.is_committed, info.missing_pages) {
            (false, _) => "arriving".to_owned(),
            (true, 0) => "committed".to_owned(),
            (true, missing) => {
                format!("runs here, {} pages missing{alone}{stuck}", count(missing))
            }
        },
    ]
}

fn limits(info: &MigrationInfo) -> String {
    let limits = &info.limits;
    let bandwidth = limits.bandwidth_max.map_or_else(
        || "no bandwidth limit".to_owned(),
        |rate| format!("at most {}", BytesPerSecond::new(rate)),
    );
    let deadline = limits.deadline_ms.map_or_else(
        || "no deadline".to_owned(),
        |deadline| format!("deadline {}", time(deadline)),
    );
    format!(
        "downtime at most {}, {bandwidth}, {deadline}, at most {} rounds, throttle {}, defer {}, streams {}",
        time(limits.downtime_max_ms),
        limits.rounds_max,
        limits.throttle,
        limits.defer,
        limits.streams
    )
}

/// How the guest's writers were slowed down.
fn slowed(throttle: &ThrottleReport) -> String {
    let tightest = if throttle.tightest == throttle.last {
        String::new()
    } else {
        format!(" (at the tightest {})", how_slow(&throttle.tightest))
    };
    format!(
        "after {} for {}, {}{tightest}; vCPUs were held back for {}",
        time(throttle.first_at_ms),
        time(throttle.time_ms),
        how_slow(&throttle.last),
        time(throttle.held_ms)
    )
}

fn mode_change(change: &ModeChange) -> String {
    format!(
        "{} became {} after {}: {}",
        change.from,
        change.to,
        time(change.at_ms),
        change.reason
    )
}

fn tracker(info: &MigrationInfo) -> String {
    let tracker = info.dirty_tracker;
    format!("{tracker}: {}", tracker.consequence())
}

/// Everything about one migration.
/// The migration in one line.
fn which(info: &MigrationInfo) -> String {
    let encrypted = if info.encrypted { ", encrypted" } else { "" };
    format!(
        "{} of {} to {}, {}{encrypted}",
        info.id, info.vm, info.to, info.mode
    )
}

fn details(info: &MigrationInfo) -> String {
    let report = &info.report;
    let mut lines = vec![
        ("migration", which(info)),
        ("stage", stage_name(info.stage).to_owned()),
        ("tracker", tracker(info)),
        ("limits", limits(info)),
        (
            "time",
            format!(
                "{} since the request, {} of it before the first page",
                time(info.elapsed_ms),
                time(report.preparation_ms)
            ),
        ),
    ];
    if info.stage != Stage::Finished {
        lines.push(("now", format!("{}: {}", headline(info), numbers(info))));
        let (in_use, open) = (info.streams_in_use, info.streams_open);
        lines.push(("streams", format!("{in_use} in use, {open} open")));
    }
    let changes = report.mode_changes.iter();
    lines.extend(changes.map(|change| ("mode", mode_change(change))));
    let throttle = report.throttle.as_ref();
    lines.extend(throttle.map(|throttle| ("throttled", slowed(throttle))));
    if let Some(reason) = report.pause_reason {
        lines.push(("paused", format!("because {}", reason.explain())));
    }
    lines.extend(downtimes(info));
    lines.extend(residue(report).map(|text| ("missing", text)));
    lines.extend(faults(report).map(|text| ("faults", text)));
    lines.push((
        "sent",
        format!(
            "{} pages, {} of them again, {} with the state of {}",
            count(report.pages_sent),
            count(report.pages_resent),
            ByteCount::new(report.wire_bytes),
            ByteCount::new(report.state_bytes),
        ),
    ));
    let verified = report.digest_equal.map(|is_equal| match is_equal {
        true => "all that was moved is equal on both sides".to_owned(),
        false => "WHAT WAS MOVED DIFFERS between the two sides".to_owned(),
    });
    lines.extend(verified.map(|text| ("verified", text)));
    if info.stage == Stage::Finished {
        lines.push(("outcome", outcome_line(info)));
    }
    let mut text = String::new();
    for (key, value) in lines {
        // Writing to a string cannot fail.
        if writeln!(text, "{key:<10} {value}").is_err() {
            break;
        }
    }
    text.push_str(&rounds(info));
    text
}

/// How long the guest stood, and how long it was expected to.
fn downtimes(info: &MigrationInfo) -> Vec<(&'static str, String)> {
    let report = &info.report;
    let mut lines = Vec::new();
    if let Some(parts) = report.downtime_ms {
        lines.push(("downtime", format!(
            "{} = pause {} + harvest {} + save {} + transfer {} + load {} + commit {} + start {}",
            time(parts.total), time(parts.pause), time(parts.harvest), time(parts.save),
            time(parts.transfer), time(parts.load), time(parts.commit), time(parts.start),
        )));
    }
    if let Some(predicted) = report.predicted_downtime_ms.or(info.predicted_downtime_ms) {
        lines.push(("predicted", format!("a downtime of {}", time(predicted))));
    }
    lines
}

/// What the guest did not have when it ran at the target.
fn residue(report: &Report) -> Option<String> {
    (report.missing_at_switch > 0).then(|| {
        let recorded = match report.recorded_pages {
            0 => String::new(),
            pages => format!("; {} went first, as recorded", count(pages)),
        };
        format!(
            "{} pages when the guest ran at the target, which took {} to tell{recorded}",
            count(report.missing_at_switch),
            ByteCount::new(report.missing_set_bytes)
        )
    })
}

/// How it came by them.
fn faults(report: &Report) -> Option<String> {
    let (pulled, pushed) = (report.pulled_pages?, report.pushed_before_need?);
    let mut text = format!(
        "{} pages pulled, {} pushed before they were needed",
        count(pulled),
        count(pushed)
    );
    if let Some(latency) = &report.fault_latency_us {
        let micros = |value: f64| time(value / 1000.0);
        text.push_str(&format!(
            ", a wait took {} (99 of 100 below {}, the longest {})",
            micros(latency.p50),
            micros(latency.p99),
            micros(latency.max)
        ));
    }
    if let Some(first) = report.first_fault_stall_ms {
        text.push_str(&format!(", the first one {}", time(first)));
    }
    Some(text)
}

fn rounds(info: &MigrationInfo) -> String {
    if info.report.rounds.is_empty() {
        return String::new();
    }
    let head = [
        ("ROUND", Align::Right),
        ("PAGES", Align::Right),
        ("ZERO", Align::Right),
        ("AGAIN", Align::Right),
        ("BYTES", Align::Right),
        ("TIME", Align::Right),
        ("LEFT OUT", Align::Right),
        ("DIRTY AFTER", Align::Right),
        ("STREAMS", Align::Right),
    ];
    let rows: Vec<_> = info
        .report
        .rounds
        .iter()
        .enumerate()
        .map(|(index, round)| {
            [
                index.to_string(),
                count(round.pages),
                count(round.zero_pages),
                count(round.resent_pages),
                ByteCount::new(round.bytes).to_string(),
                time(round.time_ms),
                count(round.deferred_pages),
                count(round.dirty_after_pages),
                match round.streams {
                    0 => "-".to_owned(),
                    streams => streams.to_string(),
                },
            ]
        })
        .collect();
    table(head, &rows)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use limosa_host::api::{FaultLatency, ThrottleInfo, ThrottleKind};

    /// A migration as a daemon tells it, with most of it still unknown.
    pub(crate) fn info(id: &str, vm: &str) -> MigrationInfo {
        let limits = serde_json::json!({
            "downtime_max_ms": 5.0, "bandwidth_max": null, "deadline_ms": 30000.0, "rounds_max": 30,
            "throttle": "off", "defer": "auto", "streams": "auto"
        });
        let report = serde_json::json!({
            "outcome": null, "reason": null, "pause_reason": null, "preparation_ms": 12.5,
            "total_ms": 0.0, "eviction_ms": 0.0, "downtime_ms": null, "switch_ns": null,
            "predicted_downtime_ms": null, "fixed_cost_ms": 1.0, "rehearsal_stall_ms": 0.9,
            "clock_offset_ns": 0, "clock_error_ms": 0.0, "rounds": [], "mode_changes": [], "throttle": null,
            "missing_at_switch": 0, "missing_set_bytes": 0, "pulled_pages": null,
            "pushed_before_need": null, "network_fault_share": null, "fault_latency_us": null,
            "first_fault_stall_ms": null, "pages_sent": 65536, "pages_resent": 0,
            "wire_bytes": 268_435_456, "state_bytes": 10240, "digest_equal": null
        });
        serde_json::from_value(serde_json::json!({
            "id": id, "vm": vm, "to": "127.0.0.1:7071", "encrypted": false, "mode": "pre-copy",
            "stage": "copying",
            "round": 1, "round_pages": 1000, "round_sent_pages": 250, "remaining_pages": 750,
            "unsent_pages": 0, "dirty_pages_per_s": 50000, "throttle": null,
            "streams_in_use": 3, "streams_open": 8, "bandwidth": 1_288_490_188,
            "predicted_downtime_ms": 3.1, "elapsed_ms": 1234.0, "time_left_ms": 400.0,
            "unresolved": null, "dirty_tracker": "bitmap", "limits": limits, "report": report
        }))
        .unwrap()
    }

    fn check(which: &str, expect: Result<&str, &str>) {
        let known = vec![
            info("3f2a00000000000000000000000000aa", "web"),
            info("3f2b00000000000000000000000000bb", "db"),
            info("77770000000000000000000000000000", "web"),
        ];
        let picked = pick(known, which)
            .map(|info| info.id)
            .map_err(|error| error.to_string());
        match (picked, expect) {
            (Ok(id), Ok(expect)) => assert!(id.starts_with(expect), "{which}: {id}"),
            (Err(error), Err(expect)) => assert!(error.contains(expect), "{which}: {error}"),
            (picked, _) => panic!("{which}: {picked:?}"),
        }
    }

    #[test]
    fn migrations_are_found_by_name_or_id() {
        check("web", Ok("7777"));
        check("db", Ok("3f2b"));
        check("3F2A", Ok("3f2a"));
        check("3f2", Err("no migration of a VM '3f2'"));
        check("mail", Err("'limosa status' lists them"));
    }

    #[test]
    fn details_read_well() {
        let text = details(&info("3f2a00000000000000000000000000aa", "web"));
        assert_eq!(
            text,
            "migration  3f2a00000000000000000000000000aa of web to 127.0.0.1:7071, pre-copy\n\
             stage      copying\n\
             tracker    bitmap: a harvest reads a bit for each page; which vCPU writes how much is not known\n\
             limits     downtime at most 5.00 ms, no bandwidth limit, deadline 30.0 s, at most 30 rounds, throttle off, defer auto, streams auto\n\
             time       1.23 s since the request, 12.5 ms of it before the first page\n\
             now        round 1: 750 pages left, guest writes 50,000 pages/s, 1.20 GiB/s, \
             downtime 3.10 ms expected, 400 ms left\n\
             streams    3 in use, 8 open\n\
             predicted  a downtime of 3.10 ms\n\
             sent       65,536 pages, 0 of them again, 256 MiB with the state of 10.0 KiB\n"
        );
        assert_eq!(info("", "").mode, Mode::PreCopy);
    }

    #[test]
    fn details_tell_how_the_writers_were_slowed_down() {
        let mut info = info("3f2a00000000000000000000000000aa", "web");
        let quota = |quota| ThrottleInfo {
            kind: ThrottleKind::PerVcpu,
            quota_pages_per_s: Some(quota),
            share: None,
        };
        let equal = ThrottleInfo {
            kind: ThrottleKind::Equal,
            quota_pages_per_s: None,
            share: Some(0.25),
        };
        info.throttle = Some(equal);
        info.report.throttle = Some(ThrottleReport {
            first_at_ms: 800.0,
            time_ms: 1500.0,
            held_ms: 1200.0,
            changes: 2,
            last: quota(15_000),
            tightest: quota(12_500),
        });
        let text = details(&info);
        for part in [
            "throttled  after 800 ms for 1.50 s, each vCPU at most 15,000 pages/s (at the tightest \
             each vCPU at most 12,500 pages/s); vCPUs were held back for 1.20 s",
            "guest writes 50,000 pages/s, all vCPUs equally at 25 % of the time, 1.20 GiB/s",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn details_tell_of_mode_changes_and_missing_pages() {
        let mut info = info("3f2a00000000000000000000000000aa", "web");
        info.report.mode_changes.push(ModeChange {
            at_ms: 800.0,
            from: Mode::PreCopy,
            to: Mode::Hybrid,
            reason: "the next round would have been as large as the last one".to_owned(),
        });
        info.report.missing_at_switch = 4000;
        info.report.missing_set_bytes = 2048;
        info.report.recorded_pages = 1500;
        info.report.pulled_pages = Some(1000);
        info.report.pushed_before_need = Some(3000);
        info.report.first_fault_stall_ms = Some(0.2);
        info.report.fault_latency_us = Some(FaultLatency {
            p50: 120.0,
            p99: 900.0,
            max: 2100.0,
            log2_histogram: Vec::new(),
        });
        let text = details(&info);
        for line in [
            "mode       pre-copy became hybrid after 800 ms: the next round would have been as large \
             as the last one",
            "missing    4,000 pages when the guest ran at the target, which took 2.00 KiB to tell; \
             1,500 went first, as recorded",
            "faults     1,000 pages pulled, 3,000 pushed before they were needed, a wait took 120 µs \
             (99 of 100 below 900 µs, the longest 2.10 ms), the first one 200 µs",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
