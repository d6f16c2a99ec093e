//! The peer: the same guest program under QEMU, moved between two QEMUs on the loopback.
//!
//! What is measured, when and by whom is as in [`crate::bed::loopback`]: the guest records its
//! stalls, a thread hears its beats, the second before and after belong to the move, a sweep comes
//! last. What only the hosts can know comes from QEMU's events: when the guest stopped and ran again,
//! when a move was over. Nobody asks meanwhile.
//!
//! ```text
//!             MIGRATION active      PASS 2          STOP                    completed
//!  source ────────┼────────────────────┼──────────────┼──────────────────────────┼───▶
//!           post-copy at once    post-copy after      │
//!                                one round            └─▶ RESUME           completed
//!  target ─────────────────────────────────────────────────┼─────────────────────┼───▶
//! ```
//!
//! Invariants: only processes that were started here are ended; a figure that QEMU does not tell
//! stays absent; a move that goes on for too long is cancelled, which is a result.

mod console;
mod guest_memory;
mod image;
mod link;
mod process;
pub(crate) mod program;
mod qmp;
mod settings;

use crate::bed::hosts::NAMES;
use crate::bed::interrupt::Interrupt;
use crate::bed::observation::{Counted, MARGIN, Moments, earlier, milliseconds, observe};
use crate::bed::observer;
use crate::bed::processors::Processors;
use crate::bed::stalls::{Stall, StallGroup};
use crate::bed::warm::warm;
use anyhow::{Context, bail};
use console::Heard;
use limosa_engine::Timestamp;
use limosa_host::api::TrackerKind;
use limosa_lab::qemu::{QemuFigures, QemuWay};
use limosa_lab::record::{Checked, MoveRecord, Observed, QemuEnd, Setup};
use limosa_micro_abi::{Command, CommandKind, Report, State};
use limosa_os::kvm::Kvm;
use link::Link;
use process::{Machine, Process, Role};
use qmp::{Event, QmpError};
use serde_json::{Value, json};
use settings::Switch;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A guest's own work never takes longer than at this many bytes a second.
const GUEST_BYTES_PER_SECOND_MIN: u64 = 50 << 20;
/// What any waiting allows on top.
const PATIENCE: Duration = Duration::from_secs(30);
/// Beats take a moment to arrive.
const ARRIVAL: Duration = Duration::from_millis(50);
/// Between two looks at a guest that fills its memory or carries out a command.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Between two looks for connections of an emulated link.
const PACE_EVERY: Duration = Duration::from_millis(20);
/// For how long one QEMU's events are waited for before the other's are looked at.
const EVENTS_EVERY: Duration = Duration::from_millis(10);

/// Two QEMUs, the guest in the first one.
#[derive(Debug)]
pub(crate) struct QemuBed {
    source: Process,
    target: Process,
    heard: Heard,
    interrupt: Interrupt,
    setup: Setup,
    way: QemuWay,
    /// Number of the last command of the guest.
    sequence: u32,
    /// Removed after the processes have ended.
    directory: TempDir,
}

/// What events told of a move.
#[derive(Clone, Debug, Default)]
struct Followed {
    stopped: Option<Timestamp>,
    resumed: Option<Timestamp>,
    /// How it ended at the source, and when.
    source_end: Option<(Timestamp, String)>,
    /// When the target had all pages.
    target_end: Option<Timestamp>,
    is_switched: bool,
    /// The source's figures when the move was cancelled.
    at_cancel: Option<Value>,
}

impl QemuBed {
    /// Starts both and the guest, and waits until it works.
    pub(crate) fn start(
        setup: &Setup,
        way: QemuWay,
        program: &Path,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("limosa-")
            .tempdir()
            .context("cannot make a temporary directory")?;
        let guest = limosa_micro::by_name(&setup.guest).context("there is no such guest")?;
        let arguments = format!("{} monitor=foreign", setup.arguments);
        let image = image::compose(guest, setup.memory_bytes, tsc_khz()?, arguments.trim())?;
        let machine = Machine {
            program: program.to_owned(),
            image: directory.path().join("image"),
            memory_bytes: setup.memory_bytes,
        };
        fs::write(&machine.image, image).context("cannot write the guest's image")?;
        let heard = Heard::default();
        let start = |role| Process::start(role, &machine, directory.path(), &heard, interrupt);
        let mut source = start(Role::Source)?;
        source.qmp.execute("cont", json!({}))?;
        wait_until_ready(&mut source, &heard, patience(setup), interrupt)?;
        Ok(Self {
            target: start(Role::Target)?,
            source,
            heard,
            interrupt: interrupt.clone(),
            setup: setup.clone(),
            way,
            sequence: 0,
            directory,
        })
    }

    /// Moves the guest to the other QEMU, then has all of its memory checked.
    pub(crate) fn make_move(&mut self, number: u32) -> anyhow::Result<MoveRecord> {
        let made = self.measure(number);
        made.map_err(|error| self.explained(error))
    }

    /// A QEMU that has ended says more than a socket that is closed.
    fn explained(&mut self, error: anyhow::Error) -> anyhow::Error {
        for (name, process) in [("source", &mut self.source), ("target", &mut self.target)] {
            if let Some(ended) = process.ended() {
                return error.context(format!("at the {name} {ended}"));
            }
        }
        error
    }

    fn measure(&mut self, number: u32) -> anyhow::Result<MoveRecord> {
        let address = self.prepare()?;
        let mut link = self.link(address)?;
        warm(self.setup.memory_bytes);
        self.interrupt.sleep(MARGIN + ARRIVAL)?;
        let before = self.command(Role::Source, CommandKind::ClearStalls, PATIENCE)?;
        let mut stalls = self.heard.take_stalls();
        stalls.clear();
        let processors = Processors::now(self.directory.path());
        let begun = observer::now();
        self.source
            .qmp
            .execute("migrate", json!({ "uri": format!("tcp:{address}") }))?;
        let followed = self.follow(begun, link.as_mut())?;
        let (end, ended, at) = self.end(begun, &followed)?;
        let over = ended.after(MARGIN + ARRIVAL).since(observer::now());
        self.interrupt.sleep(over)?;
        stalls.extend(self.heard.take_stalls());
        let counted = self.counted(at, begun);
        let mut observed = self.observed((begun, ended), &followed, &stalls, &counted);
        observed.others_cpu_share =
            processors.and_then(|before| before.others_until_now(self.directory.path()));
        let swept = self.command(at, CommandKind::Sweep, patience(&self.setup))?;
        let errors = |report: &Report| report.errors + report.tsc_backwards;
        let checked = Checked {
            errors: errors(&swept).saturating_sub(errors(&before)),
            swept_pages: Some(swept.sweep_pages),
        };
        let technique = self.way.variant.technique();
        let names = (NAMES[0], NAMES[1]);
        Ok(MoveRecord::of_qemu(
            number, names, technique, end, observed, checked,
        ))
    }

    /// Sets both up; where the target listens.
    fn prepare(&mut self) -> anyhow::Result<SocketAddr> {
        let capabilities = settings::capabilities(self.way.variant);
        let parameters = settings::parameters(&self.way, self.setup.link);
        for process in [&mut self.source, &mut self.target] {
            let qmp = &mut process.qmp;
            qmp.execute("migrate-set-capabilities", capabilities.clone())?;
            qmp.execute("migrate-set-parameters", parameters.clone())?;
        }
        let qmp = &mut self.target.qmp;
        qmp.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let answer = qmp.execute("query-migrate", json!({}))?;
        let port = answer.pointer("/socket-address/0/port");
        let port = port.and_then(Value::as_str);
        let port = port.and_then(|port| port.parse().ok());
        let port: u16 = port.context("QEMU does not tell where it listens")?;
        Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    }

    /// The emulated link, if there is one, shared by as many connections as carry pages.
    fn link(&self, target: SocketAddr) -> anyhow::Result<Option<Link>> {
        let share = |rate: u64| rate.div_ceil(u64::from(self.way.variant.streams()));
        let rate = self.setup.link.map(share);
        rate.map(|rate| Link::new(self.source.pid(), target, rate))
            .transpose()
    }

    /// Waits until the move is over at both ends, and interferes where the variant asks for it.
    fn follow(
        &mut self,
        begun: Timestamp,
        mut link: Option<&mut Link>,
    ) -> anyhow::Result<Followed> {
        let cancel_after = Duration::from_millis(self.way.cancel_after_ms);
        let give_up = cancel_after + patience(&self.setup);
        let mut followed = Followed::default();
        let mut next_pace = Instant::now();
        while !followed.is_over() {
            self.interrupt.check()?;
            if let Some(link) = link.as_mut().filter(|_| next_pace <= Instant::now()) {
                link.pace();
                next_pace = Instant::now() + PACE_EVERY;
            }
            let mut wait = EVENTS_EVERY;
            while let Some(event) = self.source.qmp.event(wait)? {
                wait = Duration::ZERO;
                followed.heed_source(&event);
                if !followed.is_switched && is_time_to_switch(&self.way, &event) {
                    followed.is_switched = true;
                    self.tell_source("migrate-start-postcopy")?;
                }
            }
            while let Some(event) = self.target.qmp.event(Duration::ZERO)? {
                followed.heed_target(&event);
            }
            let passed = observer::now().since(begun);
            // A guest that has left, or is leaving, cannot be called back.
            let may_cancel = followed.at_cancel.is_none() && followed.stopped.is_none();
            if passed > cancel_after && may_cancel && followed.source_end.is_none() {
                followed.at_cancel = Some(self.source.qmp.execute("query-migrate", json!({}))?);
                self.tell_source("migrate_cancel")?;
            }
            if passed > give_up {
                bail!("the move is not over after {give_up:?}");
            }
        }
        Ok(followed)
    }

    /// A command for which it may be too late, which is no failure.
    fn tell_source(&mut self, command: &str) -> Result<(), QmpError> {
        match self.source.qmp.execute(command, json!({})) {
            Err(error @ QmpError::Refused { .. }) => {
                tracing::debug!(%error, "too late");
                Ok(())
            }
            told => told.map(drop),
        }
    }

    /// How the move ended, when, and where the guest is now.
    fn end(
        &mut self,
        begun: Timestamp,
        followed: &Followed,
    ) -> anyhow::Result<(QemuEnd, Timestamp, Role)> {
        let now = self.source.qmp.execute("query-migrate", json!({}))?;
        let said = followed.at_cancel.as_ref().unwrap_or(&now);
        let (source_end, status) = followed.source_end.clone().context("it has not ended")?;
        let later = [followed.target_end, followed.resumed]
            .into_iter()
            .flatten();
        let is_completed = status == "completed";
        let ended = if is_completed {
            later.fold(source_end, Timestamp::max)
        } else {
            source_end
        };
        let limit = Duration::from_millis(self.way.cancel_after_ms);
        let reason = match status.as_str() {
            "completed" => None,
            "cancelled" => Some(format!("it did not converge within {limit:?}")),
            _ => {
                let reason = now.get("error-desc").and_then(Value::as_str);
                Some(reason.unwrap_or("QEMU gave no reason").to_owned())
            }
        };
        let at = if is_completed {
            Role::Target
        } else {
            Role::Source
        };
        let end = QemuEnd {
            outcome: status,
            reason,
            total_ms: milliseconds(ended.since(begun)),
            setup_ms: said.get("setup-time").and_then(Value::as_f64),
            wire_bytes: said.pointer("/ram/transferred").and_then(Value::as_u64),
            figures: self.figures(said, at)?,
        };
        Ok((end, ended, at))
    }

    fn figures(&mut self, said: &Value, at: Role) -> anyhow::Result<QemuFigures> {
        let arrived = match at {
            Role::Target => self.target.qmp.execute("query-migrate", json!({}))?,
            Role::Source => Value::Null,
        };
        let number = |path: &str| said.pointer(path).and_then(Value::as_u64);
        Ok(QemuFigures {
            version: self.source.qmp.version.clone(),
            downtime_ms: match at {
                Role::Target => said.get("downtime").and_then(Value::as_f64),
                Role::Source => None,
            },
            passes: number("/ram/dirty-sync-count"),
            throttle_percent: number("/cpu-throttle-percentage"),
            postcopy_requests: match settings::switch(self.way.variant) {
                Switch::Never => None,
                _ => number("/ram/postcopy-requests"),
            },
            postcopy_blocktime_ms: arrived.get("postcopy-blocktime").and_then(Value::as_f64),
        })
    }

    /// All stalls since the guest was told to forget them, right before `begun`.
    fn counted(&self, at: Role, begun: Timestamp) -> Counted {
        let process = match at {
            Role::Source => &self.source,
            Role::Target => &self.target,
        };
        let report = process.memory.report();
        let groups = report.iter().flat_map(|report| &report.stall_groups);
        let own = |group: &limosa_micro_abi::StallGroup| StallGroup {
            count: group.count,
            ticks: group.ticks,
        };
        Counted {
            groups: groups.map(own).collect(),
            watched: observer::now().since(begun),
        }
    }

    fn observed(
        &self,
        (begun, ended): (Timestamp, Timestamp),
        followed: &Followed,
        stalls: &[Stall],
        counted: &Counted,
    ) -> Observed {
        let beats = self.heard.since(earlier(begun, MARGIN + ARRIVAL));
        let moments = Moments {
            begun,
            ended,
            switch: followed.stopped.zip(followed.resumed),
        };
        observe(&moments, &beats, stalls, counted)
    }

    /// Gives the guest a command and waits until it has carried it out.
    fn command(
        &mut self,
        at: Role,
        kind: CommandKind,
        patience: Duration,
    ) -> anyhow::Result<Report> {
        self.sequence += 1;
        let sequence = self.sequence;
        let process = match at {
            Role::Source => &mut self.source,
            Role::Target => &mut self.target,
        };
        process.memory.command(Command { kind, sequence })?;
        let give_up = Instant::now() + patience;
        loop {
            let report = process.memory.report();
            let is_done = |one: &Report| one.command_done == u64::from(sequence);
            if let Some(report) = report.filter(is_done) {
                return Ok(report);
            }
            if let Some(ended) = process.ended() {
                bail!("{ended}");
            }
            if Instant::now() > give_up {
                bail!("the guest did not carry out {kind:?} within {patience:?}");
            }
            self.interrupt.sleep(LOOK_EVERY)?;
        }
    }
}

impl Followed {
    fn heed_source(&mut self, event: &Event) {
        match (event.name.as_str(), event.status.as_deref()) {
            ("STOP", _) => self.stopped = Some(event.at),
            // It went on here.
            ("RESUME", _) => self.stopped = None,
            ("MIGRATION", Some(status @ ("completed" | "failed" | "cancelled"))) => {
                self.source_end = Some((event.at, status.to_owned()));
            }
            _ => {}
        }
    }

    fn heed_target(&mut self, event: &Event) {
        match (event.name.as_str(), event.status.as_deref()) {
            ("RESUME", _) => self.resumed = Some(event.at),
            ("MIGRATION", Some("completed")) => self.target_end = Some(event.at),
            _ => {}
        }
    }

    /// Whether nothing more will come.
    fn is_over(&self) -> bool {
        match &self.source_end {
            None => false,
            Some((_, status)) if status == "completed" => {
                self.target_end.is_some() && self.resumed.is_some()
            }
            Some(_) => true,
        }
    }
}

/// Whether an event of the source is the one after which post-copy begins.
fn is_time_to_switch(way: &QemuWay, event: &Event) -> bool {
    match settings::switch(way.variant) {
        Switch::Never => false,
        Switch::AtOnce => event.name == "MIGRATION" && event.status.as_deref() == Some("active"),
        Switch::AfterOneRound => event.pass.is_some_and(|pass| pass >= 2),
    }
}

/// Time for the guest to pass its memory once.
fn patience(setup: &Setup) -> Duration {
    let slowest = setup.link.unwrap_or(u64::MAX);
    let slowest = slowest.clamp(1, GUEST_BYTES_PER_SECOND_MIN);
    PATIENCE + Duration::from_secs(setup.memory_bytes.div_ceil(slowest))
}

fn wait_until_ready(
    source: &mut Process,
    heard: &Heard,
    patience: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<()> {
    let give_up = Instant::now() + patience;
    loop {
        let report = source.memory.report();
        if report.and_then(|report| report.state()) == Some(State::Ready) {
            return Ok(());
        }
        // A guest that gives up says why, and takes QEMU with it.
        if let Some(ended) = source.ended() {
            bail!("{ended}; the guest said: {}", heard.text().trim());
        }
        if Instant::now() > give_up {
            bail!(
                "the guest is not ready after {patience:?}: {}",
                heard.text()
            );
        }
        interrupt.sleep(LOOK_EVERY)?;
    }
}

/// As limosa's own monitor tells it to its guests.
fn tsc_khz() -> anyhow::Result<u32> {
    let machine = Kvm::open()?.create_vm(TrackerKind::default())?;
    Ok(machine.create_vcpu(0)?.tsc_khz()?)
}

#[cfg(test)]
mod tests;
