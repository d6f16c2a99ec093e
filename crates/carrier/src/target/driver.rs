//! The driver of one arriving migration: takes events, asks the engine, carries its actions out.
//!
//! Requests to the VM process are made here, one at a time. What may take long (making the guest,
//! waiting for streams, the digest) has a thread of its own, which tells the driver what came of it.

use super::TargetHost;
use super::session::{News, Session};
use crate::channel::Handle;
use crate::connection::ControlWriter;
use crate::demanded::Demanded;
use crate::faults::Faults;
use crate::guest::{CommitError, Guest};
use crate::{hold, receiver};
use limosa_engine::Timestamp;
use limosa_engine::journal::Machine;
use limosa_engine::target::{Target, TargetAction, TargetEvent, TargetOutcome};
use limosa_engine::wire::{ControlFrame, Start};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a source may take to hear of a loss.
const LINGER_MAX: Duration = Duration::from_secs(1);

/// Owns the engine of one arriving migration.
pub(super) struct Driver {
    session: Arc<Session>,
    host: Arc<dyn TargetHost>,
    /// `None` while the source is away.
    pub(super) control: Option<Arc<ControlWriter>>,
    inbox: Receiver<News>,
    engine: Target,
    pub(super) guest: Option<Arc<dyn Guest>>,
    /// The state that was loaded last, for the digest.
    state: Vec<u8>,
    timer: Option<Timestamp>,
    finished: bool,
}

impl Driver {
    /// Of a migration whose source is not connected yet.
    pub(super) fn new(
        session: Arc<Session>,
        host: Arc<dyn TargetHost>,
        inbox: Receiver<News>,
        engine: Target,
    ) -> Self {
        Self {
            session,
            host,
            control: None,
            inbox,
            engine,
            guest: None,
            state: Vec::new(),
            timer: None,
            finished: false,
        }
    }

    /// Runs the migration to its end.
    pub(super) fn run(mut self) {
        let span =
            tracing::info_span!("migration", migration_id = %self.session.id, role = "target");
        let _entered = span.enter();
        if self.engine.is_filling() {
            self.take_up();
        }
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
                Ok(news) => self.take(news),
                Err(RecvTimeoutError::Timeout) => {
                    self.timer = None;
                    self.look_after_guest();
                    self.handle(TargetEvent::Timer);
                }
                Err(RecvTimeoutError::Disconnected) => unreachable!("the session holds a sender"),
            }
        }
        if let Some(control) = self.control.take() {
            control.close();
        }
        self.close_streams();
        if let Some((_, faults)) = self.faults() {
            faults.end();
        }
        let mut inside = self.session.inside();
        inside.over = true;
        inside.streams.clear();
        inside.pages = None;
        drop(inside);
        self.session.changed.notify_all();
    }

    /// Gives the source time to hear that its guest is lost, and why: it would take streams that are closed for a
    /// broken link, and ask. It closes the connection when it has heard.
    fn linger(&self) {
        let until = Instant::now() + LINGER_MAX;
        while self.control.is_some()
            && let Ok(news) = self
                .inbox
                .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            if matches!(news, News::Of(_, TargetEvent::ConnectionLost { .. })) {
                return;
            }
        }
    }

    fn take(&mut self, news: News) {
        match news {
            News::Event(event) => self.handle(event),
            News::Of(generation, event) => {
                if self.session.inside().generation != generation {
                    return;
                }
                match event {
                    TargetEvent::Frame(ControlFrame::Strays { packets }) => self.pass_on(&packets),
                    event => self.handle(event),
                }
            }
            News::Resumed(generation, control) => {
                if self.session.inside().generation == generation {
                    if let Some(old) = self.control.replace(control) {
                        old.close();
                    }
                    self.session.inside().is_connected = true;
                    self.detach_streams();
                }
            }
        }
    }

    /// Gives a guest that runs here what came for it where it was before: no matter of the engine.
    fn pass_on(&self, packets: &[u8]) {
        let guest = self.guest.as_ref().filter(|_| self.engine.is_committed());
        if let Some(Err(error)) = guest.map(|guest| guest.give_strays(packets)) {
            tracing::debug!(%error, "packets that came to the source are lost");
        }
    }

    /// A VM process that ends is noticed by nobody else while it is asked for nothing.
    fn look_after_guest(&mut self) {
        if self.guest.as_ref().is_some_and(|guest| guest.is_gone()) {
            let reason = "the VM process at the target ended".to_owned();
            self.handle(TargetEvent::VmFailed { reason });
        }
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
                self.host.running(self.session.id, self.engine.is_filling());
            }
        }
    }

    /// Takes note of what the engine need not know.
    fn receive(&mut self, event: TargetEvent) -> TargetEvent {
        if let TargetEvent::Frame(ControlFrame::State { state, .. }) = &event {
            self.state.clone_from(state);
        }
        if matches!(event, TargetEvent::Created { .. }) {
            self.guest = self.session.inside().made.take();
        }
        event
    }

    fn carry_out(&mut self, action: TargetAction) -> Option<TargetEvent> {
        hold::at("target", action.name());
        match action {
            TargetAction::Create(start) => self.create(start),
            TargetAction::Send(frame) => {
                if let Some(control) = &self.control
                    && let Err(error) = control.send(&frame)
                {
                    return Some(TargetEvent::ConnectionLost {
                        reason: error.to_string(),
                    });
                }
            }
            TargetAction::ServeFaults => self.serve_faults(),
            TargetAction::Detach => {
                self.control = None;
                self.session.inside().is_connected = false;
                self.detach_streams();
            }
            TargetAction::Reconcile { streams } => self.reconcile(streams),
            TargetAction::Digest => self.digest(),
            TargetAction::Destroy => {
                let made = self.session.give_up();
                self.close_streams();
                stop(self.guest.clone().or(made));
                return Some(TargetEvent::Destroyed);
            }
            TargetAction::AnswerResolve(resolution) => {
                self.session.inside().resolution = Some(resolution);
                self.session.changed.notify_all();
            }
            TargetAction::SetTimer(at) => self.timer = Some(at),
            TargetAction::Finish(outcome) => {
                tracing::info!(?outcome, "arriving migration ends");
                self.host.finished(self.session.id, &outcome);
                if matches!(outcome, TargetOutcome::Lost { .. }) {
                    self.linger();
                }
                self.finished = true;
            }
            TargetAction::Load { .. }
            | TargetAction::CommitAndRun { .. }
            | TargetAction::Disarm
            | TargetAction::Record(_) => return Some(self.ask_guest(action)),
        }
        None
    }

    /// What the VM process has to do.
    fn ask_guest(&self, action: TargetAction) -> TargetEvent {
        let Some(guest) = &self.guest else {
            unreachable!("the engine asks nothing of a guest that was not created")
        };
        let failed = |error: crate::GuestError| TargetEvent::VmFailed {
            reason: error.to_string(),
        };
        match action {
            TargetAction::Load {
                state,
                is_rehearsal,
            } => {
                if !is_rehearsal && !self.is_serving() {
                    self.close_streams();
                }
                let loaded = guest.load(&state, is_rehearsal);
                loaded.map_or_else(failed, |took| TargetEvent::Loaded { took })
            }
            TargetAction::CommitAndRun {
                stopped_at,
                keeps_faults,
            } => self.commit_and_run(&**guest, stopped_at, keeps_faults),
            TargetAction::Disarm => self.disarm(&**guest),
            TargetAction::Record(phase) => {
                let recorded = guest.record(&phase);
                recorded.map_or_else(failed, |()| TargetEvent::Recorded(phase))
            }
            _ => unreachable!("not for the VM process"),
        }
    }

    /// Makes the guest in a thread of its own and starts to receive once all streams have come.
    fn create(&self, start: Start) {
        let (session, host) = (Arc::clone(&self.session), Arc::clone(&self.host));
        self.session.inside().making = true;
        let spawned = thread::Builder::new()
            .name("create".to_owned())
            .spawn(move || {
                let event = match session.make(&*host, &start) {
                    Ok(can_fault) => TargetEvent::Created { can_fault },
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

    fn commit_and_run(
        &self,
        guest: &dyn Guest,
        stopped_at: Timestamp,
        keeps_faults: bool,
    ) -> TargetEvent {
        match guest.commit_and_run(self.session.id, stopped_at, keeps_faults) {
            Ok(running) => TargetEvent::Running {
                first_instruction_at: running.first_instruction_at,
            },
            Err(CommitError::Refused(error)) => TargetEvent::CommitRefused {
                reason: error.to_string(),
            },
            Err(CommitError::Unknown(error)) => {
                // The host has to remember it like one that runs: it may have been seen running.
                self.host.running(self.session.id, keeps_faults);
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
        if let Some(pages) = self.pages() {
            pages.seal();
        }
        self.detach_streams();
    }

    /// Closes the streams of the present connections; what they brought stays.
    fn detach_streams(&self) {
        let mut inside = self.session.inside();
        // First: whoever writes to one at the moment has it while it writes.
        inside.receiving.iter().for_each(Handle::close);
        inside.receiving.clear();
        inside.pull = None;
        if let Some(faults) = inside
            .pages
            .as_ref()
            .and_then(|pages| pages.faults.as_ref())
        {
            faults.detach();
        }
    }

    fn pages(&self) -> Option<Arc<receiver::Shared>> {
        self.session.inside().pages.clone()
    }

    fn faults(&self) -> Option<(Arc<receiver::Shared>, Arc<Faults>)> {
        let pages = self.pages()?;
        let faults = Arc::clone(pages.faults.as_ref()?);
        Some((pages, faults))
    }

    fn is_serving(&self) -> bool {
        self.pages().is_some_and(|pages| pages.is_filling())
    }

    /// A restarted daemon serves the page faults of the guest that it found.
    fn take_up(&mut self) {
        if let Some((_, faults)) = self.faults()
            && let Err(error) = self.session.start_faults(&faults)
        {
            let reason = format!("page faults cannot be served: {error}");
            return self.handle(TargetEvent::VmFailed { reason });
        }
        self.serve_faults();
        self.handle(TargetEvent::Timer);
    }

    /// From here on nobody but the installer puts pages in, and page faults are answered.
    fn serve_faults(&self) {
        let Some((pages, faults)) = self.faults() else {
            unreachable!("the engine serves faults only where they can be served");
        };
        pages.serve();
        if let Some(pull) = self.session.inside().pull.take() {
            faults.attach(pull);
        }
        match faults.is_filled_now() {
            Ok(false) => {}
            Ok(true) => self.session.tell(TargetEvent::AllPresent(faults.report())),
            Err(error) => self.session.tell(TargetEvent::VmFailed {
                reason: error.to_string(),
            }),
        }
    }

    fn disarm(&self, guest: &dyn Guest) -> TargetEvent {
        let disarmed = guest.disarm();
        let mut asked_for = Demanded::default();
        if let Some((pages, faults)) = self.faults() {
            pages.seal();
            faults.end();
            asked_for = faults.asked_for();
        }
        match disarmed {
            Ok(()) => {
                self.host.filled(self.session.id, asked_for);
                TargetEvent::Disarmed
            }
            Err(error) => TargetEvent::VmFailed {
                reason: error.to_string(),
            },
        }
    }

    /// Takes the streams of the source that has come back, in a thread of its own, since they may
    /// still be on their way, and tells it what is missing.
    fn reconcile(&self, streams: u8) {
        let session = Arc::clone(&self.session);
        let generation = session.inside().generation;
        let spawned = thread::Builder::new()
            .name("reconcile".to_owned())
            .spawn(move || match session.reattach(streams) {
                Ok(missing) => {
                    session.send(News::Of(generation, TargetEvent::StillMissing(missing)));
                }
                Err(reason) => session.lost(generation, &reason),
            });
        if let Err(error) = spawned {
            self.session.lost(generation, &error.to_string());
        }
    }
}

/// Ends the VM process of a guest that will not run here.
pub(super) fn stop(guest: Option<Arc<dyn Guest>>) {
    if let Some(Err(error)) = guest.map(|guest| guest.stop()) {
        tracing::warn!(%error, "the VM process of an ended migration did not stop");
    }
}

pub(super) fn now() -> Timestamp {
    Timestamp::from_nanos(limosa_os::monotonic_nanos())
}
