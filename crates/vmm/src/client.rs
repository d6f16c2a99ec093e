//! The daemon's end of a VM process: [`VmHandle`].
//!
//! Requests are answered in order, one at a time; any thread may make one. The machine's memory and
//! dirty bitmap are mapped here as well, after their seals were checked, so pages are read and
//! written without asking. A request that gets no answer in time ends the connection, since a late
//! answer would be taken for that of the next one.

pub use crate::answer::Status;
mod devices;
mod disks;

use crate::answer::{Loaded, RunState, Running, Saved, SectionInfo};
use crate::boot::linux::LinuxImage;
use crate::config::VmConfig;
use crate::protocol::{
    self, Boot, FIRST_NEEDED_MAX, Faults, Frame, FrameError, PROTOCOL_VERSION, Refusal, Reply,
    Request, in_one_line,
};
use crate::state::STATE_BYTES_MAX;
use disks::DiskWrites;
pub use disks::LentDisks;
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::source::Writers;
use limosa_engine::throttle::Throttle;
use limosa_os::bitmap::BitmapError;
use limosa_os::dirty::TrackerKind;
use limosa_os::process::Process;
use limosa_os::userfault::{FaultPath, InstallError, PageInstaller};
use limosa_os::{MemoryError, SharedBitmap, SharedMemory, socket};
use limosa_pages::{PageRange, PageSet, Pfn};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long an answer may take. A pause may take 5 s before the process gives it up by itself;
/// clearing the log of 128 GiB takes 1 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// The same for a process that had not answered in that time before.
const ANSWER_AGAIN_LIMIT: Duration = Duration::from_secs(1);

/// Connects; answers and requests may take so long.
fn dial(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(limit))?;
    socket.set_write_timeout(Some(limit))?;
    Ok(socket)
}

/// Why a VM process did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Nobody listens there.
    #[error("no VM process answers at {path}")]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process was gone before it could be asked.
    #[error("the VM process is gone: {0}")]
    Gone(String),
    /// The connection ended or broke before the answer; the process may be gone.
    #[error("the VM process does not answer: {0}")]
    Lost(String),
    /// What it said makes no sense.
    #[error("the VM process answered with something else than was asked for")]
    Foreign,
    /// Its memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its disks cannot be opened here.
    #[error("its disks cannot be opened")]
    Disk(#[source] io::Error),
    /// Its dirty bitmap cannot be used.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// What it lends for missing pages cannot be used.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The record of who may run the guest forbids it.
    #[error("{0}")]
    Phase(String),
    /// The guest has ended.
    #[error("{0}")]
    Exited(String),
    /// Another daemon controls it.
    #[error("{0}")]
    Busy(String),
    /// It refused for another reason.
    #[error("{0}")]
    Refused(String),
}

/// What a VM process said about itself when it was found.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The machine's name, if there is a machine.
    pub name: Option<String>,
    /// The machine's configuration, if there is a machine.
    pub config: Option<VmConfig>,
    /// Who may run the guest.
    pub phase: Phase,
    /// Where the machine is in its life.
    pub run_state: RunState,
    /// The process.
    pub pid: u32,
    /// Why the guest cannot run there with pages missing; `None` if it can, and then there is
    /// [`VmHandle::installer`].
    pub not_armed: Option<String>,
}

/// A VM process. Dropping it leaves the process to its own rules for a lost daemon.
#[derive(Debug)]
pub struct VmHandle {
    /// Where the process listens.
    path: PathBuf,
    process: Process,
    connection: Mutex<Option<Connection>>,
    attached: Mutex<Attached>,
    lent: OnceLock<Lent>,
    /// Once disks are followed.
    disk_writes: OnceLock<DiskWrites>,
    installer: Mutex<Option<Arc<PageInstaller>>>,
}

/// A connection that ends when it is dropped, even if a child that was just forked holds it, too.
#[derive(Debug)]
struct Connection(UnixStream);

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown(Shutdown::Both) {
            tracing::trace!(%error, "the VM process had closed the connection");
        }
    }
}

#[derive(Debug)]
struct Lent {
    config: VmConfig,
    memory: Arc<SharedMemory>,
    bitmap: SharedBitmap,
}

impl VmHandle {
    /// Takes control of the VM process that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there, somebody else controls it, or it lends memory that cannot be trusted.
    pub fn connect(path: &Path) -> Result<Self, VmError> {
        let connect = |source| VmError::Connect {
            path: path.to_owned(),
            source,
        };
        let connection = dial(path, ANSWER_LIMIT).map_err(connect)?;
        // The process answers on this connection afterwards, so it is the one that has this number.
        let pid = socket::peer_pid(&connection).map_err(connect)?;
        let process = Process::open(pid).map_err(connect)?;
        let nothing = Attached {
            name: None,
            config: None,
            phase: Phase::Running,
            run_state: RunState::Empty,
            pid,
            not_armed: None,
        };
        let handle = Self {
            path: path.to_owned(),
            process,
            connection: Mutex::new(Some(Connection(connection))),
            attached: Mutex::new(nothing),
            lent: OnceLock::new(),
            disk_writes: OnceLock::new(),
            installer: Mutex::new(None),
        };
        let frame = handle.exchange(
            &Request::Attach {
                version: PROTOCOL_VERSION,
            },
            &[],
        )?;
        handle.attach(frame)?;
        Ok(handle)
    }

    /// The same, with a process that has just been started and does not listen yet.
    ///
    /// # Errors
    /// As [`VmHandle::connect`], after having tried for that long.
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self, VmError> {
        const PAUSE: Duration = Duration::from_millis(2);
        let began = Instant::now();
        loop {
            match Self::connect(path) {
                Err(VmError::Connect { .. }) if began.elapsed() < patience => thread::sleep(PAUSE),
                other => return other,
            }
        }
    }

    /// What it said when it was found, or when its machine was made.
    pub fn attached(&self) -> Attached {
        self.attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The process.
    pub const fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Makes the machine: booted from an image, in [`Phase::Running`], or empty, in
    /// [`Phase::Preparing`]. It does not run yet.
    ///
    /// # Errors
    /// There is one, it is not possible here, or the image is no micro guest's.
    pub fn create(
        &self,
        config: &VmConfig,
        elf: Option<&[u8]>,
        phase: Phase,
    ) -> Result<(), VmError> {
        let request = Request::Create {
            config: Box::new(config.clone()),
            phase,
            boot: if elf.is_some() {
                Boot::Micro
            } else {
                Boot::Nothing
            },
        };
        let frame = self.exchange(&request, elf.unwrap_or_default())?;
        self.attach(frame)
    }

    /// Makes the machine and boots a stock kernel in it. It does not run yet.
    ///
    /// # Errors
    /// There is one, it is not possible here, or the kernel is none or does not fit.
    pub fn create_linux(&self, config: &VmConfig, image: &LinuxImage) -> Result<(), VmError> {
        let request = Request::Create {
            config: Box::new(config.clone()),
            phase: Phase::Running,
            boot: Boot::Linux {
                cmdline: image.cmdline.clone(),
            },
        };
        let files = [Some(&image.kernel), image.initrd.as_ref()];
        let files: Vec<BorrowedFd<'_>> = files.into_iter().flatten().map(AsFd::as_fd).collect();
        let frame = self.exchange_with(&request, &[], &files)?;
        self.attach(frame)
    }

    /// Runs the booted machine for the first time.
    ///
    /// # Errors
    /// It is not paused, or its phase forbids it.
    pub fn run(&self) -> Result<Running, VmError> {
        match self.ask(&Request::Run)? {
            Reply::Running(running) => Ok(running),
            _ => Err(self.foreign()),
        }
    }

    /// Runs the paused machine on.
    ///
    /// # Errors
    /// It is not paused, or its phase forbids it.
    pub fn resume(&self) -> Result<Running, VmError> {
        self.run()
    }

    /// Ends the machine and its process. A process that does not answer is killed.
    ///
    /// # Errors
    /// It could not be ended.
    pub fn stop(&self) -> Result<(), VmError> {
        /// A machine of many gigabytes takes some time to give them back.
        const END_LIMIT_MS: u32 = 10_000;
        let answer = self.ask(&Request::Stop);
        if !matches!(answer, Ok(Reply::Done)) && self.process.kill() {
            tracing::warn!(
                pid = self.pid(),
                "a VM process that did not answer was killed"
            );
        }
        *self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        match self.process.wait_end(END_LIMIT_MS) {
            Ok(true) => Ok(()),
            Ok(false) => Err(VmError::Lost("it does not end".to_owned())),
            Err(error) => Err(VmError::Lost(error.to_string())),
        }
    }

    /// How the machine does.
    ///
    /// # Errors
    /// The process does not answer.
    pub fn status(&self) -> Result<Status, VmError> {
        match self.ask(&Request::Status)? {
            Reply::Status(status) => Ok(status),
            _ => Err(self.foreign()),
        }
    }

    /// Whether the process has ended, without asking it.
    pub fn is_gone(&self) -> bool {
        // Should the kernel refuse to look, the next request tells.
        self.process.wait_end(0).unwrap_or(false)
    }

    /// Every part of the state that moves. Stops the guest for less than a millisecond.
    ///
    /// # Errors
    /// The machine has ended, or a part cannot be saved.
    pub fn inspect(&self) -> Result<Vec<SectionInfo>, VmError> {
        match self.ask(&Request::Inspect)? {
            Reply::Sections(sections) => Ok(sections),
            _ => Err(self.foreign()),
        }
    }

    /// What machine it is, for the host that is to take it: see [`VmConfig::from_description`].
    ///
    /// # Panics
    /// If the process has no machine.
    pub fn description(&self) -> Vec<u8> {
        self.lent().config.to_description()
    }

    /// Who notices which pages its guest writes.
    ///
    /// # Panics
    /// If the process has no machine.
    pub fn dirty_tracker(&self) -> TrackerKind {
        self.lent().config.dirty_tracker
    }

    /// The machine's memory, mapped here.
    ///
    /// # Panics
    /// If the process has no machine.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.lent().memory
    }

    /// Dirty tracking on: every page counts as dirty until it is cleared.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn start_tracking(&self) -> Result<(), VmError> {
        self.order(&Request::StartTracking)
    }

    /// Slows the guest's writers down from now on, or lets them go. A pause, the end of tracking and
    /// the loss of this connection let them go, too.
    ///
    /// # Errors
    /// Writes are not tracked, or nobody knows which vCPU writes.
    pub fn throttle(&self, throttle: Option<Throttle>) -> Result<(), VmError> {
        self.order(&Request::Throttle { throttle })
    }

    /// Dirty tracking off.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn stop_tracking(&self) -> Result<(), VmError> {
        self.order(&Request::StopTracking)
    }

    /// Overwrites `into` with the dirty log: what was written since it was cleared. Clears nothing. Says
    /// who wrote. The set is of the memory, or of the disks that are followed, too.
    ///
    /// # Errors
    /// Tracking is off.
    ///
    /// # Panics
    /// If the set is of another machine.
    pub fn harvest(&self, into: &mut PageSet) -> Result<Writers, VmError> {
        let writers = match self.ask(&Request::Harvest)? {
            Reply::Harvested(writers) => writers,
            _ => return Err(self.foreign()),
        };
        self.copy_log(into);
        Ok(writers)
    }

    /// Clears, of the pages in `range`, those that the last harvest found and that are not `kept`, and
    /// tracks them anew; those that are kept lie in the range and are found by every later harvest. The
    /// range begins at a multiple of 64 pages and ends at one or at the end of the memory. A page
    /// that is read after this returned is at least as new as all that no later harvest finds.
    ///
    /// # Errors
    /// Tracking is off, or the range is no such one.
    pub fn clear(&self, range: PageRange, kept: Vec<PageRange>) -> Result<(), VmError> {
        self.order(&Request::Clear { range, kept })
    }

    /// Pauses, saves, and reads the dirty log if asked: one request.
    ///
    /// # Errors
    /// The machine has ended or cannot be saved; it stays paused.
    pub fn pause_and_save(&self, harvest: bool) -> Result<Saved, VmError> {
        let set = harvest.then(|| PageSet::empty(self.memory().page_count()));
        self.pause_and_save_into(set)
    }

    /// The same, with the dirty log read into a set as [`VmHandle::harvest`] takes it.
    ///
    /// # Errors
    /// As [`VmHandle::pause_and_save`].
    pub fn pause_and_save_into(&self, log: Option<PageSet>) -> Result<Saved, VmError> {
        let harvest = log.is_some();
        let mut saved = self.saved(&Request::PauseAndSave { harvest })?;
        saved.dirty = log.map(|mut set| {
            self.copy_log(&mut set);
            set
        });
        Ok(saved)
    }

    /// Pauses, saves, and runs on.
    ///
    /// # Errors
    /// The machine has ended or cannot be saved; it runs on.
    pub fn rehearse(&self) -> Result<Saved, VmError> {
        self.saved(&Request::Rehearse)
    }

    /// Pauses and saves nothing, which is possible also while pages are missing.
    ///
    /// # Errors
    /// The machine has ended; or a vCPU does not come out of the guest, and is paused when it does.
    pub fn pause(&self) -> Result<(), VmError> {
        self.order(&Request::Pause)
    }

    /// Gives the machine a state. After a rehearsal it cannot run, only be given another one.
    ///
    /// # Errors
    /// The state is damaged, is of another machine, or something in it is not known here.
    pub fn load(&self, sections: &[u8], is_rehearsal: bool) -> Result<Loaded, VmError> {
        match self
            .exchange(&Request::Load { is_rehearsal }, sections)?
            .message
        {
            Reply::Loaded(loaded) => Ok(loaded),
            _ => Err(self.foreign()),
        }
    }

    /// Records who may run the guest.
    ///
    /// # Errors
    /// The step is not legal.
    pub fn record(&self, phase: &Phase) -> Result<(), VmError> {
        self.order(&Request::Record {
            phase: phase.clone(),
        })
    }

    /// Records that the guest has arrived and runs it: one request. Its clocks go on as if it had
    /// not been stopped; `stopped_at` is [`stopped_first`](crate::answer::SaveTimes::stopped_first) on this host's clock. A
    /// repeated request answers the same. With `keeps_faults` pages may be missing, which
    /// [`VmHandle::installer`] puts in, until [`VmHandle::disarm`]; otherwise all is there, and no
    /// access is held back from the first instruction on.
    ///
    /// # Errors
    /// The phase is not [`Phase::Preparing`] of that migration, no state was loaded, or pages cannot
    /// be missing here.
    pub fn commit_and_run(
        &self,
        id: MigrationId,
        stopped_at: Timestamp,
        keeps_faults: bool,
    ) -> Result<Running, VmError> {
        let request = Request::CommitAndRun {
            id,
            stopped_at,
            keeps_faults,
        };
        let Reply::Running(running) = self.ask(&request)? else {
            return Err(self.foreign());
        };
        if !keeps_faults {
            self.set_installer(None);
        }
        Ok(running)
    }

    /// Puts pages in that are missing; `None` if the process holds nobody back who touches one: see
    /// [`Attached::not_armed`].
    pub fn installer(&self) -> Option<Arc<PageInstaller>> {
        self.installer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// No page is missing any more: the process holds nobody back and forgets what was missing. A
    /// migration that leaves none missing says so before it loads the state.
    ///
    /// # Errors
    /// Pages are missing, or the process does not answer.
    pub fn disarm(&self) -> Result<(), VmError> {
        if let Some(installer) = self.installer() {
            installer.finish()?;
        }
        self.order(&Request::Disarm)?;
        self.set_installer(None);
        Ok(())
    }

    fn set_installer(&self, installer: Option<PageInstaller>) {
        *self
            .installer
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = installer.map(Arc::new);
    }

    fn lent(&self) -> &Lent {
        self.lent.get().expect("the process has a machine")
    }

    /// Takes what a process with a machine lends.
    fn attach(&self, frame: Frame<Reply>) -> Result<(), VmError> {
        let Reply::Attached {
            config,
            phase,
            run_state,
            faults,
        } = frame.message
        else {
            return Err(self.foreign());
        };
        if let Some(config) = &config {
            self.borrow(config, &faults, frame.descriptors)?;
        }
        let name = config.as_ref().map(|config| config.name.clone());
        let not_armed = match faults {
            Faults::Held { .. } => None,
            Faults::NotHeld { why } => Some(why),
        };
        *self.attached.lock().unwrap_or_else(PoisonError::into_inner) = Attached {
            name,
            config,
            phase,
            run_state,
            pid: self.pid(),
            not_armed,
        };
        Ok(())
    }

    /// Maps what is lent, as far as it is what it has to be.
    fn borrow(
        &self,
        config: &VmConfig,
        faults: &Faults,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        config.check().map_err(|_| self.foreign())?;
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(|| self.foreign());
        let (memory, bitmap) = (next()?, next()?);
        let for_faults = match faults {
            &Faults::Held { base, is_continued } => Some((next()?, next()?, base, is_continued)),
            Faults::NotHeld { .. } => None,
        };
        if descriptors.next().is_some() {
            return Err(self.foreign());
        }
        let memory = Arc::new(SharedMemory::open(memory)?);
        if memory.size() != config.memory {
            return Err(self.foreign());
        }
        let pages = memory.page_count();
        let bitmap = SharedBitmap::open(bitmap, pages)?;
        if let Some((faults, missing, base, is_continued)) = for_faults {
            let missing = SharedBitmap::open_writable(missing, pages)?;
            let path = if is_continued {
                FaultPath::Continue
            } else {
                FaultPath::Copy
            };
            let memory = Arc::clone(&memory);
            let installer = PageInstaller::new(faults, base, memory, missing, path)?;
            self.set_installer(Some(installer));
        }
        let lent = Lent {
            config: config.clone(),
            memory,
            bitmap,
        };
        self.lent.set(lent).map_err(|_| self.foreign())
    }

    fn order(&self, request: &Request) -> Result<(), VmError> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            _ => Err(self.foreign()),
        }
    }

    fn saved(&self, request: &Request) -> Result<Saved, VmError> {
        let frame = self.exchange(request, &[])?;
        let pages = self.memory().page_count().get();
        let is_within = |first_needed: &[Pfn]| {
            first_needed.len() <= FIRST_NEEDED_MAX
                && first_needed.iter().all(|page| page.get() < pages)
                && first_needed.is_sorted_by(|one, next| one < next)
        };
        match frame.message {
            Reply::Saved {
                times,
                first_needed,
            } if frame.bytes.len() <= STATE_BYTES_MAX && is_within(&first_needed) => Ok(Saved {
                sections: frame.bytes,
                dirty: None,
                times,
                first_needed,
            }),
            _ => Err(self.foreign()),
        }
    }

    fn ask(&self, request: &Request) -> Result<Reply, VmError> {
        Ok(self.exchange(request, &[])?.message)
    }

    /// One request and its reply. A refusal is an error.
    fn exchange(&self, request: &Request, bytes: &[u8]) -> Result<Frame<Reply>, VmError> {
        self.exchange_with(request, bytes, &[])
    }

    /// The same, with descriptors.
    fn exchange_with(
        &self,
        request: &Request,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Frame<Reply>, VmError> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if connection.is_none() {
            *connection = Some(self.dial_again()?);
        }
        let Some(Connection(socket)) = connection.as_ref() else {
            unreachable!("it was made just now")
        };
        let sent = protocol::send(socket, request, bytes, descriptors);
        // A process that another daemon controls says so and closes, perhaps before it was asked.
        let is_closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
        let reply = match &sent {
            Err(error) if !is_closed(error) => Err(FrameError::Closed),
            _ => protocol::receive::<Reply>(socket),
        };
        match reply {
            Ok(Frame {
                message: Reply::Refused { why, message },
                ..
            }) => Err(match why {
                Refusal::Phase => VmError::Phase(message),
                Refusal::Exited => VmError::Exited(message),
                Refusal::Busy => VmError::Busy(message),
                Refusal::Other => VmError::Refused(message),
            }),
            Ok(frame) => Ok(frame),
            Err(error) => {
                *connection = None;
                Err(match sent {
                    // It was never asked.
                    Err(error) => VmError::Gone(in_one_line(&FrameError::from(error))),
                    Ok(()) => VmError::Lost(in_one_line(&error)),
                })
            }
        }
    }

    /// A process that lives may answer again: it was stopped, or its host was busy. It has acted by its
    /// record meanwhile, as with any daemon that it lost.
    fn dial_again(&self) -> Result<Connection, VmError> {
        let gone = |why: &dyn std::error::Error| VmError::Gone(in_one_line(why));
        if self.is_gone() {
            return Err(VmError::Gone("it has ended".to_owned()));
        }
        let socket = dial(&self.path, ANSWER_AGAIN_LIMIT).map_err(|error| gone(&error))?;
        if socket::peer_pid(&socket).map_err(|error| gone(&error))? != self.pid() {
            return Err(VmError::Gone("another process has its place".to_owned()));
        }
        let attach = Request::Attach {
            version: PROTOCOL_VERSION,
        };
        protocol::send(&socket, &attach, &[], &[]).map_err(|error| gone(&error))?;
        let frame = protocol::receive::<Reply>(&socket).map_err(|error| gone(&error))?;
        // What it lends is mapped already, and cannot have changed.
        if !matches!(frame.message, Reply::Attached { .. }) {
            return Err(VmError::Foreign);
        }
        socket
            .set_read_timeout(Some(ANSWER_LIMIT))
            .and_then(|()| socket.set_write_timeout(Some(ANSWER_LIMIT)))
            .map_err(|error| gone(&error))?;
        tracing::info!(pid = self.pid(), "a VM process answers again");
        Ok(Connection(socket))
    }

    /// A process that answers something else than was asked for is not talked to any more.
    fn foreign(&self) -> VmError {
        *self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        VmError::Foreign
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_os::PageKind;
    use limosa_os::userfault::FaultGate;
    use limosa_pages::{ByteCount, PageCount};
    use std::fs::File;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::os::unix::net::UnixListener;

    const MEMORY: ByteCount = ByteCount::new(8 << 20);

    /// What becomes of connecting to a process that says it has a machine and lends these files.
    fn check(lent: &[BorrowedFd<'_>], base: Option<u64>, expect: &str) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm");
        let listener = UnixListener::bind(&path).unwrap();
        let text = thread::scope(|scope| {
            scope.spawn(|| {
                let (connection, _) = listener.accept().unwrap();
                let frame: Frame<Request> = protocol::receive(&connection).unwrap();
                assert!(matches!(
                    frame.message,
                    Request::Attach {
                        version: PROTOCOL_VERSION
                    }
                ));
                let config = Some(VmConfig::new("vm", MEMORY, 1));
                let reply = Reply::Attached {
                    config,
                    phase: Phase::Running,
                    run_state: RunState::Paused,
                    faults: base.map_or(Faults::NotHeld { why: String::new() }, |base| {
                        Faults::Held {
                            base,
                            is_continued: false,
                        }
                    }),
                };
                protocol::send(&connection, &reply, &[], lent).unwrap();
            });
            VmHandle::connect(&path).map_or_else(|error| error.to_string(), |_| "ok".to_owned())
        });
        assert_eq!(text, expect);
    }

    #[test]
    fn what_a_process_lends_is_checked() {
        let memory = SharedMemory::create(MEMORY, PageKind::Small).unwrap();
        let pages = memory.page_count();
        let bitmap = SharedBitmap::create(pages).unwrap();
        check(&[memory.file(), bitmap.file()], None, "ok");
        let foreign = "the VM process answered with something else than was asked for";
        check(&[], None, foreign);
        check(&[memory.file()], None, foreign);
        check(
            &[memory.file(), bitmap.file(), bitmap.file()],
            None,
            foreign,
        );
        let larger = SharedMemory::create(ByteCount::new(16 << 20), PageKind::Small).unwrap();
        check(&[larger.file(), bitmap.file()], None, foreign);
        let short = SharedBitmap::create(PageCount::new(pages.get() - 64)).unwrap();
        check(
            &[memory.file(), short.file()],
            None,
            "the bitmap has 248 bytes, 256 are needed",
        );
        let unsealed: File = tempfile::tempfile().unwrap();
        unsealed.set_len(MEMORY.get()).unwrap();
        let message = "the memory file is not sealed against resizing (seals 0x0)";
        check(&[unsealed.as_fd(), bitmap.file()], None, message);
        check(&[memory.file(), unsealed.as_fd()], None, message);
        let missing = SharedBitmap::create_writable(pages).unwrap();
        let lent = [memory.file(), bitmap.file()];
        check(&lent, Some(0), foreign);
        let check_held = |faults: BorrowedFd<'_>, missing: BorrowedFd<'_>, base, expect: &str| {
            check(&[lent[0], lent[1], faults, missing], Some(base), expect);
        };
        let message = "cannot use the descriptor for page faults";
        check_held(unsealed.as_fd(), missing.file(), 0, message);
        let memory = Arc::new(SharedMemory::create(MEMORY, PageKind::Small).unwrap());
        let Ok(gate) = FaultGate::open(&memory) else {
            return println!("skipped: no page faults are reported here");
        };
        let faults = gate.descriptor();
        check_held(faults, missing.file(), gate.base(), "ok");
        let message = "there is no memory at that address";
        check_held(faults, missing.file(), 17, message);
        check_held(faults, missing.file(), u64::MAX - 4095, message);
        check_held(
            faults,
            bitmap.file(),
            gate.base(),
            "cannot map guest memory",
        );
    }

    #[test]
    fn nobody_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm");
        let error = VmHandle::connect_within(&path, Duration::from_millis(5)).unwrap_err();
        assert!(matches!(error, VmError::Connect { .. }), "{error}");
    }
}
