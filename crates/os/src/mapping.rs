//! A mapping that is unmapped when dropped: of a file, shared, or of private memory. Bounds are checked here, once.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};

/// Bytes in this process's address space.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

/// How a mapping may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    ReadWrite,
}

impl Mapping {
    /// Maps the first `len` bytes of a file. `flags` are added to `MAP_SHARED`.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        len: usize,
        access: Access,
        flags: i32,
    ) -> io::Result<Self> {
        Self::map(len, access, libc::MAP_SHARED | flags, file.as_raw_fd(), 0)
    }

    /// Maps `len` bytes of a file from `offset` on, a multiple of the page size, shared.
    pub(crate) fn at_offset(
        file: BorrowedFd<'_>,
        offset: libc::off_t,
        len: usize,
        access: Access,
    ) -> io::Result<Self> {
        Self::map(len, access, libc::MAP_SHARED, file.as_raw_fd(), offset)
    }

    /// Maps `len` bytes of private memory that no file backs.
    pub(crate) fn private(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(len, Access::ReadWrite, flags, -1, 0)
    }

    fn map(
        len: usize,
        access: Access,
        flags: i32,
        file: RawFd,
        offset: libc::off_t,
    ) -> io::Result<Self> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory that anyone
        // uses.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, file, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).expect("the kernel never maps at zero by itself");
        Ok(Self { start, len })
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Address of `len` bytes at `offset`.
    ///
    /// # Errors
    /// `InvalidInput` if they do not all lie within the mapping.
    pub(crate) fn at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        let fits = usize::try_from(offset)
            .ok()
            .filter(|start| start.checked_add(len).is_some_and(|end| end <= self.len));
        let Some(offset) = fits else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the memory",
            ));
        };
        // SAFETY: `offset` lies within the mapping, as was just checked.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and nobody can hold an address in it any more:
        // addresses are only used while `self` is borrowed.
        let failed = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) } != 0;
        debug_assert!(!failed, "the range was mapped");
    }
}

// SAFETY: the mapping is plain memory, valid in all threads; whoever accesses it through the
// addresses answers for data races there.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}
