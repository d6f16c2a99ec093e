//! A network interface: packets to and from buffers that the device has in turn with us.
//!
//! Nothing is left to the device but to carry packets: checksums are computed and checked in the guest, so
//! that a packet is proved from one end to the other, and no packet is larger than a frame.

use core::ops::Range;

use limosa_micro_abi::BootInfo;

use crate::virtio::{QUEUE_BYTES, QUEUE_SIZE, Queue, Registers};

/// Longest frame, without its checksum.
pub const FRAME_BYTES_MAX: usize = 1514;
/// Bytes of the heap that an interface takes.
pub const NETWORK_BYTES: u64 = 2 * (QUEUE_BYTES + QUEUE_SIZE as u64 * BUFFER_BYTES);

const BUFFER_BYTES: u64 = 2048;
/// Before each frame: what is left to be done with it, which is nothing.
const HEADER_BYTES: usize = 12;
const NETWORK: u32 = 1;
/// It tells its address.
const FEATURE_MAC: u64 = 1 << 5;
/// Physical memory has a hole from here on.
const LOW_MEMORY_END: u64 = 3 << 30;

/// The receiving half of an interface.
pub struct Receiver {
    queue: Queue,
    buffers: u64,
}

/// The sending half.
pub struct Sender {
    queue: Queue,
    buffers: u64,
    /// Buffers that are ours: so many of these.
    free: [u16; QUEUE_SIZE as usize],
    free_count: usize,
}

/// A frame that has come.
#[derive(Debug)]
pub struct Frame {
    buffer: u16,
    bytes: usize,
}

/// An interface.
pub struct Network {
    /// Its address.
    pub mac: [u8; 6],
    /// Frames from the network.
    pub receiver: Receiver,
    /// Frames to it.
    pub sender: Sender,
}

impl Network {
    /// Starts the first interface that the guest has; `None` if it has none that can be used.
    ///
    /// # Safety
    /// The range is of [`NETWORK_BYTES`], lies in the heap, starts at a page boundary, and nothing else
    /// refers to any of it.
    #[must_use]
    pub unsafe fn start(boot: &BootInfo, range: &Range<u64>) -> Option<Self> {
        let registers = Registers::find(boot, NETWORK)?;
        if range.end > LOW_MEMORY_END || !registers.reset(FEATURE_MAC) {
            return None;
        }
        let queue = |number: u32| {
            let start = range.start + u64::from(number) * QUEUE_BYTES;
            // SAFETY: a part of the range that the caller vouches for, and of no other queue.
            unsafe { Queue::new(registers, number, &(start..start + QUEUE_BYTES)) }
        };
        let half = u64::from(QUEUE_SIZE) * BUFFER_BYTES;
        let buffers = range.start + 2 * QUEUE_BYTES;
        let receiver = Receiver::new(queue(0), buffers);
        let sender = Sender::new(queue(1), buffers + half);
        if !registers.connect(&receiver.queue) || !registers.connect(&sender.queue) {
            return None;
        }
        registers.go();
        let mut network = Self {
            mac: registers.configuration(),
            receiver,
            sender,
        };
        network.tell();
        Some(network)
    }

    /// Shows the device all that was done.
    pub fn tell(&mut self) {
        self.receiver.queue.tell();
        self.sender.queue.tell();
    }

    /// Has a frame end the next wait, and a buffer that comes back if we have none to send; true if there is
    /// one already.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        self.sender.collect();
        let has_none = self.sender.free_count == 0;
        (has_none && self.sender.queue.arm()) | self.receiver.queue.arm()
    }
}

impl Receiver {
    fn new(mut queue: Queue, buffers: u64) -> Self {
        for buffer in 0..QUEUE_SIZE {
            let address = buffers + u64::from(buffer) * BUFFER_BYTES;
            // SAFETY: the buffer lies in the interface's part of the heap, and is looked at only between its
            // return and its being queued again.
            unsafe { queue.set_buffer(buffer, address, BUFFER_BYTES as u32, true) };
            queue.queue(buffer);
        }
        Self { queue, buffers }
    }

    /// The next frame that has come. It has to be given back.
    pub fn receive(&mut self) -> Option<Frame> {
        let returned = self.queue.take()?;
        Some(Frame {
            buffer: returned.buffer,
            bytes: returned.bytes.clamp(HEADER_BYTES, BUFFER_BYTES as usize),
        })
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self, frame: &Frame) -> &[u8] {
        let start = self.buffers + u64::from(frame.buffer) * BUFFER_BYTES;
        let place = (start + HEADER_BYTES as u64) as *const u8;
        // SAFETY: a frame is a buffer that has come back and was not queued since, so the device does not
        // write it; the length was limited to that of a buffer.
        unsafe { core::slice::from_raw_parts(place, frame.bytes - HEADER_BYTES) }
    }

    /// Lets its buffer take another frame.
    pub fn give_back(&mut self, frame: Frame) {
        self.queue.queue(frame.buffer);
    }
}

impl Sender {
    fn new(mut queue: Queue, buffers: u64) -> Self {
        for buffer in 0..QUEUE_SIZE {
            let address = buffers + u64::from(buffer) * BUFFER_BYTES;
            // SAFETY: the buffer lies in the interface's part of the heap, and is written only while it is
            // among the free ones.
            unsafe { queue.set_buffer(buffer, address, 0, false) };
        }
        Self {
            queue,
            buffers,
            free: core::array::from_fn(|buffer| buffer as u16),
            free_count: usize::from(QUEUE_SIZE),
        }
    }

    fn collect(&mut self) {
        while let Some(returned) = self.queue.take() {
            self.free[self.free_count] = returned.buffer;
            self.free_count += 1;
        }
    }

    /// Whether a frame can be sent now.
    pub fn is_ready(&mut self) -> bool {
        if self.free_count == 0 {
            self.collect();
        }
        self.free_count > 0
    }

    /// Sends a frame of so many bytes that `fill` writes.
    ///
    /// # Panics
    /// If it is not ready, or the frame is too long.
    pub fn send<R>(&mut self, bytes: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(self.is_ready(), "who sends has asked");
        assert!(bytes <= FRAME_BYTES_MAX, "frames are limited");
        self.free_count -= 1;
        let buffer = self.free[self.free_count];
        let start = self.buffers + u64::from(buffer) * BUFFER_BYTES;
        let place = (start + HEADER_BYTES as u64) as *mut u8;
        // SAFETY: the buffer is a free one, so neither the device nor anybody else has it; it is longer than
        // any frame with its header, which stays zero.
        let result = fill(unsafe { core::slice::from_raw_parts_mut(place, bytes) });
        self.queue.set_len(buffer, (HEADER_BYTES + bytes) as u32);
        self.queue.queue(buffer);
        result
    }
}

const _: () = assert!(HEADER_BYTES + FRAME_BYTES_MAX <= BUFFER_BYTES as usize);
