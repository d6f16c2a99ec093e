//! Processes as `/proc` and signals know them.

use crate::wait;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::Path;

/// Kills a process and waits until it has let go of everything: its memory and its sockets go
/// after the signal, and whoever asks it something meanwhile cannot know whether it heard.
///
/// # Panics
/// If there is none of this id, or it does not end.
#[track_caller]
pub fn kill(pid: u32) {
    assert!(try_kill(pid), "process {pid} cannot be killed");
    // Its first thread may be gone before the others are; the last one closes its sockets.
    wait::until_true("a killed process ends", || match stat(pid) {
        None => true,
        Some((state, _)) => state == 'Z' && thread_names(pid).len() <= 1,
    });
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
        .filter(|pid| stat(*pid).is_some_and(|stat| stat == ('Z', parent)))
        .collect()
}

/// Names of a process's threads.
pub fn thread_names(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    // One that ends meanwhile has no name any more.
    let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    names.map(|name| name.trim_end().to_owned()).collect()
}

/// What a process does, as one letter, and its parent; `None` if there is none.
fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what counts comes after its end.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}
