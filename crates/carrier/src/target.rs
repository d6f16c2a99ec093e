//! The peer side of a host: accepts connections, gives each arriving migration a driver.
//!
//! ```text
//!  accept ─▶ preamble ─┬─ control ─▶ new session: driver thread + this thread reads its frames
//!                      ├─ push i, pull ─▶ joins the session, waits there for its guest
//!                      ├─ resume  ─▶ an existing session whose guest misses pages
//!                      ├─ preflight ─▶ compares, makes nothing
//!                      └─ resolve ─▶ asks the session's driver, or the host if none is left
//! ```
//!
//! Whoever connects has [`HANDSHAKE_MAX`] to say what it wants, and at most [`HANDSHAKES_MAX`] may
//! be saying it at once. On a host with credentials it has the same time to show its own first, and
//! nothing else of it is read before. A session that has ended stays barred: its id is never accepted again.

mod driver;
mod session;

use crate::channel::{Channel, Reader};
use crate::connection::{self, ControlWriter, HANDSHAKE_MAX, ReadError};
use crate::credentials::Credentials;
use crate::demanded::Demanded;
use crate::guest::Guest;
use crate::preflight;
use driver::Driver;
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_engine::target::TargetOutcome;
use limosa_engine::wire::{ControlFrame, Preamble, Role, Start, clip};
use serde::Serialize;
use session::Session;
pub(crate) use session::control_writer;
use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

/// Connections that may be in their handshake at once; more are closed unheard.
const HANDSHAKES_MAX: usize = 64;
/// Migrations that may arrive at once.
const SESSIONS_MAX: usize = 256;
/// Preflights that may be answered at once.
const PREFLIGHTS_MAX: usize = 8;
/// Ended attempts that are remembered as barred. Ids are random, so an old one that is forgotten
/// could only come back from a peer that replays it: a fresh attempt, for all that matters.
const BARRED_MAX: usize = 4096;
/// How long it may take to end a session whose guest is given up.
const TOLD_MAX: Duration = Duration::from_secs(2);
/// How long a source that asked may take to say that it is done.
const DONE_MAX: Duration = Duration::from_secs(30);

/// What the daemon does for migrations that arrive.
pub trait TargetHost: Send + Sync {
    /// Makes an empty VM in phase `Preparing`.
    ///
    /// # Errors
    /// One line for the operator at the source: why the guest cannot come here.
    fn create(&self, id: MigrationId, start: &Start) -> Result<Arc<dyn Guest>, String>;

    /// What is in the way of such a guest here, each in one line for the operator at the source; nothing
    /// if [`TargetHost::create`] would make it. Makes nothing.
    fn differences(&self, start: &Start) -> Vec<String>;

    /// The guest runs here, as its VM process has recorded: from now on [`TargetHost::resolve`] answers
    /// so, even when the guest has moved on or ended.
    /// With `is_filling` it still misses pages, until [`TargetHost::filled`].
    fn running(&self, id: MigrationId, is_filling: bool);

    /// A guest that ran without all its pages has them now. `asked_for` is what it had to ask for here,
    /// in that order, as far as this daemon has seen it.
    fn filled(&self, id: MigrationId, asked_for: Demanded);

    /// The migration is over here.
    fn finished(&self, id: MigrationId, outcome: &TargetOutcome);

    /// How an attempt ended that no session knows. Unless it runs, it is barred for ever.
    fn resolve(&self, id: MigrationId) -> Resolution;

    /// A source that had to ask says that it holds nothing any more.
    fn confirmed(&self, id: MigrationId);
}

/// A migration that arrives.
#[derive(Clone, Debug, Serialize)]
pub struct IncomingStatus {
    /// The attempt.
    pub id: MigrationId,
    /// The source's address; `None` after a restart until it has come back.
    pub from: Option<SocketAddr>,
    /// Pages that the guest misses, once it was told which.
    pub missing_pages: u64,
    /// Pages installed, zero pages included.
    pub pages_received: u64,
    /// Bytes that came by the push streams.
    pub bytes_received: u64,
    /// The guest was told to run here.
    pub is_committed: bool,
    /// The source is there.
    pub is_connected: bool,
    /// Why pages that have come cannot be put in place, as long as that is so.
    pub stuck: Option<String>,
}

/// Accepts migrations from other hosts.
#[derive(Debug)]
pub struct Listener {
    shared: Arc<Shared>,
    address: SocketAddr,
}

struct Shared {
    host: Arc<dyn TargetHost>,
    credentials: Option<Arc<Credentials>>,
    registry: Mutex<Registry>,
    /// A session was opened or closed.
    opened: Condvar,
    handshakes: Arc<Places>,
    preflights: Arc<Places>,
    closing: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Registry {
    sessions: HashMap<MigrationId, Arc<Session>>,
    barred: VecDeque<MigrationId>,
}

impl Listener {
    /// Listens on `address` and accepts in threads of its own until it is dropped. With `credentials`
    /// every connection is encrypted, and nothing is without.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn bind(
        address: SocketAddr,
        host: Arc<dyn TargetHost>,
        credentials: Option<Arc<Credentials>>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            host,
            credentials,
            registry: Mutex::default(),
            opened: Condvar::new(),
            handshakes: Places::new(HANDSHAKES_MAX),
            preflights: Places::new(PREFLIGHTS_MAX),
            closing: AtomicBool::new(false),
        });
        let acceptor = Arc::clone(&shared);
        thread::Builder::new()
            .name("accept".to_owned())
            .spawn(move || acceptor.accept(&listener))?;
        Ok(Self { shared, address })
    }

    /// The address, with the port that the kernel chose if none was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Migrations that arrive now.
    pub fn incoming(&self) -> Vec<IncomingStatus> {
        self.shared
            .registry()
            .sessions
            .values()
            .map(|session| session.status())
            .collect()
    }

    /// Takes up an arrival whose guest an earlier daemon left running without all its pages: its
    /// page faults are served again, and its source is waited for.
    ///
    /// # Errors
    /// The kernel gives no thread, or disks that come along cannot be opened.
    pub fn recover(&self, id: MigrationId, guest: Arc<dyn Guest>) -> io::Result<()> {
        let host = Arc::clone(&self.shared.host);
        match Session::recover(id, guest, host).map_err(io::Error::other)? {
            Some((session, driver)) => self.shared.begin(id, session, driver),
            None => Ok(()),
        }
    }

    /// Says that a guest that misses pages will never get them; true if there is such a guest. It is lost, then:
    /// it stands at the first page that it misses. Its source has heard the reason then, if it is there and listens.
    pub fn give_up(&self, id: MigrationId, reason: &str) -> bool {
        let session = self.shared.registry().sessions.get(&id).cloned();
        let Some(session) = session.filter(|session| session.source_is_gone(reason)) else {
            return false;
        };
        session.wait(TOLD_MAX);
        true
    }

    /// Ends an arriving migration unless it is committed; true if there was one.
    pub fn abort(&self, id: MigrationId) -> bool {
        let session = self.shared.registry().sessions.get(&id).cloned();
        session.is_some_and(|session| session.abort())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        // The acceptor sleeps in `accept`; a connection wakes it.
        if let Err(error) = TcpStream::connect_timeout(&self.address, Duration::from_secs(1)) {
            tracing::debug!(%error, "the acceptor could not be woken");
        }
    }
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn source_is_gone(&self, id: MigrationId, reason: &str) -> bool {
        let session = self.registry().sessions.get(&id).cloned();
        session.is_some_and(|session| session.source_is_gone(reason))
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        loop {
            let accepted = listener.accept();
            if self.closing.load(Ordering::SeqCst) {
                return;
            }
            match accepted {
                Ok((stream, from)) => self.greet(stream, from),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // Out of descriptors: others have to be closed first.
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Hears a connection out in a thread of its own, if not too many are being heard.
    fn greet(self: &Arc<Self>, socket: TcpStream, from: SocketAddr) {
        let Some(place) = self.handshakes.take() else {
            tracing::warn!(%from, "too many connections at once: this one is closed");
            return;
        };
        let shared = Arc::clone(self);
        let spawned = thread::Builder::new()
            .name("greet".to_owned())
            .spawn(move || {
                let heard = shared.hear(socket, from);
                drop(place);
                if let Some((channel, preamble)) = heard {
                    shared.serve(channel, from, preamble);
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a connection");
        }
    }

    /// What a connection is for; whoever is sent away is told why, as far as it listens.
    fn hear(&self, socket: TcpStream, from: SocketAddr) -> Option<(Channel, Preamble)> {
        let refused = |error: &dyn std::fmt::Display| {
            tracing::warn!(%from, %error, "a connection was refused");
        };
        let accepted = connection::accept(socket, self.credentials.as_deref());
        let mut channel = accepted.inspect_err(|error| refused(error)).ok()?;
        match connection::read_preamble(&mut channel.reader) {
            Ok(preamble) => Some((channel, preamble)),
            Err(error) => {
                refused(&error);
                let is_encrypted = matches!(error, ReadError::Encrypted);
                refuse(&mut channel, &error.to_string());
                if is_encrypted {
                    connection::farewell(channel.reader.socket());
                }
                None
            }
        }
    }

    fn serve(self: &Arc<Self>, mut channel: Channel, from: SocketAddr, preamble: Preamble) {
        let Preamble {
            migration: id,
            role,
            generation,
        } = preamble;
        match role {
            Role::Push(_) | Role::Pull => {
                return match self.wait_for_session(id) {
                    Some(session) => session.attach(generation, role, channel),
                    None => tracing::warn!(migration_id = %id, %from, "pages for no migration"),
                };
            }
            Role::Resolve => return self.answer(id, &mut channel),
            Role::Preflight => return self.compare(channel, from),
            Role::Control | Role::Resume => {}
        }
        let Channel { reader, writer } = channel;
        let control = Arc::new(control_writer(writer));
        let opened = if role == Role::Control {
            self.open(id, (from, generation), &control)
        } else {
            self.resume(id, (from, generation), &control)
        };
        match opened {
            Ok(session) => self.read_control(&session, generation, reader),
            Err(reason) => {
                tracing::warn!(migration_id = %id, %from, %reason, "a migration was refused");
                if let Err(error) = control.send(&refusal(&reason)) {
                    tracing::debug!(%error, "a refused peer did not listen");
                }
            }
        }
    }

    /// Says whether a guest could come, if not too many ask.
    fn compare(&self, mut channel: Channel, from: SocketAddr) {
        let Some(_place) = self.preflights.take() else {
            return refuse(&mut channel, "too many preflights at once: try again later");
        };
        if let Err(error) = preflight::answer(&*self.host, channel) {
            tracing::debug!(%from, %error, "a preflight ended early");
        }
    }

    /// Gives a source that has come back to the session that waits for it.
    fn resume(
        &self,
        id: MigrationId,
        (from, generation): (SocketAddr, u32),
        control: &Arc<ControlWriter>,
    ) -> Result<Arc<Session>, String> {
        let session = self.registry().sessions.get(&id).cloned();
        let session = session.ok_or("the guest of this migration does not wait here for pages")?;
        session.resume(from, generation, Arc::clone(control))?;
        Ok(session)
    }

    /// Makes the session of a new attempt and starts its driver.
    fn open(
        self: &Arc<Self>,
        id: MigrationId,
        (from, generation): (SocketAddr, u32),
        control: &Arc<ControlWriter>,
    ) -> Result<Arc<Session>, String> {
        let registry = self.registry();
        if registry.sessions.contains_key(&id) || registry.barred.contains(&id) {
            return Err("this migration was begun before: start a new one".to_owned());
        }
        if registry.sessions.len() >= SESSIONS_MAX {
            return Err("too many migrations arrive at once: try again later".to_owned());
        }
        drop(registry);
        let host = Arc::clone(&self.host);
        let control = Arc::clone(control);
        let (session, driver) = Session::new(id, (from, generation), control, host);
        self.begin(id, Arc::clone(&session), driver)
            .map_err(|error| error.to_string())?;
        Ok(session)
    }

    /// Starts the driver of a session that is known from here on.
    fn begin(
        self: &Arc<Self>,
        id: MigrationId,
        session: Arc<Session>,
        driver: Driver,
    ) -> io::Result<()> {
        let mut registry = self.registry();
        if registry.sessions.contains_key(&id) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        registry.sessions.insert(id, session);
        drop(registry);
        self.opened.notify_all();
        let shared = Arc::clone(self);
        let spawned = thread::Builder::new()
            .name("arrive".to_owned())
            .spawn(move || {
                driver.run();
                shared.close(id);
            });
        spawned.map(drop).inspect_err(|_| self.close(id))
    }

    /// The session of a migration whose control connection may still be in its handshake.
    fn wait_for_session(&self, id: MigrationId) -> Option<Arc<Session>> {
        let registry = self.registry();
        let unknown = |registry: &mut Registry| {
            !registry.sessions.contains_key(&id) && !registry.barred.contains(&id)
        };
        let waited = self
            .opened
            .wait_timeout_while(registry, HANDSHAKE_MAX, unknown);
        let (registry, _) = waited.unwrap_or_else(PoisonError::into_inner);
        registry.sessions.get(&id).cloned()
    }

    /// Forgets a session that has ended, and bars its id.
    fn close(&self, id: MigrationId) {
        let mut registry = self.registry();
        registry.sessions.remove(&id);
        registry.bar(id);
        drop(registry);
        self.opened.notify_all();
    }

    fn read_control(&self, session: &Session, generation: u32, mut reader: Reader) {
        loop {
            match connection::read_frame(&mut reader) {
                Ok(frame) => {
                    // The first frame had to come soon; between later ones the engine watches.
                    if matches!(
                        frame,
                        ControlFrame::Start(_) | ControlFrame::Reattach { .. }
                    ) && let Err(error) = reader.set_timeout(None)
                    {
                        return session.lost(generation, &error.to_string());
                    }
                    session.frame(generation, frame);
                }
                Err(error) => return session.lost(generation, &error.to_string()),
            }
        }
    }

    /// Answers how an attempt ended, and hears whether the source is done.
    fn answer(&self, id: MigrationId, channel: &mut Channel) {
        let resolution = match connection::read_frame(&mut channel.reader) {
            Ok(ControlFrame::Resolve) => self.resolve(id),
            Ok(_) | Err(_) => return,
        };
        let Some(resolution) = resolution else { return };
        tracing::info!(migration_id = %id, ?resolution, "a source asked for an outcome");
        let answer = ControlFrame::Resolved(resolution).encode();
        if channel.writer.write_all(&answer).is_err() || resolution == Resolution::Barred {
            return;
        }
        if channel.reader.set_timeout(Some(DONE_MAX)).is_err() {
            return;
        }
        match connection::read_frame(&mut channel.reader) {
            Ok(ControlFrame::Done) => self.host.confirmed(id),
            Ok(ControlFrame::Lost { reason }) if resolution == Resolution::Needs => {
                self.source_is_gone(id, &clip(&reason));
            }
            Ok(_) | Err(_) => {}
        }
    }

    /// The answer, or `None` if it is not known yet and the source has to ask again.
    fn resolve(&self, id: MigrationId) -> Option<Resolution> {
        let session = self.registry().sessions.get(&id).cloned();
        if let Some(session) = session {
            return session.resolve(HANDSHAKE_MAX);
        }
        let resolution = self.host.resolve(id);
        if resolution == Resolution::Barred {
            self.registry().bar(id);
        }
        Some(resolution)
    }
}

/// So many may do something at once.
struct Places {
    taken: AtomicUsize,
    most: usize,
}

/// One of them, given back however its thread ends.
struct Place(Arc<Places>);

impl Places {
    fn new(most: usize) -> Arc<Self> {
        let taken = AtomicUsize::new(0);
        Arc::new(Self { taken, most })
    }

    /// Takes a place, if there is one.
    fn take(self: &Arc<Self>) -> Option<Place> {
        let place = Place(Arc::clone(self));
        (self.taken.fetch_add(1, Ordering::SeqCst) < self.most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Registry {
    fn bar(&mut self, id: MigrationId) {
        if self.barred.len() == BARRED_MAX {
            self.barred.pop_front();
        }
        self.barred.push_back(id);
    }
}

/// Tells a peer why it is not served, as far as it listens.
fn refuse(channel: &mut Channel, reason: &str) {
    if let Err(error) = channel.writer.write_all(&refusal(reason).encode()) {
        tracing::debug!(%error, "a refused peer did not listen");
    }
}

fn refusal(reason: &str) -> ControlFrame {
    ControlFrame::Refuse {
        reason: clip(reason),
    }
}
