//! The daemon's side: puts pages in, and knows which are missing. The rules and the races are told in
//! the module above.

use super::FaultPath;
use super::request::{Step, Userfault};
use crate::bitmap::{SharedBitmap, masks, push_runs};
use crate::memory::{PageKind, SharedMemory};
use limosa_pages::{PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, PageSet, Pfn};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of fewer pages it takes longer to ask which exist than to read them.
const ASKED_ABOUT_MIN: PageCount = PageCount::new(512);

/// Why pages were not put in.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The process is gone, or has closed its gate.
    #[error("the VM process is gone or takes no more pages")]
    Gone,
    /// These are not whole pages of this memory.
    #[error("{bytes} bytes at {first} are no whole pages of this memory")]
    BadRange {
        /// Where they would begin.
        first: Pfn,
        /// How many they are.
        bytes: u64,
    },
    /// Not everything has arrived.
    #[error("{0} are still missing")]
    StillMissing(PageCount),
    /// What a process lends does not fit together.
    #[error("{0}")]
    Unfit(&'static str),
    /// The kernel refused.
    #[error("cannot {action}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Puts pages under a guest that may run. All methods may be called by several threads at once, but
/// [`PageInstaller::mark_missing`] and [`PageInstaller::arrived_in_place`] belong to the time
/// before the guest runs and before pages are installed.
#[derive(Debug)]
pub struct PageInstaller {
    faults: Userfault,
    /// Where the VM process has the memory.
    base: u64,
    /// Our own mapping.
    memory: Arc<SharedMemory>,
    missing: SharedBitmap,
    missing_count: AtomicU64,
    path: FaultPath,
    /// Pages that somebody writes or has written; only on the path *continue*.
    claims: Vec<AtomicU64>,
    /// Huge pages that somebody makes or has made visible.
    shown: Vec<AtomicU64>,
}

impl PageInstaller {
    /// Takes what the VM process lends: the gate's descriptor, the address of its mapping, and the
    /// bitmap of missing pages; `memory` is our own mapping of the same file. Wakes everybody who
    /// waits, since a daemon before us may have read their faults.
    ///
    /// # Errors
    /// The descriptor is of something else, or the parts do not fit together.
    pub fn new(
        descriptor: OwnedFd,
        base: u64,
        memory: Arc<SharedMemory>,
        missing: SharedBitmap,
        path: FaultPath,
    ) -> Result<Self, InstallError> {
        let faults =
            Userfault::adopt(descriptor).map_err(call("use the descriptor for page faults"))?;
        let size = memory.size().get();
        if !base.is_multiple_of(memory.kind().bytes()) || base.checked_add(size).is_none() {
            return Err(InstallError::Unfit("there is no memory at that address"));
        }
        if memory.kind() == PageKind::Huge && path == FaultPath::Copy {
            return Err(InstallError::Unfit("huge pages cannot be copied in"));
        }
        if missing.page_count() != memory.page_count() {
            return Err(InstallError::Unfit(
                "the bitmap of missing pages is of another memory",
            ));
        }
        let flags = |bits: u64| {
            let words = bits.div_ceil(u64::from(u64::BITS));
            (0..words).map(|_| AtomicU64::new(0)).collect()
        };
        let is_claimed = path == FaultPath::Continue;
        let installer = Self {
            faults,
            base,
            missing_count: AtomicU64::new(missing.count().get()),
            claims: flags(if is_claimed { size / PAGE_SIZE } else { 0 }),
            shown: flags(if is_claimed {
                size / memory.kind().bytes()
            } else {
                0
            }),
            memory,
            missing,
            path,
        };
        installer.wake(installer.everything())?;
        Ok(installer)
    }

    /// How it puts pages in.
    pub const fn path(&self) -> FaultPath {
        self.path
    }

    /// How many pages the memory has.
    pub fn page_count(&self) -> PageCount {
        self.memory.page_count()
    }

    /// Before the guest runs: the content of these pages is not here. On small pages whatever is
    /// there is thrown away, in a call or two a range, which is dear for scattered pages.
    ///
    /// # Errors
    /// The range is not within the memory, or the kernel refuses.
    pub fn mark_missing(&self, range: PageRange) -> Result<(), InstallError> {
        self.check(range)?;
        if range.count == PageCount::ZERO {
            return Ok(());
        }
        let put = self.missing.put_range(range);
        self.missing_count.fetch_add(put.get(), Ordering::SeqCst);
        if self.path == FaultPath::Continue {
            for (index, mask) in masks(range) {
                self.claims[index].fetch_and(!mask, Ordering::SeqCst);
            }
        }
        match self.memory.kind() {
            PageKind::Small => self
                .memory
                .punch(range)
                .map_err(call("take pages away from the guest")),
            PageKind::Huge => {
                for unit in self.units(range) {
                    let (word, bit) = place(unit);
                    self.shown[word].fetch_and(!bit, Ordering::SeqCst);
                }
                Ok(())
            }
        }
    }

    /// Before the guest runs: these pages were received straight into our mapping.
    ///
    /// # Errors
    /// The range is not within the memory.
    pub fn arrived_in_place(&self, range: PageRange) -> Result<(), InstallError> {
        self.check(range)?;
        self.note_arrival(range);
        Ok(())
    }

    /// Whether the page's content has not arrived. A page beyond the memory is never missing.
    pub fn is_missing(&self, page: Pfn) -> bool {
        self.missing.contains(page)
    }

    /// How many pages are missing.
    pub fn missing_count(&self) -> PageCount {
        PageCount::new(self.missing_count.load(Ordering::SeqCst))
    }

    /// Overwrites `into` with the pages that are missing.
    ///
    /// # Panics
    /// If the set is of another memory.
    pub fn missing_set(&self, into: &mut PageSet) {
        assert_eq!(
            into.capacity(),
            self.memory.page_count(),
            "a set of this memory"
        );
        into.fill_words(|index| self.missing.load_in_order(index));
    }

    /// Which pages have to arrive before an access to `page` can go on: the page itself, or all that
    /// its huge page lacks. None if it only has to be resolved.
    pub fn missing_in_unit(&self, page: Pfn) -> Vec<PageRange> {
        if page.get() >= self.memory.page_count().get() {
            return Vec::new();
        }
        self.missing.runs_in(self.unit_of(page))
    }

    /// Puts pages in whose content is `bytes`; how many of them had been missing and are here now.
    /// The others are dropped.
    ///
    /// # Errors
    /// The bytes are no whole pages of this memory, the VM process is gone, or the kernel refuses.
    pub fn install(&self, first: Pfn, bytes: &[u8]) -> Result<PageCount, InstallError> {
        let bad = || InstallError::BadRange {
            first,
            bytes: bytes.len() as u64,
        };
        if !bytes.len().is_multiple_of(PAGE_SIZE_USIZE)
            || first.get() > self.memory.page_count().get()
        {
            return Err(bad());
        }
        let count = PageCount::new((bytes.len() / PAGE_SIZE_USIZE) as u64);
        let range = PageRange::new(first, count);
        self.check(range)?;
        let part = |run: PageRange| {
            let start = (run.first.get() - first.get()) as usize * PAGE_SIZE_USIZE;
            &bytes[start..start + run.count.get() as usize * PAGE_SIZE_USIZE]
        };
        let mut installed = 0;
        match self.path {
            FaultPath::Copy => {
                for run in self.missing.runs_in(range) {
                    installed += self.copy_in(run, part(run))?.get();
                }
            }
            FaultPath::Continue => {
                let runs = self.claim(range);
                for &run in &runs {
                    self.memory
                        .write_at(run.first.file_offset(), part(run))
                        .map_err(call("write pages"))?;
                    installed += self.note_arrival(run).get();
                    self.show(run)?;
                }
            }
        }
        Ok(PageCount::new(installed))
    }

    /// The pages of `range` are known to be zero; how many of them had been missing. Small pages stay
    /// holes. Who waits for one of them faults again, so [`PageInstaller::resolve`] is called for it;
    /// calling that at once saves a round.
    ///
    /// # Errors
    /// As [`PageInstaller::install`].
    pub fn install_zeros(&self, range: PageRange) -> Result<PageCount, InstallError> {
        self.check(range)?;
        if self.path == FaultPath::Copy {
            // A missing page is a hole, so its content is in place.
            let arrived = self.note_arrival(range);
            if arrived > PageCount::ZERO {
                self.wake(range)?;
            }
            return Ok(arrived);
        }
        let mut installed = 0;
        for run in self.claim(range) {
            self.clear(run)?;
            installed += self.note_arrival(run).get();
            match self.memory.kind() {
                PageKind::Small => self.wake(run)?,
                PageKind::Huge => self.show(run)?,
            }
        }
        Ok(PageCount::new(installed))
    }

    /// Lets an access to a page go on that is not missing, whether it is not visible yet or is zero
    /// and was never made; wakes who waits. False, and nothing done, if something is missing there.
    ///
    /// # Errors
    /// The page is not one of this memory, the VM process is gone, or the kernel refuses.
    pub fn resolve(&self, page: Pfn) -> Result<bool, InstallError> {
        self.check(PageRange::new(page, PageCount::new(1)))?;
        let unit = self.unit_of(page);
        if !self.has_all(unit) {
            return Ok(false);
        }
        let (start, len) = (self.address(unit.first), unit.bytes().get());
        loop {
            let step = match self.path {
                FaultPath::Copy => self.faults.zero(start, len),
                FaultPath::Continue => self.faults.map_existing(start, len),
            };
            match step.map_err(refusal)? {
                Step::Done(_) => return Ok(true),
                Step::Exists => {
                    self.wake(unit)?;
                    return Ok(true);
                }
                Step::Absent => self.make_zero_unit(unit)?,
            }
        }
    }

    /// Adds the pages of faults that no thread has read yet to `into`, some of them, without waiting.
    /// Each asks for [`PageInstaller::missing_in_unit`] and, if that is nothing, for
    /// [`PageInstaller::resolve`]. On huge pages it may be any page of the huge one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn read_faults(&self, into: &mut Vec<Pfn>) -> Result<(), InstallError> {
        let pages = self.memory.page_count().get();
        self.faults
            .read(|address| {
                let page = address.wrapping_sub(self.base) / PAGE_SIZE;
                if page < pages {
                    into.push(Pfn::new(page));
                }
            })
            .map_err(call("read page faults"))
    }

    /// Says that all is there, after having looked.
    ///
    /// # Errors
    /// Pages are missing.
    pub fn finish(&self) -> Result<(), InstallError> {
        match self.missing.count() {
            PageCount::ZERO => Ok(()),
            missing => Err(InstallError::StillMissing(missing)),
        }
    }

    /// The kernel copies a run of pages, of which others may copy some at the same time.
    fn copy_in(&self, run: PageRange, bytes: &[u8]) -> Result<PageCount, InstallError> {
        let mut installed = 0;
        let mut done = 0;
        while done < bytes.len() {
            let first = run
                .first
                .advance(PageCount::new((done / PAGE_SIZE_USIZE) as u64));
            let step = self.faults.copy(self.address(first), &bytes[done..]);
            let copied = match step.map_err(refusal)? {
                Step::Done(copied) => copied,
                Step::Exists => {
                    // It came by somebody else, perhaps a daemon that died before it could say so.
                    self.wake(PageRange::new(first, PageCount::new(1)))?;
                    PAGE_SIZE
                }
                Step::Absent => return Err(unreadable()),
            };
            let arrived = PageRange::new(first, PageCount::new(copied / PAGE_SIZE));
            installed += self.note_arrival(arrived).get();
            done += copied as usize;
        }
        Ok(PageCount::new(installed))
    }

    /// Takes the right to write those pages of a range that are missing and nobody has taken.
    fn claim(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        for (index, mask) in masks(range) {
            let wanted = self.missing.load_in_order(index) & mask;
            let taken = self.claims[index].fetch_or(wanted, Ordering::SeqCst);
            push_runs(&mut runs, index, wanted & !taken);
        }
        runs
    }

    /// Makes claimed pages zero, without making them exist. In long runs most of them never did: of these nothing
    /// is read.
    fn clear(&self, run: PageRange) -> Result<(), InstallError> {
        let existing = if run.count < ASKED_ABOUT_MIN {
            vec![run]
        } else {
            let existing = self.memory.data_extents(run);
            existing.map_err(call("find pages"))?
        };
        let mut pages = existing.into_iter().flat_map(PageRange::iter);
        pages.try_for_each(|page| self.clear_page(page))
    }

    /// Makes a claimed page zero, without making it exist.
    fn clear_page(&self, page: Pfn) -> Result<(), InstallError> {
        let mut content = [0; PAGE_SIZE_USIZE];
        self.memory
            .read_file_at(page.file_offset(), &mut content)
            .map_err(call("read a page"))?;
        if content.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        self.memory
            .write_at(page.file_offset(), &[0; PAGE_SIZE_USIZE])
            .map_err(call("write pages"))
    }

    /// Clears bits and counts; how many were set.
    fn note_arrival(&self, range: PageRange) -> PageCount {
        let taken = self.missing.take_range(range);
        let less = |count: u64| Some(count.saturating_sub(taken.get()));
        // The VM process may write the bitmap, too, so the count is not trusted to suffice.
        let _counted = self
            .missing_count
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok();
        taken
    }

    /// Makes written pages visible, or the huge pages that they complete.
    fn show(&self, run: PageRange) -> Result<(), InstallError> {
        if self.memory.kind() == PageKind::Small {
            return self.map_existing(run);
        }
        for unit in self.units(run) {
            let pages = self.unit_range(unit);
            let (word, bit) = place(unit);
            if self.has_all(pages) && self.shown[word].fetch_or(bit, Ordering::SeqCst) & bit == 0 {
                self.map_existing(pages)?;
            }
        }
        Ok(())
    }

    fn map_existing(&self, run: PageRange) -> Result<(), InstallError> {
        let (mut start, end) = (self.address(run.first), self.address(run.end()));
        let unit = self.memory.kind().bytes();
        while start < end {
            let step = self.faults.map_existing(start, end - start);
            start += match step.map_err(refusal)? {
                Step::Done(mapped) => mapped,
                // Resolved by a fault thread, or made of zeros only and never written: then whoever
                // touches it resolves it.
                Step::Exists | Step::Absent => {
                    self.faults.wake(start, unit).map_err(refusal)?;
                    unit
                }
            };
        }
        Ok(())
    }

    /// Makes what is known to be zero exist.
    fn make_zero_unit(&self, unit: PageRange) -> Result<(), InstallError> {
        match (self.path, self.memory.kind()) {
            (FaultPath::Continue, PageKind::Small) => {
                let (start, len) = (self.address(unit.first), unit.bytes().get());
                self.faults.zero(start, len).map_err(refusal)?;
                Ok(())
            }
            (FaultPath::Continue, PageKind::Huge) => {
                self.memory.populate(unit).map_err(call("make a huge page"))
            }
            (FaultPath::Copy, _) => Err(unreadable()),
        }
    }

    fn has_all(&self, range: PageRange) -> bool {
        masks(range).all(|(index, mask)| self.missing.load_in_order(index) & mask == 0)
    }

    fn wake(&self, range: PageRange) -> Result<(), InstallError> {
        let unit = self.memory.kind().bytes();
        let first = self.address(range.first) / unit * unit;
        let end = self.address(range.end()).next_multiple_of(unit);
        if first == end {
            return Ok(());
        }
        self.faults.wake(first, end - first).map_err(refusal)
    }

    fn address(&self, page: Pfn) -> u64 {
        self.base + page.file_offset()
    }

    fn everything(&self) -> PageRange {
        PageRange::new(Pfn::new(0), self.memory.page_count())
    }

    fn unit_of(&self, page: Pfn) -> PageRange {
        self.unit_range(page.file_offset() / self.memory.kind().bytes())
    }

    fn unit_range(&self, unit: u64) -> PageRange {
        let pages = self.memory.kind().bytes() / PAGE_SIZE;
        PageRange::new(Pfn::new(unit * pages), PageCount::new(pages))
    }

    fn units(&self, range: PageRange) -> std::ops::Range<u64> {
        let unit = self.memory.kind().bytes();
        range.first.file_offset() / unit..range.end().file_offset().div_ceil(unit)
    }

    fn check(&self, range: PageRange) -> Result<(), InstallError> {
        let pages = self.memory.page_count().get();
        let end = range.first.get().checked_add(range.count.get());
        if end.is_some_and(|end| end <= pages) {
            return Ok(());
        }
        Err(InstallError::BadRange {
            first: range.first,
            bytes: range.count.get().saturating_mul(PAGE_SIZE),
        })
    }
}

/// Readable when there are faults to read.
impl AsFd for PageInstaller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}

/// Word and bit of a flag.
const fn place(index: u64) -> (usize, u64) {
    ((index / 64) as usize, 1 << (index % 64))
}

fn call(action: &'static str) -> impl Fn(io::Error) -> InstallError {
    move |source| InstallError::Call { action, source }
}

fn unreadable() -> InstallError {
    call("put pages in")(io::Error::from_raw_os_error(libc::EFAULT))
}

/// What it means that the kernel puts nothing in.
fn refusal(source: io::Error) -> InstallError {
    match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => InstallError::Gone,
        _ => call("put pages in")(source),
    }
}
