//! What the kernel says about this process, for those who watch that a daemon does not grow.

use std::fs;
use std::io::{self, ErrorKind};

/// Facts about this process.
pub struct Facts {
    /// Identifies the running kernel: 32 hexadecimal digits.
    pub boot_id: String,
    /// Open file descriptors.
    pub open_fds: u64,
    /// Threads.
    pub threads: u64,
    /// Anonymous memory in use.
    pub anonymous_bytes: u64,
}

/// Reads them.
pub fn facts() -> io::Result<Facts> {
    let status = fs::read_to_string("/proc/self/status")?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    // The directory that is being read is one of its own entries.
    let open_fds = fs::read_dir("/proc/self/fd")?.count().saturating_sub(1) as u64;
    Ok(Facts {
        boot_id: boot_id.trim().replace('-', ""),
        open_fds,
        threads: field(&status, "Threads")?,
        anonymous_bytes: field(&status, "RssAnon")? * 1024,
    })
}

/// The number of a line `name:  number unit`.
fn field(status: &str, name: &str) -> io::Result<u64> {
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let value = lines
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| value)
        .next();
    let number = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| {
        io::Error::new(
            ErrorKind::InvalidData,
            format!("no {name} in /proc/self/status"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_plausible() {
        let facts = facts().unwrap();
        assert_eq!(facts.boot_id.len(), 32);
        assert!(facts.open_fds >= 3 && facts.threads >= 1 && facts.anonymous_bytes > 0);
    }

    #[test]
    fn a_missing_field_is_an_error() {
        assert_eq!(
            field("Threads:\t7\nRssAnon:\t 12 kB\n", "RssAnon").unwrap(),
            12
        );
        assert!(field("Threads:\t7\n", "RssAnon").is_err());
    }
}
