//! How a vCPU is held back: an account of each, and what it owes.
//!
//! A vCPU that has written or run more than it may owes time, and pays in sleeps of a millisecond at
//! most, with [`RUN_MIN`] in the guest between two of them. So no stall is long, and no vCPU gets less
//! than a twentieth of the time, however much it owes.
//!
//! A kernel that is interrupted in the middle of a page fault begins it anew at the next entry. Runs
//! that are shorter than a fault takes would follow each other for ever, and the guest stand. So after
//! a run that has left the vCPU where it was, the next one is twice as long.
//!
//! ```text
//!  guest ████░░░░░░░░░░░░██░░░░░░░░░░░░██░░░░░░░████████████  owes nothing: looked at now and then
//!        run    sleep    run   sleep   …  paid
//! ```
//!
//! `[QEMU]` auto-converge sleeps as long as it takes after each 10 ms of running, up to a second. Differs:
//! many short sleeps instead of one long one, since what the guest's clients notice is the longest.
//!
//! Deliberately absent: how much a guest may write. That is the engine's law
//! ([`limosa_engine::throttle`]).

use limosa_engine::throttle::{Share, Throttle};
use limosa_pages::PagesPerSecond;
use std::time::Duration;

/// Longest sleep at once.
pub const SLEEP_MAX: Duration = Duration::from_millis(1);
/// Between two sleeps a vCPU is in the guest for as long as this: some times as long as it takes to
/// enter and leave, or it would never get on.
pub const RUN_MIN: Duration = Duration::from_micros(50);
/// A vCPU that owes nothing is looked at after this time; each look takes it out of the guest.
const LOOK_MIN: Duration = Duration::from_millis(1);
/// One that does not write at all, less and less often, down to this.
const LOOK_MAX: Duration = Duration::from_millis(8);
/// Not worth a sleep.
const SLEEP_MIN: Duration = Duration::from_micros(50);
/// So often a run is doubled at most: 50 µs become more than [`LOOK_MAX`].
const DOUBLINGS_MAX: u32 = 8;
/// Nobody owes more: a burst that is longer ago is forgiven.
const OWED_MAX: Duration = Duration::from_secs(1);
/// What was not used before may be used up later, as far as this.
const SAVED_MAX: Duration = Duration::from_millis(10);
/// The whole, for shares.
const THOUSANDTHS: u16 = Share::WHOLE.thousandths();

/// Whether it is a throttle that can be carried out. One that came over a socket may be any.
pub(crate) const fn is_sound(throttle: Throttle) -> bool {
    match throttle {
        Throttle::PerVcpu { quota } => quota.get() > 0,
        Throttle::Equal { share } => share.thousandths() >= 1 && share.thousandths() <= THOUSANDTHS,
    }
}

/// What a vCPU did since it was last looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// Time that passed.
    pub(crate) passed: Duration,
    /// Time in the guest.
    pub(crate) ran: Duration,
    /// Time that it was held back.
    pub(crate) held: Duration,
    /// Pages that it has dirtied since tracking began; `None` if it is not known now.
    pub(crate) dirtied: Option<u64>,
    /// Its registers are what they were.
    pub(crate) is_stuck: bool,
}

/// The account of one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    throttle: Throttle,
    /// Nanoseconds; below zero what was saved.
    owed: i64,
    /// As it was at the last look that knew it.
    dirtied: u64,
    /// Until the next look at a vCPU that owes nothing.
    look_after: Duration,
    /// How often its runs are doubled.
    doublings: u32,
}

/// What follows from a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sentence {
    /// Hold it back for so long; may be zero.
    pub(crate) sleep: Duration,
    /// Then let it run for so long until the next look.
    pub(crate) run: Duration,
}

impl Account {
    /// A fresh one, of a vCPU that has dirtied so many pages since tracking began.
    pub(crate) fn new(throttle: Throttle, dirtied: u64) -> Self {
        Self {
            throttle,
            owed: 0,
            dirtied,
            doublings: 0,
            look_after: match throttle {
                Throttle::PerVcpu { .. } => LOOK_MIN,
                Throttle::Equal { share } => run_for_a_sleep(share),
            },
        }
    }

    /// Until the first look.
    pub(crate) const fn look_after(&self) -> Duration {
        self.look_after
    }

    /// Settles the account.
    pub(crate) fn look(&mut self, seen: Seen) -> Sentence {
        let added = match self.throttle {
            Throttle::PerVcpu { quota } => self.written(seen, quota) - nanos(seen.passed),
            Throttle::Equal { share } => {
                let share = share.thousandths();
                let rest = i64::from(THOUSANDTHS - share);
                let owed = nanos(seen.ran).saturating_mul(rest) / i64::from(share);
                owed.saturating_sub(nanos(seen.held))
            }
        };
        self.doublings = if seen.is_stuck {
            (self.doublings + 1).min(DOUBLINGS_MAX)
        } else {
            self.doublings.saturating_sub(1)
        };
        let owed = self.owed.saturating_add(added);
        self.owed = owed.clamp(-nanos(SAVED_MAX), nanos(OWED_MAX));
        if self.owed < nanos(SLEEP_MIN) {
            return Sentence {
                sleep: Duration::ZERO,
                run: self.look_after,
            };
        }
        let sleep = SLEEP_MAX.min(Duration::from_nanos(self.owed.unsigned_abs()));
        let is_paid = self.owed - nanos(sleep) < nanos(SLEEP_MIN);
        let run = if is_paid { self.look_after } else { RUN_MIN };
        Sentence {
            sleep,
            run: (run * (1 << self.doublings)).min(LOOK_MAX),
        }
    }

    /// The time in which the quota allows the pages that it has dirtied, in nanoseconds.
    fn written(&mut self, seen: Seen, quota: PagesPerSecond) -> i64 {
        let Some(dirtied) = seen.dirtied else {
            return 0;
        };
        let pages = dirtied.saturating_sub(self.dirtied);
        self.dirtied = dirtied;
        self.look_after = if pages == 0 {
            (self.look_after * 2).min(LOOK_MAX)
        } else {
            LOOK_MIN
        };
        let time = u128::from(pages) * 1_000_000_000 / u128::from(quota.get());
        i64::try_from(time).unwrap_or(i64::MAX / 2)
    }
}

/// The run for which a vCPU with that share owes one sleep.
fn run_for_a_sleep(share: Share) -> Duration {
    let rest = THOUSANDTHS - share.thousandths();
    let run = (SLEEP_MAX * u32::from(share.thousandths())).checked_div(u32::from(rest));
    run.unwrap_or(LOOK_MAX).clamp(RUN_MIN, LOOK_MAX)
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages that a vCPU dirties in two seconds if it dirties `most` a second while it runs, its share
    /// of the time, and its longest sleep. Each look is `late`.
    fn live(throttle: Throttle, most: u64, late: Duration) -> (u64, f64, Duration) {
        let end = Duration::from_secs(2);
        let mut account = Account::new(throttle, 0);
        let (mut now, mut ran, mut pages, mut longest) =
            (Duration::ZERO, Duration::ZERO, 0.0, Duration::ZERO);
        let mut sentence = Sentence {
            sleep: Duration::ZERO,
            run: account.look_after(),
        };
        while now < end {
            let run = sentence.run + late;
            now += sentence.sleep + run;
            ran += run;
            longest = longest.max(sentence.sleep);
            pages += run.as_secs_f64() * most as f64;
            sentence = account.look(Seen {
                passed: sentence.sleep + run,
                ran: run,
                held: sentence.sleep,
                dirtied: Some(pages as u64),
                is_stuck: false,
            });
        }
        (pages as u64, ran.as_secs_f64() / now.as_secs_f64(), longest)
    }

    #[track_caller]
    fn check_quota(quota: u64, most: u64, expect: std::ops::RangeInclusive<u64>) {
        let throttle = Throttle::PerVcpu {
            quota: PagesPerSecond::new(quota),
        };
        let (pages, _, longest) = live(throttle, most, Duration::from_micros(5));
        assert!(expect.contains(&(pages / 2)), "{} a second", pages / 2);
        assert!(longest <= SLEEP_MAX);
    }

    #[test]
    fn a_writer_keeps_to_its_quota() {
        check_quota(50_000, 400_000, 48_000..=52_000);
        check_quota(30_000, 400_000, 28_000..=31_500);
        // Below it nobody is held back.
        check_quota(50_000, 40_000, 39_900..=40_100);
        // The floor: 55 µs of 1055 are a nineteenth.
        check_quota(256, 400_000, 20_000..=22_000);
    }

    #[test]
    fn who_only_reads_runs_all_the_time() {
        let quota = PagesPerSecond::new(256);
        let (_, share, longest) = live(Throttle::PerVcpu { quota }, 0, Duration::ZERO);
        assert_eq!((share, longest), (1.0, Duration::ZERO));
    }

    #[test]
    fn everybody_runs_for_an_equal_share() {
        for (thousandths, late, expect) in [
            (1000, 0, 1.0),
            (900, 5, 0.9),
            (500, 5, 0.5),
            (250, 5, 0.25),
            (250, 100, 0.25),
            (50, 5, 0.05),
        ] {
            let share = Share::clamped(thousandths);
            let throttle = Throttle::Equal { share };
            assert!(is_sound(throttle));
            let (_, share, longest) = live(throttle, 0, Duration::from_micros(late));
            let error = (share - expect).abs() / expect;
            assert!(error < 0.1, "{share} instead of {expect}");
            assert!(longest <= SLEEP_MAX);
        }
    }

    #[test]
    fn a_vcpu_whose_faults_take_longer_than_a_run_gets_on_all_the_same() {
        const FAULT: Duration = Duration::from_micros(700);
        let mut account = Account::new(
            Throttle::Equal {
                share: Share::clamped(50),
            },
            0,
        );
        let (mut run, mut faults) = (account.look_after(), 0);
        for _ in 0..100 {
            faults += run.as_micros() / FAULT.as_micros();
            let seen = Seen {
                ran: run,
                is_stuck: run < FAULT,
                ..Seen::default()
            };
            run = account.look(seen).run;
        }
        assert!(faults >= 30, "{faults}");
    }

    #[test]
    fn what_is_not_known_now_is_known_later() {
        let quota = PagesPerSecond::new(1000);
        let mut account = Account::new(Throttle::PerVcpu { quota }, 7);
        let mut seen = Seen {
            passed: Duration::from_millis(1),
            ..Seen::default()
        };
        assert_eq!(account.look(seen).sleep, Duration::ZERO);
        seen.dirtied = Some(107);
        let sentence = account.look(seen);
        assert_eq!((sentence.sleep, sentence.run), (SLEEP_MAX, RUN_MIN));
        let none = Throttle::PerVcpu {
            quota: PagesPerSecond::new(0),
        };
        assert!(!is_sound(none));
    }
}
