//! A directory of results, which outlives whatever ends the program.
//!
//! ```text
//!  plan.toml      the plan as it was given; results of another one are refused
//!  starts.jsonl   a line each time the program begins: command, version, machine
//!  results.jsonl  a line for each run, written out before the next run begins
//! ```
//!
//! A run that stands in the file is not made again. A last line without an end is what a kill leaves
//! and is dropped; anything else that cannot be read is an error, since it was not written here.
//!
//! Invariants: real and simulated results never meet in one directory; while one program writes to
//! it no other one does.
//!
//! Deliberately absent: deleting results.

mod lines;
mod timestamp;

use crate::machine::Machine;
use crate::plan::{Cell, Plan, PlanError};
use crate::record::MoveRecord;
use crate::schedule::Run;
use lines::Lines;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use timestamp::timestamp;

/// One start of the program on a directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// When, in UTC.
    pub begun: String,
    /// The command line.
    pub command: String,
    /// Version of the program.
    pub version: String,
    /// The commit that it was built from; `unknown` if nobody could say.
    pub commit: String,
    /// What it ran on.
    pub machine: Machine,
    /// Whether its moves happen in the simulator.
    pub simulated: bool,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Its place in the order of the plan, counted from 1.
    pub number: u32,
    /// Which start of the program made it, counted from 1.
    pub start: usize,
    /// What was moved, and how.
    pub cell: Cell,
    /// Which run of its cell it is, counted from 1.
    pub repeat: u32,
    /// When it was over, in UTC.
    pub finished: String,
    /// Why there is no measurement; such a run is made again.
    pub failure: Option<String>,
    /// The measurement.
    pub record: Option<MoveRecord>,
}

/// What a directory holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// The plan.
    pub plan: Plan,
    /// The same as it was given.
    pub plan_text: String,
    /// The starts in order.
    pub starts: Vec<Start>,
    /// The newest result of each run, by number.
    pub runs: Vec<RunResult>,
}

impl Results {
    /// Whether they come from the simulator.
    pub fn are_simulated(&self) -> bool {
        self.starts.iter().any(|start| start.simulated)
    }

    /// The start that made a run, if it is there.
    pub fn start_of(&self, run: &RunResult) -> Option<&Start> {
        self.starts.get(run.start.checked_sub(1)?)
    }

    /// Keeps of each run only what was said last, in the order of the plan.
    fn newest(mut runs: Vec<RunResult>) -> Vec<RunResult> {
        let mut seen = HashSet::new();
        runs.reverse();
        runs.retain(|run| seen.insert((run.cell.clone(), run.repeat)));
        runs.sort_by_key(|run| run.number);
        runs
    }
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or the directory itself.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another plan's results.
    #[error(
        "{path} holds results of another plan, whose question is '{question}': give another \
         --out, or the plan that stands in its plan.toml"
    )]
    ForeignPlan {
        /// The directory.
        path: PathBuf,
        /// What that plan asks.
        question: String,
    },
    /// Results that belong to no plan.
    #[error("{path} has a results.jsonl and no plan.toml: give another --out")]
    NoPlan {
        /// The directory.
        path: PathBuf,
    },
    /// Its plan was changed.
    #[error("{path}/plan.toml is no plan")]
    BadPlan {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: PlanError,
    },
    /// Real and simulated results would meet.
    #[error("{path} holds {held} results and this would add {new} ones: give another --out")]
    OtherBed {
        /// The directory.
        path: PathBuf,
        /// What is there.
        held: &'static str,
        /// What would be added.
        new: &'static str,
    },
    /// Another program is at work.
    #[error("{path} is in use: another lab run writes to it")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// A line that nobody here wrote.
    #[error("{path} line {line} cannot be read: {message}")]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why not.
        message: String,
    },
    /// Nothing is there.
    #[error(
        "{path} holds no results: it has no plan.toml ('limosa lab run PLAN --out {path}' makes it)"
    )]
    Nothing {
        /// The directory.
        path: PathBuf,
    },
}

/// A directory that is being written to.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    results: Results,
    lines: Lines,
    done: HashSet<(Cell, u32)>,
}

impl Store {
    /// Opens a directory for a plan, or makes it.
    ///
    /// # Errors
    /// It holds something else, or cannot be written.
    pub fn open(
        directory: &Path,
        text: &str,
        plan: &Plan,
        start: Start,
    ) -> Result<Self, StoreError> {
        fs::create_dir_all(directory).map_err(|error| file_error("make", directory, error))?;
        // Locked before anything is looked at, so that of two programs only one sees it as new.
        let results_path = directory.join(RESULTS);
        let had_results = results_path.exists();
        let mut lines = Lines::open(&results_path)?;
        if !lines.lock()? {
            return Err(StoreError::InUse {
                path: directory.to_owned(),
            });
        }
        let plan_text = claim(directory, text, plan, had_results)?;
        let mut start_lines = Lines::open(&directory.join(STARTS))?;
        let mut starts: Vec<Start> = start_lines.read()?;
        check_bed(directory, &starts, &start)?;
        start_lines.append(&start)?;
        starts.push(start);
        let runs = Results::newest(lines.read()?);
        let measured = runs.iter().filter(|run| run.record.is_some());
        Ok(Self {
            directory: directory.to_owned(),
            done: measured.map(|run| (run.cell.clone(), run.repeat)).collect(),
            results: Results {
                plan: plan.clone(),
                plan_text,
                starts,
                runs,
            },
            lines,
        })
    }

    /// Whether this run has been measured.
    pub fn has(&self, run: &Run) -> bool {
        let cell = &self.results.plan.cells[run.cell_index];
        self.done.contains(&(cell.clone(), run.repeat))
    }

    /// Writes down a run; when this returns it will be found again.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(
        &mut self,
        run: &Run,
        finished: String,
        measured: Result<MoveRecord, String>,
    ) -> Result<&RunResult, StoreError> {
        let cell = self.results.plan.cells[run.cell_index].clone();
        let (record, failure) = match measured {
            Ok(record) => (Some(record), None),
            Err(failure) => (None, Some(failure)),
        };
        let result = RunResult {
            number: run.number,
            start: self.results.starts.len(),
            cell,
            repeat: run.repeat,
            finished,
            failure,
            record,
        };
        self.lines.append(&result)?;
        if result.record.is_some() {
            self.done.insert((result.cell.clone(), run.repeat));
        }
        self.results.runs.push(result);
        Ok(self.results.runs.last().expect("it was just put there"))
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Ends writing; all that is there now.
    pub fn into_results(self) -> Results {
        let runs = Results::newest(self.results.runs);
        Results {
            runs,
            ..self.results
        }
    }
}

/// Reads a directory and changes nothing; a torn last line is overlooked.
///
/// # Errors
/// It holds no results, or some that cannot be read.
pub fn read(directory: &Path) -> Result<Results, StoreError> {
    let (plan, plan_text) = read_plan(directory)?.ok_or_else(|| StoreError::Nothing {
        path: directory.to_owned(),
    })?;
    Ok(Results {
        plan,
        plan_text,
        starts: lines::read(&directory.join(STARTS))?,
        runs: Results::newest(lines::read(&directory.join(RESULTS))?),
    })
}

const PLAN: &str = "plan.toml";
const STARTS: &str = "starts.jsonl";
const RESULTS: &str = "results.jsonl";

/// Makes sure that the directory belongs to this plan; its text as it stands there.
fn claim(
    directory: &Path,
    text: &str,
    plan: &Plan,
    had_results: bool,
) -> Result<String, StoreError> {
    match read_plan(directory)? {
        Some((there, its_text)) if there == *plan => Ok(its_text),
        Some((there, _)) => Err(StoreError::ForeignPlan {
            path: directory.to_owned(),
            question: there.question,
        }),
        None if had_results && is_used(directory) => Err(StoreError::NoPlan {
            path: directory.to_owned(),
        }),
        None => {
            // Renamed into place, so that a plan that is there is whole.
            let (path, draft) = (directory.join(PLAN), directory.join("plan.toml.new"));
            fs::write(&draft, text).map_err(|error| file_error("write", &draft, error))?;
            fs::rename(&draft, &path).map_err(|error| file_error("write", &path, error))?;
            Ok(text.to_owned())
        }
    }
}

/// A program that was killed between making the file and writing its plan leaves an empty one.
fn is_used(directory: &Path) -> bool {
    fs::metadata(directory.join(RESULTS)).is_ok_and(|file| file.len() > 0)
}

fn read_plan(directory: &Path) -> Result<Option<(Plan, String)>, StoreError> {
    let path = directory.join(PLAN);
    match fs::read_to_string(&path) {
        Ok(text) => Plan::parse(&text)
            .map(|plan| Some((plan, text)))
            .map_err(|source| StoreError::BadPlan {
                path: directory.to_owned(),
                source,
            }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error("read", &path, error)),
    }
}

fn check_bed(directory: &Path, starts: &[Start], start: &Start) -> Result<(), StoreError> {
    let name = |simulated| if simulated { "simulated" } else { "real" };
    let other = starts.iter().find(|one| one.simulated != start.simulated);
    other.map_or(Ok(()), |other| {
        Err(StoreError::OtherBed {
            path: directory.to_owned(),
            held: name(other.simulated),
            new: name(start.simulated),
        })
    })
}

fn file_error(what: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
