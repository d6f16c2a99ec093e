//! One virtual machine: made, booted or loaded, run, paused, saved.
//!
//! Each vCPU has a thread that lives as long as the machine and waits for orders; the thread that
//! owns the [`Machine`] gives them and collects the replies. A pause is one order with one reply: a
//! vCPU that has left the guest completes a pending port or memory access and saves itself at once,
//! all vCPUs at the same time. What takes long (threads, CPU features, which registers this kernel
//! can read and write) is done when the machine is made.
//!
//! ```text
//!            boot                 run, resume
//!  Empty ───────────▶ Paused ◀──────────────────▶ Running ──▶ Exited (for good)
//!        ───────────▶         pause_and_save
//!            load
//! ```
//!
//! Invariants: after a pause nothing writes the guest's memory: vCPUs are out of the guest, ports are
//! handled on their threads and write no memory, and devices rest. The dirty log is read after the vCPUs
//! were saved, so whatever saving writes is in it. A guest runs only where its disks are locked.
//!
//! Deliberately absent: who may run the machine. That is the process's record.

mod faults;
mod first_needed;
mod msrs;
mod pace;
mod seat;
mod snapshot;
mod time;
mod vcpu_state;
mod vcpu_thread;

use crate::acpi;
use crate::answer::{BalloonInfo, ExitReason, Loaded, RunState, Running, SaveTimes};
use crate::board::Board;
use crate::board::micro::MicroDevice;
use crate::board::pc::{self, Pc};
use crate::boot::linux::{self, LinuxImage};
use crate::boot::{BootError, Start, micro};
use crate::config::{ConfigError, Platform, VmConfig, is_same_rate};
use crate::console::{ConsoleLine, Terminal};
use crate::cpu;
use crate::layout;
use crate::state::{StateError, Writer};
use crate::throttle;
use crate::virtio::{DeviceError, Devices};
pub use faults::HeldFaults;
use first_needed::Place;
use limosa_engine::Timestamp;
use limosa_engine::source::Writers;
use limosa_engine::throttle::Throttle;
use limosa_micro_abi::CommandKind;
use limosa_os::bitmap::BitmapError;
use limosa_os::kvm::{Kvm, KvmError, Vcpu, Vm};
use limosa_os::userfault::GateError;
use limosa_os::{MemoryError, SharedBitmap, SharedMemory};
use limosa_pages::{ByteCount, DISK_BYTES_MAX, PAGE_SIZE, PageCount, PageRange, Pfn};
use msrs::MsrPlan;
use seat::{Seats, Shared};
use snapshot::{MachineSections, MachineState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::{ClockPair, set_at};
use vcpu_thread::{Order, Reply, StartAt, VcpuThread};

/// Why a machine did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Its configuration is not possible, or not here.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Accesses to missing pages cannot be held back, or let go.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It has no disks that could be lent, or they are too large.
    #[error("the machine has no disks, or they are larger than {DISK_BYTES_MAX}")]
    NoDisks,
    /// Its disks are not complete.
    #[error("{0} of its disks are still missing")]
    MissingOnDisks(PageCount),
    /// There is no dirty bitmap for it.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// The guest cannot be put into its memory.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The state cannot be loaded.
    #[error(transparent)]
    State(#[from] StateError),
    /// A register without which the guest would break does not take its value.
    #[error(
        "this host's KVM does not take {value:#x} in model-specific register {index:#x} of vCPU {vcpu}, on which the guest depends"
    )]
    LostMsr {
        /// Of which vCPU.
        vcpu: u8,
        /// Which.
        index: u32,
        /// What it should have had.
        value: u64,
    },
    /// A thread could not be started, or a socket not be made.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The machine has ended.
    #[error("the machine has exited: {0}")]
    Exited(ExitReason),
    /// The machine is not in a state for that.
    #[error("the machine is {state}, it has to be {wanted}")]
    WrongState {
        /// What it is.
        state: RunState,
        /// What it would have to be.
        wanted: &'static str,
    },
    /// A disk or a network is not here, or fails.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The guest cannot be asked for memory.
    #[error("there is no balloon to fill: {0}")]
    Balloon(&'static str),
    /// A throttle that cannot be carried out.
    #[error("the guest cannot be slowed down: {0}")]
    Throttle(&'static str),
    /// A vCPU does not come out of the guest.
    #[error("a vCPU did not answer within {} s", LIMIT.as_secs())]
    Stuck,
    /// A vCPU has an access that never ends.
    #[error("vCPU {vcpu} does not complete its pending access")]
    Endless {
        /// Which.
        vcpu: u8,
    },
}

/// How long a vCPU may take to answer. A kick takes microseconds; on a machine whose processors are
/// all busy, some scheduler slices.
const LIMIT: Duration = Duration::from_secs(5);

/// A machine's state and when it was taken. The dirty log is in the machine's bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The state, as [`crate::state`] has it.
    pub sections: Vec<u8>,
    /// When what happened.
    pub times: SaveTimes,
    /// See [`crate::answer::Saved::first_needed`].
    pub first_needed: Vec<Pfn>,
}

/// Says that a machine can run, and from when on its clocks go.
#[derive(Debug)]
pub struct Ready(StartAt);

/// A virtual machine.
#[derive(Debug)]
pub struct Machine {
    // Dropped first, which ends and joins the threads that use all the rest.
    seats: Seats,
    vm: Vm,
    config: VmConfig,
    memory: Arc<SharedMemory>,
    bitmap: SharedBitmap,
    board: Board,
    shared: Arc<Shared>,
    host_khz: u32,
    life: Life,
    /// Accesses to missing pages are held back, or why they are not.
    faults: Result<HeldFaults, String>,
}

/// Where it is in its life, as long as the guest has not ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Empty,
    Paused,
    Running,
}

impl Machine {
    /// Makes a machine: all its vCPUs exist and wait, its memory is all zero and untouched. `host`
    /// is what this host is called in heartbeats.
    ///
    /// # Errors
    /// The configuration is not possible, or this host lacks something for it.
    pub fn create(mut config: VmConfig, host: &str) -> Result<Self, MachineError> {
        config.check()?;
        let kvm = Kvm::open()?;
        let neutral = config.features(&kvm)?;
        let memory = Arc::new(SharedMemory::create(config.memory, config.page_kind())?);
        let bitmap = SharedBitmap::create(memory.page_count())?;
        let mut vm = kvm.create_vm(config.dirty_tracker)?;
        vm.set_memory(Arc::clone(&memory), &layout::regions(config.memory))?;
        if config.irqchip {
            vm.create_irqchip()?;
        }
        let vcpus = (0..config.vcpus)
            .map(|index| vm.create_vcpu(index))
            .collect::<Result<Vec<_>, _>>()?;
        let host_khz = vcpus.first().expect("a machine has a vCPU").tsc_khz()?;
        let guest_khz = config.tsc_khz.unwrap_or(host_khz);
        config.check_clock(&kvm, host_khz, guest_khz)?;
        config.tsc_khz = Some(guest_khz);
        config.cpuid = Some(neutral);
        let board = make_board(&mut config, host, &vm, &memory)?;
        let no_observer = |source| MachineError::Io {
            action: "send heartbeats to the observer",
            source,
        };
        board.set_observer(config.observer).map_err(no_observer)?;
        let shared = Arc::new(Shared::default());
        let threads = make_threads(&kvm, &config, host_khz, vcpus, &board, &shared)?;
        config.msrs = threads[0].fixed.plan.essential();
        let seats = Seats::start(threads, Arc::clone(&shared))?;
        Ok(Self {
            seats,
            vm,
            config,
            memory,
            bitmap,
            board,
            shared,
            host_khz,
            life: Life::Empty,
            faults: Err("its memory was complete from the start".to_owned()),
        })
    }

    /// Puts a micro guest into the empty machine.
    ///
    /// # Errors
    /// The image is no micro guest's or does not fit.
    pub fn boot(&mut self, elf: &[u8]) -> Result<(), MachineError> {
        self.need(Life::Empty, "empty")?;
        let khz = self.config.tsc_khz.expect("set when the machine was made");
        let machine = micro::Shape {
            vcpus: self.config.vcpus,
            devices: Devices::count(&self.config),
            tsc_khz: khz,
        };
        let entry = micro::fill_memory(&self.memory, elf, machine, &self.config.args)?;
        self.begin(Start::Micro { entry })
    }

    /// Puts a stock kernel into the empty machine.
    ///
    /// # Errors
    /// It is no kernel, or does not fit.
    pub fn boot_linux(&mut self, image: &mut LinuxImage) -> Result<(), MachineError> {
        self.need(Life::Empty, "empty")?;
        let view = self.vm.view();
        let tables = acpi::tables(self.config.vcpus, Devices::count(&self.config));
        let start = linux::fill_memory(&view, self.config.memory, image, &tables);
        self.begin(start.map_err(BootError::from)?)
    }

    fn begin(&mut self, start: Start) -> Result<(), MachineError> {
        for reply in self.seats.ask(|_| Order::Boot(start))? {
            reply.into_done()?;
        }
        self.life = Life::Paused;
        Ok(())
    }

    /// What machine it is; [`VmConfig::cpuid`] and [`VmConfig::tsc_khz`] are set.
    pub const fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The guest's memory.
    pub const fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// Where the dirty log is read to.
    pub const fn bitmap(&self) -> &SharedBitmap {
        &self.bitmap
    }

    /// Where it is in its life.
    pub fn run_state(&self) -> RunState {
        match (self.shared.exit(), self.life) {
            (Some(reason), _) => RunState::Exited(reason),
            (None, Life::Empty) => RunState::Empty,
            (None, Life::Paused) => RunState::Paused,
            (None, Life::Running) => RunState::Running,
        }
    }

    /// Runs the paused machine, or runs it on.
    ///
    /// # Errors
    /// It is not paused, another guest has its disks, or a vCPU does not start.
    pub fn run(&mut self) -> Result<Running, MachineError> {
        self.need(Life::Paused, "paused")?;
        self.board.claim()?;
        self.life = Life::Running;
        self.board.resume();
        self.seats.run(None)
    }

    /// Gets a machine with a loaded state ready to run as if it had not been stopped: its clocks go
    /// on. `stopped_at` is [`SaveTimes::stopped_first`] on this host's clock.
    ///
    /// # Errors
    /// It is not paused, another guest has its disks, or its clock cannot be set. It has not run.
    pub fn get_ready(&mut self, stopped_at: Timestamp) -> Result<Ready, MachineError> {
        self.need(Life::Paused, "paused")?;
        self.board.claim()?;
        self.board.arrive()?;
        let pair = ClockPair::sample();
        if let Some(clock) = self.shared.clock() {
            set_at(&self.vm, clock, stopped_at.as_nanos())?;
        }
        Ok(Ready(StartAt {
            stopped_at: stopped_at.as_nanos(),
            pair,
        }))
    }

    /// Runs the machine that is ready. A vCPU that cannot start ends the machine, as one that cannot
    /// go on does.
    ///
    /// # Errors
    /// It is not known whether it runs: a vCPU does not say that it does.
    pub fn start(&mut self, ready: Ready) -> Result<Running, MachineError> {
        self.life = Life::Running;
        self.board.resume();
        self.seats.run(Some(ready.0))
    }

    /// Pauses if it runs, saves, and reads the dirty log if asked. A machine that ran stays paused.
    ///
    /// # Errors
    /// It has no state yet, has ended, or a part of it cannot be saved. It is paused then, too.
    pub fn pause_and_save(&mut self, harvest: bool) -> Result<Snapshot, MachineError> {
        if self.life == Life::Empty {
            return Err(self.wrong_state("running or paused"));
        }
        // Before the vCPUs: one of them may wait for a device that is busy.
        self.board.begin_rest();
        let vcpus = self.seats.pause(|| Order::Save);
        // Even if one does not come out: it will stop when it does, and can be run on.
        self.life = Life::Paused;
        let rested = self.board.pause();
        let vcpus = vcpus?;
        rested?;
        if let Some(reason) = self.shared.exit() {
            return Err(MachineError::Exited(reason));
        }
        let vcpus = vcpus
            .into_iter()
            .map(Reply::into_saved)
            .collect::<Result<Vec<_>, _>>()?;
        let pair = ClockPair::sample();
        let stops = || vcpus.iter().map(|vcpu| vcpu.stopped_at);
        let stopped_first = stops().min().expect("a machine has a vCPU");
        let stopped_last = stops().max().expect("a machine has a vCPU");
        let mut machine = MachineSections::new(&self.vm, &self.config);
        machine.save(&self.board, stopped_first)?;
        let places: Vec<Place> = vcpus.iter().map(|vcpu| vcpu.place).collect();
        let mut writers = vec![machine.into_writer()];
        let mut stopped_guest_tsc = 0;
        for (index, vcpu) in (0..).zip(vcpus) {
            let tsc = vcpu
                .tsc
                .guest_at(stopped_first, pair, self.host_khz, self.guest_khz());
            if index == 0 {
                stopped_guest_tsc = tsc;
            }
            writers.push(vcpu.writer);
            writers.push(vcpu_state::tsc_section(index, tsc, self.guest_khz()));
        }
        let sections = Writer::join(&writers);
        let before = limosa_os::monotonic_nanos();
        if harvest {
            self.harvest()?;
        }
        let harvested = limosa_os::monotonic_nanos();
        let first_needed = first_needed::pages(&self.memory, &places);
        let saved = limosa_os::monotonic_nanos();
        let stamp = Timestamp::from_nanos;
        let times = SaveTimes {
            stopped_first: stamp(stopped_first),
            stopped_last: stamp(stopped_last),
            harvested: stamp(stopped_last + (harvested - before)),
            saved: stamp(saved),
            stopped_guest_tsc,
        };
        Ok(Snapshot {
            sections,
            times,
            first_needed,
        })
    }

    /// Gives up the locks of the paused machine's disks, for whoever runs the guest next; a later run takes
    /// them again.
    ///
    /// # Errors
    /// It runs, or a lock cannot be given up.
    pub fn release(&mut self) -> Result<(), MachineError> {
        if self.life == Life::Running {
            return Err(self.wrong_state("paused"));
        }
        Ok(self.board.release()?)
    }

    /// Gives the machine a state; it can run afterwards. May be repeated while it has not run.
    ///
    /// # Errors
    /// The state is damaged, is of another machine, or has something that this version or this
    /// host's KVM does not take. Checks of the whole state come before the first change.
    pub fn load(&mut self, state: &[u8]) -> Result<Loaded, MachineError> {
        let began = Instant::now();
        if self.life == Life::Running || self.shared.exit().is_some() {
            return Err(self.wrong_state("empty or paused"));
        }
        let mut state = MachineState::parse(state, &self.config, &self.board)?;
        let mut vcpus = std::mem::take(&mut state.vcpus).into_iter();
        let replies = self
            .seats
            .ask(|_| Order::Load(Box::new(vcpus.next().expect("one for each vCPU"))))?;
        let mut refused_msrs = Vec::new();
        for reply in replies {
            refused_msrs.extend(reply.into_loaded()?);
        }
        state.load(&self.vm, &self.board)?;
        self.shared.set_clock(state.clock_nanos);
        self.life = Life::Paused;
        Ok(Loaded {
            took: began.elapsed(),
            refused_msrs,
        })
    }

    /// Dirty tracking on: every page counts as dirty until it is cleared.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn start_tracking(&mut self) -> Result<(), MachineError> {
        self.shared.rule.forget_held();
        self.board.devices().disk_writes().forget_all();
        Ok(self.vm.start_tracking()?)
    }

    /// Dirty tracking off. The guest is let go.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn stop_tracking(&mut self) -> Result<(), MachineError> {
        self.let_go();
        Ok(self.vm.stop_tracking()?)
    }

    /// Follows from now on what is written to the machine's disks: a harvest tells that, too; and waits where
    /// pages of them are marked as missing. What is lent for it: two bitmaps with a bit for each page from
    /// that of the first disk on, of what was written and of what is missing; where is read which of these are
    /// needed; each disk's file.
    ///
    /// # Errors
    /// It has no disks, or the kernel has no memory for the bitmap.
    pub fn lend_disks(&self) -> Result<Vec<BorrowedFd<'_>>, MachineError> {
        let numbering = self
            .config
            .numbering()
            .filter(|all| !all.disks().is_empty());
        let numbering = numbering.ok_or(MachineError::NoDisks)?;
        let devices = self.board.devices();
        let written = devices.disk_writes().follow(&numbering)?.file();
        let [missing, asked] = devices.missing_on_disks().lend(&numbering)?;
        let files = devices.disk_files();
        Ok([written, missing, asked].into_iter().chain(files).collect())
    }

    /// Slows the guest's writers down from now on.
    ///
    /// # Errors
    /// Its writes are not tracked, or nobody knows which vCPU writes.
    pub fn throttle(&mut self, throttle: Throttle) -> Result<(), MachineError> {
        if !self.vm.is_tracking() {
            return Err(MachineError::Throttle("its writes are not tracked"));
        }
        if !throttle::is_sound(throttle) {
            return Err(MachineError::Throttle("it would not get on at all"));
        }
        let needs_vcpus = matches!(throttle, Throttle::PerVcpu { .. });
        if needs_vcpus && !self.config.dirty_tracker.knows_vcpus() {
            return Err(MachineError::Throttle(
                "its dirty tracker does not tell which vCPU writes",
            ));
        }
        self.shared.throttle(Some(throttle));
        Ok(())
    }

    /// Slows the guest's writers down, or lets them go.
    ///
    /// # Errors
    /// As [`Machine::throttle`].
    pub fn set_throttle(&mut self, throttle: Option<Throttle>) -> Result<(), MachineError> {
        match throttle {
            Some(throttle) => self.throttle(throttle),
            None => {
                self.let_go();
                Ok(())
            }
        }
    }

    /// Lets the guest write as fast as it can.
    pub fn let_go(&mut self) {
        self.shared.throttle(None);
    }

    /// How fast the guest may write; `None` if as fast as it can.
    pub fn throttled(&self) -> Option<Throttle> {
        self.shared.rule.throttle()
    }

    /// What the vCPUs have done since tracking began.
    pub fn writers(&self) -> Writers {
        let pages = self.vm.dirtied().into_iter().map(PageCount::new);
        Writers {
            pages: pages.collect(),
            held: self.shared.rule.held(),
        }
    }

    /// Reads the dirty log into the shared bitmap, and that of disks that are lent into theirs; clears nothing.
    ///
    /// # Errors
    /// Tracking is off, or KVM refuses.
    pub fn harvest(&self) -> Result<(), MachineError> {
        self.board.devices().disk_writes().harvest();
        Ok(self.vm.read_dirty_pages(&self.bitmap)?)
    }

    /// Clears what the last harvest found within `range` (of whole words of the log, or to the end
    /// of the memory; or of disks that are lent), and tracks those pages anew; but not those that are
    /// `kept`, which every later harvest finds.
    ///
    /// # Errors
    /// Tracking is off, the range is not one, what is kept is not within it, or KVM refuses.
    pub fn clear(&self, range: PageRange, kept: &[PageRange]) -> Result<(), MachineError> {
        if self.board.devices().disk_writes().clear(range, kept) {
            return Ok(());
        }
        Ok(self.vm.clear_dirty_pages(&self.bitmap, range, kept)?)
    }

    /// Where somebody can watch that line of the guest's console and type; `None` for a micro guest.
    pub fn terminal(&self, line: ConsoleLine) -> Option<Terminal> {
        self.board.terminal(line)
    }

    /// Sends heartbeats to somebody else, or to nobody.
    ///
    /// # Errors
    /// There is no socket for that address.
    pub fn set_observer(&mut self, address: Option<SocketAddr>) -> Result<(), MachineError> {
        let no_observer = |source| MachineError::Io {
            action: "send heartbeats to the observer",
            source,
        };
        self.board.set_observer(address).map_err(no_observer)?;
        self.config.observer = address;
        Ok(())
    }

    /// What has come from outside for the guest, which runs elsewhere now; empty if that is nothing.
    ///
    /// # Errors
    /// A device is stuck.
    pub fn take_strays(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.board.take_strays()?)
    }

    /// Gives the guest what has come for it where it was before.
    ///
    /// # Errors
    /// A device is stuck.
    pub fn give_strays(&self, strays: &[u8]) -> Result<(), MachineError> {
        Ok(self.board.give_strays(strays)?)
    }

    /// Has the guest give up that much memory by its balloon, or take back what is above.
    ///
    /// # Errors
    /// It has no balloon, its memory cannot be given up, that is more than it has, or the device is stuck.
    pub fn set_balloon(&self, target: ByteCount) -> Result<(), MachineError> {
        let (devices, pages) = self.balloon_of(target)?;
        Ok(devices.set_balloon(pages)?)
    }

    /// Has the guest give up so much memory at least, until it has arrived elsewhere or this is called with
    /// zero, which every machine takes.
    ///
    /// # Errors
    /// As [`Machine::set_balloon`].
    pub fn lend_balloon(&self, least: ByteCount) -> Result<(), MachineError> {
        if least == ByteCount::new(0) {
            let devices = self.board.with_balloon();
            return Ok(devices.map_or(Ok(()), |devices| devices.lend_balloon(PageCount::ZERO))?);
        }
        let (devices, pages) = self.balloon_of(least)?;
        Ok(devices.lend_balloon(pages)?)
    }

    /// Whose balloon can hold so much.
    fn balloon_of(&self, target: ByteCount) -> Result<(&Devices, PageCount), MachineError> {
        let devices = self.board.with_balloon();
        let devices = devices.ok_or(MachineError::Balloon("a micro guest has none"))?;
        if !self.vm.reclaim().is_possible() {
            let why = "huge pages are reserved for the guest and stay so";
            return Err(MachineError::Balloon(why));
        }
        if target >= self.config.memory {
            return Err(MachineError::Balloon("it would hold all of the memory"));
        }
        Ok((devices, PageCount::new(target.get() / PAGE_SIZE)))
    }

    /// What the guest has given up; `None` if it has no balloon.
    pub fn balloon(&self) -> Option<BalloonInfo> {
        Some(self.board.with_balloon()?.balloon())
    }

    /// Tells the micro guest to do something; the command's number, `None` if it is none.
    pub fn command(&self, kind: CommandKind) -> Option<u32> {
        self.board.command(kind)
    }

    /// Ends the machine, whose process is about to end. Who waits for a page that never comes is not waited
    /// for, and sees none: what holds such accesses back stays until the process is gone.
    pub fn end(self) {
        self.board.begin_rest();
        let Self { seats, faults, .. } = self;
        drop(seats);
        std::mem::forget(faults);
    }

    fn guest_khz(&self) -> u32 {
        self.config.tsc_khz.expect("set when the machine was made")
    }

    fn need(&self, life: Life, wanted: &'static str) -> Result<(), MachineError> {
        match self.shared.exit() {
            Some(reason) => Err(MachineError::Exited(reason)),
            None if self.life == life => Ok(()),
            None => Err(self.wrong_state(wanted)),
        }
    }

    fn wrong_state(&self, wanted: &'static str) -> MachineError {
        match self.shared.exit() {
            Some(reason) => MachineError::Exited(reason),
            None => MachineError::WrongState {
                state: self.run_state(),
                wanted,
            },
        }
    }
}

fn make_board(
    config: &mut VmConfig,
    host: &str,
    vm: &Vm,
    memory: &Arc<SharedMemory>,
) -> Result<Board, MachineError> {
    Ok(match config.platform {
        Platform::Micro => {
            let wake = Arc::default();
            let devices = Devices::make(config, vm, Some(&wake))?;
            let memory = Arc::clone(memory);
            let device = MicroDevice::new(config, host, memory, devices, wake);
            Board::Micro(Arc::new(device))
        }
        Platform::Pc => {
            let line = vm.interrupt_line(pc::SERIAL_LINE)?;
            let devices = Devices::make(config, vm, None)?;
            let pc = Pc::new(&config.name, line, devices).map_err(DeviceError::Start)?;
            Board::Pc(Arc::new(pc))
        }
    })
}

/// Sets up each vCPU as far as that does not depend on what will run on it.
fn make_threads(
    kvm: &Kvm,
    config: &VmConfig,
    host_khz: u32,
    vcpus: Vec<Vcpu>,
    board: &Board,
    shared: &Arc<Shared>,
) -> Result<Vec<VcpuThread>, MachineError> {
    let neutral = config.cpuid.as_deref().expect("set by the caller");
    let guest_khz = config.tsc_khz.expect("set by the caller");
    let is_scaled = !is_same_rate(host_khz, guest_khz);
    let mut plan: Option<Arc<MsrPlan>> = None;
    let mut threads = Vec::new();
    for (index, vcpu) in (0..).zip(vcpus) {
        if is_scaled {
            vcpu.set_tsc_khz(guest_khz)?;
        }
        let table = cpu::vcpu_table(neutral, index, config.vcpus);
        vcpu.set_cpuid(&table)?;
        let plan = match &plan {
            Some(plan) => Arc::clone(plan),
            // What a kernel lets one read and write depends on the CPU features, which are set now.
            None => Arc::clone(plan.insert(Arc::new(MsrPlan::probe(kvm, &vcpu)?))),
        };
        threads.push(VcpuThread {
            index,
            vcpu,
            ports: board.ports(index),
            shared: Arc::clone(shared),
            fixed: vcpu_state::Fixed {
                cpuid: vcpu_state::encode_cpuid(&table),
                has_irqchip: config.irqchip,
                plan,
                host_khz,
                guest_khz,
                is_scaled,
            },
            resume: vcpu_state::Resume::default(),
        });
    }
    Ok(threads)
}
