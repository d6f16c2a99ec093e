//! `limosa cert`: makes the certificates with which hosts believe each other.

use crate::arguments::Format;
use crate::output::Output;
use clap::{Args, Subcommand};
use limosa_host::certificates::{CA_DAYS, DAYS_MAX, HOST_DAYS, make_authority, make_host};
use serde::Serialize;
use std::path::PathBuf;

/// Make the certificates with which hosts believe each other
///
/// First an authority, once, anywhere; its key stays there. Then for each host a directory that it
/// signs, which is copied to that host and given to 'limosa host --tls'.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// What to make
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  limosa cert ca --dir ca
  limosa cert host a.example 192.0.2.1 --ca ca --out a
  limosa cert host b.example 192.0.2.2 --ca ca --out b
  limosa host --listen 192.0.2.1:7070 --tls a

docs/encryption.md explains what is checked.";

/// What can be made.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an authority: ca.pem, which every host has, and ca.key, which none needs
    #[command(
        after_help = "Examples:\n  limosa cert ca --dir ca\n  limosa cert ca --dir ca --days 730"
    )]
    Ca(Ca),
    /// Make what one host needs: ca.pem, host.pem and host.key
    ///
    /// A certificate is for the names and addresses by which other hosts reach this one: what stands
    /// before the port in 'limosa migrate VM --to HOST:PORT'.
    #[command(after_help = "\
Examples:
  limosa cert host a.example --ca ca --out a
  limosa cert host a.example a 192.0.2.1 2001:db8::1 --ca ca --out a --days 90")]
    Host(Host),
}

/// An authority.
#[derive(Debug, Args)]
pub(crate) struct Ca {
    /// Directory for ca.pem and ca.key; made if it is not there
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Days for which it is valid
    #[arg(long, value_name = "N", default_value_t = CA_DAYS, value_parser = clap::value_parser!(u32).range(1..=i64::from(DAYS_MAX)))]
    pub days: u32,
    /// Whether to answer with JSON
    #[command(flatten)]
    pub format: Format,
}

/// A host.
#[derive(Debug, Args)]
pub(crate) struct Host {
    /// DNS names and IP addresses of the host
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Directory of the authority
    #[arg(long, value_name = "DIR")]
    pub ca: PathBuf,
    /// Directory for ca.pem, host.pem and host.key; made if it is not there
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Days for which it is valid
    #[arg(long, value_name = "N", default_value_t = HOST_DAYS, value_parser = clap::value_parser!(u32).range(1..=i64::from(DAYS_MAX)))]
    pub days: u32,
    /// Whether to answer with JSON
    #[command(flatten)]
    pub format: Format,
}

/// What was made.
#[derive(Serialize)]
struct Made {
    /// The files.
    files: Vec<PathBuf>,
    /// Days for which it is valid.
    days: u32,
}

/// Makes it.
///
/// # Errors
/// One line: why it was not made.
pub(crate) fn run(arguments: &Arguments, output: impl Fn(bool) -> Output) -> anyhow::Result<()> {
    let (files, days, format, next) = match &arguments.command {
        Command::Ca(ca) => (
            make_authority(&ca.dir, ca.days)?,
            ca.days,
            ca.format,
            format!(
                "next, for each host: limosa cert host NAME… --ca {} --out DIR",
                ca.dir.display()
            ),
        ),
        Command::Host(host) => (
            make_host(&host.ca, &host.out, &host.names, host.days)?,
            host.days,
            host.format,
            format!(
                "next, on that host: limosa host --tls {}",
                host.out.display()
            ),
        ),
    };
    output(format.json).answer(&Made { files, days }, |made| {
        let files: Vec<String> = made
            .files
            .iter()
            .map(|file| file.display().to_string())
            .collect();
        format!("{}, valid for {} days\n{next}", files.join(" "), made.days)
    })
}
