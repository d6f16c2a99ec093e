//! What goes wrong, and when: faults of the world that happen, and faults of limosa that are
//! planted to see the checker bite.

use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::source::SourceFault;
use limosa_engine::target::TargetFault;

/// When a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// At a time of the world.
    At(Timestamp),
    /// At the so-manieth thing that a daemon or a VM process does, so that the few steps of a
    /// handover are hit as often as the many of a copy.
    AtDeed(u32),
    /// So long after a source wanted its next commit recorded: the handover is over in a
    /// millisecond or two, and every moment of it counts.
    NearCommit(Duration),
    /// So long after a source wanted its guest paused: while the last round goes out.
    NearPause(Duration),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// The daemon of a host dies and comes back after the time.
    KillDaemon { host: usize, back: Duration },
    /// The VM process on a host that is part of a migration, or the running one, dies.
    KillVm { host: usize },
    /// Daemon and VM processes of a host die; the daemon comes back.
    KillHost { host: usize, back: Duration },
    /// The link breaks with all its connections and heals after the time.
    CutLink { back: Duration, is_silent: bool },
    /// One stream breaks, the connection with it as soon as somebody notices.
    CutStream { stream: u8, is_silent: bool },
    /// Nothing arrives for this long.
    Stall { length: Duration },
    /// The operator at the source ends the migration.
    Abort,
    /// The operator at the target does.
    AbortAtTarget,
    /// The operator changes the limits.
    Set(Limits),
    /// The operator changes the technique.
    SetMode(Mode),
    /// A host is gone with everything on it, and for ever; the operator will say so.
    LoseHost { host: usize },
    /// The target cannot make its next VM.
    RefuseCreate,
}

/// A fault of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) trigger: Trigger,
    pub(crate) deed: Deed,
    pub(crate) is_done: bool,
}

/// A fault of limosa that a test plants into a world. The world must not get away with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// In the engine of the source.
    Source(SourceFault),
    /// In the engine of the target.
    Target(TargetFault),
    /// In the daemons, the VM processes or the kernel.
    World(WorldFault),
}

/// A planted fault outside the engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorldFault {
    /// The dirty log misses a write now and then.
    DirtyBitDropped,
    /// A VM process that lost its daemon runs its guest whatever its phase says.
    PhaseIgnored,
    /// An attempt of which nothing is known is said to run.
    RunsWithoutProof,
    /// An attempt that arrived is said to be barred.
    BarredWithoutProof,
    /// A page that became zero is not written at the target.
    ZeroNotOverwritten,
    /// A state is loaded although the guest runs.
    LoadAcceptedLate,
    /// Which pages exist is looked up before the bulk round's clear, not after it.
    HolesBeforeClear,
    /// A restarted daemon answers before it has asked its VM processes.
    AnswerBeforeAttach,
    /// A VM process does not write down durably that an attempt arrived.
    LedgerLeftOut,
    /// A page that is asked for is answered as it was when it was sent first.
    PulledPageOld,
    /// A page that comes twice is installed twice.
    InstalledTwice,
    /// A page can be read while its content is being copied.
    HalfPageVisible,
    /// What the target is told to be stale stays in place there.
    StaleIgnored,
    /// The VM process keeps no descriptor of its page faults: with the daemon's they end, and
    /// missing pages read as zero.
    LastFaultDescriptorClosed,
    /// A VM process that lost its daemon goes on to hold its guest back.
    ThrottleKept,
    /// Hot pages that rounds left out are not sent in the last one.
    DeferredForgotten,
    /// Hot pages that rounds leave out are cleared in the dirty log.
    DeferredCleared,
    /// The guest runs at the target without a record of it.
    RunWithoutRecord,
    /// A restarted daemon tells the target that the memory is lost although its VM process has it.
    MemoryCalledLost,
}
