//! One arriving migration as its connections see it: streams come, are waited for, are started.
//!
//! A source whose connections broke comes back with new ones of a higher generation; what the old ones
//! still say is dropped.

use super::driver::{Driver, now, stop};
use super::{IncomingStatus, TargetHost};
use crate::bucket::Bucket;
use crate::channel::{Channel, Handle, Writer};
use crate::connection::{ControlWriter, HANDSHAKE_MAX};
use crate::disks::Disks;
use crate::faults::{self, Faults};
use crate::guest::Guest;
use crate::installer::Installer;
use crate::receiver;
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_engine::target::{Target, TargetEvent};
use limosa_engine::wire::{ControlFrame, Role, Start};
use limosa_pages::PageCount;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What connections see of a migration that arrives.
pub(super) struct Session {
    pub(super) id: MigrationId,
    events: Sender<News>,
    pub(super) inside: Mutex<Inside>,
    pub(super) changed: Condvar,
    pub(super) committed: AtomicBool,
}

/// Something for the driver.
pub(super) enum News {
    Event(TargetEvent),
    /// What a connection said; of no interest when a later one has taken its place.
    Of(Generation, TargetEvent),
    /// The source has come back on another connection.
    Resumed(Generation, Arc<ControlWriter>),
}

/// Tells the connections of one attempt of the source from those of an earlier one.
pub(super) type Generation = u32;

#[derive(Default)]
pub(super) struct Inside {
    /// Where the source is, once it has come.
    from: Option<SocketAddr>,
    /// It is there.
    pub(super) is_connected: bool,
    pub(super) generation: Generation,
    /// Streams that have come, and for what.
    pub(super) streams: Vec<Stream>,
    /// Handles of the streams that deliver pages, to close them.
    pub(super) receiving: Vec<Handle>,
    pub(super) pages: Option<Arc<receiver::Shared>>,
    /// The other end of requests for pages, until faults are served.
    pub(super) pull: Option<Writer>,
    /// A guest that was made and not yet taken over by the driver.
    pub(super) made: Option<Arc<dyn Guest>>,
    /// A guest is being made, in a thread of its own.
    pub(super) making: bool,
    /// The attempt is given up: nobody waits for streams or a guest any more.
    given_up: bool,
    pub(super) resolution: Option<Resolution>,
    pub(super) over: bool,
}

/// A stream that waits for the others.
pub(super) struct Stream {
    generation: Generation,
    role: Role,
    channel: Channel,
}

/// The streams of one generation.
struct Streams {
    push: Vec<Channel>,
    pull: Channel,
}

impl Session {
    pub(super) fn new(
        id: MigrationId,
        (from, generation): (SocketAddr, Generation),
        control: Arc<ControlWriter>,
        host: Arc<dyn TargetHost>,
    ) -> (Arc<Self>, Driver) {
        let engine = Target::new(id, limosa_os::boot_id(), now());
        let inside = Inside {
            from: Some(from),
            is_connected: true,
            generation,
            ..Inside::default()
        };
        let (session, mut driver) = Self::with(id, engine, inside, host);
        driver.control = Some(control);
        (session, driver)
    }

    /// The session of a guest that a restarted daemon found, running and without all its pages.
    /// `None` if its page faults cannot be served any more, which means that it has them.
    ///
    /// # Errors
    /// Disks that come along cannot be opened: nothing is served then, so that nobody believes that all is here.
    pub(super) fn recover(
        id: MigrationId,
        guest: Arc<dyn Guest>,
        host: Arc<dyn TargetHost>,
    ) -> Result<Option<(Arc<Self>, Driver)>, String> {
        let Some(installer) = guest.installer() else {
            return Ok(None);
        };
        let disks = Arc::new(disks_that_come(&*guest)?);
        let installer = Installer::new(installer, Arc::clone(&disks));
        let memory = guest.memory();
        let faults = Arc::new(Faults::new(installer));
        let pages = Arc::new(receiver::Shared::new(memory, disks, false, Some(faults)));
        let inside = Inside {
            pages: Some(pages),
            ..Inside::default()
        };
        let engine = Target::recover(id, limosa_os::boot_id(), now());
        let (session, mut driver) = Self::with(id, engine, inside, host);
        session.committed.store(true, Ordering::SeqCst);
        driver.guest = Some(guest);
        Ok(Some((session, driver)))
    }

    fn with(
        id: MigrationId,
        engine: Target,
        inside: Inside,
        host: Arc<dyn TargetHost>,
    ) -> (Arc<Self>, Driver) {
        let (events, inbox) = channel();
        let session = Arc::new(Self {
            id,
            events,
            inside: Mutex::new(inside),
            changed: Condvar::new(),
            committed: AtomicBool::new(false),
        });
        let driver = Driver::new(Arc::clone(&session), host, inbox, engine);
        (session, driver)
    }

    pub(super) fn status(&self) -> IncomingStatus {
        let inside = self.inside();
        let pages = inside.pages.as_deref();
        let count = |of: fn(&receiver::Shared) -> u64| pages.map_or(0, of);
        let faults = pages.and_then(|pages| pages.faults.as_ref());
        let installer = faults.map(|faults| faults.installer());
        IncomingStatus {
            id: self.id,
            from: inside.from,
            missing_pages: installer.map_or(0, |installer| installer.missing_count().get()),
            pages_received: count(|pages| pages.pages_received.load(Ordering::Relaxed)),
            bytes_received: count(|pages| pages.bytes_received.load(Ordering::Relaxed)),
            is_committed: self.committed.load(Ordering::SeqCst),
            is_connected: inside.is_connected,
            stuck: installer.and_then(|installer| installer.stuck()),
        }
    }

    /// A stream has come.
    pub(super) fn attach(&self, generation: Generation, role: Role, channel: Channel) {
        let mut inside = self.inside();
        let is_new = |known: &Stream| (known.generation, known.role) != (generation, role);
        if inside.streams.iter().all(is_new) && !inside.over {
            inside.streams.push(Stream {
                generation,
                role,
                channel,
            });
            self.changed.notify_all();
        }
    }

    /// The source has come back, if the guest waits for it; otherwise why it need not.
    pub(super) fn resume(
        &self,
        from: SocketAddr,
        generation: Generation,
        control: Arc<ControlWriter>,
    ) -> Result<(), &'static str> {
        if !self.committed.load(Ordering::SeqCst) {
            return Err("the guest does not run here: begin a new migration");
        }
        let mut inside = self.inside();
        inside.from = Some(from);
        inside.generation = generation;
        inside
            .streams
            .retain(|stream| stream.generation == generation);
        drop(inside);
        self.changed.notify_all();
        self.send(News::Resumed(generation, control));
        Ok(())
    }

    pub(super) fn frame(&self, generation: Generation, frame: ControlFrame) {
        self.send(News::Of(generation, TargetEvent::Frame(frame)));
    }

    pub(super) fn lost(&self, generation: Generation, reason: &str) {
        let reason = reason.to_owned();
        self.send(News::Of(generation, TargetEvent::ConnectionLost { reason }));
    }

    /// The source will never come back; true if that matters. A guest that has all its pages, which
    /// its driver may not know yet, is not lost.
    pub(super) fn source_is_gone(&self, reason: &str) -> bool {
        // Looked at before the driver hears of it: it lets go of everything when it ends.
        let faults = self
            .inside()
            .pages
            .as_ref()
            .and_then(|pages| pages.faults.clone());
        let misses = |faults: &Arc<Faults>| faults.installer().missing_count() > PageCount::ZERO;
        let matters = self.committed.load(Ordering::SeqCst) && faults.as_ref().is_some_and(misses);
        if matters {
            let reason = reason.to_owned();
            self.tell(TargetEvent::SourceGone { reason });
        }
        matters
    }

    /// Ends it unless it is committed.
    pub(super) fn abort(&self) -> bool {
        self.tell(TargetEvent::Abort);
        !self.committed.load(Ordering::SeqCst)
    }

    /// Asks how it ended, which ends it unless it is committed. `None` if no answer comes in time.
    pub(super) fn resolve(&self, patience: Duration) -> Option<Resolution> {
        self.tell(TargetEvent::Resolve);
        let inside = self.inside();
        let (inside, _) = self
            .changed
            .wait_timeout_while(inside, patience, |inside| {
                inside.resolution.is_none() && !inside.over
            })
            .unwrap_or_else(PoisonError::into_inner);
        inside.resolution
    }

    /// Waits until it is over, at most so long.
    pub(super) fn wait(&self, patience: Duration) {
        let waited = self
            .changed
            .wait_timeout_while(self.inside(), patience, |inside| !inside.over);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until all streams of the present generation have come and takes them.
    fn take_streams(&self, push: u8) -> Option<Streams> {
        let inside = self.inside();
        let generation = inside.generation;
        let complete = |inside: &Inside| {
            let is_here = |role| {
                let is = |stream: &Stream| (stream.generation, stream.role) == (generation, role);
                inside.streams.iter().any(is)
            };
            is_here(Role::Pull) && (0..push).all(|index| is_here(Role::Push(index)))
        };
        let (mut inside, _) = self
            .changed
            .wait_timeout_while(inside, HANDSHAKE_MAX, |inside| {
                !complete(inside) && !inside.given_up && inside.generation == generation
            })
            .unwrap_or_else(PoisonError::into_inner);
        if !complete(&inside) || inside.generation != generation {
            return None;
        }
        let mut streams = std::mem::take(&mut inside.streams);
        let at = streams
            .iter()
            .position(|stream| stream.role == Role::Pull)?;
        let pull = streams.swap_remove(at).channel;
        let mut push: Vec<(u8, Channel)> = streams
            .into_iter()
            .filter_map(|stream| match stream.role {
                Role::Push(index) => Some((index, stream.channel)),
                _ => None,
            })
            .collect();
        push.sort_by_key(|(index, _)| *index);
        let push = push.into_iter().map(|(_, channel)| channel).collect();
        Some(Streams { push, pull })
    }

    /// Waits until no guest is being made any more, which is soon, and takes one that nobody has
    /// taken. Only then is nothing of the attempt left to come.
    pub(super) fn give_up(&self) -> Option<Arc<dyn Guest>> {
        let mut inside = self.inside();
        inside.given_up = true;
        self.changed.notify_all();
        let mut inside = self
            .changed
            .wait_while(inside, |inside| inside.making)
            .unwrap_or_else(PoisonError::into_inner);
        inside.made.take()
    }

    pub(super) fn tell(&self, event: TargetEvent) {
        self.send(News::Event(event));
    }

    pub(super) fn send(&self, news: News) {
        if self.events.send(news).is_err() {
            tracing::trace!(migration_id = %self.id, "news after the end of a migration");
        }
    }

    pub(super) fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    /// Makes the guest, waits for the streams, receives; whether its page faults can be served.
    pub(super) fn make(
        self: &Arc<Self>,
        host: &dyn TargetHost,
        start: &Start,
    ) -> Result<bool, String> {
        let guest = host.create(self.id, start)?;
        let made = self.receive(&guest, start);
        let mut inside = self.inside();
        if made.is_ok() && !inside.given_up {
            inside.made = Some(guest);
            return made;
        }
        drop(inside);
        stop(Some(guest));
        made
    }

    fn receive(self: &Arc<Self>, guest: &Arc<dyn Guest>, start: &Start) -> Result<bool, String> {
        let memory = guest.memory();
        if memory.page_count() != start.memory_pages {
            return Err("the machine's description and the announced memory differ".to_owned());
        }
        let disks = Arc::new(disks_of(&**guest, start)?);
        let streams = self
            .take_streams(start.streams)
            .ok_or("the page streams did not come")?;
        let faults = guest
            .installer()
            .map(|memory| Arc::new(Faults::new(Installer::new(memory, Arc::clone(&disks)))));
        let can_fault = faults.is_some();
        let broken = |error: std::io::Error| error.to_string();
        if let Some(faults) = &faults {
            // Already a rehearsal may touch pages, which are zero as far as it is concerned.
            self.start_faults(faults).map_err(broken)?;
        }
        let pages = Arc::new(receiver::Shared::new(memory, disks, start.verify, faults));
        self.inside().pages = Some(Arc::clone(&pages));
        let pull = self.start_streams(streams, &pages).map_err(broken)?;
        self.inside().pull = Some(pull);
        Ok(can_fault)
    }

    /// Starts the thread that looks after page faults, for as long as there may be some.
    pub(super) fn start_faults(self: &Arc<Self>, faults: &Arc<Faults>) -> std::io::Result<()> {
        let session = Arc::clone(self);
        let failed = move |reason| session.tell(TargetEvent::VmFailed { reason });
        faults::start(Arc::clone(faults), failed)
    }

    /// The streams of a source that has come back; how many pages are missing.
    pub(super) fn reattach(self: &Arc<Self>, streams: u8) -> Result<PageCount, String> {
        let streams = self
            .take_streams(streams)
            .ok_or("the page streams did not come")?;
        let pages = self.inside().pages.clone().ok_or("the guest is gone")?;
        let faults = pages.faults.clone().ok_or("page faults are not served")?;
        let broken = |error: std::io::Error| error.to_string();
        let pull = self.start_streams(streams, &pages).map_err(broken)?;
        faults.reattach(pull).map_err(broken)
    }

    /// Starts the threads of one generation's streams; the end of the pull stream to ask at.
    fn start_streams(
        self: &Arc<Self>,
        streams: Streams,
        pages: &Arc<receiver::Shared>,
    ) -> std::io::Result<Writer> {
        let pull = [&streams.pull];
        let handles = streams.push.iter().chain(pull).map(Channel::handle);
        let handles = handles.collect();
        let generation = {
            let mut inside = self.inside();
            inside.receiving = handles;
            inside.generation
        };
        for (index, stream) in (0u8..).zip(streams.push) {
            let report = self.reporter(generation, pages);
            receiver::start(index, stream.reader, Arc::clone(pages), report)?;
        }
        let Channel { reader, writer } = streams.pull;
        if let Some(faults) = &pages.faults {
            let report = self.reporter(generation, pages);
            let (pages, faults) = (Arc::clone(pages), Arc::clone(faults));
            faults::take_answers(reader, pages, faults, report)?;
        }
        Ok(writer)
    }

    /// Turns what streams report into events.
    fn reporter(
        self: &Arc<Self>,
        generation: Generation,
        pages: &Arc<receiver::Shared>,
    ) -> impl Fn(receiver::Report) + Send + 'static {
        let (session, pages) = (Arc::clone(self), Arc::clone(pages));
        move |news| match news {
            receiver::Report::Barrier {
                stream,
                round,
                streams,
            } => {
                let event = TargetEvent::Barrier {
                    stream,
                    round,
                    streams,
                };
                session.send(News::Of(generation, event));
            }
            receiver::Report::Broken { reason } => session.lost(generation, &reason),
            receiver::Report::NotInstalled { reason } => {
                session.tell(TargetEvent::VmFailed { reason });
            }
            receiver::Report::Filled => {
                let report = pages.faults.as_ref().map(|faults| faults.report());
                session.tell(TargetEvent::AllPresent(report.unwrap_or_default()));
            }
        }
    }
}

/// The disks that come along, as they were made here.
fn disks_of(guest: &dyn Guest, start: &Start) -> Result<Disks, String> {
    if start.disks.is_empty() {
        return Ok(Disks::none(start.memory_pages));
    }
    let disks = guest.disks(false).map_err(|error| error.to_string())?;
    let disks = Disks::new(start.memory_pages, disks).filter(|disks| disks.are(&start.disks));
    disks.ok_or_else(|| "the machine's description and the announced disks differ".to_owned())
}

/// The disks of a guest that runs here without all its pages, if some of these are theirs.
fn disks_that_come(guest: &dyn Guest) -> Result<Disks, String> {
    let memory = guest.memory().page_count();
    let in_words = |error: crate::GuestError| error.to_string();
    if !guest.misses_disk_pages().map_err(in_words)? {
        return Ok(Disks::none(memory));
    }
    let disks = guest.disks(false).map_err(in_words)?;
    Disks::new(memory, disks).ok_or_else(|| "disks that come along are too large".to_owned())
}

/// Nothing is shaped on the way to the source.
pub(crate) fn control_writer(control: Writer) -> ControlWriter {
    ControlWriter::new(control, Arc::new(Bucket::new(None)))
}
