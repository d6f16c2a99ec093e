//! Disks of guests: raw files and block devices.
//!
//! They are opened past the page cache (`O_DIRECT`) where the file system lets one: two hosts that
//! share a disk would otherwise each believe their own cache. Who writes a disk holds a lock on it (an
//! open-file-description lock, fcntl(2)), so that no two guests write the same one; it is given up while
//! the guest is stopped, and so goes over to whoever runs the guest next. [`DiskQueue`] has several
//! operations under way at a time.

pub(crate) mod bits;
pub mod missing;
mod queue;

use crate::holes;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use queue::{Action, Completed, DiskQueue, Way};

/// Bytes of a sector: what offsets and sizes are multiples of.
pub const SECTOR_BYTES: u64 = 512;
/// Where buffers begin that are read and written past the page cache.
const ALIGNMENT: usize = 4096;

/// A disk that is open.
#[derive(Debug)]
pub struct Disk {
    file: File,
    bytes: u64,
    is_read_only: bool,
}

/// Memory from which disks are written and into which they are read.
#[derive(Debug)]
pub struct DiskBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl DiskBuffer {
    /// A buffer of that size, all zero.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start, len }
    }

    /// Its bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl Disk {
    /// Opens the disk. Nobody is kept from using it: see [`Disk::lock`].
    ///
    /// # Errors
    /// It is not there, may not be opened, is neither a file nor a block device, or is no multiple of
    /// [`SECTOR_BYTES`].
    pub fn open(path: &Path, is_read_only: bool) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a file nor a block device",
            ));
        }
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!is_read_only)
                .custom_flags(flags)
                .open(path)
        };
        let mut file = match open(libc::O_DIRECT) {
            Ok(file) if reads_sectors(&file) => file,
            // No such thing on this file system, or only with larger sectors.
            Ok(_) => open(0)?,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0)?,
            Err(error) => return Err(error),
        };
        let bytes = file.seek(SeekFrom::End(0))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("its size of {bytes} bytes is no multiple of {SECTOR_BYTES}"),
            ));
        }
        Ok(Self {
            file,
            bytes,
            is_read_only,
        })
    }

    /// Opens a disk anew that somebody else has open: the same file, whatever its path names by now, with a
    /// lock of its own.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open_again(file: BorrowedFd<'_>, is_read_only: bool) -> io::Result<Self> {
        Self::open(&link(file), is_read_only)
    }

    /// Where its file is, for messages; empty if that cannot be told.
    pub fn path(&self) -> PathBuf {
        std::fs::read_link(link(self.file())).unwrap_or_default()
    }

    /// The file, for [`Disk::open_again`] by another process.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its size.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nobody writes it by this.
    pub const fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Reads whole sectors.
    ///
    /// # Errors
    /// They are not there, or the disk is at fault.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Writes whole sectors.
    ///
    /// # Errors
    /// The disk is full or at fault.
    pub fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    /// Returns when what was written will outlive a loss of power.
    ///
    /// # Errors
    /// It will not.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The parts between `from` and `to` that were ever written, as beginning and end in bytes, ascending, as
    /// far as its file system knows; all else reads as zeroes. `to` is at most the disk's size.
    ///
    /// # Errors
    /// The disk is at fault.
    pub fn data_extents(&self, from: u64, to: u64) -> io::Result<Vec<(u64, u64)>> {
        let mut extents = Vec::new();
        let mut next = from;
        while next < to {
            let Some(data) = self.seek(next, libc::SEEK_DATA)?.filter(|&data| data < to) else {
                break;
            };
            let hole = self.seek(data, libc::SEEK_HOLE)?.unwrap_or(to).min(to);
            extents.push((data, hole));
            next = hole;
        }
        Ok(extents)
    }

    /// [`holes::seek`] of its file. A device knows no holes: all of it is data.
    fn seek(&self, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
        match holes::seek(self.file.as_fd(), offset, whence) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Ok((whence == libc::SEEK_DATA).then_some(offset))
            }
            other => other,
        }
    }

    /// Gives the room of these bytes back; they read as zeroes.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where that is not possible.
    pub fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            bytes,
        )
    }

    /// Makes these bytes zeroes, and keeps their room.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where that is not possible otherwise than by writing them.
    pub fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(
            libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            bytes,
        )
    }

    /// Writes zeroes, where neither of these is possible.
    ///
    /// # Errors
    /// The disk is full or at fault.
    pub fn write_zeroes(&self, offset: u64, bytes: u64) -> io::Result<()> {
        const PART_BYTES: usize = 256 << 10;
        let mut zeroes = DiskBuffer::new(PART_BYTES);
        for done in (0..bytes).step_by(PART_BYTES) {
            let len = usize::try_from(bytes - done).unwrap_or(PART_BYTES);
            let part = &zeroes.bytes_mut()[..len.min(PART_BYTES)];
            self.write_at(part, offset + done)?;
        }
        Ok(())
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
        let number = |value: u64| {
            libc::off_t::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
        };
        let (offset, bytes) = (number(offset)?, number(bytes)?);
        loop {
            // SAFETY: the call takes numbers and an open descriptor.
            let done = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, bytes) } == 0;
            if done {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENODEV) => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                // Completions of other operations interrupt the thread that began them.
                Some(libc::EINTR) => {}
                _ => return Err(error),
            }
        }
    }

    /// Takes the lock: for its writer alone, or with others who only read. Whoever has it keeps it.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if somebody else has it, or there are no locks there.
    pub fn lock(&self) -> io::Result<()> {
        self.set_lock(if self.is_read_only {
            libc::F_RDLCK
        } else {
            libc::F_WRLCK
        })
    }

    /// Gives the lock up.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unlock(&self) -> io::Result<()> {
        self.set_lock(libc::F_UNLCK)
    }

    fn set_lock(&self, kind: libc::c_int) -> io::Result<()> {
        let lock = libc::flock {
            l_type: libc::c_short::try_from(kind).expect("a small constant"),
            l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("a small constant"),
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: the command reads the structure that its argument points at.
        let failed =
            unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } != 0;
        if !failed {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Err(io::ErrorKind::ResourceBusy.into()),
            _ => Err(error),
        }
    }
}

/// Whether a single sector can be read; an empty file has none to try.
fn reads_sectors(file: &File) -> bool {
    let sector = usize::try_from(SECTOR_BYTES).expect("small");
    let mut buffer = DiskBuffer::new(sector);
    file.read_at(buffer.bytes_mut(), 0).is_ok()
}

/// By which a process opens what it has open.
fn link(file: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    fn disk(directory: &tempfile::TempDir, bytes: u64) -> std::path::PathBuf {
        let path = directory.path().join("disk");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    #[test]
    fn sectors_come_back_and_holes_are_zero() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory, 1 << 20);
        let disk = Disk::open(&path, false).unwrap();
        assert_eq!(disk.bytes(), 1 << 20);
        let mut buffer = DiskBuffer::new(8192);
        buffer.bytes_mut().fill(7);
        disk.write_at(buffer.bytes_mut(), 512).unwrap();
        disk.flush().unwrap();
        disk.punch(4096, 4096).unwrap();
        disk.read_at(buffer.bytes_mut(), 512).unwrap();
        let bytes = buffer.bytes_mut();
        assert!(bytes[..3584].iter().all(|&byte| byte == 7));
        assert!(bytes[3584..7680].iter().all(|&byte| byte == 0));
        assert!(bytes[7680..].iter().all(|&byte| byte == 7));
        assert!(disk.read_at(buffer.bytes_mut(), 1 << 20).is_err());
        buffer.bytes_mut().fill(7);
        disk.write_at(buffer.bytes_mut(), 600 << 10).unwrap();
        // More than it writes at once, and no whole number of that.
        disk.write_zeroes(64 << 10, (536 << 10) + 512).unwrap();
        disk.read_at(buffer.bytes_mut(), 600 << 10).unwrap();
        let bytes = buffer.bytes_mut();
        assert!(bytes[..512].iter().all(|&byte| byte == 0));
        assert!(bytes[512..].iter().all(|&byte| byte == 7));
    }

    #[test]
    fn what_was_never_written_is_no_data() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory, 8 << 20);
        let disk = Disk::open(&path, false).unwrap();
        let extents = |from, to| disk.data_extents(from, to).unwrap();
        assert_eq!(extents(0, 8 << 20), []);
        let mut buffer = DiskBuffer::new(4096);
        buffer.bytes_mut().fill(1);
        for offset in [1 << 20, (1 << 20) + 4096, 4 << 20] {
            disk.write_at(buffer.bytes_mut(), offset).unwrap();
        }
        let (first, last) = ((1 << 20, (1 << 20) + 8192), (4 << 20, (4 << 20) + 4096));
        assert_eq!(extents(0, 8 << 20), [first, last]);
        assert_eq!(
            extents((1 << 20) + 4096, 4 << 20),
            [((1 << 20) + 4096, first.1)]
        );
        assert_eq!(extents(0, 0), []);
    }

    #[test]
    fn a_disk_that_is_open_is_opened_again_whatever_became_of_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory, 4096);
        let first = Disk::open(&path, true).unwrap();
        std::fs::remove_file(&path).unwrap();
        let again = Disk::open_again(first.file(), false).unwrap();
        let mut buffer = DiskBuffer::new(512);
        buffer.bytes_mut().fill(3);
        again.write_at(buffer.bytes_mut(), 512).unwrap();
        buffer.bytes_mut().fill(0);
        first.read_at(buffer.bytes_mut(), 512).unwrap();
        assert_eq!(buffer.bytes_mut()[0], 3);
        // Each has a lock of its own.
        again.lock().unwrap();
        assert!(first.lock().is_err());
    }

    #[test]
    fn there_is_one_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory, 4096);
        let [first, second] = [(); 2].map(|()| Disk::open(&path, false).unwrap());
        let readers = [(); 2].map(|()| Disk::open(&path, true).unwrap());
        let busy = |disk: &Disk| disk.lock().unwrap_err().kind() == ErrorKind::ResourceBusy;
        first.lock().unwrap();
        first.lock().unwrap();
        assert!(busy(&second) && busy(&readers[0]));
        first.unlock().unwrap();
        readers[0].lock().unwrap();
        readers[1].lock().unwrap();
        assert!(busy(&second));
        drop(readers);
        second.lock().unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = |path: &Path| Disk::open(path, false).unwrap_err().to_string();
        let text = error(directory.path());
        assert_eq!(text, "neither a file nor a block device");
        let text = error(&disk(&directory, 513));
        assert_eq!(text, "its size of 513 bytes is no multiple of 512");
    }
}
