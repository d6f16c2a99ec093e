//! Pages of disks whose content has not come: the guest runs, and its device waits for what it needs.
//!
//! ```text
//!  VM process: device ── is a page missing? ──▶ asks by the pipe, sleeps on the bitmap's word
//!                                                    │                      ▲
//!  daemon:     reads what is asked for ◀─────────────┘   writes the page, clears its bit, wakes
//! ```
//!
//! The bitmap and the pipe live in the VM process, as those of its memory do, so that a guest whose daemon has
//! died waits at its next missing page, and the next daemon knows what has come. What was asked of a daemon that
//! died is asked again: nobody sleeps longer than [`ASK_AGAIN`].
//!
//! A page whose bit is clear is the guest's, and nobody but its device writes it: a daemon writes a page under a lock,
//! looks there whether it is still missing, and clears the bit when the disk has the content.

use super::bits::DiskBits;
use crate::bitmap::{BitmapError, SharedBitmap};
use limosa_pages::{Numbering, PageCount, PageRange, PageSet, Pfn};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long whoever waits for a page sleeps before it asks anew.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Most pages that are asked for before others of them have come: more than a guest reads or writes at once, but not
/// all that it may discard.
const ASKED_PAGES_MAX: u64 = 256;
/// Bytes of what is asked for: first page and number of pages.
const WANT_BYTES: usize = 16;

/// The same for the device of one disk.
#[derive(Debug)]
pub struct MissingPages {
    /// Those of all.
    pub all: Arc<MissingHere>,
    /// Which of the disks it is.
    pub disk: usize,
}

impl MissingPages {
    /// True if some of these bytes of the disk are missing.
    pub fn lacks(&self, offset: u64, bytes: u64) -> bool {
        let runs = self.all.runs_in(self.disk, offset, bytes);
        runs.is_some_and(|(_, runs)| !runs.is_empty())
    }

    /// Returns when none of these bytes of the disk is missing.
    pub fn wait_for(&self, offset: u64, bytes: u64) {
        self.all.wait_for(self.disk, offset, bytes);
    }
}

/// What the device side has: nothing is missing until somebody is lent it.
#[derive(Debug, Default)]
pub struct MissingHere(OnceLock<Held>);

#[derive(Debug)]
struct Held {
    bits: DiskBits,
    bitmap: SharedBitmap,
    asked: OwnedFd,
    asks: File,
}

/// What the daemon has.
#[derive(Debug)]
pub struct MissingThere {
    bits: DiskBits,
    bitmap: SharedBitmap,
    asked: File,
}

impl MissingHere {
    /// What is lent to a daemon: the bitmap, and where it reads what is asked for. From now on pages may be
    /// missing.
    ///
    /// # Errors
    /// The kernel gives no memory or no pipe.
    ///
    /// # Panics
    /// If the machine has no disk.
    pub fn lend(&self, numbering: &Numbering) -> Result<[BorrowedFd<'_>; 2], BitmapError> {
        if self.0.get().is_none() {
            let bits = DiskBits::new(numbering);
            let call = |source| crate::MemoryError::Call {
                action: "make a pipe beside",
                source,
            };
            let (asked, asks) = pipe().map_err(call)?;
            let held = Held {
                bitmap: SharedBitmap::create_writable(bits.count())?,
                bits,
                asked,
                asks: File::from(asks),
            };
            // Whoever was first has the same numbering.
            drop(self.0.set(held));
        }
        let held = self.0.get().expect("set just now");
        Ok([held.bitmap.file(), held.asked.as_fd()])
    }

    /// How many pages are missing.
    pub fn count(&self) -> PageCount {
        let held = self.0.get();
        held.map_or(PageCount::ZERO, |held| held.bitmap.count())
    }

    /// Which bits of these bytes are set, if somebody was lent them.
    fn runs_in(&self, disk: usize, offset: u64, bytes: u64) -> Option<(&Held, Vec<PageRange>)> {
        let held = self.0.get()?;
        let range = held.bits.of_bytes(disk, offset, bytes)?;
        Some((held, held.bitmap.runs_in(range)))
    }

    fn wait_for(&self, disk: usize, offset: u64, bytes: u64) {
        while let Some((held, runs)) = self.runs_in(disk, offset, bytes) {
            let Some(last) = held.ask_for(&runs) else {
                return;
            };
            held.bitmap.wait_while_set(last, ASK_AGAIN);
        }
    }
}

impl Held {
    /// Asks for the first of these runs of bits; which bit is the last of them. `None` if there are none.
    fn ask_for(&self, runs: &[PageRange]) -> Option<Pfn> {
        let mut left = PageCount::new(ASKED_PAGES_MAX);
        let mut last = None;
        for run in runs {
            let count = run.count.min(left);
            left = left.saturating_sub(count);
            if count == PageCount::ZERO {
                break;
            }
            let mut want = [0; WANT_BYTES];
            want[..8].copy_from_slice(&self.bits.page(run.first).get().to_le_bytes());
            want[8..].copy_from_slice(&count.get().to_le_bytes());
            // So few bytes are written whole or, while the pipe is full, not at all: then later.
            let _later = (&self.asks).write(&want);
            last = Some(Pfn::new(run.first.get() + count.get() - 1));
        }
        last
    }
}

impl MissingThere {
    /// Takes what the VM process lends.
    ///
    /// # Errors
    /// The bitmap is not one for such disks.
    ///
    /// # Panics
    /// If there is no disk.
    pub fn new(
        numbering: &Numbering,
        bitmap: OwnedFd,
        asked: OwnedFd,
    ) -> Result<Self, BitmapError> {
        let bits = DiskBits::new(numbering);
        Ok(Self {
            bitmap: SharedBitmap::open_writable(bitmap, bits.count())?,
            bits,
            asked: File::from(asked),
        })
    }

    /// How many pages are missing.
    pub fn count(&self) -> PageCount {
        self.bitmap.count()
    }

    /// The content of these pages is not here; how many of them were.
    ///
    /// # Panics
    /// If they are no pages of disks.
    pub fn mark(&self, range: PageRange) -> PageCount {
        self.bitmap.put_range(self.bits_of(range))
    }

    /// The content of these pages is on the disk; how many of them were missing. Wakes who waits for them.
    ///
    /// # Panics
    /// If they are no pages of disks.
    pub fn arrived(&self, range: PageRange) -> PageCount {
        let range = self.bits_of(range);
        let taken = self.bitmap.take_range(range);
        if taken > PageCount::ZERO {
            self.bitmap.wake(range);
        }
        taken
    }

    /// The runs of pages within `range` that are missing, ascending.
    ///
    /// # Panics
    /// If they are no pages of disks.
    pub fn runs_in(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs = self.bitmap.runs_in(self.bits_of(range));
        for run in &mut runs {
            run.first = self.bits.page(run.first);
        }
        runs
    }

    /// Adds all missing pages to a set.
    pub fn add_to(&self, set: &mut PageSet) {
        for &disk in self.bits.disks() {
            self.runs_in(disk)
                .into_iter()
                .for_each(|run| set.insert_range(run));
        }
    }

    /// Adds what was asked for since, some of it, without waiting. What is no run of pages of one disk is
    /// left out.
    ///
    /// # Errors
    /// The pipe cannot be read, or the VM process is gone.
    pub fn read_asked(&self, into: &mut Vec<PageRange>) -> io::Result<()> {
        let mut bytes = [0; 64 * WANT_BYTES];
        let read = match (&self.asked).read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
            Ok(read) => read,
            Err(error) if is_empty(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        for want in bytes[..read].chunks_exact(WANT_BYTES) {
            let number = |at: usize| {
                let bytes = want[at..at + 8].try_into().expect("eight bytes");
                u64::from_le_bytes(bytes)
            };
            let (first, count) = (number(0), number(8));
            let is_in = |disk: &PageRange| {
                let (start, end) = (disk.first.get(), disk.end().get());
                start <= first && first <= end && count <= end - first
            };
            if self.bits.disks().iter().any(is_in) {
                into.push(PageRange::new(Pfn::new(first), PageCount::new(count)));
            }
        }
        Ok(())
    }

    fn bits_of(&self, range: PageRange) -> PageRange {
        self.bits.of_pages(range).expect("pages of disks")
    }
}

impl AsFd for MissingThere {
    /// Readable when something was asked for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.asked.as_fd()
    }
}

/// A pipe neither end of which waits.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two numbers where two are.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made both descriptors for us alone.
    Ok(ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) }).into())
}

fn is_empty(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::ByteCount;
    use std::thread;
    use std::time::Instant;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(Pfn::new(first), PageCount::new(count))
    }

    /// Both sides of disks of 3 pages from 1024 on and of 2048 from 1536 on.
    fn sides() -> (MissingHere, MissingThere) {
        let sizes = [2 * 4096 + 512, 8 << 20].map(ByteCount::new);
        let numbering = Numbering::new(PageCount::new(1024), sizes).unwrap();
        let here = MissingHere::default();
        let lent = here.lend(&numbering).unwrap();
        let [bitmap, asked] = lent.map(|end| end.try_clone_to_owned().unwrap());
        let there = MissingThere::new(&numbering, bitmap, asked).unwrap();
        (here, there)
    }

    #[test]
    fn whoever_needs_a_missing_page_asks_and_waits_until_it_has_come() {
        let (here, there) = sides();
        here.wait_for(1, 0, 8 << 20);
        assert_eq!(there.mark(range(1540, 8)), PageCount::new(8));
        assert_eq!(there.mark(range(1024, 3)), PageCount::new(3));
        assert_eq!(there.mark(range(1026, 1)), PageCount::ZERO);
        // Beside them.
        here.wait_for(1, 0, 4 * 4096);
        here.wait_for(1, 12 * 4096, 4096);
        here.wait_for(0, 3 * 4096, 4096);
        here.wait_for(2, 0, 4096);
        assert_eq!(here.count(), PageCount::new(11));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let begun = Instant::now();
                here.wait_for(1, 5 * 4096 + 512, 4096);
                begun.elapsed()
            });
            let mut asked = Vec::new();
            while asked.is_empty() {
                crate::socket::wait_readable([Some(&there as &dyn AsFd)], Some(1000)).unwrap();
                there.read_asked(&mut asked).unwrap();
            }
            assert_eq!(asked, [range(1541, 2)]);
            assert_eq!(there.arrived(range(1541, 1)), PageCount::new(1));
            thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished(), "one of two has come");
            assert_eq!(there.arrived(range(1540, 4)), PageCount::new(3));
            let waited = waiting.join().unwrap();
            assert!(waited < Duration::from_secs(5), "{waited:?}");
        });
        assert_eq!(there.runs_in(range(1536, 2048)), [range(1544, 4)]);
        let mut set = PageSet::empty(PageCount::new(4000));
        there.add_to(&mut set);
        assert_eq!(set.count(), PageCount::new(7));
    }

    #[test]
    fn a_range_of_any_size_is_asked_for_by_parts() {
        let (here, there) = sides();
        there.mark(range(1540, 200));
        there.mark(range(2000, 600));
        let mut asked = Vec::new();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| here.wait_for(1, 0, 8 << 20));
            while !waiting.is_finished() {
                crate::socket::wait_readable([Some(&there as &dyn AsFd)], Some(20)).unwrap();
                let before = asked.len();
                there.read_asked(&mut asked).unwrap();
                for &came in &asked[before..] {
                    there.arrived(came);
                }
            }
        });
        let most = asked.iter().map(|one| one.count.get()).max();
        assert_eq!((asked[0], asked[1]), (range(1540, 200), range(2000, 56)));
        assert_eq!(most, Some(256));
        assert_eq!(there.count(), PageCount::ZERO);
    }

    #[test]
    fn what_a_dead_daemon_was_asked_is_asked_again() {
        let (here, there) = sides();
        there.mark(range(1024, 1));
        thread::scope(|scope| {
            scope.spawn(|| here.wait_for(0, 0, 512));
            let mut asked = Vec::new();
            while asked.len() < 2 {
                crate::socket::wait_readable([Some(&there as &dyn AsFd)], Some(1000)).unwrap();
                there.read_asked(&mut asked).unwrap();
            }
            assert_eq!(asked[..2], [range(1024, 1); 2]);
            there.arrived(range(1024, 1));
        });
    }

    #[test]
    fn what_is_asked_for_beyond_a_disk_is_left_out() {
        let (here, there) = sides();
        let asks = &here.0.get().unwrap().asks;
        let ask = |first: u64, count: u64| {
            let mut want = [0; WANT_BYTES];
            want[..8].copy_from_slice(&first.to_le_bytes());
            want[8..].copy_from_slice(&count.to_le_bytes());
            let mut asks = asks;
            asks.write_all(&want).unwrap();
        };
        for (first, count) in [
            (0, 1),
            (1023, 2),
            (1024, 4),
            (1536, u64::MAX),
            (u64::MAX, 1),
        ] {
            ask(first, count);
        }
        ask(1536, 2048);
        let mut asked = Vec::new();
        there.read_asked(&mut asked).unwrap();
        there.read_asked(&mut asked).unwrap();
        assert_eq!(asked, [range(1536, 2048)]);
    }
}
