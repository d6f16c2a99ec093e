//! The source of a migration: from the operator's request to a source that holds nothing, or to a
//! guest that runs on as if nothing had been.
//!
//! ```text
//!  Connecting ─▶ Offering ─▶ Probing ─▶ Recording ─▶ Tracking ─▶ Rehearsing ─▶ Rounds ─▶ Pausing
//!                                                                                           │
//!      ┌────────────────────────────────────────────────────────────────────────────────────┘
//!      ▼
//!  LastRound ─▶ Committing ─▶ AwaitRuns ─▶ (Verifying) ─▶ Releasing ─▶ Finished
//!                                 │ connection lost              ▲
//!                                 ▼                              │ runs
//!                             Resolving ─────────────────────────┘
//!                                 │ barred
//!  any state before Committing    ▼
//!  ends by failure or abort ─▶ Returning (record, resume) ─▶ Finished
//! ```
//!
//! A guest that runs at the target before its pages are there takes a longer way: [`switching`].
//!
//! Invariants: a page is read only after its dirty bit was cleared ([`rounds`]); the state goes
//! out only after every page was handed to its stream, and the target waits for the barriers; the
//! commit frame leaves only after the VM process recorded it; from then on only the target's word
//! brings the guest back.
//!
//! Absent on purpose: pages, sockets, clocks.

mod copying;
mod ending;
mod event;
mod forecast;
mod preparing;
mod rounds;
mod slowing;
mod streaming;
mod switching;

pub use event::{
    Fence, Paused, Piece, SentPiece, SourceAction, SourceConfig, SourceEvent, Writers,
};

use crate::handover::Phase;
use crate::journal::Machine;
use crate::policy::{Limits, Mode, Progress};
use crate::report::{ClockOffset, MigrationReport, Outcome};
use crate::streams::Climber;
use crate::throttle::Throttle;
use crate::time::Timestamp;
use crate::wire::{ControlFrame, Digest, clip};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use forecast::Forecast;
use limosa_pages::{ByteCount, PageCount};
use rounds::Round;
use serde::{Deserialize, Serialize};

/// Silence of the peer after which it counts as lost. Far beyond any pause of a busy host, since a
/// migration that ends by mistake costs more than a few seconds of waiting.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How often each side says that it is still here: many times within [`SILENCE_MAX`].
pub const KEEPALIVE_EVERY: Duration = Duration::from_secs(1);
/// Time without a sent piece or an acknowledged round after which a link counts as dead, and longest
/// wait for the word that all pages that were pushed have arrived.
pub const STALL_MAX: Duration = Duration::from_secs(30);
/// Probes of the peer's clock; the fastest counts, so a few are enough to find a quiet moment.
pub const CLOCK_PROBES: u32 = 8;
/// First and longest wait between two questions about an unresolved outcome.
pub const RESOLVE_BACKOFF: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_secs(2));
/// Bytes from which on every round says something about bandwidth. A smaller one is mostly latency
/// and counts only if no larger one was seen.
const BANDWIDTH_SAMPLE_MIN: ByteCount = ByteCount::new(4 << 20);

/// A fault that a test plants to see that the simulator's checker catches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceFault {
    /// The guest is paused without reading the dirty log again.
    NoHarvestAfterPause,
    /// A piece is sent first and its dirty log cleared afterwards.
    ClearAfterCopy,
    /// A lost connection after commit resumes the guest without asking.
    ResumeAfterCommit,
    /// The commit frame leaves before it was recorded.
    CommitBeforeRecord,
    /// The target is not told which of its pages are stale.
    StaleNotTold,
    /// A stream that is not in use at the end of a round gets no barrier, whatever it carried.
    BarriersOfStreamsInUse,
}

/// Where the migration stands, for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Connecting, preflight, clocks, rehearsal.
    Preparing,
    /// Pages go out while the guest runs.
    Copying,
    /// The guest is paused.
    Paused,
    /// Commit was recorded; the target decides.
    Committed,
    /// The guest runs at the target and misses pages, which are sent as it needs them.
    Serving,
    /// The target could not be asked yet whether the guest runs there.
    Unresolved,
    /// The guest runs at the target; the source tidies up.
    Releasing,
    /// The attempt failed; the guest is being put back.
    Returning,
    /// Over.
    Finished,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Connecting,
    Offering,
    Probing {
        number: u32,
        asked: Timestamp,
    },
    Recording {
        asked: Timestamp,
    },
    Tracking,
    Rehearsing {
        sent: Option<Timestamp>,
    },
    Rounds,
    Telling {
        passes: u32,
    },
    Pausing,
    LastRound {
        prepared: bool,
    },
    Committing {
        lost: Option<String>,
    },
    AwaitRuns,
    Serving,
    Reattaching {
        reconciled: bool,
    },
    Verifying {
        ours: Option<Digest>,
        theirs: Option<Digest>,
    },
    /// The target has every page. Streams have not said yet what they sent of their last pieces.
    Accounting,
    Releasing,
    Resolving {
        backoff: Duration,
        asking: bool,
    },
    Returning {
        outcome: Outcome,
    },
    Finished,
}

/// The source's state machine; see the module.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    fault: Option<SourceFault>,
    state: State,
    /// True from the `Pause` action until the guest runs or is gone.
    paused: bool,
    tracking: bool,
    /// The target can serve page faults.
    can_switch: bool,
    /// The guest will run, or runs, at the target before its pages are there.
    is_switching: bool,
    /// Pages that are missing there, of each chunk; unknown until the target has said it again.
    missing: Option<Vec<u32>>,
    /// It is known that the guest has run there.
    ran_there: bool,
    /// The guest ended at the target.
    lost_guest: Option<String>,
    begun: Timestamp,
    heard: Timestamp,
    moved: Timestamp,
    round: Option<Round>,
    /// Made in a bulk round, used after it.
    forecast: Option<Forecast>,
    progress: Progress,
    /// Pages of the former round, if its size says something about the guest.
    previous_round: Option<PageCount>,
    /// Hot pages are left out no more.
    deferral_is_over: bool,
    /// Bytes of the round that gave the bandwidth.
    bandwidth_sample: ByteCount,
    best_probe: Option<Duration>,
    record_cost: Duration,
    save_cost: Duration,
    slowing: slowing::Slowing,
    /// Of the number of streams, while it is not the operator's.
    climber: Climber,
    stopped: Option<Paused>,
    prepared: Option<(Timestamp, Timestamp)>,
    report: MigrationReport,
}

impl Source {
    /// A migration that waits for [`SourceEvent::Begin`].
    ///
    /// # Panics
    /// If the configuration breaks its own limits: see [`SourceConfig::is_sound`].
    pub fn new(config: SourceConfig) -> Self {
        assert!(config.is_sound(), "a configuration within its limits");
        let report = MigrationReport {
            id: config.id,
            mode: config.mode,
            mode_changes: Vec::new(),
            throttle: None,
            outcome: None,
            pause_reason: None,
            preparation: Duration::ZERO,
            total: Duration::ZERO,
            eviction: Duration::ZERO,
            downtime: None,
            switch: None,
            predicted_downtime: None,
            fixed_cost: Duration::ZERO,
            rehearsal_stall: Duration::ZERO,
            clock: ClockOffset::default(),
            rounds: Vec::new(),
            state_bytes: ByteCount::ZERO,
            missing_at_switch: PageCount::ZERO,
            recorded: PageCount::ZERO,
            missing_set_bytes: ByteCount::ZERO,
            faults: None,
            digest_equal: None,
        };
        Self {
            fault: None,
            state: State::Idle,
            paused: false,
            tracking: false,
            can_switch: false,
            is_switching: false,
            missing: None,
            ran_there: false,
            lost_guest: None,
            begun: Timestamp::ZERO,
            heard: Timestamp::ZERO,
            moved: Timestamp::ZERO,
            round: None,
            forecast: None,
            progress: Progress::before(config.pages()),
            previous_round: None,
            deferral_is_over: false,
            // A round of zero pages sends next to nothing and says nothing.
            bandwidth_sample: PageCount::new(1).bytes(),
            best_probe: None,
            record_cost: Duration::ZERO,
            save_cost: Duration::ZERO,
            slowing: slowing::Slowing::default(),
            climber: Climber::new(config.streams),
            stopped: None,
            prepared: None,
            report,
            config,
        }
    }

    /// A migration that a restarted daemon found in [`Phase::Committed`]: all that is left is to
    /// ask the target. Begins with [`SourceEvent::Begin`] like any other.
    pub fn recover(config: SourceConfig) -> Self {
        let mut source = Self::new(config);
        source.paused = true;
        // The saved state, half of what is compared, was lost with the daemon.
        source.config.verify = false;
        // The daemon that was killed may have switched it on, and nobody has switched it off.
        source.tracking = true;
        source.state = State::Resolving {
            backoff: RESOLVE_BACKOFF.0,
            asking: false,
        };
        source
    }

    /// Plants a fault. For the tests of the simulator only.
    #[must_use]
    pub fn with_fault(mut self, fault: SourceFault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// The report so far.
    pub const fn report(&self) -> &MigrationReport {
        &self.report
    }

    /// The numbers on which the last verdict rests.
    pub const fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The technique as it is now.
    pub const fn mode(&self) -> Mode {
        self.config.mode
    }

    /// What the operator allows now.
    pub const fn limits(&self) -> &Limits {
        &self.config.limits
    }

    /// How fast the guest may write now; `None` if as fast as it can.
    pub const fn throttle(&self) -> Option<Throttle> {
        self.slowing.in_force()
    }

    /// Pages of the current round, and how many of them have been sent.
    pub fn round_progress(&self) -> (PageCount, PageCount) {
        self.round
            .as_ref()
            .map_or((PageCount::ZERO, PageCount::ZERO), Round::progress)
    }

    /// Where it stands.
    pub const fn stage(&self) -> Stage {
        match self.state {
            State::Idle
            | State::Connecting
            | State::Offering
            | State::Probing { .. }
            | State::Recording { .. }
            | State::Tracking
            | State::Rehearsing { .. } => Stage::Preparing,
            State::Rounds | State::Telling { .. } => Stage::Copying,
            State::Pausing | State::LastRound { .. } => Stage::Paused,
            State::Committing { .. } | State::AwaitRuns => Stage::Committed,
            State::Serving => Stage::Serving,
            State::Resolving { .. } | State::Reattaching { .. } => Stage::Unresolved,
            State::Verifying { .. } | State::Accounting | State::Releasing => Stage::Releasing,
            State::Returning { .. } => Stage::Returning,
            State::Finished => Stage::Finished,
        }
    }

    fn frame(&mut self, now: Timestamp, frame: ControlFrame) -> Vec<SourceAction> {
        self.heard = now;
        match (frame, &self.state) {
            (ControlFrame::Keepalive, _) => Vec::new(),
            (frame, State::Serving | State::Reattaching { .. }) => {
                self.frame_while_serving(now, frame)
            }
            (ControlFrame::Accept { boot_id, can_fault }, State::Offering) => {
                self.accepted(now, boot_id, can_fault)
            }
            (
                ControlFrame::ClockEcho {
                    number,
                    now: theirs,
                },
                State::Probing {
                    number: asked_number,
                    asked,
                },
            ) if number == *asked_number => {
                let asked = *asked;
                self.take_probe(now, number, asked, theirs)
            }
            (ControlFrame::Rehearsed { load }, State::Rehearsing { sent: Some(sent) }) => {
                let there_and_back = now.since(*sent);
                self.rehearsal_loaded(now, there_and_back, load)
            }
            (ControlFrame::RoundReceived { round }, State::Rounds | State::Telling { .. }) => {
                self.round_received(now, round)
            }
            (ControlFrame::RoundReceived { .. }, State::LastRound { .. }) => {
                self.close_round(now);
                Vec::new()
            }
            (
                ControlFrame::Prepared {
                    received_at,
                    loaded_at,
                },
                State::LastRound { prepared: false },
            ) => {
                self.prepared = Some((received_at, loaded_at));
                self.state = State::LastRound { prepared: true };
                self.commit_if_ready(now)
            }
            (
                ControlFrame::Runs {
                    committed_at,
                    first_instruction_at,
                },
                State::AwaitRuns,
            ) => self.runs(now, committed_at, first_instruction_at),
            (ControlFrame::Verified(digest), State::Verifying { .. }) => self.verified(now, digest),
            (ControlFrame::Refuse { reason }, State::Offering) => {
                self.fail(now, alloc::format!("the target refused: {}", clip(&reason)))
            }
            (ControlFrame::Abort { reason }, _) => {
                self.lost(now, alloc::format!("the target gave up: {}", clip(&reason)))
            }
            (frame, _) => {
                let text = alloc::format!("the target sent {} out of turn", frame.name());
                self.lost(now, text)
            }
        }
    }

    fn recorded(&mut self, now: Timestamp, phase: &Phase) -> Vec<SourceAction> {
        match (&self.state, phase) {
            (State::Recording { asked }, Phase::Offered { .. }) => {
                self.record_cost = now.since(*asked);
                if self.config.mode.copies_live() {
                    self.state = State::Tracking;
                    self.tracking = true;
                    return vec![SourceAction::StartTracking];
                }
                self.rehearse()
            }
            (State::Committing { lost: None }, Phase::Committed { .. }) => {
                self.state = State::AwaitRuns;
                if self.fault == Some(SourceFault::CommitBeforeRecord) {
                    return Vec::new();
                }
                vec![SourceAction::Send(ControlFrame::Commit)]
            }
            // The commit frame never left, so the guest may simply come back.
            (State::Committing { lost: Some(reason) }, Phase::Committed { .. }) => {
                let reason = reason.clone();
                self.go_back(now, Outcome::Failed { reason })
            }
            (State::Returning { outcome }, Phase::Running) => {
                if self.paused {
                    return vec![SourceAction::Resume];
                }
                let outcome = outcome.clone();
                self.finish(now, outcome)
            }
            _ => Vec::new(),
        }
    }

    fn timer(&mut self, now: Timestamp) -> Vec<SourceAction> {
        match self.state {
            State::Finished | State::Idle => Vec::new(),
            State::Resolving { .. } => self.ask(now),
            _ => self.watch(now),
        }
    }

    /// Looks after the peer and the link once a [`KEEPALIVE_EVERY`].
    fn watch(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let mut actions = vec![SourceAction::SetTimer(now.after(KEEPALIVE_EVERY))];
        let is_moving = matches!(
            self.state,
            State::Rounds
                | State::Telling { .. }
                | State::LastRound { .. }
                | State::Verifying { .. }
                | State::Accounting
        ) || (self.state == State::Serving && self.config.mode.pushes());
        if now.since(self.heard) > SILENCE_MAX {
            actions.extend(self.lost(now, String::from("the target has been silent for 10 s")));
        } else if is_moving && now.since(self.moved) > STALL_MAX {
            actions.extend(self.lost(now, String::from("no page has moved for 30 s")));
        } else if !matches!(self.state, State::Connecting | State::Returning { .. }) {
            actions.push(SourceAction::Send(ControlFrame::Keepalive));
        }
        actions
    }

    fn set(&mut self, now: Timestamp, limits: Limits) -> Vec<SourceAction> {
        let in_use = self.streams_in_use();
        let before = core::mem::replace(&mut self.config.limits, limits);
        let mut actions = self.let_go_if_forbidden(now);
        if limits.bandwidth_max != before.bandwidth_max {
            actions.push(SourceAction::LimitBandwidth(limits.bandwidth_max));
        }
        self.restart_climber(before.streams, in_use);
        if self.streams_in_use() > in_use && self.gives_pieces() {
            actions.extend(self.next_pieces());
        }
        actions
    }
}

impl Machine for Source {
    type Event = SourceEvent;
    type Action = SourceAction;

    fn handle(&mut self, now: Timestamp, event: SourceEvent) -> Vec<SourceAction> {
        if self.state == State::Finished {
            return Vec::new();
        }
        match event {
            SourceEvent::Begin => self.begin(now),
            SourceEvent::Connected if matches!(self.state, State::Reattaching { .. }) => {
                self.heard = now;
                let streams = self.config.streams;
                vec![SourceAction::Send(ControlFrame::Reattach { streams })]
            }
            SourceEvent::Connected => self.connected(now),
            SourceEvent::ConnectionLost { reason } => self.lost(now, reason),
            SourceEvent::Frame(frame) => self.frame(now, frame),
            SourceEvent::Recorded(phase) => self.recorded(now, &phase),
            SourceEvent::TrackingStarted if self.state == State::Tracking => self.rehearse(),
            SourceEvent::TrackingStarted => Vec::new(),
            SourceEvent::Rehearsed { state, stall, save } => {
                self.rehearsed(now, state, stall, save)
            }
            SourceEvent::Harvested {
                round,
                dirty,
                deferred,
                writers,
            } => self.harvested(now, round, (&dirty, deferred), &writers),
            SourceEvent::Looked { dirty } => self.looked(now, dirty),
            SourceEvent::Cleared(piece) => self.cleared(now, piece),
            SourceEvent::Sent {
                piece,
                stream,
                sent,
            } => self.sent(now, piece, stream, sent),
            SourceEvent::Moved => {
                self.moved = now;
                Vec::new()
            }
            SourceEvent::Paused(paused) => self.paused(now, paused),
            SourceEvent::Resumed => self.resumed(now),
            SourceEvent::Hashed(digest) => self.hashed(now, digest),
            SourceEvent::Released => self.released(now),
            SourceEvent::GuestFailed { reason } => self.guest_failed(now, reason),
            SourceEvent::Resolved(resolution) => self.resolved(now, resolution),
            SourceEvent::ResolveFailed { reason } => self.resolve_failed(now, reason),
            SourceEvent::Reconciled { dirty } => self.reconciled(now, dirty),
            SourceEvent::Set(limits) => self.set(now, limits),
            SourceEvent::SetMode(mode) => self.set_mode(now, mode),
            SourceEvent::Fence(fence) => self.fence(now, fence),
            SourceEvent::Abort => self.abort(now),
            SourceEvent::Timer => self.timer(now),
        }
    }
}
