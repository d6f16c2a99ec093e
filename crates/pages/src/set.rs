//! A dense set of pages: one bit for each page of a guest.
//!
//! The bits lie in the same order as KVM's dirty log, so that a harvest is a copy of words. All
//! operations cost at most one step a word; a terabyte of memory is 32 MiB of bits.

use crate::units::{PageCount, PageRange, Pfn};
use alloc::vec;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

const WORD_BITS: u64 = u64::BITS as u64;

/// Which of a guest's pages belong to something: are dirty, are to be sent, were sent.
///
/// Bits beyond [`PageSet::capacity`] are always zero.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageSet {
    words: Vec<u64>,
    capacity: PageCount,
}

impl PageSet {
    /// The empty set over a guest of `capacity` pages.
    pub fn empty(capacity: PageCount) -> Self {
        Self {
            words: vec![0; word_count(capacity)],
            capacity,
        }
    }

    /// The set of all pages of a guest of `capacity` pages.
    pub fn full(capacity: PageCount) -> Self {
        let mut set = Self {
            words: vec![u64::MAX; word_count(capacity)],
            capacity,
        };
        set.trim();
        set
    }

    /// The same pages in a set over more.
    ///
    /// # Panics
    /// If it is over fewer.
    pub fn widened(&self, capacity: PageCount) -> Self {
        assert!(capacity >= self.capacity, "a set over more pages");
        let mut set = Self::empty(capacity);
        set.words[..self.words.len()].copy_from_slice(&self.words);
        set
    }

    /// How many pages the guest has.
    pub fn capacity(&self) -> PageCount {
        self.capacity
    }

    /// How many pages are in the set.
    pub fn count(&self) -> PageCount {
        PageCount::new(
            self.words
                .iter()
                .map(|word| u64::from(word.count_ones()))
                .sum(),
        )
    }

    /// True if no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// True if `page` is in the set; a page beyond the capacity never is.
    pub fn contains(&self, page: Pfn) -> bool {
        let index = page.get();
        index < self.capacity.get() && self.words[word_index(index)] & bit(index) != 0
    }

    /// Puts `page` in; true if it was not there.
    ///
    /// # Panics
    /// If the page is beyond the capacity.
    pub fn insert(&mut self, page: Pfn) -> bool {
        let index = page.get();
        assert!(
            index < self.capacity.get(),
            "page beyond the set's capacity"
        );
        let word = &mut self.words[word_index(index)];
        let is_new = *word & bit(index) == 0;
        *word |= bit(index);
        is_new
    }

    /// Takes `page` out; true if it was there.
    pub fn remove(&mut self, page: Pfn) -> bool {
        let index = page.get();
        if !self.contains(page) {
            return false;
        }
        self.words[word_index(index)] &= !bit(index);
        true
    }

    /// Puts all pages of `range` in.
    ///
    /// # Panics
    /// If the range ends beyond the capacity.
    pub fn insert_range(&mut self, range: PageRange) {
        assert!(
            range.end().get() <= self.capacity.get(),
            "range beyond the set's capacity"
        );
        for_masks(range, |index, mask| self.words[index] |= mask);
    }

    /// Takes all pages of `range` out.
    ///
    /// # Panics
    /// If the range ends beyond the capacity.
    pub fn remove_range(&mut self, range: PageRange) {
        assert!(
            range.end().get() <= self.capacity.get(),
            "range beyond the set's capacity"
        );
        for_masks(range, |index, mask| self.words[index] &= !mask);
    }

    /// How many pages of `range` are in the set.
    ///
    /// # Panics
    /// If the range ends beyond the capacity.
    pub fn count_range(&self, range: PageRange) -> PageCount {
        assert!(
            range.end().get() <= self.capacity.get(),
            "range beyond the set's capacity"
        );
        let mut count = 0;
        for_masks(range, |index, mask| {
            count += u64::from((self.words[index] & mask).count_ones())
        });
        PageCount::new(count)
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds every page of `other`.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of different guests");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(word, add)| *word |= add);
    }

    /// Keeps only the pages that are also in `other`.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn intersect_with(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of different guests");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(word, keep)| *word &= keep);
    }

    /// Takes every page of `other` out.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of different guests");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(word, drop)| *word &= !drop);
    }

    /// The bits as words, lowest page in the lowest bit of the first word.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Overwrites the set word by word: `word(i)` gives the bits of pages `64 i` to `64 i + 63`.
    /// Bits beyond the capacity are dropped, so the source may be untrusted.
    pub fn fill_words(&mut self, mut word: impl FnMut(usize) -> u64) {
        self.words
            .iter_mut()
            .enumerate()
            .for_each(|(index, slot)| *slot = word(index));
        self.trim();
    }

    /// Maximal runs of consecutive pages in the whole set, ascending.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(PageRange::new(Pfn::new(0), self.capacity))
    }

    /// Maximal runs of consecutive pages within `range`, ascending, cut at its ends.
    ///
    /// # Panics
    /// If the range ends beyond the capacity.
    pub fn runs_in(&self, range: PageRange) -> Runs<'_> {
        assert!(
            range.end().get() <= self.capacity.get(),
            "range beyond the set's capacity"
        );
        Runs {
            set: self,
            next: range.first.get(),
            end: range.end().get(),
        }
    }

    /// Every page in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> {
        self.runs().flat_map(PageRange::iter)
    }

    /// The first page at or after `from` and before `end` whose membership is `member`, or `end`.
    fn seek(&self, from: u64, end: u64, member: bool) -> u64 {
        let mut index = from;
        while index < end {
            let word = self.words[word_index(index)];
            let wanted = if member { word } else { !word } >> (index % WORD_BITS);
            if wanted != 0 {
                return (index + u64::from(wanted.trailing_zeros())).min(end);
            }
            index = (index / WORD_BITS + 1) * WORD_BITS;
        }
        end
    }

    /// Clears the bits beyond the capacity.
    fn trim(&mut self) {
        let used = self.capacity.get() % WORD_BITS;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

impl core::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "PageSet({} of {})",
            self.count().get(),
            self.capacity.get()
        )
    }
}

/// Iterator over runs of consecutive pages; see [`PageSet::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    next: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let first = self.set.seek(self.next, self.end, true);
        if first == self.end {
            self.next = self.end;
            return None;
        }
        let after = self.set.seek(first, self.end, false);
        self.next = after;
        Some(PageRange::new(
            Pfn::new(first),
            PageCount::new(after - first),
        ))
    }
}

/// Calls `visit` with each word that `range` touches and the mask of its bits there.
fn for_masks(range: PageRange, mut visit: impl FnMut(usize, u64)) {
    let mut index = range.first.get();
    let end = range.end().get();
    while index < end {
        let stop = ((index / WORD_BITS + 1) * WORD_BITS).min(end);
        let width = stop - index;
        let ones = if width == WORD_BITS {
            u64::MAX
        } else {
            (1 << width) - 1
        };
        visit(word_index(index), ones << (index % WORD_BITS));
        index = stop;
    }
}

fn word_count(capacity: PageCount) -> usize {
    usize::try_from(capacity.get().div_ceil(WORD_BITS)).expect("a page set fits into memory")
}

fn word_index(page: u64) -> usize {
    usize::try_from(page / WORD_BITS).expect("checked against the capacity")
}

const fn bit(page: u64) -> u64 {
    1 << (page % WORD_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    const CAPACITY: u64 = 200;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64),
        Remove(u64),
        InsertRange(u64, u64),
        RemoveRange(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..=CAPACITY, 0..=CAPACITY).prop_map(|(a, b)| (a.min(b), a.max(b)));
        prop_oneof![
            (0..CAPACITY).prop_map(Step::Insert),
            (0..CAPACITY).prop_map(Step::Remove),
            range.clone().prop_map(|(a, b)| Step::InsertRange(a, b)),
            range.prop_map(|(a, b)| Step::RemoveRange(a, b)),
        ]
    }

    fn range(from: u64, to: u64) -> PageRange {
        PageRange::new(Pfn::new(from), PageCount::new(to - from))
    }

    fn build(steps: &[Step]) -> (PageSet, BTreeSet<u64>) {
        let mut set = PageSet::empty(PageCount::new(CAPACITY));
        let mut model = BTreeSet::new();
        for step in steps {
            match *step {
                Step::Insert(page) => assert_eq!(set.insert(Pfn::new(page)), model.insert(page)),
                Step::Remove(page) => assert_eq!(set.remove(Pfn::new(page)), model.remove(&page)),
                Step::InsertRange(from, to) => {
                    set.insert_range(range(from, to));
                    model.extend(from..to);
                }
                Step::RemoveRange(from, to) => {
                    set.remove_range(range(from, to));
                    model.retain(|page| !(from..to).contains(page));
                }
            }
        }
        (set, model)
    }

    fn pages(set: &PageSet) -> BTreeSet<u64> {
        set.iter().map(Pfn::get).collect()
    }

    proptest! {
        #[test]
        fn behaves_like_a_tree_set(steps in prop::collection::vec(step(), 0..60),
                                   from in 0..=CAPACITY, to in 0..=CAPACITY) {
            let (set, model) = build(&steps);
            prop_assert_eq!(pages(&set), model.clone());
            prop_assert_eq!(set.count().get(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            let (from, to) = (from.min(to), from.max(to));
            let inside = model.range(from..to).copied().collect::<BTreeSet<_>>();
            prop_assert_eq!(set.count_range(range(from, to)).get(), inside.len() as u64);
            let runs: BTreeSet<_> = set.runs_in(range(from, to)).flat_map(PageRange::iter).map(Pfn::get).collect();
            prop_assert_eq!(runs, inside);
        }

        #[test]
        fn wider_has_the_same_pages(steps in prop::collection::vec(step(), 0..60), more in 0u64..200) {
            let (set, model) = build(&steps);
            let wider = set.widened(PageCount::new(CAPACITY + more));
            prop_assert_eq!(wider.capacity(), PageCount::new(CAPACITY + more));
            prop_assert_eq!(pages(&wider), model);
        }

        #[test]
        fn runs_are_maximal(steps in prop::collection::vec(step(), 0..60)) {
            let (set, _) = build(&steps);
            let runs: alloc::vec::Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first));
        }

        #[test]
        fn algebra_matches(a in prop::collection::vec(step(), 0..30), b in prop::collection::vec(step(), 0..30)) {
            let ((set_a, model_a), (set_b, model_b)) = (build(&a), build(&b));
            let mut union = set_a.clone();
            union.union_with(&set_b);
            prop_assert_eq!(pages(&union), &model_a | &model_b);
            let mut both = set_a.clone();
            both.intersect_with(&set_b);
            prop_assert_eq!(pages(&both), &model_a & &model_b);
            let mut rest = set_a;
            rest.subtract(&set_b);
            prop_assert_eq!(pages(&rest), &model_a - &model_b);
        }
    }

    #[test]
    fn foreign_bits_beyond_the_capacity_are_dropped() {
        let mut set = PageSet::empty(PageCount::new(70));
        set.fill_words(|_| u64::MAX);
        assert_eq!(set, PageSet::full(PageCount::new(70)));
        assert_eq!(set.count(), PageCount::new(70));
    }
}
