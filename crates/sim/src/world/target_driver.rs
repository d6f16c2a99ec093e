//! The target's daemon at work: carries out what a target engine wants.

use super::filling::Filling;
use super::source_driver::{brief, digest};
use super::{Event, Host, World};
use crate::checker::Rule;
use crate::fault::{Planted, WorldFault};
use crate::link::Side;
use crate::process::{Answer, Caller, Request, VmIndex, VmProcess};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase, Resolution};
use limosa_engine::journal::Journaled;
use limosa_engine::target::{Target, TargetAction, TargetEvent, TargetFault, TargetOutcome};

/// One migration at its target.
#[derive(Debug)]
pub(crate) struct TargetJob {
    pub(crate) id: MigrationId,
    pub(crate) host: usize,
    pub(crate) boot_id: u128,
    /// When its connection was accepted, on its host's clock.
    pub(crate) accepted_at: Timestamp,
    pub(crate) planted: Option<TargetFault>,
    pub(crate) engine: Journaled<Target>,
    /// False when its daemon died.
    pub(crate) is_alive: bool,
    pub(crate) outcome: Option<TargetOutcome>,
    pub(crate) connection: Option<usize>,
    pub(crate) vm: Option<VmIndex>,
    /// Questions about the outcome that wait for the engine: who asked, and the question's number.
    pub(crate) questions: Vec<(usize, u64)>,
    timers: u64,
    is_given_up: bool,
    commits: u32,
    rehearsal: Vec<u8>,
    state: Vec<u8>,
    /// What was installed of each page, last.
    installed: Vec<u64>,
    pub(crate) pages_received: u64,
    /// Of the pull stream.
    pub(crate) answer_bytes: u64,
    pub(crate) filling: Filling,
    /// The source knows what is missing, so that it can be asked for pages.
    pub(crate) is_reconciled: bool,
    pub(crate) is_recovery: bool,
    /// By the world's time.
    pub(crate) first_instruction_at: Option<Timestamp>,
}

impl TargetJob {
    pub(crate) fn new(
        id: MigrationId,
        host: usize,
        place: &Host,
        local: Timestamp,
        connection: usize,
        planted: Option<TargetFault>,
    ) -> Self {
        let engine = fresh_target(id, place.boot_id, local, planted);
        let mut job = Self::with_engine(id, host, place, local, engine);
        job.planted = planted;
        job.connection = Some(connection);
        job
    }

    /// What a restarted daemon makes of a guest that still misses pages.
    pub(crate) fn recover(
        id: MigrationId,
        host: usize,
        place: &Host,
        local: Timestamp,
        process: &VmProcess,
        vm: VmIndex,
    ) -> Self {
        let engine = Target::recover(id, place.boot_id, local);
        let mut job = Self::with_engine(id, host, place, local, engine);
        job.is_recovery = true;
        job.vm = Some(vm);
        job.installed = vec![0; process.memory.content().len()];
        job.filling.serves = true;
        job
    }

    fn with_engine(
        id: MigrationId,
        host: usize,
        place: &Host,
        local: Timestamp,
        engine: Target,
    ) -> Self {
        Self {
            id,
            host,
            boot_id: place.boot_id,
            accepted_at: local,
            planted: None,
            engine: Journaled::new(engine),
            is_alive: true,
            outcome: None,
            connection: None,
            vm: None,
            questions: Vec::new(),
            timers: 0,
            is_given_up: false,
            commits: 0,
            rehearsal: Vec::new(),
            state: Vec::new(),
            installed: Vec::new(),
            pages_received: 0,
            answer_bytes: 0,
            filling: Filling::default(),
            is_reconciled: true,
            is_recovery: false,
            first_instruction_at: None,
        }
    }

    /// Remembers what was installed, for the digest.
    pub(crate) fn note_installed(&mut self, page: u64, content: u64) {
        self.installed[usize::try_from(page).expect("a page of a small guest")] = content;
    }

    /// True while its engine has something to decide.
    pub(crate) const fn is_at_work(&self) -> bool {
        self.is_alive && self.outcome.is_none()
    }
}

/// A target as it was before its first event.
pub(crate) fn fresh_target(
    id: MigrationId,
    boot_id: u128,
    accepted_at: Timestamp,
    planted: Option<TargetFault>,
) -> Target {
    let target = Target::new(id, boot_id, accepted_at);
    match planted {
        Some(fault) => target.with_fault(fault),
        None => target,
    }
}

impl World {
    pub(crate) const fn planted_in_target(&self) -> Option<TargetFault> {
        match self.config.planted {
            Some(Planted::Target(fault)) => Some(fault),
            _ => None,
        }
    }

    /// Tells a target's engine a fact and does what it wants.
    pub(crate) fn tell_target(&mut self, job: usize, event: TargetEvent) {
        // An engine with a planted fault may act after its end; a sound one never does.
        let is_listening = self.targets[job].is_alive
            && (self.targets[job].outcome.is_none() || self.targets[job].planted.is_some());
        if !is_listening {
            return;
        }
        let local = self.clock(self.targets[job].host);
        self.note(|| format!("target {job} <- {}", brief(&event)));
        let actions = self.targets[job].engine.handle(local, event);
        for action in actions {
            self.count_deed();
            if !self.targets[job].is_alive {
                return;
            }
            self.note(|| format!("target {job} -> {}", brief(&action)));
            self.act_target(job, action);
        }
    }

    fn act_target(&mut self, job: usize, action: TargetAction) {
        let caller = Caller::Target(job);
        match action {
            TargetAction::Create(_) => {
                let is_refused = core::mem::take(&mut self.refuse_create);
                let delay = self.random.micros(2000, 9000);
                self.schedule(
                    delay,
                    Event::Created {
                        target: job,
                        is_refused,
                    },
                );
            }
            TargetAction::Send(frame) => {
                if let Some(connection) = self.targets[job].connection {
                    self.send_control(connection, Side::Target, frame);
                }
            }
            TargetAction::Load {
                state,
                is_rehearsal,
            } => {
                if is_rehearsal {
                    self.targets[job].rehearsal.clone_from(&state);
                } else {
                    self.targets[job].state.clone_from(&state);
                }
                self.ask_target_vm(job, Request::Load { state });
            }
            TargetAction::ServeFaults => self.serve_faults(job),
            TargetAction::CommitAndRun { keeps_faults, .. } => {
                self.commit_target(job, keeps_faults);
            }
            TargetAction::Disarm => {
                let id = self.targets[job].id;
                self.ask_target_vm(job, Request::Disarm { id });
            }
            TargetAction::Detach => {
                let connection = self.targets[job].connection.take();
                self.close(connection, Side::Target);
            }
            TargetAction::Reconcile { .. } => self.reconcile(job),
            TargetAction::Digest => {
                let delay = self.random.micros(100, 1000);
                self.schedule(delay, Event::Digested { target: job });
            }
            TargetAction::Record(phase) => self.ask_target_vm(job, Request::Record(phase)),
            TargetAction::Destroy => self.destroy_target(job),
            TargetAction::AnswerResolve(resolution) => self.answer_all(job, resolution),
            TargetAction::SetTimer(local) => {
                self.targets[job].timers += 1;
                let number = self.targets[job].timers;
                let at = self.true_time(self.targets[job].host, local);
                self.schedule_at(at, Event::Timer { caller, number });
            }
            TargetAction::Finish(outcome) => self.finish_target(job, outcome),
        }
    }

    pub(super) fn ask_target_vm(&mut self, job: usize, request: Request) {
        let caller = Caller::Target(job);
        match self.targets[job].vm {
            Some(vm) => self.ask(vm, caller, request),
            None => self.schedule(
                core::time::Duration::ZERO,
                Event::Answer(caller, Answer::Gone),
            ),
        }
    }

    fn commit_target(&mut self, job: usize, keeps_faults: bool) {
        let target = &mut self.targets[job];
        target.commits += 1;
        let (commits, is_given_up, id) = (target.commits, target.is_given_up, target.id);
        if commits > 1 || is_given_up {
            self.violate(
                Rule::CommittedOnce,
                format!("target {job} committed {commits} times, given up before: {is_given_up}"),
            );
        }
        self.ask_target_vm(job, Request::CommitAndRun { id, keeps_faults });
        if self.is_planted(WorldFault::LoadAcceptedLate) {
            let state = self.targets[job].rehearsal.clone();
            self.ask_target_vm(job, Request::Load { state });
        }
    }

    fn destroy_target(&mut self, job: usize) {
        self.targets[job].is_given_up = true;
        let caller = Caller::Target(job);
        match self.targets[job].vm {
            Some(vm) => self.ask(vm, caller, Request::Exit),
            None => {
                let delay = self.random.micros(5, 50);
                self.schedule(delay, Event::Answer(caller, Answer::Exited));
            }
        }
    }

    fn answer_all(&mut self, job: usize, resolution: Resolution) {
        let (host, id) = (self.targets[job].host, self.targets[job].id);
        if resolution == Resolution::Barred {
            self.hosts[host].barred.insert(id);
        }
        for (source, number) in core::mem::take(&mut self.targets[job].questions) {
            self.answer_outcome(source, number, resolution);
        }
    }

    fn finish_target(&mut self, job: usize, outcome: TargetOutcome) {
        self.note(|| format!("target {job} finished: {outcome:?}"));
        let (host, id) = (self.targets[job].host, self.targets[job].id);
        if matches!(outcome, TargetOutcome::Lost { .. }) {
            self.end_lost(job);
        }
        if matches!(outcome, TargetOutcome::Dropped { .. }) {
            // The engine's word that it never ran here, and never will.
            self.hosts[host].barred.insert(id);
        }
        self.targets[job].outcome = Some(outcome);
        if self.targets[job].planted.is_none() {
            let connection = self.targets[job].connection.take();
            self.close(connection, Side::Target);
        }
        for (source, number) in core::mem::take(&mut self.targets[job].questions) {
            let answer = self.look_up(host, id);
            self.answer_outcome(source, number, answer);
        }
    }

    /// Ends what is left of a guest whose pages will never come, if that is the truth.
    fn end_lost(&mut self, job: usize) {
        let Some(vm) = self.targets[job].vm.filter(|&vm| self.vms[vm].is_alive) else {
            return;
        };
        if !self.is_stranded() {
            self.violate(
                Rule::TruthfulOutcome,
                String::from("a guest was given up although its pages were there"),
            );
        }
        self.catch_up(vm);
        self.end_vm(vm, true);
    }

    pub(crate) fn target_timer(&mut self, job: usize, number: u64) {
        if self.targets[job].timers == number {
            self.tell_target(job, TargetEvent::Timer);
        }
    }

    /// The VM was made, or could not be.
    pub(crate) fn created(&mut self, job: usize, is_refused: bool) {
        if !self.targets[job].is_alive || self.targets[job].is_given_up {
            return;
        }
        if is_refused {
            let reason = String::from("no memory");
            self.tell_target(job, TargetEvent::CreateFailed { reason });
            return;
        }
        let target = &mut self.targets[job];
        let phase = Phase::Preparing { id: target.id };
        let mut vm = VmProcess::new(target.host, self.config.habits.memory, phase);
        vm.memory.dropped_per_mille = self.vms[0].memory.dropped_per_mille;
        self.vms.push(vm);
        self.targets[job].vm = Some(self.vms.len() - 1);
        let pages = usize::try_from(self.config.habits.memory.get()).expect("a small guest");
        self.targets[job].installed = vec![0; pages];
        let can_fault = self.config.can_fault;
        self.tell_target(job, TargetEvent::Created { can_fault });
    }

    pub(crate) fn digested(&mut self, job: usize) {
        let digest = digest(&self.targets[job].installed, &self.targets[job].state);
        self.tell_target(job, TargetEvent::Digested(digest));
    }

    /// What a VM process says, as the engine wants to hear it.
    pub(crate) fn target_answered(&mut self, job: usize, answer: Answer) {
        let event = match answer {
            Answer::Loaded { took } => TargetEvent::Loaded { took },
            Answer::Running { at } => {
                self.targets[job].first_instruction_at = Some(at);
                TargetEvent::Running {
                    first_instruction_at: at.shift(self.hosts[self.targets[job].host].offset),
                }
            }
            Answer::Recorded(phase) => TargetEvent::Recorded(phase),
            Answer::Disarmed => TargetEvent::Disarmed,
            Answer::Exited => TargetEvent::Destroyed,
            Answer::Refused(reason) => self.vm_failure(job, reason),
            Answer::Gone => self.vm_failure(job, String::from("the VM process died")),
            _ => return,
        };
        self.tell_target(job, event);
    }

    /// A commit that is in no ledger was not recorded and never will be, whether the process
    /// refused it or died before it came to it.
    fn vm_failure(&self, job: usize, reason: String) -> TargetEvent {
        let target = &self.targets[job];
        let is_committing = target.engine.machine().is_committed();
        if is_committing && !self.hosts[target.host].ledger.contains_key(&target.id) {
            return TargetEvent::CommitRefused { reason };
        }
        TargetEvent::VmFailed { reason }
    }
}
