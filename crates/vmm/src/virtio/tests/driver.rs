//! The driver of a device with several queues, a chain at a time in each.

use super::*;

/// Rings and buffer of each queue.
const PLACES: u64 = 0x30_0000;
const PLACE_BYTES: u64 = 0x8000;

pub(super) struct Driver<'a> {
    pub(super) bed: &'a Bed,
    device: u16,
    /// How many chains were queued.
    next: Vec<u16>,
}

impl<'a> Driver<'a> {
    pub(super) fn start(bed: &'a Bed, device: u16, queues: u16, features: u32) -> Self {
        bed.write(device, VIRTIO_MMIO_STATUS, 0);
        bed.write(device, VIRTIO_MMIO_STATUS, 3);
        for (half, features) in [(0, FEATURES[0] | features), (1, FEATURES[1])] {
            bed.write(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            bed.write(device, VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        bed.write(device, VIRTIO_MMIO_STATUS, 11);
        assert_eq!(bed.read(device, VIRTIO_MMIO_STATUS), 11);
        for queue in 0..queues {
            bed.write(device, VIRTIO_MMIO_QUEUE_SEL, queue.into());
            bed.write(device, VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
            for (register, offset) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, 0),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x1000),
                (VIRTIO_MMIO_QUEUE_USED_LOW, 0x2000),
            ] {
                let address = Self::place(queue) + offset;
                bed.write(device, register, u32::try_from(address).unwrap());
            }
            let empty = GuestAddress(Self::place(queue) + 0x1000);
            bed.view.write_slice(&[0; 0x2000], empty).unwrap();
            bed.write(device, VIRTIO_MMIO_QUEUE_READY, 1);
        }
        bed.write(device, VIRTIO_MMIO_STATUS, 15);
        Self::of_started(bed, device, vec![0; queues.into()])
    }

    /// The same driver with its guest on another bed, where so many chains were queued.
    pub(super) const fn of_started(bed: &'a Bed, device: u16, next: Vec<u16>) -> Self {
        Self { bed, device, next }
    }

    fn place(queue: u16) -> u64 {
        PLACES + u64::from(queue) * PLACE_BYTES
    }

    /// Where a queue's buffer is.
    pub(super) fn buffer(queue: u16) -> u64 {
        Self::place(queue) + 0x4000
    }

    pub(super) fn used(&self, queue: u16) -> u16 {
        let place = GuestAddress(Self::place(queue) + 0x2002);
        self.bed.view.read_obj(place).unwrap()
    }

    /// Bytes that the device says it has written to the last chain of a queue.
    pub(super) fn last_bytes(&self, queue: u16) -> usize {
        let last = u64::from(self.used(queue).wrapping_sub(1) % SIZE);
        let place = GuestAddress(Self::place(queue) + 0x2004 + 8 * last + 4);
        let bytes: u32 = self.bed.view.read_obj(place).unwrap();
        bytes as usize
    }

    /// Queues one piece for each of these, and rings.
    pub(super) fn queue(&mut self, queue: u16, pieces: &[(u64, u32)], is_written: bool) {
        let write = |offset: u64, bytes: &[u8]| {
            let place = GuestAddress(Self::place(queue) + offset);
            self.bed.view.write_slice(bytes, place).unwrap();
        };
        for (index, (address, len)) in (0_u16..).zip(pieces) {
            let has_next = usize::from(index) + 1 < pieces.len();
            let flags = u16::from(has_next) | u16::from(is_written) << 1;
            let descriptor = 16 * u64::from(index);
            write(descriptor, &address.to_le_bytes());
            write(descriptor + 8, &len.to_le_bytes());
            write(descriptor + 12, &flags.to_le_bytes());
            write(descriptor + 14, &(index + 1).to_le_bytes());
        }
        let next = &mut self.next[usize::from(queue)];
        write(0x1004 + 2 * u64::from(*next % SIZE), &[0, 0]);
        *next += 1;
        write(0x1002, &next.to_le_bytes());
        self.bed
            .write(self.device, VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
    }

    /// Until the device has answered all of a queue.
    pub(super) fn wait(&self, queue: u16) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.used(queue) != self.next[usize::from(queue)] {
            assert!(Instant::now() < end, "the device does not answer");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn wait_for_failure(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.bed.read(self.device, VIRTIO_MMIO_STATUS) & 0x40 == 0 {
            assert!(Instant::now() < end, "the broken queue is not noticed");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
