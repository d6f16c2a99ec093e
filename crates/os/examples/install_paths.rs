//! Measures the ways to put pages under a guest: from a hot buffer and from a socket, by batches of
//! several sizes; what one fault costs; what it costs to take pages away.
//!
//! `cargo run --release -p limosa-os --example install_paths 256 5` (MiB, runs) prints the median
//! and the best of the runs of each row: on a busy machine the best says what the kernel costs. Huge
//! pages are measured where enough of them are reserved.
#![allow(clippy::unwrap_used)]

use limosa_os::socket::wait_readable;
use limosa_os::userfault::{FaultGate, FaultPath, PageInstaller};
use limosa_os::{PageKind, SharedBitmap, SharedMemory};
use limosa_pages::{ByteCount, PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, Pfn};
use std::env;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const BATCHES: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];
const FAULTS: u64 = 2000;

fn main() {
    let number = |at: usize, default: u64| {
        let argument = env::args().nth(at);
        argument.map_or(default, |text| text.parse().unwrap())
    };
    let (mebibytes, runs) = (number(1, 256), number(2, 5));
    let bytes = mebibytes << 20;
    println!("{mebibytes} MiB, {runs} runs: median, best");
    let median = |name: &str, unit: &str, measure: &dyn Fn() -> f64| {
        let mut samples: Vec<f64> = (0..runs).map(|_| measure()).collect();
        samples.sort_by(f64::total_cmp);
        let best = match unit {
            "GB/s" => samples.last(),
            _ => samples.first(),
        };
        let (median, best) = (samples[samples.len() / 2], best.unwrap());
        println!("{name:54} {median:7.2} {best:7.2} {unit}");
    };
    for (name, kind, path) in [
        ("small, copy", PageKind::Small, FaultPath::Copy),
        ("small, continue", PageKind::Small, FaultPath::Continue),
        ("huge, continue", PageKind::Huge, FaultPath::Continue),
    ] {
        if let Err(error) = SharedMemory::create(ByteCount::new(bytes), kind) {
            println!("{name}: skipped: {error}");
            continue;
        }
        for batch in BATCHES {
            let row = format!("{name}, hot buffer, {} KiB", batch >> 10);
            median(&row, "GB/s", &|| from_buffer(kind, path, bytes, batch));
            let row = format!("{name}, loopback TCP, {} KiB", batch >> 10);
            median(&row, "GB/s", &|| from_socket(kind, path, bytes, batch));
        }
        if kind == PageKind::Small {
            let row = format!("{name}, a fault served by a thread that waits");
            median(&row, "µs", &|| fault(path));
        }
    }
    let punch = |scattered| move || punch(bytes, scattered);
    median(
        "mark missing, every second page by itself",
        "µs/page",
        &punch(true),
    );
    median("mark missing, all in one range", "µs/page", &punch(false));
    median("received in place, fresh memory, 1024 KiB", "GB/s", &|| {
        in_place(bytes, false)
    });
    median(
        "received in place, populated memory, 1024 KiB",
        "GB/s",
        &|| in_place(bytes, true),
    );
}

/// A memory whose pages are all missing, and its other side.
fn bed(
    kind: PageKind,
    path: FaultPath,
    bytes: u64,
) -> (Arc<SharedMemory>, FaultGate, PageInstaller) {
    let memory = Arc::new(SharedMemory::create(ByteCount::new(bytes), kind).unwrap());
    let gate = FaultGate::open_with(&memory, path).unwrap();
    let own = SharedMemory::open(memory.file().try_clone_to_owned().unwrap()).unwrap();
    let pages = memory.page_count();
    let installer = PageInstaller::new(
        gate.descriptor().try_clone_to_owned().unwrap(),
        gate.base(),
        Arc::new(own),
        SharedBitmap::create_writable(pages).unwrap(),
        path,
    )
    .unwrap();
    let all = PageRange::new(Pfn::new(0), pages);
    installer.mark_missing(all).unwrap();
    (memory, gate, installer)
}

fn page_at(offset: u64) -> Pfn {
    Pfn::new(offset / PAGE_SIZE)
}

fn rate(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / began.elapsed().as_secs_f64() / 1e9
}

fn from_buffer(kind: PageKind, path: FaultPath, bytes: u64, batch: usize) -> f64 {
    let (_memory, _gate, installer) = bed(kind, path, bytes);
    let buffer = vec![1; batch];
    let began = Instant::now();
    for offset in (0..bytes).step_by(batch) {
        installer.install(page_at(offset), &buffer).unwrap();
    }
    installer.finish().unwrap();
    rate(bytes, began)
}

/// The sender has the other processor.
fn socket_of(bytes: u64) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let chunk = vec![1; 1 << 20];
        for _ in 0..bytes >> 20 {
            stream.write_all(&chunk).unwrap();
        }
    });
    listener.accept().unwrap().0
}

fn from_socket(kind: PageKind, path: FaultPath, bytes: u64, batch: usize) -> f64 {
    let (_memory, _gate, installer) = bed(kind, path, bytes);
    let mut stream = socket_of(bytes);
    let mut buffer = vec![0; batch];
    let began = Instant::now();
    for offset in (0..bytes).step_by(batch) {
        stream.read_exact(&mut buffer).unwrap();
        installer.install(page_at(offset), &buffer).unwrap();
    }
    installer.finish().unwrap();
    rate(bytes, began)
}

fn in_place(bytes: u64, is_populated: bool) -> f64 {
    let memory = SharedMemory::create(ByteCount::new(bytes), PageKind::Small).unwrap();
    if is_populated {
        let all = PageRange::new(Pfn::new(0), memory.page_count());
        memory.populate(all).unwrap();
    }
    let stream = socket_of(bytes);
    let began = Instant::now();
    for offset in (0..bytes).step_by(1 << 20) {
        memory.receive(&stream, offset, 1 << 20).unwrap();
    }
    rate(bytes, began)
}

/// From the touch of a missing page to its content, when another thread has it at hand.
fn fault(path: FaultPath) -> f64 {
    let (memory, _gate, installer) = bed(PageKind::Small, path, FAULTS * PAGE_SIZE);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let content = vec![1; PAGE_SIZE_USIZE];
            let mut faults = Vec::new();
            while !is_over.load(Ordering::SeqCst) {
                wait_readable([Some(&installer)], Some(10)).unwrap();
                installer.read_faults(&mut faults).unwrap();
                for page in faults.drain(..) {
                    installer.install(page, &content).unwrap();
                }
            }
        });
        let mut samples: Vec<Duration> = (0..FAULTS)
            .map(|page| {
                let began = Instant::now();
                memory.read_word(page * PAGE_SIZE).unwrap();
                began.elapsed()
            })
            .collect();
        is_over.store(true, Ordering::SeqCst);
        samples.sort();
        samples[samples.len() / 2].as_secs_f64() * 1e6
    })
}

/// Takes away pages that exist: every second one by itself, or all at once.
fn punch(bytes: u64, is_scattered: bool) -> f64 {
    let (memory, _gate, installer) = bed(PageKind::Small, FaultPath::Copy, bytes);
    let all = PageRange::new(Pfn::new(0), memory.page_count());
    let other = SharedMemory::open(memory.file().try_clone_to_owned().unwrap()).unwrap();
    other.populate(all).unwrap();
    let began = Instant::now();
    if is_scattered {
        for page in all.iter().step_by(2) {
            let one = PageRange::new(page, PageCount::new(1));
            installer.mark_missing(one).unwrap();
        }
    } else {
        installer.mark_missing(all).unwrap();
    }
    let marked = installer.missing_count().get();
    began.elapsed().as_secs_f64() * 1e6 / marked as f64
}
