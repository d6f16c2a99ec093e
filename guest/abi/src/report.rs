//! What a vCPU of a guest says about itself, in a page that the monitor reads from outside.
//!
//! The vCPU writes the words from the last to the first, so that a reader who takes the counts
//! first never sees a count that is ahead of what it counts. A word is never torn, the structure
//! as a whole can be: it is read while the guest runs.

use core::mem::{offset_of, size_of};

#[cfg(feature = "bytes")]
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{ABI_VERSION, PAGE_BYTES};

/// Length of the ring of recent stalls.
pub const STALLS_RING: usize = 64;

/// How many of the longest stalls are kept.
pub const STALLS_LONGEST: usize = 16;

/// A gap between two looks at the clock counts as a stall from this length on, in microseconds.
pub const STALL_MICROSECONDS_MIN: u64 = 200;

/// Groups of [`Report::stall_groups`]: four for each doubling of the length.
pub const STALL_GROUPS: usize = 128;

/// Stalls of less than two to this power of ticks are in the first group: a microsecond or two.
const STALL_GROUPS_FIRST_BITS: u32 = 12;

/// The report of one vCPU, at [`report_address`](crate::memory_map::report_address).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "bytes",
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct Report {
    /// [`Report::MAGIC`] once the vCPU has started.
    pub magic: u64,
    /// [`ABI_VERSION`] in the low half, the vCPU's index in the high half.
    pub version_and_vcpu: u64,
    /// A [`State`] as a number.
    pub state: u64,
    /// Time stamp counter when the report was written last.
    pub beat_tsc: u64,
    /// Pages written (writer), units done (compute), checks done (idle).
    pub work: u64,
    /// Operations of the writer that only verified a page.
    pub reads: u64,
    /// Checks that failed, sweeps included.
    pub errors: u64,
    /// Sequence number of the last command that was carried out to its end.
    pub command_done: u64,
    /// Sequence number of the last sweep that ended.
    pub sweep_id: u64,
    /// Pages that this sweep looked at.
    pub sweep_pages: u64,
    /// Errors that this sweep found.
    pub sweep_errors: u64,
    /// How often the time stamp counter went backwards; zero in a sound guest.
    pub tsc_backwards: u64,
    /// Stalls since the start.
    pub stall_total: u64,
    /// Where in `stalls` the next one will be written.
    pub stall_next: u64,
    /// The most recent stalls, a ring.
    pub stalls: [Stall; STALLS_RING],
    /// The longest stalls since the last clear command, longest first; the rest is zero.
    pub long_stalls: [Stall; STALLS_LONGEST],
    /// The first check that failed; its `kind` is zero while none has.
    pub first_error: FirstError,
    /// All stalls since the last clear command by length, shortest first: see [`stall_group`].
    pub stall_groups: [StallGroup; STALL_GROUPS],
}

/// Stalls of about the same length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "bytes",
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct StallGroup {
    /// How many.
    pub count: u64,
    /// How long they were together, in ticks of the time stamp counter.
    pub ticks: u64,
}

/// The group of a stall of so many ticks: the two bits behind the first one of the length choose among
/// the four groups of a doubling. What is too short or too long is in the first or the last one.
#[must_use]
pub const fn stall_group(length_tsc: u64) -> usize {
    let Some(bits) = length_tsc.checked_ilog2() else {
        return 0;
    };
    if bits < STALL_GROUPS_FIRST_BITS {
        return 0;
    }
    let quarter = (length_tsc >> (bits - 2)) & 3;
    let group = (bits - STALL_GROUPS_FIRST_BITS) as usize * 4 + quarter as usize;
    if group < STALL_GROUPS {
        group
    } else {
        STALL_GROUPS - 1
    }
}

/// A time in which a vCPU that wanted to run did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "bytes",
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct Stall {
    /// Last time stamp before the gap.
    pub start_tsc: u64,
    /// Length of the gap, in ticks of the time stamp counter.
    pub length_tsc: u64,
}

/// The first failed check of a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "bytes",
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct FirstError {
    /// Number of the page in the memory file.
    pub page: u64,
    /// What had to be there; see [`ErrorKind`].
    pub expected: u64,
    /// What was there.
    pub found: u64,
    /// An [`ErrorKind`] as a number, zero for none.
    pub kind: u64,
}

/// How far a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It fills its memory.
    Boot,
    /// It works.
    Ready,
    /// It finished as commanded.
    Done,
    /// It gave up; the console says why.
    Failed,
}

impl State {
    /// The number in the report.
    #[must_use]
    pub const fn to_word(self) -> u64 {
        match self {
            Self::Boot => 0,
            Self::Ready => 1,
            Self::Done => 2,
            Self::Failed => 3,
        }
    }

    /// The state of a number.
    #[must_use]
    pub const fn from_word(word: u64) -> Option<Self> {
        match word {
            0 => Some(Self::Boot),
            1 => Some(Self::Ready),
            2 => Some(Self::Done),
            3 => Some(Self::Failed),
            _ => None,
        }
    }
}

/// What kind of check failed, and so what `expected` and `found` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The page holds only zeros: it was lost. Expected is the version.
    Empty,
    /// The checksum that the bytes have is not (expected) the one that the page carries (found).
    Checksum,
    /// The page is sound, but another page belongs here: page numbers.
    Number,
    /// The page is sound, but of another time: versions. Stale memory looks like this.
    Version,
    /// The versions of all pages do not add up to the writes that were counted.
    VersionSum,
    /// The result of a computation: its known value and what came out.
    Result,
}

impl ErrorKind {
    /// The number in the report, never zero.
    #[must_use]
    pub const fn to_word(self) -> u64 {
        match self {
            Self::Empty => 1,
            Self::Checksum => 2,
            Self::Number => 3,
            Self::Version => 4,
            Self::VersionSum => 5,
            Self::Result => 6,
        }
    }

    /// The kind of a number.
    #[must_use]
    pub const fn from_word(word: u64) -> Option<Self> {
        match word {
            1 => Some(Self::Empty),
            2 => Some(Self::Checksum),
            3 => Some(Self::Number),
            4 => Some(Self::Version),
            5 => Some(Self::VersionSum),
            6 => Some(Self::Result),
            _ => None,
        }
    }
}

impl Report {
    /// Marks a page that a vCPU has begun to write: "LIMOSARP" in memory order.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"LIMOSARP");

    /// The report of a vCPU that has just started.
    #[must_use]
    pub const fn new(vcpu: u32) -> Self {
        Self {
            magic: Self::MAGIC,
            version_and_vcpu: ABI_VERSION as u64 | (vcpu as u64) << 32,
            state: State::Boot.to_word(),
            beat_tsc: 0,
            work: 0,
            reads: 0,
            errors: 0,
            command_done: 0,
            sweep_id: 0,
            sweep_pages: 0,
            sweep_errors: 0,
            tsc_backwards: 0,
            stall_total: 0,
            stall_next: 0,
            stalls: [Stall::ZERO; STALLS_RING],
            long_stalls: [Stall::ZERO; STALLS_LONGEST],
            first_error: FirstError {
                page: 0,
                expected: 0,
                found: 0,
                kind: 0,
            },
            stall_groups: [StallGroup::ZERO; STALL_GROUPS],
        }
    }

    /// The report in the bytes of its page (or a prefix of it); `None` if there are too few
    /// bytes or no vCPU of this version has written it yet.
    #[cfg(feature = "bytes")]
    #[must_use]
    pub fn parse(page: &[u8]) -> Option<Self> {
        let (report, _) = Self::read_from_prefix(page).ok()?;
        (report.magic == Self::MAGIC && report.abi_version() == ABI_VERSION).then_some(report)
    }

    /// Version of the contract that the guest follows.
    #[must_use]
    pub const fn abi_version(&self) -> u32 {
        self.version_and_vcpu as u32
    }

    /// Which vCPU wrote it.
    #[must_use]
    pub const fn vcpu(&self) -> u32 {
        (self.version_and_vcpu >> 32) as u32
    }

    /// How far the vCPU is; `None` for a number without meaning.
    #[must_use]
    pub const fn state(&self) -> Option<State> {
        State::from_word(self.state)
    }

    /// The stalls that the ring still holds, oldest first. Foreign bytes cannot make it panic.
    pub fn recent_stalls(&self) -> impl Iterator<Item = Stall> + '_ {
        let held = self.stall_total.min(STALLS_RING as u64) as usize;
        let next = (self.stall_next % STALLS_RING as u64) as usize;
        (0..held).map(move |index| self.stalls[(next + STALLS_RING - held + index) % STALLS_RING])
    }
}

impl Stall {
    const ZERO: Self = Self {
        start_tsc: 0,
        length_tsc: 0,
    };

    /// First time stamp behind the gap.
    #[must_use]
    pub const fn end_tsc(&self) -> u64 {
        self.start_tsc.wrapping_add(self.length_tsc)
    }
}

impl StallGroup {
    const ZERO: Self = Self { count: 0, ticks: 0 };
}

const _: () = assert!(size_of::<Stall>() == 16);
const _: () = assert!(size_of::<StallGroup>() == 16);
const _: () = assert!(size_of::<FirstError>() == 32);
const _: () = assert!(size_of::<Report>() == 3472);
const _: () = assert!(size_of::<Report>() as u64 <= PAGE_BYTES);
const _: () = assert!(offset_of!(Report, state) == 16);
const _: () = assert!(offset_of!(Report, work) == 32);
const _: () = assert!(offset_of!(Report, sweep_id) == 64);
const _: () = assert!(offset_of!(Report, stall_total) == 96);
const _: () = assert!(offset_of!(Report, stalls) == 112);
const _: () = assert!(offset_of!(Report, long_stalls) == 1136);
const _: () = assert!(offset_of!(Report, first_error) == 1392);
const _: () = assert!(offset_of!(Report, stall_groups) == 1424);

#[cfg(all(test, feature = "bytes"))]
mod tests {
    use super::*;

    #[test]
    fn only_written_pages_parse() {
        assert_eq!(Report::parse(&[0; 4096]), None);
        assert_eq!(Report::parse(&[1; 100]), None);
        let report = Report::new(3);
        let mut page = [0xaa; 4096];
        page[..3472].copy_from_slice(report.as_bytes());
        let again = Report::parse(&page).unwrap();
        assert_eq!(again, report);
        assert_eq!((again.vcpu(), again.state()), (3, Some(State::Boot)));
    }

    #[test]
    fn groups_have_four_for_each_doubling() {
        let check = |length, expect| assert_eq!(stall_group(length), expect, "{length}");
        check(0, 0);
        check(4095, 0);
        check(4096, 0);
        check(5119, 0);
        check(5120, 1);
        check(8191, 3);
        check(8192, 4);
        // 200 µs and a second at 2.6 GHz.
        check(520_000, 27);
        check(2_600_000_000, 76);
        check(1 << 43, 124);
        check(u64::MAX, 127);
    }

    #[test]
    fn recent_stalls_come_oldest_first() {
        let mut report = Report::new(0);
        assert_eq!(report.recent_stalls().count(), 0);
        for index in 0..70 {
            report.stalls[index as usize % STALLS_RING].start_tsc = index;
            report.stall_total += 1;
            report.stall_next = (report.stall_next + 1) % STALLS_RING as u64;
        }
        let mut stalls = report.recent_stalls();
        assert_eq!(stalls.next().unwrap().start_tsc, 6);
        assert_eq!(stalls.last().unwrap().start_tsc, 69);
        report.stall_next = u64::MAX;
        report.stall_total = u64::MAX;
        assert_eq!(report.recent_stalls().count(), STALLS_RING);
    }

    #[test]
    fn numbers_round_trip() {
        for word in 0..9 {
            let state = State::from_word(word).map(State::to_word);
            assert_eq!(state, (word < 4).then_some(word));
            let kind = ErrorKind::from_word(word).map(ErrorKind::to_word);
            assert_eq!(kind, (1..7).contains(&word).then_some(word));
        }
    }
}
