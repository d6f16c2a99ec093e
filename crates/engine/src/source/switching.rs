//! The switch to a guest that runs at the target before its pages are there, and what the source
//! owes it from then on.
//!
//! ```text
//!  verdict ─▶ Telling ─▶ Pausing ─▶ LastRound ─▶ … ─▶ AwaitRuns ─▶ Serving ─▶ (Verifying) ─▶ Releasing
//!             ▲     │ too many new ones                             │  ▲ Reattached, Reconciled
//!             └─────┘                                       lost    ▼  │
//!                                                  Resolving ─▶ Reattaching
//! ```
//!
//! What the target has in place of a page that the guest wrote since it was sent must not be seen
//! there. Making a page absent costs the target microseconds, so it is told in passes while the
//! guest still runs, each about what was dirtied since the last one; only what the last pass did
//! not know is left for the pause. Nothing is cleared meanwhile: the log of dirty pages only grows.
//!
//! From *runs* on the source is a server: pages go when they are asked for, others in between, and
//! it is over when the target says so. A lost connection changes nothing but that nobody can ask.

use super::rounds::Round;
use super::{Fence, KEEPALIVE_EVERY, RESOLVE_BACKOFF, Source, SourceAction, SourceFault, State};
use crate::policy::{Mode, PauseReason};
use crate::report::{FaultReport, ModeChange, Outcome};
use crate::time::Timestamp;
use crate::wire::{ControlFrame, clip};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use limosa_pages::PageCount;

/// Passes at most: a guest that dirties pages faster than they are told is not to be waited for.
const PASSES_MAX: u32 = 4;
/// A pass of so few pages is not worth another one: to make them absent takes the target below a
/// millisecond.
const PASS_PAGES_MIN: PageCount = PageCount::new(128);

impl Source {
    /// Begins the switch: with passes, if the target has pages that may be stale.
    pub(super) fn switch(&mut self, now: Timestamp, reason: PauseReason) -> Vec<SourceAction> {
        self.is_switching = true;
        if !self.config.mode.needs_faults() {
            let from = if self.config.mode == Mode::Auto {
                Mode::PreCopy
            } else {
                self.config.mode
            };
            self.note_change(now, from, Mode::Hybrid, reason.explain());
        }
        if !self.tracking {
            return self.pause(reason);
        }
        // What was harvested is told, not sent.
        self.round = None;
        self.report.pause_reason = Some(reason);
        self.state = State::Telling { passes: 0 };
        vec![SourceAction::HarvestStale {
            round: self.progress.rounds,
        }]
    }

    /// A pass begins with what was harvested for it.
    pub(super) fn tell_stale(&mut self, now: Timestamp, dirty: &[u32]) -> Vec<SourceAction> {
        self.round = Some(self.stale_round(now, dirty, false));
        self.next_pieces()
    }

    pub(super) fn stale_round(&self, now: Timestamp, dirty: &[u32], is_last: bool) -> Round {
        let number = self.progress.rounds;
        if self.fault == Some(SourceFault::StaleNotTold) {
            let nothing = vec![0; dirty.len()];
            return Round::stale(number, &nothing, &self.config, now, is_last);
        }
        Round::stale(number, dirty, &self.config, now, is_last)
    }

    /// A pass has arrived.
    pub(super) fn told(&mut self, passes: u32, planned: PageCount) -> Vec<SourceAction> {
        let passes = passes + 1;
        if planned <= PASS_PAGES_MIN || passes >= PASSES_MAX {
            let reason = self.report.pause_reason.unwrap_or(PauseReason::Mode);
            return self.pause(reason);
        }
        self.state = State::Telling { passes };
        vec![SourceAction::HarvestStale {
            round: self.progress.rounds,
        }]
    }

    /// The guest runs at the target and misses pages.
    pub(super) fn serve(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.state = State::Serving;
        self.moved = now;
        if !self.config.mode.pushes() {
            return Vec::new();
        }
        self.push(now)
    }

    /// Pushes all that is missing. What that is the target may still have to say.
    fn push(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let Some(missing) = &self.missing else {
            return Vec::new();
        };
        let number = self.progress.rounds + 1;
        self.round = Some(Round::push(number, missing, &self.config, now));
        self.next_pieces()
    }

    /// The target is there again.
    pub(super) fn reattach(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.state = State::Reattaching { reconciled: false };
        self.heard = now;
        self.ran_there = true;
        self.missing = None;
        vec![
            SourceAction::Reconnect,
            SourceAction::SetTimer(now.after(KEEPALIVE_EVERY)),
        ]
    }

    /// It has said which pages it misses, on a stream of its own: before it said that it goes on,
    /// or after.
    pub(super) fn reconciled(&mut self, now: Timestamp, dirty: Vec<u32>) -> Vec<SourceAction> {
        match &mut self.state {
            State::Reattaching { reconciled } => {
                *reconciled = true;
                self.missing = Some(dirty);
                Vec::new()
            }
            State::Serving => {
                self.missing = Some(dirty);
                self.serve(now)
            }
            _ => Vec::new(),
        }
    }

    /// The same connection could not be had again: the target is asked anew, but not at once.
    pub(super) fn reattach_later(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        let backoff = RESOLVE_BACKOFF.1 / 8;
        self.state = State::Resolving {
            backoff,
            asking: false,
        };
        vec![
            SourceAction::Disconnect,
            SourceAction::ReportUnresolved { reason },
            SourceAction::SetTimer(now.after(backoff)),
        ]
    }

    /// Every page is there.
    pub(super) fn complete(&mut self, now: Timestamp, faults: FaultReport) -> Vec<SourceAction> {
        self.report.faults = Some(faults);
        self.report.total = now.since(self.begun);
        if let Some(round) = &mut self.round {
            round.stop();
        }
        self.verify_or_release()
    }

    /// The guest ended at the target before its pages were there; they are of no use any more.
    pub(super) fn lost_there(&mut self, now: Timestamp, reason: &str) -> Vec<SourceAction> {
        self.report.total = now.since(self.begun);
        self.lost_guest = Some(clip(reason));
        self.release()
    }

    /// Whether the technique can become this one now.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check_mode(&self, mode: Mode) -> Result<(), &'static str> {
        match self.state {
            State::Idle | State::Connecting | State::Offering => Ok(()),
            State::Serving | State::Reattaching { .. } | State::Resolving { .. } => match mode {
                Mode::Demand | Mode::PostCopy => Ok(()),
                _ => Err("the guest runs at the target already: demand or post-copy are left"),
            },
            _ if mode.needs_faults() && !self.can_switch => {
                Err("the target cannot serve page faults")
            }
            State::Probing { .. } => Ok(()),
            State::Recording { .. }
            | State::Tracking
            | State::Rehearsing { .. }
            | State::Rounds => {
                if mode.copies_live() && !self.tracking {
                    return Err(
                        "its dirty pages are not tracked, since its mode did not need that",
                    );
                }
                Ok(())
            }
            _ => Err("it is too late to change the mode"),
        }
    }

    pub(super) fn set_mode(&mut self, now: Timestamp, mode: Mode) -> Vec<SourceAction> {
        let from = self.config.mode;
        if from == mode || self.check_mode(mode).is_err() {
            return Vec::new();
        }
        self.config.mode = mode;
        self.note_change(now, from, mode, "the operator asked for it");
        if self.state != State::Serving {
            return Vec::new();
        }
        match &mut self.round {
            None if mode.pushes() => self.push(now),
            None => Vec::new(),
            Some(round) if mode.pushes() => {
                self.moved = now;
                round.go_on();
                self.next_pieces()
            }
            Some(round) => {
                round.stop();
                Vec::new()
            }
        }
    }

    fn note_change(&mut self, now: Timestamp, from: Mode, to: Mode, reason: &str) {
        self.report.mode_changes.push(ModeChange {
            at: now.since(self.begun),
            from,
            to,
            reason: String::from(reason),
        });
    }

    /// Whether there is something for the operator to decide.
    ///
    /// # Errors
    /// Why there is not.
    pub fn check_fence(&self, fence: Fence) -> Result<(), &'static str> {
        match (&self.state, fence) {
            // It has run there, and what it did may have been seen.
            (State::Resolving { .. }, Fence::RunsHere) if self.ran_there => {
                Err("the guest has run at the target: it must not be set back in time")
            }
            (State::Resolving { .. }, _) => Ok(()),
            _ => Err("its outcome is not unresolved: there is nothing to decide"),
        }
    }

    /// The operator's word stands for the answer that nobody gives. It is taken only while there is
    /// none.
    pub(super) fn fence(&mut self, now: Timestamp, fence: Fence) -> Vec<SourceAction> {
        if self.check_fence(fence).is_err() {
            return Vec::new();
        }
        match fence {
            Fence::RunsHere => {
                let reason = String::from("the operator said that the guest runs here");
                self.go_back(now, Outcome::Failed { reason })
            }
            Fence::Gone => self.lost_there(now, "the operator said that it is gone"),
        }
    }

    /// The frames of a target where the guest runs.
    pub(super) fn frame_while_serving(
        &mut self,
        now: Timestamp,
        frame: ControlFrame,
    ) -> Vec<SourceAction> {
        match (frame, &self.state) {
            (ControlFrame::Complete(faults), _) => self.complete(now, faults),
            (ControlFrame::Lost { reason }, _) => self.lost_there(now, &reason),
            (
                ControlFrame::Reattached { missing, verifies },
                &State::Reattaching { reconciled },
            ) => {
                self.progress.remaining = missing;
                // A restarted daemon does not know what its predecessor installed.
                self.config.verify &= verifies;
                self.state = State::Serving;
                if reconciled {
                    self.serve(now)
                } else {
                    Vec::new()
                }
            }
            (ControlFrame::Abort { reason } | ControlFrame::Refuse { reason }, _) => self.lost(
                now,
                alloc::format!("the target broke off: {}", clip(&reason)),
            ),
            (frame, _) => {
                let text = alloc::format!("the target sent {} out of turn", frame.name());
                self.lost(now, text)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::{MigrationId, Resolution};
    use crate::journal::Machine;
    use crate::policy::Limits;
    use crate::source::{SentPiece, SourceConfig, SourceEvent};
    use core::time::Duration;

    /// A source that a restarted daemon found, on demand, and that the target needs.
    fn recovered() -> Source {
        let mut source = Source::recover(SourceConfig {
            id: MigrationId(1),
            peer: String::new(),
            mode: Mode::Demand,
            limits: Limits::default(),
            streams: 1,
            memory: PageCount::new(64),
            disks: Vec::new(),
            chunk: PageCount::new(64),
            verify: true,
            vm: Vec::new(),
            demanded: Vec::new(),
            boot_id: 0,
        });
        let needs = SourceEvent::Resolved(Resolution::Needs);
        for event in [SourceEvent::Begin, needs, SourceEvent::Connected] {
            source.handle(Timestamp::ZERO, event);
        }
        source
    }

    /// What it does after these events.
    fn check(events: &[SourceEvent], expect: &[&str]) {
        let mut source = recovered();
        let mut names = Vec::new();
        for event in events {
            let actions = source.handle(Timestamp::ZERO, event.clone());
            names.extend(actions.iter().map(SourceAction::name));
        }
        assert_eq!(names, expect);
    }

    fn reattached() -> SourceEvent {
        let missing = PageCount::new(5);
        SourceEvent::Frame(ControlFrame::Reattached {
            missing,
            verifies: true,
        })
    }

    #[test]
    fn nothing_is_pushed_before_the_target_has_said_what_it_misses() {
        let drain = SourceEvent::SetMode(Mode::PostCopy);
        let reconciled = SourceEvent::Reconciled { dirty: vec![5] };
        let (there, known) = (reattached(), reconciled);
        check(&[there.clone(), drain.clone()], &[]);
        check(&[there.clone(), drain.clone(), known.clone()], &["push"]);
        check(&[drain, known, there], &["push"]);
    }

    /// The target can have the last page before the stream that sent it has said so.
    #[test]
    fn the_report_waits_for_pieces_that_were_sent_and_not_yet_counted() {
        for is_lost in [false, true] {
            let mut source = recovered();
            let reconciled = SourceEvent::Reconciled { dirty: vec![5] };
            let drain = SourceEvent::SetMode(Mode::PostCopy);
            let mut pushed = Vec::new();
            for event in [reattached(), drain, reconciled] {
                pushed.extend(source.handle(Timestamp::ZERO, event));
            }
            let [SourceAction::Push { piece, stream }] = pushed[..] else {
                panic!("{pushed:?}")
            };
            let ms = |ms| Timestamp::ZERO.after(Duration::from_millis(ms));
            let complete = SourceEvent::Frame(ControlFrame::Complete(FaultReport::default()));
            assert_eq!(source.handle(ms(3), complete), []);
            let pages = PageCount::new(5);
            let last = if is_lost {
                let reason = String::new();
                SourceEvent::ConnectionLost { reason }
            } else {
                let sent = SentPiece {
                    pages,
                    ..SentPiece::default()
                };
                SourceEvent::Sent {
                    piece,
                    stream,
                    sent,
                }
            };
            let next = source.handle(ms(9), last);
            let names: Vec<_> = next.iter().map(SourceAction::name).collect();
            assert_eq!(names, ["release"]);
            let report = source.report();
            let round = report.rounds.last().expect("what was pushed");
            let counted = if is_lost { PageCount::ZERO } else { pages };
            assert_eq!(
                (round.pages, round.time),
                (counted, Duration::from_millis(3))
            );
            assert_eq!(report.total, Duration::from_millis(3));
        }
    }

    #[test]
    fn a_guest_that_ran_there_is_not_run_here_on_the_operators_word() {
        let reason = String::new();
        let lost = SourceEvent::ConnectionLost { reason };
        let fence = SourceEvent::Fence(Fence::RunsHere);
        let expect = ["disconnect", "report-unresolved", "set-timer"];
        check(&[lost, fence], &expect);
    }
}
