//! Disks that are copied along with their guest: read at the source beside the guest that writes them, written
//! at the target before it runs there.
//!
//! A guest that runs at the target before all of them has come waits in its device for what it needs: which pages
//! are missing is written down beside the device ([`limosa_os::disk::missing`]), and what comes is put in here, each
//! page once.
//!
//! Their pages are numbered behind those of the memory, and go through the same rounds. What differs is how
//! they are reached: by reads and writes past the page cache, whose errors are errors of the migration. A
//! mapping would turn them into the end of the daemon.

use crate::guest::LentDisks;
use crate::sender::split_by_content;
use limosa_engine::wire::{CopiedDisk, PushHeader, WireError};
use limosa_os::disk::missing::MissingThere;
use limosa_os::disk::{Disk, DiskBuffer};
use limosa_pages::{
    ByteCount, Numbering, PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, PageSet, Pfn,
};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Pages that are read or written at once.
const PART_PAGES: u64 = 256;
const PART_BYTES: usize = (PART_PAGES * PAGE_SIZE) as usize;
/// How many missing pages can be put in at a time, of different parts of disks.
const LOCKS: usize = 8;
/// Between two tries of a disk that takes nothing.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// That it still does not is told once in so many tries.
const TRIES_TOLD: u64 = 120;

/// The disks of a guest, or none if they are not copied.
#[derive(Debug)]
pub(crate) struct Disks {
    numbering: Numbering,
    disks: Vec<Disk>,
    /// What has not come, if there are disks.
    missing: Option<MissingThere>,
    missing_count: AtomicU64,
    /// Held while missing pages are put in, each for some of them: what comes twice must not be written when the guest
    /// has it, and a page that is waited for does not stand behind another's write.
    installing: [Mutex<Option<DiskBuffer>>; LOCKS],
    /// What is told of a disk that takes nothing, while it does not.
    stuck: Mutex<Option<String>>,
    /// Nobody waits for missing pages any more.
    is_over: AtomicBool,
}

/// Room for [`PART_PAGES`] of a disk.
pub(crate) fn buffer() -> DiskBuffer {
    DiskBuffer::new(PART_BYTES)
}

/// What is read or written at once of a run.
pub(crate) fn parts(run: PageRange) -> impl Iterator<Item = PageRange> {
    let mut rest = run;
    std::iter::from_fn(move || {
        let count = rest.count.min(PageCount::new(PART_PAGES));
        let part = PageRange::new(rest.first, count);
        rest = PageRange::new(part.end(), rest.count.saturating_sub(count));
        (count > PageCount::ZERO).then_some(part)
    })
}

/// The parts of a range between multiples of [`PART_PAGES`]: two that have a page in common are of the same ones.
fn aligned_parts(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut next = range.first.get();
    let end = range.end().get();
    std::iter::from_fn(move || {
        let first = next;
        next = end.min((first / PART_PAGES + 1) * PART_PAGES);
        (first < next).then(|| PageRange::new(Pfn::new(first), PageCount::new(next - first)))
    })
}

/// The same error, which says of which disk.
fn named(disk: &Disk, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", disk.path().display()))
}

/// Pages in a row, and what is in them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Content<'a> {
    range: PageRange,
    bytes: &'a [u8],
}

impl<'a> Content<'a> {
    /// What is in some of them.
    pub(crate) fn of(&self, range: PageRange) -> &'a [u8] {
        let index = |page: Pfn| (page.get() - self.range.first.get()) as usize * PAGE_SIZE_USIZE;
        &self.bytes[index(range.first)..index(range.end())]
    }

    /// Each of them.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (Pfn, &'a [u8])> {
        self.range.iter().zip(self.bytes.chunks(PAGE_SIZE_USIZE))
    }

    /// What a push or an answer says of them: pages with content, and ranges of zeros.
    pub(crate) fn headers(self) -> impl Iterator<Item = PushHeader> + use<'a> {
        split_by_content(self.range, move |page| {
            let page = self.of(PageRange::new(page, PageCount::new(1)));
            page.iter().all(|&byte| byte == 0)
        })
    }
}

impl Disks {
    /// Of a guest whose disks are not copied.
    pub(crate) fn none(memory: PageCount) -> Self {
        let numbering = Numbering::new(memory, []).expect("no disk is too large");
        Self {
            numbering,
            disks: Vec::new(),
            missing: None,
            missing_count: AtomicU64::new(0),
            installing: Default::default(),
            stuck: Mutex::default(),
            is_over: AtomicBool::new(false),
        }
    }

    /// Behind so much memory; `None` if they are too large.
    pub(crate) fn new(memory: PageCount, lent: LentDisks) -> Option<Self> {
        let LentDisks { disks, missing } = lent;
        let sizes = disks.iter().map(|disk| ByteCount::new(disk.bytes()));
        let numbering = Numbering::new(memory, sizes)?;
        Some(Self {
            numbering,
            disks,
            missing_count: AtomicU64::new(missing.count().get()),
            missing: Some(missing),
            installing: Default::default(),
            stuck: Mutex::default(),
            is_over: AtomicBool::new(false),
        })
    }

    /// All pages, those of memory and of disks, without what lies between.
    pub(crate) fn everything(&self) -> PageSet {
        let mut all = PageSet::empty(self.pages());
        self.numbering
            .parts()
            .for_each(|part| all.insert_range(part));
        all
    }

    /// The pages of the memory, and of each disk.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = PageRange> {
        self.numbering.parts()
    }

    /// The parts of a range that are of memory or of one disk each.
    pub(crate) fn split(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        self.numbering.split(range)
    }

    /// Checks that pages that a peer names are of memory, or of one disk.
    pub(crate) fn check(&self, range: PageRange) -> Result<(), WireError> {
        let part = self.numbering.part_of(range.first);
        match part.filter(|part| range.end() <= part.end()) {
            Some(_) => Ok(()),
            None => Err(WireError::MalformedPush("pages of no disk")),
        }
    }

    /// All pages, those of the memory among them.
    pub(crate) fn pages(&self) -> PageCount {
        self.numbering.end()
    }

    /// True if some of these pages are none of the memory.
    pub(crate) const fn reaches(&self, range: PageRange) -> bool {
        range.end().get() > self.numbering.memory().get()
    }

    /// Their sizes, and how much of each was ever written.
    pub(crate) fn describe(&self) -> io::Result<Vec<CopiedDisk>> {
        let describe = |disk: &Disk| {
            let extents = disk.data_extents(0, disk.bytes())?;
            let data = extents.iter().map(|(from, to)| to - from).sum();
            Ok(CopiedDisk {
                size: ByteCount::new(disk.bytes()),
                data: ByteCount::new(data),
            })
        };
        self.disks.iter().map(describe).collect()
    }

    /// True if they have these sizes.
    pub(crate) fn are(&self, announced: &[CopiedDisk]) -> bool {
        let sizes = self.disks.iter().map(Disk::bytes);
        sizes.eq(announced.iter().map(|disk| disk.size.get()))
    }

    /// The runs of pages within `range`, of one disk, that were ever written, ascending.
    pub(crate) fn runs_in(&self, range: PageRange) -> io::Result<Vec<PageRange>> {
        let (disk, first, from, len) = self.place(range)?;
        let mut runs: Vec<PageRange> = Vec::new();
        for (from, to) in disk.data_extents(from, from + len)? {
            let (from, to) = (from / PAGE_SIZE, to.div_ceil(PAGE_SIZE));
            let run = |from: u64| {
                PageRange::new(
                    first.advance(PageCount::new(from)),
                    PageCount::new(to - from),
                )
            };
            match runs.last_mut().filter(|last| last.end() >= run(from).first) {
                Some(last) => last.count = PageCount::new(run(from).end().get() - last.first.get()),
                None => runs.push(run(from)),
            }
        }
        Ok(runs)
    }

    /// The runs of pages of all disks that were ever written, ascending.
    pub(crate) fn runs(&self) -> io::Result<Vec<PageRange>> {
        let each = self
            .numbering
            .disks()
            .iter()
            .map(|&disk| self.runs_in(disk));
        Ok(each.collect::<io::Result<Vec<_>>>()?.concat())
    }

    /// Reads pages of one disk, at most [`PART_PAGES`]; what lies behind its end is zero.
    pub(crate) fn read<'a>(
        &self,
        range: PageRange,
        into: &'a mut DiskBuffer,
    ) -> io::Result<Content<'a>> {
        let (disk, _, offset, len) = self.place(range)?;
        let bytes = part(range, into)?;
        let (content, beyond) = bytes.split_at_mut(usize::try_from(len).unwrap_or(usize::MAX));
        let read = disk.read_at(content, offset);
        read.map_err(|error| named(disk, error))?;
        beyond.fill(0);
        Ok(Content { range, bytes })
    }

    /// Writes pages of one disk from the beginning of the buffer; what lies behind its end is left out.
    pub(crate) fn write(&self, range: PageRange, from: &mut DiskBuffer) -> io::Result<()> {
        let (disk, _, offset, len) = self.place(range)?;
        let bytes = part(range, from)?;
        let written = disk.write_at(&bytes[..usize::try_from(len).unwrap_or(usize::MAX)], offset);
        written.map_err(|error| named(disk, error))
    }

    /// Makes pages of one disk zeroes, and gives back their room where its file system can.
    pub(crate) fn zero(&self, range: PageRange) -> io::Result<()> {
        let (disk, _, offset, len) = self.place(range)?;
        let zeroed = match disk.punch(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                disk.write_zeroes(offset, len)
            }
            other => other,
        };
        zeroed.map_err(|error| named(disk, error))
    }

    /// How many pages have not come.
    pub(crate) fn missing_count(&self) -> PageCount {
        PageCount::new(self.missing_count.load(Ordering::SeqCst))
    }

    /// Adds them to a set of all pages.
    pub(crate) fn add_missing(&self, set: &mut PageSet) {
        if let Some(missing) = &self.missing {
            missing.add_to(set);
        }
    }

    /// Which of these pages of one disk have not come.
    pub(crate) fn missing_in(&self, range: PageRange) -> Vec<PageRange> {
        match self.missing_of(range) {
            Ok(missing) => missing.runs_in(range),
            Err(_) => Vec::new(),
        }
    }

    /// Where is read what the guest's devices wait for, if there are disks.
    pub(crate) const fn asked(&self) -> Option<&MissingThere> {
        self.missing.as_ref()
    }

    /// Before the guest runs: the content of these pages of one disk is not here.
    pub(crate) fn mark_missing(&self, range: PageRange) -> io::Result<()> {
        let new = self.missing_of(range)?.mark(range);
        self.missing_count.fetch_add(new.get(), Ordering::SeqCst);
        Ok(())
    }

    /// Before the guest runs: these pages of one disk were written.
    pub(crate) fn arrived_in_place(&self, range: PageRange) -> io::Result<()> {
        self.arrived(self.missing_of(range)?, range);
        Ok(())
    }

    /// Writes those pages of one disk that are missing, or makes them zeroes; how many there were. The others are
    /// the guest's.
    pub(crate) fn install(
        &self,
        range: PageRange,
        content: Option<&[u8]>,
    ) -> io::Result<PageCount> {
        let missing = self.missing_of(range)?;
        let content = content.map(|bytes| Content { range, bytes });
        let mut installed = PageCount::ZERO;
        for part in aligned_parts(range) {
            let lock = (part.first.get() / PART_PAGES) as usize % LOCKS;
            let buffer = self.installing[lock].lock();
            let mut buffer = buffer.unwrap_or_else(PoisonError::into_inner);
            for run in missing.runs_in(part) {
                match content {
                    None => self.patiently(|| self.zero(run))?,
                    Some(content) => {
                        let buffer = buffer.get_or_insert_with(self::buffer);
                        self::part(run, buffer)?.copy_from_slice(content.of(run));
                        self.patiently(|| self.write(run, buffer))?;
                    }
                }
                installed = installed.saturating_add(self.arrived(missing, run));
            }
        }
        Ok(installed)
    }

    /// Writes to a disk until it takes it: the guest runs here and can go nowhere else, and what it waits for is not
    /// lost as long as its source has it. Somebody may make room, or mend the way to the disk.
    fn patiently(&self, mut write: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let mut tries = 0_u64;
        loop {
            let error = match write() {
                Ok(()) => break,
                Err(error) => error,
            };
            if self.is_over.load(Ordering::SeqCst) {
                return Err(error);
            }
            *self.stuck_lock() = Some(format!("a disk takes nothing: {error}"));
            if tries.is_multiple_of(TRIES_TOLD) {
                tracing::error!(
                    %error,
                    "a disk that came along takes nothing: its guest waits until it does, free some space or mend it"
                );
            }
            tries += 1;
            thread::sleep(TRY_AGAIN);
        }
        if tries > 0 {
            // Another one that waits says so again.
            *self.stuck_lock() = None;
            tracing::info!(tries, "a disk that came along takes what is written again");
        }
        Ok(())
    }

    fn stuck_lock(&self) -> MutexGuard<'_, Option<String>> {
        self.stuck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which disk takes nothing that has come, and why, as long as that is so.
    pub(crate) fn stuck(&self) -> Option<String> {
        self.stuck_lock().clone()
    }

    /// Errors of disks are final from now on: nobody waits for missing pages any more.
    pub(crate) fn give_up(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    fn arrived(&self, missing: &MissingThere, range: PageRange) -> PageCount {
        let arrived = missing.arrived(range);
        self.missing_count
            .fetch_sub(arrived.get(), Ordering::SeqCst);
        arrived
    }

    /// What is missing, for pages of one disk.
    fn missing_of(&self, range: PageRange) -> io::Result<&MissingThere> {
        self.place(range)?;
        Ok(self.missing.as_ref().expect("there are disks"))
    }

    /// Keeps everybody from writing what is read here, now that its guest does not.
    pub(crate) fn lock(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(Disk::lock)
    }

    /// Lets its guest write again.
    pub(crate) fn unlock(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(Disk::unlock)
    }

    /// Returns when all that was written will outlive a loss of power.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let flush = |disk: &Disk| disk.flush().map_err(|error| named(disk, error));
        self.disks.iter().try_for_each(flush)
    }

    /// Where pages of one disk are: the disk, its first page, and the bytes in it.
    fn place(&self, range: PageRange) -> io::Result<(&Disk, Pfn, u64, u64)> {
        let disks = self.disks.iter().zip(self.numbering.disks());
        let mut found =
            disks.filter(|(_, pages)| pages.first <= range.first && range.end() <= pages.end());
        let Some((disk, pages)) = found.next() else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no pages of one disk",
            ));
        };
        let offset = (range.first.get() - pages.first.get()) * PAGE_SIZE;
        let len = range
            .bytes()
            .get()
            .min(disk.bytes() - offset.min(disk.bytes()));
        Ok((disk, pages.first, offset, len))
    }
}

/// Where pages go in a buffer.
fn part(range: PageRange, buffer: &mut DiskBuffer) -> io::Result<&mut [u8]> {
    let len = usize::try_from(range.bytes().get()).unwrap_or(usize::MAX);
    let bytes = buffer.bytes_mut().get_mut(..len);
    bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "too many pages at once"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_os::disk::missing::MissingHere;
    use std::fs::{self, File};
    use std::path::Path;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(Pfn::new(first), PageCount::new(count))
    }

    /// Two disks behind 1000 pages of memory: of two pages and a sector, and of four MiB.
    fn disks(directory: &Path) -> Disks {
        let disk = |(name, bytes): (&str, u64)| {
            let path = directory.join(name);
            File::create(&path).unwrap().set_len(bytes).unwrap();
            Disk::open(&path, false).unwrap()
        };
        let disks = [("a", 2 * PAGE_SIZE + 512), ("b", 4 << 20)].map(disk);
        let sizes = disks.iter().map(|disk| ByteCount::new(disk.bytes()));
        let numbering = Numbering::new(PageCount::new(1000), sizes).unwrap();
        let here = MissingHere::default();
        let [bitmap, asked] = here
            .lend(&numbering)
            .unwrap()
            .map(|end| end.try_clone_to_owned().unwrap());
        let lent = LentDisks {
            disks: disks.into(),
            missing: MissingThere::new(&numbering, bitmap, asked).unwrap(),
        };
        Disks::new(PageCount::new(1000), lent).unwrap()
    }

    #[test]
    fn what_is_missing_is_put_in_once() {
        let directory = tempfile::tempdir().unwrap();
        let disks = disks(directory.path());
        let file = || fs::read(directory.path().join("b")).unwrap();
        let content = |byte: u8, pages: usize| vec![byte; pages * PAGE_SIZE_USIZE];
        let install = |range, content: Option<&[u8]>| disks.install(range, content).unwrap().get();
        disks.mark_missing(range(1540, 4)).unwrap();
        disks.mark_missing(range(1024, 3)).unwrap();
        assert_eq!(disks.missing_count(), PageCount::new(7));
        // Of eight pages four are missing; unaligned as a stream may have it.
        let mut bytes = vec![0; 1];
        bytes.extend(content(7, 8));
        assert_eq!(install(range(1538, 8), Some(&bytes[1..])), 4);
        assert!(
            file()[..4 * 4096].iter().all(|&byte| byte == 0),
            "these are the guest's"
        );
        assert!(file()[4 * 4096..8 * 4096].iter().all(|&byte| byte == 7));
        assert_eq!(install(range(1538, 8), Some(&content(9, 8))), 0);
        assert_eq!(install(range(1536, 1024), None), 0);
        assert_eq!(file()[4 * 4096], 7, "nothing twice");
        disks.arrived_in_place(range(1024, 1)).unwrap();
        assert_eq!(disks.missing_in(range(1024, 3)), [range(1025, 2)]);
        assert_eq!(install(range(1024, 3), None), 2);
        assert_eq!(disks.missing_count(), PageCount::ZERO);
        assert!(disks.install(range(1023, 2), None).is_err());
        assert!(disks.mark_missing(range(1027, 1)).is_err());
        assert_eq!(disks.everything().count(), PageCount::new(1000 + 3 + 1024));
    }

    #[test]
    fn pages_that_a_peer_names_are_of_one_thing() {
        let directory = tempfile::tempdir().unwrap();
        let disks = disks(directory.path());
        for (first, count, is_sound) in [
            (0, 1000, true),
            (1024, 3, true),
            (1536, 1024, true),
            (999, 2, false),
            (1000, 1, false),
            (1026, 2, false),
            (1026, 600, false),
            (2560, 1, false),
        ] {
            let checked = disks.check(range(first, count)).is_ok();
            assert_eq!(checked, is_sound, "{first}+{count}");
        }
    }

    #[test]
    fn pages_are_where_they_are_numbered() {
        let directory = tempfile::tempdir().unwrap();
        let disks = disks(directory.path());
        assert_eq!(disks.pages(), PageCount::new(1536 + 1024));
        assert!(!disks.reaches(range(0, 1000)) && disks.reaches(range(999, 2)));
        let mut buffer = buffer();
        buffer.bytes_mut().fill(7);
        disks.write(range(1025, 2), &mut buffer).unwrap();
        disks.write(range(1540, 3), &mut buffer).unwrap();
        let file = fs::read(directory.path().join("a")).unwrap();
        assert_eq!(file.len(), 2 * 4096 + 512, "it does not grow");
        assert!(file[..4096].iter().all(|&byte| byte == 0));
        assert!(file[4096..].iter().all(|&byte| byte == 7));
        let read = disks.read(range(1026, 1), &mut buffer).unwrap().bytes;
        assert_eq!((read[511], read[512], read.len()), (7, 0, 4096));
        assert_eq!(disks.runs_in(range(1536, 1024)).unwrap(), [range(1540, 3)]);
        assert_eq!(disks.runs().unwrap(), [range(1025, 2), range(1540, 3)]);
        let all: Vec<PageRange> = parts(range(5, 600)).collect();
        assert_eq!(all, [range(5, 256), range(261, 256), range(517, 88)]);
        assert_eq!(parts(range(5, 0)).count(), 0);
        let all: Vec<PageRange> = aligned_parts(range(5, 600)).collect();
        assert_eq!(all, [range(5, 251), range(256, 256), range(512, 93)]);
        assert_eq!(aligned_parts(range(512, 0)).count(), 0);
        let data = disks
            .describe()
            .unwrap()
            .into_iter()
            .map(|disk| disk.data.get());
        assert_eq!(data.collect::<Vec<_>>(), [4096 + 512, 3 * 4096]);
        disks.zero(range(1541, 1)).unwrap();
        let read = disks.read(range(1540, 3), &mut buffer).unwrap().bytes;
        assert_eq!(
            (read[4095], read[4096], read[8191], read[8192]),
            (7, 0, 0, 7)
        );
        disks.flush().unwrap();
    }

    #[test]
    fn what_is_no_part_of_one_disk_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let disks = disks(directory.path());
        let mut buffer = buffer();
        for wrong in [
            range(0, 1),
            range(1023, 1),
            range(1024, 4),
            range(1100, 1),
            range(2559, 2),
        ] {
            assert!(disks.read(wrong, &mut buffer).is_err(), "{wrong:?}");
            assert!(disks.write(wrong, &mut buffer).is_err(), "{wrong:?}");
            assert!(disks.zero(wrong).is_err(), "{wrong:?}");
            assert!(disks.runs_in(wrong).is_err(), "{wrong:?}");
        }
        assert!(disks.read(range(1536, 257), &mut buffer).is_err());
        assert!(
            Disks::none(PageCount::new(8))
                .read(range(8, 1), &mut buffer)
                .is_err()
        );
    }
}
