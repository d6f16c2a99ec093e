//! Guest memory: a sealed memory file and its mapping into this process.
//!
//! The VM process makes the file and lends it to the daemon. Both write and read it while the guest
//! does the same, so its bytes are never a Rust reference: they are copied by address, or the kernel
//! is told the address. A torn read is harmless, since whatever was written during the read is
//! dirty again and read once more.
//!
//! Invariants: the file can neither shrink nor grow (sealed, checked before mapping), so a mapping
//! never ends before its length and an access within it cannot raise `SIGBUS`; huge pages are
//! reserved when the file is mapped, for the same reason. Untouched memory stays a hole until
//! somebody reads or writes it by a mapping: ask [`SharedMemory::data_extents`] first.

mod existing;
mod extents;
mod folios;
mod reclaim;
mod transfer;
mod view;
mod warm;

use crate::mapping::{Access, Mapping};
use limosa_pages::{ByteCount, PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, Pfn};
use std::arch::x86_64::{
    _mm_cmpeq_epi8, _mm_load_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_64;

pub use existing::ExistingPages;
pub use folios::chosen_word;
pub use reclaim::{HoldOff, Reclaim};
pub use view::{GuestView, ViewPart, view};
pub use warm::warm_free_memory;

/// Bytes in a huge page.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Seals without which a file is not mapped: it can neither shrink nor grow, and nobody can undo that.
const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// What pages back the memory on the host. The guest sees no difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Pages of 4 KiB.
    Small,
    /// Huge pages of 2 MiB, which the operator has to reserve.
    Huge,
}

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is no positive multiple of the page size, or too large for this process.
    #[error("memory of {bytes} bytes is no positive multiple of {unit} bytes")]
    BadSize {
        /// What was asked for.
        bytes: u64,
        /// What it has to be a multiple of.
        unit: u64,
    },
    /// Too few huge pages are free.
    #[error(
        "{needed} huge pages of 2 MiB are needed and not free: raise /proc/sys/vm/nr_hugepages, or run without huge pages"
    )]
    NoHugePages {
        /// How many.
        needed: u64,
    },
    /// Somebody offered a file that could shrink under the mapping.
    #[error("the memory file is not sealed against resizing (seals {seals:#x})")]
    NotSealed {
        /// The seals that it has.
        seals: i32,
    },
    /// The kernel refused.
    #[error("cannot {action} guest memory")]
    Call {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl MemoryError {
    fn last(action: &'static str) -> Self {
        Self::Call {
            action,
            source: io::Error::last_os_error(),
        }
    }
}

/// A guest's memory, mapped into this process.
#[derive(Debug)]
pub struct SharedMemory {
    file: File,
    mapping: Mapping,
    kind: PageKind,
}

impl SharedMemory {
    /// Makes a sealed memory file of `size` bytes, all zero, and maps it.
    ///
    /// # Errors
    /// The size does not fit the kind of page, there are too few huge pages, or the kernel refuses.
    pub fn create(size: ByteCount, kind: PageKind) -> Result<Self, MemoryError> {
        let unit = kind.bytes();
        let bytes = size.get();
        let length = libc::off_t::try_from(bytes)
            .ok()
            .filter(|_| bytes > 0 && bytes.is_multiple_of(unit));
        let Some(length) = length else {
            return Err(MemoryError::BadSize { bytes, unit });
        };
        let flags = match kind {
            PageKind::Small => 0,
            PageKind::Huge => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        };
        let file = create_file(c"guest-memory", flags)?;
        // SAFETY: the descriptor is open; the call touches no memory of this process.
        if unsafe { libc::ftruncate(file.as_raw_fd(), length) } != 0 {
            return Err(MemoryError::last("size"));
        }
        add_seals(file.as_fd(), SEALS)?;
        Self::open(file)
    }

    /// Maps a memory file that somebody else made, after checking that it cannot be resized.
    ///
    /// # Errors
    /// It is not sealed, is empty, or cannot be mapped.
    pub fn open(file: OwnedFd) -> Result<Self, MemoryError> {
        check_seals(file.as_fd())?;
        let file = File::from(file);
        let status = file.metadata().map_err(|source| MemoryError::Call {
            action: "inspect",
            source,
        })?;
        let kind = kind_of(&file)?;
        let (bytes, unit) = (status.size(), kind.bytes());
        let length = usize::try_from(bytes)
            .ok()
            .filter(|_| bytes > 0 && bytes.is_multiple_of(unit));
        let length = length.ok_or(MemoryError::BadSize { bytes, unit })?;
        let flags = match kind {
            // Memory is overcommitted on purpose: a guest may never touch most of it.
            PageKind::Small => libc::MAP_NORESERVE,
            // Without a reservation a fault on an exhausted pool would be a SIGBUS.
            PageKind::Huge => 0,
        };
        match Mapping::new(file.as_fd(), length, Access::ReadWrite, flags) {
            Ok(mapping) => Ok(Self {
                file,
                mapping,
                kind,
            }),
            Err(error) if kind == PageKind::Huge && error.raw_os_error() == Some(libc::ENOMEM) => {
                Err(MemoryError::NoHugePages {
                    needed: bytes / unit,
                })
            }
            Err(source) => Err(MemoryError::Call {
                action: "map",
                source,
            }),
        }
    }

    /// From now on what this mapping makes is single pages, also where the host backs shared memory by
    /// transparent huge pages (`shmem_enabled`). For whoever writes pages beside such as are missing:
    /// a page that came would bring its neighbours into being, as zeros, and a guest that misses
    /// them would read those. A mapping on which missing pages are reported needs no such care.
    pub fn make_single_pages(&self) {
        if self.kind == PageKind::Huge {
            return;
        }
        let (Ok(start), len) = (self.mapping.at(0, 0), self.mapping.len()) else {
            return;
        };
        // SAFETY: the range is the mapping; the advice changes no content. A kernel that does not
        // know it has no such pages.
        let _unknown = unsafe { libc::madvise(start.cast(), len, libc::MADV_NOHUGEPAGE) };
    }

    /// The memory file, to be lent to another process.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What pages back it.
    pub const fn kind(&self) -> PageKind {
        self.kind
    }

    /// Its size.
    pub const fn size(&self) -> ByteCount {
        ByteCount::new(self.mapping.len() as u64)
    }

    /// Its size in pages of 4 KiB.
    pub const fn page_count(&self) -> PageCount {
        PageCount::new(self.mapping.len() as u64 / PAGE_SIZE)
    }

    /// Copies `into.len()` bytes at `offset` out.
    ///
    /// # Errors
    /// `InvalidInput` if they do not lie within the memory.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = self.mapping.at(offset, into.len())?;
        // SAFETY: `from` is valid for the length, as `at` checked; `into` is private, so the two do
        // not overlap. The guest may write meanwhile: bytes have no invalid values, and the copy is
        // opaque to the compiler, which cannot read `from` a second time behind our back.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes out of the memory file without touching the mapping: a page that does not exist
    /// reads as zeros and still does not exist afterwards.
    ///
    /// # Errors
    /// `InvalidInput` if they do not lie within the memory, or the kernel refuses.
    pub fn read_file_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.mapping.at(offset, into.len())?;
        self.file.read_exact_at(into, offset)
    }

    /// Copies bytes in at `offset`.
    ///
    /// # Errors
    /// `InvalidInput` if they do not fit into the memory there.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.mapping.at(offset, bytes.len())?;
        // SAFETY: as in `read_at`, with the roles exchanged.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// How many pages a write to the memory file may make at once where there are none, all but those
    /// that are written as zeros. `None` if such a file cannot be written.
    pub fn write_unit(&self) -> Option<PageCount> {
        match self.kind {
            PageKind::Huge => None,
            PageKind::Small if folios::may_be_large() => {
                Some(PageCount::new(HUGE_PAGE_BYTES / PAGE_SIZE))
            }
            PageKind::Small => Some(PageCount::new(1)),
        }
    }

    /// Copies bytes into the memory file without touching the mapping. For pages that do not exist
    /// this is the fastest way: the kernel makes each without zeroing it first and without a fault.
    /// Where missing pages matter, ask [`SharedMemory::write_unit`] first.
    ///
    /// # Errors
    /// `InvalidInput` if they do not fit into the memory there; the kernel refuses, as it does for
    /// huge pages.
    pub fn write_file_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.mapping.at(offset, bytes.len())?;
        self.file.write_all_at(bytes, offset)
    }

    /// Copies one page out.
    ///
    /// # Panics
    /// If the page is not one of this memory.
    pub fn read_page(&self, page: Pfn, into: &mut [u8; PAGE_SIZE_USIZE]) {
        self.read_at(page.file_offset(), into)
            .expect("a page of this memory");
    }

    /// The aligned word of eight bytes at `offset`, never torn.
    ///
    /// # Errors
    /// `InvalidInput` if it is not aligned or not within the memory.
    pub fn read_word(&self, offset: u64) -> io::Result<u64> {
        if !offset.is_multiple_of(8) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not aligned"));
        }
        let word = self.mapping.at(offset, 8)?.cast::<u64>();
        // SAFETY: `word` is valid and aligned, since the mapping begins at a page.
        Ok(u64::from_le(unsafe { word.read_volatile() }))
    }

    /// True if all bytes of the page are zero. Reading a hole allocates it in small-page memory.
    ///
    /// # Panics
    /// If the page is not one of this memory.
    pub fn is_zero(&self, page: Pfn) -> bool {
        const LANES: usize = PAGE_SIZE_USIZE / 64;
        let start = self
            .mapping
            .at(page.file_offset(), PAGE_SIZE_USIZE)
            .expect("a page of this memory");
        // SAFETY: the page is valid and 16-byte aligned in each of its 256 parts; SSE2 is part of
        // x86-64. Bytes that change meanwhile give one answer or the other, both of which were true.
        unsafe {
            let start = start.cast_const().cast::<std::arch::x86_64::__m128i>();
            let zero = _mm_setzero_si128();
            (0..LANES).all(|lane| {
                let at = start.add(lane * 4);
                let left = _mm_or_si128(_mm_load_si128(at), _mm_load_si128(at.add(1)));
                let right = _mm_or_si128(_mm_load_si128(at.add(2)), _mm_load_si128(at.add(3)));
                _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_or_si128(left, right), zero)) == 0xffff
            })
        }
    }

    /// The 64-bit XXH3 of the page as it is now. It is hashed from a private copy, so that the
    /// answer is the hash of bytes that were there, even if they change meanwhile.
    ///
    /// # Panics
    /// If the page is not one of this memory.
    pub fn hash(&self, page: Pfn) -> u64 {
        let mut copy = [0; PAGE_SIZE_USIZE];
        self.read_page(page, &mut copy);
        xxh3_64(&copy)
    }

    /// Makes all pages of `range` exist and maps them writable here, so that later writes do not
    /// fault. Costs about 1.9 µs a small page; may be called by several threads at once.
    ///
    /// # Errors
    /// The range is not within the memory, or the kernel is out of memory.
    pub fn populate(&self, range: PageRange) -> io::Result<()> {
        // A huge page is populated as a whole, whatever part of it is meant.
        let unit = self.kind.bytes();
        let first = range.first.file_offset() / unit * unit;
        let end = range.end().file_offset().next_multiple_of(unit);
        let len = usize::try_from(end - first).map_err(|_| io::ErrorKind::InvalidInput)?;
        let start = self.mapping.at(first, len)?;
        loop {
            // SAFETY: the range lies within the mapping; populating changes no content.
            if unsafe { libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                return Err(error);
            }
        }
    }

    /// Takes the content of whole pages away, in every mapping, in one call. Only small pages: of
    /// huge ones, only those that lie completely within the range lose theirs.
    ///
    /// A transparent huge page is split first. Where the kernel cannot do that at the moment, since
    /// somebody holds the page, it leaves zeros and no hole, and says nothing; here that is
    /// `ResourceBusy`.
    pub(crate) fn punch(&self, range: PageRange) -> io::Result<()> {
        const ATTEMPTS: u32 = 5;
        // To take nothing away costs every mapping of it as much as to take something.
        if self.kind == PageKind::Small && !self.has_data(range)? {
            return Ok(());
        }
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(Duration::from_micros(100));
            }
            self.punch_once(range)?;
            if self.kind == PageKind::Huge || !self.has_data(range)? {
                return Ok(());
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// The same in one attempt, which may leave zeros and no hole.
    fn punch_once(&self, range: PageRange) -> io::Result<()> {
        let (first, end) = (range.first.file_offset(), range.end().file_offset());
        if end > self.size().get() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let offset = |bytes| libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput);
        let (first, len) = (offset(first)?, offset(end - first)?);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open; guest memory is never a reference, so its content may
        // change.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, first, len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Takes all pages out of this mapping and leaves their content in the file.
    pub(crate) fn unmap_pages(&self) -> io::Result<()> {
        let (start, len) = (self.mapping.at(0, 0)?, self.mapping.len());
        // SAFETY: the range is the mapping, which is shared, so that nothing is lost: the next
        // access finds the file's content.
        if unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The address at which KVM is told to find the memory.
    pub(crate) fn host_address(&self, offset: u64, len: usize) -> io::Result<u64> {
        Ok(self.mapping.at(offset, len)?.addr() as u64)
    }
}

impl PageKind {
    /// Bytes of one such page.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => PAGE_SIZE,
            Self::Huge => HUGE_PAGE_BYTES,
        }
    }
}

/// What backs a memory file. Its block size does not tell: where transparent huge pages are possible,
/// it is theirs.
fn kind_of(file: &File) -> Result<PageKind, MemoryError> {
    // SAFETY: a record of integers, which may all be zero.
    let mut system: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the kernel writes one such record.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut system) } != 0 {
        return Err(MemoryError::last("inspect"));
    }
    let is_huge = system.f_type == libc::HUGETLBFS_MAGIC
        && u64::try_from(system.f_bsize).is_ok_and(|bytes| bytes == HUGE_PAGE_BYTES);
    Ok(if is_huge {
        PageKind::Huge
    } else {
        PageKind::Small
    })
}

/// Makes an unsealed memory file.
pub(crate) fn create_file(name: &CStr, flags: u32) -> Result<OwnedFd, MemoryError> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags;
    // SAFETY: `name` is a string with its end.
    let file = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if file < 0 {
        return Err(MemoryError::last("create"));
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

/// Adds seals, which nobody can take away again.
pub(crate) fn add_seals(file: BorrowedFd<'_>, seals: i32) -> Result<(), MemoryError> {
    // SAFETY: the descriptor is open; the call touches no memory of this process.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(MemoryError::last("seal"));
    }
    Ok(())
}

/// Checks that a file cannot be resized.
pub(crate) fn check_seals(file: BorrowedFd<'_>) -> Result<(), MemoryError> {
    // SAFETY: the descriptor is open; the call touches no memory of this process. Files that know
    // no seals answer with an error, which is no seal.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & SEALS != SEALS {
        return Err(MemoryError::NotSealed {
            seals: seals.max(0),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn small(pages: u64) -> SharedMemory {
        let size = ByteCount::new(pages * PAGE_SIZE);
        let memory = SharedMemory::create(size, PageKind::Small).unwrap();
        memory.make_single_pages();
        memory
    }

    #[test]
    fn bytes_come_back_and_bounds_hold() {
        let memory = small(3);
        memory.write_at(4090, b"across a page").unwrap();
        let mut back = [0; 13];
        memory.read_at(4090, &mut back).unwrap();
        assert_eq!(&back, b"across a page");
        let end = 3 * PAGE_SIZE;
        for (offset, len, fits) in [
            (0, 12288, true),
            (end, 0, true),
            (end - 1, 2, false),
            (u64::MAX, 1, false),
        ] {
            assert_eq!(
                memory.read_at(offset, &mut vec![0; len]).is_ok(),
                fits,
                "{offset} {len}"
            );
            assert_eq!(
                memory.write_at(offset, &vec![0; len]).is_ok(),
                fits,
                "{offset} {len}"
            );
        }
        memory.write_at(8, &7u64.to_le_bytes()).unwrap();
        assert_eq!(memory.read_word(8).unwrap(), 7);
        assert!(memory.read_word(9).is_err());
        assert!(memory.read_word(end).is_err());
    }

    #[test]
    fn zero_pages_are_told_by_every_byte() {
        let memory = small(2);
        let page = Pfn::new(1);
        assert!(memory.is_zero(page));
        let empty = memory.hash(page);
        for at in [0, 1, 15, 16, 63, 64, 2048, 4095] {
            memory.write_at(PAGE_SIZE + at, &[1]).unwrap();
            assert!(!memory.is_zero(page), "{at}");
            assert_ne!(memory.hash(page), empty);
            memory.write_at(PAGE_SIZE + at, &[0]).unwrap();
        }
        assert!(memory.is_zero(page));
        assert_eq!(memory.hash(page), xxh3_64(&[0; PAGE_SIZE_USIZE]));
    }

    #[test]
    fn reading_the_file_makes_no_page() {
        let memory = small(4);
        memory.write_at(PAGE_SIZE, b"x").unwrap();
        let mut bytes = [7; 3 * PAGE_SIZE_USIZE];
        memory.read_file_at(0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[PAGE_SIZE_USIZE]), (0, b'x'));
        let all = PageRange::new(Pfn::new(0), PageCount::new(4));
        let one = PageRange::new(Pfn::new(1), PageCount::new(1));
        assert_eq!(memory.data_extents(all).unwrap(), [one]);
        assert!(memory.read_file_at(2 * PAGE_SIZE, &mut bytes).is_err());
        assert!(memory.write_file_at(2 * PAGE_SIZE, &bytes).is_err());
        memory.write_file_at(2 * PAGE_SIZE, b"y").unwrap();
        memory.read_at(2 * PAGE_SIZE, &mut bytes[..2]).unwrap();
        assert_eq!(bytes[..2], *b"y\0");
        memory
            .punch(PageRange::new(Pfn::new(2), one.count))
            .unwrap();
        memory.punch(one).unwrap();
        assert_eq!(memory.data_extents(all).unwrap(), []);
        assert!(
            memory
                .punch(PageRange::new(Pfn::new(1), all.count))
                .is_err()
        );
    }

    /// Has the kernel make one transparent huge page of the first 2 MiB; false if it does not.
    fn collapse(memory: &SharedMemory) -> bool {
        let start = memory.mapping.at(0, HUGE_PAGE_BYTES as usize).unwrap();
        // SAFETY: the range lies within the mapping; its content stays.
        unsafe { libc::madvise(start.cast(), HUGE_PAGE_BYTES as usize, libc::MADV_COLLAPSE) == 0 }
    }

    #[test]
    fn pages_are_taken_out_of_a_transparent_huge_page_or_it_is_said() {
        let memory = small(1024);
        let pages = |first, count| PageRange::new(Pfn::new(first), PageCount::new(count));
        memory.write_at(7 * PAGE_SIZE, b"x").unwrap();
        if !collapse(&memory) {
            return println!("skipped: {}", io::Error::last_os_error());
        }
        assert_eq!(
            memory.data_extents(pages(0, 1024)).unwrap(),
            [pages(0, 512)]
        );
        // A pipe that holds one of its pages keeps the kernel from splitting it.
        let (mut reader, writer) = io::pipe().unwrap();
        let mut offset = 7 * PAGE_SIZE as i64;
        // SAFETY: both descriptors are open, and `offset` outlives the call.
        let spliced = unsafe {
            let (from, to) = (memory.file().as_raw_fd(), writer.as_raw_fd());
            libc::splice(from, &raw mut offset, to, std::ptr::null_mut(), 4096, 0)
        };
        assert_eq!(spliced, 4096);
        let held = memory.punch(pages(20, 3)).unwrap_err();
        assert_eq!(held.kind(), io::ErrorKind::ResourceBusy);
        reader.read_exact(&mut [0; 4096]).unwrap();
        memory.punch(pages(20, 3)).unwrap();
        let left = [pages(0, 20), pages(23, 489)];
        assert_eq!(memory.data_extents(pages(0, 1024)).unwrap(), left);
        assert!(!memory.is_zero(Pfn::new(7)));
    }

    #[test]
    fn another_mapping_sees_the_same_bytes() {
        let memory = small(2);
        let other = SharedMemory::open(memory.file().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(
            (other.page_count(), other.kind()),
            (PageCount::new(2), PageKind::Small)
        );
        memory.write_at(5000, b"x").unwrap();
        assert!(!other.is_zero(Pfn::new(1)));
        other
            .populate(PageRange::new(Pfn::new(0), PageCount::new(2)))
            .unwrap();
        assert!(
            other
                .populate(PageRange::new(Pfn::new(1), PageCount::new(2)))
                .is_err()
        );
    }

    #[test]
    fn files_that_could_shrink_are_refused() {
        let refused = |seals: i32| {
            let file = create_file(c"test", 0).unwrap();
            // SAFETY: the descriptor is open.
            assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), 8192) }, 0);
            if seals != 0 {
                add_seals(file.as_fd(), seals).unwrap();
            }
            SharedMemory::open(file).unwrap_err().to_string()
        };
        let expect = "the memory file is not sealed against resizing";
        assert!(refused(0).starts_with(expect));
        assert!(refused(libc::F_SEAL_SHRINK).starts_with(expect));
        assert!(refused(libc::F_SEAL_SHRINK | libc::F_SEAL_GROW).starts_with(expect));
        let ordinary = tempfile::tempfile().unwrap();
        ordinary.set_len(8192).unwrap();
        assert!(
            SharedMemory::open(ordinary.into())
                .unwrap_err()
                .to_string()
                .starts_with(expect)
        );
    }

    #[test]
    fn sizes_that_are_no_pages_are_refused() {
        for (bytes, kind) in [
            (0, PageKind::Small),
            (4097, PageKind::Small),
            (4096, PageKind::Huge),
        ] {
            let error = SharedMemory::create(ByteCount::new(bytes), kind).unwrap_err();
            assert!(matches!(error, MemoryError::BadSize { .. }), "{error}");
        }
        let much = SharedMemory::create(ByteCount::new(1 << 45), PageKind::Huge).unwrap_err();
        assert!(
            matches!(much, MemoryError::NoHugePages { needed: 0x100_0000 }),
            "{much}"
        );
    }
}
