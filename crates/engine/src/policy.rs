//! The techniques as policies: when does a round end the running of the guest at the source?
//!
//! One mechanism, many policies: rounds of pages go out until the policy says otherwise. A policy
//! sees numbers only and keeps nothing between calls, so that its verdict can be tested, explained
//! and predicted from a [`Progress`] alone.

use crate::deferral::Deferral;
use crate::streams::Streams;
use crate::throttle::Throttling;
use core::fmt;
use core::time::Duration;
use limosa_pages::{BytesPerSecond, PageCount};
use serde::{Deserialize, Serialize};

/// The technique of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Pause, copy everything, run at the target: the least traffic and the longest downtime.
    StopAndCopy,
    /// Run at the target at once; each page comes when it is first touched, and nothing ends that
    /// but an order to drain. `[Hines09 §2]`
    Demand,
    /// Run at the target at once; pages come when they are touched, and all others are pushed
    /// meanwhile. `[Hines09 §3]`
    PostCopy,
    /// Copy while the guest runs, again what it dirtied, pause for the rest. `[Clark05 §3]`
    PreCopy,
    /// Copy everything once while the guest runs, then go on as post-copy with what it dirtied.
    Hybrid,
    /// Pre-copy that becomes hybrid as soon as its rounds do not pay.
    #[default]
    Auto,
}

impl Mode {
    /// All of them, in the order in which they are explained.
    pub const ALL: [Self; 6] = [
        Self::StopAndCopy,
        Self::Demand,
        Self::PostCopy,
        Self::PreCopy,
        Self::Hybrid,
        Self::Auto,
    ];

    /// As it is typed on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StopAndCopy => "stop-and-copy",
            Self::Demand => "demand",
            Self::PostCopy => "post-copy",
            Self::PreCopy => "pre-copy",
            Self::Hybrid => "hybrid",
            Self::Auto => "auto",
        }
    }

    /// True if pages go out while the guest runs at the source.
    pub const fn copies_live(self) -> bool {
        matches!(self, Self::PreCopy | Self::Hybrid | Self::Auto)
    }

    /// True if the guest is meant to run at the target before all its pages are there. Such a
    /// migration needs a target that can serve page faults.
    pub const fn needs_faults(self) -> bool {
        matches!(self, Self::Demand | Self::PostCopy | Self::Hybrid)
    }

    /// True if pages that are still missing at the target are sent without being asked for.
    pub const fn pushes(self) -> bool {
        !matches!(self, Self::Demand)
    }

    /// True if it makes a further round only where that is expected to pay.
    pub const fn weighs_rounds(self) -> bool {
        matches!(self, Self::Hybrid | Self::Auto)
    }

    /// The policy that carries it out.
    pub fn policy(self) -> &'static dyn Policy {
        match self {
            Self::StopAndCopy => &StopAndCopy,
            Self::Demand | Self::PostCopy => &PostCopy,
            Self::PreCopy => &PreCopy,
            Self::Hybrid => &Hybrid,
            Self::Auto => &Auto,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the operator allows; can be changed while the migration runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The downtime that pre-copy aims at, fixed costs included.
    pub downtime_max: Duration,
    /// Bytes a second on the wire, all streams together; `None` is as fast as it goes.
    pub bandwidth_max: Option<BytesPerSecond>,
    /// The whole migration should be over after this time; pre-copy then pauses early.
    pub deadline: Option<Duration>,
    /// Rounds while the guest runs, the bulk round included.
    pub rounds_max: u32,
    /// Whether the guest's writers may be slowed down where rounds do not shrink.
    #[serde(default)]
    pub throttle: Throttling,
    /// How many push streams are used, of those that are open.
    #[serde(default)]
    pub streams: Streams,
    /// Whether hot pages may be left out of rounds that go out while the guest runs.
    #[serde(default)]
    pub defer: Deferral,
}

impl Default for Limits {
    /// 5 ms is what an idle guest reaches with room to spare; 30 rounds is what Xen allows. Nobody is
    /// slowed who was not asked: a longer pause is over sooner than a slow guest, and the modes that
    /// can switch need neither. Hot pages may be left out, which makes no pause longer than allowed.
    fn default() -> Self {
        Self {
            downtime_max: Duration::from_millis(5),
            bandwidth_max: None,
            deadline: None,
            rounds_max: 30,
            throttle: Throttling::Off,
            streams: Streams::AUTO,
            defer: Deferral::Auto,
        }
    }
}

/// Where a migration stands when a round is over and its successor has been harvested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Rounds sent so far.
    pub rounds: u32,
    /// Pages that wait to be sent now.
    pub remaining: PageCount,
    /// Of these, hot ones that a further live round leaves out.
    pub deferred: PageCount,
    /// The hot pages that were left out before go out with the next round: what the last round showed does
    /// not hold for it.
    pub was_released: bool,
    /// Pages of the round that was sent last.
    pub last_round: PageCount,
    /// Consecutive rounds that shrank the pages that a live round sends by less than a tenth.
    pub rounds_without_progress: u32,
    /// The fewest pages that an earlier round has left, since the guest's writers were last slowed down;
    /// `None` if there is no such round.
    pub least: Option<PageCount>,
    /// Rounds since one has left less than nine tenths of the least before it.
    pub rounds_since_least: u32,
    /// Pages that the guest is expected to dirty while those that wait are sent. Known after the bulk
    /// round, if the dirty log was looked at during it.
    pub next_round: Option<PageCount>,
    /// The guest's writers have just been slowed down, or more than before: what the last round showed
    /// does not hold for the next one.
    pub was_slowed: bool,
    /// Payload rate as delivered to the target; `None` before the first round.
    pub bandwidth: Option<BytesPerSecond>,
    /// The part of the downtime that does not depend on the number of pages, as rehearsed.
    pub fixed_cost: Duration,
    /// Since the migration was asked for.
    pub elapsed: Duration,
}

impl Progress {
    /// Before anything was sent of so many pages.
    pub(crate) const fn before(pages: PageCount) -> Self {
        Self {
            rounds: 0,
            remaining: pages,
            deferred: PageCount::ZERO,
            was_released: false,
            last_round: PageCount::ZERO,
            rounds_without_progress: 0,
            least: None,
            rounds_since_least: 0,
            next_round: None,
            was_slowed: false,
            bandwidth: None,
            fixed_cost: Duration::ZERO,
            elapsed: Duration::ZERO,
        }
    }

    /// Downtime if the guest were paused now: fixed cost plus remaining bytes over bandwidth.
    /// `None` while the bandwidth is unknown. `docs/techniques.md` explains the formula.
    pub fn predicted_downtime(&self) -> Option<Duration> {
        Some(self.fixed_cost.saturating_add(self.copy_time()?))
    }

    /// True if about as few pages wait as ever before: at most an eighth more.
    pub(crate) fn is_low(&self) -> bool {
        self.least
            .is_none_or(|least| self.remaining.get() - self.remaining.get() / 9 <= least.get())
    }

    /// True if so many pages are clearly fewer than there were before: by more than a tenth.
    pub(crate) const fn is_fewer(now: PageCount, before: PageCount) -> bool {
        now.get() < before.get().saturating_mul(9) / 10
    }

    /// Counts a round that has left fewer pages than the one before it, or has not.
    pub(crate) const fn count_progress(&mut self, shrank: bool) {
        self.rounds_without_progress = if shrank || self.was_released {
            0
        } else {
            self.rounds_without_progress + 1
        };
    }

    /// Notes whether this round has left fewer pages than all before it. Those before a remedy say nothing
    /// about those after it.
    pub(crate) fn compare_with_least(&mut self) {
        if self.was_slowed || self.was_released {
            self.least = None;
        }
        let is_new = self
            .least
            .is_none_or(|least| Self::is_fewer(self.remaining, least));
        self.rounds_since_least = if is_new {
            0
        } else {
            self.rounds_since_least + 1
        };
    }

    /// The verdict on this round is spoken: what it has left is compared with from now on.
    pub(crate) fn keep_least(&mut self) {
        if self.rounds > 0 {
            let least = self.least.unwrap_or(self.remaining);
            self.least = Some(least.min(self.remaining));
        }
    }

    /// Pages that a further live round sends.
    pub const fn to_send(&self) -> PageCount {
        self.remaining.saturating_sub(self.deferred)
    }

    /// True if the guest dirtied about as much as was sent: at least nine tenths of it. Pages that were
    /// left out count on neither side.
    pub(crate) fn is_stuck(&self) -> bool {
        !self.was_released && self.to_send().get() >= self.last_round.get() / 10 * 9
    }

    /// True if the part of the downtime that rounds do not shorten is over the limit, and what they do shorten is
    /// at most an eighth of it and within the limit by itself: nothing that is worth a round is left.
    fn is_fixed(&self, limits: &Limits) -> bool {
        let little = limits.downtime_max.min(self.fixed_cost / 8);
        let is_little = |copy| copy <= little;
        self.fixed_cost > limits.downtime_max && self.copy_time().is_some_and(is_little)
    }

    /// Time to copy what remains.
    pub(crate) fn copy_time(&self) -> Option<Duration> {
        self.bandwidth?.time_for(self.remaining.bytes())
    }
}

/// Why the guest was paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PauseReason {
    /// The mode pauses before the first page.
    Mode,
    /// The predicted downtime is within the limit.
    WithinBudget,
    /// The limit cannot be reached by rounds, which have little left to shorten.
    FixedCost,
    /// The limit of rounds is reached.
    RoundsMax,
    /// The guest dirties pages as fast as they are sent.
    NoProgress,
    /// No round leaves fewer pages any more, and this one has left about as few as any.
    LocalMinimum,
    /// Another round would miss the deadline.
    Deadline,
    /// The mode switches after its bulk round.
    BulkDone,
    /// The next round would have been as large as the last one.
    Predicted,
}

impl PauseReason {
    /// Whether what waits is copied in the pause even by modes that could leave it to page faults.
    const fn leaves_little(self) -> bool {
        matches!(self, Self::WithinBudget | Self::FixedCost)
    }

    /// One sentence for the operator.
    pub const fn explain(self) -> &'static str {
        match self {
            Self::Mode => "the mode pauses the guest before the first page",
            Self::WithinBudget => "the predicted downtime was within the limit",
            Self::FixedCost => {
                "rounds had little left to shorten: what the pause takes without any page was over the limit"
            }
            Self::RoundsMax => "the limit of rounds was reached",
            Self::NoProgress => "the guest dirtied its pages as fast as the link carried them",
            Self::LocalMinimum => {
                "the rounds ceased to leave fewer pages, and the last one left about as few as any"
            }
            Self::Deadline => "another round would have missed the deadline",
            Self::BulkDone => "the bulk round was over, after which the mode switches",
            Self::Predicted => "the next round would have been as large as the last one",
        }
    }
}

/// What to do with the pages that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send them while the guest runs.
    AnotherRound,
    /// Pause the guest, send them and whatever came on top.
    PauseAndCopy(PauseReason),
    /// Pause the guest, run it at the target, send them from then on.
    SwitchNow(PauseReason),
}

/// A technique.
pub trait Policy {
    /// Decides after a harvest. Total, and with any sequence of answers from the world it says
    /// something else than [`Verdict::AnotherRound`] after at most `limits.rounds_max` rounds.
    fn verdict(&self, progress: &Progress, limits: &Limits) -> Verdict;
}

/// Pauses before the first page.
#[derive(Debug)]
pub struct StopAndCopy;

impl Policy for StopAndCopy {
    fn verdict(&self, _: &Progress, _: &Limits) -> Verdict {
        Verdict::PauseAndCopy(PauseReason::Mode)
    }
}

/// Copies in rounds and stops where another round would not pay.
///
/// `[Clark05 §3]` stops on a small rest, too many rounds or too many bytes. Differs: the rest is
/// weighed as a predicted downtime that counts the rehearsed fixed cost, and a dirty set that does
/// not shrink ends the rounds, since each further round costs its bytes for nothing.
///
/// Where what rounds leave goes up and down, they do not end at a peak: having seen some, it takes the next
/// one that leaves about as little as any before, as `[Wood11]` does for a dirty set that does not shrink.
/// Differs: compared is with the least of all, not of a window of rounds, since rounds are few.
#[derive(Debug)]
pub struct PreCopy;

impl PreCopy {
    /// Rounds in a row that shrink the rest by less than a tenth before pre-copy gives up: one may
    /// be bad luck of the guest's phases, two are its rate.
    pub const ROUNDS_WITHOUT_PROGRESS_MAX: u32 = 2;
    /// Rounds without a new least after which one that is about as low is taken: a guest whose phases take
    /// turns has shown both by then.
    pub const ROUNDS_SINCE_LEAST_MIN: u32 = 3;
    /// Rounds without a new least after which the guest is not waited for to come back to it.
    pub const ROUNDS_SINCE_LEAST_MAX: u32 = 6;

    /// Why rounds that have ceased to shrink end with this one, if they do.
    fn stop(progress: &Progress) -> Option<PauseReason> {
        let since = progress.rounds_since_least;
        let is_stuck = progress.rounds_without_progress >= Self::ROUNDS_WITHOUT_PROGRESS_MAX;
        let is_late = since >= Self::ROUNDS_SINCE_LEAST_MAX;
        if is_stuck && (progress.is_low() || is_late) {
            return Some(PauseReason::NoProgress);
        }
        let is_minimum = since >= Self::ROUNDS_SINCE_LEAST_MIN && progress.is_low();
        is_minimum.then_some(PauseReason::LocalMinimum)
    }
}

impl Policy for PreCopy {
    fn verdict(&self, progress: &Progress, limits: &Limits) -> Verdict {
        if progress.rounds == 0 {
            return Verdict::AnotherRound;
        }
        let predicted = progress.predicted_downtime();
        if progress.remaining == PageCount::ZERO
            || predicted.is_some_and(|downtime| downtime <= limits.downtime_max)
        {
            return Verdict::PauseAndCopy(PauseReason::WithinBudget);
        }
        if progress.is_fixed(limits) {
            return Verdict::PauseAndCopy(PauseReason::FixedCost);
        }
        if progress.rounds >= limits.rounds_max {
            return Verdict::PauseAndCopy(PauseReason::RoundsMax);
        }
        if let Some(reason) = Self::stop(progress) {
            return Verdict::PauseAndCopy(reason);
        }
        let another = progress.elapsed + 2 * progress.copy_time().unwrap_or(Duration::ZERO);
        if limits
            .deadline
            .is_some_and(|deadline| another + progress.fixed_cost > deadline)
        {
            return Verdict::PauseAndCopy(PauseReason::Deadline);
        }
        Verdict::AnotherRound
    }
}

/// Runs the guest at the target before the first page.
#[derive(Debug)]
pub struct PostCopy;

impl Policy for PostCopy {
    fn verdict(&self, progress: &Progress, _: &Limits) -> Verdict {
        // After rounds of another mode the guest's pages are there as far as they are clean.
        Verdict::SwitchNow(if progress.rounds == 0 {
            PauseReason::Mode
        } else {
            PauseReason::BulkDone
        })
    }
}

/// One bulk round, a second one if that pays, then the switch.
///
/// A second round pays if it is at most half the first: it then takes at most half its time, and
/// leaves fewer pages to be faulted in. If it is known that it would leave more than half of its
/// own, it does not pay. It pays in any case if the guest's writers are slowed down for it.
#[derive(Debug)]
pub struct Hybrid;

impl Policy for Hybrid {
    fn verdict(&self, progress: &Progress, limits: &Limits) -> Verdict {
        let is_half = |part: PageCount, whole: PageCount| part.get() <= whole.get() / 2;
        let is_small = is_half(progress.remaining, progress.last_round)
            && progress
                .next_round
                .is_none_or(|next| is_half(next, progress.remaining));
        match (PreCopy.verdict(progress, limits), progress.rounds) {
            (Verdict::AnotherRound, 0) => Verdict::AnotherRound,
            (Verdict::AnotherRound, 1) if is_small || progress.was_slowed => Verdict::AnotherRound,
            (verdict @ Verdict::PauseAndCopy(reason), _) if reason.leaves_little() => verdict,
            _ => Verdict::SwitchNow(PauseReason::BulkDone),
        }
    }
}

/// Pre-copy as long as its rounds shrink; what pre-copy would pause for at any price is left to
/// page faults instead.
#[derive(Debug)]
pub struct Auto;

impl Policy for Auto {
    fn verdict(&self, progress: &Progress, limits: &Limits) -> Verdict {
        // A guest that dirtied as much as was sent dirties as much in the next round, which takes
        // as long: no round after it will be smaller.
        let does_not_shrink = progress.is_stuck();
        // After the bulk round, which says little about it, there may be a forecast, which is
        // rather too low: pre-copy would send what waits four times over, post-copy once. But it
        // is of a guest that writes as fast as it can. If that may be changed, the round is made:
        // it gives the rate by which the writers are slowed down.
        let will_not_shrink = progress
            .next_round
            .is_some_and(|next| next.get() >= progress.remaining.get() / 4 * 3);
        let may_be_slowed = limits.throttle != Throttling::Off;
        let is_stuck = does_not_shrink || will_not_shrink && !may_be_slowed;
        match PreCopy.verdict(progress, limits) {
            Verdict::AnotherRound if progress.rounds > 0 && is_stuck && !progress.was_slowed => {
                Verdict::SwitchNow(PauseReason::Predicted)
            }
            verdict @ Verdict::PauseAndCopy(reason) if reason.leaves_little() => verdict,
            Verdict::PauseAndCopy(reason) => Verdict::SwitchNow(reason),
            verdict => verdict,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn progress(rounds: u32, remaining: u64) -> Progress {
        Progress {
            rounds,
            remaining: PageCount::new(remaining),
            deferred: PageCount::ZERO,
            was_released: false,
            last_round: PageCount::new(2000),
            rounds_without_progress: 0,
            least: None,
            rounds_since_least: 0,
            next_round: None,
            was_slowed: false,
            bandwidth: Some(BytesPerSecond::new(4096 * 1000)),
            fixed_cost: Duration::from_millis(2),
            elapsed: Duration::from_secs(1),
        }
    }

    fn check(progress: Progress, limits: Limits, expect: Verdict) {
        assert_eq!(PreCopy.verdict(&progress, &limits), expect);
    }

    /// What a mode says after so many rounds, 2000 pages in the last one, with so many that wait.
    fn check_mode(mode: Mode, rounds: u32, remaining: u64, expect: &str) {
        let verdict = mode
            .policy()
            .verdict(&progress(rounds, remaining), &Limits::default());
        assert_eq!(alloc::format!("{verdict:?}"), expect, "{mode}");
    }

    #[test]
    fn post_copy_and_hybrid_switch_by_themselves() {
        check_mode(Mode::Demand, 0, 5000, "SwitchNow(Mode)");
        check_mode(Mode::PostCopy, 0, 5000, "SwitchNow(Mode)");
        check_mode(Mode::PostCopy, 1, 5000, "SwitchNow(BulkDone)");
        check_mode(Mode::Hybrid, 0, 5000, "AnotherRound");
        check_mode(Mode::Hybrid, 1, 1000, "AnotherRound");
        check_mode(Mode::Hybrid, 1, 1001, "SwitchNow(BulkDone)");
        check_mode(Mode::Hybrid, 2, 1000, "SwitchNow(BulkDone)");
        check_mode(Mode::Hybrid, 1, 3, "PauseAndCopy(WithinBudget)");
    }

    #[test]
    fn auto_is_pre_copy_until_that_does_not_pay() {
        check_mode(Mode::Auto, 0, 5000, "AnotherRound");
        check_mode(Mode::Auto, 1, 1799, "AnotherRound");
        check_mode(Mode::Auto, 1, 1800, "SwitchNow(Predicted)");
        check_mode(Mode::Auto, 5, 3, "PauseAndCopy(WithinBudget)");
        check_mode(Mode::Auto, 30, 1000, "SwitchNow(RoundsMax)");
    }

    #[test]
    fn a_round_that_is_known_not_to_pay_is_left_out() {
        let check = |mode: Mode, next, expect: &str| {
            let progress = Progress {
                next_round: Some(PageCount::new(next)),
                ..progress(1, 1000)
            };
            let verdict = mode.policy().verdict(&progress, &Limits::default());
            assert_eq!(alloc::format!("{verdict:?}"), expect, "{mode} {next}");
        };
        check(Mode::Auto, 749, "AnotherRound");
        check(Mode::Auto, 750, "SwitchNow(Predicted)");
        check(Mode::Hybrid, 500, "AnotherRound");
        check(Mode::Hybrid, 501, "SwitchNow(BulkDone)");
        check(Mode::PreCopy, 1000, "AnotherRound");
    }

    #[test]
    fn auto_slows_the_guest_before_it_switches_by_the_forecast() {
        let check = |mode: Mode, throttle, remaining, expect: &str| {
            let progress = Progress {
                next_round: Some(PageCount::new(remaining)),
                ..progress(1, remaining)
            };
            let limits = Limits {
                throttle,
                ..Limits::default()
            };
            let verdict = mode.policy().verdict(&progress, &limits);
            assert_eq!(
                alloc::format!("{verdict:?}"),
                expect,
                "{mode} {throttle} {remaining}"
            );
        };
        check(Mode::Auto, Throttling::Off, 1000, "SwitchNow(Predicted)");
        check(Mode::Auto, Throttling::Auto, 1000, "AnotherRound");
        // The law was asked about this round and had no answer.
        check(Mode::Auto, Throttling::Auto, 1800, "SwitchNow(Predicted)");
        check(Mode::Hybrid, Throttling::Auto, 1000, "SwitchNow(BulkDone)");
    }

    #[test]
    fn a_guest_that_was_just_slowed_gets_another_round() {
        let slowed = |rounds, remaining| Progress {
            was_slowed: true,
            ..progress(rounds, remaining)
        };
        let check = |mode: Mode, progress, expect: &str| {
            let verdict = mode.policy().verdict(&progress, &Limits::default());
            assert_eq!(alloc::format!("{verdict:?}"), expect, "{mode}");
        };
        check(Mode::Auto, slowed(1, 1800), "AnotherRound");
        check(Mode::Hybrid, slowed(1, 1800), "AnotherRound");
        check(Mode::Hybrid, slowed(2, 1800), "SwitchNow(BulkDone)");
        check(Mode::Auto, slowed(30, 1800), "SwitchNow(RoundsMax)");
    }

    #[test]
    fn pre_copy_does_not_end_at_a_peak() {
        let check = |remaining, least, without_progress, since, expect: &str| {
            let progress = Progress {
                least: Some(PageCount::new(least)),
                rounds_without_progress: without_progress,
                rounds_since_least: since,
                ..progress(9, remaining)
            };
            let verdict = PreCopy.verdict(&progress, &Limits::default());
            let text = alloc::format!("{verdict:?}");
            assert_eq!(
                text, expect,
                "{remaining} {least} {without_progress} {since}"
            );
        };
        check(1000, 1000, 2, 2, "PauseAndCopy(NoProgress)");
        check(1125, 1000, 2, 2, "PauseAndCopy(NoProgress)");
        check(1127, 1000, 2, 2, "AnotherRound");
        check(1127, 1000, 5, 5, "AnotherRound");
        check(1127, 1000, 2, 6, "PauseAndCopy(NoProgress)");
        // What was left went up and comes down again.
        check(1000, 1000, 0, 2, "AnotherRound");
        check(1000, 1000, 0, 3, "PauseAndCopy(LocalMinimum)");
        check(1125, 1000, 1, 4, "PauseAndCopy(LocalMinimum)");
        check(1127, 1000, 0, 9, "AnotherRound");
    }

    #[test]
    fn pre_copy_counts_the_fixed_cost_against_the_budget() {
        // A page takes 1 ms here: 3 pages and 2 ms of fixed cost fill the 5 ms exactly.
        let limits = Limits::default();
        check(
            progress(1, 3),
            limits,
            Verdict::PauseAndCopy(PauseReason::WithinBudget),
        );
        check(progress(1, 4), limits, Verdict::AnotherRound);
        check(progress(0, 3), limits, Verdict::AnotherRound);
    }

    #[test]
    fn rounds_end_where_they_shorten_nothing_worth_it() {
        let check = |mode: Mode, fixed_ms, remaining, expect: &str| {
            let progress = Progress {
                fixed_cost: Duration::from_millis(fixed_ms),
                ..progress(1, remaining)
            };
            let verdict = mode.policy().verdict(&progress, &Limits::default());
            assert_eq!(alloc::format!("{verdict:?}"), expect, "{mode}");
        };
        // A page takes 1 ms here, and 5 ms are allowed.
        check(Mode::PreCopy, 24, 3, "PauseAndCopy(FixedCost)");
        check(Mode::PreCopy, 24, 4, "AnotherRound");
        check(Mode::PreCopy, 80, 5, "PauseAndCopy(FixedCost)");
        check(Mode::PreCopy, 80, 6, "AnotherRound");
        check(Mode::PreCopy, 5, 1, "AnotherRound");
        check(Mode::Auto, 80, 5, "PauseAndCopy(FixedCost)");
        check(Mode::Hybrid, 80, 5, "PauseAndCopy(FixedCost)");
        check(Mode::PostCopy, 80, 5, "SwitchNow(BulkDone)");
    }

    #[test]
    fn pre_copy_gives_up_by_rounds_progress_and_deadline() {
        let limits = Limits {
            rounds_max: 7,
            ..Limits::default()
        };
        check(
            progress(7, 1000),
            limits,
            Verdict::PauseAndCopy(PauseReason::RoundsMax),
        );
        let stuck = Progress {
            rounds_without_progress: 2,
            ..progress(3, 1000)
        };
        check(
            stuck,
            limits,
            Verdict::PauseAndCopy(PauseReason::NoProgress),
        );
        let limits = Limits {
            deadline: Some(Duration::from_millis(3001)),
            ..limits
        };
        check(
            progress(3, 1000),
            limits,
            Verdict::PauseAndCopy(PauseReason::Deadline),
        );
        check(progress(3, 999), limits, Verdict::AnotherRound);
    }

    proptest! {
        #[test]
        fn every_policy_ends(rest in 0..u64::MAX / 8192, last in 0..u64::MAX / 8192, max in 0..100u32, stuck in 0..9u32,
                                rate in prop::option::of(0..u64::MAX), elapsed in 0..u64::MAX / 4,
                                next in prop::option::of(0..u64::MAX)) {
            let limits = Limits { rounds_max: max, ..Limits::default() };
            let progress = Progress {
                rounds: max.max(1),
                remaining: PageCount::new(rest),
                deferred: PageCount::new(rest / 3 * u64::from(stuck % 3)),
                was_released: stuck % 4 == 0,
                last_round: PageCount::new(last),
                rounds_without_progress: stuck,
                least: next.map(|next| PageCount::new(next / 2)),
                rounds_since_least: stuck / 2 * 3,
                next_round: next.map(PageCount::new),
                was_slowed: stuck % 2 == 0,
                bandwidth: rate.map(BytesPerSecond::new),
                fixed_cost: Duration::from_nanos(elapsed),
                elapsed: Duration::from_nanos(elapsed),
            };
            for mode in Mode::ALL {
                let verdict = mode.policy().verdict(&progress, &limits);
                prop_assert_ne!(verdict, Verdict::AnotherRound, "{}", mode);
                let switches = matches!(verdict, Verdict::SwitchNow(_));
                prop_assert!(!switches || mode.needs_faults() || mode == Mode::Auto);
            }
        }
    }
}
