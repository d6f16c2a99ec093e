//! The driver: takes events, asks the engine, carries its actions out.

use super::{Carriage, Shared, lock};
use crate::bucket::Bucket;
use crate::channel::{Channel, Handle, Reader};
use crate::connection::{self, ControlWriter, Dialler, ReadError};
use crate::deferral::Deferral;
use crate::digest;
use crate::guest::{Guest, GuestError, Saved};
use crate::push_order::{Heat, PushOrder};
use crate::{hold, journal_file, outcome, pull_server, sender};
use limosa_engine::Timestamp;
use limosa_engine::handover::Resolution;
use limosa_engine::source::{Paused, Piece, SourceAction, SourceConfig, SourceEvent};
use limosa_engine::throttle::Throttle;
use limosa_engine::wire::{ControlFrame, Preamble, Role, STRAYS_BYTES_MAX};
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;

/// An event on its way to the driver.
#[derive(Debug)]
pub(super) struct Inbox {
    /// The generation of connections that it came from; `None` if it came from elsewhere.
    generation: Option<u64>,
    news: News,
}

#[derive(Debug)]
enum News {
    Event(SourceEvent),
    /// The connections are up.
    Links(Links),
    /// The target has said what it misses.
    Reconciled(PageSet),
    /// The target's answer to a question, on a connection that is kept to say *done*.
    Answer(Resolution, ControlWriter),
}

impl Inbox {
    /// An event that no closed connection makes obsolete.
    pub(super) const fn always(event: SourceEvent) -> Self {
        Self {
            generation: None,
            news: News::Event(event),
        }
    }
}

/// The connections of one generation.
#[derive(Debug)]
struct Links {
    control: ControlWriter,
    /// For the thread that reads control frames.
    reader: Option<Reader>,
    /// For the threads of the page streams.
    streams: Vec<Channel>,
    pull: Option<Channel>,
    /// Closes what these threads have.
    handles: Vec<Handle>,
    orders: Vec<Sender<sender::Order>>,
}

/// Owns one migration at the source.
pub(super) struct Driver {
    guest: Arc<dyn Guest>,
    config: SourceConfig,
    dialler: Dialler,
    is_recovery: bool,
    shared: Arc<Shared>,
    events: Sender<Inbox>,
    /// Everything that this host sends for the migration.
    link: Arc<Bucket>,
    limit: Arc<Bucket>,
    pages: Arc<sender::Shared>,
    generation: u64,
    links: Option<Links>,
    /// Pages of memory and disks: what sets of them hold.
    all: PageCount,
    set: Arc<PageSet>,
    /// Which round of `set` sends only pages that exist: those of a round that means *everything*.
    skip_holes: bool,
    /// Hot pages that rounds leave out.
    deferral: Deferral,
    /// Pages that the target was told to miss.
    told: PageSet,
    /// How often each page was found dirty, if the order of pushes goes by that.
    heat: Option<Heat>,
    /// Pages that the vCPUs need first.
    first: Arc<Vec<Pfn>>,
    /// The last saved state, for the digest.
    state: Vec<u8>,
    timer: Option<Timestamp>,
    /// Pages that had gone out when the timer last ran out.
    pages_seen: u64,
    /// The engine was told that the VM process has ended.
    knows_end: bool,
    finished: bool,
}

impl Driver {
    pub(super) fn new(
        guest: Arc<dyn Guest>,
        config: SourceConfig,
        carriage: Carriage,
        shared: Arc<Shared>,
        events: Sender<Inbox>,
        link: Arc<Bucket>,
    ) -> Self {
        let dialler = Dialler {
            peer: config.peer.clone(),
            credentials: carriage.credentials.clone(),
        };
        let is_recovery = carriage.is_recovery;
        let memory = guest.memory();
        let limit = Arc::new(Bucket::new(None));
        // After a restart the guest is long gone: its memory is as it left it.
        let is_serving = is_recovery;
        let pages = sender::Shared::new(
            memory,
            carriage.disks,
            is_serving,
            Arc::clone(&limit),
            Arc::clone(&link),
            &carriage.manner,
        );
        let pages = Arc::new(pages);
        let all = config.pages();
        let set = Arc::new(PageSet::empty(all));
        let told = PageSet::empty(all);
        let deferral = Deferral::none(all);
        let heat = (carriage.manner.push_order == PushOrder::Hottest).then(|| Heat::none(all));
        Self {
            guest,
            config,
            dialler,
            is_recovery,
            shared,
            events,
            link,
            limit,
            pages,
            generation: 0,
            links: None,
            all,
            set,
            skip_holes: false,
            deferral,
            told,
            heat,
            first: Arc::default(),
            state: Vec::new(),
            timer: None,
            pages_seen: 0,
            knows_end: false,
            finished: false,
        }
    }

    /// Runs the migration to its end.
    pub(super) fn run(&mut self, inbox: &Receiver<Inbox>) {
        let span =
            tracing::info_span!("migration", migration_id = %self.config.id, role = "source");
        let _entered = span.enter();
        tracing::info!(mode = %self.config.mode, peer = %self.config.peer, "migration begins");
        self.survey();
        self.handle(SourceEvent::Begin);
        while !self.finished {
            let event = match self.timer {
                Some(at) => inbox.recv_timeout(at.since(now())),
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(event) => self.receive(event),
                Err(RecvTimeoutError::Timeout) => {
                    self.timer = None;
                    let pushed = self.pages.pushed_out();
                    if std::mem::replace(&mut self.pages_seen, pushed) != pushed {
                        self.handle(SourceEvent::Moved);
                    }
                    self.look_after_guest();
                    self.handle(SourceEvent::Timer);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the driver holds a sender itself")
                }
            }
        }
        self.disconnect();
    }

    /// A VM process that ends is noticed by nobody else while it is asked for nothing.
    fn look_after_guest(&mut self) {
        if !self.knows_end && self.guest.is_gone() {
            self.knows_end = true;
            let reason = "the VM process ended".to_owned();
            self.handle(SourceEvent::GuestFailed { reason });
        }
    }

    /// What the streams share, for progress.
    pub(super) fn pages(&self) -> Arc<sender::Shared> {
        Arc::clone(&self.pages)
    }

    /// Writes the journal, if one was asked for.
    pub(super) fn write_journal(&self, path: Option<&Path>) {
        let Some(path) = path else { return };
        let engine = lock(&self.shared.engine);
        if let Err(error) =
            journal_file::write(path, &self.config, self.is_recovery, engine.entries())
        {
            tracing::warn!(%error, path = %path.display(), "the journal was not written");
        }
    }

    fn receive(&mut self, inbox: Inbox) {
        if inbox
            .generation
            .is_some_and(|generation| generation != self.generation)
        {
            return;
        }
        match inbox.news {
            News::Event(event) => {
                if matches!(event, SourceEvent::Frame(ControlFrame::Runs { .. })) {
                    self.send_strays();
                }
                self.handle(event);
            }
            News::Reconciled(missing) => {
                let dirty = self.counts(&missing);
                self.handle(SourceEvent::Reconciled { dirty });
            }
            News::Links(links) => match self.adopt(links) {
                Ok(()) => self.handle(SourceEvent::Connected),
                Err(error) => self.handle(SourceEvent::ConnectionLost {
                    reason: error.to_string(),
                }),
            },
            News::Answer(resolution, control) => {
                self.links = Some(Links {
                    control,
                    reader: None,
                    streams: Vec::new(),
                    pull: None,
                    handles: Vec::new(),
                    orders: Vec::new(),
                });
                self.handle(SourceEvent::Resolved(resolution));
            }
        }
    }

    /// Tells the engine and does what it says; an action that is answered at once is told in turn.
    fn handle(&mut self, event: SourceEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let actions = lock(&self.shared.engine).handle(now(), event);
            for action in actions {
                match self.carry_out(action) {
                    Ok(answer) => events.extend(answer),
                    Err(error) => events.push_back(SourceEvent::GuestFailed {
                        reason: error.to_string(),
                    }),
                }
            }
        }
    }

    /// Does one thing. An error is the guest's: a broken connection reports itself.
    fn carry_out(&mut self, action: SourceAction) -> Result<Option<SourceEvent>, GuestError> {
        hold::at("source", action.name());
        match action {
            SourceAction::Connect => self.connect(Role::Control),
            SourceAction::Reconnect => self.connect(Role::Resume),
            SourceAction::Send(frame) => self.send(&frame),
            SourceAction::Record(phase) => {
                self.guest.record(&phase)?;
                return Ok(Some(SourceEvent::Recorded(phase)));
            }
            SourceAction::StartTracking => {
                self.guest.start_tracking()?;
                return Ok(Some(SourceEvent::TrackingStarted));
            }
            SourceAction::StopTracking => self.guest.stop_tracking()?,
            SourceAction::Throttle(throttle) => self.throttle(throttle)?,
            SourceAction::Rehearse => return self.rehearse().map(Some),
            SourceAction::Harvest { round, defer_max } => {
                return self.harvest(round, defer_max).map(Some);
            }
            SourceAction::Look => return self.look().map(Some),
            SourceAction::HarvestStale { round } => return self.harvest_stale(round).map(Some),
            SourceAction::Clear(piece) => return self.clear(piece).map(Some),
            SourceAction::SendPiece { piece, stream } => self.order_piece(piece, stream),
            SourceAction::SendStale { piece, stream } => {
                let set = Arc::clone(&self.set);
                self.order(stream, sender::Order::Stale { piece, set });
            }
            SourceAction::SendFirst { round, stream } => {
                let pages = Arc::clone(&self.first);
                self.order(stream, sender::Order::First { round, pages });
            }
            SourceAction::Push { piece, stream } => {
                self.order(stream, sender::Order::Push { piece });
            }
            SourceAction::SendBarrier {
                stream,
                round,
                streams,
            } => {
                self.order(stream, sender::Order::Barrier { round, streams });
            }
            SourceAction::Pause {
                harvest, switch, ..
            } => return self.pause(harvest, switch).map(Some),
            SourceAction::Resume => {
                let unlocked = self.pages.disks.unlock();
                unlocked.map_err(|error| GuestError(error.to_string()))?;
                self.guest.resume()?;
                return Ok(Some(SourceEvent::Resumed));
            }
            SourceAction::Hash => self.hash(),
            SourceAction::Release => {
                self.send_strays();
                self.guest.stop()?;
                return Ok(Some(SourceEvent::Released));
            }
            SourceAction::LimitBandwidth(rate) => self.limit.set_rate(rate),
            SourceAction::Disconnect => self.disconnect(),
            SourceAction::Resolve => self.resolve(),
            SourceAction::SetTimer(at) => self.timer = Some(at),
            SourceAction::ReportUnresolved { reason } => self.report_unresolved(reason),
            SourceAction::Finish(outcome) => {
                tracing::info!(?outcome, "migration ends");
                *lock(&self.shared.unresolved) = None;
                self.finished = true;
            }
        }
        Ok(None)
    }

    fn clear(&self, piece: Piece) -> Result<SourceEvent, GuestError> {
        let kept = self.deferral.left_out_in(piece.range);
        self.guest.clear(piece.range, kept)?;
        Ok(SourceEvent::Cleared(piece))
    }

    fn report_unresolved(&self, reason: String) {
        let mut unresolved = lock(&self.shared.unresolved);
        // It is asked every two seconds, perhaps for days: one line for each new reason.
        if unresolved.as_ref() != Some(&reason) {
            tracing::warn!(%reason, "the outcome is not known yet; asking the target");
            *unresolved = Some(reason);
        }
    }

    /// Finds out which pages exist while the connections are made, so that nobody has to wait for it
    /// later; what comes into being meanwhile is found when its turn comes.
    fn survey(&self) {
        let pages = Arc::clone(&self.pages);
        self.spawn("survey", move || {
            if let Err(error) = pages.existing.all() {
                tracing::debug!(%error, "what exists is found out piece by piece");
            }
        });
    }

    /// Dials in a thread of its own: an unreachable host takes seconds to say so.
    fn connect(&mut self, role: Role) {
        self.generation += 1;
        let preamble = self.preamble(role);
        let (dialler, streams) = (self.dialler.clone(), self.config.streams);
        let link = Arc::clone(&self.link);
        let report = self.reporter();
        self.spawn("connect", move || {
            let dial = |role| dialler.dial(Preamble { role, ..preamble });
            let dialled = || -> Result<Links, connection::Dial> {
                let control = dial(role)?;
                let pull = dial(Role::Pull)?;
                let streams = (0..streams).map(|index| dial(Role::Push(index)));
                let streams = streams.collect::<Result<_, _>>()?;
                Ok(Links {
                    control: ControlWriter::new(control.writer, link),
                    reader: Some(control.reader),
                    streams,
                    pull: Some(pull),
                    handles: Vec::new(),
                    orders: Vec::new(),
                })
            };
            report(match dialled() {
                Ok(links) => News::Links(links),
                Err(error) => News::Event(SourceEvent::ConnectionLost {
                    reason: error.to_string(),
                }),
            });
        });
    }

    fn preamble(&self, role: Role) -> Preamble {
        Preamble {
            migration: self.config.id,
            role,
            // Some billion attempts would be needed for a number to come again.
            generation: self.generation as u32,
        }
    }

    /// Starts the threads of fresh connections.
    fn adopt(&mut self, mut links: Links) -> io::Result<()> {
        let mut reader = links
            .reader
            .take()
            .expect("a dialled connection has a reading half");
        let (streams, pull) = (std::mem::take(&mut links.streams), links.pull.take());
        links.handles = streams.iter().chain(&pull).map(Channel::handle).collect();
        self.pages.renew_unsent();
        let report = self.reporter();
        thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                loop {
                    match connection::read_frame(&mut reader) {
                        Ok(frame) => report(News::Event(SourceEvent::Frame(frame))),
                        Err(error) => {
                            let reason = match error {
                                ReadError::Broken(error) => broken(&error),
                                error => error.to_string(),
                            };
                            return report(News::Event(SourceEvent::ConnectionLost { reason }));
                        }
                    }
                }
            })?;
        for (index, stream) in (0u8..).zip(streams) {
            let report = self.reporter();
            let pages = Arc::clone(&self.pages);
            let orders =
                sender::start(index, stream.writer, Arc::clone(&self.pages), move |news| {
                    report(News::Event(match news {
                        sender::Report::Sent {
                            piece,
                            stream,
                            sent,
                        } => SourceEvent::Sent {
                            piece,
                            stream,
                            sent,
                        },
                        sender::Report::Broken { stream, error } => SourceEvent::ConnectionLost {
                            reason: format!(
                                "page stream {stream} to the target broke: {}",
                                connection::in_words(&error)
                            ),
                        },
                        sender::Report::Unreadable { error } => unreadable(&error, &pages),
                    }));
                })?;
            links.orders.push(orders);
        }
        if let Some(pull) = pull {
            let report = self.reporter();
            let pages = Arc::clone(&self.pages);
            pull_server::start(pull, pages, move |news| {
                report(match news {
                    pull_server::Report::Reconciled(missing) => News::Reconciled(missing),
                    pull_server::Report::Broken { reason } => {
                        News::Event(SourceEvent::ConnectionLost { reason })
                    }
                });
            })?;
        }
        self.links = Some(links);
        Ok(())
    }

    /// Closes everything of this generation.
    fn disconnect(&mut self) {
        self.generation += 1;
        // A stream that waits for its turn shall see at once that its socket is closed.
        self.limit.hurry();
        self.link.hurry();
        if let Some(links) = self.links.take() {
            links.control.close();
            links.handles.iter().for_each(Handle::close);
        }
    }

    fn send(&self, frame: &ControlFrame) {
        let Some(links) = &self.links else { return };
        if let Err(error) = links.control.send(frame) {
            let reason = broken(&error);
            self.reporter()(News::Event(SourceEvent::ConnectionLost { reason }));
        }
    }

    /// Sends after the guest what came for it here before the network heard that it has gone. What cannot be
    /// sent is lost, as networks lose packets.
    fn send_strays(&self) {
        match self.guest.take_strays() {
            Ok(packets) if packets.is_empty() || packets.len() > STRAYS_BYTES_MAX => {}
            Ok(packets) => self.send(&ControlFrame::Strays { packets }),
            Err(error) => tracing::debug!(%error, "packets do not go after the guest"),
        }
    }

    fn rehearse(&self) -> Result<SourceEvent, GuestError> {
        let saved = self.guest.rehearse()?;
        Ok(SourceEvent::Rehearsed {
            stall: now().since(saved.stopped_first),
            save: saved.saved.since(saved.stopped_first),
            state: saved.state,
        })
    }

    fn harvest(&mut self, round: u32, defer_max: PageCount) -> Result<SourceEvent, GuestError> {
        let mut set = PageSet::empty(self.all);
        let writers = self.guest.harvest(&mut set)?;
        self.skip_holes = round == 0;
        let mut deferred = PageCount::ZERO;
        let dirty = if round == 0 {
            // All that exists is to be sent, whatever the log says about it.
            set = self.pages.disks.everything();
            self.existing_pages()?
        } else {
            if let Some(heat) = &mut self.heat {
                heat.add(&set);
            }
            deferred = self.deferral.take_out(&mut set, defer_max);
            self.counts(&set)
        };
        self.set = Arc::new(set);
        Ok(SourceEvent::Harvested {
            round,
            dirty,
            deferred,
            writers,
        })
    }

    fn throttle(&self, throttle: Option<Throttle>) -> Result<(), GuestError> {
        match &throttle {
            Some(throttle) => tracing::info!(%throttle, "the guest's writers are slowed down"),
            None => tracing::info!("the guest's writers are let go"),
        }
        self.guest.throttle(throttle)
    }

    /// In the bulk round, in which all that exists is sent: what it finds may be cleared, too.
    fn look(&self) -> Result<SourceEvent, GuestError> {
        let mut dirty = Vec::new();
        if self.guest.harvests_freely() {
            let mut set = PageSet::empty(self.all);
            self.guest.harvest(&mut set)?;
            dirty = self.counts(&set);
        }
        Ok(SourceEvent::Looked { dirty })
    }

    /// What no earlier pass told the target to be stale.
    fn harvest_stale(&mut self, round: u32) -> Result<SourceEvent, GuestError> {
        let mut set = PageSet::empty(self.all);
        let writers = self.guest.harvest(&mut set)?;
        set.subtract(&self.told);
        self.told.union_with(&set);
        let dirty = self.counts(&set);
        self.set = Arc::new(set);
        Ok(SourceEvent::Harvested {
            round,
            dirty,
            deferred: PageCount::ZERO,
            writers,
        })
    }

    fn pause(&mut self, harvest: bool, switch: bool) -> Result<SourceEvent, GuestError> {
        let log = harvest.then(|| PageSet::empty(self.all));
        let Saved {
            state,
            stopped_first,
            stopped_last,
            harvested,
            saved,
            dirty,
            first_needed,
        } = self.guest.pause_and_save(log)?;
        // It has let go of its disks, for whoever runs it next; what is copied of them must not change.
        let locked = self.pages.disks.lock();
        locked.map_err(|error| GuestError(format!("a disk that is copied is in use: {error}")))?;
        self.skip_holes = dirty.is_none();
        let mut paused = Paused {
            dirty: Vec::new(),
            state,
            stopped_first,
            stopped_last,
            harvested,
            saved,
            missing: PageCount::ZERO,
            missing_counts: Vec::new(),
            recorded: PageCount::ZERO,
        };
        if switch {
            // Without a log every page is missing; that holes are zero is told by the pushes.
            let missing = dirty.unwrap_or_else(|| self.pages.disks.everything());
            self.switch(missing, first_needed, &mut paused);
        } else {
            paused.dirty = match dirty {
                Some(set) => {
                    let counts = self.counts(&set);
                    self.set = Arc::new(set);
                    counts
                }
                None => {
                    self.set = Arc::new(self.pages.disks.everything());
                    self.existing_pages()?
                }
            };
        }
        self.state.clone_from(&paused.state);
        Ok(SourceEvent::Paused(paused))
    }

    /// Splits what the target will miss into what is sent first, what it has been told, and what
    /// this round tells; from here on pulls are answered.
    fn switch(&mut self, mut missing: PageSet, mut first: Vec<Pfn>, paused: &mut Paused) {
        first.retain(|&page| missing.remove(page));
        self.first = Arc::new(first);
        let mut set = missing.clone();
        set.subtract(&self.told);
        paused.dirty = self.counts(&set);
        paused.missing = missing.count();
        paused.missing_counts = self.counts(&missing);
        self.told.union_with(&set);
        self.set = Arc::new(set);
        let is_needed = !missing.is_empty();
        let unsent = self.pages.unsent();
        let mut chooser = unsent.chooser();
        if let Some(heat) = self.heat.take() {
            chooser.set_heat(heat);
        }
        paused.recorded = chooser.recorded_in(&missing);
        drop(chooser);
        *unsent.lock() = missing;
        self.pages.is_serving.store(is_needed, Ordering::SeqCst);
    }

    /// Members of `set` in each chunk.
    fn counts(&self, set: &PageSet) -> Vec<u32> {
        self.chunks()
            .map(|chunk| count(set.count_range(chunk)))
            .collect()
    }

    /// Pages of each chunk that are no holes in the memory file, or in a disk.
    fn existing_pages(&self) -> Result<Vec<u32>, GuestError> {
        let existing = self.pages.all_existing();
        let existing = existing.map_err(|error| GuestError(error.to_string()))?;
        Ok(self.counts(&existing))
    }

    fn chunks(&self) -> impl Iterator<Item = PageRange> {
        let (all, chunk) = (self.all.get(), self.config.chunk.get());
        (0..all.div_ceil(chunk)).map(move |index| {
            let first = index * chunk;
            PageRange::new(Pfn::new(first), PageCount::new(chunk.min(all - first)))
        })
    }

    fn order_piece(&self, piece: Piece, stream: u8) {
        let (set, skip_holes) = (Arc::clone(&self.set), self.skip_holes);
        self.order(
            stream,
            sender::Order::Piece {
                piece,
                set,
                skip_holes,
            },
        );
    }

    fn order(&self, stream: u8, order: sender::Order) {
        let orders = self
            .links
            .as_ref()
            .and_then(|links| links.orders.get(usize::from(stream)));
        // A stream that broke has reported itself; what it is told after that changes nothing.
        if orders.is_none_or(|orders| orders.send(order).is_err()) {
            tracing::debug!(stream, "a page stream is gone");
        }
    }

    fn hash(&self) {
        let pages = Arc::clone(&self.pages);
        let state = self.state.clone();
        let report = self.reporter();
        self.spawn("hash", move || {
            let goes_on = || report(News::Event(SourceEvent::Moved));
            let digest = digest::of_guest(&pages.memory, &pages.disks, &state, goes_on);
            report(News::Event(match digest {
                Ok(digest) => SourceEvent::Hashed(digest),
                Err(error) => SourceEvent::ConnectionLost {
                    reason: error.to_string(),
                },
            }));
        });
    }

    fn resolve(&mut self) {
        self.generation += 1;
        let (preamble, dialler) = (self.preamble(Role::Resolve), self.dialler.clone());
        let link = Arc::clone(&self.link);
        let report = self.reporter();
        self.spawn("resolve", move || {
            report(match outcome::ask(&dialler, preamble, link) {
                Ok((resolution, writer)) => News::Answer(resolution, writer),
                Err(reason) => News::Event(SourceEvent::ResolveFailed { reason }),
            });
        });
    }

    /// Sends news of the present generation to the driver; the driver may be gone by then.
    fn reporter(&self) -> impl Fn(News) + Send + 'static {
        let (events, generation) = (self.events.clone(), Some(self.generation));
        move |news| {
            if events.send(Inbox { generation, news }).is_err() {
                tracing::trace!("news after the end of a migration");
            }
        }
    }

    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(work) {
            let reason = format!("no thread to {name}: {error}");
            self.reporter()(News::Event(SourceEvent::ConnectionLost { reason }));
        }
    }
}

/// What it means that a disk cannot be read. Of a guest that is the target's already nobody else has the pages.
fn unreadable(error: &io::Error, pages: &sender::Shared) -> SourceEvent {
    let reason = format!("a disk cannot be read: {error}");
    if pages.is_serving.load(Ordering::SeqCst) {
        SourceEvent::ConnectionLost { reason }
    } else {
        SourceEvent::GuestFailed { reason }
    }
}

fn broken(error: &io::Error) -> String {
    format!(
        "the connection to the target broke: {}",
        connection::in_words(error)
    )
}

fn now() -> Timestamp {
    Timestamp::from_nanos(limosa_os::monotonic_nanos())
}

fn count(pages: PageCount) -> u32 {
    u32::try_from(pages.get()).expect("a chunk is small")
}
