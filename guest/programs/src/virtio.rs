//! A driver's side of a device: its registers, and queues in memory (virtio 1.2, sections 2.7 and 4.2).
//!
//! There are no interrupts. A device that has something for its driver ends the wait of vCPU 0, so a driver
//! says for which entry it wants that ([`Queue::arm`]), looks once more, and waits then: whatever comes in
//! between has ended the wait before it begins.
//!
//! What a device writes is read as atomics, since it does so at any time. Addresses in descriptors are those
//! of the heap's beginning, where physical memory has no hole.

use core::ops::Range;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use limosa_micro_abi::{BootInfo, PAGE_BYTES, memory_map};
use limosa_micro_logic::ring;

use crate::vcpu::claim;

/// Entries of a queue.
pub const QUEUE_SIZE: u16 = 256;
/// Bytes of the heap that a queue takes.
pub const QUEUE_BYTES: u64 = 3 * PAGE_BYTES;

const MAGIC_VALUE: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESC_LOW: u64 = 0x80;
const QUEUE_AVAIL_LOW: u64 = 0x90;
const QUEUE_USED_LOW: u64 = 0xa0;
const CONFIG: u64 = 0x100;

/// "virt", and the registers of virtio 1.
const MAGIC: u32 = 0x7472_6976;
const REGISTERS_VERSION: u32 = 2;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// The device follows version 1.
const FEATURE_VERSION_1: u64 = 1 << 32;
/// Either side says from which entry on it wants to be told.
const FEATURE_EVENT_INDEX: u64 = 1 << 29;

/// A buffer that the device writes.
const WRITABLE: u16 = 2;

/// The registers of a device.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    base: u64,
}

impl Registers {
    /// Those of the first device of that kind.
    #[must_use]
    pub fn find(boot: &BootInfo, id: u32) -> Option<Self> {
        let devices = (0..boot.device_count).map(|index| Self {
            base: memory_map::DEVICES + u64::from(index) * memory_map::DEVICE_BYTES,
        });
        let wanted = [MAGIC, REGISTERS_VERSION, id];
        devices.into_iter().find(|device| {
            let found = [MAGIC_VALUE, VERSION, DEVICE_ID].map(|register| device.read(register));
            found == wanted
        })
    }

    fn read(self, register: u64) -> u32 {
        // SAFETY: the boot information counts this device, so its registers are mapped; they take any read.
        unsafe { ((self.base + register) as *const u32).read_volatile() }
    }

    fn write(self, register: u64, value: u32) {
        // SAFETY: as for `read`; what a write does to memory is what its device was told to do, within the
        // buffers that are lent to it.
        unsafe { ((self.base + register) as *mut u32).write_volatile(value) }
    }

    fn write_long(self, register: u64, value: u64) {
        self.write(register, value as u32);
        self.write(register + 4, (value >> 32) as u32);
    }

    /// Begins with the device from anew; false if it lacks a feature that is wanted.
    #[must_use]
    pub fn reset(self, wanted: u64) -> bool {
        let wanted = wanted | FEATURE_VERSION_1 | FEATURE_EVENT_INDEX;
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let half = |half| {
            self.write(DEVICE_FEATURES_SEL, half);
            u64::from(self.read(DEVICE_FEATURES))
        };
        let offered = half(0) | half(1) << 32;
        if offered & wanted != wanted {
            return false;
        }
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (wanted >> (32 * half)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(STATUS) & FEATURES_OK != 0
    }

    /// Tells it where a queue is; false if it takes none of that size.
    #[must_use]
    pub fn connect(self, queue: &Queue) -> bool {
        self.write(QUEUE_SEL, queue.number);
        if self.read(QUEUE_NUM_MAX) < u32::from(QUEUE_SIZE) {
            return false;
        }
        self.write(QUEUE_NUM, u32::from(QUEUE_SIZE));
        let address = |place: *const u8| place.addr() as u64;
        self.write_long(QUEUE_DESC_LOW, address(queue.descriptors.as_ptr().cast()));
        self.write_long(
            QUEUE_AVAIL_LOW,
            address((&raw const *queue.available).cast()),
        );
        self.write_long(QUEUE_USED_LOW, address((&raw const *queue.used).cast()));
        self.write(QUEUE_READY, 1);
        true
    }

    /// Lets it work; all its queues are connected.
    pub fn go(self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// The first bytes of its configuration.
    #[must_use]
    pub fn configuration<const BYTES: usize>(self) -> [u8; BYTES] {
        core::array::from_fn(|index| {
            let place = (self.base + CONFIG + index as u64) as *const u8;
            // SAFETY: as for `read`.
            unsafe { place.read_volatile() }
        })
    }
}

#[repr(C)]
struct Descriptor {
    address: AtomicU64,
    len: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C)]
struct Available {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; QUEUE_SIZE as usize],
    used_event: AtomicU16,
}

#[repr(C)]
struct Element {
    id: AtomicU32,
    len: AtomicU32,
}

#[repr(C)]
struct Used {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [Element; QUEUE_SIZE as usize],
    available_event: AtomicU16,
}

/// A queue of single buffers, each of which has a descriptor of its own for good.
pub struct Queue {
    number: u32,
    bell: Registers,
    descriptors: &'static [Descriptor],
    available: &'static Available,
    used: &'static Used,
    /// How many buffers were queued, and how many of them the device was told.
    queued: u16,
    told: u16,
    /// How many have come back.
    seen: u16,
}

/// A buffer that has come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Returned {
    /// Which one.
    pub buffer: u16,
    /// How many bytes the device has written.
    pub bytes: usize,
}

impl Queue {
    /// A queue of a device, without a buffer.
    ///
    /// # Safety
    /// The range is of [`QUEUE_BYTES`], lies in the heap below 3 GiB, starts at a page boundary, and nothing
    /// else refers to any of it.
    #[must_use]
    pub unsafe fn new(bell: Registers, number: u32, range: &Range<u64>) -> Self {
        let page = |index: u64| {
            let start = range.start + index * PAGE_BYTES;
            start..start + PAGE_BYTES
        };
        // SAFETY: the caller vouches for the range, of which these are three pages; integers take any bytes.
        let (descriptors, available, used) = unsafe {
            (
                claim::<Descriptor>(&page(0)),
                claim::<Available>(&page(1)),
                claim::<Used>(&page(2)),
            )
        };
        Self {
            number,
            bell,
            descriptors,
            available: &available[0],
            used: &used[0],
            queued: 0,
            told: 0,
            seen: 0,
        }
    }

    /// Says where a buffer is, which the device writes or reads.
    ///
    /// # Safety
    /// So many bytes there are the device's whenever the buffer is queued.
    pub unsafe fn set_buffer(&mut self, buffer: u16, address: u64, bytes: u32, is_written: bool) {
        let descriptor = &self.descriptors[usize::from(buffer)];
        descriptor.address.store(address, Ordering::Relaxed);
        descriptor.len.store(bytes, Ordering::Relaxed);
        let flags = if is_written { WRITABLE } else { 0 };
        descriptor.flags.store(flags, Ordering::Relaxed);
    }

    /// Changes how many bytes of a buffer the device reads. It is not queued.
    pub fn set_len(&mut self, buffer: u16, bytes: u32) {
        let descriptor = &self.descriptors[usize::from(buffer)];
        descriptor.len.store(bytes, Ordering::Relaxed);
    }

    /// Queues a buffer; the device hears of it by [`Queue::tell`].
    pub fn queue(&mut self, buffer: u16) {
        let place = usize::from(self.queued % QUEUE_SIZE);
        self.available.ring[place].store(buffer, Ordering::Relaxed);
        self.queued = self.queued.wrapping_add(1);
    }

    /// Shows the device what was queued, and calls it if it wants to be called for that.
    pub fn tell(&mut self) {
        if self.told == self.queued {
            return;
        }
        let before = core::mem::replace(&mut self.told, self.queued);
        self.available.index.store(self.queued, Ordering::Release);
        // What we have shown is seen by the device before we see what it wants, or the other way round.
        fence(Ordering::SeqCst);
        let wanted = self.used.available_event.load(Ordering::Relaxed);
        if ring::is_among(wanted, before, self.queued) {
            self.bell.write(QUEUE_NOTIFY, self.number);
        }
    }

    /// The next buffer that has come back.
    pub fn take(&mut self) -> Option<Returned> {
        if self.used.index.load(Ordering::Acquire) == self.seen {
            return None;
        }
        let element = &self.used.ring[usize::from(self.seen % QUEUE_SIZE)];
        self.seen = self.seen.wrapping_add(1);
        let id = element.id.load(Ordering::Relaxed);
        Some(Returned {
            buffer: id as u16 % QUEUE_SIZE,
            bytes: element.len.load(Ordering::Relaxed) as usize,
        })
    }

    /// Has the next buffer that comes back end a wait; true if one is back already.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        self.available
            .used_event
            .store(self.seen, Ordering::Relaxed);
        // The device sees what we want before we see what it has done, or the other way round.
        fence(Ordering::SeqCst);
        self.used.index.load(Ordering::Relaxed) != self.seen
    }
}

const _: () = assert!(size_of::<Descriptor>() * QUEUE_SIZE as usize == PAGE_BYTES as usize);
const _: () = assert!(size_of::<Available>() <= PAGE_BYTES as usize);
const _: () = assert!(size_of::<Used>() <= PAGE_BYTES as usize);
