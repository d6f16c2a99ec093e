//! Two hosts and a client in network namespaces, with a network for the guests and a link for their moves.
//!
//! ```text
//!  host a: tap0 ── br0 ── wire ───┐              ┌─── wire ── br0 ── tap0 : host b
//!            mig ─────────────────┼──── link ────┼───────────────── mig
//!                                 └── br0 of the client ──┘
//! ```
//!
//! Hosts see a guest's packets as they are, so whether they come to the right one is the bridges' business: they
//! learn where the guest is from what it sends, as switches do. The link is as fast as it goes, or the kernel
//! lets no more through, in either direction, than it is told.
//!
//! It takes root, and `ip` and `tc` of iproute2. What a process that was killed leaves is removed by the next one.

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

/// The tap device of each host.
pub const TAP: &str = "tap0";
/// The guest's address, with the bits of its network.
pub const GUEST: &str = "10.77.0.2/24";
/// Where the hosts talk to each other.
pub const HOSTS: [&str; 2] = ["10.78.0.1", "10.78.0.2"];
const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const CLIENT: &str = "10.77.0.1/24";

/// Where namespaces have names.
const NAMES: &str = "/run/netns";
/// A guest that is there answers within milliseconds; one that boots is asked again.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// What may go over a limited link at once: what the fastest sender gives to the kernel in one go, and for fast
/// links what passes while a timer of the kernel is late.
const BURST_BYTES_MIN: u64 = 256 << 10;
const BURSTS_PER_SECOND: u64 = 500;

/// The namespaces; gone with this.
#[derive(Debug)]
pub struct Lan {
    hosts: [String; 2],
    client: String,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum LanError {
    /// Not even the first namespace.
    #[error(
        "no network namespace can be made: that takes root, and ip and tc of iproute2 ({said})"
    )]
    Forbidden {
        /// What was said.
        said: String,
    },
    /// A part of it.
    #[error("'{line}' failed: {said}")]
    Part {
        /// The command.
        line: String,
        /// What it said.
        said: String,
    },
}

impl Lan {
    /// Makes it; `purpose` stands in the names of its namespaces, and the link lets `rate` bytes a second
    /// through, or all.
    ///
    /// # Errors
    /// This user may not make it, or the kernel does not have a part of it.
    pub fn make(purpose: &str, rate: Option<u64>) -> Result<Self, LanError> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let name = |what: &str| format!("limosa-{purpose}-{pid}-{number}-{what}");
        let client = name("client");
        let first = run(&format!("ip netns add {client}"));
        first.map_err(|said| LanError::Forbidden { said })?;
        let lan = Self {
            hosts: [name("a"), name("b")],
            client,
        };
        lan.build(rate)?;
        Ok(lan)
    }

    /// Why none with a link of that rate can be made here, found out by making one; `None` if it can.
    pub fn problem(rate: Option<u64>) -> Option<LanError> {
        Self::make("probe", rate).err()
    }

    fn build(&self, rate: Option<u64>) -> Result<(), LanError> {
        let Self { hosts, client } = self;
        must(&format!("ip -n {client} link add br0 type bridge"))?;
        must(&format!("ip -n {client} addr add {CLIENT} dev br0"))?;
        must(&format!("ip -n {client} link set br0 up"))?;
        for (index, host) in hosts.iter().enumerate() {
            must(&format!("ip netns add {host}"))?;
            must(&format!("ip -n {host} link set lo up"))?;
            must(&format!(
                "ip link add host{index} netns {client} type veth peer name wire netns {host}"
            ))?;
            must(&format!("ip -n {host} link add br0 type bridge"))?;
            must(&format!(
                "ip -n {host} tuntap add dev {TAP} mode tap vnet_hdr"
            ))?;
            for part in ["wire", TAP] {
                must(&format!("ip -n {host} link set {part} master br0 up"))?;
            }
            must(&format!("ip -n {host} link set br0 up"))?;
            must(&format!(
                "ip -n {client} link set host{index} master br0 up"
            ))?;
        }
        let [a, b] = hosts;
        must(&format!(
            "ip link add mig netns {a} type veth peer name mig netns {b}"
        ))?;
        for (host, address) in hosts.iter().zip(HOSTS) {
            must(&format!("ip -n {host} addr add {address}/24 dev mig"))?;
            must(&format!("ip -n {host} link set mig up"))?;
            if let Some(rate) = rate {
                let burst = BURST_BYTES_MIN.max(rate / BURSTS_PER_SECOND);
                must(&format!(
                    "tc -n {host} qdisc add dev mig root tbf rate {rate}bps burst {burst} latency 50ms"
                ))?;
            }
        }
        Ok(())
    }

    /// Name of the namespace of the first host, or of the second.
    pub fn host(&self, index: usize) -> &str {
        &self.hosts[index]
    }

    /// A command that runs a program on that host; the process is the program's own.
    pub fn command(&self, index: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.host(index)]);
        command.arg(program);
        command
    }

    /// Makes something, like a socket, on that host: it stays there, whoever uses it.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn in_host<T: Send>(
        &self,
        index: usize,
        make: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        in_namespace(self.host(index), make)
    }

    /// A connection of the client to that port of the guest.
    ///
    /// # Errors
    /// The guest does not listen.
    pub fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let address = SocketAddr::from((GUEST_ADDRESS, port));
        in_namespace(&self.client, || {
            TcpStream::connect_timeout(&address, CONNECT_MAX)
        })
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.client]) {
            // One that was never made cannot be deleted.
            drop(run(&format!("ip netns delete {name}")));
        }
    }
}

/// Removes the namespaces of processes that are no more.
fn sweep() {
    for entry in fs::read_dir(NAMES).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_left = maker(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if is_left {
            // Another process may have been quicker.
            drop(run(&format!("ip netns delete {name}")));
        }
    }
}

/// The process that made the namespace of that name, if it is one of these.
fn maker(name: &str) -> Option<u32> {
    let mut parts = name.strip_prefix("limosa-")?.split('-');
    let (_purpose, pid) = (parts.next()?, parts.next()?);
    let (number, what) = (parts.next()?, parts.next()?);
    let is_ours = number.parse::<u32>().is_ok() && ["a", "b", "client"].contains(&what);
    (is_ours && parts.next().is_none()).then(|| pid.parse().ok())?
}

/// A thread's sockets are in the namespace in which they were made, whoever uses them.
fn in_namespace<T: Send>(name: &str, make: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let space = File::open(Path::new(NAMES).join(name))?;
    let work = move || {
        move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
        make()
    };
    thread::scope(|scope| scope.spawn(work).join().expect("it does not panic"))
}

fn must(line: &str) -> Result<(), LanError> {
    run(line).map_err(|said| LanError::Part {
        line: line.to_owned(),
        said,
    })
}

/// Runs a command, out of reach of the terminal's Ctrl-C: what was begun is ended in order. What it said if it failed.
fn run(line: &str) -> Result<(), String> {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a program");
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).process_group(0);
    let output = command
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(said.trim().replace('\n', "; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_who_made_them() {
        assert_eq!(maker("limosa-lab-17-0-client"), Some(17));
        for other in [
            "limosa-lab-17-0-x",
            "limosa-17-0-a",
            "web-lab-17-0-a",
            "limosa-lab-x-0-a",
        ] {
            assert_eq!(maker(other), None, "{other}");
        }
    }

    #[test]
    fn what_a_dead_process_left_is_removed() {
        let mut process = Command::new("true").spawn().unwrap();
        process.wait().unwrap();
        let name = |pid| format!("limosa-test-{pid}-0-a");
        let [left, kept] = [process.id(), std::process::id()].map(name);
        for name in [&left, &kept] {
            if let Err(said) = run(&format!("ip netns add {name}")) {
                println!("skipped: {said}");
                return;
            }
        }
        sweep();
        let exists = |name: &str| Path::new(NAMES).join(name).exists();
        assert!(!exists(&left) && exists(&kept));
        run(&format!("ip netns delete {kept}")).unwrap();
    }
}
