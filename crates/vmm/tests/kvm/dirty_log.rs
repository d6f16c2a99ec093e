//! Dirty tracking, by each tracker: exact, and safe to copy by.

use crate::guests::*;
use limosa_os::dirty::TrackerKind;
use limosa_pages::{ByteCount, PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, PageSet, Pfn};
use limosa_vmm::config::VmConfig;
use limosa_vmm::machine::Machine;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

fn harvested(machine: &Machine) -> PageSet {
    machine.harvest().unwrap();
    let mut set = PageSet::empty(machine.memory().page_count());
    machine.bitmap().copy_to(&mut set);
    set
}

fn all(machine: &Machine) -> PageRange {
    PageRange::new(Pfn::new(0), machine.memory().page_count())
}

fn numbers(set: &PageSet) -> BTreeSet<u64> {
    set.iter().map(Pfn::get).collect()
}

/// Exactly these pages are dirty. Where transparent huge pages back the guest, a clear takes it the
/// mapping of a whole one, and those that it only reads afterwards, its program and its stack, are
/// found, too: see [`warm`].
fn assert_found(machine: &Machine, expect: &BTreeSet<u64>, what: &str) {
    const READ: [u64; 2] = [512, 768];
    let mut found = numbers(&harvested(machine));
    if machine.memory().write_unit() != Some(PageCount::new(1)) {
        found.retain(|page| expect.contains(page) || !READ.contains(page));
    }
    assert_eq!(&found, expect, "{what}");
}

/// The page of orders, which this process writes as a device would: one tracker sees that.
fn own_writes(tracker: TrackerKind) -> Option<u64> {
    (tracker == TrackerKind::WriteProtect).then_some(ORDERS_AT / PAGE_SIZE)
}

/// A running machine in whose guest all is mapped. KVM maps a page writable when the guest reads it
/// for the first time, and then counts it as dirty; that is allowed, but not what is tested here.
fn warm(tracker: TrackerKind, vcpus: u8) -> Machine {
    let mut machine = tracked(tracker, &ORDERS, vcpus);
    machine.run().unwrap();
    for vcpu in 0..u64::from(vcpus) {
        give_order(machine.memory(), vcpu, u64::MAX, 1024, DATA, PAGE_SIZE);
        wait_done(machine.memory(), vcpu, u64::MAX);
    }
    machine
}

/// A machine with that tracker.
fn tracked(tracker: TrackerKind, program: &[u8], vcpus: u8) -> Machine {
    let config = VmConfig {
        dirty_tracker: tracker,
        ..config(vcpus)
    };
    let mut machine = Machine::create(config, "here").unwrap();
    machine.boot(&image(program)).unwrap();
    machine
}

/// Runs a test with each tracker that there is here.
fn each(test: impl Fn(TrackerKind)) {
    if !has_kvm() {
        return;
    }
    for tracker in TrackerKind::ALL {
        match limosa_os::kvm::Kvm::open().unwrap().create_vm(tracker) {
            Ok(_) => {
                println!("{tracker}");
                test(tracker);
            }
            Err(error) => println!("skipped {tracker}: {error}"),
        }
    }
}

/// Each page that was written is in the next harvest, and in no later one once it was cleared.
#[test]
fn every_written_page_is_found_exactly_once() {
    each(check_every_written_page_is_found_exactly_once);
}

fn check_every_written_page_is_found_exactly_once(tracker: TrackerKind) {
    let mut machine = warm(tracker, 2);
    let memory = Arc::clone(machine.memory());
    machine.start_tracking().unwrap();
    assert_eq!(
        harvested(&machine),
        PageSet::full(memory.page_count()),
        "at first, all"
    );
    machine.clear(all(&machine), &[]).unwrap();
    let mut seed = 1u64;
    for number in 1..60 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let vcpu = number % 2;
        let (pages, stride) = (1 + (seed >> 40) % 60, 1 + (seed >> 50) % 7);
        let first = DATA + (seed >> 33) % 500 * PAGE_SIZE;
        give_order(&memory, vcpu, number, pages, first, stride * PAGE_SIZE);
        wait_done(&memory, vcpu, number);
        let mut expect: BTreeSet<u64> = (0..pages)
            .map(|page| first / PAGE_SIZE + page * stride)
            .collect();
        expect.insert(DONE_AT / PAGE_SIZE + vcpu);
        expect.extend(own_writes(tracker));
        assert_found(&machine, &expect, &format!("order {number}"));
        if number % 3 == 0 {
            assert_found(&machine, &expect, "reading the log clears nothing");
        }
        // In two parts, of whole words of the log.
        machine
            .clear(PageRange::new(Pfn::new(0), PageCount::new(1088)), &[])
            .unwrap();
        machine
            .clear(PageRange::new(Pfn::new(1088), PageCount::new(960)), &[])
            .unwrap();
    }
    assert!(harvested(&machine).is_empty());
    machine.stop_tracking().unwrap();
    assert!(machine.harvest().is_err());
    machine.start_tracking().unwrap();
    assert_eq!(
        harvested(&machine),
        PageSet::full(memory.page_count()),
        "all anew"
    );
}

/// Memory beyond the hole below 4 GiB lies right behind the rest in the file, for the guest and in
/// the log.
#[test]
fn pages_on_both_sides_of_the_hole_are_found() {
    each(check_pages_on_both_sides_of_the_hole_are_found);
}

fn check_pages_on_both_sides_of_the_hole_are_found(tracker: TrackerKind) {
    const HOLE: u64 = 3 << 30;
    let config = VmConfig {
        memory: ByteCount::new(HOLE + (64 << 20)),
        dirty_tracker: tracker,
        ..config(1)
    };
    let mut machine = Machine::create(config, "here").unwrap();
    machine.boot(&image(&ORDERS)).unwrap();
    let memory = Arc::clone(machine.memory());
    machine.run().unwrap();
    let first = HOLE - 2 * PAGE_SIZE;
    for number in 1..3 {
        machine.start_tracking().unwrap();
        if number == 2 {
            let found = harvested(&machine).count();
            assert_eq!(found, memory.page_count(), "at first, all");
            machine.clear(all(&machine), &[]).unwrap();
        }
        give_order(&memory, 0, number, 5, first, PAGE_SIZE);
        wait_done(&memory, 0, number);
    }
    let mut expect: BTreeSet<u64> = (first / PAGE_SIZE..first / PAGE_SIZE + 5).collect();
    expect.insert(DONE_AT / PAGE_SIZE);
    expect.extend(own_writes(tracker));
    assert_found(&machine, &expect, "all that was written");
    for page in 0..5 {
        let at = first + page * PAGE_SIZE;
        assert_eq!(memory.read_word(at).unwrap(), 2, "page {page}");
    }
    // From the middle of one part to the middle of the other.
    let across = PageRange::new(Pfn::new(HOLE / PAGE_SIZE - 64), PageCount::new(128));
    machine.clear(across, &[]).unwrap();
    let mut left = BTreeSet::from([DONE_AT / PAGE_SIZE]);
    left.extend(own_writes(tracker));
    assert_found(&machine, &left, "what was not cleared");
}

/// More pages than a vCPU's ring holds, and nobody harvests: the vCPU empties it by itself.
#[test]
fn a_full_ring_loses_nothing() {
    each(|tracker| {
        const PAGES: u64 = 150_000;
        let config = VmConfig {
            memory: ByteCount::new(1 << 30),
            dirty_tracker: tracker,
            ..config(1)
        };
        let mut machine = Machine::create(config, "here").unwrap();
        machine.boot(&image(&ORDERS)).unwrap();
        let memory = Arc::clone(machine.memory());
        machine.run().unwrap();
        machine.start_tracking().unwrap();
        harvested(&machine);
        machine.clear(all(&machine), &[]).unwrap();
        give_order(&memory, 0, 1, PAGES, DATA, PAGE_SIZE);
        wait_done(&memory, 0, 1);
        let first = DATA / PAGE_SIZE;
        let found = harvested(&machine);
        let inside = PageRange::new(Pfn::new(first), PageCount::new(PAGES));
        assert_eq!(found.count_range(inside).get(), PAGES);
        assert!(found.count().get() <= PAGES + 8, "{}", found.count());
    });
}

/// Only what was harvested is cleared: a write between harvest and clear is not lost.
#[test]
fn a_write_between_harvest_and_clear_is_found_later() {
    each(check_a_write_between_harvest_and_clear_is_found_later);
}

fn check_a_write_between_harvest_and_clear_is_found_later(tracker: TrackerKind) {
    let mut machine = warm(tracker, 1);
    let memory = Arc::clone(machine.memory());
    machine.start_tracking().unwrap();
    harvested(&machine);
    machine.clear(all(&machine), &[]).unwrap();
    assert!(harvested(&machine).is_empty());
    give_order(&memory, 0, 1, 1, DATA, PAGE_SIZE);
    wait_done(&memory, 0, 1);
    machine.clear(all(&machine), &[]).unwrap();
    let mut expect = BTreeSet::from([DATA / PAGE_SIZE, DONE_AT / PAGE_SIZE]);
    expect.extend(own_writes(tracker));
    assert_found(&machine, &expect, "all that was written");
}

/// Pages that are kept when others are cleared are in every later harvest, written again or not, until
/// they are cleared themselves.
#[test]
fn what_is_kept_is_found_again() {
    each(check_what_is_kept_is_found_again);
}

fn check_what_is_kept_is_found_again(tracker: TrackerKind) {
    let mut machine = warm(tracker, 1);
    let memory = Arc::clone(machine.memory());
    machine.start_tracking().unwrap();
    harvested(&machine);
    machine.clear(all(&machine), &[]).unwrap();
    give_order(&memory, 0, 1, 9, DATA, PAGE_SIZE);
    wait_done(&memory, 0, 1);
    harvested(&machine);
    let kept = DATA / PAGE_SIZE + 2..DATA / PAGE_SIZE + 5;
    let run = PageRange::new(Pfn::new(kept.start), PageCount::new(3));
    machine.clear(all(&machine), &[run]).unwrap();
    let mut expect: BTreeSet<u64> = kept.collect();
    assert_found(&machine, &expect, "what was kept");
    machine.clear(all(&machine), &[run]).unwrap();
    // One of those that were kept, and one that was not.
    give_order(&memory, 0, 2, 2, DATA + PAGE_SIZE, PAGE_SIZE);
    wait_done(&memory, 0, 2);
    expect.extend([DATA / PAGE_SIZE + 1, DONE_AT / PAGE_SIZE]);
    expect.extend(own_writes(tracker));
    assert_found(&machine, &expect, "what was kept and what was written");
    machine.clear(all(&machine), &[]).unwrap();
    assert!(harvested(&machine).is_empty());
    let (half, beyond) = (PageRange::new(Pfn::new(0), PageCount::new(64)), run);
    assert!(machine.clear(half, &[beyond]).is_err(), "not within it");
}

#[test]
fn parts_of_words_are_not_cleared() {
    each(check_parts_of_words_are_not_cleared);
}

fn check_parts_of_words_are_not_cleared(tracker: TrackerKind) {
    let mut machine = tracked(tracker, &ORDERS, 1);
    machine.start_tracking().unwrap();
    harvested(&machine);
    for (first, count) in [(1, 64), (0, 63), (64, 100)] {
        let range = PageRange::new(Pfn::new(first), PageCount::new(count));
        assert!(machine.clear(range, &[]).is_err(), "{first}+{count}");
    }
}

/// The contract by which memory is copied: harvest, clear, copy, as the guest runs, and a last
/// harvest when it is paused; then the copy is equal, page by page.
#[test]
fn a_copy_made_by_the_log_is_equal() {
    each(check_a_copy_made_by_the_log_is_equal);
}

fn check_a_copy_made_by_the_log_is_equal(tracker: TrackerKind) {
    let mut machine = tracked(tracker, &STORM, 2);
    let memory = Arc::clone(machine.memory());
    let mut copy = vec![[0; PAGE_SIZE_USIZE]; usize::try_from(memory.page_count().get()).unwrap()];
    let copy_pages = |set: &PageSet, copy: &mut Vec<[u8; PAGE_SIZE_USIZE]>| {
        set.iter().for_each(|page| {
            memory.read_page(page, &mut copy[usize::try_from(page.get()).unwrap()])
        });
    };
    for _ in 0..3 {
        machine.start_tracking().unwrap();
        machine.run().unwrap();
        for _ in 0..30 {
            let set = harvested(&machine);
            machine.clear(all(&machine), &[]).unwrap();
            copy_pages(&set, &mut copy);
            // Time for the guest to write, even where processors are scarce.
            thread::sleep(Duration::from_millis(1));
        }
        let snapshot = machine.pause_and_save(true).unwrap();
        let mut last = PageSet::empty(memory.page_count());
        machine.bitmap().copy_to(&mut last);
        assert!(last.count() < PageCount::new(1100), "{last:?}");
        copy_pages(&last, &mut copy);
        for (page, copy) in (0..).map(Pfn::new).zip(&copy) {
            let mut now = [0; PAGE_SIZE_USIZE];
            memory.read_page(page, &mut now);
            assert!(now == *copy, "{page} differs");
        }
        check_storm(&memory, &snapshot.sections, 2);
        machine.stop_tracking().unwrap();
    }
}
