//! The ports of a micro guest: heartbeats and commands, waiting, the console, the end; and behind them the
//! networks that it is given, which end its waits in place of interrupting it.
//!
//! [`MicroDevice`] is what all vCPUs share, [`MicroPorts`] what each has for itself; both are part of the
//! machine's state. Ports are handled on the vCPU's own thread and never write the guest's memory.

use super::wake::Wake;
use super::{AfterOut, Answer};
use crate::answer::ExitReason;
use crate::config::VmConfig;
use crate::console::Console;
use crate::heartbeat::{Heartbeat, Observer};
use crate::state::{Kind, Section, StateError, Writer};
use crate::virtio::Devices;
use limosa_engine::Timestamp;
use limosa_micro_abi::{Command, CommandKind, Report, command, memory_map, port};
use limosa_os::SharedMemory;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest line of a guest's console; longer ones are cut into several.
const LINE_BYTES_MAX: usize = 256;

/// What of the micro guest's ports all vCPUs share.
#[derive(Debug)]
pub(crate) struct MicroDevice {
    name: String,
    host: String,
    vcpus: u8,
    memory: Arc<SharedMemory>,
    command: AtomicU32,
    heartbeats: AtomicU64,
    observer: Mutex<Option<Observer>>,
    console: Mutex<Console>,
    devices: Devices,
    /// By which devices end the waits of the first vCPU.
    wake: Arc<Wake>,
}

impl MicroDevice {
    /// Bytes of its section.
    pub(crate) const STATE_BYTES: usize = 16;

    /// The board of a machine with that configuration, on a host of that name.
    pub(crate) fn new(
        config: &VmConfig,
        host: &str,
        memory: Arc<SharedMemory>,
        devices: Devices,
        wake: Arc<Wake>,
    ) -> Self {
        Self {
            name: config.name.clone(),
            host: host.to_owned(),
            vcpus: config.vcpus,
            memory,
            command: AtomicU32::new(Command::NONE.to_word()),
            heartbeats: AtomicU64::new(0),
            observer: Mutex::new(None),
            console: Mutex::new(Console::new(&config.name, LINE_BYTES_MAX)),
            devices,
            wake,
        }
    }

    pub(crate) const fn devices(&self) -> &Devices {
        &self.devices
    }

    /// See [`super::Board::sections`].
    pub(crate) fn sections(&self) -> Vec<(Kind, u16)> {
        let mut sections = vec![(Kind::Micro, 0)];
        sections.extend(self.devices.sections());
        sections
    }

    pub(crate) fn set_observer(&self, address: Option<SocketAddr>) -> std::io::Result<()> {
        let observer = address.map(Observer::new).transpose()?;
        *self.observer.lock().unwrap_or_else(PoisonError::into_inner) = observer;
        Ok(())
    }

    /// Tells the guest to do something, with its next heartbeat; the command's sequence number.
    pub(crate) fn command(&self, kind: CommandKind) -> u32 {
        let now = Command::from_word(self.command.load(Ordering::SeqCst));
        let sequence = now.sequence.wrapping_add(1) & command::SEQUENCE_MASK;
        self.command
            .store(Command { kind, sequence }.to_word(), Ordering::SeqCst);
        sequence
    }

    /// Appends its sections.
    pub(crate) fn save(&self, writer: &mut Writer) {
        let mut bytes = [0; Self::STATE_BYTES];
        bytes[..4].copy_from_slice(&self.command.load(Ordering::SeqCst).to_le_bytes());
        bytes[8..].copy_from_slice(&self.heartbeats.load(Ordering::SeqCst).to_le_bytes());
        writer.write(Kind::Micro, 0, &bytes);
        self.devices.save(writer);
    }

    /// Takes its sections.
    pub(crate) fn load(
        &self,
        section: Section<'_>,
        devices: &[Section<'_>],
    ) -> Result<(), StateError> {
        let bytes: [u8; Self::STATE_BYTES] = section
            .bytes
            .try_into()
            .map_err(|_| section.content("it has another size"))?;
        let (command, heartbeats) = bytes.split_at(8);
        let command = u32::from_le_bytes(command[..4].try_into().expect("four bytes"));
        let heartbeats = u64::from_le_bytes(heartbeats.try_into().expect("eight bytes"));
        self.command.store(command, Ordering::SeqCst);
        self.heartbeats.store(heartbeats, Ordering::SeqCst);
        self.devices.load(devices)
    }

    fn heartbeat(&self) -> u32 {
        let sequence = self.heartbeats.fetch_add(1, Ordering::SeqCst);
        if let Some(observer) = &*self.observer.lock().unwrap_or_else(PoisonError::into_inner) {
            let word = |vcpu: u8, field: usize| {
                let report = memory_map::report_address(u32::from(vcpu));
                self.memory.read_word(report + field as u64).unwrap_or(0)
            };
            let sum = |field: usize| {
                (0..self.vcpus)
                    .map(|vcpu| word(vcpu, field))
                    .fold(0, u64::wrapping_add)
            };
            observer.send(&Heartbeat {
                name: self.name.clone(),
                host: self.host.clone(),
                process: std::process::id(),
                sequence,
                guest_tsc: word(0, std::mem::offset_of!(Report, beat_tsc)),
                work: sum(std::mem::offset_of!(Report, work)),
                errors: sum(std::mem::offset_of!(Report, errors)),
                sent_at: Timestamp::from_nanos(limosa_os::monotonic_nanos()),
            });
        }
        self.command.load(Ordering::SeqCst)
    }

    fn print(&self, bytes: &[u8]) {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.print(bytes.iter().copied());
    }
}

/// What of the micro guest's ports a vCPU has for itself.
#[derive(Debug)]
pub(crate) struct MicroPorts {
    device: Arc<MicroDevice>,
    /// Whether this is the vCPU whose waits devices end.
    is_first: bool,
    /// How long its next wait lasts.
    wait_microseconds: u32,
}

impl MicroPorts {
    /// Bytes of its section.
    pub(crate) const STATE_BYTES: usize = 4;

    pub(crate) const fn new(device: Arc<MicroDevice>, vcpu: u8) -> Self {
        Self {
            device,
            is_first: vcpu == 0,
            wait_microseconds: 0,
        }
    }

    /// The guest writes a port.
    pub(crate) fn write(&mut self, port: u16, bytes: &[u8]) -> AfterOut {
        let word = |bytes: &[u8]| {
            let mut word = [0; 4];
            let len = bytes.len().min(4);
            word[..len].copy_from_slice(&bytes[..len]);
            u32::from_le_bytes(word)
        };
        match port {
            port::WAIT_MICROSECONDS => self.wait_microseconds = word(bytes),
            port::CONSOLE => self.device.print(bytes),
            port::EXIT => {
                let status = word(bytes);
                return AfterOut::End(ExitReason::Finished { status });
            }
            // Nobody is there; real machines ignore it too.
            _ => tracing::trace!(port, "write to a port that nobody has"),
        }
        AfterOut::GoOn
    }

    pub(crate) fn devices(&self) -> &Devices {
        self.device.devices()
    }

    /// What ends its waits early, beside a pause.
    pub(crate) fn wake(&self) -> Option<&Wake> {
        self.is_first.then_some(&*self.device.wake)
    }

    /// The guest reads a port.
    pub(crate) fn read(&mut self, port: u16) -> Answer {
        match port {
            port::HEARTBEAT => Answer::Word(self.device.heartbeat()),
            port::WAIT => {
                let time = Duration::from_micros(u64::from(self.wait_microseconds));
                self.wait_microseconds = 0;
                Answer::Wait(time)
            }
            _ => {
                tracing::trace!(port, "read from a port that nobody has");
                Answer::Word(u32::MAX)
            }
        }
    }

    pub(crate) const fn save(&self) -> [u8; Self::STATE_BYTES] {
        self.wait_microseconds.to_le_bytes()
    }

    pub(crate) const fn load(&mut self, state: [u8; Self::STATE_BYTES]) {
        self.wait_microseconds = u32::from_le_bytes(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::parse;
    use limosa_os::PageKind;
    use limosa_pages::ByteCount;

    fn device() -> Arc<MicroDevice> {
        let memory = SharedMemory::create(ByteCount::new(1 << 20), PageKind::Small).unwrap();
        let config = VmConfig::new("vm", memory.size(), 2);
        let (devices, wake) = (Devices::default(), Arc::default());
        Arc::new(MicroDevice::new(
            &config,
            "a",
            Arc::new(memory),
            devices,
            wake,
        ))
    }

    #[test]
    fn a_wait_holds_once() {
        let mut ports = MicroPorts::new(device(), 0);
        assert_eq!(ports.read(port::WAIT), Answer::Wait(Duration::ZERO));
        ports.write(port::WAIT_MICROSECONDS, &700u32.to_le_bytes());
        let state = ports.save();
        assert_eq!(
            ports.read(port::WAIT),
            Answer::Wait(Duration::from_micros(700))
        );
        assert_eq!(ports.read(port::WAIT), Answer::Wait(Duration::ZERO));
        ports.load(state);
        assert_eq!(
            ports.read(port::WAIT),
            Answer::Wait(Duration::from_micros(700))
        );
    }

    #[test]
    fn commands_and_heartbeats_go_on_after_a_move() {
        let source = device();
        assert_eq!(source.command(CommandKind::Sweep), 1);
        let mut ports = MicroPorts::new(Arc::clone(&source), 0);
        let word = Command {
            kind: CommandKind::Sweep,
            sequence: 1,
        }
        .to_word();
        assert_eq!(ports.read(port::HEARTBEAT), Answer::Word(word));
        let mut writer = Writer::default();
        source.save(&mut writer);
        let state = Writer::join(&[writer]);
        let target = device();
        target.load(parse(&state).unwrap()[0], &[]).unwrap();
        assert_eq!(target.heartbeats.load(Ordering::SeqCst), 1);
        assert_eq!(target.command(CommandKind::Finish), 2);
        let short = Section {
            kind: Kind::Micro,
            instance: 0,
            bytes: &[0; 3],
        };
        assert!(target.load(short, &[]).is_err());
    }

    #[test]
    fn the_end_and_unknown_ports() {
        let mut ports = MicroPorts::new(device(), 0);
        assert_eq!(
            ports.write(port::EXIT, &3u32.to_le_bytes()),
            AfterOut::End(ExitReason::Finished { status: 3 })
        );
        assert_eq!(ports.write(0x80, &[1]), AfterOut::GoOn);
        assert_eq!(ports.write(port::CONSOLE, &[b'x'; 1000]), AfterOut::GoOn);
        assert_eq!(ports.read(0x60), Answer::Word(u32::MAX));
    }
}
