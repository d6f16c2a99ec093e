//! The checker's looks: after every step, at each outcome, and at a world that came to rest.

use super::source_driver::fresh_source;
use super::target_driver::fresh_target;
use super::{SourceJob, TargetJob, World};
use crate::checker::Rule;
use crate::process::VmProcess;
use core::time::Duration;
use limosa_engine::handover::Phase;
use limosa_engine::journal::{Entry, replay};
use limosa_engine::report::{MigrationReport, Outcome};
use limosa_engine::target::Target;
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

impl World {
    /// What must hold after every step.
    pub(crate) fn check_step(&mut self) {
        let running = self.vms.iter().filter(|vm| vm.is_running).count();
        if running > 1 {
            self.violate(Rule::OneRuns, format!("{running} processes run the guest"));
        }
        if running == 0 && !self.is_guest_lost() && !self.is_anything_at_work() {
            self.violate(
                Rule::StandsForAReason,
                String::from("nobody runs the guest and nobody is at work"),
            );
        }
        if running == 1
            && self.vms[self.owner].memory.misses_pages()
            && !self.is_guest_lost()
            && !self.is_anything_at_work()
        {
            self.violate(
                Rule::StandsForAReason,
                String::from("the guest misses pages and nobody is at work"),
            );
        }
        self.check_throttles();
        if self.guest.stale_reads > 0
            && self.violation.is_none()
            && let Some(text) = self.guest.first_error.clone()
        {
            self.violate(Rule::NothingStale, text);
        }
    }

    /// A guest that runs throttled belongs to a migration that will let it go, or to a process that
    /// is about to.
    fn check_throttles(&mut self) {
        let is_forgotten = |index: usize, vm: &VmProcess| {
            let is_moved = |job: &SourceJob| job.vm == index && job.is_at_work();
            vm.is_running
                && vm.throttle.is_some()
                && !vm.is_busy()
                && !self.sources.iter().any(is_moved)
        };
        let mut vms = self.vms.iter().enumerate();
        if let Some((index, vm)) = vms.find(|(index, vm)| is_forgotten(*index, vm)) {
            let text = format!(
                "process {index} holds its guest back, {:?}, and nobody moves it",
                vm.throttle
            );
            self.violate(Rule::NeverLeftThrottled, text);
        }
    }

    /// True while somebody will still decide something.
    pub(crate) fn is_anything_at_work(&self) -> bool {
        let is_waited_for = |job: &TargetJob| {
            // Not if it waits for a source that will never come again.
            let is_filling = job.engine.machine().is_filling();
            job.is_at_work() && !(is_filling && self.is_stranded())
        };
        self.hosts
            .iter()
            .any(|host| !host.is_ready() && !host.is_lost)
            || self.hosts.iter().any(|host| !host.bereft.is_empty())
            || self.sources.iter().any(SourceJob::is_at_work)
            || self.targets.iter().any(is_waited_for)
            || self.vms.iter().any(|vm| vm.is_alive && vm.is_busy())
    }

    /// An outcome was stated: is it true?
    pub(crate) fn check_outcome(&mut self, job: usize) {
        let source = &self.sources[job];
        let vm = &self.vms[source.vm];
        let Some(outcome) = &source.outcome else {
            return;
        };
        let runs = self.vms.iter().any(|vm| vm.is_running);
        // Dead or alive: what ended before its pages were there was not moved.
        let arrived = Phase::Arrived { id: source.id };
        let misses = |vm: &VmProcess| vm.phase == arrived && vm.memory.misses_pages();
        let is_whole = !self.vms.iter().any(misses);
        let is_true = match outcome {
            Outcome::Completed => !vm.is_alive && is_whole,
            // It may have died a moment ago; who knows that must not say that it runs.
            Outcome::Aborted | Outcome::Failed { .. } => {
                (vm.was_killed && !source.knows_loss) || vm.is_running
            }
            Outcome::GuestLost { .. } => !vm.is_alive && !runs,
        };
        if !is_true {
            let text = format!(
                "{outcome:?} was stated; the source's process lives: {}, runs: {}; the guest \
                 runs: {runs}, with all its pages: {is_whole}",
                vm.is_alive, vm.is_running
            );
            self.violate(Rule::TruthfulOutcome, text);
        }
        if self.sources[job].outcome == Some(Outcome::Completed) {
            self.check_report(job);
        }
    }

    /// The report of a completed migration against what the world saw.
    fn check_report(&mut self, job: usize) {
        let source = &self.sources[job];
        let report = source.report().clone();
        let host = source.host;
        if report.downtime.is_some()
            && let Some(text) = differs(&report, source)
        {
            return self.violate(Rule::TruthfulReport, text);
        }
        if report.digest_equal == Some(false) {
            return self.violate(
                Rule::TruthfulReport,
                String::from("the digests differ although the memories were equal"),
            );
        }
        let Some(target) = self.targets.iter().rfind(|target| target.id == source.id) else {
            return;
        };
        let received = target.pages_received;
        let (Some(downtime), Some(first_instruction_at)) =
            (report.downtime, target.first_instruction_at)
        else {
            return;
        };
        let carried = source.pages_carried + source.serving.pages;
        // With a switch it is over when every page has come once: a second copy may be on its way.
        let is_all = received == carried || (received < carried && source.serving.is_switching);
        if !is_all && source.serving.reconnections == 0 {
            let text = format!("{received} pages received and {carried} sent");
            return self.violate(Rule::TruthfulReport, text);
        }
        let truth = first_instruction_at.since(source.stopped_at);
        let reported = downtime.total();
        let error = truth.abs_diff(reported);
        let allowed = report.clock.error + Duration::from_nanos(2);
        let offset = self.hosts[1 - host].offset - self.hosts[host].offset;
        let offset_error = Duration::from_nanos(offset.abs_diff(report.clock.nanos));
        if error > allowed || offset_error > allowed {
            let text = format!(
                "downtime {reported:?} reported and {truth:?} true, clocks off by {offset_error:?}, {allowed:?} allowed"
            );
            self.violate(Rule::TruthfulReport, text);
        }
    }

    /// What must hold when a healed world came to rest.
    pub(crate) fn check_rest(&mut self) {
        self.catch_up(self.owner);
        self.check_step();
        let alive = self.vms.iter().filter(|vm| vm.is_alive).count();
        let running = self.vms.iter().filter(|vm| vm.is_running).count();
        let expected = usize::from(!self.is_guest_lost());
        let is_at_rest = alive == running && running <= 1 && running >= expected;
        if !is_at_rest {
            let phases: Vec<String> = self
                .vms
                .iter()
                .filter(|vm| vm.is_alive)
                .map(|vm| format!("host {} {} runs: {}", vm.host, vm.phase, vm.is_running))
                .collect();
            self.violate(
                Rule::Progress,
                format!("at rest {alive} processes live and {running} run: {phases:?}"),
            );
        }
        if self.is_stranded() && !self.hosts[self.vms[self.origin].host].is_lost {
            self.violate(
                Rule::Progress,
                String::from("at rest a guest misses pages that are lost, and was not told so"),
            );
        }
        let held = self
            .vms
            .iter()
            .find(|vm| vm.is_alive && !matches!(vm.phase, Phase::Running | Phase::Arrived { .. }));
        if let Some(vm) = held {
            let text = format!("at rest a process is {}", vm.phase);
            self.violate(Rule::Progress, text);
        }
    }

    /// Replays every journal on a fresh machine.
    pub(crate) fn check_journals(&mut self) {
        let mut divergences = Vec::new();
        for job in &self.sources {
            let planted = if job.is_recovery {
                None
            } else {
                self.config.planted
            };
            let mut fresh = fresh_source(&job.config, job.is_recovery, planted);
            if let Err(error) = replay(&mut fresh, job.engine.entries().to_vec()) {
                divergences.push(format!("source: {error}"));
            }
        }
        for job in &self.targets {
            let mut fresh = if job.is_recovery {
                Target::recover(job.id, job.boot_id, job.accepted_at)
            } else {
                fresh_target(job.id, job.boot_id, job.accepted_at, job.planted)
            };
            if let Err(error) = replay(&mut fresh, job.engine.entries().to_vec()) {
                divergences.push(format!("target: {error}"));
            }
        }
        if let Some(text) = divergences.pop() {
            self.violate(Rule::Replay, text);
        }
    }

    /// A hash over all journals: two worlds of one seed have the same.
    pub(crate) fn journal_hash(&self) -> u64 {
        let mut hash = self.steps;
        for job in &self.sources {
            hash = hash_entries(hash, job.engine.entries());
        }
        for job in &self.targets {
            hash = hash_entries(hash, job.engine.entries());
        }
        hash
    }
}

/// Where a report differs from what was handed to the wire, if it does.
fn differs(report: &MigrationReport, source: &SourceJob) -> Option<String> {
    let pages: u64 = report.rounds.iter().map(|round| round.pages.get()).sum();
    // When all pages have come, a piece of which every page was asked for may be under way still.
    let carried = source.pages_carried - source.pages_unfinished;
    if pages != carried {
        return Some(format!("{pages} pages reported and {carried} carried"));
    }
    let rounds: u64 = report.rounds.iter().map(|round| round.bytes.get()).sum();
    let bytes = rounds + report.missing_set_bytes.get();
    let carried = source.bytes_carried - source.bytes_unfinished;
    if bytes != carried {
        return Some(format!("{bytes} bytes reported and {carried} carried"));
    }
    let faults = report.faults.as_ref()?;
    let (pulled, pushed) = (faults.pulled.get(), faults.pushed.get());
    if source.serving.reconnections > 0 {
        return None;
    }
    if pulled + pushed != report.missing_at_switch.get() {
        let missing = report.missing_at_switch.get();
        return Some(format!(
            "{missing} pages were missing, {pulled} pulled, {pushed} pushed"
        ));
    }
    let (answered, answer_bytes) = (source.serving.pages, source.serving.bytes);
    if answered > pulled || faults.pulled_bytes.get() > answer_bytes {
        let bytes = faults.pulled_bytes.get();
        return Some(format!(
            "{pulled} pages and {bytes} bytes pulled, {answered} and {answer_bytes} answered"
        ));
    }
    let counted: u32 = faults.latency_log2_us.iter().sum();
    (u64::from(counted) != pulled).then(|| format!("{counted} latencies of {pulled} pulled pages"))
}

fn hash_entries<E: Serialize>(seed: u64, entries: &[Entry<E>]) -> u64 {
    let bytes = postcard::to_allocvec(entries).expect("entries of plain data serialize");
    xxh3_64_with_seed(&bytes, seed)
}
