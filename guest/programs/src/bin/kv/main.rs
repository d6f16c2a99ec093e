//! Keeps values under keys for clients that speak RESP2 over TCP, as redis does: an application that runs at
//! native speed while it moves, measured from outside by whatever measures redis.
//!
//! ```text
//!  virtio ─▶ link ─▶ smoltcp ─▶ a Session for each connection ─▶ Store
//! ```
//!
//! One vCPU does all of it. When nothing is left to do it waits until a packet comes, a timer of TCP is due,
//! or a beat is.
//!
//! All memory is divided at the start and nothing is allocated afterwards.
#![no_std]
#![no_main]

mod clients;
mod link;

use core::mem::MaybeUninit;
use core::ops::Range;

use limosa_micro_abi::{BootInfo, ErrorKind, PAGE_BYTES};
use limosa_micro_logic::arguments::KvArguments;
use limosa_micro_logic::kv::{Block, Blocks, Damage, GROUP_SLOTS, Shape, Slot, Store};
use limosa_micro_logic::layout::{Cutter, TooSmall};
use limosa_micro_logic::page::Fault;
use limosa_micro_runtime::network::{NETWORK_BYTES, Network};
use limosa_micro_runtime::{Program, Refusal, Swept, Vcpu, claim};
use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketSet, SocketStorage,
};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};

use clients::{ANSWER_BYTES_MAX, Client, Clients, SOCKET_BYTES};
use link::Link;

limosa_micro_runtime::program!(Kv);

/// Most packets that are taken before clients are served.
const PACKETS_MAX: u32 = 32;
/// Most rounds in which every connection sends a packet, before packets are taken.
const SENDING_ROUNDS_MAX: u32 = 8;
/// Longest rest: the monitor's commands come with beats. Each costs the host some exits, for nothing if
/// nobody asks.
const REST_MICROSECONDS_MAX: u64 = 100_000;
/// The shortest, which is also how long one lasts that waits for the device to send.
const REST_MICROSECONDS_MIN: u64 = 200;
/// Groups that a sweep looks at before clients are served: some ten microseconds.
const GROUPS_AT_ONCE: usize = 16;
/// Least memory for keys and values.
const STORE_BYTES_MIN: u64 = 1 << 20;

struct Kv {
    link: Link,
    interface: Interface,
    sockets: SocketSet<'static>,
    clients: Clients,
    store: Store<'static>,
    /// Number of the first page of the table.
    first_page: u64,
}

impl Program for Kv {
    fn prepare<'a>(
        vcpu: &mut Vcpu,
        boot: &'a BootInfo,
        arguments: &'a str,
    ) -> Result<Self, Refusal<'a>> {
        let arguments = KvArguments::parse(arguments)?;
        if vcpu.count != 1 {
            return Err(Refusal::Needs("this program runs on one vCPU"));
        }
        let heap = boot.heap_start..boot.memory_bytes;
        let parts = Parts::cut(heap, arguments.connections)?;
        // SAFETY: a part of the heap that is the network's alone.
        let network = unsafe { Network::start(boot, &parts.network) };
        let network = network.ok_or(Refusal::Needs(
            "this program needs a network interface: --net TAP",
        ))?;
        let now = vcpu.look();
        let mut link = Link(network);
        let interface = make_interface(&arguments, &mut link, instant(vcpu, now), now);
        let first_page = parts.slots.start / PAGE_BYTES;
        let (mut sockets, places, buffers, store) = parts.claim(arguments.connections, now);
        let clients = Clients::new(places, buffers, arguments.port, &mut sockets);
        Ok(Self {
            link,
            interface,
            sockets,
            clients,
            store,
            first_page,
        })
    }

    fn step(&mut self, vcpu: &mut Vcpu, now: u64) -> bool {
        let time = instant(vcpu, now);
        let mut has_worked = false;
        for _ in 0..PACKETS_MAX {
            let interface = &mut self.interface;
            match interface.poll_ingress_single(time, &mut self.link, &mut self.sockets) {
                PollIngressSingleResult::None => break,
                _ => has_worked = true,
            }
        }
        let requests = self.clients.serve(&mut self.sockets, &mut self.store);
        vcpu.report.work += requests;
        has_worked |= requests > 0;
        for _ in 0..SENDING_ROUNDS_MAX {
            let interface = &mut self.interface;
            match interface.poll_egress(time, &mut self.link, &mut self.sockets) {
                PollResult::None => break,
                PollResult::SocketStateChanged => has_worked = true,
            }
        }
        self.link.0.tell();
        has_worked
    }

    fn rest(&mut self, vcpu: &mut Vcpu, now: u64) {
        if self.link.0.arm() {
            return;
        }
        let time = instant(vcpu, now);
        let delay = self.interface.poll_delay(time, &self.sockets);
        let delay = delay.map_or(REST_MICROSECONDS_MAX, |delay| delay.total_micros());
        let delay = delay.clamp(REST_MICROSECONDS_MIN, REST_MICROSECONDS_MAX);
        vcpu.rest_until(now + vcpu.ticks.from_microseconds(delay));
    }

    /// Goes on serving meanwhile.
    fn sweep(&mut self, vcpu: &mut Vcpu) -> Swept {
        let mut swept = Swept::default();
        for group in 0..self.store.group_count() {
            let result = self.store.check_group(group).map_err(fault);
            let bytes = group as u64 * GROUP_SLOTS as u64 * size_of::<Slot>() as u64;
            swept.count(1, vcpu.note(self.first_page + bytes / PAGE_BYTES, result));
            let now = vcpu.look();
            if group % GROUPS_AT_ONCE == 0 {
                self.step(vcpu, now);
            }
        }
        swept
    }
}

fn instant(vcpu: &Vcpu, now: u64) -> Instant {
    let microseconds = vcpu.ticks.to_microseconds(now);
    Instant::from_micros(i64::try_from(microseconds).unwrap_or(i64::MAX))
}

fn make_interface(arguments: &KvArguments, link: &mut Link, now: Instant, seed: u64) -> Interface {
    let mut config = Config::new(EthernetAddress(link.0.mac).into());
    config.random_seed = seed;
    let mut interface = Interface::new(config, link, now);
    interface.update_ip_addrs(|addresses| {
        let own = IpCidr::new(arguments.address.into(), arguments.prefix_bits);
        addresses.push(own).expect("there is room for one");
    });
    if let Some(gateway) = arguments.gateway {
        let route = interface.routes_mut().add_default_ipv4_route(gateway);
        route.expect("there is room for one");
    }
    interface
}

fn fault(damage: Damage) -> Fault {
    let (kind, expected, found) = match damage {
        Damage::Key(expected, found) => (ErrorKind::Number, expected, found),
        Damage::Value(expected, found) => (ErrorKind::Checksum, expected, found),
        Damage::Count(expected, found) => (ErrorKind::VersionSum, expected, found),
    };
    Fault {
        kind,
        expected: u64::from(expected),
        found: u64::from(found),
    }
}

// It lives on the stack, and is moved there.
const _: () = assert!(size_of::<Kv>() <= 16 << 10);

/// What of the heap is whose.
struct Parts {
    network: Range<u64>,
    buffers: Range<u64>,
    clients: Range<u64>,
    sockets: Range<u64>,
    slots: Range<u64>,
    groups: Range<u64>,
    blocks: Range<u64>,
    shape: Shape,
}

impl Parts {
    fn cut(heap: Range<u64>, connections: usize) -> Result<Self, TooSmall> {
        let mut heap = Cutter::new(heap);
        let connections = connections as u64;
        let network = heap.cut(NETWORK_BYTES)?;
        let buffers = heap.cut(connections * SOCKET_BYTES as u64 + ANSWER_BYTES_MAX as u64)?;
        let clients = heap.cut(connections * size_of::<Client>() as u64)?;
        let sockets = heap.cut(connections * size_of::<SocketStorage<'_>>() as u64)?;
        let shape = Shape::of(heap.left(STORE_BYTES_MIN)?);
        Ok(Self {
            network,
            buffers,
            clients,
            sockets,
            slots: heap.cut((shape.slots * size_of::<Slot>()) as u64)?,
            groups: heap.cut(shape.groups as u64)?,
            blocks: heap.cut((shape.blocks * size_of::<Block>()) as u64)?,
            shape,
        })
    }

    /// Takes all of them but the network's.
    fn claim(
        &self,
        connections: usize,
        seed: u64,
    ) -> (
        SocketSet<'static>,
        &'static mut [MaybeUninit<Client>],
        &'static mut [u8],
        Store<'static>,
    ) {
        // SAFETY: the parts lie in the heap, are page aligned and disjoint; this is called once, and nothing
        // else claims them; integers take any bytes, and so does what is not yet initialised.
        let (sockets, clients, buffers, slots, groups, blocks) = unsafe {
            (
                claim::<MaybeUninit<SocketStorage<'static>>>(&self.sockets),
                claim::<MaybeUninit<Client>>(&self.clients),
                claim::<u8>(&self.buffers),
                claim::<Slot>(&self.slots),
                claim::<u8>(&self.groups),
                claim::<Block>(&self.blocks),
            )
        };
        let sockets = fill(&mut sockets[..connections], |_| SocketStorage::EMPTY);
        let Shape {
            slots: slot_count,
            groups: group_count,
            blocks: block_count,
        } = self.shape;
        let store = Store::new(
            &mut slots[..slot_count],
            &mut groups[..group_count],
            Blocks::new(&mut blocks[..block_count]),
            seed,
        );
        (
            SocketSet::new(sockets),
            &mut clients[..connections],
            buffers,
            store,
        )
    }
}

/// Writes every place.
fn fill<T>(places: &mut [MaybeUninit<T>], mut make: impl FnMut(usize) -> T) -> &mut [T] {
    for (index, place) in places.iter_mut().enumerate() {
        place.write(make(index));
    }
    // SAFETY: all of them were just written, and such a place has the layout of what it is for.
    unsafe { &mut *(core::ptr::from_mut(places) as *mut [T]) }
}
