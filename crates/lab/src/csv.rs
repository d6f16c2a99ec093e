//! Results as a table for other programs: a row a run, columns as `docs/lab.md` explains them.
//!
//! Comma-separated as in RFC 4180, with lines that end in a line feed. A field is empty where
//! nothing was measured.

use crate::clients::ClientFigures;
use crate::machine::or_unknown;
use crate::record::MoveRecord;
use crate::store::{Results, RunResult, Start};
use serde::Serialize;

/// The whole table.
pub fn csv(results: &Results) -> String {
    let names = COLUMNS.iter().map(|(name, _)| *name);
    let names = names.chain(START_COLUMNS.iter().map(|(name, _)| *name));
    let mut text = line(names.chain(["simulated"]).map(str::to_owned));
    let simulated = results.are_simulated().to_string();
    for run in &results.runs {
        let start = results.start_of(run);
        let fields = COLUMNS.iter().map(|(_, field)| field(run));
        let fields = fields.chain(
            START_COLUMNS
                .iter()
                .map(|(_, field)| shown(start.map(field))),
        );
        text.push_str(&line(fields.chain([simulated.clone()])));
    }
    text
}

type Column = (&'static str, fn(&RunResult) -> String);
type StartColumn = (&'static str, fn(&Start) -> String);

/// What made a run, and on what.
const START_COLUMNS: [StartColumn; 3] = [
    ("command", |start| start.command.clone()),
    ("commit", |start| start.commit.clone()),
    ("machine", |start| {
        let machine = &start.machine;
        let kernel = or_unknown(&machine.kernel);
        format!("{}, kernel {kernel}", machine.hardware())
    }),
];

/// In the order in which they stand in the file.
const COLUMNS: &[Column] = &[
    ("number", |run| run.number.to_string()),
    ("finished", |run| run.finished.clone()),
    ("start", |run| run.start.to_string()),
    ("vmm", |run| {
        let is_qemu = run.cell.qemu.is_some();
        (if is_qemu { "qemu" } else { "limosa" }).to_owned()
    }),
    ("row", |run| shown(run.cell.row.as_ref())),
    ("technique", |run| run.cell.technique.name().to_owned()),
    ("variant", |run| {
        shown(run.cell.qemu.map(|qemu| qemu.variant.name()))
    }),
    ("downtime_limit_ms", |run| {
        shown(run.cell.qemu.map(|qemu| qemu.downtime_limit_ms))
    }),
    ("workload", |run| run.cell.workload.clone()),
    ("memory_bytes", |run| run.cell.memory_bytes.to_string()),
    ("vcpus", |run| run.cell.vcpus.to_string()),
    ("link_bytes_per_s", |run| shown(run.cell.link)),
    ("streams", |run| run.cell.streams.to_string()),
    ("compress", |run| run.cell.compress.name().to_owned()),
    ("pages", |run| run.cell.pages.name().to_owned()),
    ("dirty_tracker", |run| {
        run.cell.dirty_tracker.name().to_owned()
    }),
    ("push_order", |run| run.cell.push_order.name().to_owned()),
    ("throttle", |run| run.cell.throttle.name().to_owned()),
    ("defer", |run| run.cell.defer.name().to_owned()),
    ("tls", |run| run.cell.tls.to_string()),
    ("deadline_ms", |run| shown(run.cell.deadline_ms)),
    ("rounds_max", |run| run.cell.rounds_max.to_string()),
    ("repeat", |run| run.repeat.to_string()),
    ("failure", |run| shown(run.failure.as_ref())),
    ("outcome", |run| of(run, |one| Some(one.outcome.clone()))),
    ("reason", |run| of(run, |one| one.reason.clone())),
    ("pause_reason", |run| {
        of(run, |one| Some(word(&one.pause_reason?)))
    }),
    ("preparation_ms", |run| of(run, |one| one.preparation_ms)),
    ("downtime_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.total))
    }),
    ("downtime_pause_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.pause))
    }),
    ("downtime_harvest_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.harvest))
    }),
    ("downtime_save_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.save))
    }),
    ("downtime_transfer_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.transfer))
    }),
    ("downtime_load_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.load))
    }),
    ("downtime_commit_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.commit))
    }),
    ("downtime_start_ms", |run| {
        of(run, |one| Some(one.downtime_ms?.start))
    }),
    ("predicted_downtime_ms", |run| {
        of(run, |one| one.predicted_downtime_ms)
    }),
    ("fixed_cost_ms", |run| of(run, |one| one.fixed_cost_ms)),
    ("rehearsal_stall_ms", |run| {
        of(run, |one| one.rehearsal_stall_ms)
    }),
    ("guest_gap_ms", |run| of(run, |one| one.guest_gap_ms)),
    ("heartbeat_gap_ms", |run| {
        of(run, |one| one.heartbeat_gap_ms)
    }),
    ("worst_stall_ms", |run| of(run, |one| one.worst_stall_ms)),
    ("stall_p999_ms", |run| of(run, |one| one.stall_p999_ms)),
    ("resume_ms", |run| of(run, |one| one.resume_ms)),
    ("total_ms", |run| of(run, |one| Some(one.total_ms))),
    ("eviction_ms", |run| of(run, |one| one.eviction_ms)),
    ("rounds", |run| {
        of(run, |one| Some(one.rounds.as_ref()?.len()))
    }),
    ("deferred_pages", |run| of(run, MoveRecord::deferred_pages)),
    ("throttled_ms", |run| {
        of(run, |one| Some(one.throttle.as_ref()?.time_ms))
    }),
    ("mode_changes", |run| {
        of(run, |one| Some(one.mode_changes.as_ref()?.len()))
    }),
    ("missing_at_switch", |run| {
        of(run, |one| one.missing_at_switch)
    }),
    ("recorded_pages", |run| of(run, |one| one.recorded_pages)),
    ("missing_set_bytes", |run| {
        of(run, |one| one.missing_set_bytes)
    }),
    ("pulled_pages", |run| of(run, |one| one.pulled_pages)),
    ("pushed_before_need", |run| {
        of(run, |one| one.pushed_before_need)
    }),
    ("network_fault_share", |run| {
        of(run, |one| one.network_fault_share)
    }),
    ("fault_latency_p50_us", |run| {
        of(run, |one| Some(one.fault_latency_us.as_ref()?.p50))
    }),
    ("fault_latency_p99_us", |run| {
        of(run, |one| Some(one.fault_latency_us.as_ref()?.p99))
    }),
    ("fault_latency_max_us", |run| {
        of(run, |one| Some(one.fault_latency_us.as_ref()?.max))
    }),
    ("first_fault_stall_ms", |run| {
        of(run, |one| one.first_fault_stall_ms)
    }),
    ("pages_sent", |run| of(run, |one| one.pages_sent)),
    ("pages_resent", |run| of(run, |one| one.pages_resent)),
    ("wire_bytes", |run| of(run, |one| one.wire_bytes)),
    ("state_bytes", |run| of(run, |one| one.state_bytes)),
    ("work_per_s_before", |run| {
        of(run, |one| one.guest_writes_per_s.before)
    }),
    ("work_per_s_during", |run| {
        of(run, |one| one.guest_writes_per_s.during)
    }),
    ("work_per_s_after", |run| {
        of(run, |one| one.guest_writes_per_s.after)
    }),
    ("others_cpu_share", |run| {
        of(run, |one| one.others_cpu_share)
    }),
    ("integrity_errors", |run| {
        of(run, |one| Some(one.integrity_errors))
    }),
    ("swept_pages", |run| of(run, |one| one.swept_pages)),
    ("memory_digest_equal", |run| {
        of(run, |one| one.memory_digest_equal)
    }),
    ("client_gap_ms", |run| of_clients(run, |one| one.gap_ms)),
    ("client_worst_wait_ms", |run| {
        of_clients(run, |one| one.worst_wait_ms)
    }),
    ("client_silence_ms", |run| {
        of_clients(run, |one| one.silence_ms)
    }),
    ("client_p50_before_ms", |run| {
        of_clients(run, |one| Some(one.waits_before_ms?.p50))
    }),
    ("client_p99_before_ms", |run| {
        of_clients(run, |one| Some(one.waits_before_ms?.p99))
    }),
    ("client_p999_before_ms", |run| {
        of_clients(run, |one| Some(one.waits_before_ms?.p999))
    }),
    ("client_p50_during_ms", |run| {
        of_clients(run, |one| Some(one.waits_during_ms?.p50))
    }),
    ("client_p99_during_ms", |run| {
        of_clients(run, |one| Some(one.waits_during_ms?.p99))
    }),
    ("client_p999_during_ms", |run| {
        of_clients(run, |one| Some(one.waits_during_ms?.p999))
    }),
    ("client_requests_per_s_before", |run| {
        of_clients(run, |one| one.requests_per_s.before)
    }),
    ("client_requests_per_s_during", |run| {
        of_clients(run, |one| one.requests_per_s.during)
    }),
    ("client_requests_per_s_after", |run| {
        of_clients(run, |one| one.requests_per_s.after)
    }),
    ("client_requests_share_during", |run| {
        of_clients(run, |one| one.requests_per_s.share_during())
    }),
    ("client_connections", |run| {
        of_clients(run, |one| Some(one.connections))
    }),
    ("client_lost_connections", |run| {
        of_clients(run, |one| Some(one.lost_connections))
    }),
    ("client_wrong_answers", |run| {
        of_clients(run, |one| Some(one.wrong_answers))
    }),
    ("qemu_downtime_ms", |run| {
        of(run, |one| one.qemu.as_ref()?.downtime_ms)
    }),
    ("qemu_passes", |run| {
        of(run, |one| one.qemu.as_ref()?.passes)
    }),
    ("qemu_version", |run| {
        of(run, |one| Some(one.qemu.as_ref()?.version.clone()))
    }),
];

/// A value of the measurement, if there is one.
fn of<T: ToString>(run: &RunResult, value: impl FnOnce(&MoveRecord) -> Option<T>) -> String {
    shown(run.record.as_ref().and_then(value))
}

/// A value that clients measured, if there were some.
fn of_clients<T: ToString>(
    run: &RunResult,
    value: impl FnOnce(&ClientFigures) -> Option<T>,
) -> String {
    of(run, |one| value(one.clients.as_ref()?))
}

fn shown<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

/// The word by which a value is known in the other files.
fn word<T: Serialize>(value: &T) -> String {
    let json = serde_json::to_value(value).unwrap_or_default();
    json.as_str().unwrap_or_default().to_owned()
}

pub(crate) fn line(fields: impl Iterator<Item = String>) -> String {
    let fields: Vec<String> = fields.map(|field| quoted(&field)).collect();
    fields.join(",") + "\n"
}

fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn the_table_is_as_documented() {
        let text = csv(&sample::results());
        assert_eq!(text, include_str!("csv/golden.csv"));
        let documented = include_str!("../../../docs/lab.md");
        let names = text.lines().next().unwrap().split(',');
        for name in names {
            assert!(documented.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn each_run_names_the_start_that_made_it() {
        let mut results = sample::results();
        let mut second = sample::start(false);
        second.commit = "0123456789ab".to_owned();
        results.starts.push(second);
        results.runs[2].start = 2;
        // A file that lost a line of its starts.
        results.runs[3].start = 3;
        let text = csv(&results);
        let ends: Vec<&str> = text
            .lines()
            .skip(1)
            .map(|line| line.rsplit_once(",,,,").unwrap().1)
            .collect();
        let end = |commit: &str| {
            format!(
                "limosa lab run <plan.toml> --out results,{commit},\"Some <CPU> @ 2.60GHz, 2 processors, 24.0 GiB of \
                 memory, kvm_intel, kernel 6.1.0\",false"
            )
        };
        let (first, second) = (end("unknown"), end("0123456789ab"));
        assert_eq!(ends, [&first, &first, &second, "false"]);
    }

    #[test]
    fn what_clients_saw_has_columns() {
        let text = csv(&sample::served());
        let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let (names, first) = (lines.next().unwrap(), lines.next().unwrap());
        let seen: Vec<String> = names
            .iter()
            .zip(first)
            .filter_map(|(name, value)| Some(format!("{} {value}", name.strip_prefix("client_")?)))
            .collect();
        assert_eq!(
            seen.join(", "),
            "gap_ms 7.25, worst_wait_ms 9.5, silence_ms 7, p50_before_ms 0.125, p99_before_ms 0.5, p999_before_ms 1.5, \
             p50_during_ms 0.25, p99_during_ms 6.5, p999_during_ms 7.25, requests_per_s_before 20000, \
             requests_per_s_during 15000, requests_per_s_after 19000, requests_share_during 0.75, connections 5, \
             lost_connections 0, wrong_answers 0"
        );
    }

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        let check = |field: &str, expect: &str| assert_eq!(quoted(field), expect);
        check("plain text", "plain text");
        check("a, b", "\"a, b\"");
        check("a \"b\"", "\"a \"\"b\"\"\"");
        check("a\nb", "\"a\nb\"");
    }
}
