//! What it costs to look at guest memory: whether a page is zero, its hash, which pages exist.
//!
//! `cargo bench -p limosa-os --bench memory`. The test for zero is over a page that is, one that is not at
//! its end, and one that is not at its beginning; the scan is of 256 MiB.
#![allow(clippy::unwrap_used)]

use criterion::{Criterion, Throughput};
use limosa_os::memory::ExistingPages;
use limosa_os::{PageKind, SharedMemory};
use limosa_pages::{ByteCount, PAGE_SIZE, PageCount, PageRange, Pfn};
use std::hint::black_box;
use std::sync::Arc;

const MEMORY: ByteCount = ByteCount::new(256 << 20);
/// The engine asks by pieces of 2 MiB.
const PIECE: u64 = 512;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    pages(&mut criterion);
    scans(&mut criterion);
    criterion.final_summary();
}

fn memory(bytes: ByteCount) -> SharedMemory {
    SharedMemory::create(bytes, PageKind::Small).unwrap()
}

fn pages(criterion: &mut Criterion) {
    let memory = memory(ByteCount::new(4 * PAGE_SIZE));
    let all = PageRange::new(Pfn::new(0), memory.page_count());
    memory.populate(all).unwrap();
    memory.write_at(2 * PAGE_SIZE - 1, &[1]).unwrap();
    memory.write_at(2 * PAGE_SIZE, &[1]).unwrap();
    let mut group = criterion.benchmark_group("page");
    group.throughput(Throughput::Bytes(PAGE_SIZE));
    for (page, name, expect) in [
        (0, "zero", true),
        (1, "not zero at its end", false),
        (2, "not zero at its beginning", false),
    ] {
        let page = Pfn::new(page);
        assert_eq!(memory.is_zero(page), expect);
        group.bench_function(format!("test for zero: {name}"), |bencher| {
            bencher.iter(|| memory.is_zero(black_box(page)));
        });
    }
    group.bench_function("hash", |bencher| {
        bencher.iter(|| memory.hash(black_box(Pfn::new(1))));
    });
    group.finish();
}

/// Memory of which this page of so many exists.
fn touched(every: u64) -> SharedMemory {
    let memory = memory(MEMORY);
    for page in (0..memory.page_count().get()).step_by(every as usize) {
        memory.write_at(page * PAGE_SIZE, &[1]).unwrap();
    }
    memory
}

fn scans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scan for data");
    group.throughput(Throughput::Elements(MEMORY.get() / PAGE_SIZE));
    let filled = memory(MEMORY);
    let all = PageRange::new(Pfn::new(0), filled.page_count());
    filled.populate(all).unwrap();
    for (name, memory) in [
        ("nothing there", memory(MEMORY)),
        ("every 16th page there", touched(16)),
        ("all there", filled),
    ] {
        group.bench_function(format!("{name}, at once"), |bencher| {
            bencher.iter(|| memory.data_extents(all).unwrap().len());
        });
        group.bench_function(format!("{name}, by pieces of 2 MiB"), |bencher| {
            bencher.iter(|| {
                pieces()
                    .map(|piece| memory.data_extents(piece).unwrap().len())
                    .sum::<usize>()
            });
        });
        let known = ExistingPages::new(Arc::new(memory));
        known.all().unwrap();
        group.bench_function(format!("{name}, by pieces, remembered"), |bencher| {
            bencher.iter(|| {
                pieces()
                    .map(|piece| known.runs_in(piece).unwrap().len())
                    .sum::<usize>()
            });
        });
    }
    group.finish();
}

fn pieces() -> impl Iterator<Item = PageRange> {
    let pages = MEMORY.get() / PAGE_SIZE;
    let firsts = (0..pages).step_by(PIECE as usize);
    firsts.map(|first| PageRange::new(Pfn::new(first), PageCount::new(PIECE)))
}
