//! How a VM process serves its requests.
//!
//! A request has a beginning and an end; what reads the guest (a harvest, a pause) looks at the
//! beginning, what changes the process takes effect at the end. A killed process never comes to
//! the end.

use super::{Event, World};
use crate::checker::Rule;
use crate::fault::WorldFault;
use crate::process::{Answer, Caller, Current, Message, Request, VmIndex};
use core::time::Duration;
use limosa_engine::handover::{OnDaemonLost, Phase};

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
            Request::Harvest { round } => {
                self.catch_up(vm);
                let log = self.vms[vm].memory.harvest();
                let answer = Answer::Harvested { round: *round, log };
                (Some(answer), self.random.micros(20, 200))
            }
            Request::Rehearse => self.begin_rehearsal(vm),
            Request::Pause { harvest } => self.begin_pause(vm, *harvest),
            Request::CommitAndRun { id } => {
                let next = Phase::Arrived { id: *id };
                if let Err(error) = self.vms[vm].phase.check(&next) {
                    let refusal = Answer::Refused(error.to_string());
                    return (Some(refusal), Duration::ZERO);
                }
                self.vms[vm].phase = next;
                // Durable before the first instruction: a host whose daemon and VM both died must
                // still know that the guest was here.
                if !self.is_planted(WorldFault::LedgerLeftOut) {
                    self.hosts[self.vms[vm].host].ledger.insert(*id);
                }
                (None, self.random.micros(20, 200))
            }
            Request::Load { .. } => {
                let took = self.random.micros(150, 900);
                (Some(Answer::Loaded { took }), took)
            }
            Request::Resume => (None, self.random.micros(20, 100)),
            Request::StartTracking => (None, self.random.micros(100, 2000)),
            Request::Clear(_) => (None, self.random.micros(5, 60)),
            Request::Exit => (None, self.random.micros(500, 4000)),
            Request::Attach | Request::Record(_) | Request::StopTracking => {
                (None, self.random.micros(5, 30))
            }
        }
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
                Answer::TrackingStarted
            }
            Request::StopTracking => {
                self.catch_up(vm);
                self.vms[vm].memory.stop_log();
                Answer::TrackingStopped
            }
            Request::Rehearse => {
                self.start_guest(vm);
                draft.unwrap_or_else(|| refused("nothing was saved"))
            }
            Request::Harvest { .. } | Request::Pause { .. } => {
                draft.unwrap_or_else(|| refused("nothing was read"))
            }
            Request::Clear(piece) => {
                self.catch_up(vm);
                self.vms[vm].memory.clear(piece.range);
                Answer::Cleared(piece)
            }
            Request::Resume if self.vms[vm].phase.may_run() => {
                self.start_guest(vm);
                Answer::Resumed
            }
            Request::Resume => refused("the phase forbids to run"),
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
        let content = self.vms[vm].memory.content();
        let differing = content
            .iter()
            .zip(&self.guest.truth)
            .position(|(have, want)| have != want);
        if let Some(page) = differing {
            let (have, want) = (content[page], self.guest.truth[page]);
            self.violate(
                Rule::EqualAtTheSwitch,
                format!("page {page} is version {have} at the target and {want} at the source"),
            );
        }
        for (other, process) in self.vms.iter_mut().enumerate() {
            process.is_past |= other != vm;
        }
        self.start_guest(vm);
    }

    /// What the process does by itself when its daemon is gone.
    fn daemon_lost(&mut self, vm: VmIndex) {
        self.catch_up(vm);
        self.vms[vm].memory.stop_log();
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
            OnDaemonLost::Stay => {}
            OnDaemonLost::Exit => self.end_vm(vm, false),
        }
    }
}

const fn name(answer: &Answer) -> &'static str {
    match answer {
        Answer::Attached => "attached",
        Answer::Recorded(_) => "recorded",
        Answer::TrackingStarted => "tracking started",
        Answer::TrackingStopped => "tracking stopped",
        Answer::Rehearsed { .. } => "rehearsed",
        Answer::Harvested { .. } => "harvested",
        Answer::Cleared(_) => "cleared",
        Answer::Paused { .. } => "paused",
        Answer::Resumed => "resumed",
        Answer::Loaded { .. } => "loaded",
        Answer::Running { .. } => "running",
        Answer::Exited => "exited",
        Answer::Refused(_) => "refused",
        Answer::Gone => "gone",
    }
}
