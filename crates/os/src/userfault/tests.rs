//! The contract of the installer, on every path: guests that prove their pages, installers that bring
//! the same ones in different orders, fault servers, all at once.

use super::*;
use crate::memory::{HUGE_PAGE_BYTES, MemoryError, PageKind, SharedMemory};
use crate::socket::wait_readable;
use crate::{SharedBitmap, bitmap};
use limosa_pages::{ByteCount, PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, PageSet, Pfn};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_64;

type Page = [u8; PAGE_SIZE_USIZE];

/// Both sides of one memory, in one process: the guest's threads use mapping A, all else mapping B.
struct Bed {
    guest: Arc<SharedMemory>,
    gate: FaultGate,
    made: bitmap::SharedBitmap,
    own: Arc<SharedMemory>,
    pages: u64,
}

impl Bed {
    fn new(kind: PageKind, path: FaultPath, pages: u64) -> Result<Self, String> {
        let size = ByteCount::new(pages * PAGE_SIZE);
        let guest = match SharedMemory::create(size, kind) {
            Ok(memory) => Arc::new(memory),
            Err(error @ MemoryError::NoHugePages { .. }) => return Err(error.to_string()),
            Err(error) => panic!("{error}"),
        };
        let gate = match FaultGate::open_with(&guest, path) {
            Ok(gate) => gate,
            Err(error @ GateError::NotPermitted(_)) => return Err(error.to_string()),
            Err(error) => panic!("{error:?}"),
        };
        assert_eq!(gate.path(), path);
        let made = SharedBitmap::create_writable(PageCount::new(pages)).unwrap();
        let own = SharedMemory::open(guest.file().try_clone_to_owned().unwrap()).unwrap();
        Ok(Self {
            guest,
            gate,
            made,
            own: Arc::new(own),
            pages,
        })
    }

    /// What a daemon makes of what it is lent; may be called again, as a restarted one would.
    fn installer(&self) -> PageInstaller {
        let missing = self.made.file().try_clone_to_owned().unwrap();
        PageInstaller::new(
            self.gate.descriptor().try_clone_to_owned().unwrap(),
            self.gate.base(),
            Arc::clone(&self.own),
            SharedBitmap::open_writable(missing, PageCount::new(self.pages)).unwrap(),
            self.gate.path(),
        )
        .unwrap()
    }
}

/// A page that proves itself.
fn page(number: u64, version: u64) -> Page {
    let mut page = [0; PAGE_SIZE_USIZE];
    for (index, word) in (0..).zip(page.chunks_exact_mut(8)) {
        let value = number
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(version << 32)
            .wrapping_add(index);
        word.copy_from_slice(&value.to_le_bytes());
    }
    page[..8].copy_from_slice(&number.to_le_bytes());
    page[8..16].copy_from_slice(&version.to_le_bytes());
    let sum = xxh3_64(&page[..PAGE_SIZE_USIZE - 8]);
    page[PAGE_SIZE_USIZE - 8..].copy_from_slice(&sum.to_le_bytes());
    page
}

/// What the source has. Pages are of six kinds, in runs of sixteen: three kinds arrive later with
/// content, one arrives later and is zero, one has arrived before the guest runs, one was never
/// touched.
fn at_source(number: u64) -> Page {
    match kind(number) {
        0..=2 | 4 => page(number, 0),
        _ => [0; PAGE_SIZE_USIZE],
    }
}

const fn kind(number: u64) -> u64 {
    number / 16 % 6
}

const fn arrives_later(number: u64) -> bool {
    kind(number) <= 3
}

const fn one(number: u64) -> PageRange {
    PageRange::new(Pfn::new(number), PageCount::new(1))
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % limit
    }

    fn order(&mut self, count: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..count).collect();
        for index in (1..count).rev() {
            order.swap(index as usize, self.below(index + 1) as usize);
        }
        order
    }
}

/// Brings what arrives later, one page at a time or in batches of neighbours.
fn bring(installer: &PageInstaller, number: u64, batch: u64) -> u64 {
    let pages = installer.page_count().get();
    let mut brought = 0;
    let mut buffer: Vec<u8> = Vec::new();
    let mut first = number;
    let flush = |first: u64, buffer: &mut Vec<u8>| {
        let count = installer.install(Pfn::new(first), buffer).unwrap().get();
        buffer.clear();
        count
    };
    for number in number..(number + batch).min(pages) {
        let content = at_source(number);
        if arrives_later(number) && content != [0; PAGE_SIZE_USIZE] {
            if buffer.is_empty() {
                first = number;
            }
            buffer.extend(content);
            continue;
        }
        brought += flush(first, &mut buffer);
        if arrives_later(number) {
            brought += installer.install_zeros(one(number)).unwrap().get();
        }
    }
    brought + flush(first, &mut buffer)
}

/// Answers faults as a daemon does; how many pages it brought.
fn serve(installer: &PageInstaller, is_over: &AtomicBool) -> u64 {
    let mut brought = 0;
    let mut faults = Vec::new();
    while !is_over.load(Ordering::SeqCst) {
        wait_readable([Some(installer)], Some(5)).unwrap();
        installer.read_faults(&mut faults).unwrap();
        for page in faults.drain(..) {
            let missing = installer.missing_in_unit(page);
            if missing.is_empty() {
                installer.resolve(page).unwrap();
            }
            for number in missing.into_iter().flat_map(PageRange::iter) {
                brought += bring(installer, number.get(), 1);
            }
        }
    }
    brought
}

/// Reads and rewrites every page, some times, and finds each as it was left.
fn be_guest(bed: &Bed, versions: &[Mutex<u64>], seed: u64) {
    const TURNS: u64 = 3;
    let mut random = Random(seed);
    for _ in 0..TURNS {
        for number in random.order(bed.pages) {
            let mut version = versions[number as usize]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let expect = match *version {
                0 => at_source(number),
                version => page(number, version),
            };
            let mut found = [1; PAGE_SIZE_USIZE];
            bed.guest.read_page(Pfn::new(number), &mut found);
            assert!(
                found == expect,
                "page {number} is not as version {} of it",
                *version
            );
            *version += 1;
            bed.guest
                .write_at(number * PAGE_SIZE, &page(number, *version))
                .unwrap();
        }
    }
}

/// Puts the memory into the state in which a guest would be started.
fn prepare(bed: &Bed, installer: &PageInstaller) -> u64 {
    let mut late = 0;
    for number in (0..bed.pages).filter(|&number| kind(number) != 5) {
        // Stale content of an earlier round, unless it is here to stay.
        let content = if arrives_later(number) {
            page(number, 77)
        } else {
            at_source(number)
        };
        bed.own.write_at(number * PAGE_SIZE, &content).unwrap();
        installer.mark_missing(one(number)).unwrap();
        match arrives_later(number) {
            true => late += 1,
            false if bed.own.kind() == PageKind::Small => {
                // It arrives behind the mark.
                bed.own.write_at(number * PAGE_SIZE, &content).unwrap();
                installer.arrived_in_place(one(number)).unwrap();
            }
            false => installer.arrived_in_place(one(number)).unwrap(),
        }
    }
    bed.gate.unmap_pages().unwrap();
    assert_eq!(installer.missing_count(), PageCount::new(late));
    late
}

/// Does all work at the same time, with two fault servers; true if some of it does not end.
fn at_once(
    work: Vec<Box<dyn FnOnce() + Send + '_>>,
    bed: &Bed,
    serve: impl Fn() + Sync,
    is_over: &AtomicBool,
) -> bool {
    let (done, all_done) = mpsc::channel();
    let count = work.len();
    thread::scope(|scope| {
        for work in work {
            let done = done.clone();
            scope.spawn(move || {
                work();
                done.send(()).unwrap();
            });
        }
        for _ in 0..2 {
            scope.spawn(&serve);
        }
        let wait = |_| all_done.recv_timeout(Duration::from_secs(20)).is_err();
        let is_stuck = (0..count).any(wait);
        is_over.store(true, Ordering::SeqCst);
        if is_stuck {
            // Wakes everybody, so that the test ends; who waited reads zeros and complains, too.
            let faults = bed.gate.descriptor().try_clone_to_owned().unwrap();
            let faults = request::Userfault::adopt(faults).unwrap();
            let len = bed.pages * PAGE_SIZE;
            faults.unregister(bed.gate.base(), len).unwrap();
        }
        is_stuck
    })
}

fn race(bed: Bed, seed: u64) {
    let installer = bed.installer();
    let late = prepare(&bed, &installer);
    let versions: Vec<Mutex<u64>> = (0..bed.pages).map(|_| Mutex::new(0)).collect();
    let (is_over, brought) = (AtomicBool::new(false), AtomicU64::new(0));
    let count = |pages: u64| {
        brought.fetch_add(pages, Ordering::SeqCst);
    };
    let mut work: Vec<Box<dyn FnOnce() + Send + '_>> = Vec::new();
    for guest in 0..3 {
        let (bed, versions) = (&bed, &versions);
        work.push(Box::new(move || {
            be_guest(bed, versions, seed ^ guest << 20)
        }));
    }
    let pairs = Random(seed).order(bed.pages / 2);
    // Two bring the same long runs at the same time, so that one of them is late with each.
    let orders: [(Vec<u64>, u64); 4] = [
        ((0..bed.pages).step_by(48).collect(), 48),
        ((0..bed.pages).step_by(48).collect(), 48),
        ((0..bed.pages).rev().collect(), 1),
        (pairs.into_iter().map(|pair| pair * 2).collect(), 2),
    ];
    for (order, batch) in orders {
        let (installer, count) = (&installer, &count);
        work.push(Box::new(move || {
            let brought = order
                .into_iter()
                .map(|number| bring(installer, number, batch));
            count(brought.sum());
        }));
    }
    let is_stuck = at_once(
        work,
        &bed,
        || {
            count(serve(&installer, &is_over));
        },
        &is_over,
    );
    assert!(!is_stuck, "a thread was never woken, or had failed");
    assert_eq!(brought.into_inner(), late, "each page arrives once");
    installer.finish().unwrap();
    assert_eq!(installer.missing_count(), PageCount::ZERO);
    bed.gate.close().unwrap();
    for (number, version) in (0..).zip(versions) {
        let mut found = [0; PAGE_SIZE_USIZE];
        bed.own.read_page(Pfn::new(number), &mut found);
        let version = version.into_inner().unwrap_or_else(PoisonError::into_inner);
        assert!(
            found == page(number, version),
            "the last write of {number} is lost"
        );
    }
}

fn check_path(kind: PageKind, path: FaultPath, pages: u64) {
    for seed in 1..=4 {
        match Bed::new(kind, path, pages) {
            Ok(bed) => race(bed, seed),
            Err(reason) => return println!("skipped: {reason}"),
        }
    }
}

#[test]
fn small_pages_are_copied_in() {
    check_path(PageKind::Small, FaultPath::Copy, 1200);
}

#[test]
fn small_pages_are_written_and_continued() {
    check_path(PageKind::Small, FaultPath::Continue, 1200);
}

/// Needs two reserved huge pages, which only root can see to.
#[test]
fn huge_pages_are_written_and_continued() {
    let pages = 2 * HUGE_PAGE_BYTES / PAGE_SIZE;
    check_path(PageKind::Huge, FaultPath::Continue, pages);
}

#[test]
fn a_long_run_of_zeros_makes_nothing() {
    for (kind, path) in [
        (PageKind::Small, FaultPath::Copy),
        (PageKind::Small, FaultPath::Continue),
        (PageKind::Huge, FaultPath::Continue),
    ] {
        let bed = match Bed::new(kind, path, 2048) {
            Ok(bed) => bed,
            Err(reason) => {
                println!("skipped: {reason}");
                continue;
            }
        };
        let installer = bed.installer();
        let numbers = [0, 5, 699, 700, 701, 2047];
        let all = PageRange::new(Pfn::new(0), PageCount::new(2048));
        installer.mark_missing(all).unwrap();
        bed.gate.unmap_pages().unwrap();
        // Of a daemon that died before it had shown them; the kernel copies none half-way.
        let half: &[u64] = if path == FaultPath::Copy {
            &[]
        } else {
            &[5, 700, 701]
        };
        for &number in half {
            let stale = page(number, 77);
            bed.own.write_at(number * PAGE_SIZE, &stale).unwrap();
        }
        assert_eq!(installer.install_zeros(all).unwrap(), all.count);
        installer.finish().unwrap();
        let existing = bed.own.data_extents(all).unwrap();
        let existing: u64 = existing.iter().map(|run| run.count.get()).sum();
        let most = half.len() as u64 * kind.bytes() / PAGE_SIZE;
        assert!(existing <= most, "{existing} pages exist");
        for number in numbers {
            assert!(installer.resolve(Pfn::new(number)).unwrap());
        }
        bed.gate.close().unwrap();
        for number in numbers {
            let mut found = [1; PAGE_SIZE_USIZE];
            bed.own.read_page(Pfn::new(number), &mut found);
            assert!(found == [0; PAGE_SIZE_USIZE], "page {number} is not zero");
        }
    }
}

/// A daemon has read a fault, written half a page on the path that allows it, and dies.
#[test]
fn the_next_daemon_finds_what_is_missing_and_whom_to_wake() {
    for path in [FaultPath::Copy, FaultPath::Continue] {
        let bed = match Bed::new(PageKind::Small, path, 200) {
            Ok(bed) => bed,
            Err(reason) => return println!("skipped: {reason}"),
        };
        let first = bed.installer();
        prepare(&bed, &first);
        bring(&first, 0, 60);
        let versions: Vec<Mutex<u64>> = (0..bed.pages).map(|_| Mutex::new(0)).collect();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let guest = scope.spawn(|| be_guest(&bed, &versions, 5));
            let mut faults = Vec::new();
            // What it reads before a page misses is only to be resolved.
            while !faults.iter().any(|&page| first.is_missing(page)) {
                faults.drain(..).for_each(|page| {
                    first.resolve(page).unwrap();
                });
                wait_readable([Some(&first)], Some(100)).unwrap();
                first.read_faults(&mut faults).unwrap();
            }
            if path == FaultPath::Continue {
                let page = faults.iter().find(|&&page| first.is_missing(page)).unwrap();
                bed.own.write_at(page.file_offset(), &[9; 2048]).unwrap();
            }
            let left = first.missing_count();
            let mut set = PageSet::empty(PageCount::new(bed.pages));
            first.missing_set(&mut set);
            assert_eq!((set.count(), left), (left, bed.made.count()));
            assert!(first.finish().is_err());
            drop(first);
            let second = bed.installer();
            assert_eq!(second.missing_count(), left);
            let (second, is_over) = (Arc::new(second), &is_over);
            let installer = Arc::clone(&second);
            let server = scope.spawn(move || serve(&installer, is_over));
            guest.join().unwrap();
            is_over.store(true, Ordering::SeqCst);
            // The guest sees its last page before the server has noted that it is there.
            server.join().unwrap();
            second.finish().unwrap();
        });
        bed.gate.close().unwrap();
    }
}

#[test]
fn a_closed_gate_and_bad_input_are_errors() {
    let bed = match Bed::new(PageKind::Small, FaultPath::Copy, 8) {
        Ok(bed) => bed,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let installer = bed.installer();
    let check = |result: Result<PageCount, InstallError>, expect: &str| {
        assert_eq!(result.unwrap_err().to_string(), expect);
    };
    installer
        .mark_missing(PageRange::new(Pfn::new(2), PageCount::new(3)))
        .unwrap();
    installer
        .mark_missing(PageRange::new(Pfn::new(8), PageCount::ZERO))
        .unwrap();
    check(
        installer.install(Pfn::new(7), &[0; 2 * PAGE_SIZE_USIZE]),
        "8192 bytes at page 0x7 are no whole pages of this memory",
    );
    check(
        installer.install(Pfn::new(1), &[0; 100]),
        "100 bytes at page 0x1 are no whole pages of this memory",
    );
    assert!(installer.mark_missing(one(8)).is_err());
    assert!(
        installer
            .install_zeros(PageRange::new(Pfn::new(u64::MAX), PageCount::new(2)))
            .is_err()
    );
    assert!(!installer.resolve(Pfn::new(2)).unwrap());
    assert_eq!(installer.missing_in_unit(Pfn::new(3)), [one(3)]);
    assert_eq!(installer.missing_in_unit(Pfn::new(9)), []);
    assert_eq!(
        installer
            .install(Pfn::new(1), &[5; 2 * PAGE_SIZE_USIZE])
            .unwrap(),
        PageCount::new(1)
    );
    assert_eq!(
        installer.finish().unwrap_err().to_string(),
        "2 pages are still missing"
    );
    bed.gate.close().unwrap();
    check(
        installer.install(Pfn::new(3), &[5; PAGE_SIZE_USIZE]),
        "the VM process is gone or takes no more pages",
    );
    let other = tempfile::tempfile().unwrap();
    let missing = SharedBitmap::create_writable(PageCount::new(8)).unwrap();
    let foreign = PageInstaller::new(other.into(), 0, bed.own, missing, FaultPath::Copy);
    assert!(foreign.is_err());
}
