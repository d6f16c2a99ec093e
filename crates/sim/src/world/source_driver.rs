//! The source's daemon at work: carries out what a source engine wants.

use super::sender::{Order, Sender};
use super::{Event, World};
use crate::fault::Planted;
use crate::link::Side;
use crate::process::{Answer, Caller, Request, VmIndex};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::journal::Journaled;
use limosa_engine::report::{MigrationReport, Outcome};
use limosa_engine::source::{Paused, Source, SourceAction, SourceConfig, SourceEvent};
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
    is_tracking: bool,
    pub(super) is_bulk: bool,
    pub(super) sent_before: PageSet,
    state: Vec<u8>,
    /// What was handed to the wire.
    pub(crate) pages_carried: u64,
    pub(crate) bytes_carried: u64,
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
        Self::with_engine(config, host, vm, engine, true)
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
            questions: 0,
            is_answered: false,
            knows_loss: false,
            pages_seen: 0,
            timers: 0,
            limit: None,
            senders: (0..config.streams).map(|_| Sender::default()).collect(),
            set: PageSet::empty(config.memory),
            is_tracking: false,
            is_bulk: false,
            sent_before: PageSet::empty(config.memory),
            state: Vec::new(),
            pages_carried: 0,
            bytes_carried: 0,
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
            SourceAction::Connect => {
                self.sources[job].is_dialling = true;
                let delay = self.link.latency();
                self.schedule(delay, Event::Accept { source: job });
            }
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
            SourceAction::Rehearse => self.ask(vm, caller, Request::Rehearse),
            SourceAction::Harvest { round } => self.ask(vm, caller, Request::Harvest { round }),
            SourceAction::Clear(piece) => self.ask(vm, caller, Request::Clear(piece)),
            SourceAction::SendPiece { piece, stream } => {
                self.order(job, stream, Order::Piece(piece));
            }
            SourceAction::SendBarrier { stream, round } => {
                self.order(job, stream, Order::Barrier(round));
            }
            SourceAction::Pause { harvest, .. } => {
                self.ask(vm, caller, Request::Pause { harvest });
            }
            SourceAction::Resume => self.ask(vm, caller, Request::Resume),
            SourceAction::Hash => {
                let delay = self.random.micros(100, 1000);
                self.schedule(delay, Event::Hashed { source: job });
            }
            SourceAction::Release => self.ask(vm, caller, Request::Exit),
            SourceAction::LimitBandwidth(limit) => self.sources[job].limit = limit,
            SourceAction::Disconnect => {
                self.hang_up_source(job);
                self.sources[job].senders.iter_mut().for_each(|sender| {
                    sender.orders.clear();
                    sender.cursor = None;
                });
            }
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
        let pages = source.pages_carried;
        if core::mem::replace(&mut source.pages_seen, pages) != pages {
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
            Answer::Harvested { round, log } => {
                let dirty = self.take_harvest(job, round, log);
                SourceEvent::Harvested { round, dirty }
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
            | Answer::Attached
            | Answer::Loaded { .. }
            | Answer::Running { .. } => return,
        };
        self.tell_source(job, event);
    }

    /// Makes the round's set from the log and from what exists.
    fn take_harvest(&mut self, job: usize, round: u32, log: PageSet) -> Vec<u32> {
        let vm = self.sources[job].vm;
        self.catch_up(vm);
        let mut set = log;
        set.intersect_with(self.vms[vm].memory.exists());
        let source = &mut self.sources[job];
        source.is_bulk = round == 0;
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
        let exists = self.vms[vm].memory.exists();
        let source = &mut self.sources[job];
        source.stopped_at = stopped_at;
        source.is_bulk = false;
        source.state = state.clone();
        match log {
            Some(mut log) => {
                log.intersect_with(exists);
                source.set = log;
            }
            // Not to be read although it is kept: what the last reading said stands.
            None if source.is_tracking => {}
            None => source.set = exists.clone(),
        }
        let [stopped_first, stopped_last, harvested, saved] = moments;
        SourceEvent::Paused(Paused {
            dirty: count_by_chunk(&source.set, source.config.chunk),
            state,
            stopped_first,
            stopped_last,
            harvested,
            saved,
        })
    }

    pub(crate) fn hashed(&mut self, job: usize) {
        let vm = self.sources[job].vm;
        let digest = digest(self.vms[vm].memory.content(), &self.sources[job].state);
        self.tell_source(job, SourceEvent::Hashed(digest));
    }
}

/// Pages of a set in each chunk.
fn count_by_chunk(set: &PageSet, chunk: PageCount) -> Vec<u32> {
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
