//! Devices that a guest has beside its board (virtio 1.2, registers in memory: section 4.2): disks, networks,
//! a source of random numbers, a console and a balloon those with a kernel, networks alone micro guests.
//!
//! ```text
//!  vCPU ──registers──▶ Transport ◀──rings, descriptors──▶ guest memory
//!    └────doorbell────▶ worker: one step at a time under the device's lock ──▶ disk, tap
//! ```
//!
//! Each device has a [`transport`], whose registers vCPUs reach, and a thread that serves its queues. Most
//! requests are served under the device's lock, from their descriptors to their place in the used ring; those
//! of a disk are begun under it and finished under it, and the device says how many it has begun. A pause
//! waits until that is none, with a limit: what was in flight is finished by the device's thread, what the guest
//! has queued since stays queued and travels in its memory.
//!
//! All guest memory is reached through [`limosa_os::memory::view`], which notes what devices write, so a
//! migration sends it.
//!
//! Deliberately absent: PCI, packed rings, several queues of a kind.

mod balloon;
mod block;
mod console;
mod device;
mod entropy;
mod line;
mod network;
mod places;
#[cfg(test)]
mod tests;
mod transport;
mod worker;

use crate::answer::BalloonInfo;
use crate::board::Wake;
use crate::config::devices::{DiskConfig, NetworkConfig};
use crate::config::{Platform, VmConfig};
use crate::console::{Console, LOG_LINE_BYTES_MAX, Screen, Terminal};
use crate::state::{Kind, Section, StateError, Writer};
use balloon::Balloon;
use block::Block;
use console::Port;
use device::Device;
use entropy::Entropy;
use limosa_os::dirty::disks::{DiskNotes, DiskWrites};
use limosa_os::disk::missing::{MissingHere, MissingPages};
use limosa_os::disk::{Disk, Way};
use limosa_os::kvm::{KvmError, Vm};
use limosa_os::tap::Tap;
use limosa_pages::PageCount;
use line::Line;
use network::Network;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use transport::Transport;
use worker::Worker;

/// Where the registers of the first device are, within the hole below 4 GiB.
pub(crate) const FIRST_ADDRESS: u64 = 0xd000_0000;
/// From the registers of a device to those of the next one, of which it has so many bytes.
pub(crate) const WINDOW_BYTES: u32 = 0x1000;
/// The interrupt lines of devices, in their order: first those that no device of a PC has, then two of the
/// others that are free, since the controller has 24.
const LINES: [u32; 10] = [16, 17, 18, 19, 20, 21, 22, 23, 10, 11];

/// Most bytes of what has come for a guest where it does not run any more.
const STRAYS_BYTES_MAX: usize = 1 << 20;
/// Such things, with the place of their device among all.
type Strays = (u16, Vec<Vec<u8>>);

/// How long devices may take to finish what they are at before the guest's owner gives up waiting.
const REST_MAX: Duration = Duration::from_secs(5);

/// Where a guest finds a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) address: u64,
    pub(crate) line: u32,
}

impl Place {
    /// Of the device with that index.
    ///
    /// # Panics
    /// If a machine cannot have so many.
    pub(crate) fn of(index: u16) -> Self {
        Self {
            address: FIRST_ADDRESS + u64::from(index) * u64::from(WINDOW_BYTES),
            line: LINES[usize::from(index)],
        }
    }
}

/// Why a device cannot be used, or does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A disk cannot be opened.
    #[error("disk {path} cannot be used")]
    Disk {
        /// Where it is.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A disk has another size than the guest knows.
    #[error("disk {path} has {found} bytes here, the guest knows one of {expected}")]
    DiskSize {
        /// Where it is.
        path: String,
        /// Its size here.
        found: u64,
        /// The size that the guest knows.
        expected: u64,
    },
    /// Another guest writes the disk, or uses it.
    #[error("disk {path} is in use by another guest")]
    DiskBusy {
        /// Where it is.
        path: String,
    },
    /// An interface of the host cannot be used.
    #[error("network interface {tap} cannot be used")]
    Network {
        /// Its name.
        tap: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There are no random numbers.
    #[error("random numbers cannot be read")]
    Entropy(#[source] io::Error),
    /// A device does not finish what it is at: its disk does not answer, or a page of the guest that it
    /// needs does not come.
    #[error("device {index} does not come to rest within {} s", REST_MAX.as_secs())]
    Stuck {
        /// Its place among the devices.
        index: u16,
    },
    /// KVM cannot connect a device.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no thread or descriptor for one.
    #[error("a device cannot be started")]
    Start(#[source] io::Error),
}

/// All devices of a machine, in the order in which the guest finds them.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    /// Dropped first, which ends the threads.
    workers: Vec<Worker>,
    transports: Vec<Arc<Transport>>,
    /// Of the balloon, which is the last device.
    balloon: Arc<balloon::Ledger>,
    /// What is written to disks, and their files, for whoever copies them.
    disk_writes: Arc<DiskWrites>,
    /// What of them has not come yet.
    missing_on_disks: Arc<MissingHere>,
    /// Of the console.
    terminal: Option<Terminal>,
    disk_files: Vec<OwnedFd>,
}

impl Devices {
    /// How many a machine with that configuration has.
    pub(crate) fn count(config: &VmConfig) -> u16 {
        let others = if has_all(config) { 3 } else { 0 };
        let count = config.disks.len() + config.networks.len() + others;
        u16::try_from(count).expect("limited by the configuration")
    }

    /// Opens what the devices work with and starts them, at rest. They interrupt the guest, or end its waits
    /// if that is how it hears of them. Notes the sizes of disks that nobody knew yet.
    pub(crate) fn make(
        config: &mut VmConfig,
        vm: &Vm,
        wake: Option<&Arc<Wake>>,
    ) -> Result<Self, DeviceError> {
        Self::make_with(config, vm, wake, Way::Best, &Tap::open)
    }

    /// The same, with a say in how disks are read and written, and in what is behind a network.
    fn make_with(
        config: &mut VmConfig,
        vm: &Vm,
        wake: Option<&Arc<Wake>>,
        way: Way,
        open_tap: &dyn Fn(&str) -> io::Result<Tap>,
    ) -> Result<Self, DeviceError> {
        let mut all = Self::default();
        let mut devices: Vec<Box<dyn Device>> = Vec::new();
        let mut screen = None;
        for (index, config) in config.disks.iter_mut().enumerate() {
            let disk = open_disk(config)?;
            let file = disk.file().try_clone_to_owned();
            all.disk_files.push(file.map_err(DeviceError::Start)?);
            let notes = DiskNotes {
                writes: Arc::clone(&all.disk_writes),
                disk: index,
            };
            let missing = MissingPages {
                all: Arc::clone(&all.missing_on_disks),
                disk: index,
            };
            let block = Block::new(disk, &config.path, way, notes, missing);
            devices.push(Box::new(block));
        }
        for config in &config.networks {
            let tap = open_tap(&config.tap).map_err(|source| no_network(config, source))?;
            devices.push(Box::new(Network::new(tap, config.mac.0)));
        }
        if has_all(config) {
            devices.push(Box::new(Entropy::new().map_err(DeviceError::Entropy)?));
            let console = Console::new(&config.name, LOG_LINE_BYTES_MAX);
            let shown = Arc::new(Screen::new().map_err(DeviceError::Start)?);
            devices.push(Box::new(Port::new(console.shown_on(Arc::clone(&shown)))));
            screen = Some(shown);
            let balloon = Balloon::new(Arc::clone(&all.balloon), Arc::clone(vm.reclaim()));
            devices.push(Box::new(balloon));
        }
        let view = Arc::new(vm.view());
        for (index, device) in (0..).zip(devices) {
            let line = match wake {
                Some(wake) => Line::Wake(Arc::clone(wake)),
                None => Line::Interrupt(vm.interrupt_line(Place::of(index).line)?),
            };
            let transport = Transport::new(index, device, vm, line, Arc::clone(&view))?;
            let transport = Arc::new(transport);
            let worker = Worker::start(&transport).map_err(DeviceError::Start)?;
            all.transports.push(transport);
            all.workers.push(worker);
        }
        if let (Some(screen), [.., console, _balloon]) = (screen, &*all.transports) {
            let keyboard: Arc<Transport> = Arc::clone(console);
            all.terminal = Some(Terminal::new(screen, keyboard));
        }
        Ok(all)
    }

    /// The sections that they save.
    pub(crate) fn sections(&self) -> impl Iterator<Item = (Kind, u16)> {
        self.transports
            .iter()
            .map(|transport| (Kind::Virtio, transport.index()))
    }

    /// The guest reads where no memory is; false if no device is there either.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let found = self.find(address);
        found
            .map(|(transport, offset)| transport.read(offset, bytes))
            .is_some()
    }

    /// The guest writes there.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> bool {
        let found = self.find(address);
        found
            .map(|(transport, offset)| transport.write(offset, bytes))
            .is_some()
    }

    fn find(&self, address: u64) -> Option<(&Transport, u32)> {
        let offset = address.checked_sub(FIRST_ADDRESS)?;
        let (index, within) = (
            offset / u64::from(WINDOW_BYTES),
            offset % u64::from(WINDOW_BYTES),
        );
        let transport = self.transports.get(usize::try_from(index).ok()?)?;
        Some((transport, u32::try_from(within).ok()?))
    }

    /// Takes what only one machine may have: the locks of disks. Done before the guest runs; what it has
    /// already it keeps.
    pub(crate) fn claim(&self) -> Result<(), DeviceError> {
        let claimed = self.transports.iter().try_for_each(|device| device.claim());
        if claimed.is_err()
            && let Err(error) = self.release()
        {
            tracing::warn!(%error, "a disk stays locked although its guest does not run");
        }
        claimed
    }

    /// Where somebody can watch its console and type.
    pub(crate) const fn terminal(&self) -> Option<&Terminal> {
        self.terminal.as_ref()
    }

    /// What is written to disks.
    pub(crate) fn disk_writes(&self) -> &DiskWrites {
        &self.disk_writes
    }

    /// What of disks has not come yet.
    pub(crate) fn missing_on_disks(&self) -> &MissingHere {
        &self.missing_on_disks
    }

    /// The files of disks, in their order.
    pub(crate) fn disk_files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.disk_files.iter().map(AsFd::as_fd)
    }

    /// Gives up what [`Devices::claim`] took. The guest does not run.
    pub(crate) fn release(&self) -> Result<(), DeviceError> {
        self.transports
            .iter()
            .try_for_each(|device| device.release())
    }

    /// The guest is about to run here and ran on another host before.
    pub(crate) fn arrive(&self) -> Result<(), DeviceError> {
        self.transports
            .iter()
            .try_for_each(|device| device.arrive())
    }

    /// Lets all work.
    pub(crate) fn resume(&self) {
        self.transports.iter().for_each(|device| device.resume());
    }

    /// Has none begin anything more.
    pub(crate) fn begin_rest(&self) {
        self.transports
            .iter()
            .for_each(|device| device.begin_rest());
    }

    /// Brings all to rest: nothing is in flight afterwards, and what was written to disks stays there. No
    /// vCPU runs.
    pub(crate) fn pause(&self) -> Result<(), DeviceError> {
        self.begin_rest();
        let end = Instant::now() + REST_MAX;
        let mut first_failed = Ok(());
        for transport in &self.transports {
            first_failed = first_failed.and(transport.finish_rest(end));
        }
        first_failed
    }

    /// What has come from outside for a guest that runs elsewhere now, for [`Devices::give_strays`] there;
    /// empty if that is nothing.
    pub(crate) fn take_strays(&self) -> Result<Vec<u8>, DeviceError> {
        let mut all: Vec<Strays> = Vec::new();
        let mut left = STRAYS_BYTES_MAX;
        for transport in &self.transports {
            let strays = transport.take_strays(left)?;
            left -= strays.iter().map(Vec::len).sum::<usize>();
            if !strays.is_empty() {
                all.push((transport.index(), strays));
            }
        }
        if all.is_empty() {
            return Ok(Vec::new());
        }
        Ok(postcard::to_extend(&all, Vec::new()).expect("bytes can always be written"))
    }

    /// Gives the guest, which runs here now, what has come for it where it was before. What is not
    /// understood is lost, as networks lose packets.
    pub(crate) fn give_strays(&self, bytes: &[u8]) -> Result<(), DeviceError> {
        let Ok((all, [])) = postcard::take_from_bytes::<Vec<Strays>>(bytes) else {
            return Ok(());
        };
        for (index, strays) in all {
            if let Some(transport) = self.transports.get(usize::from(index)) {
                transport.give_strays(strays)?;
            }
        }
        Ok(())
    }

    /// Has the guest give up that much memory, or take back what is above.
    pub(crate) fn set_balloon(&self, target: PageCount) -> Result<(), DeviceError> {
        self.balloon.set_target(target);
        self.tell_balloon()
    }

    /// Has the guest give up so much at least until it has been moved.
    pub(crate) fn lend_balloon(&self, least: PageCount) -> Result<(), DeviceError> {
        self.balloon.lend(least);
        self.tell_balloon()
    }

    fn tell_balloon(&self) -> Result<(), DeviceError> {
        let balloon = self.transports.last();
        balloon.map_or(Ok(()), |device| device.tell_of_change())
    }

    /// What the guest has given up, as its driver said last, which is asked to say it anew.
    pub(crate) fn balloon(&self) -> BalloonInfo {
        let info = self.balloon.look();
        self.balloon.ask();
        if let Some(device) = self.transports.last() {
            device.ring(balloon::STATISTICS);
        }
        info
    }

    pub(crate) fn save(&self, writer: &mut Writer) {
        for transport in &self.transports {
            writer.write(Kind::Virtio, transport.index(), &transport.save());
        }
    }

    /// Takes their sections, one for each.
    pub(crate) fn load(&self, sections: &[Section<'_>]) -> Result<(), StateError> {
        for (transport, section) in self.transports.iter().zip(sections) {
            transport.load(*section)?;
        }
        Ok(())
    }
}

/// Whether it has random numbers, a console and a balloon: micro guests make do with their clock and their memory.
fn has_all(config: &VmConfig) -> bool {
    config.platform == Platform::Pc
}

/// What this host lacks of what the devices work with, all of it. Keeps nothing of what it has.
pub(crate) fn lacking(config: &VmConfig) -> Vec<DeviceError> {
    let disks = config.disks.iter();
    let disks = disks.filter_map(|disk| open_disk(&mut disk.clone()).err());
    let networks = config.networks.iter().filter_map(|network| {
        let tap = Tap::open(&network.tap);
        tap.err().map(|source| no_network(network, source))
    });
    disks.chain(networks).collect()
}

fn open_disk(config: &mut DiskConfig) -> Result<Disk, DeviceError> {
    let path = &config.path;
    let disk = Disk::open(Path::new(path), config.read_only);
    let disk = disk.map_err(|source| DeviceError::Disk {
        path: path.clone(),
        source,
    })?;
    let found = disk.bytes();
    match config.bytes.replace(found) {
        Some(expected) if expected != found => Err(DeviceError::DiskSize {
            path: path.clone(),
            found,
            expected,
        }),
        _ => Ok(disk),
    }
}

fn no_network(config: &NetworkConfig, source: io::Error) -> DeviceError {
    DeviceError::Network {
        tap: config.tap.clone(),
        source,
    }
}
