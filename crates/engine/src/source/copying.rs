//! Rounds of pages: harvest, decide, clear, send, confirm; the last one with the guest paused.

use super::forecast::Forecast;
use super::rounds::{Round, Step};
use super::{
    BANDWIDTH_SAMPLE_MIN, Paused, Piece, SentPiece, Source, SourceAction, SourceFault, State,
    Writers,
};
use crate::deferral;
use crate::policy::{PauseReason, Progress, Verdict};
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
        (dirty, deferred): (&[u32], PageCount),
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
        let round = Round::live(round, dirty, &self.config, now).without(deferred);
        let planned = round.progress().0;
        // Pages that were left out before and are not any more make this round larger, not the guest.
        self.progress.was_released |= deferred < self.progress.deferred;
        self.progress.remaining = planned.saturating_add(deferred);
        self.progress.deferred = deferred;
        // The bulk round's size says nothing about the guest's dirty rate.
        let shrank = self
            .previous_round
            .map(|previous| Progress::is_fewer(planned, previous));
        if shrank.is_some_and(|shrank| self.deferral_ends(shrank)) {
            // Once more, with all that is dirty.
            return vec![self.harvest()];
        }
        self.forecast_next(now, dirty);
        if let Some(last) = self.report.rounds.last_mut() {
            last.dirty_after = self.progress.remaining;
        }
        if let Some(shrank) = shrank {
            self.progress.count_progress(shrank);
        }
        if self.progress.rounds > 0 {
            self.previous_round = Some(planned);
        }
        self.round = Some(round.with_fault(self.fault));
        let throttle = self.regulate(now, writers);
        self.progress.compare_with_least();
        let actions = self.decide(now);
        self.progress.keep_least();
        if self.state != State::Rounds {
            // Whatever it was to be, the guest is about to be paused.
            return actions;
        }
        self.slow_down(now, throttle).chain(actions).collect()
    }

    /// Asks for the pages of the next live round, and lets the hottest of them wait for the pause.
    pub(super) fn harvest(&self) -> SourceAction {
        let defer_max = if self.deferral_is_over {
            PageCount::ZERO
        } else {
            deferral::pages_max(&self.progress, &self.config.limits)
        };
        SourceAction::Harvest {
            round: self.progress.rounds,
            defer_max,
        }
    }

    /// Whether no page is left out any more from this harvest on.
    fn deferral_ends(&mut self, shrank: bool) -> bool {
        let ends = !self.deferral_is_over
            && deferral::is_in_the_way(&self.progress, &self.config.limits, shrank);
        self.deferral_is_over |= ends;
        self.progress.was_released |= ends;
        ends
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
        self.progress.deferred = PageCount::ZERO;
        let (missing, recorded) = if self.is_switching {
            (paused.missing, paused.recorded)
        } else {
            (PageCount::ZERO, PageCount::ZERO)
        };
        self.report.missing_at_switch = missing;
        self.report.recorded = recorded;
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
            State::Rounds
                | State::Telling { .. }
                | State::LastRound { .. }
                | State::Serving
                | State::Verifying { .. }
                | State::Accounting
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
        if self.state == State::Accounting {
            actions.extend(self.release_when_accounted_for());
        }
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
        self.progress.was_released = false;
        vec![self.harvest()]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Mode;
    use crate::source::SourceConfig;
    use alloc::format;
    use core::time::Duration;

    /// A page takes 1 ms; 5 ms are allowed and nothing else costs anything.
    fn source(downtime_max_ms: u64) -> Source {
        let memory = PageCount::new(1 << 16);
        let mut config = SourceConfig::sample(memory, memory);
        config.mode = Mode::PreCopy;
        config.limits.downtime_max = Duration::from_millis(downtime_max_ms);
        let mut source = Source::new(config);
        source.state = State::Rounds;
        source
    }

    /// Rounds that leave so many pages, each with so many more that it leaves out: what the last one leads to.
    fn check(downtime_max_ms: u64, left: &[(u32, u64)], expect: &str) {
        let mut source = source(downtime_max_ms);
        let mut texts = Vec::new();
        for &(dirty, deferred) in left {
            let round = source.progress.rounds;
            let found = (&[dirty][..], PageCount::new(deferred));
            let actions = source.harvested(Timestamp::ZERO, round, found, &Writers::default());
            texts = actions
                .iter()
                .map(|action| match action {
                    SourceAction::Harvest { defer_max, .. } => {
                        format!("harvest, defer {}", defer_max.get())
                    }
                    other => other.name().into(),
                })
                .collect();
            if matches!(actions.first(), Some(SourceAction::Harvest { .. })) {
                continue;
            }
            assert_eq!(
                source.state == State::Pausing,
                texts == ["pause"],
                "{left:?}"
            );
            source.progress.last_round = PageCount::new(u64::from(dirty));
            source.progress.rounds += 1;
            source.progress.was_released = false;
            source.progress.bandwidth = Some(BytesPerSecond::new(4096 * 1000));
        }
        let reason = source.report.pause_reason;
        texts.extend(reason.map(|reason| format!("{reason:?}")));
        assert_eq!(texts.join(", "), expect, "{left:?}");
    }

    #[test]
    fn rounds_end_at_a_trough() {
        let of = |left: &[u32]| left.iter().map(|&dirty| (dirty, 0)).collect::<Vec<_>>();
        let check = |left: &[u32], expect| check(5, &of(left), expect);
        check(&[9000, 1000, 1000], "clear");
        check(&[9000, 1000, 1000, 1000], "pause, NoProgress");
        check(&[9000, 1000, 5000, 5000], "clear");
        check(&[9000, 1000, 5000, 5000, 1000], "pause, LocalMinimum");
        check(&[9000, 1000, 5000, 1000, 5000], "clear");
        check(&[9000, 1000, 5000, 1000, 5000, 1100], "pause, LocalMinimum");
        check(&[9000, 1000, 5000, 5000, 5000, 5000, 5000], "clear");
        check(
            &[9000, 1000, 5000, 5000, 5000, 5000, 5000, 5000],
            "pause, NoProgress",
        );
        check(&[9000, 1000, 5000, 5000, 800], "clear");
    }

    #[test]
    fn what_was_left_out_is_harvested_once_more_when_it_alone_is_in_the_way() {
        // 100 pages are allowed, and half of them may be left out.
        let until = [(9000, 0), (300, 50), (70, 50)];
        check(100, &until, "clear");
        check(
            100,
            &[until[0], until[1], until[2], (68, 50)],
            "harvest, defer 0",
        );
        check(100, &[until[0], until[1], until[2], (60, 50)], "clear");
        check(
            100,
            &[until[0], until[1], until[2], (68, 50), (118, 0)],
            "clear",
        );
        check(
            100,
            &[until[0], until[1], until[2], (68, 50), (118, 0), (90, 0)],
            "pause, WithinBudget",
        );
    }
}
