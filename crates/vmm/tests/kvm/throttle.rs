//! Guests whose writers are slowed down: how much slower they are, and what lets them go.

use crate::guests::*;
use crate::vm_process::VmProcess;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::throttle::{Share, Throttle};
use limosa_os::dirty::TrackerKind;
use limosa_os::kvm::Kvm;
use limosa_pages::{ByteCount, PAGE_SIZE, PageRange, PagesPerSecond, Pfn};
use limosa_vmm::client::VmHandle;
use limosa_vmm::config::VmConfig;
use limosa_vmm::machine::Machine;
use std::time::{Duration, Instant};

/// Pages that the guest writes for an order: in some 150 ms if nobody holds it back.
const PAGES: u64 = 60_000;
/// A throttled guest is to be slower by this factor.
const SLOWER: u64 = 8;

/// A writer and its orders.
struct Writer {
    machine: Machine,
    number: u64,
}

impl Writer {
    fn new(tracker: TrackerKind) -> Self {
        let config = VmConfig {
            memory: ByteCount::new(256 << 20),
            dirty_tracker: tracker,
            ..config(1)
        };
        let mut machine = Machine::create(config, "here").unwrap();
        machine.boot(&image(&ORDERS)).unwrap();
        machine.run().unwrap();
        machine.start_tracking().unwrap();
        Self { machine, number: 0 }
    }

    /// Lets the guest begin to write to all its pages, each for the first time since it was cleared.
    fn begin(&mut self) {
        self.machine.harvest().unwrap();
        let all = PageRange::new(Pfn::new(0), self.machine.memory().page_count());
        self.machine.clear(all, &[]).unwrap();
        self.number += 1;
        let memory = self.machine.memory();
        give_order(memory, 0, self.number, PAGES, DATA, PAGE_SIZE);
    }

    /// Pages that it has written to since.
    fn written(&self) -> u64 {
        let memory = self.machine.memory();
        let is_new = |page| memory.read_word(DATA + page * PAGE_SIZE).unwrap() == self.number;
        // From the first to the last one.
        let (mut written, mut end) = (0, PAGES);
        while written < end {
            let middle = written + (end - written) / 2;
            if is_new(middle) {
                written = middle + 1;
            } else {
                end = middle;
            }
        }
        written
    }

    /// Pages a second that it writes to, for a time or until it has written to all.
    fn rate(&self, time: Duration) -> f64 {
        let (begun, before) = (Instant::now(), self.written());
        while begun.elapsed() < time && self.written() < PAGES {
            std::thread::sleep(Duration::from_micros(500));
        }
        (self.written() - before) as f64 / begun.elapsed().as_secs_f64()
    }
}

#[test]
fn a_throttled_writer_is_slower_goes_on_and_is_fast_again() {
    if !has_kvm() {
        return;
    }
    for tracker in TrackerKind::ALL {
        match Kvm::open().unwrap().create_vm(tracker) {
            Ok(_) => check_a_throttled_writer(tracker),
            Err(error) => println!("skipped {tracker}: {error}"),
        }
    }
}

fn check_a_throttled_writer(tracker: TrackerKind) {
    const LONG: Duration = Duration::from_secs(60);
    let mut writer = Writer::new(tracker);
    // The first time, its pages come into being.
    writer.begin();
    writer.rate(LONG);
    writer.begin();
    let fast = writer.rate(LONG);
    let quota = PagesPerSecond::new(fast as u64 / SLOWER);
    let throttle = if tracker.knows_vcpus() {
        Throttle::PerVcpu { quota }
    } else {
        Throttle::Equal {
            share: Share::clamped(1000 / SLOWER),
        }
    };
    writer.machine.throttle(throttle).unwrap();
    writer.begin();
    let before = writer.machine.writers();
    writer.rate(Duration::from_millis(100));
    let slow = writer.rate(Duration::from_millis(500));
    let after = writer.machine.writers();
    let left = PAGES - writer.written();
    writer.machine.let_go();
    let again = writer.rate(LONG);
    println!("{tracker}: {fast:.0} pages/s, throttled {slow:.0}, then {again:.0}; {after:?}");
    assert!(
        left > 0 && slow > 0.0 && slow < fast / 3.0,
        "{slow} of {fast}"
    );
    assert!(again > 2.0 * slow, "{again} after {slow}");
    assert!(
        after.held > before.held + Duration::from_millis(200),
        "{after:?}"
    );
    assert_eq!(after.pages.len(), usize::from(tracker.knows_vcpus()));
    for (before, after) in before.pages.iter().zip(&after.pages) {
        let dirtied = after.get() - before.get();
        assert!(
            dirtied.abs_diff(PAGES - left) < 2000,
            "{dirtied}, {left} left"
        );
        let share = slow / quota.get() as f64;
        // How far below it stays depends on who else wants the processors, and on what a fault takes:
        // a transparent huge page may take longer to come than a throttled run is.
        assert!(share < 1.5, "{share} of the quota");
    }
}

/// Nobody waits for a sleep: a guest that is held back is paused at once.
#[test]
fn a_throttled_guest_can_be_paused_and_lives_on() {
    if !has_kvm() {
        return;
    }
    let mut machine = machine(&STORM, 2);
    machine.run().unwrap();
    // The first instructions are before its first write, and that takes longer on a slow machine.
    wait_for_storm(machine.memory(), 2);
    machine.start_tracking().unwrap();
    let share = Share::clamped(50);
    machine.throttle(Throttle::Equal { share }).unwrap();
    for _ in 0..20 {
        let snapshot = machine.pause_and_save(true).unwrap();
        check_storm(machine.memory(), &snapshot.sections, 2);
        machine.run().unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let first = machine.pause_and_save(false).unwrap();
    let first = check_storm(machine.memory(), &first.sections, 2);
    assert!(first > 0 && machine.throttled().is_some());
    assert!(machine.writers().held > Duration::ZERO);
}

fn slowed(phases: &[Phase]) -> (tempfile::TempDir, VmProcess, VmHandle) {
    let directory = tempfile::tempdir().unwrap();
    let process = VmProcess::start(directory.path(), "vm");
    let vm = process.connect().unwrap();
    vm.create(&config(1), Some(&image(&ORDERS)), Phase::Running)
        .unwrap();
    vm.run().unwrap();
    for phase in phases {
        vm.record(phase).unwrap();
    }
    let throttle = Throttle::Equal {
        share: Share::clamped(100),
    };
    let early = vm.throttle(Some(throttle)).unwrap_err().to_string();
    assert_eq!(
        early,
        "the guest cannot be slowed down: its writes are not tracked"
    );
    vm.start_tracking().unwrap();
    vm.throttle(Some(throttle)).unwrap();
    assert_eq!(vm.status().unwrap().throttle, Some(throttle));
    (directory, process, vm)
}

/// A guest never stays throttled: pause, end of tracking and loss of the daemon let it go, in whatever
/// phase.
#[test]
fn whatever_ends_a_move_lets_the_guest_go() {
    if !has_kvm() {
        return;
    }
    let id = MigrationId(7);
    let peer = "b:1".to_owned();
    let offered = Phase::Offered { id };
    let committed = Phase::Committed { id, peer };
    let phases = [offered, committed];
    for phases in [&[][..], &phases[..1], &phases] {
        let (_directory, process, vm) = slowed(phases);
        drop(vm);
        let vm = process.connect().unwrap();
        assert_eq!(vm.status().unwrap().throttle, None, "{phases:?}");
    }
    type Ends = fn(&VmHandle);
    let ends: [Ends; 4] = [
        |vm| drop(vm.pause_and_save(true).unwrap()),
        |vm| vm.stop_tracking().unwrap(),
        |vm| vm.throttle(None).unwrap(),
        |vm| vm.pause().unwrap(),
    ];
    for end in ends {
        let (_directory, _process, vm) = slowed(&[]);
        end(&vm);
        assert_eq!(vm.status().unwrap().throttle, None);
    }
    let (_directory, _process, vm) = slowed(&[]);
    vm.rehearse().unwrap();
    assert!(vm.status().unwrap().throttle.is_some());
    let quota = PagesPerSecond::new(1000);
    let unknown = vm.throttle(Some(Throttle::PerVcpu { quota })).unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "the guest cannot be slowed down: its dirty tracker does not tell which vCPU writes"
    );
}
