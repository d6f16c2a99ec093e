//! Two hosts and a client in network namespaces, with a network for the guests and a link for their moves.
//!
//! ```text
//!  host a: tap0 ── br0 ── wire ───┐              ┌─── wire ── br0 ── tap0 : host b
//!            mig ─────────────────┼── 1 Gbit/s ──┼───────────────── mig
//!                                 └── br0 of the client ──┘
//! ```
//!
//! Hosts see a guest's packets as they are, so whether they come to the right one is the bridges' business: they
//! learn where the guest is from what it sends, as switches do.

use crate::daemon::Place;
use crate::skip;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;

/// The tap device of each host.
pub const TAP: &str = "tap0";
/// The guest's address, with the bits of its network.
pub const GUEST: &str = "10.77.0.2/24";
const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const CLIENT: &str = "10.77.0.1/24";
const HOSTS: [&str; 2] = ["10.78.0.1", "10.78.0.2"];

/// The namespaces; gone with this.
#[derive(Debug)]
pub struct Lan {
    hosts: [String; 2],
    client: String,
}

impl Lan {
    /// Makes it, or says why a test is skipped: it takes root, and the programs of iproute2.
    ///
    /// # Panics
    /// If namespaces can be made, and the rest cannot.
    pub fn make() -> Option<Self> {
        let name = |what: &str| format!("limosa-e2e-{}-{what}", std::process::id());
        let lan = Self {
            hosts: [name("a"), name("b")],
            client: name("client"),
        };
        if !run("ip netns add", &[&lan.client]) {
            skip("no network namespace can be made: it takes root and iproute2");
            return None;
        }
        lan.build();
        Some(lan)
    }

    fn build(&self) {
        let Self { hosts, client } = self;
        must(&format!("ip -n {client} link add br0 type bridge"));
        must(&format!("ip -n {client} addr add {CLIENT} dev br0"));
        must(&format!("ip -n {client} link set br0 up"));
        for (index, host) in hosts.iter().enumerate() {
            must(&format!("ip netns add {host}"));
            must(&format!("ip -n {host} link set lo up"));
            must(&format!(
                "ip link add host{index} netns {client} type veth peer name wire netns {host}"
            ));
            must(&format!("ip -n {host} link add br0 type bridge"));
            must(&format!(
                "ip -n {host} tuntap add dev {TAP} mode tap vnet_hdr"
            ));
            for part in ["wire", TAP] {
                must(&format!("ip -n {host} link set {part} master br0 up"));
            }
            must(&format!("ip -n {host} link set br0 up"));
            must(&format!(
                "ip -n {client} link set host{index} master br0 up"
            ));
        }
        let [a, b] = hosts;
        must(&format!(
            "ip link add mig netns {a} type veth peer name mig netns {b}"
        ));
        for (host, address) in hosts.iter().zip(HOSTS) {
            must(&format!("ip -n {host} addr add {address}/24 dev mig"));
            must(&format!("ip -n {host} link set mig up"));
            must(&format!(
                "tc -n {host} qdisc add dev mig root tbf rate 1gbit burst 256kb latency 50ms"
            ));
        }
    }

    /// Where a daemon runs on the first host, or on the second.
    pub fn host(&self, index: usize) -> Place {
        Place {
            namespace: self.hosts[index].clone(),
            address: HOSTS[index].to_owned(),
            tap: TAP.to_owned(),
        }
    }

    /// A connection of the client to that port of the guest.
    ///
    /// # Errors
    /// The guest does not listen.
    ///
    /// # Panics
    /// If there is no client.
    pub fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let space = File::open(format!("/run/netns/{}", self.client)).expect("it was made");
        // A thread's sockets are in the namespace in which they were made, whoever uses them.
        let connect = move || {
            move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
            TcpStream::connect(SocketAddr::from((GUEST_ADDRESS, port)))
        };
        thread::spawn(connect).join().expect("it does not panic")
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.client]) {
            run("ip netns delete", &[name]);
        }
    }
}

fn must(line: &str) {
    assert!(run(line, &[]), "'{line}' failed");
}

fn run(line: &str, more: &[&str]) -> bool {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a program");
    let status = Command::new(program).args(words).args(more).status();
    status.is_ok_and(|status| status.success())
}
