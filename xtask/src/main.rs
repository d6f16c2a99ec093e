//! The project's own commands: `cargo xtask ci` checks everything that a machine can check.
//!
//! One program instead of scripts, so that a person and the machine that checks every change run
//! the same thing, and so that the checks have tests of their own.
//!
//! Absent on purpose: anything that builds or ships a release.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

mod debian;
mod rust_source;
mod stage;
mod test_run;
mod tidy;
mod tree;
mod workspace;

const HELP: &str = "\
Checks of the project limosa.

Usage: cargo xtask COMMAND

  ci             everything below, as the machine does it; the last line counts the tests
  fmt [--check]  format all code, or only say what is not formatted
  lint           clippy of all targets of both workspaces, warnings are errors
  tidy           sizes, names, dead files, citations, dependencies, hash of the wire format
  tidy --bless   write the hash of the wire format after docs/protocol.md was brought up to date
  test           all tests: unit, documentation, end to end, guest programs
  help           this text

Examples:
  cargo xtask ci
  cargo xtask fmt && cargo xtask tidy
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what was asked; false if a check failed and has said so.
fn run(words: &[&str]) -> Result<bool> {
    let root = root()?;
    match words {
        ["ci"] => stage::ci(&root),
        ["fmt"] => stage::format(&root, false),
        ["fmt", "--check"] => stage::format(&root, true),
        ["lint"] => stage::lint(&root),
        ["tidy"] => stage::tidy(&root),
        ["tidy", "--bless"] => tidy::bless(&root).map(|()| true),
        ["test"] => stage::test(&root),
        [] | ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(true)
        }
        _ => bail!(
            "unknown command '{}'; see cargo xtask help",
            words.join(" ")
        ),
    }
}

/// The root of the project: the directory above this package, wherever it was built.
fn root() -> Result<std::path::PathBuf> {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").context("start it with cargo: cargo xtask help")?;
    let root = std::path::Path::new(&package).join("..");
    root.canonicalize()
        .context("the project's directory cannot be found")
}
