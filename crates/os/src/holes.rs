//! Where a file has data and where it has holes, as its file system tells (lseek(2)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The next data, or the next hole, from `offset` on; `None` if there is no more of it. Moves the file's position,
/// so it is for files whose position nobody uses.
pub(crate) fn seek(
    file: BorrowedFd<'_>,
    offset: u64,
    whence: libc::c_int,
) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open; the call touches no memory of this process.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}
