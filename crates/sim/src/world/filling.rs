//! The target's side of a guest that runs before its pages are there.
//!
//! Whoever touches a missing page stands, the daemon asks the source for it, what comes is
//! installed if it is still missing and dropped if not. Which pages are missing, and who waits for
//! them, lives in the VM process; what was asked for and how long it took, in the daemon. Guests are
//! caught up with lazily, so one that misses pages is looked at again at each of its steps.

use super::{Event, World};
use crate::fault::WorldFault;
use crate::link::{Frame, WANT};
use crate::process::{Request, VmIndex};
use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::report::FaultReport;
use limosa_engine::target::TargetEvent;
use limosa_pages::{ByteCount, PageCount, PageRange};
use std::collections::BTreeMap;

/// A guest is looked at no more often than this.
const TICK_MIN: Duration = Duration::from_micros(20);

/// What a daemon knows of the page faults that it serves.
#[derive(Debug, Default)]
pub(crate) struct Filling {
    pub(crate) serves: bool,
    /// Pages that somebody waits for, and since when.
    asked: BTreeMap<u64, Timestamp>,
    is_told: bool,
    /// Planted: pages of which a half is still to come.
    halves: u32,
    pulled: u64,
    pushed: u64,
    latencies: Vec<Duration>,
    /// When the first vCPU waited, and how long.
    first: Option<(Timestamp, Duration)>,
}

impl Filling {
    fn report(&self, answer_bytes: u64) -> FaultReport {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
            sorted.get(index).copied().unwrap_or_default()
        };
        let mut report = FaultReport {
            pulled: PageCount::new(self.pulled),
            pushed: PageCount::new(self.pushed),
            pulled_bytes: ByteCount::new(answer_bytes),
            latency_p50: at(50),
            latency_p99: at(99),
            latency_max: at(100),
            first_stall: self.first.map(|(_, stall)| stall).unwrap_or_default(),
            ..FaultReport::default()
        };
        for latency in sorted {
            let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
            let bucket = usize::try_from(u64::BITS - micros.leading_zeros()).expect("at most 64");
            let last = report.latency_log2_us.len() - 1;
            report.latency_log2_us[bucket.min(last)] += 1;
        }
        report
    }
}

impl World {
    /// Page faults are served from here on.
    pub(super) fn serve_faults(&mut self, job: usize) {
        self.targets[job].filling.serves = true;
        self.ask_target_vm(job, Request::ServeFaults);
        self.check_present(job);
    }

    /// Somebody in a VM process stands at a missing page.
    pub(crate) fn page_fault(&mut self, vm: VmIndex, page: u64) {
        if !self.vms[vm].waiting.insert(page) {
            return;
        }
        self.note(|| format!("vm {vm} waits for page {page}"));
        let job = self
            .targets
            .iter()
            .position(|job| job.is_at_work() && job.vm == Some(vm) && job.filling.serves);
        if let Some(job) = job {
            self.notice_fault(job, page);
        }
    }

    /// A daemon reads of a page fault.
    pub(super) fn notice_fault(&mut self, job: usize, page: u64) {
        let now = self.now;
        self.targets[job].filling.asked.entry(page).or_insert(now);
        if self.targets[job].is_reconciled {
            self.want(job, page);
        }
    }

    fn want(&mut self, job: usize, page: u64) {
        if let Some(connection) = self.targets[job].connection {
            self.transmit(connection, WANT, Frame::Want(page));
        }
    }

    /// The source is there again: it is told what is missing, and asked again for what somebody
    /// waits for.
    pub(super) fn reconcile(&mut self, job: usize) {
        let (Some(vm), Some(connection)) = (self.targets[job].vm, self.targets[job].connection)
        else {
            return;
        };
        self.targets[job].is_reconciled = true;
        let missing = self.vms[vm].memory.missing();
        let count = missing.count();
        let ranges: Vec<PageRange> = missing.runs().collect();
        // Several frames, so that a connection can break between two of them.
        for ranges in ranges.chunks(16) {
            self.transmit(connection, WANT, Frame::Missing(ranges.to_vec()));
        }
        self.transmit(connection, WANT, Frame::MissingEnd);
        let asked: Vec<u64> = self.targets[job].filling.asked.keys().copied().collect();
        for page in asked {
            self.want(job, page);
        }
        self.tell_target(job, TargetEvent::StillMissing(count));
    }

    /// A page has come: straight into its place before a state was loaded, from then on only if it
    /// is missing.
    pub(super) fn land(&mut self, job: usize, vm: VmIndex, page: u64, content: u64) {
        if !self.targets[job].filling.serves {
            self.vms[vm].memory.install(page, content);
            self.targets[job].note_installed(page, content);
            return;
        }
        if !self.vms[vm].memory.is_missing(page) {
            if self.is_planted(WorldFault::InstalledTwice) {
                self.vms[vm].memory.install(page, content);
            }
            return;
        }
        self.targets[job].note_installed(page, content);
        self.count_landed(job, page);
        if self.is_planted(WorldFault::HalfPageVisible) {
            self.vms[vm].memory.install(page, content ^ (1 << 63));
            self.targets[job].filling.halves += 1;
            let delay = self.random.micros(50, 300);
            let target = job;
            self.schedule(
                delay,
                Event::SecondHalf {
                    target,
                    page,
                    content,
                },
            );
            return;
        }
        self.vms[vm].memory.install(page, content);
        self.wake_at(vm, page);
    }

    pub(crate) fn second_half(&mut self, target: usize, page: u64, content: u64) {
        if let Some(vm) = self.targets[target].vm {
            self.vms[vm].memory.install(page, content);
            self.wake_at(vm, page);
        }
        self.targets[target].filling.halves -= 1;
        self.check_present(target);
    }

    fn count_landed(&mut self, job: usize, page: u64) {
        let now = self.now;
        let runs = self.targets[job].first_instruction_at.is_some();
        let filling = &mut self.targets[job].filling;
        let Some(since) = filling.asked.remove(&page) else {
            filling.pushed += 1;
            return;
        };
        let latency = now.since(since);
        filling.pulled += 1;
        filling.latencies.push(latency);
        if runs && filling.first.is_none_or(|(first, _)| since < first) {
            filling.first = Some((since, latency));
        }
    }

    /// Whoever waited for a page goes on.
    fn wake_at(&mut self, vm: VmIndex, page: u64) {
        if !self.vms[vm].waiting.remove(&page) {
            return;
        }
        if self.vms[vm].is_stuck {
            if self.vms[vm].waiting.is_empty() && !self.vms[vm].is_woken {
                self.vms[vm].is_woken = true;
                let delay = self.random.micros(1, 10);
                self.schedule(delay, Event::Serve(vm));
            }
            return;
        }
        let memory = &self.vms[vm].memory;
        let stands = self.guest.stands_at().any(|page| memory.is_missing(page));
        if self.vms[vm].is_running && !stands {
            let stood = self.guest.go_on(self.now);
            self.stalls.at_pages += stood;
            self.stalls.worst = self.stalls.worst.max(stood);
            self.keep_ticking(vm);
        }
    }

    /// A guest that misses pages is looked at.
    pub(crate) fn tick(&mut self, vm: VmIndex) {
        self.vms[vm].is_ticking = false;
        self.catch_up(vm);
        self.keep_ticking(vm);
    }

    /// Looks at a guest again when it makes its next step, unless it stands.
    pub(crate) fn keep_ticking(&mut self, vm: VmIndex) {
        let process = &mut self.vms[vm];
        let Some(next) = self.guest.next_step() else {
            return;
        };
        let memory = &process.memory;
        let stands = self.guest.stands_at().any(|page| memory.is_missing(page));
        if !process.is_running || !memory.misses_pages() || process.is_ticking || stands {
            return;
        }
        process.is_ticking = true;
        let next = next.after(Duration::from_nanos(1));
        let at = next.max(self.now.after(TICK_MIN));
        self.schedule_at(at, Event::Tick(vm));
    }

    /// Tells the engine, once, that nothing is missing any more.
    pub(super) fn check_present(&mut self, job: usize) {
        let target = &self.targets[job];
        let Some(vm) = target.vm else { return };
        let filling = &target.filling;
        let is_over = filling.serves && !filling.is_told && filling.halves == 0;
        if !is_over
            || !target.is_at_work()
            || self.vms[vm].memory.misses_pages()
            || !self.vms[vm].is_alive
        {
            return;
        }
        self.targets[job].filling.is_told = true;
        let target = &self.targets[job];
        let report = target.filling.report(target.answer_bytes);
        if self.vms[vm].is_running {
            self.catch_up(vm);
            self.compare_with_truth(vm);
        }
        self.tell_target(job, TargetEvent::AllPresent(report));
    }
}
