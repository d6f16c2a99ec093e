//! What the machine can do for our job at most: memory of a guest over loopback TCP into fresh memory,
//! by several streams, and nothing else. No headers, no zero test, no dirty log.
//!
//! `cargo run --release -p limosa-os --example rawcopy 1024 5` (MiB, runs) prints the median and the
//! best of the runs for each way to receive and each number of streams.
#![allow(clippy::unwrap_used)]

use limosa_os::{PageKind, SharedMemory};
use limosa_pages::{ByteCount, PAGE_SIZE, PageCount, PageRange, Pfn};
use std::env;
use std::fs::File;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Instant;

/// Bytes that are sent, and received, at once: a huge page.
const CHUNK: u64 = 2 << 20;

#[derive(Clone, Copy, Debug)]
enum Receive {
    /// Read and thrown away: what the loopback carries.
    Discarded,
    /// Into memory in which no page exists yet.
    Fresh,
    /// The pages of a chunk are made just before it is received.
    MadeBefore,
    /// Into a hot buffer, and from there into the file.
    Written,
    /// Into memory whose pages were made before the clock ran.
    Populated,
}

fn main() {
    let number = |at: usize, default: u64| {
        let argument = env::args().nth(at);
        argument.map_or(default, |text| text.parse().unwrap())
    };
    let (mebibytes, runs) = (number(1, 1024), number(2, 5));
    let bytes = mebibytes << 20;
    let source = SharedMemory::create(ByteCount::new(bytes), PageKind::Small).unwrap();
    for page in 0..bytes / PAGE_SIZE {
        let content = [page as u8; 4096];
        source.write_at(page * PAGE_SIZE, &content).unwrap();
    }
    let at_once = source.write_unit().unwrap_or(PageCount::ZERO);
    println!("{mebibytes} MiB, {runs} runs, pages made {at_once} at once: median, best in GB/s");
    for receive in [
        Receive::Discarded,
        Receive::Fresh,
        Receive::MadeBefore,
        Receive::Written,
        Receive::Populated,
    ] {
        for streams in [1, 2, 4] {
            let mut samples: Vec<f64> = (0..runs)
                .map(|_| measure(&source, receive, streams))
                .collect();
            samples.sort_by(f64::total_cmp);
            let (median, best) = (samples[samples.len() / 2], samples.last().unwrap());
            let row = format!("{receive:?}, {streams} streams");
            println!("{row:24} {median:6.2} {best:6.2}");
        }
    }
}

fn measure(source: &SharedMemory, receive: Receive, streams: u64) -> f64 {
    let pages = source.page_count();
    let size = ByteCount::new(pages.get() * PAGE_SIZE);
    let target = SharedMemory::create(size, PageKind::Small).unwrap();
    if matches!(receive, Receive::Populated) {
        target.populate(PageRange::new(Pfn::new(0), pages)).unwrap();
    }
    let file = File::from(target.file().try_clone_to_owned().unwrap());
    let part = size.get() / streams;
    let pairs: Vec<(TcpStream, TcpStream)> = (0..streams).map(|_| pair()).collect();
    let began = Instant::now();
    thread::scope(|scope| {
        for (stream, (from, to)) in (0..).zip(&pairs) {
            let offsets = (stream * part..(stream + 1) * part).step_by(CHUNK as usize);
            let (target, file) = (&target, &file);
            let theirs = offsets.clone();
            scope.spawn(move || theirs.for_each(|offset| send_chunk(source, from, offset)));
            scope.spawn(move || {
                let mut buffer = vec![0; CHUNK as usize];
                for offset in offsets {
                    take_chunk(target, file, to, receive, offset, &mut buffer);
                }
            });
        }
    });
    size.get() as f64 / began.elapsed().as_secs_f64() / 1e9
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn range(offset: u64) -> PageRange {
    PageRange::new(
        Pfn::new(offset / PAGE_SIZE),
        PageCount::new(CHUNK / PAGE_SIZE),
    )
}

fn send_chunk(source: &SharedMemory, socket: &TcpStream, offset: u64) {
    source
        .send_parts(socket, &[([0; 0], Some(range(offset)))])
        .unwrap();
}

fn take_chunk(
    target: &SharedMemory,
    file: &File,
    mut socket: &TcpStream,
    receive: Receive,
    offset: u64,
    buffer: &mut [u8],
) {
    match receive {
        Receive::Discarded => socket.read_exact(buffer).unwrap(),
        Receive::Fresh | Receive::Populated => {
            target.receive(socket, offset, CHUNK as usize).unwrap();
        }
        Receive::MadeBefore => {
            target.populate(range(offset)).unwrap();
            target.receive(socket, offset, CHUNK as usize).unwrap();
        }
        Receive::Written => {
            socket.read_exact(buffer).unwrap();
            file.write_all_at(buffer, offset).unwrap();
        }
    }
}
