//! The world: virtual time, everything that exists in it, and the order in which it happens.
//!
//! Events lie in a heap by time and, at one time, by the order in which they were made, so a world
//! is a function of its configuration and its seed. Guests do not wake the heap for each step:
//! whoever looks at a guest's memory first lets the guest do what it did until now.
//!
//! The parts hang on one `World` and are written where their subject is: [`vm`] serves requests,
//! [`daemon`] restarts and answers questions, [`source_driver`] and [`target_driver`] carry out
//! what the engines want, [`sender`] reads pages, [`serving`] answers for those that are missing and
//! [`filling`] brings them into place, [`network`] moves frames, [`chaos`] lets things go wrong,
//! [`rest`] looks at the end.

mod chaos;
mod daemon;
mod filling;
mod network;
mod rest;
mod sender;
mod serving;
mod source_driver;
mod target_driver;
mod vm;

pub(crate) use daemon::Host;
pub(crate) use source_driver::SourceJob;
pub(crate) use target_driver::TargetJob;

use crate::checker::{Rule, Violation};
use crate::fault::{Fault, Planted, WorldFault};
use crate::guest::{Guest, Habits};
use crate::link::{Connection, Link, LinkProfile, Side};
use crate::process::{Answer, Caller, VmIndex, VmProcess};
use crate::random::Random;
use core::cmp::Ordering;
use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase, Resolution};
use limosa_engine::source::SourceEvent;
use limosa_pages::PageCount;
use std::collections::BinaryHeap;

/// Something that will happen.
#[derive(Debug)]
pub(crate) enum Event {
    /// A VM process goes on with its requests.
    Serve(VmIndex),
    /// An answer of a VM process reaches its daemon.
    Answer(Caller, Answer),
    /// The next frame of a channel arrives.
    Deliver { connection: usize, channel: usize },
    /// A side notices that its connection broke.
    Lost { connection: usize, side: Side },
    /// The source's dialling reaches the target.
    Accept { source: usize, dial: u64 },
    /// The source learns whether it is connected.
    Dialled {
        source: usize,
        dial: u64,
        connection: Option<usize>,
    },
    /// A sender of a push stream goes on.
    Send { source: usize, stream: usize },
    /// The source has hashed its memory.
    Hashed { source: usize },
    /// The target has made its VM.
    Created { target: usize, is_refused: bool },
    /// The target has put its digest together.
    Digested { target: usize },
    /// An engine's timer.
    Timer { caller: Caller, number: u64 },
    /// A question about an outcome reaches the other host.
    Question {
        source: usize,
        number: u64,
        id: MigrationId,
    },
    /// Its answer reaches the one who asked.
    Resolved {
        source: usize,
        number: u64,
        answer: Option<Resolution>,
    },
    /// The source's *done*, on the connection of an answer.
    Confirmed { source: usize },
    /// The operator at the source says something.
    Operator { source: usize, event: SourceEvent },
    /// A guest that misses pages is looked at.
    Tick(VmIndex),
    /// Planted: the other half of a page.
    SecondHalf {
        target: usize,
        page: u64,
        content: u64,
    },
    /// The operator ends a migration on demand: what a guest still misses shall be pushed.
    Drain { vm: VmIndex },
    /// The operator says what became of a lost host.
    Fence { host: usize },
    /// The operator at the target ends a migration.
    AbortTarget { target: usize },
    /// A fault happens.
    Fault(usize),
    /// The link works again.
    HealLink,
    /// A daemon is started again.
    Restart { host: usize },
    /// A daemon whose VM process is gone tells the target so.
    Bereft {
        host: usize,
        generation: u32,
        id: MigrationId,
    },
}

#[derive(Debug)]
struct Scheduled {
    at: Timestamp,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The heap gives the greatest first: the earliest event must be the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorldConfig {
    pub(crate) habits: Habits,
    pub(crate) touched: PageCount,
    pub(crate) link: LinkProfile,
    /// What the target's clock shows more than the source's, in nanoseconds; the same kernel if
    /// there is no difference.
    pub(crate) clock_offset: i64,
    /// Most pages that a sender reads at one moment.
    pub(crate) batch_max: u64,
    /// Bytes of state beside the registers.
    pub(crate) state_filler: usize,
    /// How often a VM process waits for its turn on a busy host.
    pub(crate) hiccups_per_mille: u64,
    /// Whether page faults can be served at all.
    pub(crate) can_fault: bool,
    /// Whether it is known which vCPU dirties how much.
    pub(crate) counts_vcpus: bool,
    /// How often the pages that the vCPUs need first go first.
    pub(crate) first_per_mille: u64,
    /// So long after the switch the operator drains a migration on demand.
    pub(crate) drain_after: Duration,
    pub(crate) planted: Option<Planted>,
    pub(crate) seed: u64,
    pub(crate) traces: bool,
}

/// How long the guest stood; see [`World::start_guest`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stalls {
    pub(crate) stopped_at: Timestamp,
    pub(crate) worst: Duration,
    pub(crate) last: Duration,
    /// At missing pages, all together.
    pub(crate) at_pages: Duration,
}

/// Everything that exists; see the module.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Timestamp,
    heap: BinaryHeap<Scheduled>,
    order: u64,
    pub(crate) config: WorldConfig,
    pub(crate) random: Random,
    pub(crate) guest: Guest,
    /// The process that ran the guest last.
    pub(crate) owner: VmIndex,
    /// The process from whose memory the owner is being filled.
    pub(crate) origin: VmIndex,
    pub(crate) hosts: [Host; 2],
    pub(crate) vms: Vec<VmProcess>,
    pub(crate) link: Link,
    pub(crate) connections: Vec<Connection>,
    pub(crate) sources: Vec<SourceJob>,
    pub(crate) targets: Vec<TargetJob>,
    pub(crate) faults: Vec<Fault>,
    /// What daemons and VM processes did so far: [`crate::fault::Trigger::AtDeed`] counts them.
    pub(crate) deeds: u32,
    /// Faults that wait for their deed.
    armed: usize,
    /// The next attempt to make a VM is refused.
    refuse_create: bool,
    /// From here on nothing is broken any more, as far as the schedule is known.
    pub(crate) healed_at: Timestamp,
    pub(crate) stalls: Stalls,
    pub(crate) steps: u64,
    pub(crate) violation: Option<Violation>,
}

impl World {
    /// Two hosts, and a guest that runs on the first.
    pub(crate) fn new(config: WorldConfig) -> Self {
        let mut random = Random::new(config.seed);
        let guest = Guest::new(&config.habits, random.split());
        let link = Link::new(config.link, random.split());
        let other_kernel = u128::from(config.clock_offset != 0);
        let mut world = Self {
            now: Timestamp::ZERO,
            heap: BinaryHeap::new(),
            order: 0,
            config,
            random,
            guest,
            owner: 0,
            origin: 0,
            hosts: [
                Host::new(1, 0),
                Host::new(1 + other_kernel, config.clock_offset),
            ],
            vms: Vec::new(),
            link,
            connections: Vec::new(),
            sources: Vec::new(),
            targets: Vec::new(),
            faults: Vec::new(),
            deeds: 0,
            armed: 0,
            refuse_create: false,
            healed_at: Timestamp::ZERO,
            stalls: Stalls::default(),
            steps: 0,
            violation: None,
        };
        let mut vm = VmProcess::new(0, config.habits.memory, Phase::Running);
        world.guest.boot(&mut vm.memory, config.touched);
        if world.is_planted(WorldFault::DirtyBitDropped) {
            vm.memory.dropped_per_mille = 30;
        }
        world.vms.push(vm);
        world.start_guest(0);
        world
    }

    pub(crate) fn is_planted(&self, fault: WorldFault) -> bool {
        self.config.planted == Some(Planted::World(fault))
    }

    /// Lets `event` happen after `delay`.
    pub(crate) fn schedule(&mut self, delay: Duration, event: Event) {
        self.schedule_at(self.now.after(delay), event);
    }

    pub(crate) fn schedule_at(&mut self, at: Timestamp, event: Event) {
        let at = at.max(self.now);
        let order = self.order;
        self.order += 1;
        self.heap.push(Scheduled { at, order, event });
    }

    /// When the next event happens.
    pub(crate) fn next_at(&self) -> Option<Timestamp> {
        self.heap.peek().map(|scheduled| scheduled.at)
    }

    /// Lets time pass to `at` without an event.
    pub(crate) fn pass_to(&mut self, at: Timestamp) {
        self.now = self.now.max(at);
        self.catch_up(self.owner);
    }

    /// One event and the look of the checker at what it left; false when nothing will happen.
    pub(crate) fn step(&mut self) -> bool {
        let Some(Scheduled { at, event, .. }) = self.heap.pop() else {
            return false;
        };
        self.now = at;
        self.steps += 1;
        self.happen(event);
        self.check_step();
        true
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Serve(vm) => self.serve(vm),
            Event::Answer(caller, answer) => self.answered(caller, answer),
            Event::Deliver {
                connection,
                channel,
            } => self.deliver(connection, channel),
            Event::Lost { connection, side } => self.notice_loss(connection, side),
            Event::Accept { source, dial } => self.accept(source, dial),
            Event::Dialled {
                source,
                dial,
                connection,
            } => self.dialled(source, dial, connection),
            Event::Tick(vm) => self.tick(vm),
            Event::SecondHalf {
                target,
                page,
                content,
            } => self.second_half(target, page, content),
            Event::Drain { vm } => self.drain(vm),
            Event::Fence { host } => self.fence(host),
            Event::Send { source, stream } => self.send_on(source, stream),
            Event::Hashed { source } => self.hashed(source),
            Event::Created { target, is_refused } => self.created(target, is_refused),
            Event::Digested { target } => self.digested(target),
            Event::Timer { caller, number } => self.timer(caller, number),
            Event::Question { source, number, id } => self.question(source, number, id),
            Event::Resolved {
                source,
                number,
                answer,
            } => self.resolved(source, number, answer),
            Event::Confirmed { source } => self.confirmed(source),
            Event::Operator { source, event } => self.tell_source(source, event),
            Event::AbortTarget { target } => self.abort_target(target),
            Event::Fault(index) => self.break_something(index),
            Event::HealLink => self.heal_link(),
            Event::Restart { host } => self.restart(host),
            Event::Bereft {
                host,
                generation,
                id,
            } => self.tell_of_loss(host, generation, id),
        }
    }

    fn answered(&mut self, caller: Caller, answer: Answer) {
        match caller {
            Caller::Source(job) => self.source_answered(job, answer),
            Caller::Target(job) => self.target_answered(job, answer),
            Caller::Daemon { host, generation } => self.daemon_answered(host, generation, &answer),
        }
    }

    fn timer(&mut self, caller: Caller, number: u64) {
        match caller {
            Caller::Source(job) => self.source_timer(job, number),
            Caller::Target(job) => self.target_timer(job, number),
            Caller::Daemon { .. } => {}
        }
    }

    /// What the clock of a host shows.
    pub(crate) fn clock(&self, host: usize) -> Timestamp {
        self.now.shift(self.hosts[host].offset)
    }

    /// When it is in the world what the clock of a host calls `local`.
    pub(crate) fn true_time(&self, host: usize, local: Timestamp) -> Timestamp {
        local.shift(-self.hosts[host].offset)
    }

    /// Lets the guest of a process do what it did until now.
    pub(crate) fn catch_up(&mut self, vm: VmIndex) {
        let process = &mut self.vms[vm];
        if !process.is_running {
            return;
        }
        let stands = self.guest.run(
            &mut process.memory,
            &mut process.registers,
            process.throttle,
            self.now,
        );
        if stands {
            for page in self.guest.stands_at() {
                if self.vms[vm].memory.is_missing(page) {
                    self.page_fault(vm, page);
                }
            }
        }
    }

    /// Lets the vCPUs of a process run.
    pub(crate) fn start_guest(&mut self, vm: VmIndex) {
        let process = &mut self.vms[vm];
        if process.is_running {
            return;
        }
        process.is_running = true;
        let is_past = process.is_past;
        self.owner = vm;
        self.guest.wake(self.now);
        self.stalls.last = self.now.since(self.stalls.stopped_at);
        self.stalls.worst = self.stalls.worst.max(self.stalls.last);
        self.keep_ticking(vm);
        if is_past {
            self.violate(
                Rule::NothingStale,
                format!("process {vm} runs a guest that has run elsewhere since"),
            );
        }
    }

    /// Stops the vCPUs of a process; after this nothing writes to its memory.
    pub(crate) fn stop_guest(&mut self, vm: VmIndex) {
        self.catch_up(vm);
        if self.vms[vm].is_running {
            self.vms[vm].is_running = false;
            self.stalls.stopped_at = self.now;
        }
    }

    /// Notes the first rule that was broken; the world's end.
    pub(crate) fn violate(&mut self, rule: Rule, text: String) {
        self.note(|| format!("VIOLATION {rule:?}: {text}"));
        if self.violation.is_none() {
            self.violation = Some(Violation { rule, text });
        }
    }

    /// Tells what happens, if somebody listens.
    pub(crate) fn note(&self, text: impl FnOnce() -> String) {
        if self.config.traces {
            eprintln!("{:>14} ns  {}", self.now.as_nanos(), text());
        }
    }
}
