//! Slowing the guest's writers down: when the law of [`crate::throttle`] is asked, and what is told.
//!
//! It is asked after each harvest of a live round, and only its answer for a round that will be sent
//! counts. Nothing here lets the guest go but an operator who forbids the throttle: the pause, the end
//! of tracking and the loss of the daemon do, in the VM process itself, so that no order of failures
//! leaves a guest throttled.

use super::{Source, SourceAction, Writers};
use crate::report::ThrottleReport;
use crate::throttle::{Observation, Regulator, Throttle, Throttling};
use crate::time::Timestamp;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use limosa_pages::PageCount;

/// What is remembered from harvest to harvest.
#[derive(Clone, Debug, Default)]
pub(super) struct Slowing {
    regulator: Regulator,
    harvested_at: Option<Timestamp>,
    /// As each vCPU's count was then.
    pages: Vec<PageCount>,
    /// The throttle that was asked for last, and since when there is one.
    in_force: Option<(Throttle, Timestamp)>,
    /// How long earlier ones were.
    time_before: Duration,
}

impl Slowing {
    pub(super) const fn in_force(&self) -> Option<Throttle> {
        match self.in_force {
            Some((throttle, _)) => Some(throttle),
            None => None,
        }
    }

    /// For how long throttles have been in force by that time.
    fn time(&self, now: Timestamp) -> Duration {
        let current = self.in_force.map(|(_, since)| now.since(since));
        self.time_before + current.unwrap_or_default()
    }

    /// Pages of each vCPU since the last look.
    fn take_pages(&mut self, writers: &Writers) -> Vec<PageCount> {
        let before = core::mem::replace(&mut self.pages, writers.pages.clone());
        let before = before
            .into_iter()
            .chain(core::iter::repeat(PageCount::ZERO));
        let both = writers.pages.iter().zip(before);
        both.map(|(now, before)| now.saturating_sub(before))
            .collect()
    }
}

impl Source {
    /// For how long throttles have been in force, `elapsed` after the migration was asked for.
    pub fn throttled_for(&self, elapsed: Duration) -> Duration {
        self.slowing.time(self.begun.after(elapsed))
    }

    /// Asks the law; a throttle that is another one than before.
    pub(super) fn regulate(&mut self, now: Timestamp, writers: &Writers) -> Option<Throttle> {
        let before = self.slowing.harvested_at.replace(now);
        let by_vcpu = self.slowing.take_pages(writers);
        self.note_held(now, writers);
        self.progress.was_slowed = false;
        let is_bulk = self.progress.rounds == 0;
        let is_known = !is_bulk && !self.progress.was_released;
        if self.config.limits.throttle == Throttling::Off || !is_known {
            return None;
        }
        let seen = Observation {
            bandwidth: self.progress.bandwidth?,
            time: now.since(before?),
            // What was left out is dirty since earlier, and the next round sends none of it.
            dirtied: self.progress.to_send(),
            by_vcpu: &by_vcpu,
            is_stuck: self.progress.is_stuck(),
        };
        let former = self.slowing.regulator.current();
        let next = self.slowing.regulator.regulate(&seen)?;
        self.progress.was_slowed = former.is_none_or(|former| next.is_tighter_than(former));
        if self.progress.was_slowed {
            // Rounds before the remedy say nothing about those after it.
            self.progress.rounds_without_progress = 0;
        }
        Some(next)
    }

    /// Puts a throttle into force.
    pub(super) fn slow_down(
        &mut self,
        now: Timestamp,
        throttle: Option<Throttle>,
    ) -> impl Iterator<Item = SourceAction> + use<> {
        if let Some(next) = throttle {
            let since = self.slowing.in_force.map_or(now, |(_, since)| since);
            self.slowing.in_force = Some((next, since));
            let report = self.report.throttle.get_or_insert(ThrottleReport {
                first_at: now.since(self.begun),
                time: Duration::ZERO,
                last: next,
                tightest: next,
                changes: 0,
                held: Duration::ZERO,
            });
            report.last = next;
            report.changes += 1;
            if next.is_tighter_than(report.tightest) {
                report.tightest = next;
            }
        }
        throttle
            .into_iter()
            .map(|throttle| SourceAction::Throttle(Some(throttle)))
    }

    /// The operator has forbidden what is in force.
    pub(super) fn let_go_if_forbidden(&mut self, now: Timestamp) -> Vec<SourceAction> {
        let is_allowed = self.config.limits.throttle != Throttling::Off;
        if is_allowed || self.slowing.in_force.is_none() {
            return Vec::new();
        }
        self.note_let_go(now);
        vec![SourceAction::Throttle(None)]
    }

    /// The guest is let go, or was by whoever paused it at that time.
    pub(super) fn note_let_go(&mut self, at: Timestamp) {
        self.note_time(at);
        self.slowing.time_before = self.slowing.time(at);
        self.slowing.in_force = None;
        self.slowing.regulator.let_go();
    }

    fn note_held(&mut self, now: Timestamp, writers: &Writers) {
        self.note_time(now);
        if let Some(report) = &mut self.report.throttle {
            report.held = writers.held;
        }
    }

    fn note_time(&mut self, now: Timestamp) {
        if let Some(report) = &mut self.report.throttle {
            report.time = self.slowing.time(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Limits, Mode};
    use crate::source::{SourceConfig, State};
    use alloc::format;
    use limosa_pages::BytesPerSecond;

    const PAGES: u32 = 1 << 16;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(milliseconds * 1_000_000)
    }

    /// A source whose guest wrote all of its memory in the second that the bulk round took, with
    /// so many looks in between.
    fn slowed(looks: u64) -> Source {
        let memory = PageCount::new(u64::from(PAGES));
        let mut source = Source::new(SourceConfig {
            mode: Mode::Auto,
            limits: Limits {
                throttle: Throttling::Auto,
                ..Limits::default()
            },
            ..SourceConfig::sample(memory, memory)
        });
        let writers = |pages: u64| Writers {
            pages: vec![PageCount::new(pages)],
            held: Duration::ZERO,
        };
        source.state = State::Rounds;
        source.harvested(at(0), 0, (&[PAGES], PageCount::ZERO), &writers(0));
        for look in 0..looks {
            source.looked(at(100 * (look + 1)), vec![PAGES / 2]);
        }
        source.progress.rounds = 1;
        source.progress.last_round = memory;
        source.progress.bandwidth = Some(BytesPerSecond::new(4096 * u64::from(PAGES)));
        source.harvested(
            at(1000),
            1,
            (&[PAGES], PageCount::ZERO),
            &writers(u64::from(PAGES)),
        );
        source
    }

    #[test]
    fn a_look_is_no_harvest_for_the_law() {
        let (without, with) = (slowed(0), slowed(8));
        assert!(without.throttle().is_some());
        assert_eq!(
            format!("{:?}", with.slowing),
            format!("{:?}", without.slowing)
        );
    }

    #[test]
    fn the_time_of_a_throttle_goes_on_until_the_guest_is_let_go() {
        let mut source = slowed(0);
        let check = |source: &Source, elapsed: u64, expect: u64| {
            let time = source.throttled_for(Duration::from_millis(elapsed));
            assert_eq!(time, Duration::from_millis(expect));
        };
        check(&source, 1000, 0);
        check(&source, 1250, 250);
        source.note_let_go(at(1400));
        check(&source, 2000, 400);
    }
}
