//! The program `limosa`: the daemon, the process of a virtual machine, and the commands.
//!
//! Ends with status 0 if what was asked for has happened, 1 with one line on standard error if it
//! has not, 2 for what cannot be understood.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod arguments;
mod bed;
mod cert;
mod commands;
mod console;
mod demo;
mod follow;
mod lab;
mod output;
mod run_file;

use arguments::{Arguments, Command};
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() && !asks_for_help(&error) => {
            eprintln!("{}", in_one_line(&error.to_string()));
            return ExitCode::from(2);
        }
        Err(error) => error.exit(),
    };
    log_to_stderr(&arguments.command);
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nothing at all was typed after the program's or a command's name: the help is the answer.
fn asks_for_help(error: &clap::Error) -> bool {
    error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
}

/// What clap says of wrong arguments, over several paragraphs, as the one line that every other
/// error is: without the usage, which `--help` shows.
fn in_one_line(said: &str) -> String {
    let told: Vec<String> = said
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|paragraph| !paragraph.is_empty() && !paragraph.starts_with("Usage:"))
        .filter(|paragraph| !paragraph.starts_with("For more information"))
        .collect();
    format!("{} ('--help' shows what is possible)", told.join("; "))
}

/// Commands answer and are quiet otherwise; the daemon and VM processes tell what they do.
fn log_to_stderr(command: &Command) {
    let level = match command {
        Command::Host(_) | Command::Vm(_) => "info",
        _ => "warn",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_arguments_are_told_in_one_line() {
        let error = Arguments::try_parse_from(["limosa", "migrate", "web"]).unwrap_err();
        assert_eq!(
            in_one_line(&error.to_string()),
            "error: the following required arguments were not provided: --to <HOST:PORT> \
             ('--help' shows what is possible)"
        );
        let error = Arguments::try_parse_from(["limosa", "migrat"]).unwrap_err();
        assert!(in_one_line(&error.to_string()).contains("; tip: a similar subcommand exists"));
    }
}
