//! What is behind a device's registers: the one trait that disks, networks and all others implement.

use super::DeviceError;
use limosa_os::memory::GuestView;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};

/// Most queues of a device.
pub(super) const QUEUES_MAX: usize = 5;

/// A descriptor for which a device's thread waits, beside its doorbells.
pub(super) type Input = Arc<dyn AsFd + Send + Sync>;

/// What a device does. All calls are under its lock.
pub(super) trait Device: fmt::Debug + Send {
    /// Its number (virtio 1.2, section 5).
    fn id(&self) -> u32;

    /// What it offers, beside what every device does.
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];

    /// Its configuration, as the driver reads it.
    fn configuration(&self) -> Vec<u8>;

    /// The driver writes a word of the configuration.
    fn configure(&mut self, _offset: u32, _value: u32) {}

    /// The driver is there and has taken these features; the same after a load.
    fn begin(&mut self, _features: u64) {}

    /// The driver is gone, and with it what was begun for it.
    fn reset(&mut self) {}

    /// Does one thing for a queue.
    ///
    /// # Errors
    /// The guest has broken its queue.
    fn serve(&mut self, queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError>;

    /// How many requests it has begun and not put into a used ring yet. Nothing of these is saved, so a
    /// device rests only when there are none.
    fn under_way(&self) -> usize {
        0
    }

    /// Does one thing for what was begun of a queue, and begins nothing.
    ///
    /// # Errors
    /// As [`Device::serve`].
    fn finish(&mut self, _queue: usize, _ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        Ok(Served::NoInput)
    }

    /// Somebody types; how many bytes it takes. What it took it hands over by its first queue.
    fn type_in(&mut self, _bytes: &[u8]) -> usize {
        0
    }

    /// What else brings it work, for its first queue; `None` while it could not take any.
    fn input(&self) -> Option<Input> {
        None
    }

    /// When it next has to be called by itself.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// That time has come.
    fn tick(&mut self) {}

    /// Takes what only one machine may have.
    fn claim(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Others may have what was claimed.
    fn release(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The guest rests: what it wrote has to be where it will be looked for.
    fn rest(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The guest is about to run here and ran elsewhere before; true if the configuration changes by
    /// that.
    fn arrive(&mut self) -> bool {
        false
    }

    /// What has come from outside for a guest that runs elsewhere now, in pieces of at most `bytes_max`
    /// bytes together.
    fn take_strays(&mut self, _bytes_max: usize) -> Vec<Vec<u8>> {
        Vec::new()
    }

    /// What has come for the guest where it was before. It gets that first.
    fn give_strays(&mut self, _strays: Vec<Vec<u8>>) {}

    /// What of it moves, beside registers and queues. Has to name every field of the device, so that a
    /// new one is not forgotten.
    fn save(&self) -> Vec<u8>;

    /// Takes what was saved.
    ///
    /// # Errors
    /// It cannot be, in words.
    fn load(&mut self, bytes: &[u8]) -> Result<(), String>;
}

/// What came of a call to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Something was put into the used ring.
    Request,
    /// Something was begun.
    Begun,
    /// The guest has queued nothing that could be done.
    RingEmpty,
    /// The device has nothing for what the guest has queued, or waits to be told of more.
    NoInput,
}

/// A queue with the memory that it lies in.
#[derive(Debug)]
pub(super) struct Ring<'a> {
    pub(super) queue: &'a mut Queue,
    pub(super) memory: &'a GuestView,
}

impl<'a> Ring<'a> {
    /// The next chain of descriptors that the guest has queued.
    pub(super) fn next(&mut self) -> Result<Option<DescriptorChain<&'a GuestView>>, QueueError> {
        let available = self.queue.avail_idx(self.memory, Ordering::Acquire)?;
        if available.0 == self.queue.next_avail() {
            return Ok(None);
        }
        // There is one: a queue that does not give it is broken.
        let chain = self.queue.iter(self.memory)?.next();
        chain.map(Some).ok_or(QueueError::InvalidAvailRingIndex)
    }

    /// Leaves the last `count` chains queued.
    pub(super) fn put_back(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Gives a chain back, into which so many bytes were written.
    pub(super) fn finish(&mut self, head: u16, bytes: usize) -> Result<(), QueueError> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.queue.add_used(self.memory, head, bytes)
    }
}
