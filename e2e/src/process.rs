//! Processes as `/proc` and signals know them.

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::Path;

/// Kills a process, however it is.
///
/// # Panics
/// If there is none of this id.
#[track_caller]
pub fn kill(pid: u32) {
    assert!(try_kill(pid), "process {pid} cannot be killed");
}

/// Kills a process; false if there is none.
pub fn try_kill(pid: u32) -> bool {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    raw.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
}

/// Processes whose command line names `path`, but for `except`. Ended ones that nobody has waited
/// for have no command line any more and are not among them.
pub fn naming(path: &Path, except: Option<u32>) -> Vec<u32> {
    let own = std::process::id();
    let wanted = path.as_os_str().as_encoded_bytes();
    let mut found: Vec<u32> = pids()
        .filter(|&pid| pid != own && Some(pid) != except)
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.windows(wanted.len()).any(|window| window == wanted)
        })
        .collect();
    found.sort_unstable();
    found
}

/// Children of a process that have ended and that it has not waited for.
pub fn zombies_of(parent: u32) -> Vec<u32> {
    pids()
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // The name in parentheses may hold anything; what counts comes after its end.
            let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let mut fields = rest.split_whitespace();
            let state = fields.next();
            let its_parent = fields.next().and_then(|parent| parent.parse().ok());
            state == Some("Z") && its_parent == Some(parent)
        })
        .collect()
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}
