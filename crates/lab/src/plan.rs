//! A plan: a question, and the matrix of moves that answers it.
//!
//! A TOML file. Workloads are named once; each `[[matrix]]` is the cross product of its lists, and
//! one cell of it is one way to move one guest. All cells of all matrices belong to one experiment:
//! a matrix more is for combinations that one product would not give.
//!
//! Invariants: a plan that was read can be carried out as far as this file can tell: each name is
//! known, each guest fits into its memory, no cell stands there twice, and there is an end to it.
//! Whatever is wrong is told in one line with what would be right.
//!
//! Deliberately absent: defaults that differ from those of the commands.

mod text;
mod ways;
mod without;
mod workloads;

use crate::backing::Backing;
use crate::qemu::{QemuWay, Variant};
use crate::values::{Milliseconds, OrNone, Rate, Size};
use crate::workload::{GuestProgram, Workload};
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::streams::Streams;
use limosa_host::api::{Compression, Deferral, PushOrder, Throttling, TrackerKind};
use limosa_pages::{ByteCount, BytesPerSecond};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use text::Text;
use ways::Way;
use workloads::WorkloadTable;

pub use without::without;

/// Runs of one plan: at some seconds each, more than a day of them is a mistake.
const RUNS_MAX: usize = 20_000;

/// What is asked, and how it is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What the experiment shall answer, in the words of whoever asks.
    pub question: String,
    /// Where the moves shall happen.
    pub bed: BedKind,
    /// Seed of the order of the runs and of the guests' choices.
    pub seed: u64,
    /// Runs of each cell.
    pub repeats: u32,
    /// The downtime that pre-copy aims at.
    pub downtime_max: Milliseconds,
    /// Whether both sides hash memory and state at the switch.
    pub verify: bool,
    /// What guests do, by name.
    pub workloads: BTreeMap<String, Workload>,
    /// All cells, in the order of the matrices and of their lists.
    pub cells: Vec<Cell>,
}

/// Where moves happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BedKind {
    /// Guests under KVM, daemons on the loopback.
    #[default]
    Real,
    /// The simulator.
    Simulated,
}

/// One way to move one guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// The technique; of QEMU, what its variant is most like.
    pub technique: Mode,
    /// Name of what the guest does.
    pub workload: String,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// vCPUs of the guest.
    pub vcpus: u8,
    /// The emulated link in bytes a second; `null` is as fast as it goes.
    pub link: Option<u64>,
    /// Push streams: a number, or as many as pay.
    pub streams: Streams,
    /// Whether pages are coded.
    pub compress: Compression,
    /// What backs the guest's memory.
    #[serde(default)]
    pub pages: Backing,
    /// Who notices which pages the guest writes.
    #[serde(default)]
    pub dirty_tracker: TrackerKind,
    /// In which order missing pages are pushed.
    #[serde(default)]
    pub push_order: PushOrder,
    /// Whether the guest's writers are slowed down if rounds do not shrink.
    #[serde(default)]
    pub throttle: Throttling,
    /// Whether hot pages may be left out of live rounds; in runs that do not say so they were not.
    #[serde(default = "defer_before")]
    pub defer: Deferral,
    /// Whether connections are encrypted.
    #[serde(default)]
    pub tls: bool,
    /// Since its start the move should be over after so many milliseconds, and gives up further rounds
    /// for it; `null` is no deadline.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// Rounds while the guest runs at the source, at most.
    #[serde(default = "rounds_max_default")]
    pub rounds_max: u32,
    /// How QEMU moves the guest, if it is QEMU's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<QemuWay>,
    /// The row of a comparison in which it stands, if it has a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row: Option<String>,
}

impl Cell {
    /// How it is moved, in words: a technique, or QEMU with a variant.
    pub fn way(&self) -> String {
        self.qemu.map_or_else(
            || self.technique.name().to_owned(),
            |qemu| {
                let limit = qemu.downtime_limit_ms;
                format!("QEMU {} \u{2264} {limit} ms", qemu.variant.name())
            },
        )
    }

    /// The link in words.
    pub fn link_text(&self) -> String {
        self.link.map_or_else(
            || "unlimited".to_owned(),
            |link| BytesPerSecond::new(link).to_string(),
        )
    }

    /// The deadline in words.
    pub fn deadline_text(&self) -> String {
        self.deadline_ms
            .map_or_else(|| "none".to_owned(), |deadline| format!("{deadline} ms"))
    }

    /// The streams in words.
    pub(crate) fn streams_text(&self) -> String {
        self.streams.number().map_or_else(
            || "streams auto".to_owned(),
            |number| counted(number, "stream"),
        )
    }

    /// All of limosa's settings that are not the default, in words, each with a comma before it.
    pub(crate) fn unusual(&self) -> String {
        let mut text = String::new();
        let mut add = |is_unusual: bool, words: String| {
            if is_unusual {
                text.push_str(", ");
                text.push_str(&words);
            }
        };
        // Of QEMU, its variant says it.
        let is_coded = self.compress != Compression::Auto && self.qemu.is_none();
        let (tracker, order) = (self.dirty_tracker, self.push_order);
        add(is_coded, format!("compress {}", self.compress.name()));
        add(
            self.pages != Backing::default(),
            format!("{} pages", self.pages),
        );
        add(
            tracker != TrackerKind::default(),
            format!("dirty tracker {tracker}"),
        );
        add(
            order != PushOrder::default(),
            format!("push order {}", order.name()),
        );
        add(
            self.throttle != Throttling::default(),
            format!("throttle {}", self.throttle),
        );
        // QEMU has none.
        let is_sent = self.defer != Deferral::default() && self.qemu.is_none();
        add(is_sent, format!("defer {}", self.defer));
        let deadline = format!("deadline {}", self.deadline_text());
        add(self.deadline_ms.is_some(), deadline);
        let rounds = format!("rounds at most {}", self.rounds_max);
        add(self.rounds_max != rounds_max_default(), rounds);
        add(self.tls, "TLS".to_owned());
        text
    }

    /// What of it the simulator has no model of, and what to do.
    fn unknown_to_simulator(&self) -> Option<&'static str> {
        if self.compress != Compression::Auto {
            return Some("the simulator does not code pages: leave compress out of the plan");
        }
        if self.push_order != PushOrder::default() {
            return Some(
                "the simulator has no model of the order of pushes: leave push_orders out of the plan",
            );
        }
        if self.tls {
            return Some("the simulator encrypts nothing: leave tls out of the plan");
        }
        let problem = "the simulator has one dirty tracker: leave dirty_trackers out of the plan";
        (self.dirty_tracker != TrackerKind::default()).then_some(problem)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} with {} and {}, link {}, {}{}",
            self.way(),
            self.workload,
            ByteCount::new(self.memory_bytes),
            counted(self.vcpus, "vCPU"),
            self.link_text(),
            self.streams_text(),
            self.unusual(),
        )?;
        match &self.row {
            None => Ok(()),
            Some(row) => write!(f, " ({row})"),
        }
    }
}

/// `1 stream`, `2 streams`.
pub(crate) fn counted(number: u8, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// Why a text is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// It is not of the form of a plan.
    #[error("line {line}: {message}")]
    Form {
        /// Where, counted from 1.
        line: usize,
        /// What, with what is allowed.
        message: String,
    },
    /// Its parts do not go together.
    #[error("{0}")]
    Content(String),
}

impl Plan {
    /// Reads a plan.
    ///
    /// # Errors
    /// One line with what would be right.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let file: PlanFile = toml::from_str(text).map_err(|error| form_error(text, &error))?;
        file.into_plan().map_err(PlanError::Content)
    }

    /// All runs.
    pub const fn runs(&self) -> usize {
        self.cells.len() * self.repeats as usize
    }

    /// Whether QEMU makes some of its moves.
    pub fn has_qemu(&self) -> bool {
        self.cells.iter().any(|cell| cell.qemu.is_some())
    }

    /// Why the simulator cannot do this; `None` if it can.
    pub fn simulator_problem(&self) -> Option<String> {
        if self.has_qemu() {
            let problem = "the simulator has no model of QEMU: such a comparison needs KVM";
            return Some(problem.to_owned());
        }
        if let Some(problem) = self.cells.iter().find_map(Cell::unknown_to_simulator) {
            return Some(problem.to_owned());
        }
        let unknown = |workload: &Workload| {
            matches!(workload.guest, GuestProgram::Compute | GuestProgram::Kv)
        };
        let (name, workload) = self.used().find(|(_, workload)| unknown(workload))?;
        let all = self.names_of(|workload| unknown(workload));
        Some(format!(
            "the simulator has no model of the {} guest, which the workload '{name}' uses: \
             use writer or idle, or leave it out by --without {all}",
            workload.guest.name()
        ))
    }

    /// Names of workloads that some cell has and that are such, as they are left out.
    pub fn names_of(&self, is_such: impl Fn(&Workload) -> bool) -> String {
        let such = self.used().filter(|(_, workload)| is_such(workload));
        such.map(|(name, _)| name).collect::<Vec<_>>().join(",")
    }

    /// Workloads that some cell has.
    pub fn used(&self) -> impl Iterator<Item = (&str, &Workload)> {
        let used = |name: &str| self.cells.iter().any(|cell| cell.workload == name);
        let workloads = self.workloads.iter();
        workloads
            .filter(move |(name, _)| used(name))
            .map(|(name, workload)| (name.as_str(), workload))
    }

    /// The links over which guests with clients are moved.
    pub fn served_links(&self) -> impl Iterator<Item = Option<u64>> {
        let serves = |cell: &&Cell| self.workloads[&cell.workload].guest.serves();
        self.cells.iter().filter(serves).map(|cell| cell.link)
    }
}

/// The file as it is typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanFile {
    question: String,
    #[serde(default)]
    bed: BedKind,
    #[serde(default = "seed_default")]
    seed: u64,
    #[serde(default = "repeats_default")]
    repeats: u32,
    #[serde(default = "downtime_max_default")]
    downtime_max: Text<Milliseconds>,
    #[serde(default = "verify_default")]
    verify: bool,
    workloads: BTreeMap<String, WorkloadTable>,
    matrix: Vec<MatrixTable>,
}

/// One `[[matrix]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MatrixTable {
    #[serde(default)]
    vmm: Vmm,
    row: Option<String>,
    techniques: Option<Vec<Mode>>,
    variants: Option<Vec<Variant>>,
    downtime_limits: Option<Vec<Text<Milliseconds>>>,
    cancel_after: Option<Text<Milliseconds>>,
    workloads: Vec<String>,
    memory: Vec<Text<Size>>,
    #[serde(default = "vcpus_default")]
    vcpus: Vec<u8>,
    #[serde(default = "links_default")]
    links: Vec<Text<Link>>,
    streams: Option<Vec<Streams>>,
    compress: Option<Vec<Compression>>,
    #[serde(default = "only_default")]
    pages: Vec<Backing>,
    #[serde(default = "only_default")]
    dirty_trackers: Vec<TrackerKind>,
    #[serde(default = "only_default")]
    push_orders: Vec<PushOrder>,
    #[serde(default = "only_default")]
    throttles: Vec<Throttling>,
    #[serde(default = "only_default")]
    defers: Vec<Deferral>,
    #[serde(default = "only_default")]
    tls: Vec<bool>,
    #[serde(default = "deadlines_default")]
    deadlines: Vec<Text<OrNone<Milliseconds>>>,
    #[serde(default = "rounds_default")]
    rounds: Vec<u32>,
}

/// Who moves the guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Vmm {
    #[default]
    Limosa,
    Qemu,
}

/// A rate, or `unlimited`.
#[derive(Clone, Copy, Debug)]
struct Link(Option<u64>);

impl std::str::FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let rate = text.parse().map(|rate: Rate| Self(Some(rate.get())));
        rate.map_err(|error| format!("{error}; or unlimited"))
    }
}

const fn seed_default() -> u64 {
    1
}

const fn repeats_default() -> u32 {
    3
}

/// As `limosa demo` and `limosa migrate`.
fn downtime_max_default() -> Text<Milliseconds> {
    Text(parsed("5ms"))
}

const fn defer_before() -> Deferral {
    Deferral::Off
}

const fn verify_default() -> bool {
    true
}

fn vcpus_default() -> Vec<u8> {
    vec![1]
}

fn links_default() -> Vec<Text<Link>> {
    vec![Text(Link(None))]
}

/// Who leaves an axis out has what is usual.
fn only_default<T: Default>() -> Vec<T> {
    vec![T::default()]
}

fn deadlines_default() -> Vec<Text<OrNone<Milliseconds>>> {
    vec![Text(OrNone::None)]
}

fn rounds_default() -> Vec<u32> {
    vec![rounds_max_default()]
}

/// As the daemon's.
fn rounds_max_default() -> u32 {
    Limits::default().rounds_max
}

fn parsed<T: std::str::FromStr<Err = String>>(text: &str) -> T {
    text.parse().expect("a default is of its own form")
}

fn form_error(text: &str, error: &toml::de::Error) -> PlanError {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = &text.as_bytes()[..start];
    PlanError::Form {
        line: 1 + before.iter().filter(|byte| **byte == b'\n').count(),
        message: error.message().replace('\n', "; "),
    }
}

impl PlanFile {
    fn into_plan(self) -> Result<Plan, String> {
        if self.question.trim().is_empty() {
            return Err("question is empty: say what the experiment shall answer".to_owned());
        }
        if self.repeats == 0 {
            return Err("repeats is 0: at least one run of each cell is needed".to_owned());
        }
        let mut workloads = BTreeMap::new();
        for (name, table) in self.workloads {
            let workload = table.into_workload(&name)?;
            workloads.insert(name, workload);
        }
        let mut cells = Vec::new();
        for (number, matrix) in (1..).zip(&self.matrix) {
            matrix
                .add_cells(&workloads, &mut cells)
                .map_err(|error| format!("matrix {number}: {error}"))?;
        }
        if cells.is_empty() {
            return Err("there is no [[matrix]], so nothing to run".to_owned());
        }
        let runs = cells.len().saturating_mul(self.repeats as usize);
        if runs > RUNS_MAX {
            return Err(format!(
                "{} cells with {} repeats are {runs} runs, at most {RUNS_MAX}: shorten a list",
                cells.len(),
                self.repeats
            ));
        }
        Ok(Plan {
            question: self.question.trim().to_owned(),
            bed: self.bed,
            seed: self.seed,
            repeats: self.repeats,
            downtime_max: self.downtime_max.0,
            verify: self.verify,
            workloads,
            cells,
        })
    }
}

impl MatrixTable {
    /// Adds the cells of this matrix.
    fn add_cells(
        &self,
        workloads: &BTreeMap<String, Workload>,
        cells: &mut Vec<Cell>,
    ) -> Result<(), String> {
        let ways = self.ways()?;
        for index in 0..self.check(workloads, ways.len())? {
            let cell = self.cell(index, &ways);
            if cells.contains(&cell) {
                return Err(format!("{cell} stands there twice"));
            }
            cells.push(cell);
        }
        Ok(())
    }

    /// The cell of that index: a number whose digits choose from the lists, the last one a way.
    fn cell(&self, index: usize, ways: &[Way]) -> Cell {
        let mut rest = index;
        let mut digit = |base: usize| {
            let digit = rest % base;
            rest /= base;
            digit
        };
        let way = &ways[digit(ways.len())];
        Cell {
            technique: way.technique,
            compress: way.compress,
            streams: way.streams,
            qemu: way.qemu,
            row: self.row.clone(),
            pages: self.pages[digit(self.pages.len())],
            dirty_tracker: self.dirty_trackers[digit(self.dirty_trackers.len())],
            push_order: self.push_orders[digit(self.push_orders.len())],
            throttle: self.throttles[digit(self.throttles.len())],
            defer: self.defers[digit(self.defers.len())],
            tls: self.tls[digit(self.tls.len())],
            deadline_ms: match self.deadlines[digit(self.deadlines.len())].0 {
                OrNone::Some(deadline) => Some(deadline.get() as u64),
                OrNone::None => None,
            },
            rounds_max: self.rounds[digit(self.rounds.len())],
            link: self.links[digit(self.links.len())].0.0,
            vcpus: self.vcpus[digit(self.vcpus.len())],
            memory_bytes: self.memory[digit(self.memory.len())].0.bytes(),
            workload: self.workloads[digit(self.workloads.len())].clone(),
        }
    }

    /// How many cells it has.
    fn check(&self, workloads: &BTreeMap<String, Workload>, ways: usize) -> Result<usize, String> {
        let lists = [
            ("ways", ways),
            ("workloads", self.workloads.len()),
            ("memory", self.memory.len()),
            ("vcpus", self.vcpus.len()),
            ("links", self.links.len()),
            ("pages", self.pages.len()),
            ("dirty_trackers", self.dirty_trackers.len()),
            ("push_orders", self.push_orders.len()),
            ("throttles", self.throttles.len()),
            ("defers", self.defers.len()),
            ("tls", self.tls.len()),
            ("deadlines", self.deadlines.len()),
            ("rounds", self.rounds.len()),
        ];
        if let Some((name, _)) = lists.iter().find(|(_, len)| *len == 0) {
            return Err(format!("{name} is empty"));
        }
        let cells = lists
            .iter()
            .fold(1, |cells: usize, (_, len)| cells.saturating_mul(*len));
        if cells > RUNS_MAX {
            return Err(format!("{cells} cells, at most {RUNS_MAX}: shorten a list"));
        }
        if let Some(vcpus) = self.vcpus.iter().find(|one| !(1..=8).contains(*one)) {
            return Err(format!("vcpus has {vcpus}: a guest has 1 to 8"));
        }
        self.check_limits()?;
        for name in &self.workloads {
            let Some(workload) = workloads.get(name) else {
                let known: Vec<&str> = workloads.keys().map(String::as_str).collect();
                let known = known.join(", ");
                return Err(format!("there is no workload '{name}'; known are {known}"));
            };
            if workload.guest.serves() {
                self.check_serving(name)?;
            }
            let touched = workload.touched_bytes();
            let small = self
                .memory
                .iter()
                .find(|memory| memory.0.bytes() <= touched);
            if let Some(memory) = small {
                return Err(format!(
                    "the workload '{name}' touches {}, which does not fit into a memory of {}",
                    ByteCount::new(touched),
                    ByteCount::new(memory.0.bytes()),
                ));
            }
        }
        Ok(cells)
    }

    /// Whether a guest with clients can be moved so.
    fn check_serving(&self, name: &str) -> Result<(), String> {
        if self.vmm == Vmm::Qemu {
            return Err(format!(
                "the workload '{name}' has clients, who reach no guest of QEMU: leave it out of workloads"
            ));
        }
        match self.vcpus.iter().find(|one| **one != 1) {
            None => Ok(()),
            Some(vcpus) => Err(format!(
                "vcpus has {vcpus}: the guest kv of the workload '{name}' has 1"
            )),
        }
    }

    /// Whether a daemon takes its deadlines and rounds.
    fn check_limits(&self) -> Result<(), String> {
        for deadline in &self.deadlines {
            if let OrNone::Some(deadline) = deadline.0
                && (deadline.get() < 1.0 || deadline.get().fract() != 0.0)
            {
                let value = deadline.get();
                return Err(format!(
                    "deadlines has {value} ms: a deadline is whole milliseconds, 1 or more, or none"
                ));
            }
        }
        if self.rounds.contains(&0) {
            return Err(
                "rounds has 0: give 1 or more, or use stop-and-copy or post-copy".to_owned(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
