//! The target of a migration: makes an empty VM, fills it, runs it on *commit* and not before.
//!
//! ```text
//!  Waiting ─▶ Creating ─▶ Receiving ─▶ Loading ─▶ Prepared ─▶ Committing ─▶ Running ─▶ Finished
//!                │            │           │           │            └─ from here on it runs,
//!                └────────────┴───────────┴───────────┴─▶ Destroying    whatever is lost
//!                         lost, aborted, barred            └─▶ Finished
//! ```
//!
//! A guest whose pages are not all there runs in `Filling` until they are. A lost connection changes
//! nothing there but that pages stop coming: the source comes back by itself and says *reattach*.
//!
//! ```text
//!  Committing ─▶ Filling ─▶ Disarming ─▶ Running
//!                 │   ▲
//!            lost ▼   │ reattach
//!                Filling, alone
//! ```
//!
//! Invariants: the state is loaded only when the barrier of the last round has come on every
//! stream by which that round goes; the guest runs only after the VM process recorded the commit; once somebody was told
//! that the attempt is barred, no late frame brings it to life.

mod event;
mod filling;

pub use event::{TargetAction, TargetEvent, TargetOutcome};

use crate::handover::{MigrationId, Phase, Resolution};
use crate::journal::Machine;
use crate::report::FaultReport;
use crate::source::{KEEPALIVE_EVERY, SILENCE_MAX};
use crate::time::Timestamp;
use crate::wire::{ControlFrame, Digest, Start, clip};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::PageCount;
use serde::{Deserialize, Serialize};

/// A fault that a test plants to see that the simulator's checker catches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetFault {
    /// The state is loaded without waiting for the streams' barriers.
    BarrierLeftOut,
    /// A second commit frame runs the guest a second time.
    CommitRepeated,
    /// A commit that comes after the abort runs the guest.
    LateFrameAfterAbort,
    /// The state is loaded before faults are served.
    LoadBeforeServing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Creating,
    Receiving,
    Loading {
        received_at: Timestamp,
    },
    Prepared,
    Committing {
        committed_at: Timestamp,
    },
    /// The guest runs and pages are missing; `alone` without a source.
    Filling {
        alone: bool,
    },
    /// Nothing is missing, and the VM process is told so.
    Disarming {
        alone: bool,
        faults: FaultReport,
    },
    Running {
        digesting: bool,
    },
    Confirming,
    Destroying {
        reason: String,
    },
    Finished,
}

/// The last state as it came in.
#[derive(Debug)]
struct Arriving {
    round: u32,
    stopped_at: Timestamp,
    state: Vec<u8>,
    missing: PageCount,
}

/// The target's state machine; see the module.
#[derive(Debug)]
pub struct Target {
    id: MigrationId,
    boot_id: u128,
    fault: Option<TargetFault>,
    state: State,
    start: Option<Start>,
    /// The first round that was not confirmed to the source.
    next_round: u32,
    /// What of it has come.
    delivered: Delivered,
    arriving: Option<Arriving>,
    stopped_at: Timestamp,
    /// Pages that were missing at the switch.
    missing: PageCount,
    /// Loading the state asked for the last of them, before the guest ran.
    present: Option<FaultReport>,
    can_fault: bool,
    rehearsing: bool,
    resolve_asked: bool,
    connection_lost: bool,
    heard: Timestamp,
}

/// The barriers of a round that have come.
#[derive(Clone, Copy, Debug, Default)]
struct Delivered {
    /// By how many streams the round goes, once a barrier has said it.
    streams: Option<u8>,
    /// A bit for each stream whose barrier has come.
    by: u16,
}

impl Delivered {
    /// A barrier has come: whether it was the last one. `None` if it does not fit to the others.
    fn by(&mut self, stream: u8, streams: u8) -> Option<bool> {
        let bit = 1u16.checked_shl(stream.into())?;
        let is_new = self.by & bit == 0;
        if !is_new || stream >= streams || *self.streams.get_or_insert(streams) != streams {
            return None;
        }
        self.by |= bit;
        Some(self.by.count_ones() == u32::from(streams))
    }
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
            next_round: 0,
            delivered: Delivered {
                streams: None,
                by: 0,
            },
            arriving: None,
            stopped_at: Timestamp::ZERO,
            missing: PageCount::ZERO,
            present: None,
            can_fault: false,
            rehearsing: false,
            resolve_asked: false,
            connection_lost: false,
            heard: now,
        }
    }

    /// A target that a restarted daemon found: the guest runs here and misses pages, and nobody
    /// brings them yet. Its first event is [`TargetEvent::Timer`].
    pub fn recover(id: MigrationId, boot_id: u128, now: Timestamp) -> Self {
        let mut target = Self::new(id, boot_id, now);
        target.state = State::Filling { alone: true };
        target
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
            State::Committing { .. }
                | State::Filling { .. }
                | State::Disarming { .. }
                | State::Running { .. }
                | State::Confirming
        )
    }

    /// True while the guest runs and misses pages.
    pub const fn is_filling(&self) -> bool {
        matches!(self.state, State::Filling { .. })
    }

    fn frame(&mut self, now: Timestamp, frame: ControlFrame) -> Vec<TargetAction> {
        self.heard = now;
        match (frame, &self.state) {
            (ControlFrame::Keepalive, _) => Vec::new(),
            (ControlFrame::Start(start), State::Waiting) => {
                self.state = State::Creating;
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
                    missing,
                },
                State::Receiving,
            ) if self.arriving.is_none() && (self.can_fault || missing == PageCount::ZERO) => {
                self.arriving = Some(Arriving {
                    round,
                    stopped_at,
                    state,
                    missing,
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
            // On a new connection, which may come before the end of the old one is noticed.
            (ControlFrame::Reattach { streams }, State::Filling { .. }) => {
                self.reattach(now, streams)
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

    fn created(&mut self, can_fault: bool) -> Vec<TargetAction> {
        if self.state != State::Creating {
            return Vec::new();
        }
        self.state = State::Receiving;
        self.can_fault = can_fault;
        vec![TargetAction::Send(ControlFrame::Accept {
            boot_id: self.boot_id,
            can_fault,
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

    fn barrier(
        &mut self,
        now: Timestamp,
        stream: u8,
        round: u32,
        streams: u8,
    ) -> Vec<TargetAction> {
        if self.state != State::Receiving {
            return Vec::new();
        }
        // A stream of pages shows that the source lives, however busy its control stream is.
        self.heard = now;
        let announced = self.start.as_ref().map_or(0, |start| start.streams);
        if stream >= announced || streams > announced {
            return self.lost(String::from(
                "a barrier came on a stream that was not announced",
            ));
        }
        // The source begins a round when the one before was confirmed.
        if round != self.next_round {
            return self.lost(String::from("the source's rounds do not follow each other"));
        }
        let Some(is_complete) = self.delivered.by(stream, streams) else {
            return self.lost(String::from("the barriers of a round do not fit together"));
        };
        let mut actions = Vec::new();
        if is_complete {
            self.next_round += 1;
            self.delivered = Delivered::default();
            // The last round is confirmed by `Prepared`.
            let is_last = |arriving: &Arriving| arriving.round == round;
            if !self.arriving.as_ref().is_some_and(is_last) {
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
        self.missing = arriving.missing;
        self.state = State::Loading { received_at: now };
        let mut actions = vec![TargetAction::Load {
            state: arriving.state,
            is_rehearsal: false,
        }];
        if self.missing > PageCount::ZERO {
            // Loading may touch pages that are missing.
            let is_late = self.fault == Some(TargetFault::LoadBeforeServing);
            actions.insert(usize::from(is_late), TargetAction::ServeFaults);
        }
        actions
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
            keeps_faults: self.missing > PageCount::ZERO,
        }]
    }

    fn running(&mut self, first_instruction_at: Timestamp) -> Vec<TargetAction> {
        let State::Committing { committed_at } = self.state else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        if !self.connection_lost {
            actions.push(TargetAction::Send(ControlFrame::Runs {
                committed_at,
                first_instruction_at,
            }));
        }
        if self.missing > PageCount::ZERO {
            actions.extend(self.fill());
            return actions;
        }
        self.state = State::Running { digesting: false };
        actions.extend(self.digest());
        actions.extend(self.answer(Resolution::Runs));
        if self.connection_lost {
            actions.extend(self.finish_unconfirmed());
        }
        actions
    }

    /// Begins to put the digest together, if the source wants to have it.
    fn digest(&mut self) -> Option<TargetAction> {
        let verify = self.start.as_ref().is_some_and(|start| start.verify);
        self.state = State::Running { digesting: verify };
        verify.then_some(TargetAction::Digest)
    }

    fn answer(&self, resolution: Resolution) -> Option<TargetAction> {
        self.resolve_asked
            .then_some(TargetAction::AnswerResolve(resolution))
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
            // Alone or not: a source that came back may be lost before it has said so.
            State::Filling { .. } => {
                self.state = State::Filling { alone: true };
                vec![TargetAction::Detach]
            }
            State::Disarming { ref mut alone, .. } => {
                *alone = true;
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
            // Unless pages were missing: then it is known not to run on.
            State::Committing { .. } if self.missing == PageCount::ZERO => {
                let mut actions = Vec::new();
                if self.resolve_asked {
                    actions.push(TargetAction::AnswerResolve(Resolution::Runs));
                }
                actions.extend(self.finish_unconfirmed());
                actions
            }
            State::Committing { .. } => {
                let mut actions: Vec<TargetAction> =
                    self.answer(Resolution::Gone).into_iter().collect();
                self.state = State::Finished;
                actions.push(TargetAction::Finish(TargetOutcome::Lost { reason }));
                actions
            }
            State::Filling { alone } | State::Disarming { alone, .. } => {
                let mut actions = Vec::new();
                if !alone {
                    let reason = clip(&reason);
                    actions.push(TargetAction::Send(ControlFrame::Lost { reason }));
                }
                actions.extend(self.answer(Resolution::Gone));
                self.state = State::Finished;
                actions.push(TargetAction::Finish(TargetOutcome::Lost { reason }));
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
            State::Filling { .. } => {
                // Whoever asks has lost its connection, whatever it looks like from here.
                let mut actions = self.lost(String::from("the source asks for the outcome"));
                actions.push(TargetAction::AnswerResolve(Resolution::Needs));
                actions
            }
            State::Disarming { ref mut alone, .. } => {
                *alone = true;
                Vec::new()
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
        if self.state == (State::Filling { alone: true }) {
            return actions;
        }
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
            TargetEvent::Created { can_fault } => self.created(can_fault),
            TargetEvent::CreateFailed { reason } => self.create_failed(reason),
            TargetEvent::Barrier {
                stream,
                round,
                streams,
            } => self.barrier(now, stream, round, streams),
            TargetEvent::Loaded { took } => self.loaded(now, took),
            TargetEvent::Running {
                first_instruction_at,
            } => self.running(first_instruction_at),
            TargetEvent::AllPresent(faults) => self.all_present(faults),
            TargetEvent::Disarmed => self.disarmed(),
            TargetEvent::StillMissing(missing) => self.still_missing(missing),
            TargetEvent::Digested(digest) => self.digested(digest),
            TargetEvent::Recorded(phase) => self.recorded(&phase),
            TargetEvent::VmFailed { reason } => self.vm_failed(reason),
            TargetEvent::CommitRefused { reason } => self.commit_refused(reason),
            TargetEvent::Destroyed => self.destroyed(),
            TargetEvent::ConnectionLost { reason } => self.lost(reason),
            TargetEvent::Resolve => self.resolve(),
            TargetEvent::SourceGone { reason } if self.is_filling() => self.vm_failed(reason),
            TargetEvent::SourceGone { .. } => Vec::new(),
            TargetEvent::Abort => self.give_up(String::from("the operator at the target ended it")),
            TargetEvent::Timer => self.timer(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Mode;

    /// A target that has asked its VM process to commit and run, and was asked how it ended.
    fn committing(missing: u64) -> Target {
        let start = Start {
            mode: Mode::StopAndCopy,
            memory_pages: PageCount::new(1),
            streams: 1,
            verify: false,
            disks: Vec::new(),
            vm: Vec::new(),
            demanded: Vec::new(),
        };
        let state = ControlFrame::State {
            round: 0,
            stopped_at: Timestamp::ZERO,
            state: vec![1],
            missing: PageCount::new(missing),
        };
        let mut target = Target::new(MigrationId(1), 2, Timestamp::ZERO);
        for event in [
            TargetEvent::Frame(ControlFrame::Start(start)),
            TargetEvent::Created { can_fault: true },
            TargetEvent::Barrier {
                stream: 0,
                round: 0,
                streams: 1,
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

    fn check(missing: u64, events: &[TargetEvent], expect: &[&str]) {
        let mut target = committing(missing);
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
        check(0, &[failed], &["Runs", "finish"]);
        let refused = TargetEvent::CommitRefused { reason };
        let events = [refused, TargetEvent::Destroyed];
        check(0, &events, &["destroy", "Barred", "finish"]);
        let reason = String::from("the VM process died");
        check(7, &[TargetEvent::VmFailed { reason }], &["Gone", "finish"]);
    }

    #[test]
    fn pages_that_came_before_the_guest_ran_are_not_waited_for() {
        let runs = TargetEvent::Running {
            first_instruction_at: Timestamp::ZERO,
        };
        let present = TargetEvent::AllPresent(FaultReport::default());
        let events = [present, runs, TargetEvent::Disarmed];
        check(7, &events, &["detach", "disarm", "Runs", "finish"]);
    }

    #[test]
    fn a_guest_without_its_pages_waits_for_the_source_to_come_back() {
        let runs = TargetEvent::Running {
            first_instruction_at: Timestamp::ZERO,
        };
        let filled = [
            TargetEvent::AllPresent(FaultReport::default()),
            TargetEvent::Disarmed,
        ];
        let [present, disarmed] = filled.clone();
        let back = TargetEvent::Frame(ControlFrame::Reattach { streams: 1 });
        let asked = TargetEvent::StillMissing(PageCount::new(3));
        let alone = [runs.clone(), present, disarmed];
        check(7, &alone, &["detach", "Needs", "disarm", "Runs", "finish"]);
        let events = [&[runs.clone(), back.clone(), asked], &filled[..]].concat();
        let expect = [
            "detach",
            "Needs",
            "reconcile",
            "set-timer",
            "reattached",
            "disarm",
            "complete",
        ];
        check(7, &events, &expect);
        let reason = String::from("it crashed");
        let events = [runs, back, TargetEvent::VmFailed { reason }];
        check(
            7,
            &events,
            &[
                "detach",
                "Needs",
                "reconcile",
                "set-timer",
                "lost",
                "Gone",
                "finish",
            ],
        );
    }

    /// Barriers as `stream` of `streams`, all of round 0 but for those after `|`; what is answered.
    fn barriers(text: &str) -> String {
        let start = Start {
            mode: Mode::PreCopy,
            memory_pages: PageCount::new(1),
            streams: 4,
            verify: false,
            disks: Vec::new(),
            vm: Vec::new(),
            demanded: Vec::new(),
        };
        let mut target = Target::new(MigrationId(1), 2, Timestamp::ZERO);
        target.handle(
            Timestamp::ZERO,
            TargetEvent::Frame(ControlFrame::Start(start)),
        );
        target.handle(Timestamp::ZERO, TargetEvent::Created { can_fault: true });
        let mut answers = String::new();
        let mut round = 0;
        for word in text.split(' ') {
            if word == "|" {
                round += 1;
                continue;
            }
            let (stream, streams) = word.split_once('/').unwrap();
            let event = TargetEvent::Barrier {
                stream: stream.parse().unwrap(),
                round,
                streams: streams.parse().unwrap(),
            };
            answers.push_str(match target.handle(Timestamp::ZERO, event).first() {
                None => ".",
                Some(TargetAction::Send(ControlFrame::RoundReceived { .. })) => "!",
                Some(_) => "x",
            });
        }
        answers
    }

    #[test]
    fn a_round_is_over_when_each_stream_that_it_goes_by_has_said_so() {
        assert_eq!(barriers("0/1 | 0/1"), "!!");
        assert_eq!(barriers("2/3 0/3 1/3 | 0/1 | 3/4 2/4 1/4 0/4"), "..!!...!");
        // A stream that speaks twice, one that is not of the round, barriers that differ, streams
        // that do not exist, a round that comes too early.
        assert_eq!(barriers("0/2 0/2"), ".x");
        assert_eq!(barriers("1/1"), "x");
        assert_eq!(barriers("0/2 1/3"), ".x");
        assert_eq!(barriers("0/5"), "x");
        assert_eq!(barriers("4/4"), "x");
        assert_eq!(barriers("0/2 | 1/2"), ".x");
    }
}
