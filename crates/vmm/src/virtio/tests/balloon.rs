//! A balloon and its driver.

use super::driver::Driver;
use super::*;
use limosa_os::memory::HoldOff;

/// The balloon of a bed with one disk.
const BALLOON: u16 = 3;
const QUEUES: u16 = 5;
/// Statistics and reports, as Linux takes them.
const TAKEN: u32 = 1 << 1 | 1 << 5;
const FILLED: u16 = 0;
const STATISTICS: u16 = 2;
/// Where Linux has the queue of reports.
const REPORTS: u16 = 3;
/// Pages that tests give up: those from here on exist, sixteen of them.
const GIVEN: u64 = 0x80_0000;

impl<'a> Driver<'a> {
    /// That of the balloon of this bed, whose guest has pages to give up.
    fn of_balloon(bed: &'a Bed, features: u32) -> Self {
        let driver = Self::start(bed, BALLOON, QUEUES, features);
        for page in 0..16 {
            bed.fill(GIVEN + page * PAGE_SIZE, 7, 8);
        }
        driver
    }

    fn fill(&mut self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let buffer = Self::buffer(FILLED);
        self.bed
            .view
            .write_slice(&bytes, GuestAddress(buffer))
            .unwrap();
        self.queue(
            FILLED,
            &[(buffer, u32::try_from(bytes.len()).unwrap())],
            false,
        );
        self.wait(FILLED);
    }

    fn report(&mut self, pieces: &[(u64, u32)]) {
        self.queue(REPORTS, pieces, true);
        self.wait(REPORTS);
    }

    /// Which of the sixteen pages exist.
    fn left(&self) -> String {
        let first = Pfn::new(GIVEN / PAGE_SIZE);
        let pages = PageRange::new(first, PageCount::new(16));
        let runs = self.bed.memory.data_extents(pages).unwrap();
        let runs: Vec<String> = runs
            .iter()
            .map(|run| format!("{}+{}", run.first.get() - first.get(), run.count.get()))
            .collect();
        runs.join(" ")
    }
}

fn bed() -> Option<(Disks, VmConfig, Bed)> {
    let disks = Disks::new(1 << 20);
    let mut config = disks.config(false);
    let bed = Bed::new(&mut config)?;
    assert_eq!(bed.read(BALLOON, VIRTIO_MMIO_DEVICE_ID), 5);
    bed.run();
    Some((disks, config, bed))
}

#[test]
fn what_is_in_the_balloon_is_a_hole() {
    let Some((_disks, _, bed)) = bed() else {
        return;
    };
    let mut driver = Driver::of_balloon(&bed, TAKEN);
    let page = |index: u32| u32::try_from(GIVEN / PAGE_SIZE).unwrap() + index;
    // In any order, one of them twice, and some that are no memory.
    driver.fill(&[page(5), page(4), page(9), page(4), 0x8_0000, u32::MAX]);
    assert_eq!(driver.left(), "0+4 6+3 10+6");
    assert_eq!(bed.devices.balloon().reclaimed, PageCount::new(3).bytes());
    bed.write(BALLOON, VIRTIO_MMIO_CONFIG + 4, 3);
    assert_eq!(bed.read(BALLOON, VIRTIO_MMIO_CONFIG + 4), 3);
    assert_eq!(bed.devices.balloon().held, PageCount::new(3).bytes());
    // Taken back by being touched.
    bed.fill(GIVEN + 4 * PAGE_SIZE, 1, 8);
    driver.queue(1, &[(Driver::buffer(FILLED), 4)], false);
    driver.wait(1);
    assert_eq!(driver.left(), "0+5 6+3 10+6");
    // More numbers than anybody sends.
    driver.queue(FILLED, &[(DATA, 4 * 4096 + 4)], false);
    driver.wait_for_failure();
    assert_eq!(driver.left(), "0+5 6+3 10+6");
}

#[test]
fn what_is_reported_as_free_is_a_hole() {
    let Some((_disks, _, bed)) = bed() else {
        return;
    };
    // By the count of Linux, of the standard, and of Linux without statistics.
    for (features, queue) in [(TAKEN, 3), (TAKEN, 4), (1 << 5, 2)] {
        let mut driver = Driver::of_balloon(&bed, features);
        let pieces = [
            (GIVEN, 8192),
            (GIVEN + 0x4800, 0x2000),
            (GIVEN + 0xf000, 4096),
        ];
        driver.queue(queue, &pieces, true);
        driver.wait(queue);
        assert_eq!(driver.left(), "2+3 6+9");
    }
    let mut driver = Driver::of_balloon(&bed, TAKEN);
    driver.queue(REPORTS, &[(GIVEN, 4096), (MEMORY.get() - 4096, 8192)], true);
    driver.wait_for_failure();
    assert_eq!(driver.left(), "0+16", "nothing of what is wrong is taken");
}

#[test]
fn nothing_is_taken_while_the_guest_is_moved() {
    let Some((_disks, _, mut bed)) = bed() else {
        return;
    };
    Driver::of_balloon(&bed, TAKEN);
    bed.vm.start_tracking().unwrap();
    let mut driver = Driver::of_balloon(&bed, TAKEN);
    driver.report(&[(GIVEN, 8192)]);
    driver.fill(&[u32::try_from(GIVEN / PAGE_SIZE).unwrap()]);
    assert_eq!(driver.left(), "0+16");
    bed.vm.stop_tracking().unwrap();
    bed.vm.reclaim().hold_off(HoldOff::MissingPages, true);
    let mut driver = Driver::of_balloon(&bed, TAKEN);
    driver.report(&[(GIVEN, 8192)]);
    assert_eq!(driver.left(), "0+16");
    bed.vm.reclaim().hold_off(HoldOff::MissingPages, false);
    driver.report(&[(GIVEN, 8192)]);
    assert_eq!(driver.left(), "2+14");
}

#[test]
fn statistics_come_when_somebody_has_asked() {
    let Some((_disks, _, bed)) = bed() else {
        return;
    };
    let mut driver = Driver::of_balloon(&bed, TAKEN);
    assert_eq!(bed.devices.balloon().memory, None);
    let tell = |driver: &mut Driver<'_>, free: u64| {
        let mut bytes = Vec::new();
        for (tag, value) in [(4_u16, free), (99, 1), (5, 1000)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        // A statistic that is cut off.
        bytes.extend([6, 0, 1]);
        let buffer = Driver::buffer(STATISTICS);
        bed.view.write_slice(&bytes, GuestAddress(buffer)).unwrap();
        driver.queue(
            STATISTICS,
            &[(buffer, u32::try_from(bytes.len()).unwrap())],
            false,
        );
    };
    // Asked before there was anything: answered at once.
    tell(&mut driver, 500);
    driver.wait(STATISTICS);
    let told = |free: u64| {
        Some(crate::answer::GuestMemory {
            total: Some(ByteCount::new(1000)),
            free: Some(ByteCount::new(free)),
            available: None,
        })
    };
    tell(&mut driver, 400);
    let end = Instant::now() + Duration::from_secs(10);
    while bed.devices.balloon.look().memory != told(400) {
        assert!(Instant::now() < end, "the statistics are not read");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(driver.used(STATISTICS), 1, "the buffer is kept");
    assert_eq!(bed.devices.balloon().memory, told(400));
    driver.wait(STATISTICS);
    // Kept again, and read anew where the guest goes.
    tell(&mut driver, 300);
    thread::sleep(Duration::from_millis(5));
    bed.devices.pause().unwrap();
    assert_eq!(driver.used(STATISTICS), 2);
}

#[test]
fn a_balloon_keeps_its_size_on_the_way() {
    let Some((_disks, mut config, bed)) = bed() else {
        return;
    };
    let _driver = Driver::of_balloon(&bed, TAKEN);
    let generation = bed.read(BALLOON, VIRTIO_MMIO_CONFIG_GENERATION);
    bed.devices.set_balloon(PageCount::new(77)).unwrap();
    assert_eq!(bed.read(BALLOON, VIRTIO_MMIO_CONFIG), 77);
    assert_eq!(bed.read(BALLOON, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert_ne!(bed.read(BALLOON, VIRTIO_MMIO_CONFIG_GENERATION), generation);
    bed.write(BALLOON, VIRTIO_MMIO_CONFIG + 4, 76);
    bed.devices.pause().unwrap();
    let sections = bed.sections();
    let target = Bed::new(&mut config).unwrap();
    bed.copy_memory_to(&target);
    target
        .devices
        .load(&state::parse(&sections).unwrap())
        .unwrap();
    assert_eq!(target.sections(), sections);
    let info = target.devices.balloon();
    assert_eq!(
        (info.has_driver, info.target, info.held),
        (true, PageCount::new(77).bytes(), PageCount::new(76).bytes())
    );
    // What it holds for the move alone ends where it arrives.
    target.devices.lend_balloon(PageCount::new(100)).unwrap();
    assert_eq!(target.read(BALLOON, VIRTIO_MMIO_CONFIG), 100);
    let again = Bed::new(&mut config).unwrap();
    bed.copy_memory_to(&again);
    let sections = target.sections();
    let parsed = state::parse(&sections).unwrap();
    again.devices.load(&parsed).unwrap();
    assert_eq!(again.read(BALLOON, VIRTIO_MMIO_CONFIG), 100);
    again.devices.arrive().unwrap();
    assert_eq!(again.read(BALLOON, VIRTIO_MMIO_CONFIG), 77);
    assert_eq!(again.read(BALLOON, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    // Gone with its driver.
    bed.write(BALLOON, VIRTIO_MMIO_STATUS, 0);
    let info = bed.devices.balloon();
    assert_eq!((info.has_driver, info.held), (false, ByteCount::new(0)));
}
