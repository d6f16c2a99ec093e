//! The guest and its truth: what it wrote last, wherever it ran, and what a process holds of it.
//!
//! A page's content is one number: the version that was written last, 0 for zeros. The
//! [`Guest`] exists once and keeps what its memory and its registers must be; each VM process has a
//! [`Memory`] of its own, which a migration fills. Every step of the guest reads through the
//! memory of the process that it runs in and compares with the truth, so a stale page, a guest that
//! was set back in time and two that run at once are all seen as what they are: a read that does
//! not give what was written last.
//!
//! The dirty log has the semantics of KVM with manual protection and *initially set*: reading does
//! not clear; a bit that was cleared is set by the next write; a bit that was not stays.
//!
//! A guest can be throttled. The model has one vCPU: a share of the time stretches its steps, a quota
//! lets it wait after each page that it dirties.
//!
//! A page can be missing: the guest has it, its memory here does not. Whoever touches such a page
//! stands there until it comes; without anybody who serves page faults it comes into being as zero.

use crate::random::Random;
use crate::workload::{Pattern, Workload};
use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::throttle::Throttle;
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};

/// Steps that a guest catches up with at most when nobody looked at it for long: in a trial it
/// slept meanwhile, or a minute of waiting would cost a million steps.
const CATCH_UP_MAX: u64 = 600;

/// A write to a page under write protection costs the guest this much more: measured on KVM as
/// 2.3 to 2.6 µs.
const PROTECTION_FAULT: Duration = Duration::from_nanos(2_500);

/// The memory of one VM process.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    content: Vec<u64>,
    exists: PageSet,
    /// Pages that are somewhere else; kept by the VM process, so that it outlives a daemon.
    missing: PageSet,
    missing_count: u64,
    /// Who touches a missing page waits for it.
    pub(crate) is_armed: bool,
    log: Option<PageSet>,
    harvested: PageSet,
    /// Pages that entered the log since it was started.
    pub(crate) dirtied: u64,
    /// Planted: one write in so many is not logged.
    pub(crate) dropped_per_mille: u64,
}

impl Memory {
    pub(crate) fn new(pages: PageCount) -> Self {
        Self {
            content: vec![0; usize::try_from(pages.get()).expect("a small guest")],
            exists: PageSet::empty(pages),
            missing: PageSet::empty(pages),
            missing_count: 0,
            is_armed: false,
            log: None,
            harvested: PageSet::empty(pages),
            dirtied: 0,
            dropped_per_mille: 0,
        }
    }

    pub(crate) fn read(&self, page: u64) -> u64 {
        self.content[index(page)]
    }

    /// A write by the guest: true if it hit a protected page.
    fn write(&mut self, page: u64, content: u64) -> bool {
        self.content[index(page)] = content;
        self.exists.insert(Pfn::new(page));
        let log = self.log.as_mut();
        let is_new = log.is_some_and(|log| log.insert(Pfn::new(page)));
        self.dirtied += u64::from(is_new);
        is_new
    }

    /// A write by the daemon through its own mapping, which no dirty log sees.
    pub(crate) fn install(&mut self, page: u64, content: u64) {
        self.content[index(page)] = content;
        self.exists.insert(Pfn::new(page));
        self.missing_count -= u64::from(self.missing.remove(Pfn::new(page)));
    }

    /// Makes a page absent, whatever was in its place.
    pub(crate) fn make_missing(&mut self, page: u64) {
        self.content[index(page)] = 0;
        self.exists.remove(Pfn::new(page));
        self.missing_count += u64::from(self.missing.insert(Pfn::new(page)));
    }

    /// A vCPU or the loader of a state touches a page: true if it must wait for it.
    pub(crate) fn touch(&mut self, page: u64) -> bool {
        if self.missing_count == 0 || !self.missing.contains(Pfn::new(page)) {
            return false;
        }
        if !self.is_armed {
            self.install(page, 0);
        }
        self.is_armed
    }

    pub(crate) fn is_missing(&self, page: u64) -> bool {
        self.missing_count > 0 && self.missing.contains(Pfn::new(page))
    }

    pub(crate) const fn missing(&self) -> &PageSet {
        &self.missing
    }

    pub(crate) const fn misses_pages(&self) -> bool {
        self.missing_count > 0
    }

    pub(crate) const fn exists(&self) -> &PageSet {
        &self.exists
    }

    pub(crate) fn content(&self) -> &[u64] {
        &self.content
    }

    pub(crate) fn start_log(&mut self) {
        self.log = Some(PageSet::full(self.exists.capacity()));
        self.dirtied = 0;
    }

    pub(crate) const fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    pub(crate) fn stop_log(&mut self) {
        self.log = None;
    }

    /// Reads the log; nothing is cleared.
    pub(crate) fn harvest(&mut self) -> PageSet {
        if let Some(log) = &self.log {
            self.harvested = log.clone();
        }
        self.harvested.clone()
    }

    /// Clears in `range` exactly the bits of the last harvest, except those that are kept.
    pub(crate) fn clear(&mut self, range: PageRange, kept: &[PageRange]) {
        for &run in kept {
            self.harvested.remove_range(run);
        }
        if let Some(log) = &mut self.log {
            for run in self.harvested.runs_in(range) {
                log.remove_range(run);
            }
        }
    }
}

/// The guest as a being: it exists once, whatever runs it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) truth: Vec<u64>,
    /// Its vCPU state: how many steps it made.
    pub(crate) registers: u64,
    pattern: Pattern,
    random: Random,
    /// Time from one step to the next; `None` for a guest without work.
    interval: Option<Duration>,
    /// Steps in a thousand that write.
    writes_per_mille: u64,
    sleeps: bool,
    version: u64,
    next_step: Timestamp,
    /// The step that it stands at, since a page of it is missing.
    pending: Option<Touch>,
    /// Since when it stands there.
    stands_since: Option<Timestamp>,
    /// How long a throttle held it back.
    pub(crate) held: Duration,
    /// Writes so far.
    pub(crate) writes: u64,
    /// Reads that did not give what was written last.
    pub(crate) stale_reads: u64,
    pub(crate) first_error: Option<String>,
}

/// What a step touches.
#[derive(Clone, Copy, Debug)]
struct Touch {
    page: u64,
    /// A second page that is read; without it the first one is written.
    read: Option<u64>,
}

impl Touch {
    fn pages(self) -> impl Iterator<Item = u64> {
        core::iter::once(self.page).chain(self.read)
    }
}

/// How a guest behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    pub(crate) memory: PageCount,
    pub(crate) workload: Workload,
    /// Steps a second.
    pub(crate) rate: u64,
    pub(crate) writes_per_mille: u64,
    /// It sleeps when nobody looks at it for long.
    pub(crate) sleeps: bool,
}

impl Guest {
    pub(crate) fn new(habits: &Habits, random: Random) -> Self {
        let nanos = 1_000_000_000u64.checked_div(habits.rate);
        Self {
            truth: vec![0; usize::try_from(habits.memory.get()).expect("a small guest")],
            registers: 0,
            pattern: Pattern::new(habits.workload, habits.memory),
            random,
            interval: nanos.map(|nanos| Duration::from_nanos(nanos.max(1))),
            writes_per_mille: habits.writes_per_mille,
            sleeps: habits.sleeps,
            version: 0,
            next_step: Timestamp::ZERO,
            pending: None,
            stands_since: None,
            held: Duration::ZERO,
            writes: 0,
            stale_reads: 0,
            first_error: None,
        }
    }

    /// Fills the first `touched` pages with versions, and some with zeros.
    pub(crate) fn boot(&mut self, memory: &mut Memory, touched: PageCount) {
        for page in 0..touched.get() {
            self.store(memory, page);
        }
    }

    /// The guest starts to run at `now`.
    pub(crate) fn wake(&mut self, now: Timestamp) {
        self.next_step = self.next_step.max(now);
    }

    /// When it makes its next step; `None` for a guest without work.
    pub(crate) fn next_step(&self) -> Option<Timestamp> {
        self.interval.map(|_| self.next_step)
    }

    /// The pages that it stands at, should they be missing.
    pub(crate) fn stands_at(&self) -> impl Iterator<Item = u64> + use<> {
        self.pending.into_iter().flat_map(Touch::pages)
    }

    /// Goes on at `now`, the page having come: how long it stood.
    pub(crate) fn go_on(&mut self, now: Timestamp) -> Duration {
        self.wake(now);
        self.stands_since
            .take()
            .map_or(Duration::ZERO, |since| now.since(since))
    }

    /// Lets the guest do what it does until `now` in the memory and registers of one process.
    /// True if it stands at a missing page.
    pub(crate) fn run(
        &mut self,
        memory: &mut Memory,
        registers: &mut u64,
        throttle: Option<Throttle>,
        now: Timestamp,
    ) -> bool {
        let Some(interval) = self.interval else {
            return false;
        };
        if self.stands_at().any(|page| memory.is_missing(page)) {
            return true;
        }
        if self.sleeps {
            let recent = interval * u32::try_from(CATCH_UP_MAX).expect("a small number");
            if now.since(self.next_step) > recent {
                let nanos = u64::try_from(recent.as_nanos()).expect("below a minute");
                self.next_step = Timestamp::from_nanos(now.as_nanos() - nanos);
            }
        }
        while self.next_step < now {
            let Some(faulted) = self.step(memory, registers) else {
                self.stands_since = Some(self.next_step);
                return true;
            };
            self.next_step = self.next_step.after(interval);
            if faulted {
                self.next_step = self.next_step.after(PROTECTION_FAULT);
            }
            let wait = throttle.map_or(Duration::ZERO, |throttle| {
                held_back(throttle, interval, faulted)
            });
            self.held += wait;
            self.next_step = self.next_step.after(wait);
        }
        false
    }

    /// What the next step touches.
    fn draw(&mut self) -> Touch {
        let page = self.pattern.next(&mut self.random);
        let writes = self.random.per_mille(self.writes_per_mille);
        let read = (!writes).then(|| self.random.below(self.truth.len() as u64));
        Touch { page, read }
    }

    /// One step: look at the own registers, read a page, perhaps write it. True if the write hit a
    /// protected page; nothing if a page is missing, at which it then stands.
    fn step(&mut self, memory: &mut Memory, registers: &mut u64) -> Option<bool> {
        let touch = match self.pending.take() {
            Some(touch) => touch,
            None => self.draw(),
        };
        // All of them, as two vCPUs would.
        let missing = touch.pages().filter(|&page| memory.touch(page)).count();
        if missing > 0 {
            self.pending = Some(touch);
            return None;
        }
        if *registers != self.registers {
            self.complain(|guest| {
                format!(
                    "the guest's vCPU was set back or doubled: it made {} steps and finds {registers} in its registers",
                    guest.registers
                )
            });
            *registers = self.registers;
        }
        self.registers += 1;
        *registers += 1;
        self.check(memory, touch.page);
        let Some(anywhere) = touch.read else {
            return Some(self.store(memory, touch.page));
        };
        self.check(memory, anywhere);
        Some(false)
    }

    fn check(&mut self, memory: &Memory, page: u64) {
        let (found, expected) = (memory.read(page), self.truth[index(page)]);
        if found != expected {
            self.complain(|_| {
                format!("the guest read version {found} of page {page} and had written {expected}")
            });
        }
    }

    fn complain(&mut self, text: impl FnOnce(&Self) -> String) {
        self.stale_reads += 1;
        if self.first_error.is_none() {
            self.first_error = Some(text(self));
        }
    }

    fn store(&mut self, memory: &mut Memory, page: u64) -> bool {
        self.version += 1;
        self.writes += 1;
        // Zeros are written too: a page that becomes zero must arrive as zero.
        let content = if self.random.per_mille(60) {
            0
        } else {
            self.version
        };
        self.truth[index(page)] = content;
        let is_dropped = memory.dropped_per_mille > 0
            && memory.log.is_some()
            && self.random.per_mille(memory.dropped_per_mille);
        let was_logged = memory
            .log
            .as_ref()
            .is_some_and(|log| log.contains(Pfn::new(page)));
        let faulted = memory.write(page, content);
        if is_dropped
            && !was_logged
            && let Some(log) = &mut memory.log
        {
            log.remove(Pfn::new(page));
        }
        faulted
    }
}

/// How long a throttle lets a vCPU wait after a step that takes `step`.
fn held_back(throttle: Throttle, step: Duration, has_dirtied: bool) -> Duration {
    match throttle {
        Throttle::PerVcpu { quota } if has_dirtied => {
            let each = Duration::from_nanos(1_000_000_000 / quota.get().max(1));
            each.saturating_sub(step + PROTECTION_FAULT)
        }
        Throttle::PerVcpu { .. } => Duration::ZERO,
        Throttle::Equal { share } => {
            let ran = step + PROTECTION_FAULT * u32::from(has_dirtied);
            ran * 1000 / u32::from(share.thousandths()) - ran
        }
    }
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("a page of a small guest")
}
