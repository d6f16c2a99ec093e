//! What it costs to put pages under a guest, by path and batch; what it costs to take them away.
//!
//! `cargo bench -p limosa-os --bench install`. Pages come from a hot buffer; the memory and its gate are
//! made for each iteration, which is not measured with it. The example `install_paths` has the sockets and the
//! faults beside it. Needs userfaultfd (root, or `vm.unprivileged_userfaultfd`), and a huge page that is
//! free for the rows of huge pages: what cannot be had is skipped, and said.
#![allow(clippy::unwrap_used)]

use criterion::{BatchSize, Criterion, Throughput};
use limosa_os::userfault::{FaultGate, FaultPath, PageInstaller};
use limosa_os::{PageKind, SharedBitmap, SharedMemory};
use limosa_pages::{ByteCount, PAGE_SIZE, PageCount, PageRange, Pfn};
use std::error::Error;
use std::sync::Arc;

/// As much as a huge page.
const BYTES: usize = 2 << 20;
const BATCHES: [usize; 3] = [4 << 10, 64 << 10, BYTES];

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (name, kind, path) in [
        ("small, copy", PageKind::Small, FaultPath::Copy),
        ("small, continue", PageKind::Small, FaultPath::Continue),
        ("huge, continue", PageKind::Huge, FaultPath::Continue),
    ] {
        match Bed::new(kind, path) {
            Ok(_) => install(&mut criterion, name, || Bed::new(kind, path).unwrap()),
            Err(error) => println!("skipped: {name}: {error}"),
        }
    }
    let small = || Bed::new(PageKind::Small, FaultPath::Copy);
    match small() {
        Ok(_) => take_away(&mut criterion, || small().unwrap()),
        Err(error) => println!("skipped: taking pages away: {error}"),
    }
    criterion.final_summary();
}

/// A memory whose pages are missing, and the side that puts them in. The gate and the mapping of the
/// guest's side live as long.
struct Bed {
    installer: PageInstaller,
    _gate: FaultGate,
    _memory: Arc<SharedMemory>,
}

impl Bed {
    fn new(kind: PageKind, path: FaultPath) -> Result<Self, Box<dyn Error>> {
        let memory = Arc::new(SharedMemory::create(ByteCount::new(BYTES as u64), kind)?);
        let gate = FaultGate::open_with(&memory, path)?;
        let own = SharedMemory::open(memory.file().try_clone_to_owned()?)?;
        let installer = PageInstaller::new(
            gate.descriptor().try_clone_to_owned()?,
            gate.base(),
            Arc::new(own),
            SharedBitmap::create_writable(memory.page_count())?,
            path,
        )?;
        installer.mark_missing(PageRange::new(Pfn::new(0), memory.page_count()))?;
        Ok(Self {
            installer,
            _gate: gate,
            _memory: memory,
        })
    }

    fn all(&self) -> PageRange {
        PageRange::new(Pfn::new(0), self.installer.page_count())
    }

    /// Puts all pages in, as many bytes at once as the buffer has.
    fn install(&self, buffer: &[u8]) {
        for offset in (0..BYTES).step_by(buffer.len()) {
            let first = Pfn::new(offset as u64 / PAGE_SIZE);
            self.installer.install(first, buffer).unwrap();
        }
    }
}

fn install(criterion: &mut Criterion, name: &str, bed: impl Fn() -> Bed) {
    let mut group = criterion.benchmark_group(format!("install {name}"));
    group.throughput(Throughput::Bytes(BYTES as u64));
    for batch in BATCHES {
        let buffer = vec![1; batch];
        group.bench_function(format!("{} KiB at once", batch >> 10), |bencher| {
            bencher.iter_batched_ref(&bed, |bed| bed.install(&buffer), BatchSize::PerIteration);
        });
    }
    group.finish();
}

/// Takes away small pages that exist.
fn take_away(criterion: &mut Criterion, bed: impl Fn() -> Bed) {
    let mut group = criterion.benchmark_group("take away");
    let buffer = vec![1; BYTES];
    let full = || {
        let bed = bed();
        bed.install(&buffer);
        bed
    };
    group.bench_function("in one range", |bencher| {
        bencher.iter_batched_ref(
            full,
            |bed| bed.installer.mark_missing(bed.all()).unwrap(),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("every second page by itself", |bencher| {
        bencher.iter_batched_ref(
            full,
            |bed| {
                for page in bed.all().iter().step_by(2) {
                    let one = PageRange::new(page, PageCount::new(1));
                    bed.installer.mark_missing(one).unwrap();
                }
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}
