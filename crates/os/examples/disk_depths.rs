//! What several requests of a disk at a time are worth: 4 KiB and 64 KiB at random places of a file, read
//! and written, with 1, 8 and 32 under way, by io_uring and one by one.
//!
//! `cargo run -p limosa-os --example disk_depths FILE`, by default a file below `target`. Both ways take turns in this one process, over the same
//! file of 256 MiB past the page cache; what is said is the median of the turns.
#![allow(clippy::unwrap_used)]

use limosa_os::disk::{Action, Disk, DiskBuffer, DiskQueue, Way};
use limosa_os::socket;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const FILE_BYTES: u64 = 256 << 20;
const TURNS: usize = 7;
/// Long enough that a turn takes some tens of milliseconds.
const REQUESTS: usize = 1000;

/// The same places for both ways.
struct Places(u64);

impl Places {
    fn next(&mut self, len: usize) -> u64 {
        let Self(seed) = self;
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let len = len as u64;
        (*seed >> 20) % (FILE_BYTES / len) * len
    }
}

fn main() {
    let path = std::env::args_os().nth(1).map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../target/disk_depths.raw"
            ))
        },
        PathBuf::from,
    );
    let mut file = File::create(&path).unwrap();
    for part in 0..FILE_BYTES >> 20 {
        file.write_all(&vec![part as u8 | 1; 1 << 20]).unwrap();
    }
    file.sync_all().unwrap();
    println!("what           depth   one by one    io_uring   ratio");
    for (name, len, writes) in [
        ("read 4 KiB", 4 << 10, false),
        ("read 64 KiB", 64 << 10, false),
        ("write 4 KiB", 4 << 10, true),
        ("write 64 KiB", 64 << 10, true),
    ] {
        for depth in [1, 8, 32] {
            let [slow, fast] = compare(&path, depth, len, writes);
            let ratio = slow.as_secs_f64() / fast.as_secs_f64();
            let each = |all: Duration| all.as_secs_f64() * 1e6 / REQUESTS as f64;
            println!(
                "{name:14} {depth:5} {:9.1} µs {:8.1} µs   {ratio:.2}",
                each(slow),
                each(fast),
            );
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// How long all requests take each way.
fn compare(path: &Path, depth: u16, len: usize, writes: bool) -> [Duration; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..TURNS {
        for (way, times) in [Way::OneByOne, Way::Best].into_iter().zip(&mut times) {
            let mut queue = DiskQueue::new(Disk::open(path, false).unwrap(), depth, way);
            if let (Way::Best, Some(why)) = (way, queue.why_one_by_one()) {
                panic!("io_uring cannot be used: {why}");
            }
            times.push(run(&mut queue, turn as u64, depth, len, writes));
        }
    }
    times.map(|mut times| {
        times.sort();
        times[TURNS / 2]
    })
}

fn run(queue: &mut DiskQueue, seed: u64, depth: u16, len: usize, writes: bool) -> Duration {
    let mut places = Places(seed);
    let mut buffers: Vec<DiskBuffer> = (0..depth).map(|_| DiskBuffer::new(len)).collect();
    let mut left = REQUESTS;
    let begun = Instant::now();
    loop {
        while let Some(buffer) = buffers.pop().filter(|_| left > 0) {
            let place = queue.free_place().unwrap();
            let offset = places.next(len);
            let action = if writes {
                Action::Write(offset)
            } else {
                Action::Read(offset)
            };
            queue.begin(place, action, buffer, len);
            left -= 1;
        }
        if queue.under_way() == 0 {
            return begun.elapsed();
        }
        queue.submit().unwrap();
        if let Some(descriptor) = queue.descriptor() {
            socket::wait_readable([Some(&descriptor)], None).unwrap();
        }
        while let Some(completed) = queue.completed() {
            completed.result.unwrap();
            buffers.push(completed.buffer);
        }
    }
}
