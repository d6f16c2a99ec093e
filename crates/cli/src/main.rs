//! The program `limosa`: the daemon, the process of a virtual machine, and the commands.
//!
//! Ends with status 0 if what was asked for has happened, 1 with one line on standard error if it
//! has not, 2 for what cannot be understood.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod arguments;
mod commands;
mod demo;
mod follow;
mod output;
mod values;

use arguments::{Arguments, Command};
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log_to_stderr(&arguments.command);
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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
