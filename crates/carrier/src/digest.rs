//! Digests: did the target install exactly what the source held at the switch?
//!
//! The target hashes each page where it was installed, right after the last byte came in; the
//! source hashes its frozen memory after the guest has left. Neither costs downtime. Pages that are
//! zero, or were never there, count for nothing on either side.

use crate::disks::{self, Disks};
use limosa_engine::wire::Digest;
use limosa_os::SharedMemory;
use limosa_pages::{PageCount, PageRange, Pfn};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Stands for a zero page in a table of hashes.
const ZERO: u64 = 0;

/// Parts of disks, of 1 MiB at most, after which progress is told.
const PROGRESS_PARTS: u64 = 64;

/// Pages whose hashes are allocated together: one page of hashes.
const CHUNK: u64 = 512;

/// The hash of every page of a guest, with memory taken only where pages were installed.
#[derive(Debug)]
pub(crate) struct PageHashes {
    chunks: Vec<OnceLock<Box<[AtomicU64]>>>,
}

impl PageHashes {
    pub(crate) fn new(pages: PageCount) -> Self {
        let chunks =
            usize::try_from(pages.get().div_ceil(CHUNK)).expect("the memory is mapped here");
        let mut table = Vec::new();
        table.resize_with(chunks, OnceLock::new);
        Self { chunks: table }
    }

    /// Hashes `page` as it lies in memory.
    pub(crate) fn set(&self, page: Pfn, memory: &SharedMemory) {
        self.store(page, hash(page, memory));
    }

    /// Hashes the content of `page` as it will be installed.
    pub(crate) fn set_content(&self, page: Pfn, content: &[u8]) {
        self.store(page, hash_content(content));
    }

    /// Notes that `page` is zero.
    pub(crate) fn set_zero(&self, page: Pfn) {
        self.store(page, ZERO);
    }

    fn store(&self, page: Pfn, hash: u64) {
        let index = |number: u64| usize::try_from(number).expect("within the table");
        let chunk = self.chunks[index(page.get() / CHUNK)]
            .get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(ZERO)).collect());
        chunk[index(page.get() % CHUNK)].store(hash, Ordering::Relaxed);
    }

    /// The digest of what was installed, with that of the state.
    pub(crate) fn digest(&self, state: &[u8]) -> Digest {
        let mut sum = Sum::default();
        for (number, chunk) in (0u64..).zip(&self.chunks) {
            let hashes = chunk.get().into_iter().flatten();
            for (page, hash) in (number * CHUNK..).zip(hashes) {
                sum.add(Pfn::new(page), hash.load(Ordering::Relaxed));
            }
        }
        sum.finish(state)
    }
}

/// The digest of a frozen guest: its memory, the disks that were copied, its state.
/// `progress` is called now and then while disks are read, which may take minutes.
pub(crate) fn of_guest(
    memory: &SharedMemory,
    disks: &Disks,
    state: &[u8],
    progress: impl Fn(),
) -> io::Result<Digest> {
    let mut sum = Sum::default();
    let all = PageRange::new(Pfn::new(0), memory.page_count());
    for extent in memory.data_extents(all)? {
        extent
            .iter()
            .for_each(|page| sum.add(page, hash(page, memory)));
    }
    let mut buffer = disks::buffer();
    let mut read = 0_u64;
    for part in disks.runs()?.into_iter().flat_map(disks::parts) {
        let content = disks.read(part, &mut buffer)?;
        read += 1;
        if read.is_multiple_of(PROGRESS_PARTS) {
            progress();
        }
        for (page, content) in content.pages() {
            sum.add(page, hash_content(content));
        }
    }
    Ok(sum.finish(state))
}

fn hash(page: Pfn, memory: &SharedMemory) -> u64 {
    if memory.is_zero(page) {
        return ZERO;
    }
    // A page with content never looks like a zero page.
    memory.hash(page).max(1)
}

fn hash_content(content: &[u8]) -> u64 {
    if content.iter().all(|&byte| byte == 0) {
        return ZERO;
    }
    xxh3_64(content).max(1)
}

#[derive(Default)]
struct Sum {
    hash: Xxh3,
    pages: u64,
}

impl Sum {
    fn add(&mut self, page: Pfn, hash: u64) {
        if hash != ZERO {
            self.hash.update(&page.get().to_le_bytes());
            self.hash.update(&hash.to_le_bytes());
            self.pages += 1;
        }
    }

    fn finish(self, state: &[u8]) -> Digest {
        Digest {
            memory: self.hash.digest128(),
            pages: PageCount::new(self.pages),
            state: xxh3_64(state),
        }
    }
}
