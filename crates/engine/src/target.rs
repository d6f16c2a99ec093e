//! The target of a migration: makes an empty VM, fills it, runs it on *commit* and not before.
//!
//! ```text
//!  Waiting ─▶ Creating ─▶ Receiving ─▶ Loading ─▶ Prepared ─▶ Committing ─▶ Running ─▶ Finished
//!                │            │           │           │            └─ from here on it runs,
//!                └────────────┴───────────┴───────────┴─▶ Destroying    whatever is lost
//!                         lost, aborted, barred            └─▶ Finished
//! ```
//!
//! Invariants: the state is loaded only when the barrier of the last round has come on every
//! stream; the guest runs only after the VM process recorded the commit; once somebody was told
//! that the attempt is barred, no late frame brings it to life.

use crate::handover::{MigrationId, Phase, Resolution};
use crate::journal::Machine;
use crate::source::{KEEPALIVE_EVERY, SILENCE_MAX};
use crate::time::Timestamp;
use crate::wire::{ControlFrame, Digest, Start, clip};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// A fact for the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetEvent {
    /// A control frame arrived; the first one is [`ControlFrame::Start`].
    Frame(ControlFrame),
    /// The VM process exists, its phase is [`Phase::Preparing`], every push stream is up.
    Created,
    /// It could not be made.
    CreateFailed {
        /// For the operator at the source.
        reason: String,
    },
    /// A stream delivered everything of a round.
    Barrier {
        /// Which.
        stream: u8,
        /// The round.
        round: u32,
    },
    /// The state was loaded.
    Loaded {
        /// How long it took.
        took: Duration,
    },
    /// The guest runs, and its commit is recorded.
    Running {
        /// When the last vCPU entered the guest.
        first_instruction_at: Timestamp,
    },
    /// Digest of what was installed.
    Digested(Digest),
    /// The phase was recorded by the VM process.
    Recorded(Phase),
    /// The VM process failed or refused. In answer to [`TargetAction::CommitAndRun`] it means that
    /// nobody can say whether the guest ran: the process died, or its answer was lost.
    VmFailed {
        /// One line for the operator.
        reason: String,
    },
    /// The VM process did not record the commit, and it is certain that it never will: it said so,
    /// or it is dead and left no record.
    CommitRefused {
        /// One line for the operator.
        reason: String,
    },
    /// The VM process is gone.
    Destroyed,
    /// A stream or the control connection broke, or the peer sent nonsense.
    ConnectionLost {
        /// One line for the operator.
        reason: String,
    },
    /// The source asks on another connection how this attempt ended.
    Resolve,
    /// The operator at the target wants it to end.
    Abort,
    /// The timer that was set has run out.
    Timer,
}

/// Something that the world shall do for the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetAction {
    /// Check that the machine fits, make it, start the receivers. Answer: `Created`,
    /// `CreateFailed`.
    Create(Start),
    /// Send a control frame. No answer.
    Send(ControlFrame),
    /// Load a state. Answer: `Loaded` or `VmFailed`.
    Load {
        /// Sections.
        state: Vec<u8>,
        /// It will be overwritten by the real one.
        is_rehearsal: bool,
    },
    /// Record [`Phase::Arrived`], then run: one request. Answer: `Running`, `CommitRefused` or
    /// `VmFailed`.
    CommitAndRun {
        /// When the guest stopped at the source, on this host's clock, to advance its time.
        stopped_at: Timestamp,
    },
    /// Digest the hashes of the installed pages and the state. Answer: `Digested`.
    Digest,
    /// Record the phase in the VM process. Answer: `Recorded`.
    Record(Phase),
    /// End the VM process. Answer: `Destroyed`.
    Destroy,
    /// Answer every open question about this attempt. No answer.
    AnswerResolve(Resolution),
    /// Tell `Timer` at this time; replaces an earlier timer.
    SetTimer(Timestamp),
    /// The migration is over here. The last action of all.
    Finish(TargetOutcome),
}

impl TargetAction {
    /// Name for logs and for tests that hold a migration at a point.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Send(frame) => frame.name(),
            Self::Load {
                is_rehearsal: true, ..
            } => "load-rehearsal",
            Self::Load { .. } => "load",
            Self::CommitAndRun { .. } => "commit-and-run",
            Self::Digest => "digest",
            Self::Record(_) => "record-running",
            Self::Destroy => "destroy",
            Self::AnswerResolve(_) => "answer-resolve",
            Self::SetTimer(_) => "set-timer",
            Self::Finish(_) => "finish",
        }
    }
}

/// How a migration ended at the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetOutcome {
    /// The guest runs here and the source said that it is done.
    Completed,
    /// The guest runs here, or ran; the source did not say that it is done, so the attempt stays
    /// recorded until it asks.
    Unconfirmed,
    /// The guest never ran here and its memory is gone.
    Dropped {
        /// One line for the operator.
        reason: String,
    },
}

/// A fault that a test plants to see that the simulator's checker catches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetFault {
    /// The state is loaded without waiting for the streams' barriers.
    BarrierLeftOut,
    /// A second commit frame runs the guest a second time.
    CommitRepeated,
    /// A commit that comes after the abort runs the guest.
    LateFrameAfterAbort,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Creating,
    Receiving,
    Loading { received_at: Timestamp },
    Prepared,
    Committing { committed_at: Timestamp },
    Running { digesting: bool },
    Confirming,
    Destroying { reason: String },
    Finished,
}

/// The last state as it came in.
#[derive(Debug)]
struct Arriving {
    round: u32,
    stopped_at: Timestamp,
    state: Vec<u8>,
}

/// The target's state machine; see the module.
#[derive(Debug)]
pub struct Target {
    id: MigrationId,
    boot_id: u128,
    fault: Option<TargetFault>,
    state: State,
    start: Option<Start>,
    /// The next round that each stream has not delivered.
    next_rounds: Vec<u32>,
    /// The first round that was not confirmed to the source.
    next_round: u32,
    arriving: Option<Arriving>,
    stopped_at: Timestamp,
    rehearsing: bool,
    resolve_asked: bool,
    connection_lost: bool,
    heard: Timestamp,
}

impl Target {
    /// A target that waits for [`ControlFrame::Start`], on a connection accepted at `now`.
    pub const fn new(id: MigrationId, boot_id: u128, now: Timestamp) -> Self {
        Self {
            id,
            boot_id,
            fault: None,
            state: State::Waiting,
            start: None,
            next_rounds: Vec::new(),
            next_round: 0,
            arriving: None,
            stopped_at: Timestamp::ZERO,
            rehearsing: false,
            resolve_asked: false,
            connection_lost: false,
            heard: now,
        }
    }

    /// Plants a fault. For the tests of the simulator only.
    #[must_use]
    pub const fn with_fault(mut self, fault: TargetFault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// The attempt.
    pub const fn id(&self) -> MigrationId {
        self.id
    }

    /// True once the guest runs or may already run here.
    pub const fn is_committed(&self) -> bool {
        matches!(
            self.state,
            State::Committing { .. } | State::Running { .. } | State::Confirming
        )
    }

    fn frame(&mut self, now: Timestamp, frame: ControlFrame) -> Vec<TargetAction> {
        self.heard = now;
        match (frame, &self.state) {
            (ControlFrame::Keepalive, _) => Vec::new(),
            (ControlFrame::Start(start), State::Waiting) => {
                self.state = State::Creating;
                self.next_rounds = vec![0; usize::from(start.streams)];
                self.start = Some(start.clone());
                vec![
                    TargetAction::Create(start),
                    TargetAction::SetTimer(now.after(KEEPALIVE_EVERY)),
                ]
            }
            (ControlFrame::ClockProbe { number }, State::Receiving) => {
                vec![TargetAction::Send(ControlFrame::ClockEcho { number, now })]
            }
            (ControlFrame::Rehearsal { state }, State::Receiving)
                if !self.rehearsing && self.arriving.is_none() =>
            {
                self.rehearsing = true;
                vec![TargetAction::Load {
                    state,
                    is_rehearsal: true,
                }]
            }
            (
                ControlFrame::State {
                    round,
                    stopped_at,
                    state,
                },
                State::Receiving,
            ) if self.arriving.is_none() => {
                self.arriving = Some(Arriving {
                    round,
                    stopped_at,
                    state,
                });
                self.load_if_complete(now)
            }
            (ControlFrame::Commit, State::Prepared) => self.commit(now),
            (ControlFrame::Commit, State::Running { .. })
                if self.fault == Some(TargetFault::CommitRepeated) =>
            {
                self.commit(now)
            }
            (ControlFrame::Commit, State::Destroying { .. } | State::Finished)
                if self.fault == Some(TargetFault::LateFrameAfterAbort) =>
            {
                self.commit(now)
            }
            (ControlFrame::Done, State::Running { .. }) => {
                self.state = State::Confirming;
                vec![TargetAction::Record(Phase::Running)]
            }
            (ControlFrame::Abort { reason }, _) => {
                self.give_up(alloc::format!("the source ended it: {}", clip(&reason)))
            }
            (frame, _) => self.lost(alloc::format!(
                "the source sent {} out of turn",
                frame.name()
            )),
        }
    }

    fn created(&mut self) -> Vec<TargetAction> {
        if self.state != State::Creating {
            return Vec::new();
        }
        self.state = State::Receiving;
        vec![TargetAction::Send(ControlFrame::Accept {
            boot_id: self.boot_id,
        })]
    }

    fn create_failed(&mut self, reason: String) -> Vec<TargetAction> {
        let refuse = TargetAction::Send(ControlFrame::Refuse {
            reason: clip(&reason),
        });
        let mut actions = vec![refuse];
        actions.extend(self.give_up(reason));
        actions
    }

    fn barrier(&mut self, now: Timestamp, stream: u8, round: u32) -> Vec<TargetAction> {
        if self.state != State::Receiving {
            return Vec::new();
        }
        // A stream of pages shows that the source lives, however busy its control stream is.
        self.heard = now;
        let Some(next) = self.next_rounds.get_mut(usize::from(stream)) else {
            return self.lost(String::from(
                "a barrier came on a stream that was not announced",
            ));
        };
        if round != *next {
            return self.lost(String::from("the source's rounds do not follow each other"));
        }
        *next += 1;
        let delivered = self.next_rounds.iter().copied().min().unwrap_or(0);
        let mut actions = Vec::new();
        while self.next_round < delivered {
            let round = self.next_round;
            self.next_round += 1;
            // The last round is confirmed by `Prepared`.
            if self
                .arriving
                .as_ref()
                .is_none_or(|arriving| arriving.round != round)
            {
                actions.push(TargetAction::Send(ControlFrame::RoundReceived { round }));
            }
        }
        actions.extend(self.load_if_complete(now));
        actions
    }

    fn load_if_complete(&mut self, now: Timestamp) -> Vec<TargetAction> {
        let waits_for_barrier = self.fault != Some(TargetFault::BarrierLeftOut);
        let is_complete =
            |arriving: &Arriving| self.next_round > arriving.round || !waits_for_barrier;
        if !self.arriving.as_ref().is_some_and(is_complete) {
            return Vec::new();
        }
        let Some(arriving) = self.arriving.take() else {
            return Vec::new();
        };
        self.stopped_at = arriving.stopped_at;
        self.state = State::Loading { received_at: now };
        vec![TargetAction::Load {
            state: arriving.state,
            is_rehearsal: false,
        }]
    }

    fn loaded(&mut self, now: Timestamp, took: Duration) -> Vec<TargetAction> {
        match self.state {
            State::Receiving if self.rehearsing => {
                self.rehearsing = false;
                vec![TargetAction::Send(ControlFrame::Rehearsed { load: took })]
            }
            State::Loading { received_at } => {
                self.state = State::Prepared;
                let prepared = ControlFrame::Prepared {
                    received_at,
                    loaded_at: now,
                };
                vec![TargetAction::Send(prepared)]
            }
            _ => Vec::new(),
        }
    }

    fn commit(&mut self, now: Timestamp) -> Vec<TargetAction> {
        self.state = State::Committing { committed_at: now };
        vec![TargetAction::CommitAndRun {
            stopped_at: self.stopped_at,
        }]
    }

    fn running(&mut self, first_instruction_at: Timestamp) -> Vec<TargetAction> {
        let State::Committing { committed_at } = self.state else {
            return Vec::new();
        };
        let verify = self.start.as_ref().is_some_and(|start| start.verify);
        self.state = State::Running { digesting: verify };
        let mut actions = Vec::new();
        if !self.connection_lost {
            actions.push(TargetAction::Send(ControlFrame::Runs {
                committed_at,
                first_instruction_at,
            }));
        }
        if verify {
            actions.push(TargetAction::Digest);
        }
        if self.resolve_asked {
            actions.push(TargetAction::AnswerResolve(Resolution::Runs));
        }
        if self.connection_lost {
            actions.extend(self.finish_unconfirmed());
        }
        actions
    }

    fn digested(&mut self, digest: Digest) -> Vec<TargetAction> {
        if self.state != (State::Running { digesting: true }) {
            return Vec::new();
        }
        self.state = State::Running { digesting: false };
        vec![TargetAction::Send(ControlFrame::Verified(digest))]
    }

    fn recorded(&mut self, phase: &Phase) -> Vec<TargetAction> {
        if self.state != State::Confirming || *phase != Phase::Running {
            return Vec::new();
        }
        self.state = State::Finished;
        vec![TargetAction::Finish(TargetOutcome::Completed)]
    }

    fn lost(&mut self, reason: String) -> Vec<TargetAction> {
        match self.state {
            State::Committing { .. } => {
                self.connection_lost = true;
                Vec::new()
            }
            State::Running { .. } => self.finish_unconfirmed(),
            State::Confirming => Vec::new(),
            _ => {
                let abort = TargetAction::Send(ControlFrame::Abort {
                    reason: clip(&reason),
                });
                let mut actions = self.give_up(reason);
                if !actions.is_empty() {
                    actions.insert(0, abort);
                }
                actions
            }
        }
    }

    fn finish_unconfirmed(&mut self) -> Vec<TargetAction> {
        self.state = State::Finished;
        vec![TargetAction::Finish(TargetOutcome::Unconfirmed)]
    }

    /// Ends the attempt before commit. After it, it does nothing.
    fn give_up(&mut self, reason: String) -> Vec<TargetAction> {
        match self.state {
            State::Waiting
            | State::Creating
            | State::Receiving
            | State::Loading { .. }
            | State::Prepared => {
                self.state = State::Destroying { reason };
                vec![TargetAction::Destroy]
            }
            _ => Vec::new(),
        }
    }

    fn vm_failed(&mut self, reason: String) -> Vec<TargetAction> {
        match self.state {
            // It may have run, and what it did may have been seen: a source that resumed it would
            // set it back in time. So the attempt counts as one that runs, here or no more.
            State::Committing { .. } => {
                let mut actions = Vec::new();
                if self.resolve_asked {
                    actions.push(TargetAction::AnswerResolve(Resolution::Runs));
                }
                actions.extend(self.finish_unconfirmed());
                actions
            }
            State::Running { .. } | State::Confirming => self.finish_unconfirmed(),
            _ => self.lost(reason),
        }
    }

    fn commit_refused(&mut self, reason: String) -> Vec<TargetAction> {
        let State::Committing { .. } = self.state else {
            return self.vm_failed(reason);
        };
        self.state = State::Destroying { reason };
        vec![TargetAction::Destroy]
    }

    fn destroyed(&mut self) -> Vec<TargetAction> {
        let State::Destroying { reason } = &self.state else {
            return Vec::new();
        };
        let reason = reason.clone();
        self.state = State::Finished;
        let mut actions = Vec::new();
        if self.resolve_asked {
            actions.push(TargetAction::AnswerResolve(Resolution::Barred));
        }
        actions.push(TargetAction::Finish(TargetOutcome::Dropped { reason }));
        actions
    }

    /// Somebody asks how it ended. Before commit, the question itself ends it.
    fn resolve(&mut self) -> Vec<TargetAction> {
        self.resolve_asked = true;
        match self.state {
            State::Running { .. } | State::Confirming => {
                vec![TargetAction::AnswerResolve(Resolution::Runs)]
            }
            State::Committing { .. } | State::Destroying { .. } | State::Finished => Vec::new(),
            _ => self.give_up(String::from(
                "the source asked for the outcome before commit",
            )),
        }
    }

    fn timer(&mut self, now: Timestamp) -> Vec<TargetAction> {
        if matches!(self.state, State::Finished | State::Destroying { .. }) {
            return Vec::new();
        }
        let mut actions = vec![TargetAction::SetTimer(now.after(KEEPALIVE_EVERY))];
        if now.since(self.heard) > SILENCE_MAX {
            actions.extend(self.lost(String::from("the source has been silent for 10 s")));
        } else {
            actions.push(TargetAction::Send(ControlFrame::Keepalive));
        }
        actions
    }
}

impl Machine for Target {
    type Event = TargetEvent;
    type Action = TargetAction;

    fn handle(&mut self, now: Timestamp, event: TargetEvent) -> Vec<TargetAction> {
        let is_planted = self.fault == Some(TargetFault::LateFrameAfterAbort);
        if self.state == State::Finished && !is_planted {
            return Vec::new();
        }
        match event {
            TargetEvent::Frame(frame) => self.frame(now, frame),
            TargetEvent::Created => self.created(),
            TargetEvent::CreateFailed { reason } => self.create_failed(reason),
            TargetEvent::Barrier { stream, round } => self.barrier(now, stream, round),
            TargetEvent::Loaded { took } => self.loaded(now, took),
            TargetEvent::Running {
                first_instruction_at,
            } => self.running(first_instruction_at),
            TargetEvent::Digested(digest) => self.digested(digest),
            TargetEvent::Recorded(phase) => self.recorded(&phase),
            TargetEvent::VmFailed { reason } => self.vm_failed(reason),
            TargetEvent::CommitRefused { reason } => self.commit_refused(reason),
            TargetEvent::Destroyed => self.destroyed(),
            TargetEvent::ConnectionLost { reason } => self.lost(reason),
            TargetEvent::Resolve => self.resolve(),
            TargetEvent::Abort => self.give_up(String::from("the operator at the target ended it")),
            TargetEvent::Timer => self.timer(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Mode;
    use limosa_pages::PageCount;

    /// A target that has asked its VM process to commit and run, and was asked how it ended.
    fn committing() -> Target {
        let start = Start {
            mode: Mode::StopAndCopy,
            memory_pages: PageCount::new(1),
            streams: 1,
            verify: false,
            vm: Vec::new(),
        };
        let state = ControlFrame::State {
            round: 0,
            stopped_at: Timestamp::ZERO,
            state: vec![1],
        };
        let mut target = Target::new(MigrationId(1), 2, Timestamp::ZERO);
        for event in [
            TargetEvent::Frame(ControlFrame::Start(start)),
            TargetEvent::Created,
            TargetEvent::Barrier {
                stream: 0,
                round: 0,
            },
            TargetEvent::Frame(state),
            TargetEvent::Loaded {
                took: Duration::ZERO,
            },
            TargetEvent::Frame(ControlFrame::Commit),
            TargetEvent::ConnectionLost {
                reason: String::new(),
            },
            TargetEvent::Resolve,
        ] {
            target.handle(Timestamp::ZERO, event);
        }
        target
    }

    fn check(events: &[TargetEvent], expect: &[&str]) {
        let mut target = committing();
        let mut names = Vec::new();
        for event in events {
            for action in target.handle(Timestamp::ZERO, event.clone()) {
                names.push(match action {
                    TargetAction::AnswerResolve(resolution) => alloc::format!("{resolution:?}"),
                    other => String::from(other.name()),
                });
            }
        }
        assert_eq!(names, expect);
    }

    #[test]
    fn a_commit_is_barred_only_if_it_is_certain_that_the_guest_never_ran() {
        let reason = String::from("the VM process died");
        let failed = TargetEvent::VmFailed {
            reason: reason.clone(),
        };
        check(&[failed], &["Runs", "finish"]);
        let refused = TargetEvent::CommitRefused { reason };
        let events = [refused, TargetEvent::Destroyed];
        check(&events, &["destroy", "Barred", "finish"]);
    }
}
