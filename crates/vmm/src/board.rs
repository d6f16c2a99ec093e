//! What a guest has beside memory and processors: the ports of a micro guest ([`micro`]), or the
//! devices of a PC that stock kernels know ([`pc`]).

mod clock;
pub(crate) mod micro;
pub(crate) mod pc;
mod wake;

use crate::answer::ExitReason;
use crate::console::{ConsoleLine, Terminal};
use crate::state::{Kind, Section, StateError, Writer};
use crate::virtio::{DeviceError, Devices};
use limosa_micro_abi::CommandKind;
use micro::{MicroDevice, MicroPorts};
use pc::Pc;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
pub(crate) use wake::Wake;

/// What a vCPU thread has to do after the guest wrote a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AfterOut {
    GoOn,
    /// The guest wants to end.
    End(ExitReason),
}

/// What a vCPU thread has to do to answer the guest's reading a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Word(u32),
    /// Hold the vCPU for that long, or until a pause.
    Wait(Duration),
}

/// The board of a machine.
#[derive(Clone, Debug)]
pub(crate) enum Board {
    Micro(Arc<MicroDevice>),
    Pc(Arc<Pc>),
}

impl Board {
    /// Its sections: of which kind, and which of several.
    pub(crate) fn sections(&self) -> Vec<(Kind, u16)> {
        match self {
            Self::Micro(device) => device.sections(),
            Self::Pc(pc) => pc.sections(),
        }
    }

    /// What that vCPU of this board reaches by ports.
    pub(crate) fn ports(&self, vcpu: u8) -> Ports {
        match self {
            Self::Micro(device) => Ports::Micro(MicroPorts::new(Arc::clone(device), vcpu)),
            Self::Pc(pc) => Ports::Pc(Arc::clone(pc)),
        }
    }

    /// Where somebody can watch that line of its console and type; a micro guest has no such thing.
    pub(crate) fn terminal(&self, line: ConsoleLine) -> Option<Terminal> {
        match (self, line) {
            (Self::Micro(_), _) => None,
            (Self::Pc(pc), ConsoleLine::Serial) => Some(Pc::terminal(pc)),
            (Self::Pc(pc), ConsoleLine::Virtio) => pc.devices().terminal().cloned(),
        }
    }

    /// Sends heartbeats to somebody else, or to nobody. A PC has none.
    pub(crate) fn set_observer(&self, address: Option<SocketAddr>) -> std::io::Result<()> {
        match self {
            Self::Micro(device) => device.set_observer(address),
            Self::Pc(_) => Ok(()),
        }
    }

    /// Tells a micro guest to do something; the command's number, `None` if there is nobody to tell.
    pub(crate) fn command(&self, kind: CommandKind) -> Option<u32> {
        match self {
            Self::Micro(device) => Some(device.command(kind)),
            Self::Pc(_) => None,
        }
    }

    /// Its virtio devices, if one of them is a balloon; a micro guest has none.
    pub(crate) fn with_balloon(&self) -> Option<&Devices> {
        match self {
            Self::Micro(_) => None,
            Self::Pc(pc) => Some(pc.devices()),
        }
    }

    /// Its virtio devices.
    pub(crate) fn devices(&self) -> &Devices {
        match self {
            Self::Micro(device) => device.devices(),
            Self::Pc(pc) => pc.devices(),
        }
    }

    /// Takes what only one machine may have, before the guest runs.
    pub(crate) fn claim(&self) -> Result<(), DeviceError> {
        self.devices().claim()
    }

    /// Gives it up: the guest goes elsewhere.
    pub(crate) fn release(&self) -> Result<(), DeviceError> {
        self.devices().release()
    }

    /// The guest is about to run here and ran on another host before.
    pub(crate) fn arrive(&self) -> Result<(), DeviceError> {
        self.devices().arrive()
    }

    /// Lets devices work.
    pub(crate) fn resume(&self) {
        if let Self::Pc(pc) = self {
            pc.set_resting(false);
        }
        self.devices().resume();
    }

    /// Has devices begin nothing more, before the vCPUs stop.
    pub(crate) fn begin_rest(&self) {
        self.devices().begin_rest();
    }

    /// See [`Devices::take_strays`].
    pub(crate) fn take_strays(&self) -> Result<Vec<u8>, DeviceError> {
        self.devices().take_strays()
    }

    /// See [`Devices::give_strays`].
    pub(crate) fn give_strays(&self, strays: &[u8]) -> Result<(), DeviceError> {
        self.devices().give_strays(strays)
    }

    /// Brings devices to rest, after the vCPUs.
    pub(crate) fn pause(&self) -> Result<(), DeviceError> {
        if let Self::Pc(pc) = self {
            pc.set_resting(true);
        }
        self.devices().pause()
    }

    /// Appends its sections.
    pub(crate) fn save(&self, writer: &mut Writer) {
        match self {
            Self::Micro(device) => device.save(writer),
            Self::Pc(pc) => pc.save(writer),
        }
    }

    /// Takes its sections, in the order of [`Board::sections`].
    pub(crate) fn load(&self, sections: &[Section<'_>]) -> Result<(), StateError> {
        match (self, sections) {
            (Self::Micro(device), [section, devices @ ..]) => device.load(*section, devices),
            (Self::Pc(pc), [serial, clock, devices @ ..]) => pc.load(*serial, *clock, devices),
            _ => unreachable!("sections are found by kind"),
        }
    }
}

/// What one vCPU reaches by ports.
#[derive(Debug)]
pub(crate) enum Ports {
    Micro(MicroPorts),
    Pc(Arc<Pc>),
}

impl Ports {
    /// Bytes of a vCPU's own section.
    pub(crate) const STATE_BYTES: usize = MicroPorts::STATE_BYTES;

    /// The guest writes a port.
    pub(crate) fn write(&mut self, port: u16, bytes: &[u8]) -> AfterOut {
        match self {
            Self::Micro(ports) => ports.write(port, bytes),
            Self::Pc(pc) => pc.write(port, bytes),
        }
    }

    /// The guest reads a port.
    pub(crate) fn read(&mut self, port: u16) -> Answer {
        match self {
            Self::Micro(ports) => ports.read(port),
            Self::Pc(pc) => Answer::Word(u32::from(pc.read(port))),
        }
    }

    /// What ends a wait of this vCPU early, beside a pause.
    pub(crate) fn wake(&self) -> Option<&Wake> {
        match self {
            Self::Micro(ports) => ports.wake(),
            Self::Pc(_) => None,
        }
    }

    fn devices(&self) -> &Devices {
        match self {
            Self::Micro(ports) => ports.devices(),
            Self::Pc(pc) => pc.devices(),
        }
    }

    /// The guest writes where it has no memory. Where nothing is, that is lost, as on a real bus.
    pub(crate) fn write_memory(&self, address: u64, bytes: &[u8]) {
        if !self.devices().write(address, bytes) {
            tracing::trace!(address, "write to memory that is not there");
        }
    }

    /// The guest reads there. Where nothing is, it sees all ones.
    pub(crate) fn read_memory(&self, address: u64, bytes: &mut [u8]) {
        if !self.devices().read(address, bytes) {
            tracing::trace!(address, "read from memory that is not there");
            bytes.fill(0xff);
        }
    }

    /// What of it is this vCPU's own.
    pub(crate) fn save(&self) -> [u8; Self::STATE_BYTES] {
        match self {
            Self::Micro(ports) => ports.save(),
            Self::Pc(_) => [0; Self::STATE_BYTES],
        }
    }

    pub(crate) const fn load(&mut self, state: [u8; Self::STATE_BYTES]) {
        if let Self::Micro(ports) = self {
            ports.load(state);
        }
    }
}
