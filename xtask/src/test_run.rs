//! Runs all tests and counts them.
//!
//! The counts come from what the test runners print, test by test, because no runner knows of a
//! test that looked around, found no `/dev/kvm`, printed `skipped: …` and returned. Such a test
//! counts as skipped, never as passed. Ignored tests count as skipped, too.
//!
//! ```text
//!   runner ──lines──▶ Reader (nextest or libtest) ──▶ Counts
//!                        └── prints what a person wants to see
//! ```
//!
//! Invariant: passed + failed + skipped is the number of tests that the runners know. A runner that
//! could not even build its tests counts as one failed test, so that nobody reads `0 failed` then.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::stage;
use crate::workspace::GUEST_PROGRAMS;

mod libtest;
mod nextest;

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ran and passed.
    pub passed: u64,
    /// Ran and failed.
    pub failed: u64,
    /// Did not run, or said that they could not check anything here.
    pub skipped: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(
            formatter,
            "{passed} passed, {failed} failed, {skipped} skipped"
        )
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Understands the lines of one test runner.
trait Reader {
    /// Takes one line, and answers whether a person should see it.
    fn line(&mut self, line: &str) -> bool;

    /// The counts after the last line.
    fn counts(&self) -> Counts;
}

/// Runs every test there is; whether all passed, and the sums.
pub fn all(root: &Path) -> Result<(bool, Counts)> {
    let guest_target = stage::guest_target(root)?;
    let show = ["--", "--show-output"];
    let guests = [
        "test",
        "--workspace",
        "--no-fail-fast",
        "--locked",
        "--manifest-path",
    ];
    let guests = [
        &guests[..],
        &[GUEST_PROGRAMS, "--target-dir", &guest_target],
        &show,
    ]
    .concat();
    let documentation = [
        &["test", "--workspace", "--doc", "--no-fail-fast"][..],
        &show,
    ]
    .concat();

    let mut sums = Counts::default();
    let mut passed = true;
    let mut add = |result: (bool, Counts)| {
        passed &= result.0;
        sums += result.1;
    };
    if has_nextest(root) {
        let tests = [
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--no-tests=pass",
        ];
        let output = ["--success-output=immediate", "--failure-output=immediate"];
        add(run(
            root,
            &[&tests[..], &output].concat(),
            nextest::Nextest::default(),
        )?);
    } else {
        let tests = ["test", "--workspace", "--all-targets", "--no-fail-fast"];
        add(run(
            root,
            &[&tests[..], &show].concat(),
            libtest::Libtest::default(),
        )?);
    }
    add(run(root, &documentation, libtest::Libtest::default())?);
    add(run(root, &guests, libtest::Libtest::default())?);
    Ok((passed, sums))
}

fn has_nextest(root: &Path) -> bool {
    let mut command = stage::cargo(root, &["nextest", "--version"]);
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Runs one command and reads both of its outputs, in the order in which it wrote them.
fn run(root: &Path, arguments: &[&str], mut reader: impl Reader) -> Result<(bool, Counts)> {
    println!("$ cargo {}", arguments.join(" "));
    let (output, input) = std::io::pipe().context("no pipe for the output")?;
    let mut command = stage::cargo(root, arguments);
    command
        .stdin(Stdio::null())
        .stdout(input.try_clone()?)
        .stderr(input);
    command
        .env("CARGO_TERM_COLOR", "never")
        .env("CARGO_TERM_PROGRESS_WHEN", "never");
    let mut child = command.spawn().context("cargo could not be started")?;
    // It holds the writing ends; as long as we did too, reading would never end.
    drop(command);
    let mut lines = BufReader::new(output);
    let mut bytes = Vec::new();
    while lines.read_until(b'\n', &mut bytes)? > 0 {
        let text = String::from_utf8_lossy(&bytes);
        let line = text.trim_end_matches(['\n', '\r']);
        if reader.line(line) {
            println!("{line}");
        }
        bytes.clear();
    }
    let status = child.wait()?;
    let mut counts = reader.counts();
    if !status.success() && counts.failed == 0 {
        println!("error: the tests could not be run: {status}");
        counts.failed = 1;
    }
    println!("{counts}");
    Ok((status.success(), counts))
}

/// Whether a test says with this line that it could not check anything here.
fn says_skipped(line: &str) -> bool {
    line.trim_start()
        .strip_prefix("skipped")
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([':', ' ', ',']))
}
