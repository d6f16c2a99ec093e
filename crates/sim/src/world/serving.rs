//! The source's side of a guest that runs at the target before its pages are there.
//!
//! The set of what the target misses is made in passes: each tells what was dirtied and not told
//! yet, the last one with the guest paused leaves out what the vCPUs need first, which is sent. From
//! the pause on a page that is asked for is answered from the frozen memory, however often; what is
//! pushed is what nobody was sent yet. After a reconnection the target says what it misses.

use super::World;
use super::source_driver::count_by_chunk;
use crate::fault::WorldFault;
use crate::link::{ANSWER, Frame};
use crate::process::touched_by_load;
use limosa_engine::source::SourceEvent;
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};
use std::collections::BTreeMap;

/// What a daemon knows of the pages that the target misses.
#[derive(Debug)]
pub(crate) struct Serving {
    /// The guest will run at the target before its pages are there.
    pub(super) is_switching: bool,
    /// Nobody writes to the memory any more: pulls are answered.
    pub(super) is_frozen: bool,
    /// What the target was told, or will be told, that it does not have.
    told: PageSet,
    /// What the vCPUs need first.
    pub(super) first: PageSet,
    /// What the target misses and was not sent.
    pub(super) owed: PageSet,
    /// What it says to miss, as far as that has come.
    missing: PageSet,
    /// Planted: what was sent first of each page.
    pub(super) sent_first: BTreeMap<u64, u64>,
    /// Answered pages.
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
    /// How often the target said what it misses.
    pub(crate) reconnections: u32,
}

impl Serving {
    pub(super) fn new(memory: PageCount) -> Self {
        Self {
            is_switching: false,
            is_frozen: false,
            told: PageSet::empty(memory),
            first: PageSet::empty(memory),
            owed: PageSet::empty(memory),
            missing: PageSet::empty(memory),
            sent_first: BTreeMap::new(),
            pages: 0,
            bytes: 0,
            reconnections: 0,
        }
    }

    /// Leaves in `set` what no pass has told yet, and tells it.
    pub(super) fn tell(&mut self, set: &mut PageSet) {
        set.subtract(&self.told);
        self.told.union_with(set);
    }
}

impl World {
    /// The last pass: its set is in place; what goes first leaves it, and what is missing is known.
    pub(super) fn take_missing(&mut self, job: usize) -> (PageCount, Vec<u32>) {
        let mut first = self.draw_first(job);
        let source = &mut self.sources[job];
        let mut set = core::mem::replace(&mut source.set, PageSet::empty(source.config.memory));
        source.serving.tell(&mut set);
        first.intersect_with(&source.serving.told);
        set.subtract(&first);
        let serving = &mut source.serving;
        serving.owed = serving.told.clone();
        serving.owed.subtract(&first);
        serving.first = first;
        serving.is_frozen = true;
        source.set = set;
        let missing = serving.owed.count();
        (missing, count_by_chunk(&serving.owed, source.config.chunk))
    }

    /// Pages that the vCPUs need first: mostly what loading the state touches, and some others.
    fn draw_first(&mut self, job: usize) -> PageSet {
        let memory = self.config.habits.memory;
        let mut first = PageSet::empty(memory);
        if self.random.per_mille(self.config.first_per_mille) {
            for page in touched_by_load(&self.sources[job].state, memory) {
                first.insert(Pfn::new(page));
            }
        }
        for _ in 0..self.random.below(4) {
            first.insert(Pfn::new(self.random.below(memory.get())));
        }
        first
    }

    /// The target asks for something.
    pub(super) fn wanted(&mut self, job: usize, frame: Frame) {
        if !self.sources[job].is_at_work() {
            return;
        }
        let serving = &mut self.sources[job].serving;
        match frame {
            Frame::Want(page) => self.answer(job, page),
            Frame::Missing(ranges) => {
                for range in ranges {
                    serving.missing.insert_range(range);
                }
            }
            Frame::MissingEnd => {
                let memory = serving.missing.capacity();
                let missing = core::mem::replace(&mut serving.missing, PageSet::empty(memory));
                serving.owed = missing;
                serving.reconnections += 1;
                let chunk = self.sources[job].config.chunk;
                let dirty = count_by_chunk(&self.sources[job].serving.owed, chunk);
                self.tell_source(job, SourceEvent::Reconciled { dirty });
            }
            _ => {}
        }
    }

    /// A page that somebody waits for goes ahead of everything.
    fn answer(&mut self, job: usize, page: u64) {
        let source = &self.sources[job];
        let Some(connection) = source.connection else {
            return;
        };
        if !source.serving.is_frozen {
            return;
        }
        let mut content = self.vms[source.vm].memory.read(page);
        if self.is_planted(WorldFault::PulledPageOld)
            && let Some(&old) = source.serving.sent_first.get(&page)
        {
            content = old;
        }
        let frame = if content == 0 {
            Frame::Zeros(PageRange::new(Pfn::new(page), PageCount::new(1)))
        } else {
            Frame::Pages {
                first: page,
                content: vec![content],
            }
        };
        let serving = &mut self.sources[job].serving;
        serving.owed.remove(Pfn::new(page));
        serving.pages += 1;
        serving.bytes += frame.bytes();
        let left = self.now.after(self.random.micros(5, 30));
        self.transmit_at(connection, ANSWER, frame, left);
    }
}
