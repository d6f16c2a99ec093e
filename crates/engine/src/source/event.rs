//! What the source's engine is told and what it asks for.

use crate::handover::{MigrationId, Phase, Resolution};
use crate::policy::{Limits, Mode};
use crate::report::{Coded, Outcome};
use crate::throttle::Throttle;
use crate::time::Timestamp;
use crate::wire::{ControlFrame, CopiedDisk, Digest, STREAMS_MAX};
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::{
    ByteCount, BytesPerSecond, DISK_ALIGNMENT, Numbering, PageCount, PageRange, Pfn,
};
use serde::{Deserialize, Serialize};

/// What is known before a migration starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceConfig {
    /// The attempt.
    pub id: MigrationId,
    /// The target's address, kept in the phase record so that a restarted daemon can ask.
    pub peer: String,
    /// The technique.
    pub mode: Mode,
    /// What the operator allows.
    pub limits: Limits,
    /// Push streams that are opened, 1 to [`crate::wire::STREAMS_MAX`]; how many of them are used the
    /// limits say.
    pub streams: u8,
    /// The guest's memory.
    pub memory: PageCount,
    /// Disks that are copied along; none if both hosts have them.
    pub disks: Vec<CopiedDisk>,
    /// Pages over which dirty counts are given: a multiple of 64, as KVM clears its log.
    pub chunk: PageCount,
    /// Compare digests after the switch.
    pub verify: bool,
    /// The machine, understood by the VMM only.
    pub vm: Vec<u8>,
    /// What the target is told of earlier moves, understood by the carrier only.
    pub demanded: Vec<u8>,
    /// Identifies this host's running kernel.
    pub boot_id: u128,
}

impl SourceConfig {
    /// Whether the configuration keeps its own limits: streams, memory, disks, a chunk that KVM can clear.
    pub fn is_sound(&self) -> bool {
        let chunk = self.chunk.get();
        self.streams >= 1
            && self.streams <= STREAMS_MAX
            && self.memory.get() > 0
            && self.numbering().is_some()
            // A chunk is of memory or of one disk.
            && (self.disks.is_empty() || self.chunk == DISK_ALIGNMENT)
            && chunk >= 64
            && chunk.is_multiple_of(64)
    }

    /// How the pages of memory and disks are numbered; `None` if the disks are too large.
    pub fn numbering(&self) -> Option<Numbering> {
        Numbering::new(self.memory, self.disks.iter().map(|disk| disk.size))
    }

    /// All pages, those of disks among them: what a set of them has to hold.
    ///
    /// # Panics
    /// If the configuration is not sound.
    pub fn pages(&self) -> PageCount {
        self.numbering().expect("disks of a possible size").end()
    }
}

#[cfg(test)]
impl SourceConfig {
    /// One for tests of the parts of a source.
    pub(super) fn sample(memory: PageCount, chunk: PageCount) -> Self {
        Self {
            id: MigrationId(1),
            peer: String::new(),
            mode: Mode::PreCopy,
            limits: Limits::default(),
            streams: 2,
            memory,
            disks: Vec::new(),
            chunk,
            verify: false,
            vm: Vec::new(),
            demanded: Vec::new(),
            boot_id: 0,
        }
    }
}

/// A part of a round: sent by one stream after its dirty log was cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The round.
    pub round: u32,
    /// Counts the pieces of a round from zero.
    pub index: u32,
    /// The pages of the round's set within this range.
    pub range: PageRange,
}

impl Piece {
    /// Stands for the pages that the vCPUs need first; see [`SourceAction::SendFirst`].
    pub const fn first_needed(round: u32) -> Self {
        Self {
            round,
            index: u32::MAX,
            range: PageRange::new(Pfn::new(0), PageCount::ZERO),
        }
    }
}

/// The operator's word about an outcome that nobody can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fence {
    /// The other host will never run the guest, and never has: it runs here.
    RunsHere,
    /// The guest belongs to the other host, or is lost: nothing is kept here.
    Gone,
}

/// What was sent for a piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentPiece {
    /// Pages, zero pages included.
    pub pages: PageCount,
    /// Pages that went as zero ranges.
    pub zero_pages: PageCount,
    /// Pages that an earlier round had sent.
    pub resent: PageCount,
    /// Bytes on the wire, headers included.
    pub bytes: ByteCount,
    /// Pages that were compressed by LZ4.
    pub lz4: Coded,
    /// Pages that were compressed by zstd.
    pub zstd: Coded,
    /// Pages that went as differences to what was sent before.
    pub delta: Coded,
}

/// What the vCPUs have done since tracking began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writers {
    /// Pages that each vCPU has dirtied, in order of the vCPUs; empty where nobody counts. A page that is
    /// dirtied anew after it was protected again counts anew.
    pub pages: Vec<PageCount>,
    /// How long they were held back by a throttle, all together.
    pub held: Duration,
}

/// The guest, stopped and saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// Dirty pages of each chunk, in order.
    pub dirty: Vec<u32>,
    /// State sections.
    pub state: Vec<u8>,
    /// When the first vCPU left the guest.
    pub stopped_first: Timestamp,
    /// When the last one did and nothing wrote to memory any more.
    pub stopped_last: Timestamp,
    /// When the dirty log had been read.
    pub harvested: Timestamp,
    /// When the state had been saved.
    pub saved: Timestamp,
    /// With a switch: every page that the target will not have when the guest runs there, those of
    /// earlier passes included, those that are sent first not.
    pub missing: PageCount,
    /// The same pages of each chunk, in order.
    pub missing_counts: Vec<u32>,
    /// Those of them that are pushed in the order in which earlier moves saw them asked for.
    pub recorded: PageCount,
}

/// A fact for the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceEvent {
    /// The operator asked for the migration. First event of all.
    Begin,
    /// Control and push streams are up.
    Connected,
    /// They could not be made, or one of them broke, or the peer sent nonsense on it.
    ConnectionLost {
        /// One line for the operator.
        reason: String,
    },
    /// A control frame arrived.
    Frame(ControlFrame),
    /// The phase was recorded by the VM process.
    Recorded(Phase),
    /// Dirty tracking is on; every page counts as dirty.
    TrackingStarted,
    /// The guest was paused, saved and resumed.
    Rehearsed {
        /// State sections.
        state: Vec<u8>,
        /// How long the guest stood.
        stall: Duration,
        /// From the last vCPU's stop to the end of harvest and save.
        save: Duration,
    },
    /// The dirty log was read, not cleared.
    Harvested {
        /// For this round.
        round: u32,
        /// Pages to send of each chunk, in order. For round 0 pages that exist.
        dirty: Vec<u32>,
        /// Hot pages beside these, which the round leaves out: at most as many as were allowed. They are
        /// not cleared, so that later harvests find them, too.
        deferred: PageCount,
        /// Who dirtied them.
        writers: Writers,
    },
    /// The dirty log was looked at in the bulk round.
    Looked {
        /// Dirty pages of each chunk, in order; none at all if a look would slow the guest.
        dirty: Vec<u32>,
    },
    /// The dirty log of a piece's range was cleared: from now on new writes are seen.
    Cleared(Piece),
    /// A piece was handed to the kernel.
    Sent {
        /// Which.
        piece: Piece,
        /// By which stream.
        stream: u8,
        /// What it took.
        sent: SentPiece,
    },
    /// Pages have gone out since the timer last ran out, though no piece may have been finished. Pages
    /// that were asked for do not count: a stream of pushes may stand meanwhile.
    Moved,
    /// The guest is paused, its last dirty pages are known, its state is saved.
    Paused(Paused),
    /// The paused guest runs again here.
    Resumed,
    /// The frozen memory was hashed.
    Hashed(Digest),
    /// The VM process ended and its memory is gone.
    Released,
    /// The VM process failed or did what it must not.
    GuestFailed {
        /// One line for the operator.
        reason: String,
    },
    /// The target answered a question about the outcome.
    Resolved(Resolution),
    /// It could not be asked.
    ResolveFailed {
        /// One line for the operator.
        reason: String,
    },
    /// The target has said which pages are missing there: their number in each chunk, in order.
    Reconciled {
        /// For the round in which they are pushed.
        dirty: Vec<u32>,
    },
    /// The operator changed limits.
    Set(Limits),
    /// The operator changed the technique; see [`super::Source::check_mode`].
    SetMode(Mode),
    /// The operator decides what cannot be found out.
    Fence(Fence),
    /// The operator wants it to end.
    Abort,
    /// The timer that was set has run out.
    Timer,
}

/// Something that the world shall do for the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceAction {
    /// Make the control stream and the push streams. Answer: `Connected` or `ConnectionLost`.
    Connect,
    /// Send a control frame. No answer.
    Send(ControlFrame),
    /// Record the phase in the VM process. Answer: `Recorded`.
    Record(Phase),
    /// Turn dirty tracking on, every page dirty. Answer: `TrackingStarted`.
    StartTracking,
    /// Turn it off, and let go of a throttled guest. No answer.
    StopTracking,
    /// Slow the guest's writers down, or let them go. Whatever pauses the guest, stops tracking or
    /// finds that this daemon is gone lets them go, too. No answer.
    Throttle(Option<Throttle>),
    /// Pause, save, resume. Answer: `Rehearsed`.
    Rehearse,
    /// Read the dirty log without clearing it. Answer: `Harvested`.
    Harvest {
        /// The round that it is for.
        round: u32,
        /// So many hot pages, at most, may be left out of the round's set.
        defer_max: PageCount,
    },
    /// Read the dirty log in the bulk round, for a forecast; it changes nothing about what is sent.
    /// Answer: `Looked`.
    Look,
    /// Read the dirty log without clearing it; the round's set is what no earlier pass told the
    /// target to be stale. Answer: `Harvested`.
    HarvestStale {
        /// The round that it is for.
        round: u32,
    },
    /// Clear the dirty log of the round's set in the piece's range. Answer: `Cleared`.
    Clear(Piece),
    /// Send the pages of the round's set in the piece's range, as they are now. Answer: `Sent`.
    SendPiece {
        /// Which.
        piece: Piece,
        /// By which stream.
        stream: u8,
    },
    /// Tell the target that the pages of the round's set in the piece's range are not what it has.
    /// Answer: `Sent`, with bytes and no pages.
    SendStale {
        /// Which.
        piece: Piece,
        /// By which stream.
        stream: u8,
    },
    /// Send the pages that the vCPUs need first, which no pass of the last round tells to be stale.
    /// Answer: `Sent` of [`Piece::first_needed`].
    SendFirst {
        /// The last round.
        round: u32,
        /// By which stream.
        stream: u8,
    },
    /// Push the pages of the piece's range that the target misses and has not been sent yet.
    /// Answer: `Sent`.
    Push {
        /// Which.
        piece: Piece,
        /// By which stream.
        stream: u8,
    },
    /// Send a barrier behind everything that was given to a stream. No answer.
    SendBarrier {
        /// Which.
        stream: u8,
        /// The round that ends here.
        round: u32,
        /// The round goes by so many streams, the first ones.
        streams: u8,
    },
    /// Pause, harvest into the set of `round`, save: one request. Answer: `Paused`.
    Pause {
        /// The last round.
        round: u32,
        /// Whether the dirty log says what to send; otherwise every page that exists is sent.
        harvest: bool,
        /// The guest will run at the target without these pages: the round's set is what has not
        /// been told to be stale, and from here on pulls are answered.
        switch: bool,
    },
    /// Make control, push and pull streams anew to a target where the guest runs. Answer:
    /// `Connected` or `ConnectionLost`. What is missing there comes by itself: `Reconciled`.
    Reconnect,
    /// Run the paused guest here. Answer: `Resumed`.
    Resume,
    /// Hash the frozen memory and the saved state. Answer: `Hashed`.
    Hash,
    /// End the VM process; the guest runs elsewhere. Answer: `Released`.
    Release,
    /// Shape the push streams together to this rate. No answer.
    LimitBandwidth(Option<BytesPerSecond>),
    /// Close all connections; nothing of them is reported any more. No answer.
    Disconnect,
    /// Ask the target on a new connection how the attempt ended. Answer: `Resolved` or
    /// `ResolveFailed`.
    Resolve,
    /// Tell `Timer` at this time; replaces an earlier timer.
    SetTimer(Timestamp),
    /// Tell the operator that the outcome is not known yet and heals by itself.
    ReportUnresolved {
        /// Why it is not known.
        reason: String,
    },
    /// The migration is over. The last action of all.
    Finish(Outcome),
}

impl SourceAction {
    /// Name for logs and for tests that hold a migration at a point.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Reconnect => "reconnect",
            Self::Send(frame) => frame.name(),
            Self::Record(Phase::Offered { .. }) => "record-offered",
            Self::Record(Phase::Committed { .. }) => "record-committed",
            Self::Record(_) => "record-running",
            Self::StartTracking => "start-tracking",
            Self::StopTracking => "stop-tracking",
            Self::Throttle(Some(_)) => "throttle",
            Self::Throttle(None) => "let-go",
            Self::Rehearse => "rehearse",
            Self::Harvest { .. } => "harvest",
            Self::Look => "look",
            Self::HarvestStale { .. } => "harvest-stale",
            Self::Clear(_) => "clear",
            Self::SendPiece { .. } => "send-piece",
            Self::SendStale { .. } => "send-stale",
            Self::SendFirst { .. } => "send-first",
            Self::Push { .. } => "push",
            Self::SendBarrier { .. } => "send-barrier",
            Self::Pause { .. } => "pause",
            Self::Resume => "resume",
            Self::Hash => "hash",
            Self::Release => "release",
            Self::LimitBandwidth(_) => "limit-bandwidth",
            Self::Disconnect => "disconnect",
            Self::Resolve => "ask-outcome",
            Self::SetTimer(_) => "set-timer",
            Self::ReportUnresolved { .. } => "report-unresolved",
            Self::Finish(_) => "finish",
        }
    }
}
