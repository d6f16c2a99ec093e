//! A migration at the source: one thread that owns the engine and carries its actions out.
//!
//! ```text
//!  control reader ─┐
//!  push, pull ─────┼─▶ events ─▶ driver ─▶ engine ─▶ actions ─▶ VM process, streams, control
//!  API, timer ─────┘
//! ```
//!
//! Requests to the VM process are made by the driver itself, one at a time: they take well below
//! a millisecond, and a thread in between would cost more downtime than it saves. What may take
//! long (dialling, hashing) has a thread of its own. Every connection belongs to a generation;
//! what a closed generation still reports is dropped.

mod driver;
mod status;

pub use status::MigrationStatus;

use crate::bucket::Bucket;
use crate::coding::Compression;
use crate::credentials::Credentials;
use crate::demanded::Demanded;
use crate::disks::Disks;
use crate::guest::{Guest, GuestError};
use crate::push_order::PushOrder;
use crate::sender::{self, Manner};
use driver::{Driver, Inbox};
use limosa_engine::handover::MigrationId;
use limosa_engine::journal::Journaled;
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::report::MigrationReport;
use limosa_engine::source::{Fence, Source, SourceConfig, SourceEvent, Stage};
use limosa_engine::wire::{CopiedDisk, STREAMS_MAX};
use limosa_pages::{BytesPerSecond, PageCount};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Pages for which the engine gets one dirty count: 2 MiB of memory.
const CHUNK: PageCount = PageCount::new(512);

/// Slowest rate that a migration is given. Below it a state takes seconds, and a round of some pages
/// longer than a link may be silent.
pub const RATE_MIN: BytesPerSecond = BytesPerSecond::new(64 << 10);

/// Draws the id of a new attempt.
///
/// # Errors
/// The kernel gives no random number.
pub fn draw_id() -> Result<MigrationId, StartError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| StartError::System(error.to_string()))?;
    Ok(MigrationId(u128::from_le_bytes(id)))
}

/// What is called once when a migration is over.
pub type OnFinish = Box<dyn FnOnce(&MigrationReport) + Send>;

/// What an operator asks for.
#[derive(Clone, Debug)]
pub struct MigrateRequest {
    /// The attempt, fresh from [`draw_id`].
    pub id: MigrationId,
    /// The target daemon's peer address, `HOST:PORT`.
    pub peer: String,
    /// The technique.
    pub mode: Mode,
    /// What is allowed.
    pub limits: Limits,
    /// Push streams to open, 1 to [`STREAMS_MAX`]; how many of them are used `limits` say.
    pub streams: u8,
    /// Compare digests of memory and state after the switch, and of disks that are copied.
    pub verify: bool,
    /// Copy the guest's disks, which the target does not have.
    pub copy_disks: bool,
    /// Emulates a link of this rate: everything that is sent passes a token bucket.
    pub link: Option<BytesPerSecond>,
    /// Whether pages are coded to take fewer bytes.
    pub compression: Compression,
    /// In which order missing pages are pushed.
    pub push_order: PushOrder,
    /// What is known of earlier moves; it goes along to the target, whatever the order.
    pub demanded: Demanded,
    /// With these, every connection to the target is encrypted, and nothing is without.
    pub credentials: Option<Arc<Credentials>>,
}

/// Why a migration did not start. The guest was not touched.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The number of streams is out of range.
    #[error("a migration takes 1 to {STREAMS_MAX} streams, not {0}")]
    Streams(u8),
    /// A rate at which it would not end.
    #[error(
        "{0} bytes a second are too few to move a guest: give {min} or more, or leave the limit out",
        min = RATE_MIN.get()
    )]
    TooSlow(u64),
    /// There are no disks to copy, or they cannot be.
    #[error("its disks cannot be copied: {0}")]
    Disks(String),
    /// The guest does not answer.
    #[error("the VM does not answer: {0}")]
    Guest(#[from] GuestError),
    /// The kernel gives no thread or no random number.
    #[error("the migration cannot start: {0}")]
    System(String),
}

/// The migration is committed: the target decides now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too late to abort: the target has been told to run the guest")]
pub struct AbortTooLate;

/// A migration that runs or has run.
#[derive(Debug)]
pub struct Migration {
    id: MigrationId,
    is_encrypted: bool,
    shared: Arc<Shared>,
    pages: Arc<sender::Shared>,
    events: Sender<Inbox>,
}

/// How the engine's decisions are carried out.
struct Carriage {
    is_recovery: bool,
    link: Option<BytesPerSecond>,
    /// Those that are copied along.
    disks: Disks,
    manner: Manner,
    credentials: Option<Arc<Credentials>>,
    journal: Option<PathBuf>,
}

/// The disks that a migration would copy along. From now on the guest's dirty log tells what is written to them.
///
/// # Errors
/// They cannot be copied.
pub fn copied_disks(guest: &dyn Guest) -> Result<Vec<CopiedDisk>, StartError> {
    Ok(open_disks(guest, true)?.1)
}

/// The same, opened; none if they are not copied.
fn open_disks(guest: &dyn Guest, are_copied: bool) -> Result<(Disks, Vec<CopiedDisk>), StartError> {
    let memory = guest.memory().page_count();
    if !are_copied {
        return Ok((Disks::none(memory), Vec::new()));
    }
    let cannot = |reason: String| StartError::Disks(reason);
    let disks = guest
        .disks(true)
        .map_err(|error| cannot(error.to_string()))?;
    let disks = Disks::new(memory, disks);
    let disks = disks.ok_or_else(|| cannot("they are too large".to_owned()))?;
    let copied = disks
        .describe()
        .map_err(|error| cannot(error.to_string()))?;
    Ok((disks, copied))
}

/// What the driver and the handles share.
#[derive(Debug)]
struct Shared {
    engine: Mutex<Journaled<Source>>,
    unresolved: Mutex<Option<String>>,
    begun: Instant,
    finished: Mutex<bool>,
    finishing: Condvar,
}

impl Migration {
    /// Starts to move `guest`. With `journal`, every event is written there at the end.
    ///
    /// # Errors
    /// The request breaks a limit or the VM does not answer; the guest was not touched.
    pub fn start(
        guest: Arc<dyn Guest>,
        request: MigrateRequest,
        journal: Option<PathBuf>,
        on_finish: OnFinish,
    ) -> Result<Arc<Self>, StartError> {
        if !(1..=STREAMS_MAX).contains(&request.streams) {
            return Err(StartError::Streams(request.streams));
        }
        let rates = [request.limits.bandwidth_max, request.link];
        if let Some(rate) = rates.into_iter().flatten().find(|&rate| rate < RATE_MIN) {
            return Err(StartError::TooSlow(rate.get()));
        }
        let vm = guest.description()?;
        let (disks, copied) = open_disks(&*guest, request.copy_disks)?;
        let manner = Manner::of(&request);
        let config = SourceConfig {
            id: request.id,
            peer: request.peer,
            mode: request.mode,
            limits: request.limits,
            streams: request.streams,
            memory: guest.memory().page_count(),
            disks: copied,
            chunk: CHUNK,
            verify: request.verify,
            vm,
            demanded: request.demanded.encode(),
            boot_id: limosa_os::boot_id(),
        };
        let carriage = Carriage {
            is_recovery: false,
            link: request.link,
            disks,
            manner,
            credentials: request.credentials,
            journal,
        };
        Self::spawn(guest, config, carriage, on_finish)
    }

    /// Takes up a migration whose commit was recorded before the daemon was restarted: asks the
    /// target until it answers, and goes on as `request` says if the guest there misses pages.
    /// Digests are not compared: what of them was known died with the daemon.
    ///
    /// # Errors
    /// The kernel gives no thread, or disks that are copied along cannot be opened any more.
    pub fn recover(
        guest: Arc<dyn Guest>,
        request: MigrateRequest,
        on_finish: OnFinish,
    ) -> Result<Arc<Self>, StartError> {
        let manner = Manner::of(&request);
        let (disks, copied) = open_disks(&*guest, request.copy_disks)?;
        let locked = disks.lock();
        locked.map_err(|error| StartError::Disks(error.to_string()))?;
        let config = SourceConfig {
            id: request.id,
            peer: request.peer,
            mode: request.mode,
            limits: request.limits,
            streams: request.streams,
            memory: guest.memory().page_count(),
            disks: copied,
            chunk: CHUNK,
            verify: false,
            vm: Vec::new(),
            // The target has had it.
            demanded: Vec::new(),
            boot_id: limosa_os::boot_id(),
        };
        let carriage = Carriage {
            is_recovery: true,
            link: request.link,
            disks,
            manner,
            credentials: request.credentials,
            journal: None,
        };
        Self::spawn(guest, config, carriage, on_finish)
    }

    fn spawn(
        guest: Arc<dyn Guest>,
        config: SourceConfig,
        carriage: Carriage,
        on_finish: OnFinish,
    ) -> Result<Arc<Self>, StartError> {
        let (events, inbox) = channel();
        let id = config.id;
        let source = if carriage.is_recovery {
            Source::recover(config.clone())
        } else {
            Source::new(config.clone())
        };
        let shared = Arc::new(Shared {
            engine: Mutex::new(Journaled::new(source)),
            unresolved: Mutex::new(None),
            begun: Instant::now(),
            finished: Mutex::new(false),
            finishing: Condvar::new(),
        });
        let is_encrypted = carriage.credentials.is_some();
        let journal = carriage.journal.clone();
        let link = Arc::new(Bucket::new(carriage.link));
        let mut driver = Driver::new(
            guest,
            config,
            carriage,
            Arc::clone(&shared),
            events.clone(),
            link,
        );
        let pages = driver.pages();
        let done = Arc::clone(&shared);
        thread::Builder::new()
            .name("migrate".to_owned())
            .spawn(move || {
                driver.run(&inbox);
                driver.write_journal(journal.as_deref());
                drop(driver);
                let report = lock(&done.engine).machine().report().clone();
                on_finish(&report);
                *lock(&done.finished) = true;
                done.finishing.notify_all();
            })
            .map_err(|error| StartError::System(error.to_string()))?;
        Ok(Arc::new(Self {
            id,
            is_encrypted,
            shared,
            pages,
            events,
        }))
    }

    /// The attempt.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// Whether its connections are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.is_encrypted
    }

    /// Where it stands.
    pub fn status(&self) -> MigrationStatus {
        let unresolved = lock(&self.shared.unresolved).clone();
        let pages_out = PageCount::new(self.pages.pages_out.load(Ordering::Relaxed));
        let elapsed = self.shared.begun.elapsed();
        let unsent = self.pages.unsent().lock().count();
        MigrationStatus::of(
            lock(&self.shared.engine).machine(),
            (pages_out, unsent),
            elapsed,
            unresolved,
        )
    }

    /// Changes what is allowed from now on.
    pub fn set(&self, limits: Limits) {
        self.tell(SourceEvent::Set(limits));
    }

    /// Changes whether pages are coded from now on.
    pub fn set_compression(&self, compression: Compression) {
        self.pages.coding.set(compression);
    }

    /// Whether pages are coded.
    pub fn compression(&self) -> Compression {
        self.pages.coding.compression()
    }

    /// Changes the technique from now on.
    ///
    /// # Errors
    /// Why it cannot become this one now.
    pub fn set_mode(&self, mode: Mode) -> Result<(), &'static str> {
        lock(&self.shared.engine).machine().check_mode(mode)?;
        self.tell(SourceEvent::SetMode(mode));
        Ok(())
    }

    /// Decides, in place of a target that does not answer, how it ended. The operator answers for
    /// it that the other host does as they say.
    ///
    /// # Errors
    /// Why there is nothing to decide.
    pub fn fence(&self, fence: Fence) -> Result<(), &'static str> {
        lock(&self.shared.engine).machine().check_fence(fence)?;
        self.tell(SourceEvent::Fence(fence));
        Ok(())
    }

    /// Ends it; the guest runs on at the source. Returns at once: wait for the report.
    ///
    /// # Errors
    /// The migration is committed already.
    pub fn abort(&self) -> Result<(), AbortTooLate> {
        let stage = lock(&self.shared.engine).machine().stage();
        match stage {
            Stage::Preparing | Stage::Copying | Stage::Paused | Stage::Returning => {
                self.tell(SourceEvent::Abort);
                Ok(())
            }
            Stage::Committed
            | Stage::Serving
            | Stage::Unresolved
            | Stage::Releasing
            | Stage::Finished => Err(AbortTooLate),
        }
    }

    /// Waits for the end, at most `timeout`; `None` if it still runs then.
    pub fn wait(&self, timeout: Duration) -> Option<MigrationReport> {
        let finished = lock(&self.shared.finished);
        let (finished, _) = self
            .shared
            .finishing
            .wait_timeout_while(finished, timeout, |finished| !*finished)
            .unwrap_or_else(PoisonError::into_inner);
        let is_over = *finished;
        drop(finished);
        is_over.then(|| lock(&self.shared.engine).machine().report().clone())
    }

    fn tell(&self, event: SourceEvent) {
        if self.events.send(Inbox::always(event)).is_err() {
            tracing::debug!(migration_id = %self.id, "the migration is over already");
        }
    }
}

/// A lock whose holder cannot have left half a change behind: the engine asserts before it changes.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
