//! Free memory at hand, so that moves are compared and not the moods of the machine's own host.

use limosa_os::memory::warm_free_memory;
use limosa_pages::ByteCount;
use std::fs;

/// What is touched beside the guest's memory and a seventh of it: daemons, page tables, buffers.
const MARGIN_BYTES: u64 = 200 << 20;

/// Touches as much free memory as a move of a guest of this size may take, as far as that is no more
/// than half of what is free. Without it a move pays for memory that the machine's own host has
/// taken back, or does not, depending on what ran before.
pub(crate) fn warm(memory_bytes: u64) {
    let wanted = memory_bytes + memory_bytes / 7 + MARGIN_BYTES;
    let size = ByteCount::new(wanted.min(available_bytes() / 2));
    if let Err(error) = warm_free_memory(size) {
        tracing::warn!(%error, %size, "free memory could not be touched before a move");
    }
}

/// What can be had without swapping; 0 if that is not known.
fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
    kibibytes.map_or(0, |count: u64| count.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_memory_is_available_here() {
        assert!(available_bytes() > 1 << 20);
    }
}
