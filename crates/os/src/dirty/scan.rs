//! `PAGEMAP_SCAN` (Linux 6.7, `Documentation/admin-guide/mm/pagemap.rst`): finds pages in the page tables
//! of a process and protects them against unnoticed writes in the same step, page by page.

use limosa_pages::{PAGE_SIZE, PageCount, PageRange, Pfn};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Runs of pages that one call tells.
const RUNS: usize = 2048;

/// `PAGEMAP_SCAN`: 'f', 16, both ways.
const PAGEMAP_SCAN: libc::Ioctl =
    (3 << 30 | (size_of::<Scan>() as u64) << 16 | (b'f' as u64) << 8 | 16) as libc::Ioctl;
/// Protect what matches.
const SCAN_PROTECTS: u64 = 1;
/// Refuse memory that is not registered.
const SCAN_CHECKS: u64 = 2;
const IS_WRITTEN: u64 = 1 << 1;
const IS_PRESENT: u64 = 1 << 3;

#[derive(Default)]
#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    runs: u64,
    runs_max: u64,
    pages_max: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    told: u64,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Run {
    start: u64,
    end: u64,
    categories: u64,
}

/// Which pages are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that are there.
    Present,
    /// Those that were written since they were protected, or were never protected.
    Written,
}

/// Finds pages among `addresses` of the process whose pagemap this is, protects them, and tells runs of
/// them, counted from the first address.
///
/// # Errors
/// The memory is not registered for asynchronous write protection, or this user may not.
pub fn protect(
    pagemap: &File,
    addresses: Range<u64>,
    which: Which,
    mut tell: impl FnMut(PageRange),
) -> io::Result<()> {
    let category = match which {
        Which::Present => IS_PRESENT,
        Which::Written => IS_WRITTEN,
    };
    let mut runs = [Run::default(); RUNS];
    let mut start = addresses.start;
    while start < addresses.end {
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: SCAN_PROTECTS | SCAN_CHECKS,
            start,
            end: addresses.end,
            runs: runs.as_mut_ptr().addr() as u64,
            runs_max: RUNS as u64,
            all_of: category,
            told: category,
            ..Scan::default()
        };
        // SAFETY: the structure is the one of this request, the kernel writes at most as many runs as
        // there is room for, and protection changes no content: it is lifted at the next write, since
        // memory that is registered otherwise is refused.
        let told = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
        let Ok(told) = usize::try_from(told) else {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            }
        };
        for run in &runs[..told] {
            let first = Pfn::new((run.start - addresses.start) / PAGE_SIZE);
            let count = PageCount::new((run.end - run.start) / PAGE_SIZE);
            tell(PageRange::new(first, count));
        }
        start = scan.walk_end;
    }
    Ok(())
}
