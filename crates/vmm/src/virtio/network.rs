//! A network interface (virtio 1.2, section 5.1): what the guest sends goes into a tap device of the
//! host, and what comes from there into the guest's receive buffers.
//!
//! Checksums and the cutting of large packets are left to whoever can do it best: the header before
//! each packet says what is left to do, and passes through unchanged.
//!
//! A guest that has arrived is announced, so that the network sends its packets here: by a reverse ARP
//! request with its address (RFC 903), repeated since it may be lost, and by asking its driver to
//! announce its addresses of IP itself (`VIRTIO_NET_F_GUEST_ANNOUNCE`).
//!
//! Until the network has heard that, packets come to the tap device that the guest has left. They are taken
//! from there and go after it: a packet that is lost would be missed by its sender for 200 ms and more.

use super::device::{Device, Input, Ring, Served};
use limosa_os::tap::{HEADER_BYTES, Offloads, Tap};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::{Error as QueueError, QueueT};

const RECEIVE: usize = 0;
const SEND: usize = 1;
/// Largest packet, with its header: 64 KiB of IP behind an Ethernet header with two tags.
const PACKET_BYTES_MAX: usize = HEADER_BYTES + 22 + (64 << 10);
/// Where in the header it says in how many buffers the packet lies.
const BUFFERS_OFFSET: usize = 10;
/// Most packets that wait for the guest beside those that its tap device holds: as many as that does.
const STRAYS_MAX: usize = 1000;
/// Where in a packet its sender's address is.
const SENDER: Range<usize> = HEADER_BYTES + 6..HEADER_BYTES + 12;
/// What the control queue answers.
const OK: u8 = 0;
const FAILED: u8 = 1;
/// How long after the first announcement the others follow: switches forget, and packets get lost.
const ANNOUNCED_AGAIN: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(850),
];

/// A network interface as the guest has it.
#[derive(Debug)]
pub(super) struct Network {
    tap: Arc<Tap>,
    mac: [u8; 6],
    /// What the driver has taken.
    features: u64,
    /// Link up, and whether the guest is to announce itself.
    status: u32,
    /// A packet that has come: so many bytes of the buffer.
    incoming: Box<[u8]>,
    incoming_bytes: usize,
    /// The guest had no room for it.
    is_waiting: bool,
    /// The tap device is gone.
    is_broken: bool,
    outgoing: Box<[u8]>,
    announcement: Option<Announcement>,
    /// Packets that came to where the guest was before.
    strays: VecDeque<Vec<u8>>,
}

#[derive(Clone, Copy, Debug)]
struct Announcement {
    began: Instant,
    /// How many were made after the first one.
    repeated: usize,
}

/// What of it moves.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    status: u32,
}

impl Network {
    /// An interface with that address behind that tap device.
    pub(super) fn new(tap: Tap, mac: [u8; 6]) -> Self {
        let buffer = || vec![0; PACKET_BYTES_MAX].into_boxed_slice();
        Self {
            tap: Arc::new(tap),
            mac,
            features: 0,
            status: VIRTIO_NET_S_LINK_UP,
            incoming: buffer(),
            incoming_bytes: 0,
            is_waiting: false,
            is_broken: false,
            outgoing: buffer(),
            announcement: None,
            strays: VecDeque::new(),
        }
    }

    const fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Takes the next packet for the guest, those first that came to where it was before; false if there is
    /// none.
    fn take_next(&mut self) -> bool {
        if let Some(stray) = self.strays.pop_front() {
            self.incoming[..stray.len()].copy_from_slice(&stray);
            self.incoming_bytes = stray.len();
            return true;
        }
        for _ in 0..STRAYS_MAX {
            match self.tap.read(&mut self.incoming) {
                // What the guest says to all comes to where it was before, and to where it will be and not runs yet.
                // A kernel that hears itself warns of somebody with its address.
                Ok(Some(bytes)) if bytes > HEADER_BYTES => {
                    if self.incoming[..bytes].get(SENDER) != Some(&self.mac[..]) {
                        self.incoming_bytes = bytes;
                        return true;
                    }
                }
                Ok(_) => return false,
                Err(error) => {
                    tracing::warn!(%error, "no packet comes from the host any more");
                    self.is_broken = true;
                    return false;
                }
            }
        }
        false
    }

    /// Puts a packet from the host into the guest's buffers.
    fn receive(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        if self.incoming_bytes == 0 && !self.take_next() {
            return Ok(Served::NoInput);
        }
        // A driver that has given all its buffers gives no more before it gets some back.
        let buffers_max = if self.has(VIRTIO_NET_F_MRG_RXBUF) {
            ring.queue.size()
        } else {
            1
        };
        let mut left = &self.incoming[..self.incoming_bytes];
        let mut first = None;
        let mut filled: Vec<(u16, usize)> = Vec::new();
        while !left.is_empty() && filled.len() < usize::from(buffers_max) {
            let Some(chain) = ring.next()? else {
                // To be told of the next buffer, not of those that are put back.
                if ring.queue.enable_notification(ring.memory)? {
                    continue;
                }
                ring.put_back(u16::try_from(filled.len()).expect("no more than the queue has"));
                self.is_waiting = true;
                return Ok(Served::NoInput);
            };
            let head = chain.head_index();
            first.get_or_insert_with(|| chain.clone());
            let mut place = chain.writer(ring.memory)?;
            let (now, later) = left.split_at(left.len().min(place.available_bytes()));
            place.write_all(now).map_err(|_| QueueError::InvalidChain)?;
            filled.push((head, now.len()));
            left = later;
        }
        self.is_waiting = false;
        self.incoming_bytes = 0;
        if !left.is_empty() {
            // It does not fit into all that the driver gives for a packet. The network loses packets, too.
            ring.put_back(u16::try_from(filled.len()).expect("no more than the queue has"));
            return Ok(Served::Request);
        }
        if let Some(first) = first {
            let count = u16::try_from(filled.len()).expect("no more than the queue has");
            self.incoming[BUFFERS_OFFSET..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
            let mut place = first.writer(ring.memory)?;
            place
                .write_all(&self.incoming[..HEADER_BYTES])
                .map_err(|_| QueueError::InvalidChain)?;
        }
        for (head, bytes) in filled {
            ring.finish(head, bytes)?;
        }
        Ok(Served::Request)
    }

    /// Takes a packet of the guest to the host.
    fn send(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let mut from = chain.reader(ring.memory)?;
        let bytes = from.available_bytes();
        if (HEADER_BYTES..=PACKET_BYTES_MAX).contains(&bytes) {
            let packet = &mut self.outgoing[..bytes];
            from.read_exact(packet)
                .map_err(|_| QueueError::InvalidChain)?;
            if let Err(error) = self.tap.write(packet) {
                tracing::trace!(%error, "the host does not take a packet");
            }
        }
        ring.finish(head, 0)?;
        Ok(Served::Request)
    }

    /// Hears what the driver has to say.
    fn obey(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let mut from = chain.clone().reader(ring.memory)?;
        let mut into = chain.writer(ring.memory)?;
        let mut command = [0; 2];
        let is_heard = from.read_exact(&mut command).is_ok();
        let [class, what] = command.map(u32::from);
        let is_announced =
            is_heard && (class, what) == (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK);
        if is_announced {
            self.status &= !VIRTIO_NET_S_ANNOUNCE;
        }
        let answer = if is_announced { OK } else { FAILED };
        into.write_all(&[answer])
            .map_err(|_| QueueError::InvalidChain)?;
        ring.finish(head, into.bytes_written())?;
        Ok(Served::Request)
    }

    fn announce(&self) {
        let mut packet = vec![0; HEADER_BYTES];
        packet.extend(reverse_arp(self.mac));
        if let Err(error) = self.tap.write(&packet) {
            tracing::warn!(%error, "the guest is not announced to the network");
        }
    }
}

impl Device for Network {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ]
        .iter()
        .fold(0, |features, feature| features | 1 << feature)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 64]
    }

    /// `struct virtio_net_config`: address and status.
    fn configuration(&self) -> Vec<u8> {
        let status = u16::try_from(self.status).expect("two bits");
        [&self.mac[..], &status.to_le_bytes()].concat()
    }

    fn begin(&mut self, features: u64) {
        self.features = features;
        let offloads = Offloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            segments_v4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            segments_v6: self.has(VIRTIO_NET_F_GUEST_TSO6),
        };
        if let Err(error) = self.tap.set_offloads(offloads) {
            tracing::warn!(%error, "the host will send no large packets to the guest");
        }
    }

    fn reset(&mut self) {
        self.features = 0;
        self.status = VIRTIO_NET_S_LINK_UP;
        self.incoming_bytes = 0;
        self.is_waiting = false;
        self.announcement = None;
        self.strays.clear();
    }

    fn serve(&mut self, queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        match queue {
            RECEIVE => self.receive(ring),
            SEND => self.send(ring),
            _ => self.obey(ring),
        }
    }

    fn input(&self) -> Option<Input> {
        let takes = !self.is_waiting && !self.is_broken;
        takes.then(|| Arc::clone(&self.tap) as Input)
    }

    fn due(&self) -> Option<Instant> {
        let announcement = self.announcement?;
        let next = ANNOUNCED_AGAIN.get(announcement.repeated)?;
        Some(announcement.began + *next)
    }

    fn tick(&mut self) {
        self.announce();
        if let Some(announcement) = &mut self.announcement {
            announcement.repeated += 1;
        }
    }

    fn arrive(&mut self) -> bool {
        self.announce();
        self.announcement = Some(Announcement {
            began: Instant::now(),
            repeated: 0,
        });
        let asks_guest = self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) && self.has(VIRTIO_NET_F_CTRL_VQ);
        if asks_guest {
            self.status |= VIRTIO_NET_S_ANNOUNCE;
        }
        asks_guest
    }

    fn take_strays(&mut self, bytes_max: usize) -> Vec<Vec<u8>> {
        let mut strays = Vec::new();
        let mut left = bytes_max;
        // One that there is no room for is lost, and so are those after it.
        while (self.incoming_bytes > 0 || self.take_next()) && self.incoming_bytes <= left {
            let stray = &self.incoming[..self.incoming_bytes];
            left -= stray.len();
            strays.push(stray.to_vec());
            self.incoming_bytes = 0;
        }
        strays
    }

    fn give_strays(&mut self, strays: Vec<Vec<u8>>) {
        let is_packet =
            |stray: &Vec<u8>| (HEADER_BYTES + 1..=PACKET_BYTES_MAX).contains(&stray.len());
        let room = STRAYS_MAX.saturating_sub(self.strays.len());
        self.strays
            .extend(strays.into_iter().filter(is_packet).take(room));
    }

    fn save(&self) -> Vec<u8> {
        let Self {
            // Each host has its own, under the same name.
            tap: _,
            // Parts of the description, and of the registers.
            mac: _,
            features: _,
            status,
            // A packet that the guest had no room for is lost, as networks lose packets.
            incoming: _,
            incoming_bytes: _,
            is_waiting: _,
            is_broken: _,
            outgoing: _,
            // Those of an earlier arrival are over.
            announcement: _,
            // They go after the guest once more.
            strays: _,
        } = self;
        let saved = Saved { status: *status };
        postcard::to_extend(&saved, Vec::new()).expect("a state can always be written")
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        let known = VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE;
        match postcard::take_from_bytes::<Saved>(bytes) {
            Ok((saved, [])) if saved.status & !known == 0 => {
                self.status = saved.status;
                Ok(())
            }
            _ => Err("it is no network's".to_owned()),
        }
    }
}

/// A frame to everybody that asks for nothing anybody answers, but comes from that address.
fn reverse_arp(mac: [u8; 6]) -> Vec<u8> {
    /// Shortest frame of Ethernet, its checksum not included.
    const FRAME_BYTES: usize = 60;
    let mut frame = Vec::with_capacity(FRAME_BYTES);
    frame.extend([0xff; 6]);
    frame.extend(mac);
    // Reverse ARP: Ethernet, IPv4, lengths of both addresses, a request.
    frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in 0..2 {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    frame.resize(FRAME_BYTES, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;
    use limosa_os::memory::GuestView;
    use limosa_pages::ByteCount;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use virtio_queue::Queue;
    use vm_memory::{Bytes, GuestAddress};

    const MEMORY: ByteCount = ByteCount::new(4 << 20);
    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFERS: u64 = 0x1_0000;
    const SIZE: u16 = 4;

    /// An interface, what is behind it, and one queue of its driver.
    struct Bed {
        network: Network,
        wire: UnixDatagram,
        memory: GuestView,
        queue: Queue,
    }

    impl Bed {
        fn new() -> Self {
            let memory = layout::empty_view(MEMORY);
            let mut queue = Queue::new(SIZE).unwrap();
            let low = |address: u64| Some(u32::try_from(address).unwrap());
            queue.set_desc_table_address(low(DESCRIPTORS), None);
            queue.set_avail_ring_address(low(AVAILABLE), None);
            queue.set_used_ring_address(low(USED), None);
            queue.set_event_idx(true);
            queue.set_ready(true);
            let (near, wire) = UnixDatagram::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            wire.set_nonblocking(true).unwrap();
            let mut network = Network::new(Tap::from(OwnedFd::from(near)), [2, 0, 0, 0, 0, 9]);
            network.features = 1 << VIRTIO_NET_F_MRG_RXBUF;
            Self {
                network,
                wire,
                memory,
                queue,
            }
        }

        /// The driver queues its next buffer, of so many bytes.
        fn queue(&self, number: u16, len: u32, is_written: bool) {
            let place = DESCRIPTORS + 16 * u64::from(number % SIZE);
            let address = BUFFERS + 0x1000 * u64::from(number);
            let write = |offset, bytes: &[u8]| {
                self.memory
                    .write_slice(bytes, GuestAddress(offset))
                    .unwrap();
            };
            write(place, &address.to_le_bytes());
            write(place + 8, &len.to_le_bytes());
            write(place + 12, &[u8::from(is_written) << 1, 0, 0, 0]);
            write(
                AVAILABLE + 4 + 2 * u64::from(number % SIZE),
                &(number % SIZE).to_le_bytes(),
            );
            write(AVAILABLE + 2, &(number + 1).to_le_bytes());
        }

        fn serve(&mut self, queue: usize) -> Served {
            let mut ring = Ring {
                queue: &mut self.queue,
                memory: &self.memory,
            };
            self.network.serve(queue, &mut ring).unwrap()
        }

        fn used(&self) -> u16 {
            self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
        }
    }

    fn packet(bytes: usize) -> Vec<u8> {
        (0..bytes)
            .map(|at| if at < HEADER_BYTES { 0 } else { at as u8 })
            .collect()
    }

    #[test]
    fn a_packet_waits_for_as_many_buffers_as_it_needs() {
        let mut bed = Bed::new();
        assert_eq!(bed.serve(RECEIVE), Served::NoInput);
        let sent = packet(3012);
        bed.wire.send(&sent).unwrap();
        bed.queue(0, 1500, true);
        assert_eq!(bed.serve(RECEIVE), Served::NoInput);
        // It does not look for another packet, nor again before there is another buffer.
        assert!(bed.network.input().is_none());
        assert_eq!((bed.used(), bed.queue.next_avail()), (0, 0));
        // The driver is asked to tell of the buffer after the one that it has queued.
        let wanted: u16 = bed
            .memory
            .read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE)))
            .unwrap();
        assert_eq!(wanted, 1);
        bed.queue(1, 1500, true);
        bed.queue(2, 1500, true);
        assert_eq!(bed.serve(RECEIVE), Served::Request);
        assert!(bed.network.input().is_some());
        assert_eq!(bed.used(), 3);
        let mut received = Vec::new();
        for (number, len) in [(0, 1500), (1, 1500), (2, 12)] {
            let mut bytes = vec![0; len];
            let place = GuestAddress(BUFFERS + 0x1000 * number);
            bed.memory.read_slice(&mut bytes, place).unwrap();
            received.extend(bytes);
        }
        assert_eq!(received[BUFFERS_OFFSET..HEADER_BYTES], [3, 0]);
        assert_eq!(received[HEADER_BYTES..], sent[HEADER_BYTES..]);
    }

    #[test]
    fn packets_that_come_to_the_source_go_after_the_guest() {
        let mut source = Bed::new();
        let mut target = Bed::new();
        let sent = [packet(60), packet(90), packet(70)];
        // The first one has no room when the guest leaves, the others come after that.
        source.wire.send(&sent[0]).unwrap();
        assert_eq!(source.serve(RECEIVE), Served::NoInput);
        let mut own = packet(80);
        own[SENDER].copy_from_slice(&source.network.mac);
        for late in [&sent[1], &own, &sent[2]] {
            source.wire.send(late).unwrap();
        }
        let strays = source.network.take_strays(150);
        assert_eq!(strays, sent[..2], "no more than there is room for");
        assert!(source.network.take_strays(1000).len() == 1);
        assert!(source.network.take_strays(1000).is_empty());
        // Foreign ones of no length that a packet has are left out.
        let foreign = [vec![0; HEADER_BYTES], vec![0; PACKET_BYTES_MAX + 1]];
        target.network.give_strays(foreign.into());
        target.network.give_strays(strays);
        target.wire.send(&own).unwrap();
        target.wire.send(&sent[2]).unwrap();
        for number in 0..3 {
            target.queue(number, 1500, true);
            assert_eq!(target.serve(RECEIVE), Served::Request);
        }
        assert_eq!(target.serve(RECEIVE), Served::NoInput);
        for (number, sent) in (0..).zip(&sent) {
            let mut bytes = vec![0; sent.len() - HEADER_BYTES];
            let place = BUFFERS + 0x1000 * number + HEADER_BYTES as u64;
            target
                .memory
                .read_slice(&mut bytes, GuestAddress(place))
                .unwrap();
            assert_eq!(bytes, sent[HEADER_BYTES..]);
        }
        // However many come, those that wait have an end.
        let many = vec![packet(60); STRAYS_MAX + 10];
        target.network.give_strays(many);
        assert_eq!(target.network.strays.len(), STRAYS_MAX);
    }

    #[test]
    fn a_packet_that_no_ring_can_hold_is_lost() {
        let mut bed = Bed::new();
        bed.wire.send(&packet(500)).unwrap();
        for number in 0..SIZE {
            bed.queue(number, 100, true);
        }
        assert_eq!(bed.serve(RECEIVE), Served::Request);
        assert_eq!((bed.used(), bed.queue.next_avail()), (0, 0));
        bed.wire.send(&packet(60)).unwrap();
        assert_eq!(bed.serve(RECEIVE), Served::Request);
        assert_eq!(bed.used(), 1);
    }

    #[test]
    fn what_the_guest_sends_goes_out_as_it_is() {
        let mut bed = Bed::new();
        let sent = packet(100);
        bed.memory
            .write_slice(&sent, GuestAddress(BUFFERS))
            .unwrap();
        bed.queue(0, 100, false);
        bed.queue(1, 5, false);
        assert_eq!([bed.serve(SEND), bed.serve(SEND)], [Served::Request; 2]);
        assert_eq!(bed.serve(SEND), Served::RingEmpty);
        let mut received = [0; 200];
        assert_eq!(bed.wire.recv(&mut received).unwrap(), 100);
        assert_eq!(received[..100], sent);
        // The second one was too short to be a packet.
        assert!(bed.wire.recv(&mut received).is_err());
        assert_eq!(bed.used(), 2);
    }

    #[test]
    fn an_arrival_is_announced_and_heard_of() {
        let mut bed = Bed::new();
        assert!(!bed.network.arrive());
        bed.network.features |= 1 << VIRTIO_NET_F_GUEST_ANNOUNCE | 1 << VIRTIO_NET_F_CTRL_VQ;
        assert!(bed.network.arrive());
        assert_eq!(bed.network.configuration()[6..], [3, 0]);
        for _ in 0..ANNOUNCED_AGAIN.len() {
            assert!(bed.network.due().is_some());
            bed.network.tick();
        }
        assert_eq!(bed.network.due(), None);
        let mut received = [0; 200];
        for _ in 0..2 + ANNOUNCED_AGAIN.len() {
            assert_eq!(bed.wire.recv(&mut received).unwrap(), HEADER_BYTES + 60);
            assert_eq!(
                received[HEADER_BYTES + 6..HEADER_BYTES + 12],
                [2, 0, 0, 0, 0, 9]
            );
        }
        assert!(bed.wire.recv(&mut received).is_err());
    }

    #[test]
    fn an_announcement_is_a_reverse_arp_request() {
        let frame = reverse_arp([2, 0, 0, 0, 0, 9]);
        let text: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
        let expect = "ffffffffffff 020000000009 8035 0001 0800 06 04 0003 \
            020000000009 00000000 020000000009 00000000"
            .replace(' ', "");
        assert_eq!(text, format!("{expect:0<120}"));
    }
}
