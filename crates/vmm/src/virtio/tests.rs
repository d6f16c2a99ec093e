//! Devices as a driver sees them: registers, rings and doorbells, with the guest's part played here.

mod balloon;
mod console;
mod disks;
mod driver;
mod rude;

use super::*;
use crate::config::Platform;
use crate::config::devices::Mac;
use crate::layout;
use crate::state;
use limosa_os::dirty::TrackerKind;
use limosa_os::kvm::Kvm;
use limosa_os::memory::GuestView;
use limosa_os::{PageKind, SharedBitmap, SharedMemory};
use limosa_pages::{ByteCount, Numbering, PAGE_SIZE, PageCount, PageRange, Pfn};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: ByteCount = ByteCount::new(16 << 20);
const DESCRIPTORS: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x10_1000;
const USED: u64 = 0x10_2000;
const HEADER: u64 = 0x10_3000;
const STATUS: u64 = 0x10_4000;
const DATA: u64 = 0x20_0000;
const SIZE: u16 = 8;
/// Features of all devices, those of disks without what needs no agreement, and no event index: tests
/// count interrupts by looking at the ring.
const FEATURES: [u32; 2] = [1 << 28, 1];

/// A machine without vCPUs.
struct Bed {
    vm: Vm,
    memory: Arc<SharedMemory>,
    view: GuestView,
    devices: Devices,
    /// What is behind its networks.
    wires: Vec<UnixDatagram>,
}

/// The disk of a bed, in a directory that goes with it.
struct Disks {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Disks {
    fn new(bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        Self {
            _directory: directory,
            path,
        }
    }

    fn config(&self, read_only: bool) -> VmConfig {
        VmConfig {
            platform: Platform::Pc,
            irqchip: true,
            disks: vec![DiskConfig {
                path: self.path.display().to_string(),
                read_only,
                bytes: None,
            }],
            ..VmConfig::new("test", MEMORY, 1)
        }
    }

    /// The same with a network, so that there is one of each kind of device.
    fn config_of_all(&self, read_only: bool) -> VmConfig {
        VmConfig {
            networks: vec![NetworkConfig {
                tap: "tap0".to_owned(),
                mac: Mac([2, 0, 0, 0, 0, 9]),
            }],
            ..self.config(read_only)
        }
    }
}

impl Bed {
    fn new(config: &mut VmConfig) -> Option<Self> {
        Self::made(config, Way::Best, None)
    }

    fn with(config: &mut VmConfig, way: Way) -> Option<Self> {
        Self::made(config, way, None)
    }

    /// Devices that end the waits of their driver, if there is such a way.
    fn waking(config: &mut VmConfig, wake: Option<&Arc<Wake>>) -> Option<Self> {
        Self::made(config, Way::Best, wake)
    }

    fn made(config: &mut VmConfig, way: Way, wake: Option<&Arc<Wake>>) -> Option<Self> {
        let Ok(kvm) = Kvm::open() else {
            eprintln!("skipped: no /dev/kvm");
            return None;
        };
        config.check().unwrap();
        let mut vm = kvm.create_vm(TrackerKind::Bitmap).unwrap();
        let memory = Arc::new(SharedMemory::create(MEMORY, PageKind::Small).unwrap());
        vm.set_memory(Arc::clone(&memory), &layout::regions(MEMORY))
            .unwrap();
        vm.create_irqchip().unwrap();
        let wires = Mutex::new(Vec::new());
        let open_tap = |_: &str| {
            let (near, wire) = UnixDatagram::pair()?;
            near.set_nonblocking(true)?;
            wire.set_nonblocking(true)?;
            wires.lock().unwrap().push(wire);
            Ok(Tap::from(OwnedFd::from(near)))
        };
        let devices = Devices::make_with(config, &vm, wake, way, &open_tap).unwrap();
        Some(Self {
            view: vm.view(),
            vm,
            memory,
            devices,
            wires: wires.into_inner().unwrap(),
        })
    }

    fn read(&self, device: u16, register: u32) -> u32 {
        let mut bytes = [0xff; 4];
        let address = Place::of(device).address + u64::from(register);
        assert!(self.devices.read(address, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    fn write(&self, device: u16, register: u32, value: u32) {
        let address = Place::of(device).address + u64::from(register);
        assert!(self.devices.write(address, &value.to_le_bytes()));
    }

    /// What a driver does to get a device with one queue to work.
    fn start(&self, device: u16) {
        self.start_with(device, SIZE);
    }

    /// The same, with a queue of that size.
    fn start_with(&self, device: u16, size: u16) {
        self.write(device, VIRTIO_MMIO_STATUS, 0);
        self.write(device, VIRTIO_MMIO_STATUS, 3);
        for (half, features) in (0..).zip(FEATURES) {
            self.write(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(device, VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.write(device, VIRTIO_MMIO_STATUS, 11);
        assert_eq!(
            self.read(device, VIRTIO_MMIO_STATUS),
            11,
            "features are agreed on"
        );
        self.write(device, VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(device, VIRTIO_MMIO_QUEUE_NUM, size.into());
        let places = [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
            (VIRTIO_MMIO_QUEUE_USED_LOW, USED),
        ];
        for (register, address) in places {
            self.write(device, register, u32::try_from(address).unwrap());
            self.write(device, register + 4, 0);
        }
        self.write(device, VIRTIO_MMIO_QUEUE_READY, 1);
        self.write(device, VIRTIO_MMIO_STATUS, 15);
    }

    /// Queues a chain: address, length, and whether the device writes there.
    fn queue(&self, chain: &[(u64, u32, bool)]) {
        let last = chain.len() - 1;
        for (index, &(address, len, is_written)) in chain.iter().enumerate() {
            let flags = u16::from(index < last) | u16::from(is_written) << 1;
            let next = u16::try_from(index + 1).unwrap();
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            let place = GuestAddress(DESCRIPTORS + 16 * index as u64);
            self.view.write_slice(&bytes, place).unwrap();
        }
        let index: u16 = self.view.read_obj(GuestAddress(AVAILABLE + 2)).unwrap();
        let entry = AVAILABLE + 4 + 2 * u64::from(index % SIZE);
        self.view.write_obj(0_u16, GuestAddress(entry)).unwrap();
        self.view
            .write_obj(index.wrapping_add(1), GuestAddress(AVAILABLE + 2))
            .unwrap();
    }

    fn used(&self) -> u16 {
        self.view.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn wait_for_used(&self, expect: u16) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.used() != expect {
            assert!(Instant::now() < end, "the device does not answer");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn wait_for_failure(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.read(0, VIRTIO_MMIO_STATUS) & 0x40 == 0 {
            assert!(Instant::now() < end, "the broken queue is not noticed");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn copy_memory_to(&self, target: &Self) {
        let mut page = vec![0; 4096];
        for pfn in 0..self.memory.page_count().get() {
            self.memory.read_at(pfn * PAGE_SIZE, &mut page).unwrap();
            target.memory.write_at(pfn * PAGE_SIZE, &page).unwrap();
        }
    }

    fn queue_block(&self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.view
            .write_slice(&header, GuestAddress(HEADER))
            .unwrap();
        self.view.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(data);
        chain.push((STATUS, 1, true));
        self.queue(&chain);
    }

    fn status(&self) -> u8 {
        self.view.read_obj(GuestAddress(STATUS)).unwrap()
    }

    /// A request of a disk, carried out; its answer.
    fn block(&self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u8 {
        let before = self.used();
        self.queue_block(kind, sector, data);
        self.write(0, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        self.wait_for_used(before.wrapping_add(1));
        self.status()
    }

    fn fill(&self, address: u64, byte: u8, len: usize) {
        self.view
            .write_slice(&vec![byte; len], GuestAddress(address))
            .unwrap();
    }

    fn holds(&self, address: u64, byte: u8, len: usize) -> bool {
        let mut bytes = vec![0; len];
        self.view
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes.iter().all(|&found| found == byte)
    }

    fn sections(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        self.devices.save(&mut writer);
        Writer::join(&[writer])
    }

    fn run(&self) {
        self.devices.claim().unwrap();
        self.devices.resume();
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[test]
fn a_disk_does_what_it_is_asked() {
    let disks = Disks::new(1 << 20);
    let Some(bed) = Bed::new(&mut disks.config(false)) else {
        return;
    };
    assert_eq!(bed.read(0, VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(bed.read(0, VIRTIO_MMIO_DEVICE_ID), 2);
    assert_eq!(bed.read(1, VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(bed.read(0, VIRTIO_MMIO_CONFIG), (1 << 20) / 512);
    assert!(!bed.devices.read(Place::of(4).address, &mut [0; 4]));
    bed.run();
    bed.start(0);
    bed.fill(DATA, 7, 12288);
    // Two pieces, the second one of a single sector.
    let pieces = [(DATA, 8192, false), (DATA + 8192, 512, false)];
    assert_eq!(bed.block(OUT, 3, &pieces), 0);
    assert_eq!(bed.read(0, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    bed.write(0, VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(bed.read(0, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(bed.block(FLUSH, 0, &[]), 0);
    let bytes = fs::read(&disks.path).unwrap();
    assert_eq!(bytes.len(), 1 << 20);
    assert!(bytes[1536..1536 + 8704].iter().all(|&byte| byte == 7));
    assert_eq!((bytes[1535], bytes[1536 + 8704]), (0, 0));
    assert_eq!(bed.block(IN, 3, &[(DATA + 0x1_0000, 512, true)]), 0);
    assert!(bed.holds(DATA + 0x1_0000, 7, 512));
    assert_eq!(bed.block(GET_ID, 0, &[(DATA, 20, true)]), 0);
    let mut name = [0; 8];
    bed.view.read_slice(&mut name, GuestAddress(DATA)).unwrap();
    assert_eq!(&name, b"disk.raw");
    // Sectors 3 and 4 become zeroes, the first by giving their room back.
    for (kind, sector) in [(DISCARD, 3_u64), (WRITE_ZEROES, 4)] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8] = 1;
        bed.view.write_slice(&range, GuestAddress(DATA)).unwrap();
        assert_eq!(bed.block(kind, 0, &[(DATA, 16, false)]), 0);
    }
    let bytes = fs::read(&disks.path).unwrap();
    assert_eq!((bytes[2048], bytes[2559], bytes[2560]), (0, 0, 7));
}

#[test]
fn what_a_disk_cannot_do_is_an_answer() {
    let disks = Disks::new(1 << 20);
    let Some(bed) = Bed::new(&mut disks.config(true)) else {
        return;
    };
    bed.run();
    bed.start(0);
    let sector = [(DATA, 512, true)];
    for (kind, place, data, expect) in [
        (IN, 2048, &sector[..], 1),
        (IN, u64::MAX, &sector[..], 1),
        (IN, 0, &[(DATA, 511, true)][..], 1),
        (OUT, 0, &[(DATA, 512, false)][..], 1),
        (77, 0, &[][..], 2),
        (IN, 2047, &sector[..], 0),
    ] {
        assert_eq!(bed.block(kind, place, data), expect, "{kind} at {place}");
    }
    // Nothing to answer into; and a chain that leaves the memory breaks the queue.
    let before = bed.used();
    bed.queue(&[(HEADER, 16, false)]);
    bed.write(0, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    bed.wait_for_used(before.wrapping_add(1));
    bed.queue(&[
        (HEADER, 16, false),
        (MEMORY.get() - 16, 512, true),
        (STATUS, 1, true),
    ]);
    bed.write(0, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    bed.wait_for_failure();
    bed.start(0);
}

#[test]
fn what_a_device_writes_is_dirty() {
    let disks = Disks::new(1 << 20);
    let Some(mut bed) = Bed::new(&mut disks.config(false)) else {
        return;
    };
    bed.run();
    bed.start(0);
    let pages = bed.memory.page_count();
    let bitmap = SharedBitmap::create(pages).unwrap();
    let all = PageRange::new(Pfn::new(0), pages);
    let dirty = |bed: &Bed| {
        bed.vm.read_dirty_pages(&bitmap).unwrap();
        let mut pages = Vec::new();
        for run in bitmap.runs_in(all) {
            pages.extend(run.iter().map(|pfn| pfn.get() * PAGE_SIZE));
        }
        pages
    };
    bed.vm.start_tracking().unwrap();
    assert_eq!(dirty(&bed).len() as u64, pages.get());
    bed.vm.clear_dirty_pages(&bitmap, all, &[]).unwrap();
    // What the guest's part of this test writes goes through the same view.
    bed.queue_block(IN, 0, &[(DATA + 0x800, 8192, true)]);
    dirty(&bed);
    bed.vm.clear_dirty_pages(&bitmap, all, &[]).unwrap();
    bed.write(0, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    bed.wait_for_used(1);
    let data = [DATA, DATA + 0x1000, DATA + 0x2000];
    let expect = [&[USED, STATUS][..], &data].concat();
    assert_eq!(dirty(&bed), expect);
    // Kept pages count on, the others do not.
    let kept = PageRange::new(Pfn::new(DATA / PAGE_SIZE), PageCount::new(1));
    bed.vm.clear_dirty_pages(&bitmap, all, &[kept]).unwrap();
    assert_eq!(dirty(&bed), [DATA]);
}

#[test]
fn a_request_is_carried_out_once_on_either_side_of_a_move() {
    let disks = Disks::new(1 << 20);
    let mut config = disks.config(false);
    let Some(source) = Bed::new(&mut config) else {
        return;
    };
    source.run();
    source.start(0);
    source.fill(DATA, 1, 512);
    assert_eq!(source.block(OUT, 0, &[(DATA, 512, false)]), 0);
    source.devices.pause().unwrap();
    // Queued and rung for, but the guest stops before the device looks.
    source.fill(DATA, 2, 512);
    source.queue_block(OUT, 1, &[(DATA, 512, false)]);
    source.write(0, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    thread::sleep(Duration::from_millis(20));
    assert_eq!((source.used(), source.status()), (1, 0xff));
    let sections = source.sections();
    let target = Bed::new(&mut config).unwrap();
    source.copy_memory_to(&target);
    target
        .devices
        .load(&state::parse(&sections).unwrap())
        .unwrap();
    assert_eq!(target.sections(), sections);
    // The disk goes over with the guest.
    let busy = target.devices.claim().unwrap_err().to_string();
    assert!(busy.contains("in use by another guest"), "{busy}");
    source.devices.release().unwrap();
    target.devices.claim().unwrap();
    assert!(source.devices.claim().is_err());
    target.devices.arrive().unwrap();
    target.devices.resume();
    target.wait_for_used(2);
    assert_eq!((target.status(), source.status()), (0, 0xff));
    assert_eq!(target.read(0, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    let mut sector = [0; 512];
    let file = File::open(&disks.path).unwrap();
    file.read_exact_at(&mut sector, 512).unwrap();
    assert!(sector.iter().all(|&byte| byte == 2));
}

/// A driver that has not said that it knows is called again where it runs next.
#[test]
fn a_wake_up_that_nobody_has_taken_comes_again_after_a_move() {
    let disks = Disks::new(1 << 20);
    let mut config = disks.config(false);
    let wake = Arc::new(Wake::default());
    let Some(source) = Bed::waking(&mut config, Some(&wake)) else {
        return;
    };
    source.run();
    source.start(0);
    assert!(!wake.take());
    source.fill(DATA, 1, 512);
    assert_eq!(source.block(OUT, 0, &[(DATA, 512, false)]), 0);
    source.devices.pause().unwrap();
    assert!(wake.take());
    let check = |expect: bool| {
        let sections = source.sections();
        let there = Arc::new(Wake::default());
        let target = Bed::waking(&mut config.clone(), Some(&there)).unwrap();
        let sections = state::parse(&sections).unwrap();
        source.copy_memory_to(&target);
        target.devices.load(&sections).unwrap();
        assert!(!there.take());
        target.devices.resume();
        assert_eq!(there.take(), expect);
    };
    check(true);
    source.write(0, VIRTIO_MMIO_INTERRUPT_ACK, 1);
    check(false);
}

#[test]
fn every_device_gives_back_what_it_took() {
    let disks = Disks::new(1 << 20);
    let mut config = disks.config_of_all(true);
    let Some(first) = Bed::new(&mut config) else {
        return;
    };
    let second = Bed::new(&mut config).unwrap();
    let count = Devices::count(&config);
    for device in 0..count {
        first.start(device);
    }
    let sections = first.sections();
    let parsed = state::parse(&sections).unwrap();
    assert_eq!(parsed.len(), usize::from(count));
    second.devices.load(&parsed).unwrap();
    assert_eq!(second.sections(), sections);
    // A state of another device, cut off, or with any byte changed: an error or a state, no panic.
    let mut swapped = parsed.clone();
    swapped.swap(0, 1);
    let error = second.devices.load(&swapped).unwrap_err().to_string();
    assert!(error.contains("another kind of device"), "{error}");
    for section in &parsed {
        for at in 0..section.bytes.len() {
            let mut bytes = section.bytes.to_vec();
            bytes[at] ^= 0xff;
            for bytes in [&bytes[..], &section.bytes[..at]] {
                let mut changed = parsed.clone();
                changed[usize::from(section.instance)] = Section { bytes, ..*section };
                let _is_taken = second.devices.load(&changed).is_ok();
            }
        }
    }
}

fn only(lacking: Vec<DeviceError>) -> String {
    let [error] = lacking.as_slice() else {
        panic!("one thing is lacking, not {lacking:?}");
    };
    error.to_string()
}

#[test]
fn a_disk_of_another_size_is_refused() {
    let disks = Disks::new(1 << 20);
    let mut config = disks.config(false);
    if Bed::new(&mut config).is_none() {
        return;
    }
    assert_eq!(config.disks[0].bytes, Some(1 << 20));
    let file = File::options().write(true).open(&disks.path).unwrap();
    file.set_len(2 << 20).unwrap();
    let error = only(lacking(&config));
    assert!(error.ends_with("has 2097152 bytes here, the guest knows one of 1048576"));
    fs::remove_file(&disks.path).unwrap();
    let error = only(lacking(&config));
    assert!(error.ends_with("cannot be used"), "{error}");
}
