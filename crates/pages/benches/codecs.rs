//! What it costs to write pages shorter and to read them again.
//!
//! `cargo bench -p limosa-pages --bench codecs`. *Text* has words of 64 kinds, as the writer's content of
//! that name; *noise* cannot be written shorter, so that an encoder only finds out. A difference is that
//! of a page of which an eighth was changed in one piece.
#![allow(clippy::unwrap_used)]

use criterion::{Criterion, Throughput};
use limosa_pages::PAGE_SIZE_USIZE;
use limosa_pages::codec::{delta, lz4, zstd};
use std::hint::black_box;

/// Pages that are encoded together, as a stream may do it.
const PAGES: usize = 16;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    compression(&mut criterion);
    frames(&mut criterion);
    difference(&mut criterion);
    criterion.final_summary();
}

/// Words that follow from their place and a seed, xorshift with a multiplication behind it.
fn words(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed | 1;
    std::iter::repeat_with(move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    })
}

fn noise(bytes: usize) -> Vec<u8> {
    words(1)
        .take(bytes / 8)
        .flat_map(u64::to_le_bytes)
        .collect()
}

fn text(bytes: usize) -> Vec<u8> {
    let kinds: Vec<u64> = words(2).take(64).collect();
    let chosen = words(3).map(|word| kinds[(word >> 58) as usize]);
    chosen.take(bytes / 8).flat_map(u64::to_le_bytes).collect()
}

fn compression(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lz4");
    let length = PAGES * PAGE_SIZE_USIZE;
    group.throughput(Throughput::Bytes(length as u64));
    for (name, pages) in [("text", text(length)), ("noise", noise(length))] {
        let mut out = Vec::new();
        group.bench_function(format!("encode {PAGES} pages of {name}"), |bencher| {
            bencher.iter(|| {
                out.clear();
                lz4::encode(black_box(&pages), &mut out)
            });
        });
        out.clear();
        if !lz4::encode(&pages, &mut out) {
            continue;
        }
        let mut decoded = vec![0; length];
        group.bench_function(format!("decode {PAGES} pages of {name}"), |bencher| {
            bencher.iter(|| lz4::decode(black_box(&out), &mut decoded).unwrap());
        });
        assert_eq!(decoded, pages);
    }
    group.finish();
}

/// Levels, and pages in a frame, by which `zstd::LEVEL` was chosen. What a frame is of its pages is in the
/// name.
fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zstd");
    for (name, pages) in [("text", text(1 << 20)), ("noise", noise(1 << 20))] {
        for (level, count) in [(-5, 16), (-1, 16), (1, 1), (1, 16), (1, 256), (3, 16)] {
            let pages = &pages[..count * PAGE_SIZE_USIZE];
            group.throughput(Throughput::Bytes(pages.len() as u64));
            let mut encoder = zstd::Encoder::with_level(level);
            let mut out = Vec::new();
            let is_shorter = encoder.encode(pages, &mut out);
            let percent = if is_shorter {
                out.len() * 100 / pages.len()
            } else {
                100
            };
            let what = format!("{count} pages of {name}, level {level}, {percent} %");
            group.bench_function(format!("encode {what}"), |bencher| {
                bencher.iter(|| {
                    out.clear();
                    encoder.encode(black_box(pages), &mut out)
                });
            });
            if !is_shorter || level != zstd::LEVEL {
                continue;
            }
            let (mut decoder, mut decoded) = (zstd::Decoder::new(), vec![0; pages.len()]);
            group.bench_function(format!("decode {what}"), |bencher| {
                bencher.iter(|| decoder.decode(black_box(&out), &mut decoded).unwrap());
            });
            assert_eq!(decoded, pages);
        }
    }
    group.finish();
}

fn difference(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("delta");
    group.throughput(Throughput::Bytes(PAGE_SIZE_USIZE as u64));
    let old = noise(PAGE_SIZE_USIZE);
    let mut new = old.clone();
    let changed = PAGE_SIZE_USIZE / 8;
    new[1024..1024 + changed].copy_from_slice(&text(changed));
    let mut out = Vec::new();
    for (name, old, new) in [
        ("a page that is the same", &old, &old),
        ("a page of which an eighth changed", &old, &new),
        ("another page", &old, &text(PAGE_SIZE_USIZE)),
    ] {
        group.bench_function(format!("encode {name}"), |bencher| {
            bencher.iter(|| {
                out.clear();
                delta::encode(
                    black_box(old),
                    black_box(new),
                    PAGE_SIZE_USIZE / 4 * 3,
                    &mut out,
                )
            });
        });
    }
    out.clear();
    assert!(delta::encode(&old, &new, PAGE_SIZE_USIZE, &mut out));
    let mut page = old;
    // A page that has the new version already gets it again: the same bytes are written.
    group.bench_function("decode a page of which an eighth changed", |bencher| {
        bencher.iter(|| delta::decode(black_box(&out), &mut page).unwrap());
    });
    assert_eq!(page, new);
    group.finish();
}
