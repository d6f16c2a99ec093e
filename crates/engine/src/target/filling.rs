//! A guest that runs here while pages of it are missing.
//!
//! What brings the pages is told and not seen here: faults that are served, pushes that come. All
//! that is decided is who hears of it: the source while it is there, whoever asks if it is not.
//! Alone, the target waits without a limit: the guest can run nowhere else.

use super::{State, Target, TargetAction};
use crate::handover::Resolution;
use crate::report::FaultReport;
use crate::source::KEEPALIVE_EVERY;
use crate::time::Timestamp;
use crate::wire::ControlFrame;
use alloc::vec;
use alloc::vec::Vec;
use limosa_pages::PageCount;

impl Target {
    /// The guest runs and misses pages, unless loading its state has asked for all of them.
    pub(super) fn fill(&mut self) -> Vec<TargetAction> {
        let alone = self.connection_lost;
        self.state = State::Filling { alone };
        let mut actions = Vec::new();
        if alone {
            actions.push(TargetAction::Detach);
        }
        match self.present.take() {
            Some(faults) => actions.extend(self.all_present(faults)),
            None => actions.extend(self.answer(Resolution::Needs)),
        }
        actions
    }

    /// The source has come back.
    pub(super) fn reattach(&mut self, now: Timestamp, streams: u8) -> Vec<TargetAction> {
        self.state = State::Filling { alone: false };
        vec![
            TargetAction::Reconcile { streams },
            TargetAction::SetTimer(now.after(KEEPALIVE_EVERY)),
        ]
    }

    /// It was told what is missing.
    pub(super) fn still_missing(&self, missing: PageCount) -> Vec<TargetAction> {
        if self.state != (State::Filling { alone: false }) {
            return Vec::new();
        }
        let verifies = self.start.as_ref().is_some_and(|start| start.verify);
        vec![TargetAction::Send(ControlFrame::Reattached {
            missing,
            verifies,
        })]
    }

    /// Nothing is missing any more; if the guest does not run yet, that is kept in mind.
    pub(super) fn all_present(&mut self, faults: FaultReport) -> Vec<TargetAction> {
        match self.state {
            State::Filling { alone } => {
                self.state = State::Disarming { alone, faults };
                vec![TargetAction::Disarm]
            }
            State::Loading { .. } | State::Prepared | State::Committing { .. } => {
                self.present = Some(faults);
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// The VM process has its memory to itself.
    pub(super) fn disarmed(&mut self) -> Vec<TargetAction> {
        let State::Disarming { alone, faults } = &self.state else {
            return Vec::new();
        };
        let (alone, complete) = (*alone, ControlFrame::Complete(faults.clone()));
        if alone {
            let mut actions: Vec<TargetAction> =
                self.answer(Resolution::Runs).into_iter().collect();
            actions.extend(self.finish_unconfirmed());
            return actions;
        }
        let mut actions = vec![TargetAction::Send(complete)];
        actions.extend(self.digest());
        actions
    }
}
