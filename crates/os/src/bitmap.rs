//! The dirty bitmap that a VM process shares with its daemon.
//!
//! A memory file of 64-bit words in KVM's order. Its maker has the only writable mapping: the file is
//! sealed against new ones, so a reader cannot change what KVM is later told to clear. The reader
//! checks seals and size before it maps; what it reads is input like any other.

use crate::mapping::{Access, Mapping};
use crate::memory::{MemoryError, add_seals, check_seals, create_file};
use limosa_pages::{PageCount, PageSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

const WORD_BITS: u64 = u64::BITS as u64;

/// Seals of a bitmap: those of memory, and nobody maps it writable any more. `F_SEAL_FUTURE_WRITE`.
const SEALS: i32 =
    libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;

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
    #[error("the dirty bitmap has {bytes} bytes, {needed} are needed")]
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
        let call = |action| move |source| MemoryError::Call { action, source };
        let bytes = byte_count(pages);
        let file = File::from(create_file(c"dirty-bitmap", 0)?);
        file.set_len(bytes).map_err(call("size"))?;
        let mapping = map(file.as_fd(), bytes, Access::ReadWrite).map_err(call("map"))?;
        add_seals(file.as_fd(), SEALS)?;
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
        let call = |action| move |source| MemoryError::Call { action, source };
        check_seals(file.as_fd())?;
        let file = File::from(file);
        let bytes = file.metadata().map_err(call("inspect"))?.len();
        let needed = byte_count(pages);
        if bytes < needed {
            return Err(BitmapError::Short { bytes, needed });
        }
        let mapping = map(file.as_fd(), needed, Access::Read).map_err(call("map"))?;
        Ok(Self {
            file,
            mapping,
            pages,
            access: Access::Read,
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
        assert!(
            self.access == Access::ReadWrite,
            "only the maker writes the bitmap"
        );
        self.word(index).fetch_or(bits, Ordering::Relaxed);
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
    fn short_and_unsealed_bitmaps_are_refused() {
        let made = SharedBitmap::create(PageCount::new(64)).unwrap();
        let file = || made.file().try_clone_to_owned().unwrap();
        let error = SharedBitmap::open(file(), PageCount::new(65)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the dirty bitmap has 8 bytes, 16 are needed"
        );
        let unsealed = create_file(c"test", 0).unwrap();
        let error = SharedBitmap::open(unsealed, PageCount::new(64)).unwrap_err();
        assert!(error.to_string().contains("not sealed"), "{error}");
    }
}
