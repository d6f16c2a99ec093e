//! A micro guest with a network, and a client of it on this host. Taps are made by root only; for everybody
//! else a test says `skipped`.

use crate::guests::{has_kvm, wait_until};
use limosa_pages::ByteCount;
use limosa_vmm::answer::{ExitReason, RunState};
use limosa_vmm::config::VmConfig;
use limosa_vmm::config::devices::{Mac, NetworkConfig};
use limosa_vmm::machine::Machine;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

const MEMORY: ByteCount = ByteCount::new(16 << 20);
const PATIENCE: Duration = Duration::from_secs(20);

/// A tap of this process, with an address of this host behind it; gone with this.
struct Wire {
    tap: String,
    /// The host's, and the guest's.
    addresses: [Ipv4Addr; 2],
}

impl Wire {
    /// `None` if there is no KVM, or no tap can be made.
    fn new(number: u8) -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        // A network of four addresses of those that are set apart for measurements.
        let pid = std::process::id();
        let first =
            u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (pid % 4096) * 32 + u32::from(number) * 4;
        let wire = Self {
            tap: format!("lv{pid}n{number}"),
            addresses: [1, 2].map(|host| Ipv4Addr::from(first + host)),
        };
        let own = format!("{}/30", wire.addresses[0]);
        let tap = wire.tap.as_str();
        let is_there = ip(&["tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"])
            && ip(&["addr", "add", &own, "dev", tap])
            && ip(&["link", "set", tap, "up"]);
        if !is_there {
            println!("skipped: no tap can be made");
        }
        is_there.then_some(wire)
    }

    fn config(&self) -> VmConfig {
        VmConfig {
            networks: vec![NetworkConfig {
                tap: self.tap.clone(),
                mac: Mac::of(&self.tap, 0),
            }],
            args: format!("ip={}/30 connections=4", self.addresses[1]),
            ..VmConfig::new("test", MEMORY, 1)
        }
    }

    fn connect(&self) -> Client {
        let address = SocketAddr::from((self.addresses[1], 6379));
        let give_up = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect_timeout(&address, PATIENCE) {
                Ok(stream) => return Client::new(stream),
                Err(error) => assert!(Instant::now() < give_up, "{error}"),
            }
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        ip(&["link", "delete", &self.tap]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    let status = Command::new("ip").args(arguments).status();
    status.is_ok_and(|status| status.success())
}

struct Client {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Client {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            answers: BufReader::new(stream.try_clone().unwrap()),
            stream,
        }
    }

    fn ask(&mut self, request: &str) -> String {
        self.stream.write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

fn boot(wire: &Wire) -> Machine {
    let mut machine = Machine::create(wire.config(), "here").unwrap();
    machine.boot(limosa_micro::KV).unwrap();
    machine.run().unwrap();
    machine
}

/// Only one machine can have a tap, and a device's thread is not waited for.
fn create_again(config: &VmConfig) -> Machine {
    let give_up = Instant::now() + PATIENCE;
    loop {
        match Machine::create(config.clone(), "there") {
            Ok(machine) => return machine,
            Err(error) => assert!(Instant::now() < give_up, "{error}"),
        }
    }
}

/// A packet ends the guest's wait: the guest looks by itself only every 100 ms.
#[test]
fn a_micro_guest_answers_as_soon_as_it_is_asked() {
    let Some(wire) = Wire::new(0) else { return };
    let machine = boot(&wire);
    let mut client = wire.connect();
    assert_eq!(client.ask("PING\r\n"), "+PONG");
    let began = Instant::now();
    for _ in 0..500 {
        assert_eq!(client.ask("PING\r\n"), "+PONG");
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "500 answers took {took:?}");
    drop(machine);
}

/// A connection and what was stored live on in a machine that has loaded the state.
#[test]
fn a_connection_goes_over_with_its_guest() {
    let Some(wire) = Wire::new(1) else { return };
    let mut machine = boot(&wire);
    let mut client = wire.connect();
    for turn in 1..=3 {
        assert_eq!(client.ask("INCR turns\r\n"), format!(":{turn}"));
        // Asked, and not yet read by the guest, or not yet answered, or answered.
        client.stream.write_all(b"INCR asked\r\n").unwrap();
        let snapshot = machine.pause_and_save(false).unwrap();
        let mut memory = vec![0; usize::try_from(MEMORY.get()).unwrap()];
        machine.memory().read_at(0, &mut memory).unwrap();
        let config = VmConfig::from_description(&machine.config().to_description()).unwrap();
        drop(machine);
        machine = create_again(&config);
        machine.memory().write_at(0, &memory).unwrap();
        machine.load(&snapshot.sections).unwrap();
        let ready = machine.get_ready(snapshot.times.stopped_first).unwrap();
        machine.start(ready).unwrap();
        let mut line = String::new();
        client.answers.read_line(&mut line).unwrap();
        assert_eq!(line, format!(":{turn}\r\n"));
        assert_eq!(wire.connect().ask("GET turns\r\n"), "$1");
    }
    assert_eq!(client.ask("INCR turns\r\n"), ":4");
}

/// What the guest cannot run without is said on its console, and it ends.
#[test]
fn a_guest_without_what_it_needs_ends() {
    let Some(wire) = Wire::new(2) else { return };
    let check = |change: fn(&mut VmConfig)| {
        let mut config = wire.config();
        change(&mut config);
        let mut machine = Machine::create(config, "here").unwrap();
        machine.boot(limosa_micro::KV).unwrap();
        machine.run().unwrap();
        wait_until(|| {
            let RunState::Exited(reason) = machine.run_state() else {
                return false;
            };
            assert_eq!(reason, ExitReason::Finished { status: 2 });
            true
        });
    };
    check(|config| config.networks.clear());
    check(|config| config.vcpus = 2);
    check(|config| config.args.clear());
    check(|config| config.memory = ByteCount::new(6 << 20));
}
