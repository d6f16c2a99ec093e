//! Drivers that break the rules: registers written in any order, queues anywhere, chains that loop, leave the
//! memory or have lengths beyond it. A device may stand still until it is reset; it does not panic, takes no
//! memory for what it is told, and works again for the next driver.

use super::*;

/// Drivers that are tried, each a few requests long.
const DRIVERS: u64 = 2000;

/// A generator of its own, so that a failure can be repeated: the seed is in every message.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        // Steele, Lea, Flood: SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap()]
    }

    /// Mostly where memory is, often at its end or beyond.
    fn address(&mut self) -> u64 {
        let end = MEMORY.get();
        let near = self.below(64);
        match self.below(8) {
            0 => end - near,
            1 => end + near,
            2 => u64::MAX - near,
            3 => self.roll(),
            4 => 0xd000_0000 + near,
            _ => DATA + self.below(1 << 20),
        }
    }

    fn length(&mut self) -> u32 {
        let some = u32::try_from(self.below(9000)).unwrap();
        self.of(&[
            0,
            1,
            12,
            16,
            17,
            511,
            512,
            4096,
            some,
            1 << 20,
            1 << 31,
            u32::MAX,
        ])
    }
}

/// Writes descriptors and a ring of what is available.
fn write_queue(bed: &Bed, dice: &mut Dice) {
    let write = |bytes: &[u8], address: u64| {
        bed.view.write_slice(bytes, GuestAddress(address)).unwrap();
    };
    // What a disk is asked, and what others find as good as any.
    let kind = dice.of(&[IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77]);
    let sector = dice.of(&[0, 1, 2047, 2048, u64::MAX]);
    write(&kind.to_le_bytes(), HEADER);
    write(&sector.to_le_bytes(), HEADER + 8);
    let is_written = u16::from(kind != OUT && kind != DISCARD) << 1;
    let honest = [(HEADER, 16, 1), (DATA, 512, 1 | is_written), (STATUS, 1, 2)];
    for index in 0..SIZE {
        let mut parts = honest.get(usize::from(index)).copied().unwrap_or((
            dice.address(),
            dice.length(),
            dice.of(&[0, 1, 1, 2, 3, 3, 4, 5, 6, u16::MAX]),
        ));
        let mut next = index + 1;
        match dice.below(12) {
            0 => parts.0 = dice.address(),
            1 => parts.1 = dice.length(),
            2 => parts.2 = dice.of(&[0, 1, 2, 3, 4, 5, 6, u16::MAX]),
            3 => next = dice.of(&[0, 1, SIZE, u16::MAX]),
            _ => {}
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&parts.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&u32::to_le_bytes(parts.1));
        bytes[12..14].copy_from_slice(&u16::to_le_bytes(parts.2));
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        write(&bytes, DESCRIPTORS + 16 * u64::from(index));
    }
    for entry in 0..u64::from(SIZE) {
        let head = dice.of(&[0_u16, 0, 0, 0, 1, 2, SIZE - 1, SIZE, u16::MAX]);
        write(&head.to_le_bytes(), AVAILABLE + 4 + 2 * entry);
    }
    let count = dice.of(&[0_u16, 1, 1, 2, SIZE, SIZE + 1, 0x8000, u16::MAX]);
    write(&count.to_le_bytes(), AVAILABLE + 2);
}

/// Tells a device where its queues are, or somewhere else.
fn tell_queues(bed: &Bed, device: u16, dice: &mut Dice) {
    for queue in 0..dice.below(4) {
        let number = u32::try_from(queue).unwrap();
        bed.write(device, VIRTIO_MMIO_QUEUE_SEL, number);
        let size = dice.of(&[u32::from(SIZE), u32::from(SIZE), 0, 1, 3, 0x8000, u32::MAX]);
        bed.write(device, VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, place) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
            (VIRTIO_MMIO_QUEUE_USED_LOW, USED),
        ] {
            let place = if dice.below(16) == 0 {
                dice.address()
            } else {
                place
            };
            let [low, high] = [place, place >> 32].map(|half| half as u32);
            bed.write(device, register, low);
            bed.write(device, register + 4, high);
        }
        bed.write(device, VIRTIO_MMIO_QUEUE_READY, dice.of(&[1, 1, 1, 0, 2]));
    }
}

/// One driver's life with one device.
fn misbehave(bed: &Bed, device: u16, dice: &mut Dice) {
    if dice.below(4) > 0 {
        bed.write(device, VIRTIO_MMIO_STATUS, 0);
    }
    bed.write(device, VIRTIO_MMIO_STATUS, 3);
    for half in 0..3 {
        bed.write(device, VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
        let offered = bed.read(device, VIRTIO_MMIO_DEVICE_FEATURES);
        bed.write(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
        let mask = dice.of(&[u32::MAX, u32::MAX, dice.0 as u32]);
        bed.write(device, VIRTIO_MMIO_DRIVER_FEATURES, offered & mask);
    }
    bed.write(device, VIRTIO_MMIO_STATUS, 11);
    write_queue(bed, dice);
    tell_queues(bed, device, dice);
    bed.write(device, VIRTIO_MMIO_STATUS, dice.of(&[15, 15, 15, 7, 0xff]));
    for _ in 0..dice.below(6) {
        bed.write(
            device,
            VIRTIO_MMIO_QUEUE_NOTIFY,
            dice.of(&[0, 0, 1, 2, 3, u32::MAX]),
        );
        if dice.below(3) == 0 {
            write_queue(bed, dice);
        }
        // Any register, of any width.
        let address = Place::of(device).address + dice.below(0x1000);
        let width = dice.of(&[1_usize, 2, 4, 8]);
        let bytes = dice.roll().to_le_bytes();
        assert!(bed.devices.write(address, &bytes[..width]));
        assert!(bed.devices.read(address, &mut [0; 8][..width]));
    }
}

/// Something comes from the network, of any length; what has left is taken, so that there is room for more.
fn send_frame(wire: &UnixDatagram, dice: &mut Dice) {
    let length = dice.of(&[1_usize, 12, 13, 72, 1526, 60_000]);
    let full = wire.send(&vec![0xa5; length]);
    assert!(full.is_ok() || full.unwrap_err().kind() == io::ErrorKind::WouldBlock);
    while wire.recv(&mut [0; 1]).is_ok() {}
}

#[test]
fn a_driver_that_breaks_the_rules_harms_nobody_but_itself() {
    let disks = Disks::new(1 << 20);
    let Some(bed) = Bed::new(&mut disks.config_of_all(false)) else {
        return;
    };
    bed.run();
    let is_there = |device: &u16| {
        let address = Place::of(*device).address;
        bed.devices.read(address, &mut [0; 4])
    };
    let devices: Vec<u16> = (0..).take_while(is_there).collect();
    assert_eq!(devices.len(), 5, "one of each kind");
    let mut answered = 0;
    for seed in 0..DRIVERS {
        let mut dice = Dice(seed);
        bed.view.write_obj(0_u16, GuestAddress(USED + 2)).unwrap();
        for &device in &devices {
            send_frame(&bed.wires[0], &mut dice);
            misbehave(&bed, device, &mut dice);
        }
        // Devices come to rest whatever they were told, and their state can be saved and taken.
        if let Err(error) = bed.devices.pause() {
            panic!("seed {seed}: {error}");
        }
        let sections = bed.sections();
        let sections = state::parse(&sections).unwrap();
        if let Err(error) = bed.devices.load(&sections) {
            panic!("seed {seed}: {error}");
        }
        answered += u64::from(bed.used() != 0);
        bed.run();
    }
    // Most are no requests at all, but many are; on a busy machine few of them are served before the pause.
    assert!(answered > DRIVERS / 100, "{answered} drivers were answered");
    // The next driver finds a disk that works.
    bed.write(0, VIRTIO_MMIO_STATUS, 0);
    bed.view
        .write_slice(&[0; 64], GuestAddress(AVAILABLE))
        .unwrap();
    bed.view.write_slice(&[0; 64], GuestAddress(USED)).unwrap();
    bed.start(0);
    bed.fill(DATA, 9, 512);
    assert_eq!(bed.block(OUT, 5, &[(DATA, 512, false)]), 0);
    assert_eq!(fs::read(&disks.path).unwrap()[5 * 512], 9);
    assert_eq!(fs::metadata(&disks.path).unwrap().len(), 1 << 20);
}
