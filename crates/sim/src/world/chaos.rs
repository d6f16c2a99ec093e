//! How things go wrong, and how they heal.

use super::{Event, SourceJob, World};
use crate::fault::{Deed, Fault, Trigger};
use crate::link::{PUSH, Side};
use crate::process::VmIndex;
use core::time::Duration;
use limosa_engine::handover::Phase;
use limosa_engine::policy::Mode;
use limosa_engine::source::{Fence, SourceEvent};
use limosa_engine::target::TargetEvent;

/// An operator asks again no sooner than this.
const DRAIN_AGAIN: Duration = Duration::from_millis(100);

impl World {
    /// Puts faults on the schedule.
    pub(crate) fn arm(&mut self, faults: Vec<Fault>) {
        for fault in faults {
            let index = self.faults.len();
            self.faults.push(fault);
            match fault.trigger {
                Trigger::At(at) => self.schedule_at(at, Event::Fault(index)),
                Trigger::AtDeed(_) => self.armed += 1,
                Trigger::NearCommit(_) | Trigger::NearPause(_) => {}
            }
        }
    }

    /// True if a fault waits that has not happened.
    pub(crate) fn is_armed(&self) -> bool {
        self.faults.iter().any(|fault| !fault.is_done)
    }

    /// What has not happened by now will not happen.
    pub(crate) fn disarm(&mut self) {
        self.armed = 0;
        self.refuse_create = false;
        self.faults
            .iter_mut()
            .for_each(|fault| fault.is_done = true);
    }

    /// A daemon or a VM process is about to do something: this may be the moment of a fault.
    pub(crate) fn count_deed(&mut self) {
        self.deeds += 1;
        if self.armed == 0 {
            return;
        }
        for index in 0..self.faults.len() {
            let fault = self.faults[index];
            if !fault.is_done && fault.trigger == Trigger::AtDeed(self.deeds) {
                self.armed -= 1;
                self.break_something(index);
            }
        }
    }

    /// A source is about to record its commit: this may be near the moment of a fault.
    pub(crate) fn near_commit(&mut self) {
        self.schedule_faults(|trigger| match trigger {
            Trigger::NearCommit(delay) => Some(delay),
            _ => None,
        });
    }

    /// The same when it is about to pause the guest.
    pub(crate) fn near_pause(&mut self) {
        self.schedule_faults(|trigger| match trigger {
            Trigger::NearPause(delay) => Some(delay),
            _ => None,
        });
    }

    fn schedule_faults(&mut self, after: impl Fn(Trigger) -> Option<Duration>) {
        for index in 0..self.faults.len() {
            let fault = self.faults[index];
            if let Some(delay) = after(fault.trigger)
                && !fault.is_done
            {
                self.schedule(delay, Event::Fault(index));
            }
        }
    }

    pub(crate) fn will_heal_after(&mut self, back: Duration) {
        self.healed_at = self.healed_at.max(self.now.after(back));
    }

    pub(crate) fn break_something(&mut self, index: usize) {
        if core::mem::replace(&mut self.faults[index].is_done, true) {
            return;
        }
        let deed = self.faults[index].deed;
        self.note(|| format!("FAULT {deed:?}"));
        self.will_heal_after(Duration::ZERO);
        match deed {
            Deed::KillDaemon { host, back } => self.kill_daemon(host, back),
            Deed::KillVm { host } => self.kill_vms(host),
            Deed::KillHost { host, back } => {
                self.kill_daemon(host, back);
                self.kill_vms(host);
            }
            Deed::CutLink { back, is_silent } => self.cut_link(back, is_silent),
            Deed::CutStream { stream, is_silent } => self.cut_stream(stream, is_silent),
            Deed::Stall { length } => {
                self.link.stalled_until = self.link.stalled_until.max(self.now.after(length));
                self.will_heal_after(length);
            }
            Deed::Abort => {
                // A command comes between two events of the engine, never within one.
                if let Some(job) = self.sources.iter().rposition(|job| job.is_at_work()) {
                    self.operator(job, SourceEvent::Abort);
                }
            }
            Deed::Set(limits) => {
                if let Some(job) = self.sources.iter().rposition(|job| job.is_at_work()) {
                    self.operator(job, SourceEvent::Set(limits));
                }
            }
            Deed::SetMode(mode) => {
                if let Some(job) = self.sources.iter().rposition(|job| job.is_at_work()) {
                    self.operator(job, SourceEvent::SetMode(mode));
                }
            }
            Deed::LoseHost { host } => self.lose_host(host),
            Deed::AbortAtTarget => {
                if let Some(job) = self.targets.iter().rposition(|job| job.is_at_work()) {
                    self.schedule(Duration::ZERO, Event::AbortTarget { target: job });
                }
            }
            Deed::RefuseCreate => self.refuse_create = true,
        }
    }

    fn operator(&mut self, source: usize, event: SourceEvent) {
        self.schedule(Duration::ZERO, Event::Operator { source, event });
    }

    /// A host is gone for ever. The operator hears of it after a while.
    fn lose_host(&mut self, host: usize) {
        self.kill_daemon(host, Duration::ZERO);
        self.kill_vms(host);
        self.hosts[host].is_up = false;
        self.hosts[host].is_lost = true;
        let delay = self.random.micros(1000, 20_000_000);
        self.will_heal_after(delay);
        self.schedule(delay, Event::Fence { host });
    }

    /// The operator says what became of a guest that a lost host had, or was to have: as it is.
    pub(crate) fn fence(&mut self, host: usize) {
        let job = self
            .sources
            .iter()
            .rposition(|job| job.is_at_work() && job.host != host);
        if let Some(job) = job {
            let fence = if self.vms[self.sources[job].vm].is_past {
                Fence::Gone
            } else {
                Fence::RunsHere
            };
            self.operator(job, SourceEvent::Fence(fence));
        } else if self.hosts[1 - host].is_ready() || self.hosts[1 - host].is_lost {
            return;
        }
        let again = self.random.micros(100_000, 2_000_000);
        self.schedule(again, Event::Fence { host });
    }

    /// The operator ends a migration on demand.
    pub(crate) fn drain(&mut self, vm: VmIndex) {
        if !self.vms[vm].is_alive || !self.vms[vm].memory.misses_pages() || self.is_stranded() {
            return;
        }
        if let Some(job) = self.sources.iter().rposition(|job| job.is_at_work())
            && self.sources[job].mode() == Mode::Demand
        {
            self.tell_source(job, SourceEvent::SetMode(Mode::PostCopy));
        }
        let again = self.config.drain_after.max(DRAIN_AGAIN);
        self.schedule(again, Event::Drain { vm });
    }

    pub(crate) fn abort_target(&mut self, target: usize) {
        self.tell_target(target, TargetEvent::Abort);
    }

    fn kill_vms(&mut self, host: usize) {
        let there: Vec<VmIndex> = (0..self.vms.len())
            .filter(|&vm| self.vms[vm].host == host && self.vms[vm].is_alive)
            .collect();
        for vm in there {
            self.kill_vm(vm);
        }
    }

    fn cut_link(&mut self, back: Duration, is_silent: bool) {
        self.link.is_up = false;
        for connection in 0..self.connections.len() {
            if self.connections[connection].open.contains(&true) {
                self.connections[connection].cut();
                self.spread_loss(connection, is_silent);
            }
        }
        self.will_heal_after(back);
        self.schedule(back, Event::HealLink);
    }

    fn cut_stream(&mut self, stream: u8, is_silent: bool) {
        let open = self
            .connections
            .iter()
            .rposition(|connection| connection.open.contains(&true));
        let Some(connection) = open else { return };
        let channels = &mut self.connections[connection].channels;
        let pushes = channels.len() - PUSH;
        let channel = &mut channels[PUSH + usize::from(stream) % pushes];
        channel.is_cut = true;
        channel.in_flight.clear();
        self.spread_loss(connection, is_silent);
    }

    /// Each end of a broken connection notices it some time, or only by its own clock.
    fn spread_loss(&mut self, connection: usize, is_silent: bool) {
        for side in [Side::Source, Side::Target] {
            if is_silent && self.random.per_mille(700) {
                continue;
            }
            let delay = self.random.micros(10, 1_500_000);
            let delay = if self.random.per_mille(600) {
                delay / 1000
            } else {
                delay
            };
            self.schedule(delay, Event::Lost { connection, side });
        }
    }

    pub(crate) fn heal_link(&mut self) {
        if self.healed_at <= self.now {
            self.note(|| String::from("the link works again"));
        }
        self.link.is_up = true;
    }

    /// True when a process that held the guest, or was about to, was killed: then nobody can say
    /// that the guest must run.
    pub(crate) fn is_guest_lost(&self) -> bool {
        let was_killed = self.vms.iter().enumerate().any(|(index, vm)| {
            vm.was_killed && (index == self.owner || matches!(vm.phase, Phase::Arrived { .. }))
        });
        was_killed || self.is_stranded()
    }

    /// True when the guest stands, or will, at a page that was lost with the source: its process
    /// died, and so did the daemon that still had its memory.
    pub(crate) fn is_stranded(&self) -> bool {
        let (owner, origin) = (&self.vms[self.owner], &self.vms[self.origin]);
        let is_kept = |job: &SourceJob| job.is_at_work() && job.vm == self.origin;
        owner.is_alive
            && owner.memory.misses_pages()
            && origin.was_killed
            && !self.sources.iter().any(is_kept)
    }
}
