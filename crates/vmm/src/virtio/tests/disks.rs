//! A disk with many requests at a time: none is lost or done twice, whatever happens meanwhile.

use super::*;
use crate::virtio::device::{Ring, Served};
use crate::virtio::transport::Transport;
use limosa_os::disk::missing::MissingThere;
use std::collections::BTreeSet;
use virtio_queue::Error as QueueError;

/// Queue, rings and requests of a driver that uses all of a disk's queue.
const DEPTH: u16 = 128;
/// Descriptors of a request: header, data, status.
const CHAIN: u16 = 3;
const REQUESTS: u16 = DEPTH / CHAIN;
const HEADERS: u64 = 0x11_0000;
const STATUSES: u64 = 0x11_8000;
const PART: u64 = 4096;
const DISK_BYTES: u64 = 1 << 20;

/// A driver with one request for each part of the disk.
struct Driver<'a> {
    bed: &'a Bed,
    used: u16,
}

impl<'a> Driver<'a> {
    fn start(bed: &'a Bed) -> Self {
        bed.start_with(0, DEPTH);
        Self { bed, used: 0 }
    }

    fn data(request: u16) -> u64 {
        DATA + u64::from(request) * PART
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let place = GuestAddress(address);
        self.bed.view.write_slice(bytes, place).unwrap();
    }

    fn byte(&self, address: u64) -> u8 {
        self.bed.view.read_obj(GuestAddress(address)).unwrap()
    }

    /// Lays a request down, with data of its own.
    fn prepare(&self, request: u16, kind: u32) {
        let number = u64::from(request);
        let header = HEADERS + 16 * number;
        self.write(header, &kind.to_le_bytes());
        self.write(header + 8, &(number * PART / 512).to_le_bytes());
        self.write(STATUSES + number, &[0xff]);
        let data = (Self::data(request), PART as u32, kind == IN);
        let chain = [(header, 16, false), data, (STATUSES + number, 1, true)];
        for (index, (address, len, is_written)) in (0..).zip(chain) {
            let flags = u16::from(index < 2) | u16::from(is_written) << 1;
            let place = request * CHAIN + index;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(place + 1).to_le_bytes());
            self.write(DESCRIPTORS + 16 * u64::from(place), &bytes);
        }
    }

    fn fill(&self, request: u16, byte: u8) {
        self.bed.fill(Self::data(request), byte, PART as usize);
    }

    /// Has the device see these requests.
    fn queue(&self, requests: impl IntoIterator<Item = u16>) {
        let index = GuestAddress(AVAILABLE + 2);
        let mut next: u16 = self.bed.view.read_obj(index).unwrap();
        for request in requests {
            let entry = AVAILABLE + 4 + 2 * u64::from(next % DEPTH);
            self.write(entry, &(request * CHAIN).to_le_bytes());
            next = next.wrapping_add(1);
        }
        self.bed.view.write_obj(next, index).unwrap();
    }

    fn ring(&self) {
        self.bed.write(0, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }

    /// What was answered since the last look.
    fn answered(&mut self) -> Vec<u16> {
        let end = self.bed.used();
        let mut requests = Vec::new();
        while self.used != end {
            let entry = USED + 4 + 8 * u64::from(self.used % DEPTH);
            let head: u32 = self.bed.view.read_obj(GuestAddress(entry)).unwrap();
            requests.push(u16::try_from(head).unwrap() / CHAIN);
            self.used = self.used.wrapping_add(1);
        }
        requests
    }

    fn wait(&mut self, count: u16) -> Vec<u16> {
        self.bed.wait_for_used(self.used.wrapping_add(count));
        self.answered()
    }
}

/// Every way that there is here.
fn each_way(check: impl Fn(Way)) {
    if Kvm::open().is_err() {
        return eprintln!("skipped: no /dev/kvm");
    }
    [Way::Best, Way::OneByOne].into_iter().for_each(check);
}

fn all() -> BTreeSet<u16> {
    (0..REQUESTS).collect()
}

/// What a request writes in that round.
fn pattern(request: u16, round: u8) -> u8 {
    u8::try_from(request).unwrap() * 5 + round + 1
}

#[test]
fn many_requests_are_answered_once_each() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        let mut driver = Driver::start(&bed);
        for request in all() {
            driver.prepare(request, OUT);
            driver.fill(request, pattern(request, 0));
        }
        driver.queue(all());
        driver.ring();
        let answered = driver.wait(REQUESTS);
        assert_eq!(answered.into_iter().collect::<BTreeSet<u16>>(), all());
        for request in all() {
            driver.prepare(request, IN);
            driver.fill(request, 0);
        }
        driver.queue(all());
        driver.ring();
        driver.wait(REQUESTS);
        for request in all() {
            let data = Driver::data(request);
            assert!(bed.holds(data, pattern(request, 0), PART as usize));
            assert_eq!(driver.byte(STATUSES + u64::from(request)), 0);
        }
        // One that fails takes no other along: behind the end of the disk.
        for request in all() {
            driver.prepare(request, IN);
        }
        driver.write(HEADERS + 16 * 7 + 8, &(DISK_BYTES / 512).to_le_bytes());
        driver.queue(all());
        driver.ring();
        driver.wait(REQUESTS);
        let status = |request| driver.byte(STATUSES + u64::from(request));
        let failed: Vec<u16> = all()
            .into_iter()
            .filter(|&request| status(request) != 0)
            .collect();
        assert_eq!((failed, status(7)), (vec![7], 1));
    });
}

#[test]
fn a_request_larger_than_a_buffer_goes_part_by_part() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        bed.start(0);
        // Pieces of which none ends where a buffer does.
        let pieces = |is_written| {
            [
                (DATA, 300 << 10, is_written),
                (DATA + (300 << 10), 420 << 10, is_written),
            ]
        };
        let bytes: Vec<u8> = (0..720_u32 << 10).map(|at| (at / 512 + at) as u8).collect();
        bed.view.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        assert_eq!(bed.block(OUT, 8, &pieces(false)), 0);
        let on_disk = fs::read(&disks.path).unwrap();
        assert!(on_disk[4096..4096 + bytes.len()] == bytes);
        bed.fill(DATA, 0, bytes.len());
        assert_eq!(bed.block(IN, 8, &pieces(true)), 0);
        let mut read = vec![0; bytes.len()];
        bed.view.read_slice(&mut read, GuestAddress(DATA)).unwrap();
        assert!(read == bytes);
    });
}

#[test]
fn a_chain_without_end_breaks_the_queue() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        let mut driver = Driver::start(&bed);
        // What was begun before is answered nonetheless.
        driver.prepare(0, IN);
        driver.prepare(1, IN);
        let last = DESCRIPTORS + 16 * (2 * u64::from(CHAIN) - 1);
        driver.write(last + 12, &[3, 0, u8::try_from(CHAIN).unwrap(), 0]);
        driver.queue([0, 1]);
        driver.ring();
        assert_eq!(driver.wait(1), [0]);
        bed.wait_for_failure();
        assert_eq!(driver.byte(STATUSES), 0);
        bed.devices.pause().unwrap();
        assert!(driver.answered().is_empty());
    });
}

/// Stops in the middle of writes, and goes on elsewhere.
#[test]
fn a_pause_leaves_nothing_under_way() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let mut config = disks.config(false);
        let mut cut_short = 0;
        for round in 0..20 {
            let source = Bed::with(&mut config, way).unwrap();
            source.run();
            let mut driver = Driver::start(&source);
            for request in all() {
                driver.prepare(request, OUT);
                driver.fill(request, pattern(request, round));
            }
            driver.queue(all());
            driver.ring();
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_micros(100) * u32::from(round) {}
            source.devices.pause().unwrap();
            let at_source = driver.answered();
            cut_short += usize::from(at_source.len() < usize::from(REQUESTS));
            let sections = source.sections();
            let on_disk = fs::read(&disks.path).unwrap();
            for request in all() {
                let part = &on_disk[usize::from(request) * PART as usize..][..PART as usize];
                let is_there = part.iter().all(|&byte| byte == pattern(request, round));
                assert_eq!(is_there, at_source.contains(&request), "{request} {round}");
            }
            // A new driver of the same guest, elsewhere.
            let target = Bed::with(&mut config, way).unwrap();
            source.copy_memory_to(&target);
            target
                .devices
                .load(&state::parse(&sections).unwrap())
                .unwrap();
            source.devices.release().unwrap();
            target.devices.claim().unwrap();
            target.devices.resume();
            let mut driver = Driver {
                bed: &target,
                used: driver.used,
            };
            let rest = REQUESTS - u16::try_from(at_source.len()).unwrap();
            let at_target = driver.wait(rest);
            assert_eq!(
                source.used(),
                driver.used - rest,
                "the source does nothing more"
            );
            let both: Vec<u16> = at_source.into_iter().chain(at_target).collect();
            assert_eq!(both.len(), usize::from(REQUESTS));
            assert_eq!(both.into_iter().collect::<BTreeSet<u16>>(), all());
            target.devices.pause().unwrap();
            target.devices.release().unwrap();
        }
        println!("{way:?}: {cut_short} of 20 pauses came in the middle");
    });
}

/// A pause in vain: the guest goes on where it was.
#[test]
fn a_guest_that_runs_on_has_lost_nothing() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        let mut driver = Driver::start(&bed);
        for round in 0..20 {
            for request in all() {
                driver.prepare(request, OUT);
                driver.fill(request, pattern(request, round));
            }
            driver.queue(all());
            driver.ring();
            bed.devices.pause().unwrap();
            let before = driver.answered();
            bed.devices.resume();
            let after = driver.wait(REQUESTS - u16::try_from(before.len()).unwrap());
            let both = before.into_iter().chain(after);
            assert_eq!(both.collect::<BTreeSet<u16>>(), all());
        }
        let on_disk = fs::read(&disks.path).unwrap();
        for request in all() {
            assert_eq!(
                on_disk[usize::from(request) * PART as usize],
                pattern(request, 19)
            );
        }
    });
}

#[test]
fn a_reset_ends_what_was_under_way() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        for round in 0..20 {
            let mut driver = Driver::start(&bed);
            bed.view.write_obj(0_u32, GuestAddress(AVAILABLE)).unwrap();
            bed.view.write_obj(0_u32, GuestAddress(USED)).unwrap();
            for request in all() {
                driver.prepare(request, if request % 2 == 0 { OUT } else { IN });
                driver.fill(request, pattern(request, round));
            }
            driver.queue(all());
            driver.ring();
            bed.write(0, VIRTIO_MMIO_STATUS, 0);
            let used = bed.used();
            let on_disk = fs::read(&disks.path).unwrap();
            for request in all() {
                driver.fill(request, 0xee);
            }
            thread::sleep(Duration::from_millis(2));
            assert_eq!(bed.used(), used, "nothing is answered after a reset");
            assert!(
                fs::read(&disks.path).unwrap() == on_disk,
                "nothing is written"
            );
            for request in all() {
                assert!(bed.holds(Driver::data(request), 0xee, PART as usize));
            }
            driver.answered();
        }
    });
}

/// What was read is noted when it is there, and not before.
#[test]
fn what_many_requests_read_is_dirty() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let mut bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.vm.start_tracking().unwrap();
        bed.run();
        let mut driver = Driver::start(&bed);
        let pages = bed.memory.page_count();
        let bitmap = SharedBitmap::create(pages).unwrap();
        let all_pages = PageRange::new(Pfn::new(0), pages);
        for request in all() {
            driver.prepare(request, IN);
        }
        bed.vm.read_dirty_pages(&bitmap).unwrap();
        bed.vm.clear_dirty_pages(&bitmap, all_pages, &[]).unwrap();
        driver.queue(all());
        driver.ring();
        let mut found = BTreeSet::new();
        let mut left = usize::from(REQUESTS);
        while left > 0 {
            let answered = driver.answered();
            left -= answered.len();
            // Whoever is answered is in this harvest or in one before.
            bed.vm.read_dirty_pages(&bitmap).unwrap();
            for run in bitmap.runs_in(all_pages) {
                found.extend(run.iter().map(|pfn| pfn.get() * PAGE_SIZE));
            }
            bed.vm.clear_dirty_pages(&bitmap, all_pages, &[]).unwrap();
            for request in answered {
                assert!(found.contains(&Driver::data(request)), "{request}");
            }
        }
    });
}

/// What a disk's notes tell, as pages of the disk.
fn written(bed: &Bed) -> BTreeSet<u64> {
    let writes = bed.devices.disk_writes();
    writes.harvest();
    let bitmap = writes.bitmap().unwrap();
    let all = PageRange::new(Pfn::new(0), bitmap.page_count());
    let runs = bitmap.runs_in(all).into_iter();
    runs.flat_map(PageRange::iter).map(Pfn::get).collect()
}

/// Has the notes kept, for a bed's only disk.
fn follow(bed: &Bed) {
    let pages = bed.memory.page_count();
    let numbering = Numbering::new(pages, [ByteCount::new(DISK_BYTES)]).unwrap();
    bed.devices.disk_writes().follow(&numbering).unwrap();
}

#[test]
fn whoever_is_answered_has_his_writes_noted() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        let mut driver = Driver::start(&bed);
        follow(&bed);
        let first = bed.memory.page_count().get();
        let whole = PageRange::new(Pfn::new(first), PageCount::new(DISK_BYTES / PAGE_SIZE));
        for request in all() {
            driver.prepare(request, if request == 7 { IN } else { OUT });
        }
        driver.queue(all());
        driver.ring();
        let mut found = BTreeSet::new();
        let mut left = usize::from(REQUESTS);
        while left > 0 {
            let answered = driver.answered();
            left -= answered.len();
            // In this harvest, or in one before.
            found.extend(written(&bed));
            assert!(bed.devices.disk_writes().clear(whole, &[]));
            for request in answered {
                assert_eq!(
                    found.contains(&u64::from(request)),
                    request != 7,
                    "{request}"
                );
            }
        }
        assert_eq!(written(&bed), BTreeSet::new());
    });
}

#[test]
fn what_changes_a_disk_in_other_ways_is_noted_too() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        bed.start(0);
        bed.block(OUT, 0, &[(DATA, 512, false)]);
        follow(&bed);
        bed.block(IN, 0, &[(DATA, 512, true)]);
        bed.block(FLUSH, 0, &[]);
        assert_eq!(written(&bed), BTreeSet::new());
        // Seven sectors from the last of a page on.
        for (kind, sector) in [(DISCARD, 15_u64), (WRITE_ZEROES, 31)] {
            let mut range = [0; 16];
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8] = 7;
            bed.view.write_slice(&range, GuestAddress(DATA)).unwrap();
            assert_eq!(bed.block(kind, 0, &[(DATA, 16, false)]), 0);
        }
        assert_eq!(written(&bed), BTreeSet::from([1, 2, 3, 4]));
    });
}

/// A guest that arrived before its disk did reads what has come, and nothing else; and what it writes is not
/// overwritten by what comes.
#[test]
fn a_request_waits_for_pages_that_have_not_come() {
    each_way(|way| {
        let disks = Disks::new(DISK_BYTES);
        let bed = Bed::with(&mut disks.config(false), way).unwrap();
        bed.run();
        let mut driver = Driver::start(&bed);
        let first = bed.memory.page_count();
        let numbering = Numbering::new(first, [ByteCount::new(DISK_BYTES)]).unwrap();
        let lent = bed.devices.missing_on_disks().lend(&numbering).unwrap();
        let [bitmap, asked] = lent.map(|end| end.try_clone_to_owned().unwrap());
        let there = MissingThere::new(&numbering, bitmap, asked).unwrap();
        let page = |number: u64| PageRange::new(Pfn::new(first.get() + number), PageCount::new(1));
        for number in [3, 7] {
            assert_eq!(there.mark(page(number)), PageCount::new(1));
        }
        for (request, kind) in [(2, IN), (3, IN), (7, OUT)] {
            driver.prepare(request, kind);
            driver.fill(request, pattern(request, 1));
        }
        driver.queue([2, 3, 7]);
        driver.ring();
        let mut wanted = Vec::new();
        for number in [3, 7] {
            let end = Instant::now() + Duration::from_secs(20);
            while !wanted.contains(&page(number)) {
                assert!(Instant::now() < end, "nobody asks for page {number}");
                there.read_asked(&mut wanted).unwrap();
                thread::yield_now();
            }
            assert!(!driver.answered().contains(&(number as u16)), "{number}");
            // As the daemon does: first the content, then the word that it is there.
            let file = File::options().write(true).open(&disks.path).unwrap();
            file.write_all_at(&[0x5a; PART as usize], number * PART)
                .unwrap();
            file.sync_all().unwrap();
            assert_eq!(there.arrived(page(number)), PageCount::new(1));
        }
        driver.bed.wait_for_used(3);
        assert!(bed.holds(Driver::data(3), 0x5a, PART as usize), "what came");
        assert!(
            bed.holds(Driver::data(2), 0, PART as usize),
            "what was there"
        );
        let on_disk = fs::read(&disks.path).unwrap();
        let written = &on_disk[7 * PART as usize..8 * PART as usize];
        assert!(
            written.iter().all(|&byte| byte == pattern(7, 1)),
            "what was written"
        );
        assert_eq!(bed.devices.missing_on_disks().count(), PageCount::ZERO);
    });
}

/// A device whose one request never ends.
#[derive(Debug)]
struct Endless;

impl Device for Endless {
    fn id(&self) -> u32 {
        0
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[1]
    }

    fn configuration(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&mut self, _queue: usize, _ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        Ok(Served::NoInput)
    }

    fn under_way(&self) -> usize {
        1
    }

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn load(&mut self, _bytes: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

#[test]
fn who_waits_for_a_request_that_never_ends_is_told() {
    let disks = Disks::new(DISK_BYTES);
    let Some(bed) = Bed::new(&mut disks.config(false)) else {
        return;
    };
    let view = Arc::new(bed.vm.view());
    let line = Line::Interrupt(bed.vm.interrupt_line(Place::of(5).line).unwrap());
    let transport = Transport::new(5, Box::new(Endless), &bed.vm, line, view).unwrap();
    transport.resume();
    transport.begin_rest();
    let begun = Instant::now();
    let stuck = transport
        .finish_rest(begun + Duration::from_millis(50))
        .unwrap_err();
    assert!(matches!(stuck, DeviceError::Stuck { index: 5 }), "{stuck}");
    assert!(begun.elapsed() >= Duration::from_millis(50));
    // And its disk stays its own.
    assert!(matches!(
        transport.release(),
        Err(DeviceError::Stuck { index: 5 })
    ));
}
