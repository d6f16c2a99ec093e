//! The I/O ports through which a micro guest speaks to its monitor.

/// `in eax`: the heartbeat of vCPU 0, about once a millisecond, after it has updated its report.
/// The answer is a [`Command`](crate::Command) word.
pub const HEARTBEAT: u16 = 0x5000;

/// `in eax`: wait for as long as [`WAIT_MICROSECONDS`] was told by this vCPU. The answer is
/// [`WAIT_TIME_OVER`] or [`WAIT_LOOK_AGAIN`].
pub const WAIT: u16 = 0x5004;

/// `out eax`: how many microseconds the next [`WAIT`] of this vCPU lasts at most. It holds for
/// one wait.
pub const WAIT_MICROSECONDS: u16 = 0x5008;

/// `out al`: one byte for the monitor's log.
pub const CONSOLE: u16 = 0x500c;

/// The byte on the [`CONSOLE`] that is a beat and no text, where heartbeats are not answered.
pub const CONSOLE_BEAT: u8 = 0;

/// `out eax`: the guest is finished; the monitor stops the virtual machine with this status.
pub const EXIT: u16 = 0x5010;

/// Answer of [`WAIT`]: the time is over.
pub const WAIT_TIME_OVER: u32 = 0;

/// Answer of [`WAIT`]: something interrupted it (a pause, most often; on vCPU 0 also a device that has
/// something for its driver, or had before the wait began); the guest looks at its clock and its
/// devices and waits again if it wants to.
pub const WAIT_LOOK_AGAIN: u32 = 1;

/// Exit status: finished as commanded, no error seen.
pub const EXIT_OK: u32 = 0;

/// Exit status: finished as commanded, but the guest's own checks had failed.
pub const EXIT_ERRORS_SEEN: u32 = 1;

/// Exit status: the arguments or the boot information were not usable; the console says why.
pub const EXIT_BAD_ARGUMENTS: u32 = 2;

/// Exit status: the guest panicked; the console says where.
pub const EXIT_PANIC: u32 = 3;
