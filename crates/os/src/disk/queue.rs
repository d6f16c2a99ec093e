//! Several reads, writes and flushes of a disk at a time.
//!
//! They go through io_uring(7) where the kernel lets us have one. It may not: it is older, or
//! `kernel.io_uring_disabled` or a filter of system calls forbids it. Then each is carried out when it
//! is begun, and its completion waits to be asked for like any other, so that who uses a queue need not
//! know.
//!
//! The kernel reads and writes buffers that the queue owns until they come back with a completion, never
//! memory of a guest: whoever asked copies, and so knows when what was written.
//!
//! Invariants: no buffer that the kernel may still use is freed; an operation is completed once, whole or
//! with an error; at most as many are under way as there are places, so neither ring can overflow.

use super::{Disk, DiskBuffer};
use io_uring::{IoUring, Probe, opcode, squeue, types};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What is done with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Sectors into the buffer, from this offset.
    Read(u64),
    /// Sectors from the buffer, to this offset.
    Write(u64),
    /// What was completed before outlives a loss of power.
    Flush,
}

/// How operations are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By io_uring where it can be used, one after the other elsewhere.
    Best,
    /// One after the other.
    OneByOne,
}

/// An operation that is over.
#[derive(Debug)]
pub struct Completed {
    /// The place that it had.
    pub place: usize,
    /// Its buffer; what was read is in it.
    pub buffer: DiskBuffer,
    /// How it ended.
    pub result: io::Result<()>,
}

/// A disk and what is under way on it.
#[derive(Debug)]
pub struct DiskQueue {
    disk: Disk,
    places: Vec<Option<Operation>>,
    under_way: usize,
    ring: Result<Ring, io::Error>,
    /// Without a ring: over, and not asked for yet.
    over: Vec<Completed>,
}

#[derive(Debug)]
struct Operation {
    action: Action,
    buffer: DiskBuffer,
    len: usize,
    /// So many bytes are done: the kernel may stop earlier than it was asked to.
    done: usize,
}

/// The rings that are shared with the kernel.
struct Ring {
    rings: IoUring,
    /// Readable while there are completions.
    descriptor: Arc<OwnedFd>,
    /// The kernel has not seen so many operations yet.
    unseen: usize,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Ring");
        shown.field("descriptor", &self.descriptor);
        shown.field("unseen", &self.unseen).finish_non_exhaustive()
    }
}

impl Ring {
    fn new(places: u32) -> io::Result<Self> {
        let rings = IoUring::new(places)?;
        let mut probe = Probe::new();
        rings.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // SAFETY: the descriptor is that of the rings, which are open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(rings.as_raw_fd()) };
        let descriptor = Arc::new(borrowed.try_clone_to_owned()?);
        Ok(Self {
            rings,
            descriptor,
            unseen: 0,
        })
    }

    /// Writes the operation, or what is left of it, down for the kernel.
    fn push(&mut self, disk: &Disk, place: usize, operation: &mut Operation) {
        let entry = entry(disk, operation).user_data(place as u64);
        // SAFETY: the descriptor is that of the disk, which is open whenever the kernel is shown entries;
        // the buffer stays with its operation until the kernel says that this is over, or for ever.
        let pushed = unsafe { self.rings.submission().push(&entry) };
        pushed.expect("the ring has a place for each operation");
        self.unseen += 1;
    }

    /// Shows the kernel all, and waits until so many are over.
    fn submit(&mut self, wanted: usize) -> io::Result<()> {
        if self.unseen == 0 && wanted == 0 {
            return Ok(());
        }
        loop {
            match self.rings.submit_and_wait(wanted) {
                Ok(seen) => {
                    self.unseen = self.unseen.saturating_sub(seen);
                    if self.unseen == 0 {
                        return Ok(());
                    }
                    if seen == 0 {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What is left of an operation, for the kernel.
fn entry(disk: &Disk, operation: &mut Operation) -> squeue::Entry {
    let file = types::Fd(disk.file.as_raw_fd());
    let done = operation.done as u64;
    let left = &mut operation.buffer.bytes_mut()[operation.done..operation.len];
    let len = u32::try_from(left.len()).expect("buffers are smaller");
    match operation.action {
        Action::Read(offset) => opcode::Read::new(file, left.as_mut_ptr(), len)
            .offset(offset + done)
            .build(),
        Action::Write(offset) => opcode::Write::new(file, left.as_ptr(), len)
            .offset(offset + done)
            .build(),
        Action::Flush => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

impl Operation {
    /// Carries out what is left of it.
    fn carry_out(&mut self, disk: &Disk) -> io::Result<()> {
        let left = &mut self.buffer.bytes_mut()[self.done..self.len];
        let done = self.done as u64;
        match self.action {
            Action::Read(offset) => disk.read_at(left, offset + done),
            Action::Write(offset) => disk.write_at(left, offset + done),
            Action::Flush => disk.flush(),
        }
    }

    /// The kernel has done so much more of it; `None` if that is not all.
    fn advance(&mut self, disk: &Disk, result: i32) -> Option<io::Result<()>> {
        let Ok(bytes) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(-result);
            return match error.raw_os_error() {
                Some(libc::EINTR) => None,
                // Some kernels say so where they would have to wait.
                Some(libc::EAGAIN) => Some(self.carry_out(disk)),
                _ => Some(Err(error)),
            };
        };
        self.done += bytes;
        match self.action {
            _ if self.done >= self.len => Some(Ok(())),
            Action::Read(_) if bytes == 0 => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            Action::Write(_) if bytes == 0 => Some(Err(io::ErrorKind::WriteZero.into())),
            _ => None,
        }
    }
}

impl DiskQueue {
    /// Nothing under way yet, and never more than `places` operations.
    ///
    /// # Panics
    /// If there are no places, or more than the kernel has (32768).
    pub fn new(disk: Disk, places: u16, way: Way) -> Self {
        assert!((1..=1 << 15).contains(&places), "places are few");
        let ring = match way {
            Way::Best => Ring::new(places.into()),
            Way::OneByOne => Err(io::Error::other("it was not asked for")),
        };
        Self {
            disk,
            places: (0..places).map(|_| None).collect(),
            under_way: 0,
            ring,
            over: Vec::new(),
        }
    }

    /// The disk.
    pub const fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Why operations are carried out one by one; `None` if they are not.
    pub const fn why_one_by_one(&self) -> Option<&io::Error> {
        match &self.ring {
            Ok(_) => None,
            Err(error) => Some(error),
        }
    }

    /// How many operations were begun and not told as completed.
    pub const fn under_way(&self) -> usize {
        self.under_way
    }

    /// A place without an operation, if there is one.
    pub fn free_place(&self) -> Option<usize> {
        if self.under_way == self.places.len() {
            return None;
        }
        self.places.iter().position(Option::is_none)
    }

    /// What is readable while there are completions; `None` where each waits since it was begun.
    pub fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        let ring = self.ring.as_ref().ok()?;
        Some(Arc::clone(&ring.descriptor))
    }

    /// Begins an operation with the first `len` bytes of the buffer. The kernel need not see it before
    /// [`DiskQueue::submit`].
    ///
    /// # Panics
    /// If the place is not free, or the buffer is shorter.
    pub fn begin(&mut self, place: usize, action: Action, buffer: DiskBuffer, len: usize) {
        assert!(self.places[place].is_none(), "the place is free");
        assert!(len <= buffer.len, "the buffer holds the operation");
        let mut operation = Operation {
            action,
            buffer,
            len: if action == Action::Flush { 0 } else { len },
            done: 0,
        };
        self.under_way += 1;
        match &mut self.ring {
            Ok(ring) => {
                let operation = self.places[place].insert(operation);
                ring.push(&self.disk, place, operation);
            }
            Err(_) => {
                let result = operation.carry_out(&self.disk);
                let buffer = operation.buffer;
                self.over.push(Completed {
                    place,
                    buffer,
                    result,
                });
            }
        }
    }

    /// Has the kernel see all that was begun.
    ///
    /// # Errors
    /// It does not take some at the moment. They are begun still: try again soon.
    pub fn submit(&mut self) -> io::Result<()> {
        match &mut self.ring {
            Ok(ring) => ring.submit(0),
            Err(_) => Ok(()),
        }
    }

    /// Whether the kernel has yet to see something: the last submission failed, or there was none.
    pub fn is_unseen(&self) -> bool {
        self.ring.as_ref().is_ok_and(|ring| ring.unseen > 0)
    }

    /// The next operation that is over.
    pub fn completed(&mut self) -> Option<Completed> {
        let Ok(ring) = &mut self.ring else {
            let completed = self.over.pop()?;
            self.under_way -= 1;
            return Some(completed);
        };
        loop {
            let event = ring.rings.completion().next()?;
            let place = usize::try_from(event.user_data()).expect("our own number");
            let operation = self.places[place].as_mut().expect("told once");
            let Some(result) = operation.advance(&self.disk, event.result()) else {
                ring.push(&self.disk, place, operation);
                // Who asks for completions may have nothing to submit. What fails here is seen as unseen.
                if ring.submit(0).is_err() {
                    return None;
                }
                continue;
            };
            self.under_way -= 1;
            let operation = self.places[place].take().expect("it was there");
            return Some(Completed {
                place,
                buffer: operation.buffer,
                result,
            });
        }
    }

    /// Waits until something is over, if anything is under way.
    ///
    /// # Errors
    /// The kernel does not take all at the moment.
    pub fn wait(&mut self) -> io::Result<()> {
        match &mut self.ring {
            Ok(ring) if self.under_way > 0 => ring.submit(1),
            _ => Ok(()),
        }
    }
}

impl Drop for DiskQueue {
    fn drop(&mut self) {
        if self.ring.is_ok() && self.under_way > 0 {
            // The kernel may read and write the buffers for as long as the disk takes, and to wait for
            // that would hold up the end of a process.
            std::mem::forget(std::mem::take(&mut self.places));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const PLACES: u16 = 8;
    const PART: usize = 4096;

    /// A queue each way, over a disk of 64 KiB.
    fn each_way(check: impl Fn(DiskQueue, &File)) {
        for way in [Way::Best, Way::OneByOne] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk");
            let file = File::create_new(&path).unwrap();
            file.set_len(16 * PART as u64).unwrap();
            let disk = Disk::open(&path, false).unwrap();
            let queue = DiskQueue::new(disk, PLACES, way);
            match (way, queue.why_one_by_one()) {
                (Way::Best, Some(why)) => println!("skipped: {why}"),
                _ => check(queue, &File::open(&path).unwrap()),
            }
        }
    }

    fn filled(byte: u8) -> DiskBuffer {
        let mut buffer = DiskBuffer::new(PART);
        buffer.bytes_mut().fill(byte);
        buffer
    }

    /// Waits for all that is under way, by the descriptor, as a device's thread does.
    fn all(queue: &mut DiskQueue) -> Vec<Completed> {
        queue.submit().unwrap();
        let mut all = Vec::new();
        while queue.under_way() > 0 {
            if let Some(descriptor) = queue.descriptor() {
                let [is_readable] = socket::wait_readable([Some(&descriptor)], Some(5000)).unwrap();
                assert!(is_readable, "nothing completes");
            }
            while let Some(completed) = queue.completed() {
                all.push(completed);
            }
        }
        all.sort_by_key(|completed| completed.place);
        all
    }

    #[test]
    fn each_operation_is_completed_once_with_its_own_bytes() {
        each_way(|mut queue, file| {
            let parts =
                || (0..PLACES).map(|part| (usize::from(part), u64::from(part) * PART as u64));
            for (place, offset) in parts() {
                let byte = u8::try_from(place).unwrap() + 1;
                assert!(queue.free_place().is_some());
                queue.begin(place, Action::Write(offset), filled(byte), PART);
            }
            assert_eq!(
                (queue.under_way(), queue.free_place()),
                (PLACES.into(), None)
            );
            let places: Vec<usize> = all(&mut queue).iter().map(|over| over.place).collect();
            assert_eq!(places, (0..PLACES.into()).collect::<Vec<usize>>());
            queue.begin(3, Action::Flush, DiskBuffer::new(0), 0);
            assert!(all(&mut queue)[0].result.is_ok());
            let mut bytes = vec![0; PART];
            file.read_exact_at(&mut bytes, 5 * PART as u64).unwrap();
            assert!(bytes.iter().all(|&byte| byte == 6));
            for (place, offset) in parts() {
                queue.begin(place, Action::Read(offset), filled(0xff), PART);
            }
            for mut over in all(&mut queue) {
                over.result.unwrap();
                let expect = u8::try_from(over.place).unwrap() + 1;
                assert!(over.buffer.bytes_mut().iter().all(|&byte| byte == expect));
            }
            assert_eq!(queue.under_way(), 0);
            assert!(queue.completed().is_none());
        });
    }

    #[test]
    fn an_error_is_that_of_its_operation() {
        each_way(|mut queue, _file| {
            let end = 16 * PART as u64;
            queue.begin(0, Action::Read(end - PART as u64), filled(1), PART);
            queue.begin(1, Action::Read(end), filled(1), PART);
            // Half of it is there, which is not enough.
            queue.begin(2, Action::Read(end - 512), filled(1), PART);
            let errors: Vec<_> = all(&mut queue)
                .into_iter()
                .map(|over| over.result.err().map(|error| error.kind()))
                .collect();
            let missing = Some(io::ErrorKind::UnexpectedEof);
            assert_eq!(errors, [None, missing, missing]);
        });
    }

    #[test]
    fn a_part_of_an_operation_is_no_end_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        File::create(&path).unwrap().set_len(8192).unwrap();
        let disk = Disk::open(&path, false).unwrap();
        let operation = |action| Operation {
            action,
            buffer: DiskBuffer::new(PART),
            len: PART,
            done: 0,
        };
        let check = |action, results: &[i32], expect: Option<&str>| {
            let mut operation = operation(action);
            let mut last = None;
            for &result in results {
                assert!(last.is_none(), "it was over");
                last = operation.advance(&disk, result);
            }
            let shown =
                last.map(|last| last.map_or_else(|error| error.to_string(), |()| "ok".into()));
            assert_eq!(shown.as_deref(), expect, "{action:?} {results:?}");
        };
        let read = Action::Read(0);
        check(read, &[512, 3584], Some("ok"));
        check(read, &[512, -libc::EINTR], None);
        check(read, &[512, 0], Some("unexpected end of file"));
        check(Action::Write(0), &[512, 0], Some("write zero"));
        check(
            Action::Write(0),
            &[-libc::ENOSPC],
            Some("No space left on device (os error 28)"),
        );
        // What the kernel does not begin is done here and now, from where it stopped.
        check(read, &[512, -libc::EAGAIN], Some("ok"));
        check(
            Action::Read(8192),
            &[-libc::EAGAIN],
            Some("failed to fill whole buffer"),
        );
    }

    #[test]
    fn what_is_under_way_when_a_queue_goes_does_no_harm() {
        each_way(|mut queue, _file| {
            for place in 0..PLACES.into() {
                queue.begin(place, Action::Read(0), filled(1), PART);
            }
            queue.submit().unwrap();
        });
    }

    #[test]
    fn who_waits_sees_the_end() {
        each_way(|mut queue, _file| {
            queue.begin(0, Action::Write(0), filled(1), PART);
            queue.wait().unwrap();
            assert!(!queue.is_unseen());
            assert!(queue.completed().unwrap().result.is_ok());
            queue.wait().unwrap();
        });
    }
}
