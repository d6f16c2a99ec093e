//! `limosa demo`: the main job in one command, with nothing set up before.
//!
//! Two daemons on the loopback, a guest that proves its own memory, moves there and back by each
//! technique, a full check of the guest's memory after each move, a line for each and a table at
//! the end. What the hosts claim is laid beside what the guest itself and an outside observer saw.
//! Without KVM the same moves are made in the simulator, and said to be simulated.
//!
//! Invariants: nothing outlives the command, however it ends; status 0 means that every move was
//! completed, that no check of the guest failed and that digests were equal.

mod arguments;
#[cfg(test)]
mod sample;
mod schedule;
mod summary;
mod table;

pub(crate) use arguments::Arguments;

use crate::bed::{self, Bed, Interrupt, Interrupted};
use crate::output::{self, count, print};
use anyhow::{Context, bail};
use limosa_engine::policy::Mode;
use limosa_lab::machine::Machine;
use limosa_lab::record::Setup;
use limosa_pages::ByteCount;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;
use summary::{Record, Summary};

/// Runs the demo.
///
/// # Errors
/// One line: what went wrong, of the moves or of the demo itself.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let begun = Instant::now();
    let setup = arguments.setup()?;
    let modes = planned(arguments);
    // A file that cannot be written is better known before the measurement than after it.
    let file = arguments.json.as_deref().map(open).transpose()?;
    let interrupt = Interrupt::install()?;
    let machine = Machine::here();
    let (mut bed, simulated) = bed(arguments, &setup, &interrupt)?;
    let mut moves = Vec::new();
    let mut failure = None;
    for (number, mode) in (1..).zip(&modes) {
        interrupt.check()?;
        match bed.make_move(number, *mode, "     ") {
            Ok(record) => {
                print(&table::move_line(&record))?;
                let is_bad = record.problem(setup.verify).is_some();
                moves.push(record);
                if is_bad && !arguments.keep_going {
                    break;
                }
            }
            Err(error) if error.is::<Interrupted>() => return Err(error),
            Err(error) => {
                failure = Some(format!("move {number}: {error:#}"));
                break;
            }
        }
    }
    let growth = if failure.is_none() {
        bed.growth()?
    } else {
        None
    };
    drop(bed);
    let seconds = begun.elapsed().as_secs_f64();
    let summary = Summary::new(&moves, failure, setup.verify, growth, seconds);
    print(&format!("\n{}", table::table(&summary, setup.verify)))?;
    let verdict = output::verdict(&summary.problems);
    if let Some(file) = file {
        let record = Record {
            command: std::env::args().collect::<Vec<_>>().join(" "),
            version: env!("CARGO_PKG_VERSION"),
            machine,
            simulated,
            setup,
            moves,
            summary,
        };
        write(file, &record)?;
    }
    verdict
}

fn planned(arguments: &Arguments) -> Vec<Mode> {
    match arguments.moves {
        Some(moves) => schedule::mixed(&arguments.modes, moves, arguments.seed),
        None => schedule::in_turn(&arguments.modes, arguments.repeat),
    }
}

/// The bed, and whether it is the simulator.
fn bed(arguments: &Arguments, setup: &Setup, interrupt: &Interrupt) -> anyhow::Result<(Bed, bool)> {
    let without_kvm = if arguments.simulate {
        Some("--simulate was given".to_owned())
    } else {
        bed::kvm_problem()
    };
    if let Some(why) = without_kvm {
        if setup.tls {
            bail!("simulated: {why}; the simulator encrypts nothing: leave --tls out");
        }
        print(&format!("simulated: {why}\n{}", describe(setup)))?;
        return Ok((Bed::simulated(setup, &arguments.workload()?)?, true));
    }
    print(&format!("two hosts on the loopback, {}", describe(setup)))?;
    let bed = Bed::real(setup, interrupt)?;
    if let Some(speed) = bed.speed()? {
        let speed = count(speed.round() as u64);
        print(&format!(
            "the guest is ready on host a and does {speed} units of work a second"
        ))?;
    }
    Ok((bed, false))
}

fn describe(setup: &Setup) -> String {
    let link = setup.link.map_or_else(
        || "as fast as it goes".to_owned(),
        |link| format!("{} a second", ByteCount::new(link)),
    );
    format!(
        "guest {} ({}) with {} and {} vCPU, link {link}{}",
        setup.guest,
        setup.arguments,
        ByteCount::new(setup.memory_bytes),
        setup.vcpus,
        if setup.tls { ", encrypted" } else { "" },
    )
}

/// Opens the file and leaves what is in it: results replace it once there are some.
fn open(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

fn write(file: File, record: &Record) -> anyhow::Result<()> {
    if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        file.set_len(0).context("cannot replace the JSON file")?;
    }
    let mut file = BufWriter::new(file);
    serde_json::to_writer_pretty(&mut file, record).context("cannot write the JSON file")?;
    file.write_all(b"\n")
        .and_then(|()| file.flush())
        .context("cannot write the JSON file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_replace_a_file_and_a_failure_leaves_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.json");
        std::fs::write(&path, "earlier results").unwrap();
        drop(open(&path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "earlier results");
        assert!(open(directory.path()).is_err());
    }
}
