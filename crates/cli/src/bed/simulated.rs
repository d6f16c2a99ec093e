//! The same moves in the simulator, for machines without KVM.
//!
//! The engine that decides is the real one; guest, link and hosts are models, so the figures show
//! how the techniques differ and not how fast this machine is. There is no observer and no sweep:
//! the simulator compares memory itself.

use crate::bed::hosts::NAMES;
use crate::bed::observation::milliseconds;
use anyhow::bail;
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::streams::OPEN_MIN;
use limosa_host::api::Report;
use limosa_lab::record::{Checked, MoveRecord, Observed, Setup, WriteRates};
use limosa_lab::values::PageRate;
use limosa_lab::workload::{GuestProgram, Pattern, Workload};
use limosa_pages::{ByteCount, BytesPerSecond, PageCount};
use limosa_sim::{LinkProfile, Scenario};
use std::time::Duration;

/// A guest that writes as fast as it can while its writes are tracked: the first write to a page
/// costs some microseconds then.
const RATE_MAX: u64 = 400_000;

/// Moves of one scenario.
#[derive(Debug)]
pub(crate) struct Simulated {
    scenario: Scenario,
    seed: u64,
    at: usize,
}

impl Simulated {
    /// The scenario that these describe.
    ///
    /// # Errors
    /// The simulator has no model of the guest.
    pub(crate) fn new(setup: &Setup, workload: &Workload) -> anyhow::Result<Self> {
        let working_set = ByteCount::new(workload.working_set.bytes()).pages_ceil();
        let touch = ByteCount::new(workload.touch.bytes()).pages_ceil();
        let memory = ByteCount::new(setup.memory_bytes).pages_ceil();
        let (model, touched) = match (workload.guest, workload.pattern) {
            (guest @ (GuestProgram::Compute | GuestProgram::Kv), _) => {
                let guest = guest.name();
                bail!("the simulator has no model of the {guest} guest: use writer or idle")
            }
            (GuestProgram::Idle, _) => (limosa_sim::Workload::Idle, PageCount::new(64)),
            (GuestProgram::Writer, pattern) => {
                use limosa_sim::Workload as Model;
                let model = match pattern {
                    Pattern::Sequential => Model::Sequential { working_set },
                    Pattern::Uniform => Model::Uniform { working_set },
                    Pattern::Zipf => Model::Zipf { working_set },
                    Pattern::Phases => Model::Phases { working_set },
                };
                (model, working_set.saturating_add(touch))
            }
        };
        if touched > memory {
            bail!("the working set does not fit into the guest's memory");
        }
        let usual = Scenario::default();
        let rate = setup.link.map(BytesPerSecond::new);
        let limits = Limits::default();
        let streams = setup.streams.unwrap_or(limits.streams);
        Ok(Self {
            scenario: Scenario {
                memory,
                touched,
                workload: model,
                rate: match workload.rate {
                    PageRate::PerSecond(pages) => pages,
                    PageRate::Max => RATE_MAX,
                },
                link: LinkProfile {
                    rate: rate.unwrap_or(usual.link.rate),
                    ..usual.link
                },
                counts_vcpus: setup.dirty_tracker.knows_vcpus(),
                streams: streams.number().unwrap_or(OPEN_MIN),
                limits: Limits {
                    downtime_max: Duration::from_secs_f64(setup.downtime_max_ms / 1000.0),
                    deadline: setup.deadline_ms.map(Duration::from_millis),
                    rounds_max: setup.rounds_max.unwrap_or(limits.rounds_max),
                    throttle: setup.throttle,
                    streams,
                    defer: setup.defer,
                    ..limits
                },
                verify: setup.verify,
                ..usual
            },
            seed: setup.seed,
            at: 0,
        })
    }

    /// One move.
    pub(crate) fn make_move(&mut self, number: u32, mode: Mode) -> MoveRecord {
        let (from, to) = (self.at, 1 - self.at);
        self.scenario.mode = mode;
        self.scenario.seed = self.seed.wrapping_add(u64::from(number));
        let made = limosa_sim::run(&self.scenario);
        let report = Report::from(&made.report);
        let observed = Observed {
            guest_gap_ms: report.downtime_ms.map(|_| milliseconds(made.guest_gap)),
            heartbeat_gap_ms: None,
            worst_stall_ms: Some(milliseconds(made.worst_stall)),
            resume_ms: Some(milliseconds(made.resume.saturating_sub(made.guest_gap))),
            writes: WriteRates {
                before: Some(made.writes_before.round()),
                during: Some(made.writes_during.round()),
                after: Some(made.writes_after.round()),
            },
            ..Observed::default()
        };
        let checked = Checked {
            errors: made.integrity_errors,
            swept_pages: None,
        };
        let way = (NAMES[from], NAMES[to]);
        let record = MoveRecord::new(number, way, mode, report, observed, checked);
        if record.is_completed() {
            self.at = to;
        }
        record
    }
}
