//! What each dirty tracker costs: switching it on, harvests, and the guest's first write to a page.
//!
//! `cargo run --release -p limosa-vmm --example dirty_trackers 4096 9` (MiB, turns) runs a guest with all
//! its memory touched and one vCPU, and prints the median over the turns for each tracker that there
//! is here. Clearing goes by 2 MiB, as a migration does it.
#![allow(clippy::unwrap_used, dead_code)]

#[path = "../tests/kvm/guests.rs"]
mod guests;

use guests::{DATA, ORDERS, give_order, image};
use limosa_os::dirty::TrackerKind;
use limosa_pages::{ByteCount, PAGE_SIZE, PageCount, PageRange, PageSet, Pfn};
use limosa_vmm::config::VmConfig;
use limosa_vmm::machine::Machine;
use std::env;
use std::thread;
use std::time::{Duration, Instant};

/// Pages that are cleared at once.
const CHUNK: u64 = 512;
/// Scattered pages of the harvest that finds a few.
const FEW: u64 = 1000;
/// Pages by which a first write is timed.
const MANY: u64 = 50_000;

fn main() {
    let number = |at: usize, default: u64| {
        let argument = env::args().nth(at);
        argument.map_or(default, |text| text.parse().unwrap())
    };
    let (mebibytes, turns) = (number(1, 4096), number(2, 9));
    println!("{mebibytes} MiB, all touched, 1 vCPU, median of {turns}; microseconds");
    println!(
        "{:15}{:>12}{:>12}{:>14}{:>14}{:>14}{:>14}{:>18}",
        "tracker",
        "switch on",
        "clear all",
        "harvest none",
        "harvest 1000",
        "clear 1000",
        "switch off",
        "first write, ns"
    );
    for tracker in TrackerKind::ALL {
        let config = VmConfig {
            dirty_tracker: tracker,
            ..VmConfig::new("costs", ByteCount::new(mebibytes << 20), 1)
        };
        match Machine::create(config, "here") {
            Ok(machine) => measure(tracker, machine, turns),
            Err(error) => println!("{tracker:15} not here: {error}"),
        }
    }
}

fn measure(tracker: TrackerKind, mut machine: Machine, turns: u64) {
    machine.boot(&image(&ORDERS)).unwrap();
    machine.run().unwrap();
    let pages = machine.memory().page_count().get() - DATA / PAGE_SIZE;
    let mut guest = Guest { orders: 0 };
    guest.write(&machine, pages, 1);
    let untracked = guest.write(&machine, MANY, 1);
    let mut columns = [const { Vec::new() }; 7];
    for _ in 0..turns {
        let on = timed(|| machine.start_tracking().unwrap());
        harvest(&machine);
        let clear_all = timed(|| clear(&machine, &PageSet::full(machine.memory().page_count())));
        harvest(&machine);
        let none = timed(|| machine.harvest().unwrap());
        guest.write(&machine, FEW, pages / FEW);
        let mut found = PageSet::empty(machine.memory().page_count());
        let few = timed(|| machine.harvest().unwrap());
        machine.bitmap().copy_to(&mut found);
        assert!(found.count().get() >= FEW, "{tracker}: {}", found.count());
        let clear_few = timed(|| clear(&machine, &found));
        clear(&machine, &harvest(&machine));
        let tracked = guest.write(&machine, MANY, 1);
        let first_write = (tracked.as_secs_f64() - untracked.as_secs_f64()) * 1e9 / MANY as f64;
        let off = timed(|| machine.stop_tracking().unwrap());
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        let row = [on, clear_all, none, few, clear_few, off].map(micros);
        for (column, value) in columns.iter_mut().zip(row.into_iter().chain([first_write])) {
            column.push(value);
        }
    }
    let [on, all, none, few, clear_few, off, write] = columns.map(median);
    println!(
        "{:15}{on:12.0}{all:12.0}{none:14.0}{few:14.0}{clear_few:14.0}{off:14.0}{write:18.0}",
        tracker.name()
    );
}

/// What the guest has been told so far.
struct Guest {
    orders: u64,
}

impl Guest {
    /// Has it write pages, `stride` apart; how long that took it.
    fn write(&mut self, machine: &Machine, pages: u64, stride: u64) -> Duration {
        self.orders += 1;
        let memory = machine.memory();
        let began = Instant::now();
        give_order(memory, 0, self.orders, pages, DATA, stride * PAGE_SIZE);
        while memory.read_word(guests::DONE_AT).unwrap() != self.orders {
            thread::yield_now();
        }
        began.elapsed()
    }
}

fn harvest(machine: &Machine) -> PageSet {
    machine.harvest().unwrap();
    let mut set = PageSet::empty(machine.memory().page_count());
    machine.bitmap().copy_to(&mut set);
    set
}

fn clear(machine: &Machine, set: &PageSet) {
    let pages = set.capacity().get();
    for first in (0..pages).step_by(CHUNK as usize) {
        let count = PageCount::new(CHUNK.min(pages - first));
        let range = PageRange::new(Pfn::new(first), count);
        if set.count_range(range) > PageCount::ZERO {
            machine.clear(range, &[]).unwrap();
        }
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
