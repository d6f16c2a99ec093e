//! In which order missing pages are pushed: what a guest will touch next should be there before.
//!
//! A part that can be swapped: it is asked for the next batch out of the set of pages that are not
//! sent yet, and told which pages were asked for. All streams of a migration share one.
//!
//! * *address*: each stream its part of the memory, ascending.
//! * *bubbling*: outwards on both sides from the pages that were asked for last, the newest first
//!   (dual multi-pivot bubbling: Hines, Deshpande, Gopalan, *Post-copy live migration of virtual
//!   machines*, OSR 2009, section 3.2). A guest that walks finds the rest of its way there.
//! * *hottest*: first what the guest was seen to write again and again in the rounds before, so it needs
//!   rounds before: after none it is the same as by address.
//! * *recorded*: first what the guest had to ask for in earlier moves, in that order, then outwards as
//!   above; the same as bubbling where nothing was recorded ([`crate::demanded`]).

use crate::demanded::Demanded;
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;

/// Pivots that are remembered: the paper found no gain beyond seven.
const PIVOTS_MAX: usize = 7;
/// Harvests in which a page can have been found dirty, as far as it is counted.
const HEAT_LEVELS: usize = 3;

/// The order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PushOrder {
    /// Ascending.
    Address,
    /// Outwards from what was asked for last.
    #[default]
    Bubbling,
    /// What was written most often first.
    Hottest,
    /// What was asked for in earlier moves first.
    Recorded,
}

impl PushOrder {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Address, Self::Bubbling, Self::Hottest, Self::Recorded];

    /// Its name on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Bubbling => "bubbling",
            Self::Hottest => "hottest",
            Self::Recorded => "recorded",
        }
    }
}

impl std::str::FromStr for PushOrder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|order| order.name() == text);
        found.ok_or_else(|| format!("'{text}' is none of address, bubbling, hottest, recorded"))
    }
}

/// In how many harvests each page was found dirty.
#[derive(Clone, Debug)]
pub(crate) struct Heat {
    /// The pages that were found so many times and one, or more often.
    at_least: [PageSet; HEAT_LEVELS],
}

impl Heat {
    pub(crate) fn none(memory: PageCount) -> Self {
        Self {
            at_least: std::array::from_fn(|_| PageSet::empty(memory)),
        }
    }

    /// A harvest has found these.
    pub(crate) fn add(&mut self, dirty: &PageSet) {
        for level in (0..HEAT_LEVELS).rev() {
            let mut reached = dirty.clone();
            if level > 0 {
                reached.intersect_with(&self.at_least[level - 1]);
            }
            self.at_least[level].union_with(&reached);
        }
    }
}

/// Chooses what is pushed next.
#[derive(Debug)]
pub(crate) struct Chooser {
    order: PushOrder,
    /// The newest first.
    pivots: VecDeque<Pivot>,
    /// Whose turn it is.
    turn: usize,
    /// The hottest last, without those in which nothing is left.
    levels: Vec<PageSet>,
    /// What earlier moves have recorded.
    demanded: Arc<Demanded>,
    /// How many runs of it are over.
    over: usize,
}

/// A page that was asked for, and how far around it all was taken.
#[derive(Debug)]
struct Pivot {
    /// First page that was not looked at above it.
    above: u64,
    /// First page that was looked at below it.
    below: u64,
}

impl Chooser {
    pub(crate) fn new(order: PushOrder, demanded: Arc<Demanded>) -> Self {
        Self {
            order,
            pivots: VecDeque::new(),
            turn: 0,
            levels: Vec::new(),
            demanded,
            over: 0,
        }
    }

    /// One for the same guest on fresh connections, to which all that is missing is unsent.
    pub(crate) fn renewed(&self) -> Self {
        Self::new(self.order, Arc::clone(&self.demanded))
    }

    /// How many of these pages go in the recorded order.
    pub(crate) fn recorded_in(&self, missing: &PageSet) -> PageCount {
        if self.order != PushOrder::Recorded {
            return PageCount::ZERO;
        }
        let runs = self.demanded.runs().iter();
        runs.fold(PageCount::ZERO, |sum, &run| {
            sum.saturating_add(missing.count_range(run))
        })
    }

    /// What is known when the guest is paused; only the order by heat looks at it.
    pub(crate) fn set_heat(&mut self, heat: Heat) {
        self.levels = heat.at_least.into();
    }

    /// These pages were asked for.
    pub(crate) fn asked_for(&mut self, range: PageRange) {
        if !matches!(self.order, PushOrder::Bubbling | PushOrder::Recorded) {
            return;
        }
        self.pivots.push_front(Pivot {
            above: range.end().get(),
            below: range.first.get(),
        });
        self.pivots.truncate(PIVOTS_MAX);
        self.turn = 0;
    }

    /// Takes the next pages, at most `max`, out of `unsent`: by this order while something of
    /// `part` is left, whose turn it is by address. `None` if nothing of it is.
    pub(crate) fn take(
        &mut self,
        unsent: &mut PageSet,
        part: PageRange,
        max: PageCount,
    ) -> Option<Vec<PageRange>> {
        unsent.runs_in(part).next()?;
        let runs = match self.order {
            PushOrder::Address => Vec::new(),
            PushOrder::Bubbling => self.around_a_pivot(unsent, max),
            PushOrder::Hottest => self.hottest(unsent, max),
            PushOrder::Recorded => {
                let runs = self.recorded(unsent, max);
                if runs.is_empty() {
                    self.around_a_pivot(unsent, max)
                } else {
                    runs
                }
            }
        };
        let runs = if runs.is_empty() {
            first_of(unsent.runs_in(part), max)
        } else {
            runs
        };
        runs.iter().for_each(|&run| unsent.remove_range(run));
        Some(runs)
    }

    /// The next pages on both sides of the pivot whose turn it is; one with nothing left is dropped.
    fn around_a_pivot(&mut self, unsent: &PageSet, max: PageCount) -> Vec<PageRange> {
        while !self.pivots.is_empty() {
            let index = self.turn % self.pivots.len();
            let runs = self.pivots[index].widen(unsent, max);
            if !runs.is_empty() {
                self.turn = index + 1;
                return runs;
            }
            self.pivots.remove(index);
        }
        Vec::new()
    }

    /// The next pages of the record. A run of which some are left is not over.
    fn recorded(&mut self, unsent: &PageSet, max: PageCount) -> Vec<PageRange> {
        let mut runs = Vec::new();
        let mut left = max;
        while let Some(&run) = self.demanded.runs().get(self.over) {
            let unsent_here = unsent.count_range(run);
            if unsent_here > PageCount::ZERO {
                runs.extend(first_of(unsent.runs_in(run), left));
            }
            if unsent_here > left {
                break;
            }
            self.over += 1;
            left = left.saturating_sub(unsent_here);
            if left == PageCount::ZERO {
                break;
            }
        }
        runs
    }

    fn hottest(&mut self, unsent: &PageSet, max: PageCount) -> Vec<PageRange> {
        while let Some(level) = self.levels.last_mut() {
            level.intersect_with(unsent);
            let runs = first_of(level.runs(), max);
            if !runs.is_empty() {
                return runs;
            }
            self.levels.pop();
        }
        Vec::new()
    }
}

impl Pivot {
    /// Half of the pages above, half below; all on one side where the other has ended.
    fn widen(&mut self, unsent: &PageSet, max: PageCount) -> Vec<PageRange> {
        let half = PageCount::new(max.get().div_ceil(2));
        let end = unsent.capacity().get();
        let upper = PageRange::new(Pfn::new(self.above), PageCount::new(end - self.above));
        let mut runs = first_of(unsent.runs_in(upper), half);
        self.above = runs.last().map_or(end, |run| run.end().get());
        let taken = runs.iter().fold(0, |sum, run| sum + run.count.get());
        let below = last_of(unsent, self.below, max.get() - taken);
        self.below = below.last().map_or(0, |run| run.first.get());
        runs.extend(below);
        runs
    }
}

/// The first runs, cut to at most `max` pages.
pub(crate) fn first_of(runs: impl Iterator<Item = PageRange>, max: PageCount) -> Vec<PageRange> {
    let mut left = max.get();
    let mut taken = Vec::new();
    for run in runs {
        let count = run.count.get().min(left);
        taken.push(PageRange::new(run.first, PageCount::new(count)));
        left -= count;
        if left == 0 {
            break;
        }
    }
    taken
}

/// The last runs before page `end`, descending, cut to at most `max` pages.
fn last_of(unsent: &PageSet, end: u64, max: u64) -> Vec<PageRange> {
    const WINDOW: u64 = 512;
    let (mut end, mut left) = (end, max);
    let mut taken = Vec::new();
    while end > 0 && left > 0 {
        let first = end.saturating_sub(WINDOW);
        let window = PageRange::new(Pfn::new(first), PageCount::new(end - first));
        let inside: Vec<PageRange> = unsent.runs_in(window).collect();
        for run in inside.into_iter().rev() {
            let count = run.count.get().min(left);
            let start = run.end().get() - count;
            taken.push(PageRange::new(Pfn::new(start), PageCount::new(count)));
            left -= count;
            if left == 0 {
                break;
            }
        }
        end = first;
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: PageCount = PageCount::new(2048);

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(Pfn::new(first), PageCount::new(count))
    }

    fn chooser(order: PushOrder) -> Chooser {
        Chooser::new(order, Arc::default())
    }

    /// What a guest has asked for, as it is kept.
    fn recorded(runs: &[(u32, u32)]) -> Arc<Demanded> {
        let numbers = runs.iter().flat_map(|&(first, count)| [first, count]);
        let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
        Arc::new(Demanded::decode(&bytes, MEMORY).unwrap())
    }

    fn text(runs: Option<Vec<PageRange>>) -> String {
        let runs = runs.unwrap_or_default();
        let runs = runs
            .iter()
            .map(|run| format!("{}+{}", run.first.get(), run.count.get()));
        runs.collect::<Vec<_>>().join(" ")
    }

    /// All that a chooser gives for one part.
    fn all(chooser: &mut Chooser, unsent: &mut PageSet, part: PageRange, max: u64) -> Vec<String> {
        let mut batches = Vec::new();
        while let Some(runs) = chooser.take(unsent, part, PageCount::new(max)) {
            batches.push(text(Some(runs)));
        }
        batches
    }

    #[test]
    fn by_address_only_the_part_is_taken() {
        let mut unsent = PageSet::full(MEMORY);
        let mut chooser = chooser(PushOrder::Address);
        assert_eq!(
            all(&mut chooser, &mut unsent, range(10, 9), 4),
            ["10+4", "14+4", "18+1"]
        );
        assert_eq!(unsent.count().get(), 2048 - 9);
    }

    #[test]
    fn bubbles_grow_from_the_newest_pivots_and_never_leave_anything() {
        let mut unsent = PageSet::full(MEMORY);
        let mut chooser = chooser(PushOrder::Bubbling);
        let part = range(0, 2048);
        let take = |chooser: &mut Chooser, unsent: &mut PageSet| {
            text(chooser.take(unsent, part, PageCount::new(8)))
        };
        assert_eq!(
            take(&mut chooser, &mut unsent),
            "0+8",
            "nothing was asked for"
        );
        for page in [1000, 500] {
            unsent.remove_range(range(page, 1));
            chooser.asked_for(range(page, 1));
        }
        assert_eq!(take(&mut chooser, &mut unsent), "501+4 496+4");
        assert_eq!(take(&mut chooser, &mut unsent), "1001+4 996+4");
        assert_eq!(take(&mut chooser, &mut unsent), "505+4 492+4");
        // The newest has the next turn.
        unsent.remove_range(range(2047, 1));
        chooser.asked_for(range(2047, 1));
        assert_eq!(
            take(&mut chooser, &mut unsent),
            "2039+8",
            "nothing is above"
        );
        let left = unsent.count().get();
        let batches = all(&mut chooser, &mut unsent, part, 32);
        assert!(unsent.is_empty());
        assert!(batches.len() as u64 >= left / 32);
    }

    #[test]
    fn what_was_written_most_often_goes_first() {
        let mut heat = Heat::none(MEMORY);
        let set = |runs: &[PageRange]| {
            let mut set = PageSet::empty(MEMORY);
            runs.iter().for_each(|&run| set.insert_range(run));
            set
        };
        heat.add(&set(&[range(100, 20)]));
        heat.add(&set(&[range(110, 5), range(900, 2)]));
        heat.add(&set(&[range(112, 1), range(900, 2)]));
        heat.add(&set(&[range(112, 1)]));
        let mut chooser = chooser(PushOrder::Hottest);
        chooser.set_heat(heat);
        let mut unsent = set(&[range(0, 4), range(105, 10), range(900, 2)]);
        assert_eq!(
            all(&mut chooser, &mut unsent, range(0, 2048), 4),
            ["112+1", "110+2 113+2", "900+2", "105+4", "109+1", "0+4"]
        );
    }

    #[test]
    fn what_was_asked_for_before_goes_first_and_in_that_order() {
        let record = recorded(&[(1500, 10), (3, 1), (40, 4), (700, 2), (41 + 8, 1)]);
        let mut unsent = PageSet::empty(MEMORY);
        for run in [range(0, 64), range(700, 1), range(1500, 10)] {
            unsent.insert_range(run);
        }
        // One that came by a round.
        unsent.remove_range(range(41, 1));
        let mut chooser = Chooser::new(PushOrder::Recorded, record);
        assert_eq!(chooser.recorded_in(&unsent).get(), 10 + 1 + 3 + 1 + 1);
        let mut take = |part: PageRange| {
            let runs = chooser.take(&mut unsent, part, PageCount::new(8));
            chooser.asked_for(range(20, 1));
            text(runs)
        };
        let part = range(0, 64);
        assert_eq!(take(part), "1500+8");
        assert_eq!(take(part), "1508+2 3+1 40+1 42+2 700+1 49+1");
        // Then around what is asked for now.
        assert_eq!(take(part), "21+4 16+4");
        assert_eq!(take(range(700, 8)), "", "nothing of this part is left");
        // On fresh connections from the front, where something is missing again.
        let mut fresh = chooser.renewed();
        unsent.insert_range(range(1505, 1));
        let runs = fresh.take(&mut unsent, range(0, 2048), PageCount::new(8));
        assert_eq!(text(runs), "1505+1");
    }

    #[test]
    fn without_a_record_it_is_bubbling() {
        for order in [PushOrder::Bubbling, PushOrder::Recorded] {
            let mut chooser = chooser(order);
            let mut unsent = PageSet::full(MEMORY);
            assert_eq!(chooser.recorded_in(&unsent), PageCount::ZERO);
            chooser.asked_for(range(1000, 1));
            let runs = chooser.take(&mut unsent, range(0, 2048), PageCount::new(8));
            assert_eq!(text(runs), "1001+4 996+4", "{order:?}");
        }
    }

    /// Whatever the order, each page goes once, and none stays.
    #[test]
    fn every_page_goes_once() {
        for order in PushOrder::ALL {
            let record = recorded(&[(2000, 48), (64, 8), (1023, 1), (512, 300)]);
            let mut chooser = Chooser::new(order, record);
            let mut unsent = PageSet::empty(MEMORY);
            let mut seed = 7u64;
            let mut draw = |max: u64| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) % max
            };
            for _ in 0..300 {
                unsent.insert(Pfn::new(draw(2048)));
            }
            let mut heat = Heat::none(MEMORY);
            heat.add(&unsent.clone());
            chooser.set_heat(heat);
            let mut expect = unsent.clone();
            for part in (0..4).map(|part| range(part * 512, 512)) {
                while let Some(runs) = chooser.take(&mut unsent, part, PageCount::new(7)) {
                    assert!(!runs.is_empty());
                    for page in runs.into_iter().flat_map(PageRange::iter) {
                        assert!(expect.remove(page), "{order:?}: {page}");
                    }
                    let asked = Pfn::new(draw(2048));
                    if unsent.remove(asked) {
                        assert!(expect.remove(asked));
                        chooser.asked_for(PageRange::new(asked, PageCount::new(1)));
                    }
                }
            }
            assert!(expect.is_empty() && unsent.is_empty(), "{order:?}");
        }
    }
}
