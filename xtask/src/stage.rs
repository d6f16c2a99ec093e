//! The stages of a check, one after the other, each with its time.
//!
//! A stage that fails does not stop the next: one run names all that is wrong. Everything that is
//! started inherits our input and output, but not what Cargo told us about this package, which
//! would make some build scripts run again.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::test_run::{self, Counts};
use crate::workspace::{self, GUEST_PROGRAMS};
use crate::{debian, tidy};

/// Everything, as the machine does it. The counts of the tests are the last line that it prints.
pub fn ci(root: &Path) -> Result<bool> {
    let mut counts = Counts::default();
    let mut stages = Stages::default();
    stages.run("packages", || debian::ensure_installed().map(|()| true));
    stages.run("format", || format(root, true));
    stages.run("lint", || lint(root));
    stages.run("tidy", || tidy(root));
    stages.run("test", || {
        let (passed, sums) = test_run::all(root)?;
        counts = sums;
        Ok(passed)
    });
    let passed = stages.print();
    println!("{counts}");
    Ok(passed)
}

/// Formats all code, or says what is not formatted.
pub fn format(root: &Path, check: bool) -> Result<bool> {
    let mode: &[&str] = if check { &["--check"] } else { &[] };
    let own = run_cargo(root, &[&["fmt", "--all"], mode].concat())?;
    let guests = ["fmt", "--all", "--manifest-path", GUEST_PROGRAMS];
    let guests = run_cargo(root, &[&guests, mode].concat())?;
    Ok(own && guests)
}

/// Clippy over all targets of both workspaces, with warnings as errors.
pub fn lint(root: &Path) -> Result<bool> {
    let strict = ["--", "-D", "warnings"];
    let own = ["clippy", "--workspace", "--all-targets"];
    let own = run_cargo(root, &[&own[..], &strict].concat())?;
    let target = guest_target(root)?;
    // Locked, because the build script of limosa-micro builds them so. Not `--all-targets`, which
    // gives a test harness to programs that bring their own panic handler.
    let guests = [
        "clippy",
        "--workspace",
        "--locked",
        "--lib",
        "--bins",
        "--tests",
    ];
    let place = ["--manifest-path", GUEST_PROGRAMS, "--target-dir", &target];
    Ok(run_cargo(root, &[&guests[..], &place, &strict].concat())? && own)
}

/// Prints what tidy finds.
pub fn tidy(root: &Path) -> Result<bool> {
    let findings = tidy::run(root)?;
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} findings", findings.len());
    Ok(findings.is_empty())
}

/// All tests, with their counts as the last line.
pub fn test(root: &Path) -> Result<bool> {
    let (passed, counts) = test_run::all(root)?;
    println!("{counts}");
    Ok(passed)
}

/// A cargo command in the project's directory, not yet started.
pub fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(workspace::cargo());
    command.args(arguments).current_dir(root);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Where the guest programs are built: apart, since another profile and linker script hold there.
pub fn guest_target(root: &Path) -> Result<String> {
    let directory = workspace::target_directory(root)?.join("guest-programs");
    directory
        .into_os_string()
        .into_string()
        .ok()
        .context("the target directory is no UTF-8")
}

fn run_cargo(root: &Path, arguments: &[&str]) -> Result<bool> {
    println!("$ cargo {}", arguments.join(" "));
    let status = cargo(root, arguments)
        .status()
        .context("cargo could not be started")?;
    Ok(status.success())
}

/// What has run so far.
#[derive(Default)]
struct Stages {
    done: Vec<(&'static str, bool, Duration)>,
}

impl Stages {
    fn run(&mut self, name: &'static str, work: impl FnOnce() -> Result<bool>) {
        println!("\n== {name}");
        let start = Instant::now();
        let passed = work().unwrap_or_else(|error| {
            println!("error: {error:#}");
            false
        });
        self.done.push((name, passed, start.elapsed()));
    }

    /// Prints the times; whether all have passed.
    fn print(&self) -> bool {
        println!();
        for (name, passed, time) in &self.done {
            let word = if *passed { "ok" } else { "FAILED" };
            println!("{name:<10} {:>7.1} s  {word}", time.as_secs_f64());
        }
        let total: Duration = self.done.iter().map(|(_, _, time)| *time).sum();
        println!("{:<10} {:>7.1} s", "total", total.as_secs_f64());
        self.done.iter().all(|(_, passed, _)| *passed)
    }
}
