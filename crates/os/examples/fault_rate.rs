//! Measures what page faults of several vCPUs cost the threads that serve them: one or two that read them
//! and ask for pages over a loopback connection, by a write for each page or by one for all that were
//! read together, and the one that takes the answers and puts the pages in.
//!
//! `cargo run --release -p limosa-os --example fault_rate 20000` (faults) prints processor time, which
//! says little about a busy machine but what its caches cost. Threads are the vCPUs, and another one the
//! source.
#![allow(clippy::unwrap_used)]

use limosa_os::socket::wait_readable;
use limosa_os::userfault::{FaultGate, FaultPath, PageInstaller};
use limosa_os::{PageKind, SharedBitmap, SharedMemory};
use limosa_pages::{PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, Pfn};
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

/// Bytes of a request, and in front of an answer.
const HEADER: usize = 16;

fn main() {
    let faults = env::args()
        .nth(1)
        .map_or(20_000, |text| text.parse().unwrap());
    println!("{faults} faults; µs of processor time for each");
    println!("vCPUs  threads  writes    faults a read  read and asked for  taken and put in");
    for vcpus in [1, 2, 4, 8, 16] {
        for (threads, is_batched, writes) in [
            (1, false, "each"),
            (1, true, "together"),
            (2, true, "together"),
        ] {
            let seen = measure(vcpus, faults / vcpus * vcpus, threads, is_batched);
            let [asked, answered] = [seen.asked, seen.answered];
            let reads = seen.a_read;
            println!(
                "{vcpus:5}  {threads:7}  {writes:8} {reads:14.1} {asked:19.2} {answered:17.2}"
            );
        }
    }
}

struct Seen {
    a_read: f64,
    asked: f64,
    answered: f64,
}

/// Processor time of this thread in µs: the first word of its schedstat, in nanoseconds.
fn busy() -> f64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let nanos: u64 = text.split(' ').next().unwrap().parse().unwrap();
    nanos as f64 / 1000.0
}

fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let source = listener.accept().unwrap().0;
    for end in [&target, &source] {
        end.set_nodelay(true).unwrap();
    }
    (target, source)
}

fn bed(pages: u64) -> (Arc<SharedMemory>, FaultGate, PageInstaller) {
    let size = PageCount::new(pages).bytes();
    let memory = Arc::new(SharedMemory::create(size, PageKind::Small).unwrap());
    let gate = FaultGate::open_with(&memory, FaultPath::Copy).unwrap();
    let own = SharedMemory::open(memory.file().try_clone_to_owned().unwrap()).unwrap();
    let installer = PageInstaller::new(
        gate.descriptor().try_clone_to_owned().unwrap(),
        gate.base(),
        Arc::new(own),
        SharedBitmap::create_writable(memory.page_count()).unwrap(),
        FaultPath::Copy,
    )
    .unwrap();
    let all = PageRange::new(Pfn::new(0), memory.page_count());
    installer.mark_missing(all).unwrap();
    (memory, gate, installer)
}

fn measure(vcpus: u64, faults: u64, threads: usize, is_batched: bool) -> Seen {
    let (memory, _gate, installer) = bed(faults);
    let (target, source) = connection();
    let answers = target.try_clone().unwrap();
    let target = Mutex::new(target);
    let waited_for = Mutex::new(BTreeMap::new());
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| answer(source));
        let asking: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| ask(&installer, &target, &waited_for, is_batched, &is_over)))
            .collect();
        let taking = scope.spawn(|| take(&installer, answers, &waited_for, faults));
        let guest: Vec<_> = (0..vcpus)
            .map(|vcpu| {
                let memory = &memory;
                scope.spawn(move || {
                    for page in (vcpu..faults).step_by(usize::try_from(vcpus).unwrap()) {
                        memory.read_word(page * PAGE_SIZE).unwrap();
                    }
                })
            })
            .collect();
        guest.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        is_over.store(true, Ordering::SeqCst);
        let (mut asked, mut reads) = (0.0, 0);
        for thread in asking {
            let (time, more) = thread.join().unwrap();
            asked += time;
            reads += more;
        }
        Seen {
            a_read: faults as f64 / reads as f64,
            asked: asked / faults as f64,
            answered: taking.join().unwrap() / faults as f64,
        }
    })
}

/// The source: sends a page for each request until there is nobody to ask.
fn answer(mut source: TcpStream) {
    let mut request = [0; HEADER];
    let mut page = [1; HEADER + PAGE_SIZE_USIZE];
    while source.read_exact(&mut request).is_ok() {
        page[..HEADER].copy_from_slice(&request);
        source.write_all(&page).unwrap();
    }
}

/// A fault thread; its time, and how often it read faults.
fn ask(
    installer: &PageInstaller,
    source: &Mutex<TcpStream>,
    waited_for: &Mutex<BTreeMap<Pfn, Instant>>,
    is_batched: bool,
    is_over: &AtomicBool,
) -> (f64, u64) {
    let began = busy();
    let (mut pages, mut wants, mut reads) = (Vec::new(), Vec::new(), 0);
    while !is_over.load(Ordering::SeqCst) {
        wait_readable([Some(installer)], Some(10)).unwrap();
        installer.read_faults(&mut pages).unwrap();
        reads += u64::from(!pages.is_empty());
        for page in pages.drain(..) {
            assert!(!installer.missing_in_unit(page).is_empty());
            waited_for.lock().unwrap().insert(page, Instant::now());
            let mut want = [0; HEADER];
            want[..8].copy_from_slice(&page.get().to_le_bytes());
            wants.extend_from_slice(&want);
            if !is_batched {
                source.lock().unwrap().write_all(&wants).unwrap();
                wants.clear();
            }
        }
        if !wants.is_empty() {
            source.lock().unwrap().write_all(&wants).unwrap();
            wants.clear();
        }
    }
    (busy() - began, reads)
}

/// The answer thread; its time. The connection ends with it.
fn take(
    installer: &PageInstaller,
    mut source: TcpStream,
    waited_for: &Mutex<BTreeMap<Pfn, Instant>>,
    faults: u64,
) -> f64 {
    let began = busy();
    let mut header = [0; HEADER];
    let mut content = vec![0; PAGE_SIZE_USIZE];
    for _ in 0..faults {
        source.read_exact(&mut header).unwrap();
        source.read_exact(&mut content).unwrap();
        let mut number = [0; 8];
        number.copy_from_slice(&header[..8]);
        let page = Pfn::new(u64::from_le_bytes(number));
        installer.install(page, &content).unwrap();
        waited_for.lock().unwrap().remove(&page);
    }
    source.shutdown(std::net::Shutdown::Both).unwrap();
    busy() - began
}
