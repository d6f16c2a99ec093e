//! Hot pages are left out of rounds that go out while the guest runs: what is dirty in one harvest after
//! the other would be sent in vain in each of these rounds, and once more in the pause. `[Clark05 §5.4]`
//! peeks at the log in a round and skips what is dirty again when its turn comes. Differs: what was dirty
//! in harvest after harvest is left out for good, so that it need not be tracked anew either.
//!
//! Here is how many pages may be left out; which ones is decided where pages are known. Such a page stays
//! in the dirty log, so that no harvest forgets it and the guest may write it without being stopped,
//! and goes out with the pause, or behind a switch. It counts as remaining all the time.
//!
//! That must not make the pause longer than the budget. So only [`SHARE`] of what the budget can carry may
//! wait for the pause by design; the rest of it is for what the guest dirties besides. And should the
//! pages that were left out be all that is in the way of a pause within the budget, while rounds shrink
//! no more, they are released for good: perhaps they are not hot any more, which nobody can see as
//! long as they are not tracked anew. Then all is as it had been without deferral.

use crate::policy::{Limits, Progress};
use core::fmt;
use core::str::FromStr;
use limosa_pages::PageCount;
use serde::{Deserialize, Serialize};

/// The budget over what may be left out: half of it is for pages that are left out.
const SHARE: u128 = 2;

/// Whether hot pages may be left out of live rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deferral {
    /// As many as leave the pause within its budget.
    #[default]
    Auto,
    /// None: every page that is found dirty is sent.
    Off,
}

impl Deferral {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Auto, Self::Off];

    /// Its name on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for Deferral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Deferral {
    type Err = alloc::string::String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|one| one.name() == text);
        found.ok_or_else(|| alloc::format!("'{text}' is none of auto, off"))
    }
}

/// How many pages the next round may leave out: those that the link carries in half of what the fixed cost
/// leaves of the budget. None while the bandwidth is unknown.
pub(crate) fn pages_max(progress: &Progress, limits: &Limits) -> PageCount {
    let Some(bandwidth) = progress.bandwidth else {
        return PageCount::ZERO;
    };
    if limits.defer == Deferral::Off {
        return PageCount::ZERO;
    }
    let time = limits.downtime_max.saturating_sub(progress.fixed_cost);
    let page = u128::from(PageCount::new(1).bytes().get());
    let bytes = u128::from(bandwidth.get()).saturating_mul(time.as_nanos()) / 1_000_000_000;
    let pages = bytes / page / SHARE;
    PageCount::new(u64::try_from(pages).unwrap_or(u64::MAX))
}

/// True if the pages that are left out are what keeps the guest from a pause within the budget, and rounds
/// of the others have ceased to shrink: what waits without them would fit.
pub(crate) fn is_in_the_way(progress: &Progress, limits: &Limits, shrank: bool) -> bool {
    let fits = |remaining| {
        let others = Progress {
            remaining,
            ..*progress
        };
        let predicted = others.predicted_downtime();
        predicted.is_some_and(|downtime| downtime <= limits.downtime_max)
    };
    !shrank
        && progress.deferred > PageCount::ZERO
        && fits(progress.to_send())
        && !fits(progress.remaining)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::progress;
    use core::time::Duration;

    /// A page takes 1 ms, the fixed cost 2 ms.
    fn limits(downtime_max_ms: u64) -> Limits {
        Limits {
            downtime_max: Duration::from_millis(downtime_max_ms),
            ..Limits::default()
        }
    }

    #[test]
    fn half_of_what_the_budget_carries_may_be_left_out() {
        let check = |limits: Limits, expect| {
            let pages = pages_max(&progress(2, 1000), &limits);
            assert_eq!(pages, PageCount::new(expect), "{limits:?}");
        };
        check(limits(22), 10);
        check(limits(23), 10);
        check(limits(24), 11);
        check(limits(2), 0);
        check(limits(1), 0);
        let defer = Deferral::Off;
        check(
            Limits {
                defer,
                ..limits(22)
            },
            0,
        );
        let unknown = Progress {
            bandwidth: None,
            ..progress(2, 1000)
        };
        assert_eq!(pages_max(&unknown, &limits(22)), PageCount::ZERO);
    }

    #[test]
    fn what_is_left_out_is_released_if_nothing_else_is_in_the_way() {
        let check = |remaining, deferred, shrank, expect| {
            let progress = Progress {
                deferred: PageCount::new(deferred),
                ..progress(3, remaining)
            };
            assert_eq!(
                is_in_the_way(&progress, &limits(22), shrank),
                expect,
                "{remaining} {deferred} {shrank}"
            );
        };
        // The budget is 20 pages.
        check(21, 10, false, true);
        check(30, 10, false, true);
        check(31, 10, false, false);
        check(30, 10, true, false);
        check(20, 10, false, false);
        check(30, 0, false, false);
    }
}
