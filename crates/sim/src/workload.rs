//! What the guest does with its memory: which page comes next.
//!
//! A workload is a stream of page numbers; when they come, and whether they are read or written,
//! is the [`crate::guest`]'s business.

use crate::random::Random;
use limosa_pages::PageCount;

/// The pattern in which a guest touches its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Next to nothing: a few pages over and over, as a kernel without work does.
    Idle,
    /// One page after the other.
    Sequential {
        /// Pages that it goes round in.
        working_set: PageCount,
    },
    /// Every page alike.
    Uniform {
        /// Pages that it chooses from.
        working_set: PageCount,
    },
    /// Few pages often, many pages seldom: a power law whose hottest hundredth of the pages takes a
    /// fifth of the writes.
    Zipf {
        /// Pages that it chooses from.
        working_set: PageCount,
    },
    /// A window that is written uniformly and moves on from time to time.
    Phases {
        /// Pages that the window moves in; an eighth of them is the window.
        working_set: PageCount,
    },
}

/// Pages that an idle guest touches.
const IDLE_PAGES: u64 = 4;
/// Writes for which a phase lasts.
const PHASE_WRITES: u64 = 1000;

/// A workload at work.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    workload: Workload,
    memory: u64,
    step: u64,
}

impl Pattern {
    pub(crate) const fn new(workload: Workload, memory: PageCount) -> Self {
        Self {
            workload,
            memory: memory.get(),
            step: 0,
        }
    }

    /// The next page.
    pub(crate) fn next(&mut self, random: &mut Random) -> u64 {
        let step = self.step;
        self.step += 1;
        let page = match self.workload {
            Workload::Idle => random.below(IDLE_PAGES),
            Workload::Sequential { working_set } => step % working_set.get().max(1),
            Workload::Uniform { working_set } => random.below(working_set.get().max(1)),
            Workload::Zipf { working_set } => {
                // The cube of a uniform number has the density of a power law, in integers.
                let uniform = random.next() >> 32;
                let cubed = (((uniform * uniform) >> 32) * uniform) >> 32;
                (working_set.get().max(1) * cubed) >> 32
            }
            Workload::Phases { working_set } => {
                let window = (working_set.get() / 8).max(1);
                let start = (step / PHASE_WRITES * window) % working_set.get().max(1);
                (start + random.below(window)) % working_set.get().max(1)
            }
        };
        page % self.memory
    }
}
