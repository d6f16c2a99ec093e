//! A VM process: one guest's memory and registers, a phase, and requests that it serves in order.
//!
//! It lives longer than the daemon that made it. Requests are served one after the other, each
//! takes time; the loss of the daemon is noticed behind everything that the daemon had written into
//! the socket, as with a real one. What the process refuses, it refuses by its phase.

use crate::guest::Memory;
use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::source::{Piece, Writers};
use limosa_engine::throttle::Throttle;
use limosa_pages::{PageCount, PageRange, PageSet};
use std::collections::{BTreeSet, VecDeque};

/// Index of a VM process in its world, dead ones included.
pub(crate) type VmIndex = usize;

/// Who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    Source(usize),
    Target(usize),
    Daemon { host: usize, generation: u32 },
}

/// What a daemon asks of a VM process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Attach,
    Record(Phase),
    StartTracking,
    StopTracking,
    Throttle(Option<Throttle>),
    Rehearse,
    Harvest {
        round: u32,
        is_stale: bool,
    },
    Look,
    /// All but the pages of these runs.
    Clear(Piece, Vec<PageRange>),
    Pause {
        harvest: bool,
    },
    Resume,
    Load {
        state: Vec<u8>,
    },
    ServeFaults,
    CommitAndRun {
        id: MigrationId,
        keeps_faults: bool,
    },
    Disarm {
        id: MigrationId,
    },
    Exit,
}

/// What waits in the process's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Request(Caller, Request),
    DaemonLost,
}

/// What comes back.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// It is there; its phase is its own to be looked at.
    Attached,
    Recorded(Phase),
    TrackingStarted,
    TrackingStopped,
    Throttled,
    Rehearsed {
        state: Vec<u8>,
        stall: Duration,
        save: Duration,
    },
    Harvested {
        round: u32,
        is_stale: bool,
        log: PageSet,
        writers: Writers,
    },
    /// In the bulk round.
    Looked {
        log: PageSet,
    },
    Cleared(Piece),
    Paused {
        log: Option<PageSet>,
        state: Vec<u8>,
        moments: [Timestamp; 4],
    },
    Resumed,
    Loaded {
        took: Duration,
    },
    /// Whoever touches a missing page waits.
    FaultsServed,
    Disarmed,
    /// Since this time of the world.
    Running {
        at: Timestamp,
    },
    Exited,
    /// The process refused; it lives on.
    Refused(String),
    /// The process is dead.
    Gone,
}

/// A request in work.
#[derive(Debug)]
pub(crate) struct Current {
    pub(crate) message: Message,
    /// What was found when the work began.
    pub(crate) draft: Option<Answer>,
}

/// One VM process; see the module.
#[derive(Debug)]
pub(crate) struct VmProcess {
    pub(crate) host: usize,
    pub(crate) is_alive: bool,
    /// Ended by a fault, not by its own or its daemon's decision.
    pub(crate) was_killed: bool,
    /// The guest has run elsewhere since: it must never run here again.
    pub(crate) is_past: bool,
    pub(crate) phase: Phase,
    pub(crate) is_running: bool,
    /// How fast its guest may write.
    pub(crate) throttle: Option<Throttle>,
    pub(crate) memory: Memory,
    pub(crate) registers: u64,
    pub(crate) queue: VecDeque<Message>,
    pub(crate) current: Option<Current>,
    pub(crate) is_woken: bool,
    /// Missing pages that somebody in it waits for.
    pub(crate) waiting: BTreeSet<u64>,
    /// It stands in the middle of loading a state, at a missing page.
    pub(crate) is_stuck: bool,
    /// It is looked at again soon.
    pub(crate) is_ticking: bool,
}

impl VmProcess {
    pub(crate) fn new(host: usize, pages: PageCount, phase: Phase) -> Self {
        Self {
            host,
            is_alive: true,
            was_killed: false,
            is_past: false,
            phase,
            is_running: false,
            throttle: None,
            memory: Memory::new(pages),
            registers: 0,
            queue: VecDeque::new(),
            current: None,
            is_woken: false,
            waiting: BTreeSet::new(),
            is_stuck: false,
            is_ticking: false,
        }
    }

    /// True while a request waits or is in work.
    pub(crate) fn is_busy(&self) -> bool {
        self.current.is_some() || !self.queue.is_empty()
    }

    /// The registers as a section, with as much filler as real ones would have.
    pub(crate) fn save(&self, filler: usize) -> Vec<u8> {
        let mut state = self.registers.to_le_bytes().to_vec();
        state.resize(8 + filler, 0x5a);
        state
    }

    /// Sets the registers from a section.
    pub(crate) fn load(&mut self, state: &[u8]) -> Result<(), String> {
        match state.first_chunk::<8>() {
            Some(bytes) => {
                self.registers = u64::from_le_bytes(*bytes);
                Ok(())
            }
            None => Err(String::from("a state section is too short")),
        }
    }

    /// The process is no more.
    pub(crate) fn end(&mut self, was_killed: bool) {
        self.is_alive = false;
        self.is_running = false;
        self.was_killed = was_killed;
        self.queue.clear();
        self.current = None;
        self.waiting.clear();
        self.is_stuck = false;
    }
}

/// The pages that loading a state touches, as a clock or a queue in the guest's memory.
pub(crate) fn touched_by_load(state: &[u8], memory: PageCount) -> [u64; 2] {
    let seed = state
        .first_chunk::<8>()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    [7, 131].map(|factor: u64| seed.wrapping_mul(factor) % memory.get())
}
