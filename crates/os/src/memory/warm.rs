//! Free memory that is at hand, for whoever measures.

use crate::mapping::Mapping;
use limosa_pages::ByteCount;
use std::io;

/// Touches `size` bytes of free memory and gives them back.
///
/// A virtual machine whose own host takes back what is free (free page reporting) pays for the first
/// use of each page with a fault out there, ten times what its own kernel needs. A measurement
/// right after this pays its own kernel only.
///
/// # Errors
/// So much memory is not free, or the kernel refuses.
pub fn warm_free_memory(size: ByteCount) -> io::Result<()> {
    let length = usize::try_from(size.get()).map_err(|_| io::ErrorKind::InvalidInput)?;
    if length == 0 {
        return Ok(());
    }
    let memory = Mapping::private(length)?;
    // In huge pages it is a matter of tenths of a second; without them of seconds.
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE] {
        let start = memory.at(0, length)?;
        // SAFETY: the range is the mapping, which holds nothing and which nobody else knows.
        if unsafe { libc::madvise(start.cast(), length, advice) } != 0 {
            let error = io::Error::last_os_error();
            // A kernel may be built without transparent huge pages.
            if advice == libc::MADV_POPULATE_WRITE || error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_touched_and_given_back() {
        for size in [0, 1, 4 << 20] {
            warm_free_memory(ByteCount::new(size)).unwrap();
        }
        assert!(warm_free_memory(ByteCount::new(1 << 60)).is_err());
    }
}
