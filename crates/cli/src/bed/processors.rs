//! Who else used the processors while a move was measured.
//!
//! The kernel counts the time of all processors by what they did with it, and the time of each process.
//! What was used and is not ours was used by others: other programs, the kernel for them, and, as far as
//! the machine is told, whoever shares its processors with it ("steal"). On a quiet machine the share is
//! next to nothing; a stall on a busy one may be somebody else's time slice.
//!
//! ```text
//!  used = all - idle - waiting for disks     ours = this program, daemons, VM processes or QEMUs
//!  share of others = (used - ours) / all     with the processes that ended and were waited for
//! ```
//!
//! Deliberately absent: who they are.

use std::fs;
use std::path::Path;

/// Time until now in ticks of the kernel's accounting, hundredths of a second here as there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Processors {
    all: u64,
    used: u64,
    ours: u64,
}

impl Processors {
    /// Now; ours are this process and those in whose command line a path in `directory` stands.
    /// `None` if the kernel does not tell.
    pub(crate) fn now(directory: &Path) -> Option<Self> {
        let directory = directory.to_str()?;
        let (all, used) = machine_ticks(&fs::read_to_string("/proc/stat").ok()?)?;
        let own_pid = std::process::id().to_string();
        let mut ours = 0;
        for entry in fs::read_dir("/proc").ok()?.flatten() {
            let name = entry.file_name();
            let is_process = name
                .to_string_lossy()
                .bytes()
                .all(|byte| byte.is_ascii_digit());
            if !is_process {
                continue;
            }
            // A process may end between two looks, and is counted by whoever waited for it then.
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if name == *own_pid || String::from_utf8_lossy(&command).contains(directory) {
                let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
                ours += process_ticks(&stat).unwrap_or(0);
            }
        }
        Some(Self { all, used, ours })
    }

    /// The share of others from this moment until now, the same processes being ours.
    pub(crate) fn others_until_now(&self, directory: &Path) -> Option<f64> {
        Self::now(directory)?.others_since(self)
    }

    /// The share of all processor time since `before` that others used, 0 to 1; `None` if there was none.
    fn others_since(&self, before: &Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|all| *all > 0)?;
        let used = self.used.saturating_sub(before.used);
        // The kernel counts processes to the nanosecond and processors by ticks: the difference of what
        // nobody used can be a little below zero.
        let ours = self.ours.saturating_sub(before.ours);
        let share = used.saturating_sub(ours) as f64 / all as f64;
        Some((share * 10_000.0).round() / 10_000.0)
    }
}

/// All ticks and those that were used, of the first line of `/proc/stat`.
fn machine_ticks(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    // user, nice, system, idle, iowait, irq, softirq, steal; what guests used is in the first two.
    let fields: Option<Vec<u64>> = line
        .split_whitespace()
        .take(8)
        .map(|field| field.parse().ok())
        .collect();
    let fields = fields.filter(|fields| fields.len() == 8)?;
    let all: u64 = fields.iter().sum();
    Some((all, all - fields[3] - fields[4]))
}

/// Ticks of a process and of its children that it has waited for, of its `stat`.
fn process_ticks(stat: &str) -> Option<u64> {
    // Its name may hold anything, parentheses and blanks too. Behind it, from the third field on: utime,
    // stime, cutime and cstime are the fourteenth to the seventeenth.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields = rest.split_whitespace().skip(11).take(4);
    let fields: Option<Vec<u64>> = fields.map(|field| field.parse().ok()).collect();
    let fields = fields.filter(|fields| fields.len() == 4)?;
    Some(fields.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_and_is_not_ours_was_used_by_others() {
        let at = |all, used, ours| Processors { all, used, ours };
        let check = |before: Processors, after: Processors, expect: Option<f64>| {
            assert_eq!(after.others_since(&before), expect);
        };
        let before = at(1000, 400, 300);
        check(before, at(1200, 520, 400), Some(0.1));
        check(before, at(1200, 499, 400), Some(0.0));
        check(before, at(1300, 500, 300), Some(0.3333));
        check(before, before, None);
    }

    #[test]
    fn the_kernels_lines_are_read() {
        let stat = "cpu  100 20 30 800 40 5 6 7 60 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(machine_ticks(stat), Some((1008, 168)));
        assert_eq!(machine_ticks("intr 1 2 3\n"), None);
        let stat = "77 (a) b) S 1 77 77 0 -1 4194560 900 0 0 0 10 20 3 4 20 0 1 0 5 6 7";
        assert_eq!(process_ticks(stat), Some(37));
        assert_eq!(process_ticks("77 (a"), None);
        let here = Processors::now(Path::new("/nonexistent")).unwrap();
        assert!(here.all > here.used);
    }
}
