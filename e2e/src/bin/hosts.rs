//! Runs a script on one or two throw-away hosts, by hand.

use limosa_e2e::hosts::{Bed, Hosts, Run};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const HELP: &str = "\
Throw-away Linux hosts with a working /dev/kvm, with a LAN between them: namespaces of this machine where its
processors can run guests, emulated by QEMU elsewhere.

Usage: cargo run -p limosa-e2e --bin hosts -- [OPTIONS] SCRIPT

  --bed BED             'native' or 'emulated' (default: what suits this machine)
  --hosts N             1 or 2 hosts; each runs the script (default 2)
  --put FILE:PATH       have a file at a path below /run on each host; may be given again
  --set NAME=VALUE      a variable of the script; may be given again
  --disk MIB            a disk that the hosts share, /dev/vdb on each (default none)
  --processor CPU       processor of the first host, as QEMU names it; again for the second
                        (default EPYC,-monitor); only where hosts are emulated
  --memory MIB          memory of each emulated host (default 1024)
  --limit SECONDS       end hosts that have not ended by then (default 600)
  --cache DIR           where packages and images are kept (default target/emulated-hosts)

A script finds $HOST (host-a, host-b), $OWN and $OTHER (addresses), 'barrier NAME', which waits for the
other host, stock kernels and initial file systems in $GUESTS, a bridge br0 on the LAN and a tap tap0 in
it. The status is that of the first script that fails.

Example, with the program as it was built last:
  cargo run -p limosa-e2e --bin hosts -- --put target/debug/limosa:/run/limosa \\
      --disk 64 --set SERIES=6.1 --set VCPUS=1 --set MODES='pre-copy post-copy' e2e/hosts/moves
";

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(status) => ExitCode::from(status),
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

fn run(mut words: impl Iterator<Item = String>) -> Result<u8, String> {
    let mut run = Run {
        bed: Bed::of_this_machine(),
        hosts: 2,
        script: PathBuf::new(),
        files: Vec::new(),
        variables: Vec::new(),
        processors: Vec::new(),
        memory_mib: 1024,
        disk_mib: 0,
        limit: Duration::from_secs(600),
    };
    let mut cache = PathBuf::from("target/emulated-hosts");
    while let Some(word) = words.next() {
        if matches!(word.as_str(), "--help" | "-h") {
            print!("{HELP}");
            return Ok(0);
        }
        if !word.starts_with("--") {
            run.script = word.into();
            continue;
        }
        let value = words
            .next()
            .ok_or_else(|| format!("{word} takes a value; see --help"))?;
        let wrong = || format!("{word} does not take '{value}'; see --help");
        match word.as_str() {
            "--hosts" => {
                run.hosts = value
                    .parse()
                    .ok()
                    .filter(|n| (1..=2).contains(n))
                    .ok_or_else(wrong)?
            }
            "--bed" => {
                run.bed = match value.as_str() {
                    "native" => Bed::Native,
                    "emulated" => Bed::Emulated,
                    _ => return Err(wrong()),
                }
            }
            "--processor" => run.processors.push(value),
            "--memory" => run.memory_mib = value.parse().map_err(|_| wrong())?,
            "--disk" => run.disk_mib = value.parse().map_err(|_| wrong())?,
            "--limit" => run.limit = Duration::from_secs(value.parse().map_err(|_| wrong())?),
            "--cache" => cache = value.into(),
            "--put" => {
                let (file, path) = value.rsplit_once(':').ok_or_else(wrong)?;
                run.files.push((file.into(), path.to_owned()));
            }
            "--set" => {
                let (name, value) = value.split_once('=').ok_or_else(wrong)?;
                run.variables.push((name.to_owned(), value.to_owned()));
            }
            _ => return Err(format!("unknown option {word}; see --help")),
        }
    }
    if !run.script.is_file() {
        return Err(format!("no script '{}'; see --help", run.script.display()));
    }
    let cache = std::path::absolute(cache).map_err(|error| error.to_string())?;
    let hosts = Hosts::prepare(&cache).map_err(|error| error.to_string())?;
    let ended = hosts.run(&run).map_err(|error| error.to_string())?;
    Ok(u8::try_from(ended.status).unwrap_or(1))
}
