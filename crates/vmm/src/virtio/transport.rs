//! The registers of a device, by which its driver finds it, agrees with it on features and tells it
//! where its queues are (virtio 1.2, section 4.2.2).
//!
//! ```text
//!  reset ──▶ features agreed on ──▶ queues told ──▶ DRIVER_OK: live ──▶ reset
//!                                                     └─ broken queue: NEEDS_RESET
//! ```
//!
//! Everything is under one lock but what a driver reaches for with each interrupt. Only a live device
//! that does not rest begins anything; what it has begun it finishes in any case. To let a device work needs no lock, so a guest that ran can always run on.
//!
//! A state may be loaded while pages of the guest are missing still: nothing here reads memory then.

use super::device::{Device, Input, Ring, Served};
use super::line::Line;
use super::{DeviceError, Place, REST_MAX};
use crate::allowance::Allowance;
use crate::console::Keyboard;
use crate::state::{Section, StateError};
use limosa_os::kvm::{Doorbell, Vm};
use limosa_os::memory::GuestView;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG as CONFIG, VIRTIO_MMIO_CONFIG_GENERATION as CONFIG_GENERATION,
    VIRTIO_MMIO_DEVICE_FEATURES as DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL as DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID as DEVICE_ID,
    VIRTIO_MMIO_DRIVER_FEATURES as DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL as DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG as INT_CONFIG,
    VIRTIO_MMIO_INT_VRING as INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK as INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS as INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE as MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH as QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW as QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH as QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW as QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY as QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM as QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX as QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY as QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL as QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH as QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW as QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH as SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW as SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS as STATUS, VIRTIO_MMIO_VENDOR_ID as VENDOR_ID,
    VIRTIO_MMIO_VERSION as VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Error as QueueError, Queue, QueueState, QueueT};

/// How soon the guest's owner looks again whether a device has finished a request.
const LOOK_AGAIN: Duration = Duration::from_micros(50);
/// Most requests of a queue that are served before others get their turn.
const AT_ONCE_MAX: u32 = 64;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Registers of virtio 1; the older ones are 1.
const REGISTERS_VERSION: u32 = 2;
/// "LIMO".
const VENDOR: u32 = 0x4f4d_494c;
/// What every device offers.
const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device with its registers.
#[derive(Debug)]
pub(super) struct Transport {
    index: u16,
    memory: Arc<GuestView>,
    line: Line,
    /// One for each queue.
    bells: Vec<Doorbell>,
    /// Why the driver was interrupted, until it says that it knows.
    interrupt: AtomicU32,
    /// Nothing is served. Who wants the device to rest sets this, and has the lock once after.
    rests: AtomicBool,
    /// What only one machine may have is ours.
    is_claimed: AtomicBool,
    /// For complaints about the guest.
    allowance: Mutex<Allowance>,
    /// How many vCPUs wait for the lock, which is not given in turn.
    waiting: AtomicU32,
    core: Mutex<Core>,
}

/// What the lock guards.
#[derive(Debug)]
struct Core {
    device: Box<dyn Device>,
    registers: Registers,
    queues: Vec<Queue>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    /// Which half of the features is read, and which written.
    device_features_half: u32,
    driver_features_half: u32,
    driver_features: u64,
    /// Which queue the others are about.
    queue: u32,
    /// Changes with the configuration.
    generation: u32,
}

/// What moves of a device.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    device_id: u32,
    registers: Registers,
    interrupt: u32,
    queues: Vec<SavedQueue>,
    device: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedQueue {
    size: u16,
    is_ready: bool,
    next_available: u16,
    next_used: u16,
    has_event_index: bool,
    descriptors: u64,
    available_ring: u64,
    used_ring: u64,
}

/// What a device's thread does after it has served.
enum Next {
    GoOn { interrupts: bool },
    Wait,
}

impl Core {
    fn is_live(&self) -> bool {
        const WANTED: u32 = DRIVER_OK | FEATURES_OK;
        self.registers.status & (WANTED | FAILED | NEEDS_RESET) == WANTED
    }

    const fn change_generation(&mut self) {
        self.registers.generation = self.registers.generation.wrapping_add(1);
    }

    fn offered(&self) -> u64 {
        FEATURES | self.device.features()
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.registers.queue).ok()?)
    }

    /// The queue that is told about, unless it is too late for that.
    fn queue_to_tell(&mut self) -> Option<&mut Queue> {
        if self.registers.status & DRIVER_OK != 0 {
            return None;
        }
        let index = usize::try_from(self.registers.queue).ok()?;
        self.queues.get_mut(index)
    }

    fn reset(&mut self) {
        self.registers = Registers {
            generation: self.registers.generation,
            ..Registers::default()
        };
        self.queues.iter_mut().for_each(Queue::reset);
        self.device.reset();
    }

    fn has_sound_queues(&self, memory: &GuestView) -> bool {
        let mut ready = self.queues.iter().filter(|queue| queue.ready());
        ready.all(|queue| queue.is_valid(memory))
    }

    /// Does one thing for a queue; begins nothing new unless it `may_begin`.
    fn step(
        &mut self,
        index: usize,
        memory: &GuestView,
        may_begin: bool,
    ) -> Result<Next, QueueError> {
        let queue = &mut self.queues[index];
        if !queue.ready() {
            return Ok(Next::Wait);
        }
        let mut ring = Ring { queue, memory };
        let served = if may_begin {
            self.device.serve(index, &mut ring)
        } else {
            self.device.finish(index, &mut ring)
        };
        match served? {
            Served::Request => Ok(Next::GoOn {
                interrupts: queue.needs_notification(memory)?,
            }),
            Served::Begun => Ok(Next::GoOn { interrupts: false }),
            // Whoever has queued something since has not rung.
            Served::RingEmpty if queue.enable_notification(memory)? => {
                Ok(Next::GoOn { interrupts: false })
            }
            Served::RingEmpty | Served::NoInput => Ok(Next::Wait),
        }
    }
}

impl Keyboard for Transport {
    fn type_in(&self, bytes: &[u8]) -> usize {
        let taken = self.try_type_in(bytes);
        if taken > 0 {
            self.ring(0);
        }
        taken
    }
}

impl Transport {
    /// Puts a device where the guest will look for it. It rests.
    pub(super) fn new(
        index: u16,
        device: Box<dyn Device>,
        vm: &Vm,
        line: Line,
        memory: Arc<GuestView>,
    ) -> Result<Self, DeviceError> {
        let place = Place::of(index);
        let sizes = device.queue_sizes();
        let queue = |&size: &u16| Queue::new(size).expect("sizes are powers of two");
        let bell = |(queue, _)| vm.doorbell(place.address + u64::from(QUEUE_NOTIFY), queue);
        let bells = (0..).zip(sizes).map(bell).collect::<Result<_, _>>()?;
        Ok(Self {
            index,
            memory,
            line,
            bells,
            interrupt: AtomicU32::new(0),
            rests: AtomicBool::new(true),
            is_claimed: AtomicBool::new(false),
            allowance: Mutex::new(Allowance::new()),
            waiting: AtomicU32::new(0),
            core: Mutex::new(Core {
                queues: sizes.iter().map(queue).collect(),
                device,
                registers: Registers::default(),
            }),
        })
    }

    /// Its place among the devices.
    pub(super) const fn index(&self) -> u16 {
        self.index
    }

    pub(super) fn bells(&self) -> &[Doorbell] {
        &self.bells
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same for a vCPU, which goes before further requests.
    fn core_for_driver(&self) -> MutexGuard<'_, Core> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let core = self.core();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        core
    }

    fn core_in_time(&self) -> Result<MutexGuard<'_, Core>, DeviceError> {
        self.core_until(Instant::now() + REST_MAX)
    }

    /// The same for the guest's owner, who cannot wait for a page that may never come.
    fn core_until(&self, end: Instant) -> Result<MutexGuard<'_, Core>, DeviceError> {
        loop {
            match self.core.try_lock() {
                Ok(core) => return Ok(core),
                Err(TryLockError::Poisoned(core)) => return Ok(core.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() > end => {
                    return Err(DeviceError::Stuck { index: self.index });
                }
                Err(TryLockError::WouldBlock) => thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Interrupts the driver and says why.
    fn interrupt(&self, why: u32) {
        self.interrupt.fetch_or(why, Ordering::SeqCst);
        if let Err(error) = self.line.pulse() {
            tracing::warn!(%error, device = self.index, "an interrupt is lost");
        }
    }

    /// What its thread waits for beside its bells, and until when.
    pub(super) fn waits_for(&self) -> (Option<Input>, Option<Instant>) {
        let core = self.core();
        if !self.has_work(&core) {
            return (None, None);
        }
        let takes = core.queues.first().is_some_and(Queue::ready);
        let input = core.device.input().filter(|_| takes);
        (input, core.device.due())
    }

    fn rests(&self) -> bool {
        self.rests.load(Ordering::SeqCst)
    }

    /// Whether requests may be begun. Asked under the lock: whoever wants it to rest has the lock
    /// afterwards.
    fn may_begin(&self, core: &Core) -> bool {
        !self.rests() && core.is_live()
    }

    /// Whether there may be something to do: to begin requests, or to finish those that were begun.
    fn has_work(&self, core: &Core) -> bool {
        self.may_begin(core) || core.device.under_way() > 0
    }

    /// Serves a queue until there is nothing to do, or it is to rest, or others have waited for long enough:
    /// then the rest is called for again.
    pub(super) fn serve(&self, queue: usize) {
        for _ in 0..AT_ONCE_MAX {
            while self.waiting.load(Ordering::SeqCst) > 0 {
                thread::yield_now();
            }
            let mut core = self.core();
            if !self.has_work(&core) {
                return;
            }
            let may_begin = self.may_begin(&core);
            match core.step(queue, &self.memory, may_begin) {
                Ok(Next::Wait) => return,
                Ok(Next::GoOn { interrupts: false }) => {}
                Ok(Next::GoOn { interrupts: true }) => self.interrupt(INT_VRING),
                Err(error) => {
                    self.complain(&format_args!("the guest broke queue {queue}: {error}"));
                    // What was begun before is finished still.
                    self.fail(&mut core);
                }
            }
        }
        self.ring(queue);
    }

    /// Calls the device's thread to a queue.
    pub(super) fn ring(&self, queue: usize) {
        if let Some(Err(error)) = self.bells.get(queue).map(Doorbell::ring) {
            tracing::warn!(%error, device = self.index, queue, "a device does not wake up");
        }
    }

    /// See [`Keyboard::type_in`]. Nobody who types waits for a request.
    fn try_type_in(&self, bytes: &[u8]) -> usize {
        let Ok(mut core) = self.core.try_lock() else {
            return 0;
        };
        // Asked under the lock: what is typed while the guest rests would not be saved.
        if !self.may_begin(&core) {
            return 0;
        }
        core.device.type_in(bytes)
    }

    /// Lets the device do what is due.
    pub(super) fn tick(&self) {
        let mut core = self.core();
        let is_due = core.device.due().is_some_and(|due| due <= Instant::now());
        if is_due && self.has_work(&core) {
            core.device.tick();
        }
    }

    /// Says what the guest does wrong, which it may do as often as it likes.
    fn complain(&self, about: &dyn fmt::Display) {
        let mut allowance = self
            .allowance
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if allowance.spend(0).is_some() {
            tracing::warn!(device = self.index, %about, "a driver breaks the rules");
        }
    }

    fn fail(&self, core: &mut Core) {
        core.registers.status |= NEEDS_RESET;
        self.interrupt(INT_CONFIG);
    }

    /// See [`super::Devices::claim`].
    pub(super) fn claim(&self) -> Result<(), DeviceError> {
        if self.is_claimed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.core_in_time()?.device.claim()?;
        self.is_claimed.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// See [`super::Devices::release`].
    pub(super) fn release(&self) -> Result<(), DeviceError> {
        let mut core = self.core_in_time()?;
        if core.device.under_way() > 0 {
            return Err(DeviceError::Stuck { index: self.index });
        }
        core.device.release()?;
        self.is_claimed.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Nothing more is begun.
    pub(super) fn begin_rest(&self) {
        self.rests.store(true, Ordering::SeqCst);
    }

    /// What was begun is finished, or it takes longer than until then. The device's thread does that: a
    /// page of the guest that is needed for it may never come.
    pub(super) fn finish_rest(&self, end: Instant) -> Result<(), DeviceError> {
        loop {
            let mut core = self.core_until(end)?;
            if core.device.under_way() == 0 {
                return core.device.rest();
            }
            drop(core);
            if Instant::now() > end {
                return Err(DeviceError::Stuck { index: self.index });
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// The guest is about to run here and ran elsewhere before.
    pub(super) fn arrive(&self) -> Result<(), DeviceError> {
        let mut core = self.core_in_time()?;
        if core.is_live() && core.device.arrive() {
            core.change_generation();
            self.interrupt.fetch_or(INT_CONFIG, Ordering::SeqCst);
        }
        Ok(())
    }

    /// See [`super::Devices::take_strays`].
    pub(super) fn take_strays(&self, bytes_max: usize) -> Result<Vec<Vec<u8>>, DeviceError> {
        if !self.rests() {
            return Ok(Vec::new());
        }
        Ok(self.core_in_time()?.device.take_strays(bytes_max))
    }

    /// See [`super::Devices::give_strays`].
    pub(super) fn give_strays(&self, strays: Vec<Vec<u8>>) -> Result<(), DeviceError> {
        let mut core = self.core_in_time()?;
        if core.is_live() {
            core.device.give_strays(strays);
            drop(core);
            self.ring(0);
        }
        Ok(())
    }

    /// Has the driver look at the configuration, which has changed.
    pub(super) fn tell_of_change(&self) -> Result<(), DeviceError> {
        let mut core = self.core_in_time()?;
        if core.is_live() {
            core.change_generation();
            self.interrupt(INT_CONFIG);
        }
        Ok(())
    }

    /// Requests are served again.
    pub(super) fn resume(&self) {
        self.rests.store(false, Ordering::SeqCst);
        // A vCPU may have been saved between the interrupt and its arrival there; one too many does no
        // harm, since the driver looks why.
        if self.interrupt.load(Ordering::SeqCst) != 0 {
            self.interrupt(0);
        }
        // The guest has rung for what it queued while nobody listened.
        for queue in 0..self.bells.len() {
            self.ring(queue);
        }
    }

    /// The driver reads.
    pub(super) fn read(&self, offset: u32, bytes: &mut [u8]) {
        bytes.fill(0);
        if let Some(within) = offset.checked_sub(CONFIG) {
            let configuration = self.core_for_driver().device.configuration();
            let from = configuration.get(within as usize..).unwrap_or_default();
            for (place, byte) in bytes.iter_mut().zip(from) {
                *place = *byte;
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(bytes) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        if register == INTERRUPT_STATUS {
            return self.interrupt.load(Ordering::SeqCst);
        }
        let core = self.core_for_driver();
        let queue = |value: fn(&Queue) -> u32| core.queue().map_or(0, value);
        match register {
            MAGIC_VALUE => MAGIC,
            VERSION => REGISTERS_VERSION,
            DEVICE_ID => core.device.id(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(core.offered(), core.registers.device_features_half),
            QUEUE_NUM_MAX => queue(|queue| queue.max_size().into()),
            QUEUE_READY => queue(|queue| queue.ready().into()),
            STATUS => core.registers.status,
            CONFIG_GENERATION => core.registers.generation,
            // There is no shared memory.
            SHM_LEN_LOW | SHM_LEN_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// The driver writes.
    pub(super) fn write(&self, offset: u32, bytes: &[u8]) {
        let Ok(word) = <[u8; 4]>::try_from(bytes) else {
            return;
        };
        let value = u32::from_le_bytes(word);
        match offset {
            INTERRUPT_ACK => {
                self.interrupt.fetch_and(!value, Ordering::SeqCst);
            }
            QUEUE_NOTIFY => self.ring(usize::try_from(value).unwrap_or(usize::MAX)),
            STATUS => self.write_status(value),
            CONFIG.. => self
                .core_for_driver()
                .device
                .configure(offset - CONFIG, value),
            _ => self.write_register(offset, value),
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        let mut core = self.core_for_driver();
        match register {
            DEVICE_FEATURES_SEL => core.registers.device_features_half = value,
            DRIVER_FEATURES_SEL => core.registers.driver_features_half = value,
            DRIVER_FEATURES if core.registers.status & FEATURES_OK == 0 => {
                let shift = match core.registers.driver_features_half {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let features = &mut core.registers.driver_features;
                *features = *features & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
            }
            QUEUE_SEL => core.registers.queue = value,
            _ => {
                let Some(queue) = core.queue_to_tell() else {
                    return;
                };
                match register {
                    QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
                    QUEUE_READY => queue.set_ready(value == 1),
                    QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
                    QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
                    QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
                    QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
                    QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
                    QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
                    _ => {}
                }
            }
        }
    }

    fn write_status(&self, status: u32) {
        let mut core = self.core_for_driver();
        if status == 0 {
            core.reset();
            self.interrupt.store(0, Ordering::SeqCst);
            return;
        }
        let new = status & !core.registers.status;
        core.registers.status |= status;
        let features = core.registers.driver_features;
        if new & FEATURES_OK != 0 {
            let is_sound =
                features & !core.offered() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0;
            if !is_sound {
                core.registers.status &= !FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 {
            for queue in &mut core.queues {
                queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            }
            if core.registers.status & FEATURES_OK == 0 {
                self.complain(&"the guest has not agreed on features");
                self.fail(&mut core);
            } else if core.has_sound_queues(&self.memory) {
                core.device.begin(features);
            } else {
                self.complain(&"the guest's queues are not in its memory");
                self.fail(&mut core);
            }
            drop(core);
            // Its thread has more to wait for now.
            self.ring(0);
        }
    }

    /// What moves.
    pub(super) fn save(&self) -> Vec<u8> {
        let core = self.core();
        let saved = Saved {
            device_id: core.device.id(),
            registers: core.registers,
            interrupt: self.interrupt.load(Ordering::SeqCst),
            queues: core.queues.iter().map(SavedQueue::of).collect(),
            device: core.device.save(),
        };
        postcard::to_extend(&saved, Vec::new()).expect("a state can always be written")
    }

    /// Takes what was saved.
    pub(super) fn load(&self, section: Section<'_>) -> Result<(), StateError> {
        let cannot = |why: &str| section.content(why);
        let (saved, rest): (Saved, _) =
            postcard::take_from_bytes(section.bytes).map_err(|_| cannot("it is no device's"))?;
        let mut core = self.core();
        if !rest.is_empty() || saved.device_id != core.device.id() {
            return Err(cannot("it is of another kind of device"));
        }
        let has_agreed = saved.registers.status & FEATURES_OK != 0;
        if has_agreed && saved.registers.driver_features & !core.offered() != 0 {
            return Err(cannot("its driver uses what this version does not offer"));
        }
        if saved.queues.len() != core.queues.len() {
            return Err(cannot("it has another number of queues"));
        }
        let both = saved.queues.iter().zip(&core.queues);
        let queues: Result<Vec<Queue>, _> = both
            .map(|(saved, queue)| Queue::try_from(saved.state(queue.max_size())))
            .collect();
        core.queues = queues.map_err(|error| cannot(&error.to_string()))?;
        core.registers = saved.registers;
        if core.is_live() && !core.has_sound_queues(&self.memory) {
            return Err(cannot("its queues are not in the guest's memory"));
        }
        core.device
            .load(&saved.device)
            .map_err(|why| cannot(&why))?;
        if core.is_live() {
            core.device.begin(saved.registers.driver_features);
        }
        self.interrupt.store(saved.interrupt, Ordering::SeqCst);
        Ok(())
    }
}

impl SavedQueue {
    fn of(queue: &Queue) -> Self {
        let QueueState {
            max_size: _,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = queue.state();
        Self {
            size,
            is_ready: ready,
            next_available: next_avail,
            next_used,
            has_event_index: event_idx_enabled,
            descriptors: desc_table,
            available_ring: avail_ring,
            used_ring,
        }
    }

    const fn state(&self, max_size: u16) -> QueueState {
        QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: self.has_event_index,
            size: self.size,
            ready: self.is_ready,
            desc_table: self.descriptors,
            avail_ring: self.available_ring,
            used_ring: self.used_ring,
        }
    }
}

fn half(features: u64, which: u32) -> u32 {
    match which {
        0 => u32::try_from(features & u64::from(u32::MAX)).expect("masked"),
        1 => u32::try_from(features >> 32).expect("shifted"),
        _ => 0,
    }
}
