//! Which pages a live round leaves out: those that were dirty in one harvest after the other.
//!
//! How many may be left out is the engine's to say. First come those that were left out before: they
//! were not tracked anew, so nothing is known against them, and a page that is sent after all was left out
//! in vain. Then those that were dirty in more harvests in a row.
//!
//! Invariant: what is left out is not cleared, so each tracker tells it again in every later harvest, the
//! last one included. Nobody has to unite a set with it, and none can be lost with a daemon.
//!
//! * bitmap: KVM is told to clear the other pages only. The bit stays set and the page writable: the
//!   guest pays no further fault for it.
//! * rings, write protection: they protect pages anew with the harvest that tells them, so the guest pays
//!   one fault for each harvest, as for a page that is sent. Only the page stays in what was seen.

use crate::push_order::first_of;
use limosa_pages::{PageCount, PageRange, PageSet};

/// Harvests in a row after which a page is hot: one says that it was written since the bulk round began,
/// two that it was written again after it had been sent.
const HOT_AFTER: usize = 2;
/// Harvests in a row that are told apart.
const LEVELS: usize = 4;

/// What was dirty again and again, and what of it is left out.
#[derive(Debug)]
pub(crate) struct Deferral {
    /// Pages that were dirty in the last harvest, in the last two, and so on.
    in_a_row: [PageSet; LEVELS],
    left_out: PageSet,
}

impl Deferral {
    pub(crate) fn none(memory: PageCount) -> Self {
        Self {
            in_a_row: std::array::from_fn(|_| PageSet::empty(memory)),
            left_out: PageSet::empty(memory),
        }
    }

    /// Takes out of the pages that a harvest found those that the round leaves out, `max` at most; how
    /// many these are.
    pub(crate) fn take_out(&mut self, dirty: &mut PageSet, max: PageCount) -> PageCount {
        for level in (0..LEVELS).rev() {
            let mut reached = dirty.clone();
            if level > 0 {
                reached.intersect_with(&self.in_a_row[level - 1]);
            }
            self.in_a_row[level] = reached;
        }
        let before = std::mem::replace(&mut self.left_out, PageSet::empty(dirty.capacity()));
        let hot = self.in_a_row[HOT_AFTER - 1..].iter().rev();
        let mut left = max;
        for candidates in std::iter::once(&before).chain(hot) {
            if left == PageCount::ZERO {
                break;
            }
            let mut candidates = candidates.clone();
            candidates.intersect_with(dirty);
            for run in first_of(candidates.runs(), left) {
                self.left_out.insert_range(run);
                dirty.remove_range(run);
                left = left.saturating_sub(run.count);
            }
        }
        max.saturating_sub(left)
    }

    /// The pages within `range` that are left out.
    pub(crate) fn left_out_in(&self, range: PageRange) -> Vec<PageRange> {
        self.left_out.runs_in(range).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::Pfn;

    const MEMORY: PageCount = PageCount::new(640);

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::empty(MEMORY);
        for &(first, count) in runs {
            set.insert_range(PageRange::new(Pfn::new(first), PageCount::new(count)));
        }
        set
    }

    /// Harvests one after the other, each with the most that may be left out: what is, and what goes.
    fn check(harvests: &[(&[(u64, u64)], u64)], expect: &[&str]) {
        let mut deferral = Deferral::none(MEMORY);
        let everything = PageRange::new(Pfn::new(0), MEMORY);
        let text = |runs: Vec<PageRange>| {
            let runs = runs
                .iter()
                .map(|run| format!("{}+{}", run.first.get(), run.count.get()));
            runs.collect::<Vec<_>>().join(" ")
        };
        let told = harvests.iter().map(|&(dirty, max)| {
            let mut dirty = set(dirty);
            let all = dirty.count();
            let count = deferral.take_out(&mut dirty, PageCount::new(max));
            let out = deferral.left_out_in(everything);
            assert_eq!(deferral.left_out.count(), count);
            assert_eq!(dirty.count().saturating_add(count), all, "none is lost");
            format!("{} | {}", text(out), text(dirty.runs().collect()))
        });
        assert_eq!(told.collect::<Vec<_>>(), expect);
    }

    #[test]
    fn what_is_dirty_twice_in_a_row_is_left_out() {
        check(
            &[
                (&[(0, 10), (100, 10)], 99),
                (&[(5, 10), (200, 1)], 99),
                (&[(0, 10), (200, 1)], 99),
                (&[(100, 10)], 99),
            ],
            &[
                " | 0+10 100+10",
                "5+5 | 10+5 200+1",
                "5+5 200+1 | 0+5",
                " | 100+10",
            ],
        );
    }

    #[test]
    fn what_was_left_out_stays_out_then_what_was_dirty_most_often() {
        check(
            &[
                (&[(0, 9), (500, 9)], 0),
                (&[(0, 9), (500, 9)], 2),
                (&[(0, 9), (300, 9), (500, 9)], 2),
                (&[(0, 9), (300, 9), (500, 9)], 20),
                (&[(0, 9), (300, 9), (500, 9)], 1),
                (&[(0, 9), (300, 9), (500, 9)], 0),
            ],
            &[
                " | 0+9 500+9",
                "0+2 | 2+7 500+9",
                "0+2 | 2+7 300+9 500+9",
                "0+9 300+2 500+9 | 302+7",
                "0+1 | 1+8 300+9 500+9",
                " | 0+9 300+9 500+9",
            ],
        );
    }
}
