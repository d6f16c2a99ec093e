//! How a VM process serves its requests.
//!
//! A request has a beginning and an end; what reads the guest (a harvest, a pause) looks at the
//! beginning, what changes the process takes effect at the end. A killed process never comes to
//! the end.

use super::{Event, World};
use crate::checker::Rule;
use crate::fault::WorldFault;
use crate::process::{Answer, Caller, Current, Message, Request, VmIndex, touched_by_load};
use core::time::Duration;
use limosa_engine::handover::{MigrationId, OnDaemonLost, Phase};
use limosa_engine::source::Writers;
use limosa_pages::PageCount;

impl World {
    /// Writes a message into the socket of a VM process.
    pub(crate) fn ask(&mut self, vm: VmIndex, caller: Caller, request: Request) {
        if !self.vms[vm].is_alive {
            let answer = match request {
                // There is nothing left to end.
                Request::Exit => Answer::Exited,
                _ => Answer::Gone,
            };
            let delay = self.random.micros(5, 50);
            self.schedule(delay, Event::Answer(caller, answer));
            return;
        }
        self.deliver_message(vm, Message::Request(caller, request));
    }

    pub(crate) fn deliver_message(&mut self, vm: VmIndex, message: Message) {
        let process = &mut self.vms[vm];
        if process.is_stuck && ends_a_load(&message) {
            // Whoever stands at a missing page can still be killed, and its process sees to it.
            process.is_stuck = false;
            process.current = None;
            process.waiting.clear();
        }
        process.queue.push_back(message);
        if process.current.is_none() && !process.is_woken {
            process.is_woken = true;
            // On a busy host a process now and then waits for its turn.
            let delay = if self.random.per_mille(self.config.hiccups_per_mille) {
                self.random.micros(500, 40_000)
            } else {
                self.random.micros(5, 30)
            };
            self.schedule(delay, Event::Serve(vm));
        }
    }

    /// Ends the request in work and begins the next.
    pub(crate) fn serve(&mut self, vm: VmIndex) {
        self.vms[vm].is_woken = false;
        if !self.vms[vm].is_alive {
            return;
        }
        if self.stands_in_load(vm) {
            return;
        }
        if let Some(current) = self.vms[vm].current.take() {
            self.end_request(vm, current);
        }
        self.count_deed();
        if !self.vms[vm].is_alive {
            return;
        }
        if let Some(message) = self.vms[vm].queue.pop_front() {
            let (draft, took) = self.begin_request(vm, &message);
            self.vms[vm].current = Some(Current { message, draft });
            self.vms[vm].is_woken = true;
            self.schedule(took, Event::Serve(vm));
        }
    }

    /// What is found at the beginning, and how long the request takes.
    fn begin_request(&mut self, vm: VmIndex, message: &Message) -> (Option<Answer>, Duration) {
        self.note(|| format!("vm {vm} begins {message:?}"));
        let Message::Request(_, request) = message else {
            return (None, Duration::ZERO);
        };
        match request {
            Request::Harvest { round, is_stale } => {
                self.catch_up(vm);
                let answer = Answer::Harvested {
                    round: *round,
                    is_stale: *is_stale,
                    log: self.vms[vm].memory.harvest(),
                    writers: self.writers(vm),
                };
                (Some(answer), self.random.micros(20, 200))
            }
            Request::Look => {
                self.catch_up(vm);
                let log = self.vms[vm].memory.harvest();
                (Some(Answer::Looked { log }), self.random.micros(20, 200))
            }
            Request::Rehearse => self.begin_rehearsal(vm),
            Request::Pause { harvest } => self.begin_pause(vm, *harvest),
            Request::CommitAndRun { id, keeps_faults } => (
                self.begin_commit(vm, *id, *keeps_faults),
                self.random.micros(20, 200),
            ),
            Request::Load { .. } => {
                let took = self.random.micros(150, 900);
                (Some(Answer::Loaded { took }), took)
            }
            Request::Resume => (None, self.random.micros(20, 100)),
            Request::StartTracking => (None, self.random.micros(100, 2000)),
            Request::Clear(..) => (None, self.random.micros(5, 60)),
            Request::Exit => (None, self.random.micros(500, 4000)),
            Request::Attach
            | Request::Record(_)
            | Request::StopTracking
            | Request::Throttle(_)
            | Request::ServeFaults
            | Request::Disarm { .. } => (None, self.random.micros(5, 30)),
        }
    }

    /// What the vCPUs of a process have done since its tracking began.
    fn writers(&self, vm: VmIndex) -> Writers {
        let dirtied = PageCount::new(self.vms[vm].memory.dirtied);
        let is_counted = self.config.counts_vcpus;
        Writers {
            pages: is_counted.then_some(dirtied).into_iter().collect(),
            held: self.guest.held,
        }
    }

    /// Records the commit; a refusal if the phase forbids it.
    fn begin_commit(&mut self, vm: VmIndex, id: MigrationId, keeps_faults: bool) -> Option<Answer> {
        let next = Phase::Arrived { id };
        if let Err(error) = self.vms[vm].phase.check(&next) {
            return Some(Answer::Refused(error.to_string()));
        }
        if self.is_planted(WorldFault::RunWithoutRecord) {
            return None;
        }
        self.vms[vm].phase = next;
        // Durable before the first instruction: a host whose daemon and VM both died must still
        // know that the guest was here, and whether it had all its pages.
        if !self.is_planted(WorldFault::LedgerLeftOut) {
            let host = self.vms[vm].host;
            self.hosts[host].ledger.insert(id, !keeps_faults);
        }
        None
    }

    fn begin_rehearsal(&mut self, vm: VmIndex) -> (Option<Answer>, Duration) {
        if !self.vms[vm].phase.may_run() {
            return (
                Some(Answer::Refused(String::from("the guest does not run"))),
                Duration::ZERO,
            );
        }
        self.stop_guest(vm);
        let (stop, save) = (self.random.micros(20, 80), self.random.micros(100, 500));
        let state = self.vms[vm].save(self.config.state_filler);
        let answer = Answer::Rehearsed {
            state,
            stall: stop + save,
            save,
        };
        (Some(answer), stop + save)
    }

    fn begin_pause(&mut self, vm: VmIndex, harvest: bool) -> (Option<Answer>, Duration) {
        self.stop_guest(vm);
        self.vms[vm].throttle = None;
        let stopped_first = self.clock(self.vms[vm].host);
        let stopped_last = stopped_first.after(self.random.micros(10, 80));
        let harvested = stopped_last.after(self.random.micros(10, 100));
        let saved = harvested.after(self.random.micros(100, 500));
        let log = harvest.then(|| self.vms[vm].memory.harvest());
        let state = self.vms[vm].save(self.config.state_filler);
        let moments = [stopped_first, stopped_last, harvested, saved];
        let answer = Answer::Paused {
            log,
            state,
            moments,
        };
        (Some(answer), saved.since(stopped_first))
    }

    fn end_request(&mut self, vm: VmIndex, current: Current) {
        match current.message {
            Message::DaemonLost => self.daemon_lost(vm),
            Message::Request(caller, request) => {
                let answer = match current.draft {
                    Some(Answer::Refused(reason)) => Answer::Refused(reason),
                    draft => self.carry_out(vm, request, draft),
                };
                // It may die with the deed done and nobody told.
                self.count_deed();
                let answer = match answer {
                    Answer::Exited => Answer::Exited,
                    _ if !self.vms[vm].is_alive => Answer::Gone,
                    answer => answer,
                };
                self.note(|| format!("vm {vm} answers {}", name(&answer)));
                let delay = self.random.micros(5, 30);
                self.schedule(delay, Event::Answer(caller, answer));
            }
        }
    }

    /// The effect of a request at its end.
    fn carry_out(&mut self, vm: VmIndex, request: Request, draft: Option<Answer>) -> Answer {
        let refused = |text: &str| Answer::Refused(String::from(text));
        match request {
            Request::Attach => Answer::Attached,
            Request::Record(next) => match self.vms[vm].phase.check(&next) {
                Ok(()) => {
                    self.vms[vm].phase = next.clone();
                    Answer::Recorded(next)
                }
                Err(error) => Answer::Refused(error.to_string()),
            },
            Request::StartTracking => {
                self.catch_up(vm);
                self.vms[vm].memory.start_log();
                self.guest.held = Duration::ZERO;
                Answer::TrackingStarted
            }
            Request::StopTracking => {
                self.catch_up(vm);
                self.vms[vm].memory.stop_log();
                self.vms[vm].throttle = None;
                Answer::TrackingStopped
            }
            Request::Throttle(throttle) if self.vms[vm].memory.is_logged() => {
                self.catch_up(vm);
                self.vms[vm].throttle = throttle;
                Answer::Throttled
            }
            Request::Throttle(_) => refused("a guest is slowed only while its writes are tracked"),
            Request::Rehearse => {
                self.start_guest(vm);
                draft.unwrap_or_else(|| refused("nothing was saved"))
            }
            Request::Harvest { .. } | Request::Look | Request::Pause { .. } => {
                draft.unwrap_or_else(|| refused("nothing was read"))
            }
            Request::Clear(piece, kept) => {
                self.catch_up(vm);
                self.vms[vm].memory.clear(piece.range, &kept);
                Answer::Cleared(piece)
            }
            Request::Resume if self.vms[vm].phase.may_run() => {
                self.start_guest(vm);
                Answer::Resumed
            }
            Request::Resume => refused("the phase forbids to run"),
            Request::ServeFaults => {
                self.vms[vm].memory.is_armed = true;
                Answer::FaultsServed
            }
            Request::Disarm { id } => {
                self.vms[vm].memory.is_armed = false;
                self.hosts[self.vms[vm].host].ledger.insert(id, true);
                Answer::Disarmed
            }
            Request::Load { state } => match self.load_state(vm, &state) {
                Ok(()) => draft.unwrap_or_else(|| refused("nothing was loaded")),
                Err(reason) => Answer::Refused(reason),
            },
            Request::CommitAndRun { .. } => {
                self.first_instruction(vm);
                Answer::Running { at: self.now }
            }
            Request::Exit => {
                self.catch_up(vm);
                self.end_vm(vm, false);
                Answer::Exited
            }
        }
    }

    /// True if the process stands in the middle of a load, at a page that it touches there.
    fn stands_in_load(&mut self, vm: VmIndex) -> bool {
        let process = &mut self.vms[vm];
        let Some(Current {
            message: Message::Request(_, Request::Load { state }),
            ..
        }) = &process.current
        else {
            return false;
        };
        if process.queue.iter().any(ends_a_load) {
            process.current = None;
            process.is_stuck = false;
            process.waiting.clear();
            return false;
        }
        let pages = touched_by_load(state, self.config.habits.memory);
        let waits = pages.map(|page| process.memory.touch(page));
        process.is_stuck = waits.contains(&true);
        for (page, waits) in pages.into_iter().zip(waits) {
            if waits {
                self.page_fault(vm, page);
            }
        }
        self.vms[vm].is_stuck
    }

    fn load_state(&mut self, vm: VmIndex, state: &[u8]) -> Result<(), String> {
        let is_preparing = matches!(self.vms[vm].phase, Phase::Preparing { .. });
        if !is_preparing && !self.is_planted(WorldFault::LoadAcceptedLate) {
            return Err(String::from("a guest that runs takes no state"));
        }
        self.catch_up(vm);
        self.vms[vm].load(state)
    }

    /// The switch: the guest's first instruction at the target.
    fn first_instruction(&mut self, vm: VmIndex) {
        if self.vms[vm].is_running {
            return;
        }
        self.compare_with_truth(vm);
        for (other, process) in self.vms.iter_mut().enumerate() {
            process.is_past |= other != vm;
        }
        self.origin = self.owner;
        self.start_guest(vm);
        if self.vms[vm].memory.misses_pages() {
            let delay = self.config.drain_after;
            self.schedule(delay, Event::Drain { vm });
        }
    }

    /// Every page that is there is what the guest wrote last, wherever it ran then.
    pub(crate) fn compare_with_truth(&mut self, vm: VmIndex) {
        let memory = &self.vms[vm].memory;
        let differing = memory
            .content()
            .iter()
            .zip(&self.guest.truth)
            .zip(0..)
            .find(|((have, want), page)| have != want && !memory.is_missing(*page));
        if let Some(((&have, &want), page)) = differing {
            self.violate(
                Rule::EqualAtTheSwitch,
                format!("page {page} is version {have} at the target and {want} at the source"),
            );
        }
    }

    /// What the process does by itself when its daemon is gone.
    fn daemon_lost(&mut self, vm: VmIndex) {
        self.catch_up(vm);
        self.vms[vm].memory.stop_log();
        if !self.is_planted(WorldFault::ThrottleKept) {
            self.vms[vm].throttle = None;
        }
        let is_ignored = self.is_planted(WorldFault::PhaseIgnored);
        let decision = match self.vms[vm].phase.on_daemon_lost() {
            OnDaemonLost::Stay if is_ignored => OnDaemonLost::ResumeHere,
            decision => decision,
        };
        self.note(|| format!("vm {vm} lost its daemon: {decision:?}"));
        match decision {
            OnDaemonLost::ResumeHere => {
                self.vms[vm].phase = Phase::Running;
                self.start_guest(vm);
            }
            OnDaemonLost::Stay if self.is_planted(WorldFault::LastFaultDescriptorClosed) => {
                self.vms[vm].memory.is_armed = false;
                self.vms[vm].waiting.clear();
                let now = self.now;
                self.guest.go_on(now);
            }
            OnDaemonLost::Stay => {}
            OnDaemonLost::Exit => self.end_vm(vm, false),
        }
    }
}

/// What a process obeys even while a load stands.
const fn ends_a_load(message: &Message) -> bool {
    matches!(
        message,
        Message::DaemonLost | Message::Request(_, Request::Exit)
    )
}

const fn name(answer: &Answer) -> &'static str {
    match answer {
        Answer::Attached => "attached",
        Answer::Recorded(_) => "recorded",
        Answer::TrackingStarted => "tracking started",
        Answer::TrackingStopped => "tracking stopped",
        Answer::Throttled => "throttled",
        Answer::Rehearsed { .. } => "rehearsed",
        Answer::Harvested { .. } => "harvested",
        Answer::Looked { .. } => "looked",
        Answer::Cleared(_) => "cleared",
        Answer::Paused { .. } => "paused",
        Answer::Resumed => "resumed",
        Answer::Loaded { .. } => "loaded",
        Answer::FaultsServed => "faults served",
        Answer::Disarmed => "disarmed",
        Answer::Running { .. } => "running",
        Answer::Exited => "exited",
        Answer::Refused(_) => "refused",
        Answer::Gone => "gone",
    }
}
