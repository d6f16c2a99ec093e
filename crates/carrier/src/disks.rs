//! Disks that are copied along with their guest: read at the source beside the guest that writes them, written
//! at the target before it runs there.
//!
//! Their pages are numbered behind those of the memory, and go through the same rounds. What differs is how
//! they are reached: by reads and writes past the page cache, whose errors are errors of the migration. A
//! mapping would turn them into the end of the daemon.

use limosa_engine::wire::CopiedDisk;
use limosa_os::disk::{Disk, DiskBuffer};
use limosa_pages::{ByteCount, Numbering, PAGE_SIZE, PageCount, PageRange, Pfn};
use std::io;

/// Pages that are read or written at once.
const PART_PAGES: u64 = 256;
const PART_BYTES: usize = (PART_PAGES * PAGE_SIZE) as usize;

/// The disks of a guest, or none if they are not copied.
#[derive(Debug)]
pub(crate) struct Disks {
    numbering: Numbering,
    disks: Vec<Disk>,
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

impl Disks {
    /// Of a guest whose disks are not copied.
    pub(crate) fn none(memory: PageCount) -> Self {
        let numbering = Numbering::new(memory, []).expect("no disk is too large");
        Self {
            numbering,
            disks: Vec::new(),
        }
    }

    /// Behind so much memory; `None` if they are too large.
    pub(crate) fn new(memory: PageCount, disks: Vec<Disk>) -> Option<Self> {
        let sizes = disks.iter().map(|disk| ByteCount::new(disk.bytes()));
        let numbering = Numbering::new(memory, sizes)?;
        Some(Self { numbering, disks })
    }

    /// All pages, those of the memory among them.
    pub(crate) fn pages(&self) -> PageCount {
        self.numbering.end()
    }

    /// True if no disk is copied.
    pub(crate) const fn is_empty(&self) -> bool {
        self.disks.is_empty()
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
    ) -> io::Result<&'a [u8]> {
        let (disk, _, offset, len) = self.place(range)?;
        let bytes = part(range, into)?;
        let (content, beyond) = bytes.split_at_mut(usize::try_from(len).unwrap_or(usize::MAX));
        disk.read_at(content, offset)?;
        beyond.fill(0);
        Ok(bytes)
    }

    /// Writes pages of one disk from the beginning of the buffer; what lies behind its end is left out.
    pub(crate) fn write(&self, range: PageRange, from: &mut DiskBuffer) -> io::Result<()> {
        let (disk, _, offset, len) = self.place(range)?;
        let bytes = part(range, from)?;
        disk.write_at(&bytes[..usize::try_from(len).unwrap_or(usize::MAX)], offset)
    }

    /// Makes pages of one disk zeroes, and gives back their room where its file system can.
    pub(crate) fn zero(&self, range: PageRange) -> io::Result<()> {
        let (disk, _, offset, len) = self.place(range)?;
        match disk.punch(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            other => return other,
        }
        let mut zeroes = buffer();
        for done in (0..len).step_by(PART_BYTES) {
            let len = usize::try_from(len - done).unwrap_or(PART_BYTES);
            disk.write_at(&zeroes.bytes_mut()[..len.min(PART_BYTES)], offset + done)?;
        }
        Ok(())
    }

    /// Returns when all that was written will outlive a loss of power.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(Disk::flush)
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
        let all = [("a", 2 * PAGE_SIZE + 512), ("b", 4 << 20)].map(disk);
        Disks::new(PageCount::new(1000), all.into()).unwrap()
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
        let read = disks.read(range(1026, 1), &mut buffer).unwrap();
        assert_eq!((read[511], read[512], read.len()), (7, 0, 4096));
        assert_eq!(disks.runs_in(range(1536, 1024)).unwrap(), [range(1540, 3)]);
        assert_eq!(disks.runs().unwrap(), [range(1025, 2), range(1540, 3)]);
        let all: Vec<PageRange> = parts(range(5, 600)).collect();
        assert_eq!(all, [range(5, 256), range(261, 256), range(517, 88)]);
        assert_eq!(parts(range(5, 0)).count(), 0);
        let data = disks
            .describe()
            .unwrap()
            .into_iter()
            .map(|disk| disk.data.get());
        assert_eq!(data.collect::<Vec<_>>(), [4096 + 512, 3 * 4096]);
        disks.zero(range(1541, 1)).unwrap();
        let read = disks.read(range(1540, 3), &mut buffer).unwrap();
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
