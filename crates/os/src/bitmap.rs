//! Bitmaps that a VM process shares with its daemon: the dirty log, and which pages are missing.
//!
//! A memory file of 64-bit words in KVM's order. Of the dirty log its maker has the only writable
//! mapping: the file is sealed against new ones, so a reader cannot change what KVM is later told to
//! clear. The bitmap of missing pages is written by daemons, one after the other, and outlives each.
//! Whoever opens one checks seals and size before it maps; what it reads is input like any other.

use crate::mapping::{Access, Mapping};
use crate::memory::{MemoryError, add_seals, check_seals, create_file};
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const WORD_BITS: u64 = u64::BITS as u64;
const HALF_BITS: u64 = u32::BITS as u64;

/// Seals of a bitmap: those of memory, and nobody maps it writable any more. `F_SEAL_FUTURE_WRITE`.
const SEALS: i32 = WRITABLE_SEALS | libc::F_SEAL_FUTURE_WRITE;
/// Seals of a bitmap that others write, too.
const WRITABLE_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// One bit for each page of a guest, in shared memory.
#[derive(Debug)]
pub struct SharedBitmap {
    file: File,
    mapping: Mapping,
    pages: PageCount,
    access: Access,
}

/// Why a bitmap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BitmapError {
    /// It is too short for the guest.
    #[error("the bitmap has {bytes} bytes, {needed} are needed")]
    Short {
        /// Its size.
        bytes: u64,
        /// The size that the guest's memory needs.
        needed: u64,
    },
    /// Its memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl SharedBitmap {
    /// Makes an empty bitmap and keeps the right to write it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create(pages: PageCount) -> Result<Self, BitmapError> {
        Self::create_sealed(c"dirty-bitmap", pages, SEALS)
    }

    /// Makes an empty bitmap that others may write, too: see [`SharedBitmap::open_writable`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create_writable(pages: PageCount) -> Result<Self, BitmapError> {
        Self::create_sealed(c"shared-bitmap", pages, WRITABLE_SEALS)
    }

    fn create_sealed(name: &CStr, pages: PageCount, seals: i32) -> Result<Self, BitmapError> {
        let call = |action| move |source| MemoryError::Call { action, source };
        let bytes = byte_count(pages);
        let file = File::from(create_file(name, 0)?);
        file.set_len(bytes).map_err(call("size"))?;
        let mapping = map(file.as_fd(), bytes, Access::ReadWrite).map_err(call("map"))?;
        add_seals(file.as_fd(), seals)?;
        Ok(Self {
            file,
            mapping,
            pages,
            access: Access::ReadWrite,
        })
    }

    /// Maps a bitmap that somebody else made for a guest of `pages` pages, for reading.
    ///
    /// # Errors
    /// It is not sealed, too short, or cannot be mapped.
    pub fn open(file: OwnedFd, pages: PageCount) -> Result<Self, BitmapError> {
        Self::open_for(file, pages, Access::Read)
    }

    /// Maps a bitmap that somebody else made by [`SharedBitmap::create_writable`], to write it.
    ///
    /// # Errors
    /// It is not sealed, sealed against writers, too short, or cannot be mapped.
    pub fn open_writable(file: OwnedFd, pages: PageCount) -> Result<Self, BitmapError> {
        Self::open_for(file, pages, Access::ReadWrite)
    }

    fn open_for(file: OwnedFd, pages: PageCount, access: Access) -> Result<Self, BitmapError> {
        let call = |action| move |source| MemoryError::Call { action, source };
        check_seals(file.as_fd())?;
        let file = File::from(file);
        let bytes = file.metadata().map_err(call("inspect"))?.len();
        let needed = byte_count(pages);
        if bytes < needed {
            return Err(BitmapError::Short { bytes, needed });
        }
        let mapping = map(file.as_fd(), needed, access).map_err(call("map"))?;
        Ok(Self {
            file,
            mapping,
            pages,
            access,
        })
    }

    /// The file, to be lent to another process.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// How many pages it covers.
    pub const fn page_count(&self) -> PageCount {
        self.pages
    }

    /// The word with the bits of pages `64 index` to `64 index + 63`.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    /// Sets bits in a word.
    ///
    /// # Panics
    /// If there is no such word, or this is not the maker's mapping.
    pub fn set_bits(&self, index: usize, bits: u64) {
        self.assert_writable();
        self.word(index).fetch_or(bits, Ordering::Relaxed);
    }

    /// Overwrites a word.
    ///
    /// # Panics
    /// If there is no such word, or this is not the maker's mapping.
    pub(crate) fn store(&self, index: usize, word: u64) {
        self.assert_writable();
        self.word(index).store(word, Ordering::Relaxed);
    }

    /// The same word, in one order with [`SharedBitmap::put_range`] and [`SharedBitmap::take_bits`] of
    /// all threads; bits beyond the last page are not set, whoever has written there.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn load_in_order(&self, index: usize) -> u64 {
        let first = index as u64 * WORD_BITS;
        let used = self.pages.get().saturating_sub(first).min(WORD_BITS);
        self.word(index).load(Ordering::SeqCst) & low_bits(used)
    }

    /// Clears bits in a word; those that were set.
    ///
    /// # Panics
    /// If there is no such word, or the bitmap is not mapped for writing.
    pub fn take_bits(&self, index: usize, bits: u64) -> u64 {
        self.assert_writable();
        self.word(index).fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// Sets the bits of all pages of `range`; how many were not set.
    ///
    /// # Panics
    /// If the range ends beyond the bitmap, or it is not mapped for writing.
    pub fn put_range(&self, range: PageRange) -> PageCount {
        self.assert_writable();
        let put = |(index, mask)| {
            let before = self.word(index).fetch_or(mask, Ordering::SeqCst);
            u64::from((mask & !before).count_ones())
        };
        PageCount::new(self.masks(range).map(put).sum())
    }

    /// Clears the bits of all pages of `range`; how many were set.
    ///
    /// # Panics
    /// If the range ends beyond the bitmap, or it is not mapped for writing.
    pub fn take_range(&self, range: PageRange) -> PageCount {
        let take = |(index, mask)| u64::from(self.take_bits(index, mask).count_ones());
        PageCount::new(self.masks(range).map(take).sum())
    }

    /// The runs of pages within `range` whose bits are set, ascending.
    ///
    /// # Panics
    /// If the range ends beyond the bitmap.
    pub fn runs_in(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        for (index, mask) in self.masks(range) {
            push_runs(&mut runs, index, self.load_in_order(index) & mask);
        }
        runs
    }

    /// How many bits are set.
    pub fn count(&self) -> PageCount {
        let words = (0..).take(byte_count(self.pages) as usize / 8);
        PageCount::new(
            words
                .map(|index| u64::from(self.load_in_order(index).count_ones()))
                .sum(),
        )
    }

    /// Whether the page's bit is set; false beyond the last page.
    pub fn contains(&self, page: Pfn) -> bool {
        page.get() < self.pages.get()
            && self.load_in_order((page.get() / WORD_BITS) as usize) >> (page.get() % WORD_BITS) & 1
                == 1
    }

    /// Sleeps while the page's bit is set, until [`SharedBitmap::wake`] by anybody who has the bitmap, or for
    /// `limit`; it may be sooner.
    ///
    /// # Panics
    /// If the page is beyond the bitmap.
    pub fn wait_while_set(&self, page: Pfn, limit: Duration) {
        let half = self.half_of(page);
        let word = self.word((page.get() / WORD_BITS) as usize);
        let word = word.load(Ordering::SeqCst);
        if word >> (page.get() % WORD_BITS) & 1 == 0 {
            return;
        }
        let seen = (word >> (page.get() % WORD_BITS / HALF_BITS * HALF_BITS)) as u32;
        let limit = libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        // SAFETY: the word is valid as long as `self` lives, and the kernel reads it and the time. Whatever it
        // answers, the caller looks again.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                half,
                libc::FUTEX_WAIT,
                seen,
                &raw const limit,
            )
        };
    }

    /// Wakes all who wait for bits of pages of `range`.
    ///
    /// # Panics
    /// If the range ends beyond the bitmap.
    pub fn wake(&self, range: PageRange) {
        let halves = range.first.get() / HALF_BITS..range.end().get().div_ceil(HALF_BITS);
        for half in halves.filter(|_| range.count > PageCount::ZERO) {
            let half = self.half_of(Pfn::new(half * HALF_BITS));
            // SAFETY: the word is valid as long as `self` lives; the kernel takes its address only.
            unsafe { libc::syscall(libc::SYS_futex, half, libc::FUTEX_WAKE, i32::MAX) };
        }
    }

    /// Where the half of the word with the page's bit is, as futex(2) takes it.
    fn half_of(&self, page: Pfn) -> *mut u32 {
        assert!(page.get() < self.pages.get(), "a page of this bitmap");
        let half = self.mapping.at(page.get() / HALF_BITS * 4, 4);
        half.expect("a word of this bitmap").cast()
    }

    fn assert_writable(&self) {
        assert!(
            self.access == Access::ReadWrite,
            "the bitmap is mapped for writing"
        );
    }

    fn masks(&self, range: PageRange) -> impl Iterator<Item = (usize, u64)> + use<> {
        assert!(
            range.end().get() <= self.pages.get(),
            "range beyond the bitmap"
        );
        masks(range)
    }

    /// Copies the bits into `set`, which may be of a smaller guest.
    ///
    /// # Panics
    /// If the set is of a larger guest.
    pub fn copy_to(&self, set: &mut PageSet) {
        assert!(
            set.capacity() <= self.pages,
            "the bitmap covers every page of the set"
        );
        set.fill_words(|index| self.load(index));
    }

    /// Address of the word with the bit of page `first` and, from there, of `pages` bits, for the
    /// kernel to write or read.
    pub(crate) fn kernel_address(&self, first: u64, pages: u64) -> *mut u8 {
        assert!(
            self.access == Access::ReadWrite,
            "only the maker lends the bitmap to the kernel"
        );
        assert!(
            first.is_multiple_of(WORD_BITS),
            "a word starts at a multiple of 64 pages"
        );
        let bytes = usize::try_from(pages.div_ceil(WORD_BITS) * 8).expect("fits the address space");
        self.mapping
            .at(first / 8, bytes)
            .expect("within the bitmap")
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        let word = self
            .mapping
            .at(index as u64 * 8, 8)
            .expect("a word of this bitmap");
        // SAFETY: the word is valid and aligned as long as `self` lives, and everyone in this
        // process who accesses it while it is borrowed does so atomically (the kernel writes whole
        // words). A read-only mapping is only loaded from, which is a plain move on this processor.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }
}

/// Each word that a range touches, with the bits of its pages there.
pub(crate) fn masks(range: PageRange) -> impl Iterator<Item = (usize, u64)> + use<> {
    let (first, end) = (range.first.get(), range.end().get());
    let words = if first == end {
        0..0
    } else {
        first / WORD_BITS..end.div_ceil(WORD_BITS)
    };
    words.map(move |index| {
        let start = index * WORD_BITS;
        let (from, to) = (first.max(start) - start, end.min(start + WORD_BITS) - start);
        (index as usize, low_bits(to) & !low_bits(from))
    })
}

/// Adds the runs of pages whose bits are set in a word, joined to the last one if they touch it.
pub(crate) fn push_runs(runs: &mut Vec<PageRange>, index: usize, mut bits: u64) {
    while bits != 0 {
        let from = bits.trailing_zeros();
        let len = (bits >> from).trailing_ones();
        bits &= !(low_bits(u64::from(len)) << from);
        let first = Pfn::new(index as u64 * WORD_BITS + u64::from(from));
        let count = PageCount::new(u64::from(len));
        match runs.last_mut().filter(|last| last.end() == first) {
            Some(last) => last.count = last.count.saturating_add(count),
            None => runs.push(PageRange::new(first, count)),
        }
    }
}

const fn low_bits(count: u64) -> u64 {
    match count {
        0..WORD_BITS => (1 << count) - 1,
        _ => u64::MAX,
    }
}

fn byte_count(pages: PageCount) -> u64 {
    pages.get().div_ceil(WORD_BITS) * 8
}

fn map(file: BorrowedFd<'_>, bytes: u64, access: Access) -> io::Result<Mapping> {
    let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    debug_assert!(file.as_raw_fd() >= 0);
    Mapping::new(file, len, access, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::Pfn;

    #[test]
    fn a_reader_sees_the_makers_bits_and_can_change_none() {
        let pages = PageCount::new(130);
        let made = SharedBitmap::create(pages).unwrap();
        let read = SharedBitmap::open(made.file().try_clone_to_owned().unwrap(), pages).unwrap();
        made.set_bits(0, 1 << 3);
        made.set_bits(2, 0b110);
        let mut set = PageSet::empty(pages);
        read.copy_to(&mut set);
        assert_eq!(set.iter().map(Pfn::get).collect::<Vec<_>>(), [3, 129]);
        assert_eq!(read.load(2), 0b110);
        assert!(Mapping::new(read.file(), 16, Access::ReadWrite, 0).is_err());
        assert!(
            File::from(read.file().try_clone_to_owned().unwrap())
                .set_len(0)
                .is_err()
        );
    }

    #[test]
    fn a_writable_bitmap_is_written_by_both() {
        let pages = PageCount::new(200);
        let made = SharedBitmap::create_writable(pages).unwrap();
        let file = || made.file().try_clone_to_owned().unwrap();
        let other = SharedBitmap::open_writable(file(), pages).unwrap();
        let range = |from, to| PageRange::new(Pfn::new(from), PageCount::new(to - from));
        let check = |expect: &str| {
            let text: Vec<String> = made
                .runs_in(range(0, 200))
                .iter()
                .map(|run| format!("{}+{}", run.first.get(), run.count.get()))
                .collect();
            assert_eq!(text.join(" "), expect);
            assert_eq!(made.count(), other.count());
        };
        assert_eq!(other.put_range(range(60, 140)), PageCount::new(80));
        assert_eq!(made.put_range(range(139, 142)), PageCount::new(2));
        check("60+82");
        assert_eq!(made.take_range(range(64, 128)), PageCount::new(64));
        assert_eq!(other.take_range(range(63, 65)), PageCount::new(1));
        assert_eq!(other.put_range(range(199, 200)), PageCount::new(1));
        check("60+3 128+14 199+1");
        assert_eq!(
            made.runs_in(range(62, 129)),
            [range(62, 63), range(128, 129)]
        );
        assert_eq!(made.runs_in(range(5, 5)), []);
        assert!(other.contains(Pfn::new(60)) && !other.contains(Pfn::new(200)));
        made.set_bits(3, u64::MAX);
        assert_eq!(other.load_in_order(3), 0xff);
        let sealed = SharedBitmap::create(pages).unwrap();
        let sealed = sealed.file().try_clone_to_owned().unwrap();
        assert!(SharedBitmap::open_writable(sealed, pages).is_err());
    }

    #[test]
    fn short_and_unsealed_bitmaps_are_refused() {
        let made = SharedBitmap::create(PageCount::new(64)).unwrap();
        let file = || made.file().try_clone_to_owned().unwrap();
        let error = SharedBitmap::open(file(), PageCount::new(65)).unwrap_err();
        assert_eq!(error.to_string(), "the bitmap has 8 bytes, 16 are needed");
        let unsealed = create_file(c"test", 0).unwrap();
        let error = SharedBitmap::open(unsealed, PageCount::new(64)).unwrap_err();
        assert!(error.to_string().contains("not sealed"), "{error}");
    }
}
