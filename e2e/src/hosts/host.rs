//! A host as its run sees it: a process with a pipe for what its script prints, and a line for control.

use super::{HostError, failed};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::Child;
use std::sync::mpsc::Sender;
use std::thread;

const NAMES: [&str; 2] = ["host-a", "host-b"];
/// How much of a console is shown when something went wrong.
const LAST_LINES: usize = 40;

/// What a host says.
#[derive(Debug)]
pub(super) enum Told {
    /// Its script printed this.
    Line(String),
    /// It waits until the other is there, too.
    Barrier(String),
    /// Its script has ended.
    Status(i32),
}

/// The name of the host with that index.
pub(super) fn name(index: usize) -> &'static str {
    NAMES[index]
}

/// A host that runs.
pub(super) struct Host {
    index: usize,
    /// With it everything of the host ends.
    process: Child,
    control: File,
    /// Where it says what its script does not.
    logs: Vec<PathBuf>,
    pub(super) waits_at: Option<String>,
    /// Open as long as the host is there.
    held: Option<File>,
}

impl Host {
    /// Follows what a process says by these two.
    pub(super) fn follow(
        index: usize,
        process: Child,
        (output, control): (File, File),
        logs: Vec<PathBuf>,
        tell: Sender<(usize, Told)>,
    ) -> Result<Self, HostError> {
        let host = Self {
            index,
            process,
            control,
            logs,
            waits_at: None,
            held: None,
        };
        let control = host.control.try_clone();
        follow(
            index,
            output,
            control.map_err(failed("share a line"))?,
            tell,
        );
        Ok(host)
    }

    /// The same, with a file that stays open with it.
    pub(super) fn holding(mut self, file: File) -> Self {
        self.held = Some(file);
        self
    }

    pub(super) fn name(&self) -> &'static str {
        name(self.index)
    }

    /// Its process here.
    pub(super) fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Lets it go on from its barrier.
    pub(super) fn go_on(&mut self) -> Result<(), HostError> {
        self.control
            .write_all(b"go\n")
            .map_err(failed("tell a host to go on"))
    }

    /// An error if it has ended.
    pub(super) fn check_alive(&mut self) -> Result<(), HostError> {
        match self.process.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(HostError(format!("{} has died: {status}", self.name()))),
            Err(error) => Err(failed("look after a host")(error)),
        }
    }

    /// The end of what it said beside its script.
    pub(super) fn last_words(&self) -> String {
        let text = self.logs.iter().map(|path| {
            let bytes = fs::read(path).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\r', "")
        });
        let text: Vec<String> = text.collect();
        let lines: Vec<String> = text
            .iter()
            .flat_map(|text| text.lines())
            .map(|line| format!("{} console| {line}", self.name()))
            .collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

pub(super) fn end(process: &mut Child) {
    if let Err(error) = process.kill().and_then(|()| process.wait()) {
        eprintln!("a host does not end: {error}");
    }
}

/// Tells what a host prints and says. A host waits a little between the last that it prints and its status.
fn follow(index: usize, output: File, control: File, tell: Sender<(usize, Told)>) {
    let lines = tell.clone();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_owned();
            if lines.send((index, Told::Line(line))).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for line in BufReader::new(control).lines().map_while(Result::ok) {
            let told = match line.split_once(' ') {
                Some(("barrier", name)) => Told::Barrier(name.to_owned()),
                Some(("exit", status)) => Told::Status(status.trim().parse().unwrap_or(1)),
                _ => continue,
            };
            if tell.send((index, told)).is_err() {
                return;
            }
        }
    });
}
