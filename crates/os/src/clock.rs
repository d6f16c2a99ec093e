//! Clocks: the monotonic clock that all processes of a host share, the time stamp counter, and the
//! name of this boot, by which two processes find out whether they share that clock.

use std::fs;

/// Reading of `CLOCK_MONOTONIC` in nanoseconds. Comparable between processes of one boot.
pub fn monotonic_nanos() -> u64 {
    nanos(libc::CLOCK_MONOTONIC)
}

/// Processor time of the calling thread, in nanoseconds; what it waited for is not in it.
pub fn thread_nanos() -> u64 {
    nanos(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Reading of a clock that every Linux has.
fn nanos(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the answer, and the kernel writes nothing else.
    let failed = unsafe { libc::clock_gettime(clock, &raw mut time) } != 0;
    assert!(!failed, "Linux always has these clocks");
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// This processor's time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets user space execute it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A number that is the same for all processes of one boot of one machine and for no others; zero
/// if the kernel does not tell.
pub fn boot_id() -> u128 {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_go_on_and_the_boot_has_a_name() {
        let (before, ticks) = (monotonic_nanos(), tsc());
        assert!(monotonic_nanos() >= before);
        assert!(tsc() > ticks);
        assert_eq!(boot_id(), boot_id());
        assert_ne!(boot_id(), 0);
    }
}
