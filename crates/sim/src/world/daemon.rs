//! A host and its daemon: what survives a restart, what does not, and how a question about an
//! outcome is answered.
//!
//! The registry of barred attempts lives in the daemon's memory: it needs no more, since whatever a
//! late frame could come in on dies with the daemon. That an attempt *arrived* must outlive both the
//! daemon and the VM process, so it is in a ledger on the host, written by the VM process itself
//! before the guest's first instruction. That a migration away began is noted there, too, until it is
//! over: where its VM process is gone with the daemon, the next daemon tells the target that the
//! memory is lost. A restarted daemon answers nothing before it has asked
//! every VM process of its host for its phase, behind whatever waits in that process's socket.

use super::{Event, SourceJob, TargetJob, World};
use crate::fault::WorldFault;
use crate::link::Side;
use crate::process::{Answer, Caller, Message, Request, VmIndex};
use core::time::Duration;
use limosa_engine::handover::{MigrationId, Phase, Resolution};
use limosa_engine::source::SourceEvent;
use limosa_engine::target::TargetEvent;
use std::collections::{BTreeMap, BTreeSet};

/// One host.
#[derive(Debug)]
pub(crate) struct Host {
    /// Identifies its kernel.
    pub(crate) boot_id: u128,
    /// What its clock shows more than the world's, in nanoseconds.
    pub(crate) offset: i64,
    /// Which life of its daemon this is.
    pub(crate) generation: u32,
    pub(crate) is_up: bool,
    /// It will never be there again.
    pub(crate) is_lost: bool,
    /// VM processes that a restarted daemon has not heard of yet.
    attaching: usize,
    /// Attempts that will never run here; in the daemon's memory.
    pub(crate) barred: BTreeSet<MigrationId>,
    /// Attempts that arrived here, and whether with all their pages; on disk.
    pub(crate) ledger: BTreeMap<MigrationId, bool>,
    /// Migrations away whose memory is gone, and of which the target has not been told yet.
    pub(crate) bereft: BTreeSet<MigrationId>,
    /// Those of which it has; on disk.
    told: BTreeSet<MigrationId>,
}

impl Host {
    pub(crate) const fn new(boot_id: u128, offset: i64) -> Self {
        Self {
            boot_id,
            offset,
            generation: 0,
            is_up: true,
            is_lost: false,
            attaching: 0,
            barred: BTreeSet::new(),
            ledger: BTreeMap::new(),
            bereft: BTreeSet::new(),
            told: BTreeSet::new(),
        }
    }

    /// True when its daemon knows its VM processes and answers.
    pub(crate) const fn is_ready(&self) -> bool {
        self.is_up && self.attaching == 0
    }
}

impl World {
    /// The daemon of a host dies: its engines, its connections and what it remembers are gone.
    pub(crate) fn kill_daemon(&mut self, host: usize, back: Duration) {
        if !self.hosts[host].is_up {
            return;
        }
        self.note(|| format!("FAULT daemon {host} dies"));
        self.hosts[host].is_up = false;
        self.hosts[host].generation += 1;
        self.hosts[host].attaching = 0;
        self.hosts[host].barred.clear();
        self.hosts[host].bereft.clear();
        for job in 0..self.sources.len() {
            if self.sources[job].host == host && self.sources[job].is_alive {
                self.sources[job].is_alive = false;
                self.hang_up_source(job);
            }
        }
        for job in 0..self.targets.len() {
            if self.targets[job].host == host && self.targets[job].is_alive {
                self.targets[job].is_alive = false;
                let connection = self.targets[job].connection;
                self.close(connection, Side::Target);
            }
        }
        for vm in 0..self.vms.len() {
            if self.vms[vm].host == host && self.vms[vm].is_alive {
                self.deliver_message(vm, Message::DaemonLost);
            }
        }
        self.will_heal_after(back);
        self.schedule(back, Event::Restart { host });
    }

    pub(crate) fn restart(&mut self, host: usize) {
        if self.hosts[host].is_lost {
            return;
        }
        self.note(|| format!("daemon {host} starts again"));
        self.hosts[host].is_up = true;
        let generation = self.hosts[host].generation;
        for vm in 0..self.vms.len() {
            if self.vms[vm].host == host && self.vms[vm].is_alive {
                self.hosts[host].attaching += 1;
                let caller = Caller::Daemon { host, generation };
                self.deliver_message(vm, Message::Request(caller, Request::Attach));
            }
        }
        if self.hosts[host].is_ready() {
            self.recover(host);
        }
    }

    /// A VM process told a daemon, not one of its migrations, something.
    pub(crate) fn daemon_answered(&mut self, host: usize, generation: u32, answer: &Answer) {
        if self.hosts[host].generation != generation || self.hosts[host].attaching == 0 {
            return;
        }
        if !matches!(answer, Answer::Attached | Answer::Gone) {
            return;
        }
        self.hosts[host].attaching -= 1;
        if self.hosts[host].is_ready() {
            self.recover(host);
        }
    }

    /// The restarted daemon knows its VM processes: whatever was committed must be resolved, and
    /// who waits for a missing page must not wait in vain.
    fn recover(&mut self, host: usize) {
        for vm in 0..self.vms.len() {
            let process = &self.vms[vm];
            if process.host != host || !process.is_alive {
                continue;
            }
            match process.phase {
                Phase::Committed { id, .. } => self.recover_source(host, vm, id),
                Phase::Arrived { id }
                    if process.memory.is_armed || process.memory.misses_pages() =>
                {
                    self.recover_target(host, vm, id);
                }
                _ => {}
            }
        }
        self.find_bereft(host);
    }

    /// Finds migrations away that are not over and whose VM process is gone.
    fn find_bereft(&mut self, host: usize) {
        let is_over = |id: MigrationId| {
            let mut jobs = self.sources.iter().filter(|job| job.id == id);
            jobs.any(|job| job.is_alive || job.outcome.is_some())
        };
        let is_gone = |job: &&SourceJob| {
            let is_planted = self.is_planted(WorldFault::MemoryCalledLost);
            job.host == host && (is_planted || self.vms[job.vm].was_killed)
        };
        let gone = self.sources.iter().filter(is_gone).map(|job| job.id);
        let bereft: BTreeSet<MigrationId> = gone
            .filter(|id| !self.hosts[host].told.contains(id))
            .filter(|&id| self.is_planted(WorldFault::MemoryCalledLost) || !is_over(id))
            .collect();
        for id in bereft {
            self.note(|| format!("daemon {host} has lost the memory of {id}"));
            self.hosts[host].bereft.insert(id);
            self.tell_of_loss_later(host, id);
        }
    }

    fn tell_of_loss_later(&mut self, host: usize, id: MigrationId) {
        let generation = self.hosts[host].generation;
        let delay = self.random.micros(50, 2_000_000);
        let event = Event::Bereft {
            host,
            generation,
            id,
        };
        self.schedule(delay, event);
    }

    /// Tells the target that the memory of an attempt is lost, until nothing is open any more.
    pub(crate) fn tell_of_loss(&mut self, host: usize, generation: u32, id: MigrationId) {
        if self.hosts[host].generation != generation {
            return;
        }
        let there = 1 - host;
        let is_heard = self.link.is_up && self.hosts[there].is_ready();
        let is_open = !self.hosts[there].is_lost && (!is_heard || self.hear_of_loss(there, id));
        if is_open {
            return self.tell_of_loss_later(host, id);
        }
        self.hosts[host].bereft.remove(&id);
        self.hosts[host].told.insert(id);
    }

    /// The target's host hears that the memory of an attempt is lost; true if it has to be told again.
    fn hear_of_loss(&mut self, host: usize, id: MigrationId) -> bool {
        let job = self
            .targets
            .iter()
            .position(|job| job.is_at_work() && job.host == host && job.id == id);
        let Some(job) = job else {
            return self.look_up(host, id) == Resolution::Needs;
        };
        let vm = self.targets[job].vm;
        let misses = vm.is_some_and(|vm| self.vms[vm].memory.misses_pages());
        if !self.targets[job].engine.machine().is_filling() {
            self.tell_target(job, TargetEvent::Resolve);
        } else if misses {
            let reason = String::from("the source has lost its memory");
            self.tell_target(job, TargetEvent::SourceGone { reason });
        }
        true
    }

    fn recover_target(&mut self, host: usize, vm: VmIndex, id: MigrationId) {
        let local = self.clock(host);
        let job = TargetJob::recover(id, host, &self.hosts[host], local, &self.vms[vm], vm);
        self.targets.push(job);
        let job = self.targets.len() - 1;
        let waiting: Vec<u64> = self.vms[vm].waiting.iter().copied().collect();
        for page in waiting {
            self.notice_fault(job, page);
        }
        self.tell_target(job, TargetEvent::Timer);
        self.check_present(job);
    }

    fn recover_source(&mut self, host: usize, vm: VmIndex, id: MigrationId) {
        let Some(former) = self.sources.iter().rfind(|job| job.id == id) else {
            return;
        };
        let job = SourceJob::recover(former.config.clone(), host, vm);
        self.sources.push(job);
        self.tell_source(self.sources.len() - 1, SourceEvent::Begin);
    }

    /// A VM process dies, and those who work with it learn it.
    pub(crate) fn kill_vm(&mut self, vm: VmIndex) {
        if !self.vms[vm].is_alive {
            return;
        }
        self.note(|| format!("FAULT vm {vm} dies"));
        self.catch_up(vm);
        self.end_vm(vm, true);
        let mut callers = Vec::new();
        for (index, job) in self.sources.iter().enumerate() {
            if job.is_at_work() && job.vm == vm {
                callers.push(Caller::Source(index));
            }
        }
        for (index, job) in self.targets.iter().enumerate() {
            if job.is_at_work() && job.vm == Some(vm) {
                callers.push(Caller::Target(index));
            }
        }
        for caller in callers {
            let delay = self.random.micros(5, 2000);
            self.schedule(delay, Event::Answer(caller, Answer::Gone));
        }
    }

    /// A VM process ends: who waits for it to end, or for its word that it is there, learns it.
    pub(crate) fn end_vm(&mut self, vm: VmIndex, was_killed: bool) {
        let process = &mut self.vms[vm];
        let in_work = process.current.take().map(|current| current.message);
        let waiting: Vec<_> = in_work.into_iter().chain(process.queue.drain(..)).collect();
        process.end(was_killed);
        for message in waiting {
            let (caller, answer) = match message {
                // It was to end, and it has.
                Message::Request(caller, Request::Exit) => (caller, Answer::Exited),
                Message::Request(caller, Request::Attach) => (caller, Answer::Gone),
                _ => continue,
            };
            let delay = self.random.micros(5, 100);
            self.schedule(delay, Event::Answer(caller, answer));
        }
    }

    /// The source asks the other host how an attempt ended.
    pub(crate) fn ask_outcome(&mut self, source: usize) {
        self.sources[source].questions += 1;
        let number = self.sources[source].questions;
        let id = self.sources[source].id;
        let delay = self.link.latency();
        self.schedule(delay, Event::Question { source, number, id });
    }

    /// A question reaches the host that was the target.
    pub(crate) fn question(&mut self, source: usize, number: u64, id: MigrationId) {
        let host = 1 - self.sources[source].host;
        let is_deaf = !self.hosts[host].is_ready();
        let is_early = self.hosts[host].is_up && self.is_planted(WorldFault::AnswerBeforeAttach);
        if !self.link.is_up || (is_deaf && !is_early) {
            let delay = self.random.micros(50, 3_000_000);
            self.schedule(
                delay,
                Event::Resolved {
                    source,
                    number,
                    answer: None,
                },
            );
            return;
        }
        let job = self
            .targets
            .iter()
            .position(|job| job.is_at_work() && job.host == host && job.id == id);
        match job {
            Some(job) => {
                self.targets[job].questions.push((source, number));
                self.tell_target(job, TargetEvent::Resolve);
            }
            None => {
                let answer = self.look_up(host, id);
                self.answer_outcome(source, number, answer);
            }
        }
    }

    /// What is known of an attempt that no engine works at. What is not known is barred.
    pub(crate) fn look_up(&mut self, host: usize, id: MigrationId) -> Resolution {
        if self.hosts[host].barred.contains(&id) {
            return Resolution::Barred;
        }
        let alive = self
            .vms
            .iter()
            .find(|vm| vm.host == host && vm.is_alive && vm.phase == Phase::Arrived { id });
        let was_complete = self.hosts[host].ledger.get(&id).copied();
        let runs = was_complete.is_some() || alive.is_some();
        if runs && !self.is_planted(WorldFault::BarredWithoutProof) {
            return match (alive, was_complete) {
                (Some(vm), _) if vm.memory.misses_pages() => Resolution::Needs,
                (None, Some(false)) => Resolution::Gone,
                _ => Resolution::Runs,
            };
        }
        if !runs && self.is_planted(WorldFault::RunsWithoutProof) {
            return Resolution::Runs;
        }
        self.hosts[host].barred.insert(id);
        Resolution::Barred
    }

    pub(crate) fn answer_outcome(&mut self, source: usize, number: u64, answer: Resolution) {
        self.note(|| format!("outcome of source {source}: {answer:?}"));
        let is_lost = !self.link.is_up;
        let delay = self.link.latency();
        self.schedule(
            delay,
            Event::Resolved {
                source,
                number,
                answer: (!is_lost).then_some(answer),
            },
        );
    }

    /// An answer, or that there is none, reaches the one who asked last.
    pub(crate) fn resolved(&mut self, source: usize, number: u64, answer: Option<Resolution>) {
        if !self.sources[source].is_at_work() || self.sources[source].questions != number {
            return;
        }
        let event = match answer {
            Some(resolution) if self.link.is_up => {
                self.sources[source].is_answered = true;
                SourceEvent::Resolved(resolution)
            }
            _ => SourceEvent::ResolveFailed {
                reason: String::from("the target cannot be reached"),
            },
        };
        self.tell_source(source, event);
    }

    /// The source is done with an attempt whose outcome it had to ask for.
    pub(crate) fn confirmed(&mut self, source: usize) {
        let (host, id) = (1 - self.sources[source].host, self.sources[source].id);
        if !self.link.is_up || !self.hosts[host].is_ready() {
            return;
        }
        let arrived = Phase::Arrived { id };
        let generation = self.hosts[host].generation;
        let vm = (0..self.vms.len()).find(|&vm| {
            let process = &self.vms[vm];
            process.host == host && process.is_alive && process.phase == arrived
        });
        if let Some(vm) = vm {
            let caller = Caller::Daemon { host, generation };
            self.ask(vm, caller, Request::Record(Phase::Running));
        }
    }
}
