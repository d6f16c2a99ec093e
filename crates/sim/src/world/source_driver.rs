//! The source's daemon at work: carries out what a source engine wants.

use super::sender::{Order, Sender};
use super::serving::Serving;
use super::{Event, World};
use crate::fault::{Planted, WorldFault};
use crate::link::Side;
use crate::process::{Answer, Caller, Request, VmIndex};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::journal::Journaled;
use limosa_engine::policy::Mode;
use limosa_engine::report::{MigrationReport, Outcome};
use limosa_engine::source::{Paused, Piece, Source, SourceAction, SourceConfig, SourceEvent};
use limosa_engine::wire::{ControlFrame, Digest};
use limosa_pages::{BytesPerSecond, PageCount, PageSet};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// One migration at its source.
#[derive(Debug)]
pub(crate) struct SourceJob {
    pub(crate) id: MigrationId,
    pub(crate) host: usize,
    pub(crate) vm: VmIndex,
    pub(crate) config: SourceConfig,
    pub(crate) is_recovery: bool,
    pub(crate) engine: Journaled<Source>,
    /// False when its daemon died.
    pub(crate) is_alive: bool,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) connection: Option<usize>,
    pub(crate) is_dialling: bool,
    /// It dials for a guest that runs at the target already.
    pub(crate) is_resuming: bool,
    pub(crate) dials: u64,
    pub(crate) questions: u64,
    /// The last question was answered.
    pub(crate) is_answered: bool,
    /// A request found its VM process dead, and the engine was told.
    pub(crate) knows_loss: bool,
    pages_seen: u64,
    timers: u64,
    pub(super) limit: Option<BytesPerSecond>,
    pub(super) senders: Vec<Sender>,
    /// The pages of the current round.
    pub(super) set: PageSet,
    /// Hot pages that the current round leaves out, and so many of them at most.
    deferred: PageSet,
    defer_max: PageCount,
    /// What the last harvest found.
    found_before: PageSet,
    is_tracking: bool,
    pub(super) is_bulk: bool,
    pub(super) sent_before: PageSet,
    pub(super) serving: Serving,
    pub(super) state: Vec<u8>,
    /// What was handed to the wire.
    pub(crate) pages_carried: u64,
    pub(crate) bytes_carried: u64,
    /// Of these, pages of pieces that were never reported as sent.
    pub(crate) pages_unfinished: u64,
    pub(crate) bytes_unfinished: u64,
    pub(crate) commits_sent: u32,
    /// By the world's time.
    pub(crate) stopped_at: Timestamp,
    pub(crate) begun_at: Timestamp,
}

impl SourceJob {
    pub(crate) fn new(
        config: SourceConfig,
        host: usize,
        vm: VmIndex,
        planted: Option<Planted>,
    ) -> Self {
        let engine = fresh_source(&config, false, planted);
        Self::with_engine(config, host, vm, engine, false)
    }

    pub(crate) fn recover(config: SourceConfig, host: usize, vm: VmIndex) -> Self {
        let engine = fresh_source(&config, true, None);
        let mut job = Self::with_engine(config, host, vm, engine, true);
        job.serving.is_frozen = true;
        job
    }

    fn with_engine(
        config: SourceConfig,
        host: usize,
        vm: VmIndex,
        engine: Source,
        is_recovery: bool,
    ) -> Self {
        Self {
            id: config.id,
            host,
            vm,
            is_recovery,
            engine: Journaled::new(engine),
            is_alive: true,
            outcome: None,
            connection: None,
            is_dialling: false,
            is_resuming: false,
            dials: 0,
            questions: 0,
            is_answered: false,
            knows_loss: false,
            pages_seen: 0,
            timers: 0,
            limit: None,
            senders: (0..config.streams).map(|_| Sender::default()).collect(),
            set: PageSet::empty(config.memory),
            deferred: PageSet::empty(config.memory),
            defer_max: PageCount::ZERO,
            found_before: PageSet::empty(config.memory),
            is_tracking: false,
            is_bulk: false,
            sent_before: PageSet::empty(config.memory),
            serving: Serving::new(config.memory),
            state: Vec::new(),
            pages_carried: 0,
            bytes_carried: 0,
            pages_unfinished: 0,
            bytes_unfinished: 0,
            commits_sent: 0,
            stopped_at: Timestamp::ZERO,
            begun_at: Timestamp::ZERO,
            config,
        }
    }

    /// True while its engine has something to decide.
    pub(crate) const fn is_at_work(&self) -> bool {
        self.is_alive && self.outcome.is_none()
    }

    /// The technique now.
    pub(crate) fn mode(&self) -> Mode {
        let report = self.report();
        report
            .mode_changes
            .last()
            .map_or(report.mode, |change| change.to)
    }

    /// Takes out of what a harvest found pages that it found before, too, as many as may be left out.
    fn defer(&mut self, set: &mut PageSet) {
        let mut hot = core::mem::replace(&mut self.found_before, set.clone());
        hot.intersect_with(set);
        let mut chosen = core::mem::replace(&mut self.deferred, PageSet::empty(set.capacity()));
        chosen.intersect_with(&hot);
        hot.subtract(&chosen);
        let max = usize::try_from(self.defer_max.get()).unwrap_or(usize::MAX);
        for page in chosen.iter().chain(hot.iter()).take(max) {
            self.deferred.insert(page);
        }
        set.subtract(&self.deferred);
    }

    fn deferred_now(&self, is_stale: bool) -> PageCount {
        if is_stale {
            PageCount::ZERO
        } else {
            self.deferred.count()
        }
    }

    pub(crate) const fn report(&self) -> &MigrationReport {
        self.engine.machine().report()
    }
}

/// A source as it was before its first event.
pub(crate) fn fresh_source(
    config: &SourceConfig,
    is_recovery: bool,
    planted: Option<Planted>,
) -> Source {
    let source = if is_recovery {
        Source::recover(config.clone())
    } else {
        Source::new(config.clone())
    };
    match planted {
        Some(Planted::Source(fault)) => source.with_fault(fault),
        _ => source,
    }
}

impl World {
    /// The operator asks for a migration of the guest that runs in `vm`.
    pub(crate) fn begin_migration(&mut self, config: SourceConfig, vm: VmIndex) -> usize {
        let host = self.vms[vm].host;
        let generation = self.hosts[host].generation;
        if let Phase::Arrived { .. } = self.vms[vm].phase {
            // The ledger remembers the attempt that brought it; the guest is free to move on.
            let caller = Caller::Daemon { host, generation };
            self.ask(vm, caller, Request::Record(Phase::Running));
        }
        let mut job = SourceJob::new(config, host, vm, self.config.planted);
        job.begun_at = self.now;
        self.sources.push(job);
        let index = self.sources.len() - 1;
        self.tell_source(index, SourceEvent::Begin);
        index
    }

    /// Tells a source's engine a fact and does what it wants.
    pub(crate) fn tell_source(&mut self, job: usize, event: SourceEvent) {
        if !self.sources[job].is_at_work() {
            return;
        }
        let local = self.clock(self.sources[job].host);
        self.note(|| format!("source {job} <- {}", brief(&event)));
        let actions = self.sources[job].engine.handle(local, event);
        for action in actions {
            // The daemon may die between any two of its deeds.
            self.count_deed();
            if !self.sources[job].is_alive {
                return;
            }
            self.note(|| format!("source {job} -> {}", brief(&action)));
            self.act_source(job, action);
        }
    }

    fn act_source(&mut self, job: usize, action: SourceAction) {
        let caller = Caller::Source(job);
        let vm = self.sources[job].vm;
        match action {
            SourceAction::Connect => self.dial(job, false),
            SourceAction::Reconnect => self.dial(job, true),
            SourceAction::Send(frame) => self.send_from_source(job, frame),
            SourceAction::Record(phase) => {
                if let Phase::Committed { .. } = phase {
                    self.near_commit();
                }
                self.ask(vm, caller, Request::Record(phase));
            }
            SourceAction::StartTracking => {
                self.sources[job].is_tracking = true;
                self.ask(vm, caller, Request::StartTracking);
            }
            SourceAction::StopTracking => {
                self.sources[job].is_tracking = false;
                self.ask(vm, caller, Request::StopTracking);
            }
            SourceAction::Throttle(throttle) => {
                self.ask(vm, caller, Request::Throttle(throttle));
            }
            SourceAction::Rehearse => self.ask(vm, caller, Request::Rehearse),
            SourceAction::Harvest { round, defer_max } => {
                self.sources[job].defer_max = defer_max;
                let is_stale = false;
                self.ask(vm, caller, Request::Harvest { round, is_stale });
            }
            SourceAction::HarvestStale { round } => {
                let is_stale = true;
                self.ask(vm, caller, Request::Harvest { round, is_stale });
            }
            SourceAction::Look => self.ask(vm, caller, Request::Look),
            SourceAction::Clear(piece) => self.clear(job, piece),
            SourceAction::SendPiece { .. }
            | SourceAction::SendStale { .. }
            | SourceAction::SendFirst { .. }
            | SourceAction::Push { .. }
            | SourceAction::SendBarrier { .. } => self.order_pages(job, &action),
            SourceAction::Pause {
                harvest, switch, ..
            } => {
                self.near_pause();
                self.sources[job].serving.is_switching = switch;
                self.ask(vm, caller, Request::Pause { harvest });
            }
            SourceAction::Resume => self.ask(vm, caller, Request::Resume),
            SourceAction::Hash => {
                let delay = self.random.micros(100, 1000);
                self.schedule(delay, Event::Hashed { source: job });
            }
            SourceAction::Release => self.ask(vm, caller, Request::Exit),
            SourceAction::LimitBandwidth(limit) => self.sources[job].limit = limit,
            SourceAction::Disconnect => self.disconnect_source(job),
            SourceAction::Resolve => self.ask_outcome(job),
            SourceAction::SetTimer(local) => {
                self.sources[job].timers += 1;
                let number = self.sources[job].timers;
                let at = self.true_time(self.sources[job].host, local);
                self.schedule_at(at, Event::Timer { caller, number });
            }
            SourceAction::ReportUnresolved { .. } => {}
            SourceAction::Finish(outcome) => self.finish_source(job, outcome),
        }
    }

    /// Has the log of a piece cleared, but for the hot pages that the round leaves out.
    fn clear(&mut self, job: usize, piece: Piece) {
        let source = &self.sources[job];
        let kept = if self.is_planted(WorldFault::DeferredCleared) {
            Vec::new()
        } else {
            source.deferred.runs_in(piece.range).collect()
        };
        self.ask(source.vm, Caller::Source(job), Request::Clear(piece, kept));
    }

    fn disconnect_source(&mut self, job: usize) {
        self.hang_up_source(job);
        let source = &mut self.sources[job];
        for sender in &mut source.senders {
            let unfinished = sender.drop_orders();
            source.pages_unfinished += unfinished.pages.get();
            source.bytes_unfinished += unfinished.bytes.get();
        }
    }

    /// Gives a sender its next order.
    fn order_pages(&mut self, job: usize, action: &SourceAction) {
        let (stream, order) = match *action {
            SourceAction::SendPiece { piece, stream } => (stream, Order::Piece(piece)),
            SourceAction::SendStale { piece, stream } => (stream, Order::Stale(piece)),
            SourceAction::SendFirst { round, stream } => (stream, Order::First(round)),
            SourceAction::Push { piece, stream } => (stream, Order::Push(piece)),
            SourceAction::SendBarrier {
                stream,
                round,
                streams,
            } => (stream, Order::Barrier(round, streams)),
            _ => return,
        };
        self.order(job, stream, order);
    }

    fn dial(&mut self, job: usize, is_resuming: bool) {
        let source = &mut self.sources[job];
        source.is_dialling = true;
        source.is_resuming = is_resuming;
        source.dials += 1;
        let dial = source.dials;
        let delay = self.link.latency();
        self.schedule(delay, Event::Accept { source: job, dial });
    }

    fn send_from_source(&mut self, job: usize, frame: ControlFrame) {
        if frame == ControlFrame::Commit {
            self.sources[job].commits_sent += 1;
        }
        let Some(connection) = self.sources[job].connection else {
            if frame == ControlFrame::Done && self.sources[job].is_answered {
                // The connection of the answer is kept to say this.
                let delay = self.link.latency();
                self.schedule(delay, Event::Confirmed { source: job });
            }
            return;
        };
        let is_doubled = frame == ControlFrame::Commit
            && matches!(self.config.planted, Some(Planted::Target(fault))
                if fault == limosa_engine::target::TargetFault::CommitRepeated);
        if is_doubled {
            // A peer that commits twice, to see whether the target takes it.
            self.send_control(connection, Side::Source, frame.clone());
        }
        self.send_control(connection, Side::Source, frame);
    }

    fn finish_source(&mut self, job: usize, outcome: Outcome) {
        self.note(|| format!("source {job} finished: {outcome:?}"));
        self.sources[job].outcome = Some(outcome);
        self.hang_up_source(job);
        self.check_outcome(job);
    }

    pub(crate) fn source_timer(&mut self, job: usize, number: u64) {
        let source = &mut self.sources[job];
        if source.timers != number {
            return;
        }
        let pushed = source.pages_carried;
        if core::mem::replace(&mut source.pages_seen, pushed) != pushed {
            self.tell_source(job, SourceEvent::Moved);
        }
        self.tell_source(job, SourceEvent::Timer);
    }

    /// What a VM process says, as the engine wants to hear it.
    pub(crate) fn source_answered(&mut self, job: usize, answer: Answer) {
        if !self.sources[job].is_at_work() {
            return;
        }
        let event = match answer {
            Answer::Recorded(phase) => SourceEvent::Recorded(phase),
            Answer::TrackingStarted => SourceEvent::TrackingStarted,
            Answer::Rehearsed { state, stall, save } => {
                SourceEvent::Rehearsed { state, stall, save }
            }
            Answer::Harvested {
                round,
                is_stale,
                log,
                writers,
            } => SourceEvent::Harvested {
                round,
                dirty: self.take_harvest(job, round, is_stale, log),
                deferred: self.sources[job].deferred_now(is_stale),
                writers,
            },
            Answer::Looked { log } => {
                let chunk = self.sources[job].config.chunk;
                let dirty = count_by_chunk(&log, chunk);
                SourceEvent::Looked { dirty }
            }
            Answer::Cleared(piece) => SourceEvent::Cleared(piece),
            Answer::Paused {
                log,
                state,
                moments,
            } => self.take_pause(job, log, state, moments),
            Answer::Resumed => SourceEvent::Resumed,
            Answer::Exited => SourceEvent::Released,
            Answer::Refused(reason) => SourceEvent::GuestFailed { reason },
            Answer::Gone => {
                self.sources[job].knows_loss = true;
                SourceEvent::GuestFailed {
                    reason: String::from("the VM process died"),
                }
            }
            Answer::TrackingStopped
            | Answer::Throttled
            | Answer::Attached
            | Answer::Loaded { .. }
            | Answer::FaultsServed
            | Answer::Disarmed
            | Answer::Running { .. } => return,
        };
        self.tell_source(job, event);
    }

    /// Makes the round's set from the log and from what exists.
    fn take_harvest(&mut self, job: usize, round: u32, is_stale: bool, log: PageSet) -> Vec<u32> {
        let vm = self.sources[job].vm;
        self.catch_up(vm);
        let mut set = log;
        set.intersect_with(self.vms[vm].memory.exists());
        let source = &mut self.sources[job];
        source.is_bulk = round == 0 && !is_stale;
        if is_stale {
            source.serving.tell(&mut set);
        } else if round > 0 {
            source.defer(&mut set);
        }
        source.set = set;
        count_by_chunk(&source.set, source.config.chunk)
    }

    fn take_pause(
        &mut self,
        job: usize,
        log: Option<PageSet>,
        state: Vec<u8>,
        moments: [Timestamp; 4],
    ) -> SourceEvent {
        let vm = self.sources[job].vm;
        let stopped_at = self.true_time(self.sources[job].host, moments[0]);
        let is_forgotten = self.is_planted(WorldFault::DeferredForgotten);
        let exists = self.vms[vm].memory.exists();
        let source = &mut self.sources[job];
        source.stopped_at = stopped_at;
        source.is_bulk = false;
        source.state = state.clone();
        match log {
            Some(mut log) => {
                log.intersect_with(exists);
                if is_forgotten {
                    log.subtract(&source.deferred);
                }
                source.set = log;
            }
            // Not to be read although it is kept: what the last reading said stands.
            None if source.is_tracking => {}
            // Nothing was sent, so the target has nothing, holes included.
            None if source.serving.is_switching => source.set = PageSet::full(exists.capacity()),
            None => source.set = exists.clone(),
        }
        let (missing, missing_counts) = if self.sources[job].serving.is_switching {
            self.take_missing(job)
        } else {
            (PageCount::ZERO, Vec::new())
        };
        let source = &self.sources[job];
        let [stopped_first, stopped_last, harvested, saved] = moments;
        SourceEvent::Paused(Paused {
            dirty: count_by_chunk(&source.set, source.config.chunk),
            state,
            stopped_first,
            stopped_last,
            harvested,
            saved,
            missing,
            missing_counts,
            // The world pushes by address.
            recorded: PageCount::ZERO,
        })
    }

    pub(crate) fn hashed(&mut self, job: usize) {
        let vm = self.sources[job].vm;
        let digest = digest(self.vms[vm].memory.content(), &self.sources[job].state);
        self.tell_source(job, SourceEvent::Hashed(digest));
    }
}

/// Pages of a set in each chunk.
pub(super) fn count_by_chunk(set: &PageSet, chunk: PageCount) -> Vec<u32> {
    let words = usize::try_from(chunk.get() / 64).expect("a small number");
    set.words()
        .chunks(words)
        .map(|chunk| chunk.iter().map(|word| word.count_ones()).sum())
        .collect()
}

/// The digest that both sides make of a guest's memory and state.
pub(crate) fn digest(content: &[u64], state: &[u8]) -> Digest {
    let mut hash = Xxh3Default::new();
    let mut pages = 0;
    for (page, &content) in (0u64..).zip(content) {
        if content != 0 {
            pages += 1;
            let mut entry = [0; 16];
            entry[..8].copy_from_slice(&page.to_le_bytes());
            entry[8..].copy_from_slice(&content.to_le_bytes());
            hash.update(&entry);
        }
    }
    Digest {
        memory: hash.digest128(),
        pages: PageCount::new(pages),
        state: xxh3_64(state),
    }
}

/// The head of a debug text: enough for a trace.
pub(crate) fn brief(value: &impl core::fmt::Debug) -> String {
    let mut text = format!("{value:?}");
    if text.len() > 160 {
        let mut end = 160;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}
