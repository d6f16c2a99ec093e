//! Before the first page: connect, offer, compare clocks, record, rehearse.
//!
//! Nothing here stops the guest for longer than the rehearsal, and an attempt that ends here leaves
//! no trace.

use super::{CLOCK_PROBES, KEEPALIVE_EVERY, Source, SourceAction, State};
use crate::handover::Phase;
use crate::report::ClockOffset;
use crate::time::Timestamp;
use crate::wire::{ControlFrame, Start};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;

impl Source {
    pub(super) fn begin(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.begun = now;
        self.heard = now;
        self.moved = now;
        if matches!(self.state, State::Resolving { .. }) {
            let reason = String::from("the daemon was restarted after the commit");
            let mut actions = vec![SourceAction::ReportUnresolved { reason }];
            actions.extend(self.ask(now));
            return actions;
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

    pub(super) fn connected(&mut self, now: Timestamp) -> Vec<SourceAction> {
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
            disks: self.config.disks.clone(),
            vm: self.config.vm.clone(),
            demanded: self.config.demanded.clone(),
        };
        vec![SourceAction::Send(ControlFrame::Start(start))]
    }

    /// The target has made a VM.
    pub(super) fn accepted(
        &mut self,
        now: Timestamp,
        boot_id: u128,
        can_fault: bool,
    ) -> Vec<SourceAction> {
        self.can_switch = can_fault;
        if self.config.mode.needs_faults() && !can_fault {
            let text = "the target cannot serve page faults, which this mode needs: see its log";
            return self.fail(now, String::from(text));
        }
        if boot_id == self.config.boot_id {
            // One kernel, one clock.
            return self.record_offer(now);
        }
        self.probe(now, 0)
    }

    pub(super) fn probe(&mut self, now: Timestamp, number: u32) -> Vec<SourceAction> {
        self.state = State::Probing { number, asked: now };
        vec![SourceAction::Send(ControlFrame::ClockProbe { number })]
    }

    /// The offset that the fastest probe saw, as in NTP: the answer was given half way, give or
    /// take half the round trip.
    pub(super) fn take_probe(
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

    pub(super) fn record_offer(&mut self, now: Timestamp) -> Vec<SourceAction> {
        self.state = State::Recording { asked: now };
        vec![SourceAction::Record(Phase::Offered { id: self.config.id })]
    }

    pub(super) fn rehearse(&mut self) -> Vec<SourceAction> {
        self.state = State::Rehearsing { sent: None };
        vec![SourceAction::Rehearse]
    }

    pub(super) fn rehearsed(
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
    pub(super) fn rehearsal_loaded(
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
            return vec![self.harvest()];
        }
        self.decide(now)
    }
}
