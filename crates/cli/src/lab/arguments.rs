//! What can be asked of the lab.

use crate::arguments::Format;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Run experiments that are described by a plan, and report on them
///
/// A plan names a question, workloads, and a matrix of techniques, links, memory sizes and streams.
/// Plans come with limosa in the directory plans; docs/lab.md explains them and the results.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  limosa lab run plans/techniques.toml --out techniques
  limosa lab report techniques")]
pub(crate) struct Arguments {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of the lab.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make the runs of a plan that are not yet in a directory, then write the report
    ///
    /// Each run starts two daemons (or two QEMUs) and a guest on this machine, moves the guest once and
    /// takes everything down. Results are kept as they come: interrupted with Ctrl-C or killed, the same
    /// command goes on where it was. Ends with status 0 only if every run was measured and not a byte
    /// of a guest changed; a move that its technique did not complete is a result.
    #[command(after_help = "\
Examples:
  limosa lab run plans/techniques.toml --out techniques
  limosa lab run plans/techniques.toml --out techniques --without kv
  limosa lab run plans/smoke.toml --out /tmp/smoke --simulate --json

Writes plan.toml, starts.jsonl, results.jsonl, results.csv and report.html, and pairs.csv if QEMU
has a part in the plan: see docs/lab.md.")]
    Run(Run),
    /// Write results.csv and report.html of a directory anew, without running anything
    #[command(
        after_help = "Examples:\n  limosa lab report techniques\n  limosa lab report techniques --json"
    )]
    Report(Report),
}

/// Which plan, and where to.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The plan, a TOML file
    #[arg(value_name = "PLAN.toml")]
    pub plan: PathBuf,
    /// Directory of the results; made if it is not there, gone on with if it is
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The QEMU that a comparison uses, in place of qemu-system-x86_64 of the PATH
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// Leave these workloads out of the plan, like those that need more rights than you have
    #[arg(long, value_name = "WORKLOAD,…", value_delimiter = ',')]
    pub without: Vec<String>,
    /// Use the simulator even if there is /dev/kvm
    #[arg(long)]
    pub simulate: bool,
    /// Whether to answer with JSON
    #[command(flatten)]
    pub format: Format,
}

/// Of which results.
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Directory of the results
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Whether to answer with JSON
    #[command(flatten)]
    pub format: Format,
}
