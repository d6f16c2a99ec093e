//! Measures what a handover costs in the VM processes alone: pausing, saving, loading, running.
//!
//! `cargo run --release -p limosa-vmm --example handover_latency 2 1024 100` (vCPUs, MiB, turns) moves
//! the state of a guest that computes without end between two VM processes and prints the median and
//! the 90th percentile of each step, as the daemon sees it and as the process does. No page is
//! copied: all memory but the guest's few pages is untouched.
#![allow(clippy::unwrap_used)]

use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_os::process::spawn_detached;
use limosa_pages::{ByteCount, PAGE_SIZE_USIZE, PageRange, Pfn};
use limosa_vmm::client::VmHandle;
use limosa_vmm::config::VmConfig;
use limosa_vmm::process::{ServeOptions, serve};
use std::env;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [role, socket] = arguments.as_slice()
        && role == "vm"
    {
        serve(&ServeOptions {
            socket: socket.into(),
            host_tag: "here".to_owned(),
            ledger: None,
            daemon: None,
        })
        .unwrap();
        return;
    }
    let number = |at: usize, default: u64| {
        arguments
            .get(at)
            .map_or(default, |text| text.parse().unwrap())
    };
    let (vcpus, mebibytes, turns) = (number(0, 1), number(1, 1024), number(2, 100));
    let directory = tempfile::tempdir().unwrap();
    let config = VmConfig::new(
        "latency",
        ByteCount::new(mebibytes << 20),
        u8::try_from(vcpus).unwrap(),
    );
    let mut source = start(directory.path(), 0);
    source
        .create(&config, Some(&endless_guest()), Phase::Running)
        .unwrap();
    source.run().unwrap();
    let mut table = Table::default();
    for turn in 1..=turns {
        let id = MigrationId(u128::from(turn));
        let target = start(directory.path(), turn);
        let description = VmConfig::from_description(&source.description()).unwrap();
        target
            .create(&description, None, Phase::Preparing { id })
            .unwrap();
        source.record(&Phase::Offered { id }).unwrap();
        prepare(&source, &target);
        hand_over(&source, &target, id, &mut table);
        source.stop().unwrap();
        target.record(&Phase::Running).unwrap();
        source = target;
    }
    source.stop().unwrap();
    println!(
        "{vcpus} vCPUs, {mebibytes} MiB, {turns} turns; microseconds, median and 90th percentile"
    );
    table.print();
}

/// What a migration does before it stops the guest.
fn prepare(source: &VmHandle, target: &VmHandle) {
    let all = PageRange::new(Pfn::new(0), source.memory().page_count());
    source.start_tracking().unwrap();
    let mut dirty = limosa_pages::PageSet::empty(all.count);
    source.harvest(&mut dirty).unwrap();
    source.clear(all, Vec::new()).unwrap();
    let mut page = [0; PAGE_SIZE_USIZE];
    for pfn in source
        .memory()
        .data_extents(all)
        .unwrap()
        .into_iter()
        .flat_map(PageRange::iter)
    {
        source.memory().read_page(pfn, &mut page);
        target.memory().write_at(pfn.file_offset(), &page).unwrap();
    }
    target
        .load(&source.rehearse().unwrap().sections, true)
        .unwrap();
    std::thread::sleep(Duration::from_millis(5));
}

fn hand_over(source: &VmHandle, target: &VmHandle, id: MigrationId, table: &mut Table) {
    let asked = now();
    let saved = source.pause_and_save(true).unwrap();
    let answered = now();
    let times = saved.times;
    let loaded = target.load(&saved.sections, false).unwrap();
    let ready = now();
    source
        .record(&Phase::Committed {
            id,
            peer: "b:1".to_owned(),
        })
        .unwrap();
    let committing = now();
    let running = target
        .commit_and_run(id, times.stopped_first, false)
        .unwrap();
    let committed = now();

    table.add(
        "pause_and_save: request to first vCPU out",
        times.stopped_first.since(asked),
    );
    table.add(
        "pause_and_save: first to last vCPU out",
        times.stopped_last.since(times.stopped_first),
    );
    table.add(
        "pause_and_save: last vCPU out to saved",
        times.saved.since(times.stopped_last),
    );
    table.add(
        "pause_and_save: of that, reading the log",
        times.harvested.since(times.stopped_last),
    );
    table.add("pause_and_save: request to reply", answered.since(asked));
    table.add("load: within the process", loaded.took);
    table.add("load: request to reply", ready.since(answered));
    table.add(
        "commit_and_run: request to first vCPU in",
        running.first_instruction_at.since(committing),
    );
    table.add(
        "commit_and_run: request to last vCPU in",
        running.last_entered_at.since(committing),
    );
    table.add(
        "commit_and_run: request to reply",
        committed.since(committing),
    );
    table.add(
        "first vCPU out to last vCPU in",
        running.last_entered_at.since(times.stopped_first),
    );
}

fn now() -> Timestamp {
    Timestamp::from_nanos(limosa_os::monotonic_nanos())
}

fn start(directory: &Path, number: u64) -> VmHandle {
    let socket = directory.join(format!("vm-{number}"));
    let mut command = Command::new(env::current_exe().unwrap());
    command.arg("vm").arg(&socket).stdin(Stdio::null());
    // It ends when it is told to, or with this program, so nobody has to wait for it.
    drop(spawn_detached(&mut command).unwrap());
    VmHandle::connect_within(&socket, Duration::from_secs(10)).unwrap()
}

/// An image whose only instruction jumps to itself.
fn endless_guest() -> Vec<u8> {
    const CODE: u64 = 0x20_0000;
    const CODE_BYTES: u64 = 2;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(CODE.to_le_bytes());
    elf.extend(64u64.to_le_bytes());
    elf.resize(54, 0);
    elf.extend([56, 0, 1, 0]);
    elf.resize(64, 0);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for value in [120, CODE, CODE, CODE_BYTES, CODE_BYTES, 0x1000] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend([0xeb, 0xfe]);
    elf
}

/// Samples by name, in the order of their first mention.
#[derive(Default)]
struct Table(Vec<(&'static str, Vec<Duration>)>);

impl Table {
    fn add(&mut self, name: &'static str, sample: Duration) {
        match self.0.iter_mut().find(|row| row.0 == name) {
            Some((_, samples)) => samples.push(sample),
            None => self.0.push((name, vec![sample])),
        }
    }

    fn print(&mut self) {
        for (name, samples) in &mut self.0 {
            samples.sort();
            let at =
                |percent: usize| samples[(samples.len() - 1) * percent / 100].as_secs_f64() * 1e6;
            println!("{name:45} {:8.0} {:8.0}", at(50), at(90));
        }
    }
}
