//! What is written to files about each move.
//!
//! One object a move, with the engine's report (or what QEMU says) and what the guest and an observer
//! saw side by side. A value that could not be measured is `null`, never a made-up zero. The names are part of
//! the program's interface: `docs/demo.md` explains each of them.

use crate::backing::Backing;
use crate::clients::{ClientFigures, Clients};
use crate::qemu::QemuFigures;
use limosa_engine::policy::{Mode, PauseReason};
use limosa_engine::streams::Streams;
use limosa_host::api::{
    Compression, Deferral, Downtime, FaultLatency, ModeChange, PushOrder, Report, Round,
    ThrottleReport, Throttling, TrackerKind,
};
use serde::{Deserialize, Serialize};

/// The guest and how it was moved, as asked for.
#[derive(Clone, Debug, Serialize)]
pub struct Setup {
    /// The guest program.
    pub guest: String,
    /// Its arguments.
    pub arguments: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its vCPUs.
    pub vcpus: u8,
    /// What backed its memory.
    pub pages: Backing,
    /// Who noticed which pages it wrote.
    pub dirty_tracker: TrackerKind,
    /// The emulated link, in bytes a second.
    pub link: Option<u64>,
    /// Push streams, if not the default.
    pub streams: Option<Streams>,
    /// Whether pages were coded.
    pub compress: Compression,
    /// Whether the guest's writers were slowed down where rounds did not shrink.
    pub throttle: Throttling,
    /// Whether hot pages might be left out of live rounds.
    pub defer: Deferral,
    /// In which order missing pages were pushed.
    pub push_order: PushOrder,
    /// Whether connections were encrypted.
    pub tls: bool,
    /// After which the move should have been over, in milliseconds.
    pub deadline_ms: Option<u64>,
    /// Rounds while the guest ran, at most, if not the default.
    pub rounds_max: Option<u32>,
    /// The downtime that pre-copy aimed at.
    pub downtime_max_ms: f64,
    /// Whether digests were compared.
    pub verify: bool,
    /// The seed of the guest's choices, and of the order of the modes if that was mixed.
    pub seed: u64,
    /// Who asks the guest, if it serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clients: Option<Clients>,
}

/// What the guest and the observer saw of a move.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Longest stall that the guest recorded around the switch.
    pub guest_gap_ms: Option<f64>,
    /// Longest silence of its heartbeats around the switch.
    pub heartbeat_gap_ms: Option<f64>,
    /// Longest stall that the guest recorded from the start to a second after the end.
    pub worst_stall_ms: Option<f64>,
    /// The wait that one request in a thousand to the guest would have exceeded in that time.
    pub stall_p999_ms: Option<f64>,
    /// Until the guest was back at nine tenths of its speed.
    pub resume_ms: Option<f64>,
    /// Its speed.
    pub writes: WriteRates,
    /// The same over time.
    pub speed: Option<SpeedSeries>,
    /// The same around the switch, in shorter slots.
    pub speed_at_switch: Option<SpeedSeries>,
    /// The share of the machine's processors that others used in that time, 0 to 1.
    pub others_cpu_share: Option<f64>,
}

/// Pages that the guest wrote a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WriteRates {
    /// In the second before the move.
    pub before: Option<f64>,
    /// From the start of the move until the guest stopped for the switch.
    pub during: Option<f64>,
    /// In the second after it ran again.
    pub after: Option<f64>,
}

/// The guest's speed in equal slots of time, one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeedSeries {
    /// When the first slot begins, in milliseconds since the request for the move.
    pub begin_ms: f64,
    /// How long a slot is.
    pub slot_ms: f64,
    /// When the guest's last instruction at the source was, in milliseconds since the request; `null` if it stayed.
    pub stopped_ms: Option<f64>,
    /// When its first one at the target was.
    pub running_ms: Option<f64>,
    /// Units of work a second; `null` where it was not heard of before and after.
    pub work_per_s: Vec<Option<f64>>,
}

/// What the check of all memory found after a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Failed checks since before the move, the sweep's included.
    pub errors: u64,
    /// Pages that the sweep looked at.
    pub swept_pages: Option<u64>,
}

/// One move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveRecord {
    /// Counted from 1.
    pub number: u32,
    /// The host that it left.
    pub from: String,
    /// The host that it went to.
    pub to: String,
    /// The technique.
    pub mode: Mode,
    /// How it ended.
    pub outcome: String,
    /// Why, if it failed.
    pub reason: Option<String>,
    /// Why the guest was paused when it was.
    pub pause_reason: Option<PauseReason>,
    /// From the request to the first page.
    pub preparation_ms: Option<f64>,
    /// The downtime as the hosts measured it, by parts.
    pub downtime_ms: Option<Downtime>,
    /// The switch as the guest saw it.
    pub guest_gap_ms: Option<f64>,
    /// The switch as an observer saw it.
    pub heartbeat_gap_ms: Option<f64>,
    /// The guest's longest stall from the start of the move to one second after its end.
    pub worst_stall_ms: Option<f64>,
    /// In that time the wait that one in a thousand requests to the guest, at any moment, exceeds.
    #[serde(default)]
    pub stall_p999_ms: Option<f64>,
    /// From the guest's first instruction at the target until it was back at speed.
    pub resume_ms: Option<f64>,
    /// From the request until the guest ran at the target with all its pages.
    pub total_ms: f64,
    /// From the request until the source held nothing.
    pub eviction_ms: Option<f64>,
    /// The rounds in order.
    pub rounds: Option<Vec<Round>>,
    /// How the technique changed on the way, in order.
    pub mode_changes: Option<Vec<ModeChange>>,
    /// How the guest's writers were slowed down, if they were.
    #[serde(default)]
    pub throttle: Option<ThrottleReport>,
    /// Pages that the target did not have when the guest ran there.
    pub missing_at_switch: Option<u64>,
    /// Of these, pages that were pushed in the order in which earlier moves had seen them asked for.
    #[serde(default)]
    pub recorded_pages: Option<u64>,
    /// Bytes that told the target which pages those are.
    pub missing_set_bytes: Option<u64>,
    /// Missing pages that came because the guest waited for them; `null` if none were missing.
    pub pulled_pages: Option<u64>,
    /// Missing pages that were there before the guest needed them.
    pub pushed_before_need: Option<u64>,
    /// Pages pulled over all missing pages.
    pub network_fault_share: Option<f64>,
    /// How long the guest's vCPUs waited for pages.
    pub fault_latency_us: Option<FaultLatency>,
    /// How long the first of these waits took.
    pub first_fault_stall_ms: Option<f64>,
    /// Pages sent over all rounds and for faults, repetitions included.
    pub pages_sent: Option<u64>,
    /// Pages sent again.
    pub pages_resent: Option<u64>,
    /// Bytes on the wire.
    pub wire_bytes: Option<u64>,
    /// Bytes of the state sections.
    pub state_bytes: Option<u64>,
    /// The guest's speed.
    pub guest_writes_per_s: WriteRates,
    /// The same over time, from a second before the move to a second after its end.
    #[serde(default)]
    pub guest_speed: Option<SpeedSeries>,
    /// The same around the switch, in shorter slots, one of which begins when the guest stopped.
    #[serde(default)]
    pub guest_speed_at_switch: Option<SpeedSeries>,
    /// The share of the machine's processors that others used from the start of the move to one second
    /// after its end, 0 to 1.
    #[serde(default)]
    pub others_cpu_share: Option<f64>,
    /// Failed checks of the guest, a full sweep included.
    pub integrity_errors: u64,
    /// Pages that the sweep looked at.
    pub swept_pages: Option<u64>,
    /// Whether both sides hashed the same memory and state; `null` if they were not asked to.
    pub memory_digest_equal: Option<bool>,
    /// The downtime that was expected when the guest was paused.
    pub predicted_downtime_ms: Option<f64>,
    /// The part of it that does not depend on pages.
    pub fixed_cost_ms: Option<f64>,
    /// How long the guest stood for the rehearsal.
    pub rehearsal_stall_ms: Option<f64>,
    /// What QEMU says, if it made the move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<QemuFigures>,
    /// What clients saw, if the guest had some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<ClientFigures>,
}

/// How a move of QEMU ended.
#[derive(Clone, Debug, PartialEq)]
pub struct QemuEnd {
    /// Completed, cancelled or failed.
    pub outcome: String,
    /// Why, if it was not completed.
    pub reason: Option<String>,
    /// From the request until the guest ran at the target with all its pages, or the end.
    pub total_ms: f64,
    /// Until it sent the first page, as it says.
    pub setup_ms: Option<f64>,
    /// Bytes that it sent, as it says.
    pub wire_bytes: Option<u64>,
    /// All else that it says.
    pub figures: QemuFigures,
}

impl MoveRecord {
    /// Lays what was seen beside what was reported.
    pub fn new(
        number: u32,
        (from, to): (&str, &str),
        mode: Mode,
        report: Report,
        observed: Observed,
        checked: Checked,
    ) -> Self {
        Self {
            number,
            from: from.to_owned(),
            to: to.to_owned(),
            mode,
            outcome: report.outcome.unwrap_or_else(|| "unfinished".to_owned()),
            reason: report.reason,
            pause_reason: report.pause_reason,
            preparation_ms: Some(report.preparation_ms),
            downtime_ms: report.downtime_ms,
            guest_gap_ms: observed.guest_gap_ms,
            heartbeat_gap_ms: observed.heartbeat_gap_ms,
            worst_stall_ms: observed.worst_stall_ms,
            stall_p999_ms: observed.stall_p999_ms,
            resume_ms: observed.resume_ms,
            total_ms: report.total_ms,
            eviction_ms: Some(report.eviction_ms),
            rounds: Some(report.rounds),
            mode_changes: Some(report.mode_changes),
            throttle: report.throttle,
            missing_at_switch: Some(report.missing_at_switch),
            recorded_pages: Some(report.recorded_pages),
            missing_set_bytes: Some(report.missing_set_bytes),
            pulled_pages: report.pulled_pages,
            pushed_before_need: report.pushed_before_need,
            network_fault_share: report.network_fault_share,
            fault_latency_us: report.fault_latency_us,
            first_fault_stall_ms: report.first_fault_stall_ms,
            pages_sent: Some(report.pages_sent),
            pages_resent: Some(report.pages_resent),
            wire_bytes: Some(report.wire_bytes),
            state_bytes: Some(report.state_bytes),
            guest_writes_per_s: observed.writes,
            guest_speed: observed.speed,
            guest_speed_at_switch: observed.speed_at_switch,
            others_cpu_share: observed.others_cpu_share,
            integrity_errors: checked.errors,
            swept_pages: checked.swept_pages,
            memory_digest_equal: report.digest_equal,
            predicted_downtime_ms: report.predicted_downtime_ms,
            fixed_cost_ms: Some(report.fixed_cost_ms),
            rehearsal_stall_ms: Some(report.rehearsal_stall_ms),
            qemu: None,
            clients: None,
        }
    }

    /// A move that QEMU made; what it cannot tell stays absent. `total_ms` is measured by us.
    pub fn of_qemu(
        number: u32,
        way: (&str, &str),
        mode: Mode,
        ended: QemuEnd,
        observed: Observed,
        checked: Checked,
    ) -> Self {
        let report = Report {
            outcome: Some(ended.outcome),
            reason: ended.reason,
            total_ms: ended.total_ms,
            ..Report::default()
        };
        Self {
            preparation_ms: ended.setup_ms,
            eviction_ms: None,
            rounds: None,
            mode_changes: None,
            throttle: None,
            missing_at_switch: None,
            recorded_pages: None,
            missing_set_bytes: None,
            pages_sent: None,
            pages_resent: None,
            wire_bytes: ended.wire_bytes,
            state_bytes: None,
            fixed_cost_ms: None,
            rehearsal_stall_ms: None,
            qemu: Some(ended.figures),
            ..Self::new(number, way, mode, report, observed, checked)
        }
    }

    /// Hot pages that rounds left out, over all rounds; `None` if there are no rounds to tell.
    pub fn deferred_pages(&self) -> Option<u64> {
        let rounds = self.rounds.as_ref()?;
        Some(rounds.iter().map(|round| round.deferred_pages).sum())
    }

    /// Whether the guest is at the target now.
    pub fn is_completed(&self) -> bool {
        self.outcome == "completed"
    }

    /// What the guest saw beyond what the hosts measured.
    pub fn gap_minus_downtime_ms(&self) -> Option<f64> {
        Some(self.guest_gap_ms? - self.downtime_ms?.total)
    }

    /// What no client of the guest may see: a lost connection, or a wrong answer.
    pub fn clients_problem(&self) -> Option<String> {
        let seen = self.clients.as_ref()?;
        let problem = seen.problem.as_ref()?;
        let (lost, wrong, all) = (seen.lost_connections, seen.wrong_answers, seen.connections);
        Some(format!(
            "of {all} clients {lost} lost their connections and {wrong} got wrong answers: {problem}"
        ))
    }

    /// What is wrong with this move, in one line; `None` if it went as it should.
    pub fn problem(&self, verify: bool) -> Option<String> {
        let number = self.number;
        if !self.is_completed() {
            let reason = self.reason.as_deref().unwrap_or("no reason was given");
            return Some(format!("move {number} {}: {reason}", self.outcome));
        }
        if self.integrity_errors > 0 {
            let errors = self.integrity_errors;
            return Some(format!(
                "move {number}: the guest found {errors} errors in its memory"
            ));
        }
        if let Some(problem) = self.clients_problem() {
            return Some(format!("move {number}: {problem}"));
        }
        match self.memory_digest_equal {
            Some(true) => None,
            None if !verify => None,
            None => Some(format!("move {number}: the digests were not compared")),
            Some(false) => Some(format!(
                "move {number}: source and target hashed different memory or state"
            )),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sample;
    use serde_json::Value;

    /// A move that went well, with these gaps.
    pub fn record(mode: Mode, guest_gap_ms: f64, downtime_ms: f64) -> MoveRecord {
        let report = Report {
            outcome: Some("completed".to_owned()),
            preparation_ms: 1.0,
            total_ms: 100.0,
            eviction_ms: 120.0,
            downtime_ms: Some(Downtime {
                total: downtime_ms,
                transfer: downtime_ms,
                ..Downtime::default()
            }),
            fixed_cost_ms: 0.5,
            rehearsal_stall_ms: 0.25,
            digest_equal: Some(true),
            ..Report::default()
        };
        let observed = Observed {
            guest_gap_ms: Some(guest_gap_ms),
            ..Observed::default()
        };
        let checked = Checked::default();
        MoveRecord::new(1, ("a", "b"), mode, report, observed, checked)
    }

    fn check(change: impl Fn(&mut MoveRecord), expect: &str) {
        let mut record = record(Mode::PreCopy, 3.5, 3.0);
        change(&mut record);
        assert_eq!(record.problem(true).unwrap_or_default(), expect);
    }

    #[test]
    fn a_move_that_did_not_do_what_was_asked_is_named() {
        check(|_| (), "");
        check(
            |record| {
                record.outcome = "failed".to_owned();
                record.reason = Some("the target refused: no memory".to_owned());
            },
            "move 1 failed: the target refused: no memory",
        );
        check(
            |record| record.integrity_errors = 3,
            "move 1: the guest found 3 errors in its memory",
        );
        check(
            |record| record.memory_digest_equal = None,
            "move 1: the digests were not compared",
        );
        check(
            |record| record.memory_digest_equal = Some(false),
            "move 1: source and target hashed different memory or state",
        );
        check(
            |record| {
                record.clients = Some(ClientFigures {
                    connections: 5,
                    wrong_answers: 1,
                    problem: Some("a wrong answer: no value, not the number 3".to_owned()),
                    ..ClientFigures::default()
                });
            },
            "move 1: of 5 clients 0 lost their connections and 1 got wrong answers: a wrong answer: no value, not \
             the number 3",
        );
        let mut unverified = record(Mode::PreCopy, 3.5, 3.0);
        unverified.memory_digest_equal = None;
        assert_eq!(unverified.problem(false), None);
        assert_eq!(unverified.gap_minus_downtime_ms(), Some(0.5));
    }

    #[test]
    fn a_line_from_before_there_were_series_is_read() {
        let whole = sample::record(3.0);
        assert!(whole.guest_speed.is_some() && whole.guest_speed_at_switch.is_some());
        let mut json = serde_json::to_value(&whole).unwrap();
        let read = |json: &Value| serde_json::from_value::<MoveRecord>(json.clone()).unwrap();
        assert_eq!(read(&json), whole);
        let fields = json.as_object_mut().unwrap();
        fields.retain(|name, _| !name.starts_with("guest_speed"));
        let without = MoveRecord {
            guest_speed: None,
            guest_speed_at_switch: None,
            ..whole
        };
        assert_eq!(read(&json), without);
    }

    #[test]
    fn the_names_are_the_documented_ones() {
        let json = serde_json::to_value(record(Mode::StopAndCopy, 1.0, 1.0)).unwrap();
        for name in [
            "mode",
            "outcome",
            "preparation_ms",
            "downtime_ms",
            "guest_gap_ms",
            "heartbeat_gap_ms",
            "worst_stall_ms",
            "stall_p999_ms",
            "others_cpu_share",
            "resume_ms",
            "total_ms",
            "eviction_ms",
            "rounds",
            "pages_sent",
            "pages_resent",
            "mode_changes",
            "throttle",
            "missing_at_switch",
            "recorded_pages",
            "missing_set_bytes",
            "pulled_pages",
            "pushed_before_need",
            "network_fault_share",
            "fault_latency_us",
            "first_fault_stall_ms",
            "wire_bytes",
            "guest_writes_per_s",
            "guest_speed",
            "guest_speed_at_switch",
            "integrity_errors",
            "memory_digest_equal",
            "predicted_downtime_ms",
        ] {
            assert!(json.get(name).is_some(), "{name}");
        }
        assert_eq!(json["mode"], "stop-and-copy");
        assert_eq!(json["downtime_ms"]["total"], 1.0);
    }
}
