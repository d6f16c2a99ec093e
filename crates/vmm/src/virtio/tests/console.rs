//! A console and its driver.

use super::driver::Driver;
use super::*;

/// The console of a bed with one disk.
const CONSOLE: u16 = 2;
const RECEIVE: u16 = 0;
const PRINT: u16 = 1;

/// Buffers of the guest, of some bytes each.
const BUFFER_BYTES: u32 = 8;

fn bed(config: &mut VmConfig) -> Option<Bed> {
    let bed = Bed::new(config)?;
    assert_eq!(bed.read(CONSOLE, VIRTIO_MMIO_DEVICE_ID), 3);
    Some(bed)
}

fn terminal(bed: &Bed) -> &Terminal {
    bed.devices.terminal().expect("it has a console")
}

/// Who types does not wait for a device that is busy, but tries again.
fn type_in(bed: &Bed, bytes: &[u8]) -> usize {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match terminal(bed).type_in(bytes) {
            0 if Instant::now() < until => thread::sleep(Duration::from_millis(1)),
            taken => return taken,
        }
    }
}

impl Driver<'_> {
    fn print(&mut self, text: &str) {
        let (first, rest) = text.as_bytes().split_at(text.len() / 2);
        let buffer = Self::buffer(PRINT);
        let rest_at = buffer + 0x100;
        for (bytes, place) in [(first, buffer), (rest, rest_at)] {
            self.bed
                .view
                .write_slice(bytes, GuestAddress(place))
                .unwrap();
        }
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        self.queue(PRINT, &[(buffer, len(first)), (rest_at, len(rest))], false);
        self.wait(PRINT);
    }

    /// Has a buffer for what is typed; what it is when the device has given it back.
    fn take_typed(&mut self) -> String {
        self.queue(RECEIVE, &[(Self::buffer(RECEIVE), BUFFER_BYTES)], true);
        self.typed()
    }

    fn typed(&self) -> String {
        self.wait(RECEIVE);
        let mut bytes = vec![0; self.last_bytes(RECEIVE)];
        let place = GuestAddress(Self::buffer(RECEIVE));
        self.bed.view.read_slice(&mut bytes, place).unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

#[test]
fn what_the_guest_prints_is_seen_and_what_is_typed_is_read() {
    let disks = Disks::new(1 << 20);
    let Some(bed) = bed(&mut disks.config(false)) else {
        return;
    };
    assert_eq!(terminal(&bed).type_in(b"lost"), 0, "the guest does not run");
    bed.run();
    assert_eq!(terminal(&bed).type_in(b"lost"), 0, "there is no driver");
    let mut driver = Driver::start(&bed, CONSOLE, 2, 0);
    driver.print("debian login: ");
    terminal(&bed).watch();
    assert_eq!(terminal(&bed).unseen(), b"debian login: ");
    // A buffer that waits, and bytes that wait.
    driver.queue(RECEIVE, &[(Driver::buffer(RECEIVE), BUFFER_BYTES)], true);
    thread::sleep(Duration::from_millis(5));
    assert_eq!(driver.used(RECEIVE), 0);
    assert_eq!(type_in(&bed, b"ls\r"), 3);
    assert_eq!(driver.typed(), "ls\r");
    assert_eq!(type_in(&bed, b"0123456789"), 10);
    assert_eq!(driver.take_typed(), "01234567");
    assert_eq!(driver.take_typed(), "89");
    assert_eq!(type_in(&bed, &[b'x'; 5000]), 4096);
    assert_eq!(terminal(&bed).type_in(b"x"), 0);
    // With the driver goes what was typed for it.
    let mut driver = Driver::start(&bed, CONSOLE, 2, 0);
    assert_eq!(type_in(&bed, b"y"), 1);
    assert_eq!(driver.take_typed(), "y");
    driver.queue(PRINT, &[(0, 1 << 20), (0, 1 << 20)], false);
    driver.wait_for_failure();
}

#[test]
fn what_was_typed_goes_along() {
    let disks = Disks::new(1 << 20);
    let mut config = disks.config(true);
    let Some(source) = bed(&mut config) else {
        return;
    };
    source.run();
    let mut driver = Driver::start(&source, CONSOLE, 2, 0);
    driver.print("half a li");
    assert_eq!(type_in(&source, b"root\r"), 5);
    source.devices.pause().unwrap();
    assert_eq!(terminal(&source).type_in(b"lost"), 0);
    let target = bed(&mut config).unwrap();
    source.copy_memory_to(&target);
    let sections = source.sections();
    target
        .devices
        .load(&state::parse(&sections).unwrap())
        .unwrap();
    assert_eq!(target.sections(), sections);
    target.run();
    let mut driver = Driver::of_started(&target, CONSOLE, vec![0, 1]);
    assert_eq!(driver.take_typed(), "root\r");
    driver.print("ne\n");
}
