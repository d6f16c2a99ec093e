//! Migrations as the control interface tells them, and how they follow from the engine's report.

use super::throttle::{ThrottleInfo, ThrottleReport};
use super::{duration, milliseconds};
use limosa_carrier::{Compression, PushOrder, RATE_MIN};
use limosa_engine::deferral::Deferral;
use limosa_engine::handover::MigrationId;
use limosa_engine::policy::{Limits, Mode, PauseReason};
use limosa_engine::report::{self, FaultReport, MigrationReport, Outcome};
use limosa_engine::source::Stage;
use limosa_engine::streams::Streams;
use limosa_engine::throttle::Throttling;
use limosa_engine::wire::STREAMS_MAX;
use limosa_os::dirty::TrackerKind;
use limosa_pages::BytesPerSecond;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use utoipa::ToSchema;

/// A migration to start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateBody {
    /// The target daemon, `HOST:PORT`.
    #[schema(example = "127.0.0.1:7071")]
    pub to: String,
    /// The technique; `auto` if it is left out.
    #[serde(default)]
    #[schema(schema_with = mode_schema)]
    pub mode: Mode,
    /// Downtime to aim at; `null` for 5 ms.
    #[serde(default)]
    pub downtime_max_ms: Option<f64>,
    /// Bytes a second on the wire; `null` for as fast as it goes.
    #[serde(default)]
    pub bandwidth_max: Option<u64>,
    /// The migration should be over after this time; `null` for no deadline.
    #[serde(default)]
    pub deadline_ms: Option<f64>,
    /// Rounds while the guest runs; `null` for 30.
    #[serde(default)]
    pub rounds_max: Option<u32>,
    /// Push streams: a number from 1 to 16, or `auto` for as many as pay; `null` for `auto`.
    #[serde(default)]
    #[schema(schema_with = streams_schema)]
    pub streams: Option<Streams>,
    /// Hash memory and state on both sides at the switch and compare, and disks that are copied.
    #[serde(default)]
    pub verify: bool,
    /// Copy the guest's disks along, which the target does not have: it makes them anew at the same paths. What is
    /// here stays, and is not used any more.
    #[serde(default)]
    pub copy_disks: bool,
    /// Whether pages are coded to take fewer bytes: `auto` where that is quicker, `on` whatever
    /// shrinks, `off` nothing.
    #[serde(default)]
    #[schema(value_type = String, example = "auto")]
    pub compress: Compression,
    /// Whether the guest's writers are slowed down if rounds do not shrink: `auto` or `off`.
    #[serde(default)]
    #[schema(value_type = String, example = "off")]
    pub throttle: Throttling,
    /// Whether hot pages may be left out of rounds that go out while the guest runs: `auto` or `off`.
    #[serde(default)]
    #[schema(value_type = String, example = "auto")]
    pub defer: Deferral,
    /// In which order missing pages are pushed: `address`, `bubbling` (outwards from those that were
    /// asked for last), `hottest` (what was written most often in the rounds before) or `recorded`
    /// (what the guest had to ask for in earlier moves).
    #[serde(default)]
    #[schema(value_type = String, example = "bubbling")]
    pub push_order: PushOrder,
    /// Behave as over a link of so many bytes a second.
    #[serde(default)]
    pub link: Option<u64>,
    /// Before anything is sent, have the guest give up what memory it has free, by its balloon, for as long
    /// as it is moved; the answer comes when it has, which may take 20 s. Refused without a balloon.
    #[serde(default)]
    pub balloon: bool,
    /// Allow a peer that is not on the loopback although this daemon does not encrypt.
    #[serde(default)]
    pub insecure: bool,
}

impl MigrateBody {
    /// A migration to `to` with defaults for everything else.
    pub fn new(to: impl Into<String>, mode: Mode) -> Self {
        Self {
            to: to.into(),
            mode,
            downtime_max_ms: None,
            bandwidth_max: None,
            deadline_ms: None,
            rounds_max: None,
            streams: None,
            verify: false,
            copy_disks: false,
            compress: Compression::default(),
            throttle: Throttling::default(),
            defer: Deferral::default(),
            push_order: PushOrder::default(),
            link: None,
            balloon: false,
            insecure: false,
        }
    }

    /// The limits that it asks for.
    ///
    /// # Errors
    /// One line about the field that cannot be used.
    pub fn limits(&self) -> Result<Limits, String> {
        LimitsPatch {
            downtime_max_ms: self.downtime_max_ms,
            bandwidth_max: self.bandwidth_max,
            deadline_ms: self.deadline_ms,
            rounds_max: self.rounds_max,
            compress: None,
            throttle: Some(self.throttle),
            streams: self.streams,
            defer: Some(self.defer),
            mode: None,
        }
        .apply(Limits::default())
    }
}

/// A migration was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrateAnswer {
    /// Its id: 32 hexadecimal digits.
    pub id: String,
}

/// What to change of a running migration; what is `null` or left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsPatch {
    /// The technique. Once the guest runs at the target `post-copy` pushes what it misses, and
    /// `demand` stops that.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "post-copy")]
    pub mode: Option<Mode>,
    /// Downtime to aim at.
    #[serde(default)]
    pub downtime_max_ms: Option<f64>,
    /// Bytes a second on the wire; 0 lifts the limit.
    #[serde(default)]
    pub bandwidth_max: Option<u64>,
    /// Since the start of the migration; 0 lifts the limit.
    #[serde(default)]
    pub deadline_ms: Option<f64>,
    /// Rounds while the guest runs.
    #[serde(default)]
    pub rounds_max: Option<u32>,
    /// Whether pages are coded.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "off")]
    pub compress: Option<Compression>,
    /// Whether the guest's writers are slowed down if rounds do not shrink; `off` lets them go.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "auto")]
    pub throttle: Option<Throttling>,
    /// Push streams in use: `auto`, or a number up to `streams_open`.
    #[serde(default)]
    #[schema(schema_with = streams_schema)]
    pub streams: Option<Streams>,
    /// Whether hot pages may be left out of live rounds; `off` has the next round send them.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "off")]
    pub defer: Option<Deferral>,
}

impl LimitsPatch {
    /// `limits` with the changes made.
    ///
    /// # Errors
    /// One line about the field that cannot be used.
    pub fn apply(&self, mut limits: Limits) -> Result<Limits, String> {
        if let Some(value) = self.downtime_max_ms {
            limits.downtime_max = duration("downtime_max_ms", value)?;
        }
        if let Some(rate) = self.bandwidth_max {
            if (1..RATE_MIN.get()).contains(&rate) {
                return Err(format!(
                    "bandwidth_max is {rate} bytes a second, too few to move a guest: give {} or \
                     more, or 0 for no limit",
                    RATE_MIN.get()
                ));
            }
            limits.bandwidth_max = (rate > 0).then(|| BytesPerSecond::new(rate));
        }
        if let Some(value) = self.deadline_ms {
            let deadline = duration("deadline_ms", value)?;
            limits.deadline = (!deadline.is_zero()).then_some(deadline);
        }
        if let Some(rounds) = self.rounds_max {
            if rounds == 0 {
                return Err("rounds_max is 0: give 1 or more, or use mode stop-and-copy".into());
            }
            limits.rounds_max = rounds;
        }
        limits.throttle = self.throttle.unwrap_or(limits.throttle);
        limits.streams = self.streams.unwrap_or(limits.streams);
        limits.defer = self.defer.unwrap_or(limits.defer);
        Ok(limits)
    }
}

/// The operator's word about an outcome that nobody can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveBody {
    /// What is the case.
    pub word: ResolveWord,
}

/// What an operator may answer for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ResolveWord {
    /// At the source: the target has never run the guest and never will, so it goes on here.
    RunsHere,
    /// At the source: the guest runs at the target with all its pages, or is lost; nothing is kept
    /// here. At the target: the source will never come back, so a guest that misses pages is lost.
    Gone,
}

/// The limits of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LimitsInfo {
    /// Downtime that it aims at.
    pub downtime_max_ms: f64,
    /// Bytes a second on the wire.
    pub bandwidth_max: Option<u64>,
    /// Since its start.
    pub deadline_ms: Option<f64>,
    /// Rounds while the guest runs.
    pub rounds_max: u32,
    /// Whether the guest's writers are slowed down if rounds do not shrink.
    #[serde(default)]
    #[schema(value_type = String, example = "off")]
    pub throttle: Throttling,
    /// Push streams in use: a number or `auto`.
    #[serde(default)]
    #[schema(schema_with = streams_schema)]
    pub streams: Streams,
    /// Whether hot pages may be left out of live rounds.
    #[serde(default)]
    #[schema(value_type = String, example = "auto")]
    pub defer: Deferral,
}

impl From<Limits> for LimitsInfo {
    fn from(limits: Limits) -> Self {
        Self {
            downtime_max_ms: milliseconds(limits.downtime_max),
            bandwidth_max: limits.bandwidth_max.map(BytesPerSecond::get),
            deadline_ms: limits.deadline.map(milliseconds),
            rounds_max: limits.rounds_max,
            throttle: limits.throttle,
            streams: limits.streams,
            defer: limits.defer,
        }
    }
}

/// A migration away from this host: how far it is, or how it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationInfo {
    /// Its id: 32 hexadecimal digits.
    pub id: String,
    /// The virtual machine.
    pub vm: String,
    /// The target daemon.
    pub to: String,
    /// Its connections are encrypted, and both daemons have shown certificates.
    pub encrypted: bool,
    /// The technique as it is now; `mode_changes` of the report tells how it came to be.
    #[schema(schema_with = mode_schema)]
    pub mode: Mode,
    /// Where it stands.
    #[schema(schema_with = stage_schema)]
    pub stage: Stage,
    /// The round that is being sent, counted from 0.
    pub round: u32,
    /// Pages of this round.
    pub round_pages: u64,
    /// Pages of this round that were sent.
    pub round_sent_pages: u64,
    /// Pages that are still to be sent as far as is known.
    pub remaining_pages: u64,
    /// Hot pages beside these, which live rounds leave out and the last one sends.
    #[serde(default)]
    pub deferred_pages: u64,
    /// Pages that the guest, which runs at the target, misses and that were not sent yet.
    pub unsent_pages: u64,
    /// Pages that the guest writes a second, as seen in the last round.
    pub dirty_pages_per_s: Option<u64>,
    /// How fast the guest may write; `null` if as fast as it can.
    pub throttle: Option<ThrottleInfo>,
    /// Push streams that are given pages now.
    pub streams_in_use: u8,
    /// Push streams that are open: at most so many can be used.
    pub streams_open: u8,
    /// Bytes a second of the rounds, as delivered to the target; `null` when they are over.
    pub bandwidth: Option<u64>,
    /// Downtime if the guest were paused now; `null` after the switch.
    pub predicted_downtime_ms: Option<f64>,
    /// Since it was asked for.
    pub elapsed_ms: f64,
    /// Until this round is over; `null` after the rounds.
    pub time_left_ms: Option<f64>,
    /// Why it is not known on which side the guest runs, while that is so.
    pub unresolved: Option<String>,
    /// Who notices which pages the guest writes: `bitmap`, `ring` or `write-protect`.
    #[schema(value_type = String, example = "bitmap")]
    pub dirty_tracker: TrackerKind,
    /// What the operator allows.
    pub limits: LimitsInfo,
    /// What is known about it so far; final when `stage` is `finished`.
    pub report: Report,
}

/// How a migration went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// `completed`, `aborted`, `failed` or `guest-lost`; `null` while it runs.
    #[schema(example = "completed")]
    pub outcome: Option<String>,
    /// One line, if it failed.
    pub reason: Option<String>,
    /// Why the guest was paused.
    #[schema(value_type = Option<String>, example = "within-budget")]
    pub pause_reason: Option<PauseReason>,
    /// From the request to the first page.
    pub preparation_ms: f64,
    /// From the request to the target's word that the guest runs there with all its pages, or to the
    /// failure.
    pub total_ms: f64,
    /// From the request until the source held nothing.
    pub eviction_ms: f64,
    /// The downtime and its parts.
    pub downtime_ms: Option<Downtime>,
    /// The switch as moments of the source's monotonic clock.
    pub switch_ns: Option<Moments>,
    /// As predicted when the guest was paused.
    pub predicted_downtime_ms: Option<f64>,
    /// The part of that prediction that does not depend on the number of pages.
    pub fixed_cost_ms: f64,
    /// How long the guest stood for the rehearsal.
    pub rehearsal_stall_ms: f64,
    /// Target's clock minus source's.
    pub clock_offset_ns: i64,
    /// The true offset lies within this distance.
    pub clock_error_ms: f64,
    /// The rounds in order, the last one with the guest paused or, after a switch, running at the
    /// target.
    pub rounds: Vec<Round>,
    /// How the technique changed on the way, in order.
    pub mode_changes: Vec<ModeChange>,
    /// How the guest's writers were slowed down; `null` if they were not.
    pub throttle: Option<ThrottleReport>,
    /// Pages that the target did not have when the guest ran there.
    pub missing_at_switch: u64,
    /// Of these, pages that were pushed in the order in which earlier moves had seen them asked for.
    #[serde(default)]
    pub recorded_pages: u64,
    /// Bytes that told the target which pages those are.
    pub missing_set_bytes: u64,
    /// Missing pages that came because a vCPU waited for them; `null` until all have come, and if
    /// none were missing.
    pub pulled_pages: Option<u64>,
    /// Missing pages that were there before anybody needed them.
    pub pushed_before_need: Option<u64>,
    /// Network faults: `pulled_pages` over both, 0 to 1. Pages that never existed are missing, too,
    /// and count as pushed.
    pub network_fault_share: Option<f64>,
    /// How long vCPUs waited for missing pages; `null` if none did.
    pub fault_latency_us: Option<FaultLatency>,
    /// How long the first of these waits took.
    pub first_fault_stall_ms: Option<f64>,
    /// Pages sent over all rounds and for faults, repetitions included.
    pub pages_sent: u64,
    /// Pages sent again after an earlier round had sent them.
    pub pages_resent: u64,
    /// Bytes on the push and pull streams and of the state.
    pub wire_bytes: u64,
    /// Bytes of the state sections.
    pub state_bytes: u64,
    /// With `verify`: whether both sides hashed the same memory and state.
    pub digest_equal: Option<bool>,
}

/// The downtime by parts, in the order in which they happen, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Downtime {
    /// Sum of the parts: first vCPU's last instruction to last vCPU's first one.
    pub total: f64,
    /// From the first to the last vCPU to stop.
    pub pause: f64,
    /// The last reading of the dirty log.
    pub harvest: f64,
    /// Saving vCPUs and devices.
    pub save: f64,
    /// Until the last page and the state have arrived.
    pub transfer: f64,
    /// Loading the state.
    pub load: f64,
    /// *Prepared* to the source, its record, *commit* to the target.
    pub commit: f64,
    /// The target's record, until the last vCPU has entered the guest.
    pub start: f64,
}

/// The switch: when the guest stopped and when it ran again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moments {
    /// First vCPU's last instruction at the source.
    pub stopped: u64,
    /// Last vCPU's first instruction at the target.
    pub running: u64,
}

/// One round of copying.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Round {
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Of these, pages that were zero.
    pub zero_pages: u64,
    /// Of these, pages that an earlier round had sent.
    pub resent_pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Until the target said that all of it is in place.
    pub time_ms: f64,
    /// Pages found dirty when it was over.
    pub dirty_after_pages: u64,
    /// Hot pages that it left out; they count among those found dirty when it was over.
    #[serde(default)]
    pub deferred_pages: u64,
    /// Pages that were compressed by LZ4.
    #[serde(default)]
    pub lz4_pages: u64,
    /// Bytes that they took.
    #[serde(default)]
    pub lz4_bytes: u64,
    /// Pages that were compressed by zstd.
    #[serde(default)]
    pub zstd_pages: u64,
    /// Bytes that they took.
    #[serde(default)]
    pub zstd_bytes: u64,
    /// Pages that went as differences to what was sent before.
    #[serde(default)]
    pub delta_pages: u64,
    /// Bytes that they took.
    #[serde(default)]
    pub delta_bytes: u64,
    /// Push streams by which it went, at the most; 0 if nobody noted it.
    #[serde(default)]
    pub streams: u8,
}

/// The technique was changed on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModeChange {
    /// Since the request.
    pub at_ms: f64,
    /// From this one.
    #[schema(schema_with = mode_schema)]
    pub from: Mode,
    /// To this one.
    #[schema(schema_with = mode_schema)]
    pub to: Mode,
    /// One line that says why.
    pub reason: String,
}

/// From a fault's notice at the target to its page in place, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FaultLatency {
    /// Half of them were faster.
    pub p50: f64,
    /// 99 of 100 were faster.
    pub p99: f64,
    /// The slowest.
    pub max: f64,
    /// Faults by latency: entry `n` counts those from 2^(n-1) up to 2^n µs, entry 0 those below one,
    /// the last entry all that were slower.
    pub log2_histogram: Vec<u32>,
}

/// A migration to this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IncomingInfo {
    /// Its id.
    pub id: String,
    /// The source's address; `null` after a restart of this daemon until it has come back.
    pub from: Option<String>,
    /// The source is there: pages may come.
    pub is_connected: bool,
    /// What keeps pages that have come from being put in place, as long as it does: a disk of the guest's that
    /// cannot be written. It is tried again and again, and the guest waits.
    pub stuck: Option<String>,
    /// Pages that the guest, which runs here, misses.
    pub missing_pages: u64,
    /// Pages received so far.
    pub pages_received: u64,
    /// Bytes received so far.
    pub bytes_received: u64,
    /// The source has committed: the guest runs here, or is about to.
    pub is_committed: bool,
}

/// Lists the stages in the document; the engine knows nothing of schemas.
fn stage_schema() -> utoipa::openapi::schema::Object {
    utoipa::openapi::schema::ObjectBuilder::new()
        .schema_type(utoipa::openapi::schema::Type::String)
        .enum_values(Some([
            "preparing",
            "copying",
            "paused",
            "committed",
            "serving",
            "unresolved",
            "releasing",
            "returning",
            "finished",
        ]))
        .build()
}

/// A number of streams, or a word.
fn streams_schema() -> utoipa::openapi::schema::Schema {
    use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
    let number = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(1))
        .maximum(Some(STREAMS_MAX));
    let word = ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(["auto"]));
    OneOfBuilder::new().item(word).item(number).build().into()
}

/// Lists the techniques in the document.
fn mode_schema() -> utoipa::openapi::schema::Object {
    utoipa::openapi::schema::ObjectBuilder::new()
        .schema_type(utoipa::openapi::schema::Type::String)
        .enum_values(Some(Mode::ALL.map(Mode::name)))
        .build()
}

/// Reads an id as it was given out.
pub fn parse_id(text: &str) -> Option<MigrationId> {
    let is_id = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_id {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(MigrationId)
}

impl From<&MigrationReport> for Report {
    fn from(report: &MigrationReport) -> Self {
        let outcome = report.outcome.as_ref();
        let reason = match outcome {
            Some(Outcome::Failed { reason } | Outcome::GuestLost { reason }) => {
                Some(reason.clone())
            }
            Some(Outcome::Completed | Outcome::Aborted) | None => None,
        };
        let faults = report.faults.as_ref();
        Self {
            outcome: outcome.map(|outcome| outcome.name().to_owned()),
            reason,
            pause_reason: report.pause_reason,
            preparation_ms: milliseconds(report.preparation),
            total_ms: milliseconds(report.total),
            eviction_ms: milliseconds(report.eviction),
            downtime_ms: report.downtime.as_ref().map(Downtime::from),
            switch_ns: report.switch.map(|(stopped, running)| Moments {
                stopped: stopped.as_nanos(),
                running: running.as_nanos(),
            }),
            predicted_downtime_ms: report.predicted_downtime.map(milliseconds),
            fixed_cost_ms: milliseconds(report.fixed_cost),
            rehearsal_stall_ms: milliseconds(report.rehearsal_stall),
            clock_offset_ns: report.clock.nanos,
            clock_error_ms: milliseconds(report.clock.error),
            rounds: report.rounds.iter().map(Round::from).collect(),
            mode_changes: report.mode_changes.iter().map(ModeChange::from).collect(),
            throttle: report.throttle.as_ref().map(ThrottleReport::from),
            missing_at_switch: report.missing_at_switch.get(),
            recorded_pages: report.recorded.get(),
            missing_set_bytes: report.missing_set_bytes.get(),
            pulled_pages: faults.map(|faults| faults.pulled.get()),
            pushed_before_need: faults.map(|faults| faults.pushed.get()),
            network_fault_share: faults.and_then(network_share),
            fault_latency_us: faults.and_then(FaultLatency::of),
            first_fault_stall_ms: faults
                .filter(|faults| has_waited(faults))
                .map(|faults| milliseconds(faults.first_stall)),
            pages_sent: report.pages_sent().get(),
            pages_resent: report.pages_resent().get(),
            wire_bytes: report.wire_bytes().get(),
            state_bytes: report.state_bytes.get(),
            digest_equal: report.digest_equal,
        }
    }
}

/// Whether any vCPU had to wait for a page.
fn has_waited(faults: &FaultReport) -> bool {
    faults.latency_log2_us.iter().any(|&count| count > 0)
}

/// Pages that came over the network because they were needed, over all that were missing.
fn network_share(faults: &FaultReport) -> Option<f64> {
    let pulled = faults.pulled.get() as f64;
    let all = pulled + faults.pushed.get() as f64;
    (all > 0.0).then(|| pulled / all)
}

impl FaultLatency {
    fn of(faults: &FaultReport) -> Option<Self> {
        let micros = |duration: Duration| duration.as_nanos() as f64 / 1000.0;
        has_waited(faults).then(|| Self {
            p50: micros(faults.latency_p50),
            p99: micros(faults.latency_p99),
            max: micros(faults.latency_max),
            log2_histogram: faults.latency_log2_us.to_vec(),
        })
    }
}

impl From<&report::ModeChange> for ModeChange {
    fn from(change: &report::ModeChange) -> Self {
        Self {
            at_ms: milliseconds(change.at),
            from: change.from,
            to: change.to,
            reason: change.reason.clone(),
        }
    }
}

impl From<&report::Downtime> for Downtime {
    fn from(parts: &report::Downtime) -> Self {
        Self {
            total: milliseconds(parts.total()),
            pause: milliseconds(parts.pause),
            harvest: milliseconds(parts.harvest),
            save: milliseconds(parts.save),
            transfer: milliseconds(parts.transfer),
            load: milliseconds(parts.load),
            commit: milliseconds(parts.commit),
            start: milliseconds(parts.start),
        }
    }
}

impl From<&report::RoundReport> for Round {
    fn from(round: &report::RoundReport) -> Self {
        Self {
            pages: round.pages.get(),
            zero_pages: round.zero_pages.get(),
            resent_pages: round.resent.get(),
            bytes: round.bytes.get(),
            time_ms: milliseconds(round.time),
            dirty_after_pages: round.dirty_after.get(),
            deferred_pages: round.deferred.get(),
            lz4_pages: round.lz4.pages.get(),
            lz4_bytes: round.lz4.bytes.get(),
            zstd_pages: round.zstd.pages.get(),
            zstd_bytes: round.zstd.bytes.get(),
            delta_pages: round.delta.pages.get(),
            delta_bytes: round.delta.bytes.get(),
            streams: round.streams,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::PageCount;

    /// What is told of pages that were pulled and pushed, and of one wait for a page.
    fn check(pulled: u64, pushed: u64, wait: Duration, expect: &str) {
        let mut faults = FaultReport {
            pulled: PageCount::new(pulled),
            pushed: PageCount::new(pushed),
            latency_p50: wait,
            latency_p99: wait,
            latency_max: wait,
            ..FaultReport::default()
        };
        faults.latency_log2_us[7] = u32::from(!wait.is_zero());
        let latency = FaultLatency::of(&faults).map(|latency| latency.p99);
        let told = format!("{:?} {latency:?}", network_share(&faults));
        assert_eq!(told, expect);
    }

    #[test]
    fn what_nobody_waited_for_has_no_latency() {
        check(1, 3, Duration::from_nanos(90_500), "Some(0.25) Some(90.5)");
        check(0, 3, Duration::ZERO, "Some(0.0) None");
        check(0, 0, Duration::ZERO, "None None");
    }

    #[test]
    fn a_migration_that_names_no_technique_finds_its_own() {
        let body: MigrateBody = serde_json::from_str(r#"{"to": "b:1"}"#).unwrap();
        assert_eq!(body, MigrateBody::new("b:1", Mode::Auto));
        assert_eq!(body.limits().unwrap().streams, Streams::AUTO);
        let patch: LimitsPatch = serde_json::from_str(r#"{"mode": "post-copy"}"#).unwrap();
        assert_eq!(patch.mode, Some(Mode::PostCopy));
        let word: ResolveBody = serde_json::from_str(r#"{"word": "runs-here"}"#).unwrap();
        assert_eq!(word.word, ResolveWord::RunsHere);
    }

    #[test]
    fn streams_are_a_number_or_left_to_the_law() {
        let check = |text: &str, expect: &str| {
            let patch: Result<LimitsPatch, _> =
                serde_json::from_str(&format!(r#"{{"streams": {text}}}"#));
            let told = patch.map(|patch| serde_json::to_string(&patch.streams).unwrap());
            let told = told.unwrap_or_else(|error| error.to_string());
            assert!(told.starts_with(expect), "{text}: {told}");
        };
        check("null", "null");
        check("\"auto\"", "\"auto\"");
        check("1", "1");
        check("16", "16");
        for text in ["0", "17", "-1", "300", "\"many\"", "2.5"] {
            check(text, "invalid ");
        }
    }
}
