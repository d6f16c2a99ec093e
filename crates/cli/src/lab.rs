//! `limosa lab`: experiments that are described by a plan, can be interrupted, and end in a report.
//!
//! Each run has a bed of its own: two daemons (or two QEMUs) and a guest that has touched its memory, one move from
//! a to b, and everything is taken down again. With pushes in the recorded order the guest moves there and
//! back before, since there is nothing to go by without. So no run sees what an earlier one left in a daemon,
//! and each can stand at any place of the order. What is kept and how is `limosa-lab`'s matter.
//!
//! Invariants: a result is on disk before the next run begins; nothing outlives the command, however
//! it ends; status 0 means that every run of the plan was measured, that no check of a guest failed
//! and that digests were equal. A move that its technique did not complete is a result like others.
//!
//! Deliberately absent: repeating a run because its result is not liked.

mod arguments;
mod commit;
mod outcome;
mod progress;

pub(crate) use arguments::Arguments;

use crate::bed::host_pages::HostPages;
use crate::bed::qemu::program;
use crate::bed::{self, Bed, Interrupt, Interrupted};
use crate::output::Output;
use anyhow::{Context, Result, anyhow, bail, ensure};
use arguments::{Command, Run};
use limosa_clients::Lan;
use limosa_host::api::PushOrder;
use limosa_lab::backing::Backing;
use limosa_lab::machine::Machine;
use limosa_lab::plan::{self, BedKind, Plan};
use limosa_lab::record::{MoveRecord, Setup};
use limosa_lab::schedule;
use limosa_lab::store::{self, Start, Store, timestamp};
use outcome::Outcome;
use progress::Progress;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Runs that cannot be measured, one after the other, after which the next ones will not be either.
const FAILURES_MAX: u32 = 3;

/// Runs a plan, or writes the report of one.
///
/// # Errors
/// One line: what is wrong with the plan, with the directory, or with the results.
pub(crate) fn run(arguments: &Arguments, output: impl Fn(bool) -> Output) -> Result<()> {
    match &arguments.command {
        Command::Run(run) => make_runs(run, output(run.format.json)),
        Command::Report(report) => {
            let results = store::read(&report.directory)?;
            Outcome::write(&report.directory, &results, 0)?.print(output(report.format.json))
        }
    }
}

fn make_runs(arguments: &Run, output: Output) -> Result<()> {
    let (text, plan) = read_plan(&arguments.plan, &arguments.without)?;
    let simulated = is_simulated(&plan, arguments.simulate)?;
    let way = Way {
        simulated,
        qemu: arguments
            .qemu
            .clone()
            .unwrap_or_else(|| program::USUAL.into()),
        interrupt: Interrupt::install()?,
    };
    if plan.has_qemu() {
        program::check(&way.qemu)?;
    }
    if !simulated {
        check_machine(&plan)?;
    }
    let start = Start {
        begun: timestamp(SystemTime::now()),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: commit::of_this_program(),
        machine: Machine::here(),
        simulated,
    };
    let mut store = Store::open(&arguments.out, &text, &plan, start)?;
    let made = experiment(&plan, &way, &mut store)?;
    let results = store.into_results();
    let outcome = Outcome::write(&arguments.out, &results, made)?;
    outcome.print(output)?;
    outcome.verdict()
}

/// Whether this user may do here what runs of the plan need.
fn check_machine(plan: &Plan) -> Result<()> {
    for backing in Backing::ALL {
        if plan.cells.iter().any(|cell| cell.pages == backing) {
            HostPages::check(backing)?;
        }
    }
    let links: BTreeSet<Option<u64>> = plan.served_links().collect();
    for link in links {
        if let Some(problem) = Lan::problem(link) {
            let names = plan.names_of(|workload| workload.guest.serves());
            bail!(
                "the clients of {names} need a network of their own, and {problem}; --without {names} leaves them out"
            );
        }
    }
    Ok(())
}

/// How all runs are made.
struct Way {
    simulated: bool,
    /// The program of the comparison.
    qemu: PathBuf,
    interrupt: Interrupt,
}

/// Makes the runs that are missing; how many that were.
fn experiment(plan: &Plan, way: &Way, store: &mut Store) -> Result<usize> {
    let missing = schedule::runs(plan);
    let missing: Vec<_> = missing.into_iter().filter(|run| !store.has(run)).collect();
    let mut progress = Progress::begin(plan, missing.len());
    let mut failures = 0;
    for run in &missing {
        let cell = &plan.cells[run.cell_index];
        let title = progress.starting(cell);
        let measured = measure(plan, run, way, &title);
        // What failed because somebody wants to end is no result.
        if way.interrupt.check().is_err()
            || measured.as_ref().is_err_and(|one| one.is::<Interrupted>())
        {
            let (done, runs) = (progress.done(), plan.runs());
            bail!(
                "interrupted with {done} of {runs} runs done; daemons and guest were stopped: the \
                 same command goes on from there, 'limosa lab report {}' shows what there is",
                store.directory().display()
            );
        }
        let measured = measured.map_err(|error| format!("{error:#}"));
        let result = store.add(run, timestamp(SystemTime::now()), measured)?;
        progress.ended(result);
        failures = if result.record.is_some() {
            0
        } else {
            failures + 1
        };
        if let Some(failure) = result.failure.as_ref().filter(|_| failures == FAILURES_MAX) {
            bail!(
                "{failures} runs in a row could not be measured, the last one because: {failure} \
                 (the same command tries them again)"
            );
        }
    }
    Ok(missing.len())
}

/// One run on a bed of its own.
fn measure(plan: &Plan, run: &schedule::Run, way: &Way, title: &str) -> Result<MoveRecord> {
    let cell = &plan.cells[run.cell_index];
    let workload = &plan.workloads[&cell.workload];
    // Other choices of the guest in each repeat, and the same ones for all cells of it.
    let seed = plan.seed.wrapping_add(u64::from(run.repeat));
    let setup = Setup {
        guest: workload.guest.name().to_owned(),
        arguments: workload.arguments(seed),
        memory_bytes: cell.memory_bytes,
        vcpus: cell.vcpus,
        pages: cell.pages,
        dirty_tracker: cell.dirty_tracker,
        link: cell.link,
        streams: Some(cell.streams),
        compress: cell.compress,
        throttle: cell.throttle,
        defer: cell.defer,
        push_order: cell.push_order,
        tls: cell.tls,
        deadline_ms: cell.deadline_ms,
        rounds_max: Some(cell.rounds_max),
        downtime_max_ms: plan.downtime_max.get(),
        verify: plan.verify,
        seed,
        clients: workload.clients,
    };
    let mut bed = match cell.qemu {
        _ if way.simulated => Bed::simulated(&setup, workload)?,
        Some(qemu) => Bed::qemu(&setup, qemu, &way.qemu, &way.interrupt)?,
        None => Bed::real(&setup, &way.interrupt)?,
    };
    if cell.push_order == PushOrder::Recorded {
        let earlier = ["there, to be recorded", "back, to be recorded"];
        for way in earlier {
            let made = bed.make_move(run.number, cell.technique, &format!("{title} ({way})"))?;
            ensure!(
                made.is_completed(),
                "a move {way}, ended otherwise: {}",
                made.outcome
            );
        }
    }
    bed.make_move(run.number, cell.technique, title)
}

/// The plan and its text, but for these workloads.
fn read_plan(path: &Path, without: &[String]) -> Result<(String, Plan)> {
    let shown = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    let text = plan::without(&text, without).map_err(|error| anyhow!("{shown}: {error}"))?;
    let plan = Plan::parse(&text).map_err(|error| anyhow!("{shown}: {error}"))?;
    Ok((text, plan))
}

/// Whether the moves happen in the simulator, which is said plainly.
fn is_simulated(plan: &Plan, asked: bool) -> Result<bool> {
    let why = match plan.bed {
        BedKind::Simulated => Some("the plan asks for it".to_owned()),
        BedKind::Real if asked => Some("--simulate was given".to_owned()),
        BedKind::Real => bed::kvm_problem(),
    };
    let Some(why) = why else {
        return Ok(false);
    };
    eprintln!("simulated: {why}");
    match plan.simulator_problem() {
        Some(problem) => bail!("{problem}"),
        None => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_of_this_repository_can_be_carried_out() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plans");
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let (text, plan) = read_plan(&path, &[]).unwrap();
            let first = text.lines().next().unwrap_or_default();
            assert!(first.starts_with("# "), "{path:?} begins with its question");
            assert!(plan.question.ends_with('?'), "{path:?}");
            names.push(path.file_stem().unwrap().to_string_lossy().into_owned());
        }
        names.sort();
        let expect = [
            "dirty-tracking",
            "encryption",
            "non-convergence",
            "optimisations",
            "prepaging",
            "scale",
            "smoke",
            "techniques",
            "versus-qemu",
        ];
        assert_eq!(names, expect);
    }

    #[test]
    fn a_plan_that_cannot_be_read_is_named() {
        let said = read_plan(Path::new("nowhere.toml"), &[]).unwrap_err();
        assert!(said.to_string().contains("cannot read nowhere.toml"));
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "question = 1").unwrap();
        let said = read_plan(file.path(), &[]).unwrap_err().to_string();
        let said = said.replace(&file.path().display().to_string(), "PLAN");
        assert_eq!(
            said,
            "PLAN: line 1: invalid type: integer `1`, expected a string"
        );
    }
}
