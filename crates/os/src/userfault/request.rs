//! The kernel's userfaultfd as it is: numbers, structures, one method a request.
//!
//! Nothing here knows what a page's content means; what may be asked when is decided by the callers.

use limosa_pages::PAGE_SIZE_USIZE;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const EVENT_PAGEFAULT: u8 = 0x12;

/// What a kernel has to know, for [`Userfault::open`].
pub(crate) mod feature {
    pub(crate) const MISSING_HUGETLBFS: u64 = 1 << 4;
    pub(crate) const MISSING_SHMEM: u64 = 1 << 5;
    pub(crate) const MINOR_HUGETLBFS: u64 = 1 << 9;
    pub(crate) const MINOR_SHMEM: u64 = 1 << 10;
    /// Writes to protected memory, of files too, lift the protection and are not reported.
    pub(crate) const WRITE_PROTECT_ASYNC: u64 = 1 << 12 | 1 << 15;
}

/// Which faults are reported, for [`Userfault::register`].
pub(crate) mod mode {
    /// The page does not exist.
    pub(crate) const MISSING: u64 = 1 << 0;
    /// The page is protected.
    pub(crate) const WRITE_PROTECT: u64 = 1 << 1;
    /// The page exists and is not mapped.
    pub(crate) const MINOR: u64 = 1 << 2;
}

const READ_AND_WRITE: u64 = 3;
const READ: u64 = 2;
const API: libc::Ioctl = request(READ_AND_WRITE, 0x3f, size_of::<ApiAnswer>());
const REGISTER: libc::Ioctl = request(READ_AND_WRITE, 0x00, size_of::<Register>());
const UNREGISTER: libc::Ioctl = request(READ, 0x01, size_of::<Range>());
const WAKE: libc::Ioctl = request(READ, 0x02, size_of::<Range>());
const COPY: libc::Ioctl = request(READ_AND_WRITE, 0x03, size_of::<Copy>());
const ZEROPAGE: libc::Ioctl = request(READ_AND_WRITE, 0x04, size_of::<Fill>());
const CONTINUE: libc::Ioctl = request(READ_AND_WRITE, 0x07, size_of::<Fill>());
/// Makes a userfaultfd out of the device that stands for the right to do so.
const NEW: libc::Ioctl = request(0, 0x00, 0);

#[repr(C)]
struct ApiAnswer {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    /// Bytes, or a negative error.
    done: i64,
}

/// Both of UFFDIO_ZEROPAGE and UFFDIO_CONTINUE.
#[repr(C)]
struct Fill {
    range: Range,
    mode: u64,
    /// Bytes, or a negative error.
    done: i64,
}

/// One message of the kernel.
#[derive(Clone, Copy)]
#[repr(C)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    rest: u64,
}

/// Number of a userfaultfd request with a structure of `size` bytes.
const fn request(direction: u64, number: u64, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u64) << 16 | UFFD_API << 8 | number) as libc::Ioctl
}

/// What became of making pages visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many bytes are there now, from the start on; whoever waited for them goes on.
    Done(u64),
    /// The first page was there already. Nobody was woken.
    Exists,
    /// The first page is in no file, so there is nothing to map.
    Absent,
}

/// A userfaultfd that does not block.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

impl Userfault {
    /// Makes one that reports the faults of this process; with `in_kernel` also those that the
    /// kernel meets when it acts for the process, as KVM does.
    pub(crate) fn open(features: u64, in_kernel: bool) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let made = if in_kernel {
            // Either right will do: the process's own, or that of the device's owner.
            system_call(flags).or_else(|error| by_device(flags).map_err(|_| error))?
        } else {
            system_call(flags | UFFD_USER_MODE_ONLY)?
        };
        let faults = Self(made);
        let mut api = ApiAnswer {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: the structure is the one of this request.
        unsafe { faults.call(API, &mut api) }?;
        Ok(faults)
    }

    /// Takes one that another process has made, after checking that it is one.
    pub(crate) fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        let link = fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no userfaultfd",
            ));
        }
        // SAFETY: the descriptor is open; the calls take and give flags.
        let failed = unsafe {
            let flags = libc::fcntl(descriptor.as_raw_fd(), libc::F_GETFL);
            flags < 0
                || libc::fcntl(
                    descriptor.as_raw_fd(),
                    libc::F_SETFL,
                    flags | libc::O_NONBLOCK,
                ) != 0
        };
        if failed {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(descriptor))
    }

    /// Reports faults on a part of this process's address space from now on.
    pub(crate) fn register(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        let range = Range { start, len };
        let mut register = Register {
            range,
            mode,
            ioctls: 0,
        };
        // SAFETY: the structure is the one of this request. How faults are handled changes no
        // content that this process has seen.
        unsafe { self.call(REGISTER, &mut register) }
    }

    /// Reports faults there no more and wakes whoever waits.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        // SAFETY: as for `register`.
        unsafe { self.call(UNREGISTER, &mut Range { start, len }) }
    }

    /// Lets whoever waits there try again.
    pub(crate) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        // SAFETY: the structure is the one of this request, which changes no memory.
        unsafe { self.call(WAKE, &mut Range { start, len }) }
    }

    /// Makes pages with this content at an address of the process whose faults these are.
    pub(crate) fn copy(&self, to: u64, bytes: &[u8]) -> io::Result<Step> {
        assert!(
            bytes.len().is_multiple_of(PAGE_SIZE_USIZE),
            "whole pages are copied"
        );
        let mut copy = Copy {
            to,
            from: bytes.as_ptr().addr() as u64,
            len: bytes.len() as u64,
            mode: 0,
            done: 0,
        };
        loop {
            // SAFETY: the structure is the one of this request; the source is borrowed until it
            // returns. It makes pages only where there are none, and only in registered memory,
            // which is memory of a guest and never a Rust reference.
            let result = unsafe { self.call(COPY, &mut copy) };
            if let Some(step) = step(result, copy.len, copy.done)? {
                return Ok(step);
            }
        }
    }

    /// Makes one page of zeros.
    pub(crate) fn zero(&self, start: u64, len: u64) -> io::Result<Step> {
        self.fill(ZEROPAGE, start, len)
    }

    /// Maps pages that exist in the file.
    pub(crate) fn map_existing(&self, start: u64, len: u64) -> io::Result<Step> {
        self.fill(CONTINUE, start, len)
    }

    fn fill(&self, request: libc::Ioctl, start: u64, len: u64) -> io::Result<Step> {
        let range = Range { start, len };
        let mut fill = Fill {
            range,
            mode: 0,
            done: 0,
        };
        loop {
            // SAFETY: the structure is the one of both requests, which map zeros or existing
            // content where nothing is mapped, and only in registered memory.
            let result = unsafe { self.call(request, &mut fill) };
            if let Some(step) = step(result, len, fill.done)? {
                return Ok(step);
            }
        }
    }

    /// The addresses of faults that nobody has read yet, some of them; nothing if there are none.
    pub(crate) fn read(&self, mut visit: impl FnMut(u64)) -> io::Result<()> {
        /// What is read at once: a guest has no more vCPUs, and each waits for one page.
        const MESSAGES: usize = 16;
        let mut messages = [Message {
            event: 0,
            reserved: [0; 7],
            flags: 0,
            address: 0,
            rest: 0,
        }; MESSAGES];
        let len = size_of_val(&messages);
        // SAFETY: the array is valid for writing for its length, and any bytes are valid messages.
        let read = unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), len) };
        let Ok(read) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        };
        messages
            .iter()
            .take(read / size_of::<Message>())
            .filter(|message| message.event == EVENT_PAGEFAULT)
            .for_each(|message| visit(message.address));
        Ok(())
    }

    /// # Safety
    /// `argument` is the structure of that request, and carrying it out breaks nobody's references.
    unsafe fn call<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        let argument: *mut T = argument;
        // SAFETY: as the caller guarantees.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What an answer means; `None` if nothing was done and it is to be asked again.
fn step(result: io::Result<()>, len: u64, done: i64) -> io::Result<Option<Step>> {
    let Err(error) = result else {
        return Ok(Some(Step::Done(len)));
    };
    match error.raw_os_error() {
        // A part was done, or the address space is changing right now.
        Some(libc::EAGAIN) => match u64::try_from(done) {
            Ok(done) if done > 0 => Ok(Some(Step::Done(done))),
            _ => {
                std::thread::yield_now();
                Ok(None)
            }
        },
        Some(libc::EEXIST) => Ok(Some(Step::Exists)),
        Some(libc::EFAULT) => Ok(Some(Step::Absent)),
        _ => Err(error),
    }
}

fn system_call(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags and makes a descriptor.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let made = i32::try_from(made).ok().filter(|&made| made >= 0);
    let made = made.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

fn by_device(flags: libc::c_int) -> io::Result<OwnedFd> {
    let device = File::open("/dev/userfaultfd")?;
    // SAFETY: the request takes flags and makes a descriptor.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}
