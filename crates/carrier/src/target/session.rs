//! One arriving migration: the driver that owns its engine, and the handle that connections use.

use super::{IncomingStatus, TargetHost};
use crate::bucket::Bucket;
use crate::connection::{self, ControlWriter, HANDSHAKE_MAX};
use crate::guest::{CommitError, Guest};
use crate::{hold, receiver};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_engine::journal::Machine;
use limosa_engine::target::{Target, TargetAction, TargetEvent};
use limosa_engine::wire::{ControlFrame, Start};
use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What connections see of a migration that arrives.
pub(super) struct Session {
    id: MigrationId,
    from: SocketAddr,
    events: Sender<TargetEvent>,
    inside: Mutex<Inside>,
    changed: Condvar,
    committed: AtomicBool,
}

#[derive(Default)]
struct Inside {
    /// Push streams that have come, by index.
    streams: Vec<(u8, TcpStream)>,
    /// Handles of the streams that deliver pages, to close them.
    receiving: Vec<TcpStream>,
    pages: Option<Arc<receiver::Shared>>,
    /// A guest that was made and not yet taken over by the driver.
    made: Option<Arc<dyn Guest>>,
    /// A guest is being made, in a thread of its own.
    making: bool,
    /// The attempt is given up: nobody waits for streams or a guest any more.
    given_up: bool,
    resolution: Option<Resolution>,
    over: bool,
}

/// Owns the engine of one arriving migration.
pub(super) struct Driver {
    session: Arc<Session>,
    host: Arc<dyn TargetHost>,
    control: ControlWriter,
    inbox: Receiver<TargetEvent>,
    engine: Target,
    guest: Option<Arc<dyn Guest>>,
    /// The state that was loaded last, for the digest.
    state: Vec<u8>,
    timer: Option<Timestamp>,
    finished: bool,
}

impl Session {
    pub(super) fn new(
        id: MigrationId,
        from: SocketAddr,
        control: TcpStream,
        host: Arc<dyn TargetHost>,
    ) -> (Arc<Self>, Driver) {
        let (events, inbox) = channel();
        let session = Arc::new(Self {
            id,
            from,
            events,
            inside: Mutex::default(),
            changed: Condvar::new(),
            committed: AtomicBool::new(false),
        });
        let driver = Driver {
            session: Arc::clone(&session),
            host,
            control: ControlWriter::new(control, Arc::new(Bucket::new(None))),
            inbox,
            engine: Target::new(id, limosa_os::boot_id(), now()),
            guest: None,
            state: Vec::new(),
            timer: None,
            finished: false,
        };
        (session, driver)
    }

    pub(super) fn status(&self) -> IncomingStatus {
        let inside = self.inside();
        let count = |of: fn(&receiver::Shared) -> u64| inside.pages.as_deref().map_or(0, of);
        IncomingStatus {
            id: self.id,
            from: self.from,
            pages_received: count(|pages| pages.pages_received.load(Ordering::Relaxed)),
            bytes_received: count(|pages| pages.bytes_received.load(Ordering::Relaxed)),
            is_committed: self.committed.load(Ordering::SeqCst),
        }
    }

    /// A push stream has come.
    pub(super) fn attach(&self, index: u8, stream: TcpStream) {
        let mut inside = self.inside();
        let is_new = inside.streams.iter().all(|(known, _)| *known != index);
        if is_new && !inside.over {
            inside.streams.push((index, stream));
            self.changed.notify_all();
        }
    }

    pub(super) fn frame(&self, frame: ControlFrame) {
        self.tell(TargetEvent::Frame(frame));
    }

    pub(super) fn lost(&self, reason: &str) {
        self.tell(TargetEvent::ConnectionLost {
            reason: reason.to_owned(),
        });
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

    /// Waits until all push streams have come and takes them, in order of their index.
    fn take_streams(&self, count: u8) -> Option<Vec<TcpStream>> {
        let inside = self.inside();
        let all = |inside: &Inside| inside.streams.len() >= usize::from(count);
        let (mut inside, _) = self
            .changed
            .wait_timeout_while(inside, HANDSHAKE_MAX, |inside| {
                !all(inside) && !inside.given_up
            })
            .unwrap_or_else(PoisonError::into_inner);
        if !all(&inside) {
            return None;
        }
        let mut streams = std::mem::take(&mut inside.streams);
        streams.sort_by_key(|(index, _)| *index);
        let in_order = (0..count).eq(streams.iter().map(|(index, _)| *index));
        in_order.then(|| streams.into_iter().map(|(_, stream)| stream).collect())
    }

    /// Waits until no guest is being made any more, which is soon, and takes one that nobody has
    /// taken. Only then is nothing of the attempt left to come.
    fn give_up(&self) -> Option<Arc<dyn Guest>> {
        let mut inside = self.inside();
        inside.given_up = true;
        self.changed.notify_all();
        let mut inside = self
            .changed
            .wait_while(inside, |inside| inside.making)
            .unwrap_or_else(PoisonError::into_inner);
        inside.made.take()
    }

    fn tell(&self, event: TargetEvent) {
        if self.events.send(event).is_err() {
            tracing::trace!(migration_id = %self.id, "news after the end of a migration");
        }
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver {
    /// Runs the migration to its end.
    pub(super) fn run(mut self) {
        let span =
            tracing::info_span!("migration", migration_id = %self.session.id, role = "target");
        let _entered = span.enter();
        // A source that says nothing is ended by its first frame's time-out.
        while !self.finished {
            let event = match self.timer {
                Some(at) => self.inbox.recv_timeout(at.since(now())),
                None => self
                    .inbox
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {
                    self.timer = None;
                    self.handle(TargetEvent::Timer);
                }
                Err(RecvTimeoutError::Disconnected) => unreachable!("the session holds a sender"),
            }
        }
        self.control.close();
        self.close_streams();
        let mut inside = self.session.inside();
        inside.over = true;
        inside.streams.clear();
        inside.pages = None;
        drop(inside);
        self.session.changed.notify_all();
    }

    fn handle(&mut self, event: TargetEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let event = self.receive(event);
            let runs = matches!(event, TargetEvent::Running { .. });
            let actions = self.engine.handle(now(), event);
            self.session
                .committed
                .store(self.engine.is_committed(), Ordering::SeqCst);
            for action in actions {
                events.extend(self.carry_out(action));
            }
            // After the source was told: what the host does with the news is no part of the switch.
            if runs {
                self.host.running(self.session.id);
            }
        }
    }

    /// Takes note of what the engine need not know.
    fn receive(&mut self, event: TargetEvent) -> TargetEvent {
        if let TargetEvent::Frame(ControlFrame::State { state, .. }) = &event {
            self.state.clone_from(state);
        }
        if matches!(event, TargetEvent::Created) {
            self.guest = self.session.inside().made.take();
        }
        event
    }

    fn carry_out(&mut self, action: TargetAction) -> Option<TargetEvent> {
        hold::at("target", action.name());
        let guest = self.guest.clone();
        let failed = |error: crate::GuestError| {
            Some(TargetEvent::VmFailed {
                reason: error.to_string(),
            })
        };
        match (action, guest) {
            (TargetAction::Create(start), _) => self.create(start),
            (TargetAction::Send(frame), _) => {
                if let Err(error) = self.control.send(&frame) {
                    return Some(TargetEvent::ConnectionLost {
                        reason: error.to_string(),
                    });
                }
            }
            (
                TargetAction::Load {
                    state,
                    is_rehearsal,
                },
                Some(guest),
            ) => {
                if !is_rehearsal {
                    self.close_streams();
                }
                return match guest.load(&state, is_rehearsal) {
                    Ok(took) => Some(TargetEvent::Loaded { took }),
                    Err(error) => failed(error),
                };
            }
            (TargetAction::CommitAndRun { stopped_at }, Some(guest)) => {
                return Some(self.commit_and_run(&*guest, stopped_at));
            }
            (TargetAction::Digest, _) => self.digest(),
            (TargetAction::Record(phase), Some(guest)) => {
                return match guest.record(&phase) {
                    Ok(()) => Some(TargetEvent::Recorded(phase)),
                    Err(error) => failed(error),
                };
            }
            (TargetAction::Destroy, guest) => {
                let made = self.session.give_up();
                self.close_streams();
                stop(guest.or(made));
                return Some(TargetEvent::Destroyed);
            }
            (TargetAction::AnswerResolve(resolution), _) => {
                self.session.inside().resolution = Some(resolution);
                self.session.changed.notify_all();
            }
            (TargetAction::SetTimer(at), _) => self.timer = Some(at),
            (TargetAction::Finish(outcome), _) => {
                tracing::info!(?outcome, "arriving migration ends");
                self.host.finished(self.session.id, &outcome);
                self.finished = true;
            }
            (
                TargetAction::Load { .. }
                | TargetAction::CommitAndRun { .. }
                | TargetAction::Record(_),
                None,
            ) => {
                unreachable!("the engine asks nothing of a guest that was not created")
            }
        }
        None
    }

    /// Makes the guest in a thread of its own and starts to receive once all streams have come.
    fn create(&self, start: Start) {
        let (session, host) = (Arc::clone(&self.session), Arc::clone(&self.host));
        self.session.inside().making = true;
        let spawned = thread::Builder::new()
            .name("create".to_owned())
            .spawn(move || {
                let event = match session.make(&*host, &start) {
                    Ok(()) => TargetEvent::Created,
                    Err(reason) => TargetEvent::CreateFailed { reason },
                };
                session.inside().making = false;
                session.changed.notify_all();
                session.tell(event);
            });
        if let Err(error) = spawned {
            self.session.inside().making = false;
            self.session.tell(TargetEvent::CreateFailed {
                reason: error.to_string(),
            });
        }
    }

    fn commit_and_run(&self, guest: &dyn Guest, stopped_at: Timestamp) -> TargetEvent {
        match guest.commit_and_run(self.session.id, stopped_at) {
            Ok(running) => TargetEvent::Running {
                first_instruction_at: running.first_instruction_at,
            },
            Err(CommitError::Refused(error)) => TargetEvent::CommitRefused {
                reason: error.to_string(),
            },
            Err(CommitError::Unknown(error)) => {
                // The host has to remember it like one that runs: it may have been seen running.
                self.host.running(self.session.id);
                TargetEvent::VmFailed {
                    reason: error.to_string(),
                }
            }
        }
    }

    fn digest(&self) {
        let Some(pages) = self.session.inside().pages.clone() else {
            return;
        };
        let (session, state) = (Arc::clone(&self.session), self.state.clone());
        let spawned = thread::Builder::new()
            .name("digest".to_owned())
            .spawn(move || {
                if let Some(hashes) = &pages.hashes {
                    session.tell(TargetEvent::Digested(hashes.digest(&state)));
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for the digest");
        }
    }

    /// Nothing is installed from here on: the guest's memory is the guest's.
    fn close_streams(&self) {
        let mut inside = self.session.inside();
        if let Some(pages) = &inside.pages {
            pages.seal();
        }
        inside
            .receiving
            .drain(..)
            .for_each(|stream| connection::close(&stream));
    }
}

impl Session {
    /// Makes the guest, waits for the streams, receives.
    fn make(self: &Arc<Self>, host: &dyn TargetHost, start: &Start) -> Result<(), String> {
        let guest = host.create(self.id, start)?;
        let made = self.receive(&guest, start);
        let mut inside = self.inside();
        if made.is_ok() && !inside.given_up {
            inside.made = Some(guest);
            return Ok(());
        }
        drop(inside);
        stop(Some(guest));
        made
    }

    fn receive(self: &Arc<Self>, guest: &Arc<dyn Guest>, start: &Start) -> Result<(), String> {
        let memory = guest.memory();
        if memory.page_count() != start.memory_pages {
            return Err("the machine's description and the announced memory differ".to_owned());
        }
        let streams = self
            .take_streams(start.streams)
            .ok_or("the page streams did not come")?;
        let pages = Arc::new(receiver::Shared::new(
            memory,
            start.memory_pages,
            start.verify,
        ));
        let mut handles = Vec::new();
        for stream in &streams {
            handles.push(stream.try_clone().map_err(|error| error.to_string())?);
        }
        let mut inside = self.inside();
        inside.pages = Some(Arc::clone(&pages));
        inside.receiving = handles;
        drop(inside);
        for (index, stream) in (0u8..).zip(streams) {
            let session = Arc::clone(self);
            let report = move |news| {
                session.tell(match news {
                    receiver::Report::Barrier { stream, round } => {
                        TargetEvent::Barrier { stream, round }
                    }
                    receiver::Report::Broken { reason } => TargetEvent::ConnectionLost { reason },
                });
            };
            receiver::start(index, stream, Arc::clone(&pages), report)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Ends the VM process of a guest that will not run here.
fn stop(guest: Option<Arc<dyn Guest>>) {
    if let Some(Err(error)) = guest.map(|guest| guest.stop()) {
        tracing::warn!(%error, "the VM process of an ended migration did not stop");
    }
}

fn now() -> Timestamp {
    Timestamp::from_nanos(limosa_os::monotonic_nanos())
}
