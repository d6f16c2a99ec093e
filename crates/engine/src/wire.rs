//! What two hosts say to each other: the preamble of a connection, control frames, push headers.
//!
//! Encoding and decoding only; who may say what when is [`crate::source`] and [`crate::target`].
//! Every byte here comes from a peer that is not trusted: a length is checked against a limit
//! before anything is allocated, a foreign byte is an error and never a panic. The document of
//! this protocol is `docs/protocol.md`.

use crate::handover::{MigrationId, Resolution};
use crate::policy::Mode;
use crate::report::FaultReport;
use crate::time::Timestamp;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::{ByteCount, PageCount, PageRange, Pfn};
use serde::{Deserialize, Serialize};

/// Version of everything in this file. Peers with another version are refused by name.
pub const PROTOCOL_VERSION: u16 = 7;
/// First bytes of every connection.
pub const MAGIC: [u8; 8] = *b"LIMOSA\r\n";
/// Bytes of an encoded [`Preamble`].
pub const PREAMBLE_BYTES: usize = 32;
/// Bytes of an encoded [`PushHeader`].
pub const PUSH_HEADER_BYTES: usize = 16;
/// Largest control frame: the state of 8 vCPUs takes below 200 KiB; devices will need some more.
pub const CONTROL_FRAME_BYTES_MAX: usize = 4 << 20;
/// Most pages behind one push header: 1 MiB, so that a stream's receiver can stop within it.
pub const PUSH_PAGES_MAX: u32 = 256;
/// Most pages that one bitmap of missing pages speaks of: 4 KiB of bits.
pub const MISSING_PAGES_MAX: u32 = 32_768;
/// Most push streams of one migration.
pub const STREAMS_MAX: u8 = 16;
/// Longest text (a reason, a name) in a control frame, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Most bytes of packets that go after a guest at once.
pub const STRAYS_BYTES_MAX: usize = (1 << 20) + (64 << 10);
/// Most disks that are copied along with a guest.
pub const DISKS_MAX: usize = 16;
/// Most differences that a target names.
pub const DIFFERENCES_MAX: usize = 64;
/// Most bytes behind one [`ControlFrame::Probe`].
pub const PROBE_BYTES_MAX: u32 = 1 << 20;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Control frames of one migration, both ways.
    Control,
    /// Pages of one migration, source to target; the index of the stream.
    Push(u8),
    /// One question about the outcome of one migration: [`ControlFrame::Resolve`].
    Resolve,
    /// Control frames of a migration whose guest runs at the target and misses pages: the first is
    /// [`ControlFrame::Reattach`].
    Resume,
    /// Requests for pages, target to source, and their answers.
    Pull,
    /// Whether a guest could come, and how good the way is: [`ControlFrame::Start`], of which nothing
    /// follows, then [`ControlFrame::Probe`].
    Preflight,
}

/// The first 32 bytes of every connection, sent by the side that dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Which migration the connection belongs to.
    pub migration: MigrationId,
    /// What it is for.
    pub role: Role,
    /// Tells the connections of one attempt to connect from those of an earlier one.
    pub generation: u32,
}

/// Why bytes of a peer were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first bytes are not ours.
    #[error("the peer does not speak the limosa protocol")]
    NotLimosa,
    /// Ours, but of another version.
    #[error(
        "the peer speaks protocol version {theirs}, this host version {PROTOCOL_VERSION}: use the same release on both hosts"
    )]
    OtherVersion {
        /// The peer's version.
        theirs: u16,
    },
    /// A connection for nothing that exists.
    #[error("the peer opened a connection of unknown role {role}")]
    UnknownRole {
        /// The role's number.
        role: u8,
    },
    /// A length beyond its limit.
    #[error(
        "the peer announced a frame of {bytes} bytes, more than the {max} allowed: it may be no limosa host"
    )]
    FrameTooLong {
        /// As announced.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// Bytes that are no control frame, or a frame with bytes left over.
    #[error("the peer sent a malformed control frame")]
    MalformedFrame,
    /// A push header that is malformed or points outside the guest's memory.
    #[error("the peer sent a malformed page header: {0}")]
    MalformedPush(&'static str),
}

impl Preamble {
    /// As it is sent.
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (role, index) = match self.role {
            Role::Control => (0, 0),
            Role::Push(index) => (1, index),
            Role::Resolve => (2, 0),
            Role::Resume => (3, 0),
            Role::Pull => (4, 0),
            Role::Preflight => (5, 0),
        };
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[10] = role;
        bytes[11] = index;
        bytes[12..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..].copy_from_slice(&self.migration.0.to_le_bytes());
        bytes
    }

    /// Reads what a peer sent.
    ///
    /// # Errors
    /// Not our magic, another version, an unknown role or stream.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, WireError> {
        if bytes[..8] != MAGIC {
            return Err(WireError::NotLimosa);
        }
        let theirs = u16::from_le_bytes([bytes[8], bytes[9]]);
        if theirs != PROTOCOL_VERSION {
            return Err(WireError::OtherVersion { theirs });
        }
        let role = match (bytes[10], bytes[11]) {
            (0, 0) => Role::Control,
            (1, index) if index < STREAMS_MAX => Role::Push(index),
            (2, 0) => Role::Resolve,
            (3, 0) => Role::Resume,
            (4, 0) => Role::Pull,
            (5, 0) => Role::Preflight,
            (role, _) => return Err(WireError::UnknownRole { role }),
        };
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..]);
        Ok(Self {
            migration: MigrationId(u128::from_le_bytes(id)),
            role,
            generation: u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]),
        })
    }
}

/// A disk that is copied along with its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedDisk {
    /// Its size.
    pub size: ByteCount,
    /// What of it was ever written: the room that it takes.
    pub data: ByteCount,
}

/// What the source wants to move; the first frame on the control stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The policy that the source follows.
    pub mode: Mode,
    /// Size of the guest's memory.
    pub memory_pages: PageCount,
    /// How many push streams will be used.
    pub streams: u8,
    /// The target keeps a hash of every page as installed and sends a digest after the switch.
    pub verify: bool,
    /// The disks that are copied along, all that the machine has, or none if both hosts have them. Their pages
    /// are numbered behind those of the memory: [`limosa_pages::Numbering`].
    pub disks: Vec<CopiedDisk>,
    /// What machine to make; understood by the VMM only.
    pub vm: Vec<u8>,
    /// Which pages the guest asked for when it ran without them, in earlier moves, as the carrier keeps
    /// it: the target adds to it. Empty if nothing is known.
    pub demanded: Vec<u8>,
}

/// Digest of a guest at the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// Over number and hash of every page that is not zero, ascending.
    pub memory: u128,
    /// Pages that are not zero.
    pub pages: PageCount,
    /// Over the bytes of the state sections.
    pub state: u64,
}

/// A message on the control stream: a little-endian `u32` length, then this in postcard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlFrame {
    /// Source: this guest shall move.
    Start(Start),
    /// Target: it may; a VM is made and waits.
    Accept {
        /// Identifies the running kernel: equal ids mean one clock.
        boot_id: u128,
        /// It can run a guest before all its pages are there.
        can_fault: bool,
    },
    /// Target: it may not.
    Refuse {
        /// For the operator at the source.
        reason: String,
    },
    /// Source: what time is it there?
    ClockProbe {
        /// Number of the probe.
        number: u32,
    },
    /// Target: this.
    ClockEcho {
        /// Number of the probe.
        number: u32,
        /// The target's clock.
        now: Timestamp,
    },
    /// Source: a state saved from the guest as it runs on; load it to learn what loading costs.
    Rehearsal {
        /// Sections, as in [`ControlFrame::State`].
        state: Vec<u8>,
    },
    /// Target: the rehearsal was loaded.
    Rehearsed {
        /// Time to load.
        load: Duration,
    },
    /// Target: every page of this round is in place.
    RoundReceived {
        /// The round.
        round: u32,
    },
    /// Source: the guest is paused and this is its state; the pages of `round` are the last.
    State {
        /// The last round.
        round: u32,
        /// When the first vCPU stopped, on the target's clock as the source reckons it.
        stopped_at: Timestamp,
        /// Sections of the VMM.
        state: Vec<u8>,
        /// Pages that the target does not have and that come when the guest runs there.
        missing: PageCount,
    },
    /// Target: memory and state are in place; the guest could run.
    Prepared {
        /// When the last page and the state had arrived.
        received_at: Timestamp,
        /// When the state was loaded.
        loaded_at: Timestamp,
    },
    /// Source: run it. The source will not, from here on.
    Commit,
    /// Target: it runs.
    Runs {
        /// When the commit arrived.
        committed_at: Timestamp,
        /// When the last vCPU entered the guest.
        first_instruction_at: Timestamp,
    },
    /// Target: every page is there.
    Complete(FaultReport),
    /// Target: the guest ended there, and some of its pages had not come.
    Lost {
        /// For the operator at the source.
        reason: String,
    },
    /// Source, first on a [`Role::Resume`] connection: here are the pages again.
    Reattach {
        /// How many push streams come with it.
        streams: u8,
    },
    /// Target: it goes on; the pull stream says which pages are missing.
    Reattached {
        /// How many.
        missing: PageCount,
        /// It still knows what it installed: a [`ControlFrame::Verified`] can follow.
        verifies: bool,
    },
    /// Target: digest of what it installed (only with [`Start::verify`]).
    Verified(Digest),
    /// Source: it holds nothing any more; the attempt may be forgotten.
    Done,
    /// Either: the attempt ends here, before commit.
    Abort {
        /// For the operator at the other side.
        reason: String,
    },
    /// Either: still here.
    Keepalive,
    /// Source, on a connection of its own: how did this attempt end? Bars it unless it runs.
    Resolve,
    /// Target: so.
    Resolved(Resolution),
    /// Target, on a [`Role::Preflight`] connection: what is in the way of the guest here, each in one line.
    Differences(Vec<String>),
    /// Source, after that: so many bytes of no meaning follow this frame; their time is taken.
    Probe {
        /// At most [`PROBE_BYTES_MAX`].
        bytes: u32,
    },
    /// Target: they are here.
    Probed,
    /// Source, after *runs*: packets that came for the guest where it was before. No answer.
    Strays {
        /// Understood by the VMM only; at most [`STRAYS_BYTES_MAX`].
        packets: Vec<u8>,
    },
}

impl ControlFrame {
    /// The frame with its length in front, ready for one write.
    ///
    /// # Panics
    /// If the frame is longer than [`CONTROL_FRAME_BYTES_MAX`], which only an oversized state of
    /// our own VMM can bring about; see [`ControlFrame::fits`].
    pub fn encode(&self) -> Vec<u8> {
        let body = postcard::to_allocvec(self).expect("a frame of plain data serializes");
        assert!(
            body.len() <= CONTROL_FRAME_BYTES_MAX,
            "control frame beyond its limit"
        );
        let length = u32::try_from(body.len()).expect("below the limit");
        let mut bytes = Vec::with_capacity(4 + body.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Whether a state of `bytes` bytes fits into a frame, with room for the rest of it.
    pub const fn fits(bytes: usize) -> bool {
        bytes <= CONTROL_FRAME_BYTES_MAX - 4096
    }

    /// Checks a length that a peer announced.
    ///
    /// # Errors
    /// Zero or beyond the limit.
    pub fn check_length(prefix: [u8; 4]) -> Result<usize, WireError> {
        let length = u32::from_le_bytes(prefix) as usize;
        if length == 0 {
            return Err(WireError::MalformedFrame);
        }
        if length > CONTROL_FRAME_BYTES_MAX {
            let (bytes, max) = (length as u64, CONTROL_FRAME_BYTES_MAX as u64);
            return Err(WireError::FrameTooLong { bytes, max });
        }
        Ok(length)
    }

    /// Reads the body of a frame.
    ///
    /// # Errors
    /// Not a frame, bytes left over, a text or a number of streams beyond its limit.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let (frame, rest) =
            postcard::take_from_bytes::<Self>(body).map_err(|_| WireError::MalformedFrame)?;
        let is_sound = match &frame {
            Self::Refuse { reason } | Self::Abort { reason } => reason.len() <= TEXT_BYTES_MAX,
            Self::Start(start) => {
                (1..=STREAMS_MAX).contains(&start.streams) && start.disks.len() <= DISKS_MAX
            }
            Self::Reattach { streams } => (1..=STREAMS_MAX).contains(streams),
            Self::Differences(all) => {
                all.len() <= DIFFERENCES_MAX && all.iter().all(|one| one.len() <= TEXT_BYTES_MAX)
            }
            Self::Strays { packets } => packets.len() <= STRAYS_BYTES_MAX,
            Self::Probe { bytes } => *bytes <= PROBE_BYTES_MAX,
            _ => true,
        };
        if rest.is_empty() && is_sound {
            Ok(frame)
        } else {
            Err(WireError::MalformedFrame)
        }
    }

    /// Name for logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Start(_) => "start",
            Self::Accept { .. } => "accept",
            Self::Refuse { .. } => "refuse",
            Self::ClockProbe { .. } => "clock-probe",
            Self::ClockEcho { .. } => "clock-echo",
            Self::Rehearsal { .. } => "rehearsal",
            Self::Rehearsed { .. } => "rehearsed",
            Self::RoundReceived { .. } => "round-received",
            Self::State { .. } => "state",
            Self::Prepared { .. } => "prepared",
            Self::Commit => "commit",
            Self::Runs { .. } => "runs",
            Self::Complete(_) => "complete",
            Self::Lost { .. } => "lost",
            Self::Reattach { .. } => "reattach",
            Self::Reattached { .. } => "reattached",
            Self::Verified(_) => "verified",
            Self::Done => "done",
            Self::Abort { .. } => "abort",
            Self::Keepalive => "keepalive",
            Self::Resolve => "resolve",
            Self::Resolved(_) => "resolved",
            Self::Differences(_) => "differences",
            Self::Probe { .. } => "probe",
            Self::Probed => "probed",
            Self::Strays { .. } => "strays",
        }
    }
}

/// Cuts a text to what a frame may carry, at a character's end, and makes one line of it without
/// anything that a terminal would obey: whoever reads it did not choose the peer's words.
pub fn clip(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].replace(char::is_control, " ")
}

/// How pages are written on the wire when that is shorter than they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// All of them as one block, `limosa_pages::codec::lz4`.
    Lz4,
    /// Each as the difference to what was sent before of the same page, behind its length in two
    /// bytes, `limosa_pages::codec::delta`.
    Delta,
    /// All of them as one frame, `limosa_pages::codec::zstd`.
    Zstd,
}

/// What follows on a push stream. Behind [`PushHeader::Pages`] come its pages, behind
/// [`PushHeader::Coded`] a length of [`CODED_LENGTH_BYTES`] and so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushHeader {
    /// The content of these pages follows.
    Pages(PageRange),
    /// These pages are zero.
    Zeros(PageRange),
    /// All pages of this round that go by this stream were sent before.
    Barrier {
        /// The round.
        round: u32,
        /// The round goes by so many streams, the first ones: each of them has such a barrier.
        streams: u8,
    },
    /// The target does not have these pages, whatever it has in their place.
    Stale(PageRange),
    /// The same for the pages of this range whose bits are set in the words that follow.
    StaleBits(PageRange),
    /// The content of these pages follows in a coding.
    Coded {
        /// The pages.
        range: PageRange,
        /// How they are written.
        coding: Coding,
    },
}

/// Bytes of the length that follows a [`PushHeader::Coded`], little endian.
pub const CODED_LENGTH_BYTES: usize = 4;

/// Checks the length of coded pages.
///
/// # Errors
/// It is none, or more than the pages take as they are.
pub fn check_coded_length(
    bytes: [u8; CODED_LENGTH_BYTES],
    range: PageRange,
) -> Result<usize, WireError> {
    let length = u32::from_le_bytes(bytes);
    if length == 0 || u64::from(length) > range.bytes().get() {
        return Err(WireError::MalformedPush("coded pages of no such length"));
    }
    usize::try_from(length).map_err(|_| WireError::MalformedPush("coded pages of no such length"))
}

/// What comes on a pull stream from the target. Answers are [`PushHeader::Pages`] and
/// [`PushHeader::Zeros`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullHeader {
    /// Somebody waits for these pages.
    Want(PageRange),
    /// After a reconnection: these pages are missing.
    Missing(PageRange),
    /// The same for the pages of this range whose bits are set in the words that follow.
    MissingBits(PageRange),
    /// All missing pages were told.
    MissingEnd,
}

impl PullHeader {
    /// As it is sent; in the form of a [`PushHeader`].
    pub fn encode(&self) -> [u8; PUSH_HEADER_BYTES] {
        match *self {
            Self::Want(range) => encode_header(1, range.count.get(), range.first.get()),
            Self::Missing(range) => encode_header(2, range.count.get(), range.first.get()),
            Self::MissingBits(range) => encode_header(3, range.count.get(), range.first.get()),
            Self::MissingEnd => encode_header(4, 0, 0),
        }
    }

    /// Reads what a target sent about a guest of `memory` pages.
    ///
    /// # Errors
    /// As [`PushHeader::decode`].
    pub fn decode(bytes: &[u8; PUSH_HEADER_BYTES], memory: PageCount) -> Result<Self, WireError> {
        let (kind, count, value) = decode_header(bytes)?;
        match kind {
            1 if count > PUSH_PAGES_MAX => Err(WireError::MalformedPush("too many pages at once")),
            1 => Ok(Self::Want(checked_range(value, count, memory)?)),
            2 => Ok(Self::Missing(checked_range(value, count, memory)?)),
            3 => Ok(Self::MissingBits(checked_bits(value, count, memory)?)),
            4 if count == 0 && value == 0 => Ok(Self::MissingEnd),
            _ => Err(WireError::MalformedPush("unknown kind")),
        }
    }
}

impl PushHeader {
    /// The pages that it is about; none for a barrier.
    pub const fn range(&self) -> Option<PageRange> {
        match *self {
            Self::Pages(range)
            | Self::Zeros(range)
            | Self::Stale(range)
            | Self::StaleBits(range)
            | Self::Coded { range, .. } => Some(range),
            Self::Barrier { .. } => None,
        }
    }

    /// As it is sent: kind, three zero bytes, `u32` count of pages or streams, `u64` first page or round.
    pub fn encode(&self) -> [u8; PUSH_HEADER_BYTES] {
        match *self {
            Self::Pages(range) => encode_header(1, range.count.get(), range.first.get()),
            Self::Zeros(range) => encode_header(2, range.count.get(), range.first.get()),
            Self::Barrier { round, streams } => {
                encode_header(3, u64::from(streams), u64::from(round))
            }
            Self::Stale(range) => encode_header(4, range.count.get(), range.first.get()),
            Self::StaleBits(range) => encode_header(5, range.count.get(), range.first.get()),
            Self::Coded { range, coding } => {
                let kind = match coding {
                    Coding::Lz4 => 6,
                    Coding::Delta => 7,
                    Coding::Zstd => 8,
                };
                encode_header(kind, range.count.get(), range.first.get())
            }
        }
    }

    /// Reads what a peer sent about a guest of `memory` pages.
    ///
    /// # Errors
    /// An unknown kind, a range that is empty, too long or outside the memory, stray bits.
    pub fn decode(bytes: &[u8; PUSH_HEADER_BYTES], memory: PageCount) -> Result<Self, WireError> {
        let (kind, count, value) = decode_header(bytes)?;
        match kind {
            1 | 6..=8 if count > PUSH_PAGES_MAX => {
                Err(WireError::MalformedPush("too many pages at once"))
            }
            1 => Ok(Self::Pages(checked_range(value, count, memory)?)),
            2 => Ok(Self::Zeros(checked_range(value, count, memory)?)),
            3 => {
                let streams = u8::try_from(count).ok();
                let streams = streams.filter(|streams| (1..=STREAMS_MAX).contains(streams));
                Ok(Self::Barrier {
                    round: u32::try_from(value)
                        .map_err(|_| WireError::MalformedPush("round out of range"))?,
                    streams: streams.ok_or(WireError::MalformedPush("streams out of range"))?,
                })
            }
            4 => Ok(Self::Stale(checked_range(value, count, memory)?)),
            5 => Ok(Self::StaleBits(checked_bits(value, count, memory)?)),
            6..=8 => Ok(Self::Coded {
                range: checked_range(value, count, memory)?,
                coding: match kind {
                    6 => Coding::Lz4,
                    7 => Coding::Delta,
                    _ => Coding::Zstd,
                },
            }),
            _ => Err(WireError::MalformedPush("unknown kind")),
        }
    }
}

fn encode_header(kind: u8, count: u64, value: u64) -> [u8; PUSH_HEADER_BYTES] {
    let count = u32::try_from(count).expect("senders split ranges by the limit");
    let mut bytes = [0; PUSH_HEADER_BYTES];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&count.to_le_bytes());
    bytes[8..].copy_from_slice(&value.to_le_bytes());
    bytes
}

fn decode_header(bytes: &[u8; PUSH_HEADER_BYTES]) -> Result<(u8, u32, u64), WireError> {
    let count = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[8..]);
    if bytes[1..4] != [0; 3] {
        return Err(WireError::MalformedPush("reserved bytes are set"));
    }
    Ok((bytes[0], count, u64::from_le_bytes(value)))
}

/// Bytes of the words that follow a header with bits for this range: one bit a page.
pub const fn bits_bytes(range: PageRange) -> usize {
    // Below `MISSING_PAGES_MAX`, so it fits.
    (range.count.get().div_ceil(64) * 8) as usize
}

/// A range that bits follow: short enough, and its first page is the first of a word.
fn checked_bits(first: u64, count: u32, memory: PageCount) -> Result<PageRange, WireError> {
    if count > MISSING_PAGES_MAX || !first.is_multiple_of(64) {
        return Err(WireError::MalformedPush("a bitmap of no such size"));
    }
    checked_range(first, count, memory)
}

/// A range of a guest of `memory` pages, or an error.
fn checked_range(first: u64, count: u32, memory: PageCount) -> Result<PageRange, WireError> {
    let end = first.checked_add(u64::from(count));
    match end {
        Some(end) if count > 0 && end <= memory.get() => Ok(PageRange::new(
            Pfn::new(first),
            PageCount::new(u64::from(count)),
        )),
        _ => Err(WireError::MalformedPush("pages outside the guest's memory")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> Vec<ControlFrame> {
        let start = Start {
            mode: Mode::PreCopy,
            memory_pages: PageCount::new(1 << 20),
            streams: 2,
            verify: true,
            disks: alloc::vec![CopiedDisk {
                size: ByteCount::new(1 << 30),
                data: ByteCount::new(1 << 20),
            }],
            vm: alloc::vec![1, 2, 3],
            demanded: alloc::vec![4; 16],
        };
        let digest = Digest {
            memory: 7,
            pages: PageCount::new(9),
            state: 11,
        };
        let at = Timestamp::from_nanos(5);
        alloc::vec![
            ControlFrame::Start(start),
            ControlFrame::Accept {
                boot_id: 3,
                can_fault: true,
            },
            ControlFrame::Refuse {
                reason: String::from("no memory")
            },
            ControlFrame::ClockEcho { number: 1, now: at },
            ControlFrame::State {
                round: 3,
                stopped_at: at,
                state: alloc::vec![0; 300],
                missing: PageCount::new(7),
            },
            ControlFrame::Complete(FaultReport::default()),
            ControlFrame::Prepared {
                received_at: at,
                loaded_at: at
            },
            ControlFrame::Commit,
            ControlFrame::Verified(digest),
            ControlFrame::Resolved(Resolution::Barred),
            ControlFrame::Differences(alloc::vec![String::from("no memory"); 2]),
            ControlFrame::Probe {
                bytes: PROBE_BYTES_MAX
            },
        ]
    }

    #[test]
    fn frames_survive_the_wire() {
        for frame in frames() {
            let bytes = frame.encode();
            let length = ControlFrame::check_length([bytes[0], bytes[1], bytes[2], bytes[3]]);
            assert_eq!(length, Ok(bytes.len() - 4));
            assert_eq!(ControlFrame::decode(&bytes[4..]), Ok(frame));
        }
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused_before_anything_is_read() {
        assert_eq!(
            ControlFrame::check_length([0; 4]),
            Err(WireError::MalformedFrame)
        );
        let huge = ControlFrame::check_length([0xff; 4]);
        assert!(matches!(huge, Err(WireError::FrameTooLong { .. })));
    }

    #[test]
    fn what_has_a_limit_is_not_longer() {
        let long = "x".repeat(TEXT_BYTES_MAX + 1);
        for frame in [
            ControlFrame::Differences(alloc::vec![String::new(); DIFFERENCES_MAX + 1]),
            ControlFrame::Differences(alloc::vec![long]),
            ControlFrame::Probe {
                bytes: PROBE_BYTES_MAX + 1,
            },
            ControlFrame::Strays {
                packets: alloc::vec![0; STRAYS_BYTES_MAX + 1],
            },
        ] {
            let bytes = frame.encode();
            let decoded = ControlFrame::decode(&bytes[4..]);
            assert_eq!(decoded, Err(WireError::MalformedFrame), "{frame:?}");
        }
    }

    #[test]
    fn a_foreign_text_becomes_one_line_of_limited_length() {
        assert_eq!(clip("no\r\n\u{1b}[31mroom\u{9b}"), "no   [31mroom ");
        let long = "ä".repeat(TEXT_BYTES_MAX);
        assert_eq!(clip(&long).len(), TEXT_BYTES_MAX);
        assert_eq!(
            clip(&long[2..].replacen('ä', "a", 1)).len(),
            TEXT_BYTES_MAX - 1
        );
    }

    #[test]
    fn a_preamble_of_another_version_is_named() {
        let preamble = Preamble {
            migration: MigrationId(5),
            role: Role::Push(3),
            generation: 2,
        };
        let mut bytes = preamble.encode();
        assert_eq!(Preamble::decode(&bytes), Ok(preamble));
        bytes[8] = 9;
        assert_eq!(
            Preamble::decode(&bytes),
            Err(WireError::OtherVersion { theirs: 9 })
        );
        bytes[0] = b'G';
        assert_eq!(Preamble::decode(&bytes), Err(WireError::NotLimosa));
    }

    proptest! {
        #[test]
        fn foreign_control_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(frame) = ControlFrame::decode(&bytes) {
                prop_assert_eq!(ControlFrame::decode(&frame.encode()[4..]), Ok(frame));
            }
        }

        #[test]
        fn damaged_frames_never_panic(which in 0..12usize, at in 0..300usize, bit in 0..8u8, cut in 0..300usize) {
            let mut bytes = frames()[which].encode()[4..].to_vec();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            bytes.truncate(bytes.len().saturating_sub(cut % 4));
            let _foreign = ControlFrame::decode(&bytes);
        }

        #[test]
        fn foreign_push_headers_stay_inside_the_memory(bytes in any::<[u8; 16]>(), small in any::<bool>(), pages in 1..5000u64) {
            let mut bytes = bytes;
            if small {
                bytes[0] %= 10;
                bytes[1..4].fill(0);
                bytes[6..8].fill(0);
                bytes[10..].fill(0);
            }
            let memory = PageCount::new(pages);
            if let Ok(header) = PullHeader::decode(&bytes, memory) {
                prop_assert_eq!(header.encode(), bytes);
            }
            if let Ok(header) = PushHeader::decode(&bytes, memory) {
                prop_assert_eq!(header.encode(), bytes);
                if let PushHeader::Pages(range) | PushHeader::Zeros(range) = header {
                    prop_assert!(range.end().get() <= pages && range.count.get() > 0);
                }
            }
        }
    }
}
