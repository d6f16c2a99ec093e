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
//! Invariants: a page is read only after its dirty bit was cleared ([`rounds`]); the state goes
//! out only after every page was handed to its stream, and the target waits for the barriers; the
//! commit frame leaves only after the VM process recorded it; from then on only the target's word
//! brings the guest back.
//!
//! Absent on purpose: pages, sockets, clocks.

mod event;
mod rounds;

pub use event::{Paused, Piece, SentPiece, SourceAction, SourceConfig, SourceEvent};

use crate::handover::{Phase, Resolution};
use crate::journal::Machine;
use crate::policy::{Limits, PauseReason, Progress, Verdict};
use crate::report::{ClockOffset, Downtime, MigrationReport, Outcome};
use crate::time::Timestamp;
use crate::wire::{ControlFrame, Digest, Start, clip};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::{ByteCount, BytesPerSecond, PageCount};
use rounds::{Round, Step};
use serde::{Deserialize, Serialize};

/// Silence of the peer after which it counts as lost. Far beyond any pause of a busy host, since a
/// migration that ends by mistake costs more than a few seconds of waiting.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How often each side says that it is still here: many times within [`SILENCE_MAX`].
pub const KEEPALIVE_EVERY: Duration = Duration::from_secs(1);
/// Time without a sent piece or an acknowledged round after which a link counts as dead.
pub const STALL_MAX: Duration = Duration::from_secs(30);
/// Probes of the peer's clock; the fastest counts, so a few are enough to find a quiet moment.
pub const CLOCK_PROBES: u32 = 8;
/// First and longest wait between two questions about an unresolved outcome.
const RESOLVE_BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Bytes below which a round says nothing about bandwidth: it is all latency.
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
    Pausing,
    LastRound {
        prepared: bool,
    },
    Committing {
        lost: Option<String>,
    },
    AwaitRuns,
    Verifying {
        ours: Option<Digest>,
        theirs: Option<Digest>,
    },
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
    begun: Timestamp,
    heard: Timestamp,
    moved: Timestamp,
    round: Option<Round>,
    progress: Progress,
    previous_remaining: Option<PageCount>,
    best_probe: Option<Duration>,
    record_cost: Duration,
    save_cost: Duration,
    stopped: Option<Paused>,
    prepared: Option<(Timestamp, Timestamp)>,
    report: MigrationReport,
}

impl Source {
    /// A migration that waits for [`SourceEvent::Begin`].
    ///
    /// # Panics
    /// If the configuration breaks its own limits: no streams, no memory, a chunk that KVM could
    /// not clear.
    pub fn new(config: SourceConfig) -> Self {
        assert!(config.streams >= 1, "a migration needs a push stream");
        assert!(config.memory > PageCount::ZERO, "a guest has memory");
        assert!(
            config.chunk.get() >= 64 && config.chunk.get().is_multiple_of(64),
            "chunk"
        );
        let report = MigrationReport {
            id: config.id,
            mode: config.mode,
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
            digest_equal: None,
        };
        let progress = Progress {
            rounds: 0,
            remaining: config.memory,
            rounds_without_progress: 0,
            bandwidth: None,
            fixed_cost: Duration::ZERO,
            elapsed: Duration::ZERO,
        };
        Self {
            config,
            fault: None,
            state: State::Idle,
            paused: false,
            tracking: false,
            begun: Timestamp::ZERO,
            heard: Timestamp::ZERO,
            moved: Timestamp::ZERO,
            round: None,
            progress,
            previous_remaining: None,
            best_probe: None,
            record_cost: Duration::ZERO,
            save_cost: Duration::ZERO,
            stopped: None,
            prepared: None,
            report,
        }
    }

    /// A migration that a restarted daemon found in [`Phase::Committed`]: all that is left is to
    /// ask the target. Begins with [`SourceEvent::Begin`] like any other.
    pub fn recover(config: SourceConfig) -> Self {
        let mut source = Self::new(config);
        source.paused = true;
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

    /// What the operator allows now.
    pub const fn limits(&self) -> &Limits {
        &self.config.limits
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
            State::Rounds => Stage::Copying,
            State::Pausing | State::LastRound { .. } => Stage::Paused,
            State::Committing { .. } | State::AwaitRuns => Stage::Committed,
            State::Resolving { .. } => Stage::Unresolved,
            State::Verifying { .. } | State::Releasing => Stage::Releasing,
            State::Returning { .. } => Stage::Returning,
            State::Finished => Stage::Finished,
        }
    }

    fn begin(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.begun = now;
        self.heard = now;
        self.moved = now;
        if matches!(self.state, State::Resolving { .. }) {
            return self.ask(now);
        }
        assert_eq!(self.state, State::Idle, "begun twice");
        self.state = State::Connecting;
        let limit = SourceAction::LimitBandwidth(self.config.limits.bandwidth_max);
        vec![
            limit,
            SourceAction::Connect,
            SourceAction::SetTimer(now.after(KEEPALIVE_EVERY)),
        ]
    }

    fn connected(&mut self, now: Timestamp) -> Vec<SourceAction> {
        if self.state != State::Connecting {
            return Vec::new();
        }
        self.heard = now;
        self.state = State::Offering;
        let start = Start {
            mode: self.config.mode,
            memory_pages: self.config.memory,
            streams: self.config.streams,
            verify: self.config.verify,
            vm: self.config.vm.clone(),
        };
        vec![SourceAction::Send(ControlFrame::Start(start))]
    }

    fn frame(&mut self, now: Timestamp, frame: ControlFrame) -> Vec<SourceAction> {
        self.heard = now;
        match (frame, &self.state) {
            (ControlFrame::Keepalive, _) => Vec::new(),
            (ControlFrame::Accept { boot_id }, State::Offering) => {
                if boot_id == self.config.boot_id {
                    // One kernel, one clock.
                    return self.record_offer(now);
                }
                self.probe(now, 0)
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
            (ControlFrame::RoundReceived { round }, State::Rounds) => {
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
            (ControlFrame::Verified(digest), State::Verifying { ours, .. }) => {
                self.state = State::Verifying {
                    ours: *ours,
                    theirs: Some(digest),
                };
                self.compare(now)
            }
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

    fn probe(&mut self, now: Timestamp, number: u32) -> Vec<SourceAction> {
        self.state = State::Probing { number, asked: now };
        vec![SourceAction::Send(ControlFrame::ClockProbe { number })]
    }

    /// The offset that the fastest probe saw, as in NTP: the answer was given half way, give or
    /// take half the round trip.
    fn take_probe(
        &mut self,
        now: Timestamp,
        number: u32,
        asked: Timestamp,
        theirs: Timestamp,
    ) -> Vec<SourceAction> {
        let round_trip = now.since(asked);
        if self.best_probe.is_none_or(|best| round_trip < best) {
            self.best_probe = Some(round_trip);
            let middle = asked.after(round_trip / 2);
            let nanos = i128::from(theirs.as_nanos()) - i128::from(middle.as_nanos());
            // Two clocks that are centuries apart are a peer's joke, not a reason to overflow.
            let nanos = i64::try_from(nanos).unwrap_or(0);
            self.report.clock = ClockOffset {
                nanos,
                error: round_trip / 2,
            };
        }
        if number + 1 < CLOCK_PROBES {
            return self.probe(now, number + 1);
        }
        self.record_offer(now)
    }

    fn record_offer(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.state = State::Recording { asked: now };
        vec![SourceAction::Record(Phase::Offered { id: self.config.id })]
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

    fn rehearse(&mut self) -> Vec<SourceAction> {
        self.state = State::Rehearsing { sent: None };
        vec![SourceAction::Rehearse]
    }

    fn rehearsed(
        &mut self,
        now: Timestamp,
        state: Vec<u8>,
        stall: Duration,
        save: Duration,
    ) -> Vec<SourceAction> {
        if self.state != (State::Rehearsing { sent: None }) {
            return Vec::new();
        }
        self.report.rehearsal_stall = stall;
        self.save_cost = save;
        if !ControlFrame::fits(state.len()) {
            return self.fail(
                now,
                String::from("the guest's state is too large to be sent"),
            );
        }
        self.state = State::Rehearsing { sent: Some(now) };
        vec![SourceAction::Send(ControlFrame::Rehearsal { state })]
    }

    /// The fixed cost: stop and save; state there, load, answer; record; commit there.
    fn rehearsal_loaded(
        &mut self,
        now: Timestamp,
        there_and_back: Duration,
        load: Duration,
    ) -> Vec<SourceAction> {
        let one_way = there_and_back.saturating_sub(load) / 2;
        self.progress.fixed_cost = self.save_cost + there_and_back + self.record_cost + one_way;
        self.report.fixed_cost = self.progress.fixed_cost;
        self.report.preparation = now.since(self.begun);
        self.moved = now;
        if self.config.mode.copies_live() {
            self.state = State::Rounds;
            return vec![SourceAction::Harvest { round: 0 }];
        }
        self.decide(now)
    }

    /// Asks the policy about the pages that wait; they are in `round` already or still unknown.
    fn decide(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.progress.elapsed = now.since(self.begun);
        match self
            .config
            .mode
            .policy()
            .verdict(&self.progress, &self.config.limits)
        {
            Verdict::AnotherRound => self.next_pieces(),
            Verdict::PauseAndCopy(reason) => self.pause(reason),
        }
    }

    fn pause(&mut self, reason: PauseReason) -> Vec<SourceAction> {
        self.state = State::Pausing;
        self.paused = true;
        self.report.pause_reason = Some(reason);
        self.report.predicted_downtime = self.progress.predicted_downtime();
        let harvest = self.tracking && self.fault != Some(SourceFault::NoHarvestAfterPause);
        vec![SourceAction::Pause {
            round: self.progress.rounds,
            harvest,
        }]
    }

    fn harvested(&mut self, now: Timestamp, round: u32, dirty: &[u32]) -> Vec<SourceAction> {
        if self.state != State::Rounds || round != self.progress.rounds {
            return Vec::new();
        }
        let round = Round::live(round, dirty, &self.config, now);
        self.progress.remaining = round.progress().0;
        if let Some(last) = self.report.rounds.last_mut() {
            last.dirty_after = self.progress.remaining;
        }
        if let Some(previous) = self.previous_remaining {
            let shrank = self.progress.remaining.get() < previous.get().saturating_mul(9) / 10;
            self.progress.rounds_without_progress = if shrank {
                0
            } else {
                self.progress.rounds_without_progress + 1
            };
        }
        // The bulk round's size says nothing about the guest's dirty rate.
        if self.progress.rounds > 0 {
            self.previous_remaining = Some(self.progress.remaining);
        }
        self.round = Some(round.with_fault(self.fault));
        self.decide(now)
    }

    fn paused(&mut self, now: Timestamp, paused: Paused) -> Vec<SourceAction> {
        if let State::Returning { .. } = self.state {
            return Vec::new();
        }
        if self.state != State::Pausing {
            return Vec::new();
        }
        self.moved = now;
        self.state = State::LastRound { prepared: false };
        if !ControlFrame::fits(paused.state.len()) {
            return self.fail(
                now,
                String::from("the guest's state is too large to be sent"),
            );
        }
        self.report.state_bytes = ByteCount::new(paused.state.len() as u64);
        let round = Round::last(self.progress.rounds, &paused.dirty, &self.config, now);
        self.progress.remaining = round.progress().0;
        if self.report.predicted_downtime.is_none() {
            self.report.predicted_downtime = self.progress.predicted_downtime();
        }
        self.round = Some(round.with_fault(self.fault));
        let stopped_at = paused.stopped_first.shift(self.report.clock.nanos);
        let state = paused.state.clone();
        let frame = ControlFrame::State {
            round: self.progress.rounds,
            stopped_at,
            state,
        };
        self.stopped = Some(paused);
        let mut actions = self.next_pieces();
        // The state may overtake the pages on the wire: the target waits for every barrier.
        actions.push(SourceAction::Send(frame));
        actions
    }

    /// Turns what the round wants into actions.
    fn next_pieces(&mut self) -> Vec<SourceAction> {
        let Some(round) = &mut self.round else {
            return Vec::new();
        };
        let steps = round.advance();
        steps.into_iter().map(Step::into_action).collect()
    }

    fn cleared(&mut self, now: Timestamp, piece: Piece) -> Vec<SourceAction> {
        if self.state != State::Rounds {
            return Vec::new();
        }
        self.moved = now;
        if let Some(round) = &mut self.round {
            round.cleared(piece);
        }
        self.next_pieces()
    }

    fn sent(
        &mut self,
        now: Timestamp,
        piece: Piece,
        stream: u8,
        sent: SentPiece,
    ) -> Vec<SourceAction> {
        if !matches!(self.state, State::Rounds | State::LastRound { .. }) {
            return Vec::new();
        }
        self.moved = now;
        if let Some(round) = &mut self.round {
            round.sent(piece, stream, sent);
        }
        let mut actions = self.next_pieces();
        actions.extend(self.commit_if_ready(now));
        actions
    }

    fn round_received(&mut self, now: Timestamp, number: u32) -> Vec<SourceAction> {
        let is_current = self
            .round
            .as_ref()
            .is_some_and(|round| round.is_complete(number));
        if !is_current {
            return self.lost(
                now,
                String::from("the target confirmed a round that was not sent"),
            );
        }
        self.close_round(now);
        self.progress.rounds += 1;
        vec![SourceAction::Harvest {
            round: self.progress.rounds,
        }]
    }

    /// Moves the round into the report and takes its bandwidth.
    fn close_round(&mut self, now: Timestamp) {
        let Some(round) = self.round.take() else {
            return;
        };
        self.moved = now;
        let report = round.report(now);
        if report.bytes >= BANDWIDTH_SAMPLE_MIN || self.progress.bandwidth.is_none() {
            let measured = BytesPerSecond::measured(report.bytes, report.time);
            self.progress.bandwidth = measured.or(self.progress.bandwidth);
        }
        self.report.rounds.push(report);
    }

    /// Records the commit once the target has everything and everything sent is accounted for.
    fn commit_if_ready(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let all_sent = self.round.as_ref().is_none_or(Round::all_sent);
        if self.state != (State::LastRound { prepared: true }) || !all_sent {
            return Vec::new();
        }
        self.close_round(now);
        self.state = State::Committing { lost: None };
        let (id, peer) = (self.config.id, self.config.peer.clone());
        let mut actions = vec![SourceAction::Record(Phase::Committed { id, peer })];
        if self.fault == Some(SourceFault::CommitBeforeRecord) {
            actions.insert(0, SourceAction::Send(ControlFrame::Commit));
        }
        actions
    }

    fn runs(
        &mut self,
        now: Timestamp,
        committed_at: Timestamp,
        first_instruction_at: Timestamp,
    ) -> Vec<SourceAction> {
        self.report.total = now.since(self.begun);
        self.report.downtime = self.downtime(committed_at, first_instruction_at);
        let running_at = first_instruction_at.shift(-self.report.clock.nanos);
        self.report.switch = self
            .stopped
            .as_ref()
            .map(|stopped| (stopped.stopped_first, running_at));
        if self.config.verify {
            self.state = State::Verifying {
                ours: None,
                theirs: None,
            };
            return vec![SourceAction::Hash];
        }
        self.release()
    }

    fn downtime(
        &self,
        committed_at: Timestamp,
        first_instruction_at: Timestamp,
    ) -> Option<Downtime> {
        let stopped = self.stopped.as_ref()?;
        let (received_at, loaded_at) = self.prepared?;
        let here = |theirs: Timestamp| theirs.shift(-self.report.clock.nanos);
        Some(Downtime {
            pause: stopped.stopped_last.since(stopped.stopped_first),
            harvest: stopped.harvested.since(stopped.stopped_last),
            save: stopped.saved.since(stopped.harvested),
            transfer: here(received_at).since(stopped.saved),
            load: loaded_at.since(received_at),
            commit: committed_at.since(loaded_at),
            start: first_instruction_at.since(committed_at),
        })
    }

    fn hashed(&mut self, now: Timestamp, digest: Digest) -> Vec<SourceAction> {
        let State::Verifying { theirs, .. } = self.state else {
            return Vec::new();
        };
        self.state = State::Verifying {
            ours: Some(digest),
            theirs,
        };
        self.compare(now)
    }

    fn compare(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.moved = now;
        let State::Verifying {
            ours: Some(ours),
            theirs: Some(theirs),
        } = self.state
        else {
            return Vec::new();
        };
        self.report.digest_equal = Some(ours == theirs);
        self.release()
    }

    fn release(&mut self) -> Vec<SourceAction> {
        self.state = State::Releasing;
        vec![SourceAction::Release]
    }

    fn released(&mut self, now: Timestamp) -> Vec<SourceAction> {
        if self.state != State::Releasing {
            return Vec::new();
        }
        self.paused = false;
        let mut actions = vec![
            SourceAction::Send(ControlFrame::Done),
            SourceAction::Disconnect,
        ];
        actions.extend(self.finish(now, Outcome::Completed));
        actions
    }

    /// The connection or the peer's good behaviour is lost. What follows depends on how far it came.
    fn lost(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        match &mut self.state {
            State::Idle
            | State::Returning { .. }
            | State::Releasing
            | State::Resolving { .. }
            | State::Finished => Vec::new(),
            State::Committing { lost } => {
                if self.fault == Some(SourceFault::CommitBeforeRecord) {
                    return self.resolve(now, reason);
                }
                *lost = Some(reason);
                Vec::new()
            }
            State::AwaitRuns if self.fault == Some(SourceFault::ResumeAfterCommit) => {
                self.go_back(now, Outcome::Failed { reason })
            }
            State::AwaitRuns => self.resolve(now, reason),
            // It runs there: only the comparison is lost.
            State::Verifying { .. } => self.release(),
            _ => self.fail(now, reason),
        }
    }

    /// Ends the attempt before commit.
    fn fail(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        let abort = SourceAction::Send(ControlFrame::Abort {
            reason: clip(&reason),
        });
        let mut actions = vec![abort];
        actions.extend(self.go_back(now, Outcome::Failed { reason }));
        actions
    }

    fn abort(&mut self, now: Timestamp) -> Vec<SourceAction> {
        match self.state {
            State::Idle
            | State::Connecting
            | State::Offering
            | State::Probing { .. }
            | State::Recording { .. }
            | State::Tracking
            | State::Rehearsing { .. }
            | State::Rounds
            | State::Pausing
            | State::LastRound { .. } => {
                let reason = String::from("the operator at the source ended the migration");
                let mut actions = vec![SourceAction::Send(ControlFrame::Abort { reason })];
                actions.extend(self.go_back(now, Outcome::Aborted));
                actions
            }
            // Too late: from the commit on, the target decides.
            _ => Vec::new(),
        }
    }

    /// Puts the guest back to where it was: running here, held by nobody.
    fn go_back(&mut self, now: Timestamp, outcome: Outcome) -> Vec<SourceAction> {
        let was_offered = !matches!(
            self.state,
            State::Idle | State::Connecting | State::Offering | State::Probing { .. }
        );
        self.report.total = now.since(self.begun);
        let mut actions = vec![SourceAction::Disconnect];
        if self.tracking {
            self.tracking = false;
            actions.push(SourceAction::StopTracking);
        }
        self.round = None;
        if !was_offered {
            actions.extend(self.finish(now, outcome));
            return actions;
        }
        self.state = State::Returning { outcome };
        actions.push(SourceAction::Record(Phase::Running));
        actions
    }

    fn resumed(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let State::Returning { outcome } = &self.state else {
            return Vec::new();
        };
        self.paused = false;
        let outcome = outcome.clone();
        self.finish(now, outcome)
    }

    fn resolve(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        self.state = State::Resolving {
            backoff: RESOLVE_BACKOFF.0,
            asking: false,
        };
        let mut actions = vec![
            SourceAction::Disconnect,
            SourceAction::ReportUnresolved { reason },
        ];
        actions.extend(self.ask(now));
        actions
    }

    fn ask(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let State::Resolving { asking, .. } = &mut self.state else {
            return Vec::new();
        };
        *asking = true;
        vec![
            SourceAction::Resolve,
            SourceAction::SetTimer(now.after(SILENCE_MAX)),
        ]
    }

    fn resolved(&mut self, now: Timestamp, resolution: Resolution) -> Vec<SourceAction> {
        if !matches!(self.state, State::Resolving { .. }) {
            return Vec::new();
        }
        match resolution {
            Resolution::Runs => {
                self.report.total = now.since(self.begun);
                self.release()
            }
            Resolution::Barred => {
                let reason = String::from("the target never took the guest over");
                self.go_back(now, Outcome::Failed { reason })
            }
        }
    }

    fn resolve_failed(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let State::Resolving { backoff, asking } = &mut self.state else {
            return Vec::new();
        };
        *asking = false;
        let wait = *backoff;
        *backoff = (*backoff * 2).min(RESOLVE_BACKOFF.1);
        vec![SourceAction::SetTimer(now.after(wait))]
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
            State::Rounds | State::LastRound { .. } | State::Verifying { .. }
        );
        if now.since(self.heard) > SILENCE_MAX {
            actions.extend(self.lost(now, String::from("the target has been silent for 10 s")));
        } else if is_moving && now.since(self.moved) > STALL_MAX {
            actions.extend(self.lost(now, String::from("no page has moved for 30 s")));
        } else if !matches!(self.state, State::Connecting | State::Returning { .. }) {
            actions.push(SourceAction::Send(ControlFrame::Keepalive));
        }
        actions
    }

    /// The VM process failed or refused. Before commit the guest is put back; only if that fails
    /// too is it lost.
    fn guest_failed(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        match self.state {
            State::Finished => Vec::new(),
            // It runs at the target already; that its old process died here changes nothing.
            State::Releasing | State::Verifying { .. } => {
                let mut actions = vec![SourceAction::Send(ControlFrame::Done), SourceAction::Disconnect];
                actions.extend(self.finish(now, Outcome::Completed));
                actions
            }
            // The target may have it; the answer decides what is to be said.
            State::AwaitRuns => self.resolve(now, reason),
            State::Resolving { .. } => Vec::new(),
            State::Returning { .. } => {
                let mut actions = vec![SourceAction::Disconnect];
                actions.extend(self.finish(now, Outcome::GuestLost { reason }));
                actions
            }
            _ => self.fail(now, reason),
        }
    }

    fn set(&mut self, limits: Limits) -> Vec<SourceAction> {
        let is_new = limits.bandwidth_max != self.config.limits.bandwidth_max;
        self.config.limits = limits;
        if is_new {
            vec![SourceAction::LimitBandwidth(limits.bandwidth_max)]
        } else {
            Vec::new()
        }
    }

    fn finish(&mut self, now: Timestamp, outcome: Outcome) -> Vec<SourceAction> {
        self.report.eviction = now.since(self.begun);
        self.report.outcome = Some(outcome.clone());
        self.state = State::Finished;
        vec![SourceAction::Finish(outcome)]
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
            SourceEvent::Connected => self.connected(now),
            SourceEvent::ConnectionLost { reason } => self.lost(now, reason),
            SourceEvent::Frame(frame) => self.frame(now, frame),
            SourceEvent::Recorded(phase) => self.recorded(now, &phase),
            SourceEvent::TrackingStarted if self.state == State::Tracking => self.rehearse(),
            SourceEvent::TrackingStarted => Vec::new(),
            SourceEvent::Rehearsed { state, stall, save } => {
                self.rehearsed(now, state, stall, save)
            }
            SourceEvent::Harvested { round, dirty } => self.harvested(now, round, &dirty),
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
            SourceEvent::ResolveFailed { .. } => self.resolve_failed(now),
            SourceEvent::Set(limits) => self.set(limits),
            SourceEvent::Abort => self.abort(now),
            SourceEvent::Timer => self.timer(now),
        }
    }
}
