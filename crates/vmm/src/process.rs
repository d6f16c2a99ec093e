//! The process that one machine has to itself: serves it on a Unix socket.
//!
//! One daemon controls it at a time, over one connection. The process outlives that daemon and the
//! next one finds it by its socket. What it does when the connection is lost is decided by the
//! record of who may run the guest (the engine's [`Phase`]): that record is kept here because this
//! process is what has to obey it.
//!
//! Invariants: the guest runs only in a phase that permits it; the phase changes only along legal
//! steps; a commit is recorded before the first instruction; the socket is gone when the process is.

mod console;

use crate::answer::{Loaded, RunState, Running, Status};
use crate::arrival_note;
use crate::boot::linux::LinuxImage;
use crate::config::VmConfig;
use crate::console::ConsoleLine;
use crate::machine::{Machine, MachineError, Snapshot};
use crate::protocol::{
    self, Boot, Faults, Frame, FrameError, PROTOCOL_VERSION, Refusal, Reply, Request, in_one_line,
};
use crate::state;
use crate::virtio::DeviceError;
pub use console::{console_socket, sockets_of};
use limosa_engine::Timestamp;
use limosa_engine::handover::{IllegalTransition, MigrationId, OnDaemonLost, Phase};
use limosa_engine::source::Writers;
use limosa_micro_abi::CommandKind;
use limosa_os::userfault::FaultPath;
use limosa_os::{process as os_process, socket, thread as os_thread};
use limosa_pages::{ByteCount, PageCount};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

/// How long a process without a machine waits for a daemon: one that does not come was killed
/// between starting us and connecting.
const ORPHAN_LIMIT: Duration = Duration::from_secs(30);
/// How long a daemon that slows the guest down may ask for nothing: one that hangs keeps its connection,
/// and would keep the guest slow. The slowest link carries a piece in less, and each piece is asked for.
const SLOWING_LIMIT: Duration = Duration::from_secs(150);
/// How long a daemon may take to send the rest of a frame.
const FRAME_LIMIT: Duration = Duration::from_secs(10);

/// What a VM process is started with.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where it listens. The name belongs to it alone.
    pub socket: PathBuf,
    /// What this host is called in heartbeats.
    pub host_tag: String,
    /// Where arrivals are noted before they run; without it the daemon alone remembers them.
    pub ledger: Option<PathBuf>,
    /// The process that started this one and is about to give it a machine. If it is gone before that, nobody will.
    pub daemon: Option<u32>,
}

/// Why a VM process could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot listen at {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Waiting for connections failed.
    #[error("cannot wait for requests")]
    Wait(#[source] io::Error),
}

/// Serves one machine until told to stop, or until there is nothing to serve any more.
///
/// # Errors
/// It cannot listen.
pub fn serve(options: &ServeOptions) -> Result<(), ServeError> {
    os_process::ignore_hangup();
    if let Err(error) = os_thread::set_precise_waits() {
        tracing::warn!(%error, "requests will be answered late");
    }
    let path = &options.socket;
    let listen = |source| ServeError::Listen {
        path: path.clone(),
        source,
    };
    let listener = socket::listen_privately(path).map_err(listen)?;
    let mut process = Process {
        options,
        listener: &listener,
        machine: None,
        phase: Phase::Running,
        has_guest: false,
        running: None,
    };
    let result = process.serve();
    process.remove_socket();
    // The machine goes with the process; vCPU threads are joined.
    tracing::info!("the VM process ends");
    result
}

struct Process<'a> {
    options: &'a ServeOptions,
    listener: &'a UnixListener,
    machine: Option<Machine>,
    phase: Phase,
    /// There is something to run: an image was booted, or the real state was loaded.
    has_guest: bool,
    /// When the commit made it run, to answer a repeated one.
    running: Option<Running>,
}

/// What a request leads to.
enum Outcome {
    Reply(Reply, Vec<u8>),
    /// The same, with the machine's memory and bitmap, and what holds back accesses to missing pages.
    Lend(Reply),
    /// Lend disks.
    LendDisks,
    /// Reply and end.
    End,
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Transition(#[from] IllegalTransition),
    #[error("the guest must not run here: it is {0}")]
    MustNotRun(Phase),
    #[error("the guest may run here still: its record is '{0}'")]
    IsHere(Phase),
    #[error("there is no machine yet")]
    NoMachine,
    #[error("there is a machine already")]
    HasMachine,
    #[error("there is nothing to run: no state was loaded")]
    NoGuest,
    #[error("a machine begins running with an image, or preparing without one")]
    Beginning,
    #[error(
        "the daemon speaks version {0} of the protocol, this process speaks {PROTOCOL_VERSION}"
    )]
    Version(u32),
    #[error("a state is loaded while the guest is preparing, now it is {0}")]
    MustNotLoad(Phase),
    /// It may have happened. No answer is the only true one.
    #[error("it is not known whether the guest runs")]
    Unknown(#[source] MachineError),
    #[error("command {0} is not known")]
    Command(u8),
    #[error("only micro guests take commands")]
    NotMicro,
    #[error("a kernel comes with one or two files, not {0}")]
    Files(usize),
    #[error("{0} are still missing here: the guest cannot move on before they have arrived")]
    PagesMissing(PageCount),
    #[error("the guest cannot run with pages missing: {0}")]
    NotArmed(String),
    #[error("it cannot be noted in {ledger} that the guest runs here")]
    NotNoted {
        ledger: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What a machine is to boot, with all that belongs to it.
enum Image {
    Nothing,
    Micro(Vec<u8>),
    Linux(LinuxImage),
}

impl Image {
    fn of(boot: Boot, bytes: Vec<u8>, descriptors: Vec<OwnedFd>) -> Result<Self, RequestError> {
        match boot {
            Boot::Nothing => Ok(Self::Nothing),
            Boot::Micro => Ok(Self::Micro(bytes)),
            Boot::Linux { cmdline } => {
                let files = descriptors.len();
                let mut descriptors = descriptors.into_iter().map(File::from);
                let (Some(kernel), initrd, None) =
                    (descriptors.next(), descriptors.next(), descriptors.next())
                else {
                    return Err(RequestError::Files(files));
                };
                Ok(Self::Linux(LinuxImage {
                    kernel,
                    initrd,
                    cmdline,
                }))
            }
        }
    }
}

impl RequestError {
    const fn refusal(&self) -> Refusal {
        match self {
            Self::Transition(_) | Self::MustNotRun(_) | Self::MustNotLoad(_) | Self::IsHere(_) => {
                Refusal::Phase
            }
            Self::Machine(MachineError::Exited(_)) => Refusal::Exited,
            _ => Refusal::Other,
        }
    }
}

impl Process<'_> {
    fn serve(&mut self) -> Result<(), ServeError> {
        let began = Instant::now();
        let mut daemon: Option<UnixStream> = None;
        let mut heard = Instant::now();
        loop {
            let is_orphan = self.machine.is_none() && daemon.is_none();
            let limit = (is_orphan || self.is_slowed()).then_some(1000);
            let sources = [
                Some(self.listener as &dyn AsFd),
                daemon.as_ref().map(|daemon| daemon as &dyn AsFd),
            ];
            let [knocks, asks] = socket::wait_readable(sources, limit).map_err(ServeError::Wait)?;
            if asks {
                heard = Instant::now();
            } else if heard.elapsed() > SLOWING_LIMIT {
                self.let_go();
            }
            if asks && let Some(connection) = &daemon {
                match self.answer(connection) {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(error) => {
                        tracing::info!(error = in_one_line(&error), "the daemon is gone");
                        daemon = None;
                        if !self.go_on_alone() {
                            return Ok(());
                        }
                    }
                }
            }
            // After the old daemon's end was seen, so that its successor finds the place free.
            if knocks {
                self.accept(&mut daemon);
            }
            if is_orphan && !knocks && (began.elapsed() > ORPHAN_LIMIT || self.has_lost_daemon()) {
                tracing::warn!("no daemon has come for this process");
                return Ok(());
            }
        }
    }

    /// Whether who started this process has ended.
    fn has_lost_daemon(&self) -> bool {
        let parent = std::os::unix::process::parent_id();
        self.options.daemon.is_some_and(|daemon| daemon != parent)
    }

    fn is_slowed(&self) -> bool {
        self.machine
            .as_ref()
            .is_some_and(|machine| machine.throttled().is_some())
    }

    /// The daemon that slows the guest down keeps silent.
    fn let_go(&mut self) {
        if self.is_slowed()
            && let Some(machine) = &mut self.machine
        {
            tracing::warn!("the daemon is silent: the guest is let go");
            machine.let_go();
        }
    }

    fn accept(&self, daemon: &mut Option<UnixStream>) {
        let connection = match self.listener.accept() {
            Ok((connection, _)) => connection,
            Err(error) => return tracing::warn!(%error, "a daemon could not connect"),
        };
        let limits = connection
            .set_read_timeout(Some(FRAME_LIMIT))
            .and_then(|()| connection.set_write_timeout(Some(FRAME_LIMIT)));
        if let Err(error) = limits {
            return tracing::warn!(%error, "a daemon could not connect");
        }
        if daemon.is_none() {
            *daemon = Some(connection);
            return;
        }
        let message = "another daemon controls this machine".to_owned();
        let reply = Reply::Refused {
            why: Refusal::Busy,
            message,
        };
        if let Err(error) = protocol::send(&connection, &reply, &[], &[]) {
            tracing::debug!(%error, "a second daemon did not wait for its refusal");
        }
    }

    /// Answers one request; false if it was the last one.
    fn answer(&mut self, daemon: &UnixStream) -> Result<bool, FrameError> {
        let frame: Frame<Request> = protocol::receive(daemon)?;
        let outcome = match self.carry_out(frame) {
            Ok(outcome) => outcome,
            Err(error @ RequestError::Unknown(_)) => {
                tracing::error!(error = in_one_line(&error), "no answer");
                return Err(FrameError::Closed);
            }
            Err(error) => {
                let (why, message) = (error.refusal(), in_one_line(&error));
                tracing::warn!(message, "request refused");
                Outcome::Reply(Reply::Refused { why, message }, Vec::new())
            }
        };
        match outcome {
            Outcome::Reply(reply, bytes) => protocol::send(daemon, &reply, &bytes, &[])?,
            Outcome::Lend(reply) => {
                protocol::send(daemon, &reply, &[], &self.lent())?;
            }
            Outcome::LendDisks => self.lend_disks(daemon)?,
            Outcome::End => {
                // Before the reply, so that the name is free when the daemon hears it.
                self.remove_socket();
                if let Some(machine) = self.machine.take() {
                    machine.end();
                }
                protocol::send(daemon, &Reply::Done, &[], &[])?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn lend_disks(&self, daemon: &UnixStream) -> Result<(), FrameError> {
        let lent = self.machine.as_ref().ok_or(MachineError::NoDisks);
        let lent = lent.and_then(Machine::lend_disks);
        match lent {
            Ok(lent) => protocol::send(daemon, &Reply::Done, &[], &lent)?,
            Err(error) => {
                let (why, message) = (Refusal::Other, in_one_line(&error));
                protocol::send(daemon, &Reply::Refused { why, message }, &[], &[])?;
            }
        }
        Ok(())
    }

    fn lent(&self) -> Vec<BorrowedFd<'_>> {
        let Some(machine) = &self.machine else {
            return Vec::new();
        };
        let mut lent = vec![machine.memory().file(), machine.bitmap().file()];
        if let Ok(held) = machine.faults() {
            lent.extend([held.gate.descriptor(), held.missing.file()]);
        }
        lent
    }

    fn carry_out(&mut self, frame: Frame<Request>) -> Result<Outcome, RequestError> {
        self.check_complete(&frame.message)?;
        let reply = match frame.message {
            Request::Attach { version } if version != PROTOCOL_VERSION => {
                return Err(RequestError::Version(version));
            }
            Request::Attach { .. } => return Ok(Outcome::Lend(self.attached())),
            Request::Create {
                config,
                phase,
                boot,
            } => {
                let image = Image::of(boot, frame.bytes, frame.descriptors)?;
                self.create(*config, phase, image)?;
                return Ok(Outcome::Lend(self.attached()));
            }
            Request::Run => Reply::Running(self.run()?),
            Request::Stop => return Ok(Outcome::End),
            Request::Status => Reply::Status(Status {
                phase: self.phase.clone(),
                run_state: self.run_state(),
                missing: self.machine.as_ref().and_then(Machine::missing),
                throttle: self.machine.as_ref().and_then(Machine::throttled),
                balloon: self.machine.as_ref().and_then(Machine::balloon),
            }),
            Request::Inspect => Reply::Sections(self.inspect()?),
            Request::StartTracking => done(self.machine()?.start_tracking())?,
            Request::StopTracking => done(self.machine()?.stop_tracking())?,
            Request::LendDisks => return Ok(Outcome::LendDisks),
            Request::Harvest => Reply::Harvested(self.harvest()?),
            Request::Throttle { throttle } => done(self.machine()?.set_throttle(throttle))?,
            Request::Clear { range, kept } => done(self.machine()?.clear(range, &kept))?,
            Request::PauseAndSave { harvest } => {
                return Ok(saved(self.pause(harvest)?));
            }
            Request::Rehearse => {
                return Ok(saved(self.save_as_it_runs()?));
            }
            Request::Load { is_rehearsal } => Reply::Loaded(self.load(&frame.bytes, is_rehearsal)?),
            Request::Record { phase } => {
                self.record(phase)?;
                Reply::Done
            }
            Request::CommitAndRun {
                id,
                stopped_at,
                keeps_faults,
            } => Reply::Running(self.commit_and_run(id, stopped_at, keeps_faults)?),
            Request::Disarm => done(self.machine()?.disarm())?,
            Request::Pause => {
                self.pause(false)?;
                Reply::Done
            }
            Request::SetObserver { address } => done(self.machine()?.set_observer(address))?,
            Request::TakeStrays => return Ok(Outcome::Reply(Reply::Done, self.take_strays()?)),
            Request::GiveStrays => done(self.machine()?.give_strays(&frame.bytes))?,
            Request::SetBalloon { target } => done(self.machine()?.set_balloon(target))?,
            Request::LendBalloon { least } => done(self.machine()?.lend_balloon(least))?,
            Request::Command { kind } => {
                let command = self.machine()?.command(command_kind(kind)?);
                Reply::Sequence(command.ok_or(RequestError::NotMicro)?)
            }
        };
        Ok(Outcome::Reply(reply, Vec::new()))
    }

    fn load(&mut self, state: &[u8], is_rehearsal: bool) -> Result<Loaded, RequestError> {
        if !matches!(self.phase, Phase::Preparing { .. }) {
            return Err(RequestError::MustNotLoad(self.phase.clone()));
        }
        self.has_guest = false;
        let loaded = self.machine()?.load(state)?;
        self.has_guest = !is_rehearsal;
        Ok(loaded)
    }

    /// What came for a guest that runs elsewhere: nobody else may get it.
    fn take_strays(&mut self) -> Result<Vec<u8>, RequestError> {
        if !matches!(self.phase, Phase::Committed { .. }) {
            return Err(RequestError::IsHere(self.phase.clone()));
        }
        Ok(self.machine()?.take_strays()?)
    }

    fn attached(&self) -> Reply {
        Reply::Attached {
            config: self
                .machine
                .as_ref()
                .map(|machine| machine.config().clone()),
            phase: self.phase.clone(),
            run_state: self.run_state(),
            faults: self.faults(),
        }
    }

    fn faults(&self) -> Faults {
        let held = match &self.machine {
            Some(machine) => machine.faults(),
            None => Err("there is no machine yet"),
        };
        match held {
            Ok(held) => Faults::Held {
                base: held.gate.base(),
                is_continued: held.gate.path() == FaultPath::Continue,
            },
            Err(why) => Faults::NotHeld {
                why: why.to_owned(),
            },
        }
    }

    /// A guest whose pages are still arriving does not move on: its next target would be given pages
    /// that are not there. It can be paused, run and ended.
    fn check_complete(&self, request: &Request) -> Result<(), RequestError> {
        let begins_move = match request {
            Request::StartTracking | Request::PauseAndSave { .. } | Request::Rehearse => true,
            Request::Record { phase } => matches!(phase, Phase::Offered { .. }),
            _ => false,
        };
        let is_here = self.running.is_some();
        match self.machine.as_ref().and_then(Machine::missing) {
            Some(missing) if begins_move && is_here => Err(RequestError::PagesMissing(missing)),
            _ => Ok(()),
        }
    }

    fn create(&mut self, config: VmConfig, phase: Phase, image: Image) -> Result<(), RequestError> {
        if self.machine.is_some() {
            return Err(RequestError::HasMachine);
        }
        match (&phase, &image) {
            (Phase::Running, Image::Micro(_) | Image::Linux(_))
            | (Phase::Preparing { .. }, Image::Nothing) => {}
            _ => return Err(RequestError::Beginning),
        }
        let mut machine = Machine::create(config, &self.options.host_tag)?;
        match image {
            Image::Micro(elf) => machine.boot(&elf)?,
            Image::Linux(mut image) => machine.boot_linux(&mut image)?,
            Image::Nothing => machine.arm(),
        }
        for line in ConsoleLine::ALL {
            if let Some(terminal) = machine.terminal(line)
                && let Err(error) = console::start(&self.options.socket, line, terminal)
            {
                tracing::warn!(%error, ?line, "nobody can watch the console");
            }
        }
        self.has_guest = phase == Phase::Running;
        let config = machine.config();
        tracing::info!(vm = config.name, memory = %config.memory, vcpus = config.vcpus, %phase, "machine made");
        self.machine = Some(machine);
        self.phase = phase;
        Ok(())
    }

    fn run(&mut self) -> Result<Running, RequestError> {
        if !self.phase.may_run() {
            return Err(RequestError::MustNotRun(self.phase.clone()));
        }
        if !self.has_guest {
            return Err(RequestError::NoGuest);
        }
        Ok(self.machine()?.run()?)
    }

    fn harvest(&mut self) -> Result<Writers, RequestError> {
        let machine = self.machine()?;
        machine.harvest()?;
        Ok(machine.writers())
    }

    /// Pauses for good, and saves. The guest is let go: whoever runs it on has no reason to slow it. So are
    /// its disks: that may be another host.
    fn pause(&mut self, harvest: bool) -> Result<Snapshot, RequestError> {
        let machine = self.machine()?;
        let snapshot = machine.pause_and_save(harvest);
        machine.let_go();
        let snapshot = snapshot?;
        machine.release()?;
        Ok(snapshot)
    }

    /// Saves, and runs on if it ran.
    fn save_as_it_runs(&mut self) -> Result<Snapshot, RequestError> {
        let ran = self.run_state() == RunState::Running;
        let machine = self.machine()?;
        let snapshot = machine.pause_and_save(false);
        // Whatever came of the save, a guest that ran goes on.
        if ran && machine.run_state() == RunState::Paused {
            machine.run()?;
        }
        Ok(snapshot?)
    }

    fn inspect(&mut self) -> Result<Vec<crate::answer::SectionInfo>, RequestError> {
        let snapshot = self.save_as_it_runs()?;
        Ok(state::list(&snapshot.sections).map_err(MachineError::from)?)
    }

    fn record(&mut self, phase: Phase) -> Result<(), RequestError> {
        self.phase.check(&phase)?;
        if self.phase != phase {
            tracing::info!(from = %self.phase, to = %phase, "phase recorded");
            self.phase = phase;
        }
        Ok(())
    }

    fn commit_and_run(
        &mut self,
        id: MigrationId,
        stopped_at: Timestamp,
        keeps_faults: bool,
    ) -> Result<Running, RequestError> {
        let arrived = Phase::Arrived { id };
        if let (true, Some(running)) = (self.phase == arrived, self.running) {
            return Ok(running);
        }
        self.phase.check(&arrived)?;
        if !self.has_guest {
            return Err(RequestError::NoGuest);
        }
        // What can be refused comes before the record, and then nothing has run.
        self.settle_faults(keeps_faults)?;
        let ready = self.machine()?.get_ready(stopped_at)?;
        self.note_arrival(id, keeps_faults)?;
        // Recorded before the first instruction: from here on the source must never run it again.
        let from = std::mem::replace(&mut self.phase, arrived);
        let running = self
            .machine()?
            .start(ready)
            .map_err(RequestError::Unknown)?;
        self.running = Some(running);
        tracing::info!(%from, to = %self.phase, "committed and running");
        Ok(running)
    }

    fn note_arrival(&self, id: MigrationId, is_filling: bool) -> Result<(), RequestError> {
        let Some(ledger) = &self.options.ledger else {
            return Ok(());
        };
        arrival_note::append(ledger, id, is_filling).map_err(|source| RequestError::NotNoted {
            ledger: ledger.clone(),
            source,
        })
    }

    /// Before the first instruction: either whoever touches a missing page is held back, or nobody.
    fn settle_faults(&mut self, keeps_faults: bool) -> Result<(), RequestError> {
        let machine = self.machine()?;
        if !keeps_faults {
            return Ok(machine.disarm()?);
        }
        if let Err(why) = machine.faults() {
            return Err(RequestError::NotArmed(why.to_owned()));
        }
        Ok(machine.hide_pages()?)
    }

    /// The daemon is gone; false if there is nothing to go on with.
    fn go_on_alone(&mut self) -> bool {
        let Some(machine) = &mut self.machine else {
            return false;
        };
        // Whoever slowed it down, or shrank it to be moved, cannot let it go any more.
        machine.let_go();
        if let Err(error) = machine.lend_balloon(ByteCount::new(0)) {
            tracing::warn!(error = in_one_line(&error), "the guest stays small");
        }
        match self.phase.on_daemon_lost() {
            OnDaemonLost::Exit => return false,
            OnDaemonLost::Stay => {}
            OnDaemonLost::ResumeHere => {
                tracing::warn!(phase = %self.phase, "the migration is given up, the guest runs on here");
                self.phase = Phase::Running;
                self.resume_alone();
            }
        }
        true
    }

    fn resume_alone(&mut self) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        if machine.run_state() == RunState::Paused
            && let Err(error) = run_when_free(machine)
        {
            tracing::error!(error = in_one_line(&error), "the guest does not run on");
        }
        // Nobody reads the log any more, and it slows the guest down.
        if let Err(error) = machine.stop_tracking() {
            tracing::warn!(error = in_one_line(&error), "dirty tracking stays on");
        }
    }

    fn machine(&mut self) -> Result<&mut Machine, RequestError> {
        self.machine.as_mut().ok_or(RequestError::NoMachine)
    }

    fn run_state(&self) -> RunState {
        self.machine
            .as_ref()
            .map_or(RunState::Empty, Machine::run_state)
    }

    fn remove_socket(&self) {
        for path in sockets_of(&self.options.socket) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%error, path = %path.display(), "a socket stays behind");
                }
                _ => {}
            }
        }
    }
}

/// Runs a guest whose daemon is gone. That may have had locks on its disks, to copy them, which go with its last
/// descriptors: after the connection, perhaps.
fn run_when_free(machine: &mut Machine) -> Result<Running, MachineError> {
    const PATIENCE: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_millis(5);
    let end = Instant::now() + PATIENCE;
    loop {
        match machine.run() {
            Err(MachineError::Device(DeviceError::DiskBusy { .. })) if Instant::now() < end => {
                thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

fn saved(snapshot: Snapshot) -> Outcome {
    let Snapshot {
        sections,
        times,
        first_needed,
    } = snapshot;
    let reply = Reply::Saved {
        times,
        first_needed,
    };
    Outcome::Reply(reply, sections)
}

fn done(result: Result<(), MachineError>) -> Result<Reply, RequestError> {
    result?;
    Ok(Reply::Done)
}

pub(crate) const fn command_number(kind: CommandKind) -> u8 {
    match kind {
        CommandKind::None => 0,
        CommandKind::Sweep => 1,
        CommandKind::ClearStalls => 2,
        CommandKind::Finish => 3,
    }
}

const fn command_kind(number: u8) -> Result<CommandKind, RequestError> {
    match number {
        0 => Ok(CommandKind::None),
        1 => Ok(CommandKind::Sweep),
        2 => Ok(CommandKind::ClearStalls),
        3 => Ok(CommandKind::Finish),
        other => Err(RequestError::Command(other)),
    }
}
