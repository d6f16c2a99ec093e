//! How an attempt ends: by commit, by failure, by an answer to *resolve*.
//!
//! Until the commit is recorded every way leads back to a guest that runs here. From then on only
//! the target's word does.

use super::rounds::Round;
use super::{RESOLVE_BACKOFF, SILENCE_MAX, Source, SourceAction, SourceFault, State};
use crate::handover::{Phase, Resolution};
use crate::report::{Downtime, Outcome};
use crate::time::Timestamp;
use crate::wire::{ControlFrame, Digest, clip};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use limosa_pages::PageCount;

impl Source {
    /// Records the commit once the target has everything and everything sent is accounted for.
    pub(super) fn commit_if_ready(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let all_sent = self.round.as_ref().is_none_or(Round::all_sent);
        if self.state != (State::LastRound { prepared: true }) || !all_sent {
            return Vec::new();
        }
        self.close_round(now);
        if let (true, Some(stopped)) = (self.is_switching, &self.stopped) {
            self.missing = Some(stopped.missing_counts.clone());
        }
        self.state = State::Committing { lost: None };
        let (id, peer) = (self.config.id, self.config.peer.clone());
        let mut actions = vec![SourceAction::Record(Phase::Committed { id, peer })];
        if self.fault == Some(SourceFault::CommitBeforeRecord) {
            actions.insert(0, SourceAction::Send(ControlFrame::Commit));
        }
        actions
    }

    pub(super) fn runs(
        &mut self,
        now: Timestamp,
        committed_at: Timestamp,
        first_instruction_at: Timestamp,
    ) -> Vec<SourceAction> {
        self.ran_there = true;
        self.report.total = now.since(self.begun);
        self.report.downtime = self.downtime(committed_at, first_instruction_at);
        let running_at = first_instruction_at.shift(-self.report.clock.nanos);
        self.report.switch = self
            .stopped
            .as_ref()
            .map(|stopped| (stopped.stopped_first, running_at));
        if self.report.missing_at_switch > PageCount::ZERO {
            return self.serve(now);
        }
        self.verify_or_release()
    }

    pub(super) fn verify_or_release(&mut self) -> Vec<SourceAction> {
        if self.config.verify {
            self.state = State::Verifying {
                ours: None,
                theirs: None,
            };
            return vec![SourceAction::Hash];
        }
        self.release_when_accounted_for()
    }

    pub(super) fn downtime(
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

    pub(super) fn hashed(&mut self, now: Timestamp, digest: Digest) -> Vec<SourceAction> {
        let State::Verifying { theirs, .. } = self.state else {
            return Vec::new();
        };
        self.state = State::Verifying {
            ours: Some(digest),
            theirs,
        };
        self.compare(now)
    }

    pub(super) fn verified(&mut self, now: Timestamp, digest: Digest) -> Vec<SourceAction> {
        let State::Verifying { ours, .. } = self.state else {
            return Vec::new();
        };
        self.state = State::Verifying {
            ours,
            theirs: Some(digest),
        };
        self.compare(now)
    }

    pub(super) fn compare(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.moved = now;
        let State::Verifying {
            ours: Some(ours),
            theirs: Some(theirs),
        } = self.state
        else {
            return Vec::new();
        };
        self.report.digest_equal = Some(ours == theirs);
        self.release_when_accounted_for()
    }

    /// Releases the guest once every piece that was given to a stream has said what it sent: the target can have
    /// the last page before the stream that sent it has said so.
    pub(super) fn release_when_accounted_for(&mut self) -> Vec<SourceAction> {
        if self.round.as_ref().is_some_and(Round::has_pieces_out) {
            self.state = State::Accounting;
            return Vec::new();
        }
        self.release()
    }

    pub(super) fn release(&mut self) -> Vec<SourceAction> {
        // What was pushed was over when the total was taken.
        self.close_round(self.begun.after(self.report.total));
        self.state = State::Releasing;
        vec![SourceAction::Release]
    }

    pub(super) fn released(&mut self, now: Timestamp) -> Vec<SourceAction> {
        if self.state != State::Releasing {
            return Vec::new();
        }
        self.paused = false;
        let mut actions = vec![
            SourceAction::Send(ControlFrame::Done),
            SourceAction::Disconnect,
        ];
        let outcome = match self.lost_guest.take() {
            Some(reason) => Outcome::GuestLost { reason },
            None => Outcome::Completed,
        };
        actions.extend(self.finish(now, outcome));
        actions
    }

    /// The connection or the peer's good behaviour is lost. What follows depends on how far it came.
    pub(super) fn lost(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
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
            State::AwaitRuns | State::Serving
                if self.fault == Some(SourceFault::ResumeAfterCommit) =>
            {
                self.go_back(now, Outcome::Failed { reason })
            }
            State::AwaitRuns | State::Serving => self.resolve(now, reason),
            State::Reattaching { .. } => self.reattach_later(now, reason),
            // It runs there and has its pages: only the comparison is lost.
            State::Verifying { .. } | State::Accounting => self.release(),
            _ => self.fail(now, reason),
        }
    }

    /// Ends the attempt before commit.
    pub(super) fn fail(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        let abort = SourceAction::Send(ControlFrame::Abort {
            reason: clip(&reason),
        });
        let mut actions = vec![abort];
        actions.extend(self.go_back(now, Outcome::Failed { reason }));
        actions
    }

    pub(super) fn abort(&mut self, now: Timestamp) -> Vec<SourceAction> {
        match self.state {
            State::Idle
            | State::Connecting
            | State::Offering
            | State::Probing { .. }
            | State::Recording { .. }
            | State::Tracking
            | State::Rehearsing { .. }
            | State::Rounds
            | State::Telling { .. }
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
    pub(super) fn go_back(&mut self, now: Timestamp, outcome: Outcome) -> Vec<SourceAction> {
        let was_offered = !matches!(
            self.state,
            State::Idle | State::Connecting | State::Offering | State::Probing { .. }
        );
        self.report.total = now.since(self.begun);
        let mut actions = vec![SourceAction::Disconnect];
        // With the end of tracking the guest is let go.
        self.note_let_go(now);
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

    pub(super) fn resumed(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let State::Returning { outcome } = &self.state else {
            return Vec::new();
        };
        self.paused = false;
        let outcome = outcome.clone();
        self.finish(now, outcome)
    }

    pub(super) fn resolve(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        self.close_round(now);
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

    pub(super) fn ask(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let State::Resolving { asking, .. } = &mut self.state else {
            return Vec::new();
        };
        *asking = true;
        vec![
            SourceAction::Resolve,
            SourceAction::SetTimer(now.after(SILENCE_MAX)),
        ]
    }

    pub(super) fn resolved(&mut self, now: Timestamp, resolution: Resolution) -> Vec<SourceAction> {
        if !matches!(self.state, State::Resolving { .. }) {
            return Vec::new();
        }
        match resolution {
            Resolution::Runs => {
                self.report.total = now.since(self.begun);
                self.release()
            }
            Resolution::Needs => self.reattach(now),
            Resolution::Gone => self.lost_there(
                now,
                "the guest ended at the target before all its pages were there",
            ),
            Resolution::Barred => {
                let reason = String::from("the target never took the guest over");
                self.go_back(now, Outcome::Failed { reason })
            }
        }
    }

    pub(super) fn resolve_failed(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        let State::Resolving { backoff, asking } = &mut self.state else {
            return Vec::new();
        };
        *asking = false;
        let wait = *backoff;
        *backoff = (*backoff * 2).min(RESOLVE_BACKOFF.1);
        vec![
            SourceAction::ReportUnresolved { reason },
            SourceAction::SetTimer(now.after(wait)),
        ]
    }

    /// The VM process failed or refused. Before commit the guest is put back; only if that fails
    /// too is it lost.
    pub(super) fn guest_failed(&mut self, now: Timestamp, reason: String) -> Vec<SourceAction> {
        match self.state {
            State::Finished => Vec::new(),
            // It runs at the target already; that its old process died here changes nothing.
            State::Releasing => self.released(now),
            State::Verifying { .. } | State::Accounting => {
                self.release();
                self.released(now)
            }
            // Its memory outlives it here, and that is all that the target needs. Who is told now to run it must not
            // lose its connections for that.
            State::AwaitRuns
            | State::Resolving { .. }
            | State::Serving
            | State::Reattaching { .. } => Vec::new(),
            // Nothing had been asked of it yet that it could have refused: it died by itself.
            State::Idle | State::Connecting | State::Offering | State::Probing { .. } => {
                let abort = SourceAction::Send(ControlFrame::Abort {
                    reason: clip(&reason),
                });
                let mut actions = vec![abort, SourceAction::Disconnect];
                actions.extend(self.finish(now, Outcome::GuestLost { reason }));
                actions
            }
            State::Returning { .. } => {
                let mut actions = vec![SourceAction::Disconnect];
                actions.extend(self.finish(now, Outcome::GuestLost { reason }));
                actions
            }
            _ => self.fail(now, reason),
        }
    }

    pub(super) fn finish(&mut self, now: Timestamp, outcome: Outcome) -> Vec<SourceAction> {
        self.report.eviction = now.since(self.begun);
        self.report.outcome = Some(outcome.clone());
        self.state = State::Finished;
        vec![SourceAction::Finish(outcome)]
    }
}
