//! What sets of pages cost: filling them one by one and by ranges, counting, combining, walking.
//!
//! `cargo bench -p limosa-pages --bench sets`. The memory is one of 4 GiB, a million pages; *scattered*
//! is one page of 32 in no order, *in runs* is as many in runs of 64.
#![allow(clippy::unwrap_used)]

use criterion::{BatchSize, Criterion, Throughput};
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};
use std::hint::black_box;

const PAGES: u64 = 1 << 20;
const MEMBERS: u64 = PAGES / 32;
const RUN: u64 = 64;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    fill(&mut criterion);
    look(&mut criterion);
    combine(&mut criterion);
    criterion.final_summary();
}

/// Pages in an order that looks like none: multiples of an odd number walk through all of them.
fn scattered() -> impl Iterator<Item = Pfn> {
    (0..MEMBERS).map(|index| Pfn::new(index.wrapping_mul(0x9e37_79b1) % PAGES))
}

fn runs() -> impl Iterator<Item = PageRange> {
    let apart = PAGES / (MEMBERS / RUN);
    (0..MEMBERS / RUN).map(move |run| PageRange::new(Pfn::new(run * apart), PageCount::new(RUN)))
}

fn empty() -> PageSet {
    PageSet::empty(PageCount::new(PAGES))
}

/// The two kinds of sets with their names.
fn sets() -> [(&'static str, PageSet); 2] {
    let (mut one_by_one, mut in_runs) = (empty(), empty());
    for page in scattered() {
        one_by_one.insert(page);
    }
    runs().for_each(|run| in_runs.insert_range(run));
    [("scattered", one_by_one), ("in runs", in_runs)]
}

fn fill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page set");
    group.throughput(Throughput::Elements(MEMBERS));
    group.bench_function("insert one by one, scattered", |bencher| {
        bencher.iter_batched_ref(
            empty,
            |set| scattered().filter(|page| set.insert(*page)).count(),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("insert by ranges, in runs", |bencher| {
        bencher.iter_batched_ref(
            empty,
            |set| runs().for_each(|run| set.insert_range(run)),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn look(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page set");
    for (name, set) in sets() {
        group.throughput(Throughput::Elements(PAGES));
        group.bench_function(format!("count, {name}"), |bencher| {
            bencher.iter(|| black_box(&set).count());
        });
        group.throughput(Throughput::Elements(MEMBERS));
        group.bench_function(format!("runs, {name}"), |bencher| {
            bencher.iter(|| black_box(&set).runs().count());
        });
        group.bench_function(format!("contains, {name}"), |bencher| {
            bencher.iter(|| scattered().filter(|page| set.contains(*page)).count());
        });
    }
    group.finish();
}

fn combine(criterion: &mut Criterion) {
    type Deed = fn(&mut PageSet, &PageSet);
    let mut group = criterion.benchmark_group("page set");
    group.throughput(Throughput::Elements(PAGES));
    let [(_, one), (_, other)] = sets();
    let deeds: [(&str, Deed); 3] = [
        ("union", PageSet::union_with),
        ("intersection", PageSet::intersect_with),
        ("difference", PageSet::subtract),
    ];
    for (name, deed) in deeds {
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(
                || one.clone(),
                |set| deed(set, black_box(&other)),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}
