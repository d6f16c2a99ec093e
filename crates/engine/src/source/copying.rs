//! Rounds of pages: harvest, decide, clear, send, confirm; the last one with the guest paused.

use super::forecast::Forecast;
use super::rounds::{Round, Step};
use super::{
    BANDWIDTH_SAMPLE_MIN, Paused, Piece, SentPiece, Source, SourceAction, SourceFault, State,
    Writers,
};
use crate::policy::{PauseReason, Verdict};
use crate::report::RoundReport;
use crate::time::Timestamp;
use crate::wire::ControlFrame;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use limosa_pages::{ByteCount, BytesPerSecond, PageCount};

impl Source {
    /// Asks the policy about the pages that wait; they are in `round` already or still unknown.
    pub(super) fn decide(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.progress.elapsed = now.since(self.begun);
        let policy = self.config.mode.policy();
        match policy.verdict(&self.progress, &self.config.limits) {
            Verdict::AnotherRound => self.next_pieces(),
            Verdict::PauseAndCopy(reason) => self.pause(reason),
            Verdict::SwitchNow(reason) if !self.can_switch => self.pause(reason),
            Verdict::SwitchNow(reason) => self.switch(now, reason),
        }
    }

    pub(super) fn pause(&mut self, reason: PauseReason) -> Vec<SourceAction> {
        self.state = State::Pausing;
        self.paused = true;
        self.report.pause_reason = Some(reason);
        self.report.predicted_downtime = if self.is_switching {
            // The pages come later, one fault or one push at a time.
            Some(self.progress.fixed_cost)
        } else {
            self.progress.predicted_downtime()
        };
        let harvest = self.tracking && self.fault != Some(SourceFault::NoHarvestAfterPause);
        vec![SourceAction::Pause {
            round: self.progress.rounds,
            harvest,
            switch: self.is_switching,
        }]
    }

    pub(super) fn harvested(
        &mut self,
        now: Timestamp,
        round: u32,
        dirty: &[u32],
        writers: &Writers,
    ) -> Vec<SourceAction> {
        if round != self.progress.rounds {
            return Vec::new();
        }
        if let State::Telling { .. } = self.state {
            return self.tell_stale(now, dirty);
        }
        if self.state != State::Rounds {
            return Vec::new();
        }
        let round = Round::live(round, dirty, &self.config, now);
        self.progress.remaining = round.progress().0;
        self.forecast_next(now, dirty);
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
        let throttle = self.regulate(now, writers);
        let actions = self.decide(now);
        if self.state != State::Rounds {
            // Whatever it was to be, the guest is about to be paused.
            return actions;
        }
        self.slow_down(now, throttle).chain(actions).collect()
    }

    /// Says what the round that begins will leave, if that is known, or begins to find it out.
    fn forecast_next(&mut self, now: Timestamp, dirty: &[u32]) {
        let forecast = self.forecast.take();
        self.progress.next_round = forecast.and_then(|forecast| {
            let time = self.progress.copy_time()?;
            Some(forecast.dirtied_in(dirty, now, time))
        });
        if self.progress.rounds == 0 && self.config.mode.weighs_rounds() {
            self.forecast = Some(Forecast::new(&self.config, self.progress.remaining, now));
        }
    }

    pub(super) fn looked(&mut self, now: Timestamp, dirty: Vec<u32>) -> Vec<SourceAction> {
        if dirty.is_empty() {
            self.forecast = None;
        }
        if let Some(forecast) = &mut self.forecast {
            forecast.looked(dirty, now);
        }
        Vec::new()
    }

    pub(super) fn paused(&mut self, now: Timestamp, paused: Paused) -> Vec<SourceAction> {
        if let State::Returning { .. } = self.state {
            return Vec::new();
        }
        if self.state != State::Pausing {
            return Vec::new();
        }
        self.moved = now;
        self.state = State::LastRound { prepared: false };
        // The guest was let go when it was paused.
        self.note_let_go(paused.stopped_first);
        if !ControlFrame::fits(paused.state.len()) {
            return self.fail(
                now,
                String::from("the guest's state is too large to be sent"),
            );
        }
        self.report.state_bytes = ByteCount::new(paused.state.len() as u64);
        let number = self.progress.rounds;
        let round = if self.is_switching {
            self.stale_round(now, &paused.dirty, true)
        } else {
            Round::last(number, &paused.dirty, &self.config, now)
        };
        self.progress.remaining = round.progress().0;
        let missing = if self.is_switching {
            paused.missing
        } else {
            PageCount::ZERO
        };
        self.report.missing_at_switch = missing;
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
            missing,
        };
        self.stopped = Some(paused);
        let mut actions = self.next_pieces();
        // The state may overtake the pages on the wire: the target waits for every barrier.
        actions.push(SourceAction::Send(frame));
        actions
    }

    /// Turns what the round wants into actions.
    pub(super) fn next_pieces(&mut self) -> Vec<SourceAction> {
        let in_use = self.streams_in_use();
        let Some(round) = &mut self.round else {
            return Vec::new();
        };
        let steps = round.advance(in_use);
        steps.into_iter().map(Step::into_action).collect()
    }

    /// True in the states in which a round goes out, if there is one.
    pub(super) const fn gives_pieces(&self) -> bool {
        matches!(
            self.state,
            State::Rounds | State::Telling { .. } | State::LastRound { .. } | State::Serving
        )
    }

    pub(super) fn cleared(&mut self, now: Timestamp, piece: Piece) -> Vec<SourceAction> {
        if self.state != State::Rounds {
            return Vec::new();
        }
        self.moved = now;
        if let Some(round) = &mut self.round {
            round.cleared(piece);
        }
        if let Some(forecast) = &mut self.forecast {
            forecast.cleared(piece, now);
        }
        self.next_pieces()
    }

    pub(super) fn sent(
        &mut self,
        now: Timestamp,
        piece: Piece,
        stream: u8,
        sent: SentPiece,
    ) -> Vec<SourceAction> {
        if !self.gives_pieces() {
            return Vec::new();
        }
        self.moved = now;
        if let Some(round) = &mut self.round {
            round.sent(piece, stream, sent);
        }
        let mut actions = self.next_pieces();
        actions.extend(self.weigh_streams(now, sent));
        if let (State::Rounds, Some(round), Some(forecast)) =
            (&self.state, &self.round, &mut self.forecast)
            && forecast.is_due(round.progress().1, now)
        {
            actions.push(SourceAction::Look);
        }
        actions.extend(self.commit_if_ready(now));
        actions
    }

    pub(super) fn round_received(&mut self, now: Timestamp, number: u32) -> Vec<SourceAction> {
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
        let planned = self.close_round(now);
        self.progress.rounds += 1;
        if let State::Telling { passes } = self.state {
            return self.told(passes, planned);
        }
        self.progress.last_round = planned;
        vec![SourceAction::Harvest {
            round: self.progress.rounds,
        }]
    }

    /// Moves the round into the report and takes its bandwidth; the pages that it was to send.
    pub(super) fn close_round(&mut self, now: Timestamp) -> PageCount {
        let Some(round) = self.round.take() else {
            return PageCount::ZERO;
        };
        self.moved = now;
        let report = round.report(now);
        let planned = round.progress().0;
        if round.is_stale() {
            let bytes = &mut self.report.missing_set_bytes;
            *bytes = bytes.saturating_add(report.bytes);
            // The pages that the vCPUs need first are the whole of what it sent.
            if report.pages > PageCount::ZERO {
                self.report.rounds.push(RoundReport {
                    bytes: ByteCount::ZERO,
                    ..report
                });
            }
            return planned;
        }
        if report.bytes >= BANDWIDTH_SAMPLE_MIN.min(self.bandwidth_sample)
            // What coding saves comes on top: what remains is counted in pages, too.
            && let Some(measured) =
                BytesPerSecond::measured(report.bytes.max(report.content()), report.time)
        {
            self.bandwidth_sample = report.bytes;
            self.progress.bandwidth = Some(measured);
        }
        self.report.rounds.push(report);
        planned
    }
}
