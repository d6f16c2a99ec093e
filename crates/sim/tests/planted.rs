//! A checker that never cries is no checker: every planted fault of limosa is caught by it, and by
//! the rule that it breaks.

use limosa_engine::policy::Mode;
use limosa_engine::source::SourceFault;
use limosa_engine::target::TargetFault;
use limosa_sim::checker::{Rule, Violation};
use limosa_sim::trial::Trial;
use limosa_sim::{Planted, WorldFault};

/// The first seed at which a planted fault is caught, and by what.
fn first_bite(mode: Mode, planted: Planted, seeds: u64) -> Option<(u64, Violation)> {
    (0..seeds).find_map(|seed| {
        let trial = Trial {
            planted: Some(planted),
            replays: false,
            ..Trial::new(mode, seed)
        };
        trial.run().err().map(|violation| (seed, violation))
    })
}

/// Every violation within `seeds` seeds is by one of `rules`, and there is one of each.
fn check(mode: Mode, planted: Planted, seeds: u64, rules: &[Rule]) {
    let Some((seed, violation)) = first_bite(mode, planted, seeds) else {
        panic!("{planted:?} went unnoticed in {seeds} seeds of {mode}");
    };
    eprintln!("{planted:?}, {mode}: seed {seed}: {violation}");
    assert!(
        rules.contains(&violation.rule),
        "{planted:?} was caught at seed {seed} by another rule: {violation}"
    );
}

#[test]
fn no_harvest_after_the_pause() {
    let planted = Planted::Source(SourceFault::NoHarvestAfterPause);
    check(Mode::PreCopy, planted, 200, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn clear_after_copy() {
    let planted = Planted::Source(SourceFault::ClearAfterCopy);
    check(Mode::PreCopy, planted, 500, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn memory_called_lost() {
    let planted = Planted::World(WorldFault::MemoryCalledLost);
    check(Mode::PostCopy, planted, 500, &[Rule::TruthfulOutcome]);
}

#[test]
fn resume_after_commit() {
    let planted = Planted::Source(SourceFault::ResumeAfterCommit);
    check(
        Mode::StopAndCopy,
        planted,
        10_000,
        &[Rule::OneRuns, Rule::NothingStale],
    );
}

#[test]
fn commit_before_record() {
    let planted = Planted::Source(SourceFault::CommitBeforeRecord);
    check(
        Mode::StopAndCopy,
        planted,
        20_000,
        &[Rule::OneRuns, Rule::NothingStale],
    );
}

#[test]
fn barrier_left_out() {
    let planted = Planted::Target(TargetFault::BarrierLeftOut);
    check(Mode::StopAndCopy, planted, 2000, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn barriers_of_streams_in_use() {
    let planted = Planted::Source(SourceFault::BarriersOfStreamsInUse);
    check(
        Mode::StopAndCopy,
        planted,
        20_000,
        &[Rule::EqualAtTheSwitch],
    );
}

#[test]
fn commit_repeated() {
    let planted = Planted::Target(TargetFault::CommitRepeated);
    check(Mode::StopAndCopy, planted, 100, &[Rule::CommittedOnce]);
}

#[test]
fn late_frame_after_abort() {
    let planted = Planted::Target(TargetFault::LateFrameAfterAbort);
    check(Mode::StopAndCopy, planted, 20_000, &[Rule::CommittedOnce]);
}

#[test]
fn dirty_bit_dropped() {
    let planted = Planted::World(WorldFault::DirtyBitDropped);
    check(Mode::PreCopy, planted, 300, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn phase_ignored() {
    let planted = Planted::World(WorldFault::PhaseIgnored);
    check(
        Mode::StopAndCopy,
        planted,
        10_000,
        &[Rule::OneRuns, Rule::NothingStale],
    );
}

#[test]
fn throttle_kept() {
    let planted = Planted::World(WorldFault::ThrottleKept);
    check(Mode::PreCopy, planted, 10_000, &[Rule::NeverLeftThrottled]);
}

#[test]
fn deferred_forgotten() {
    let planted = Planted::World(WorldFault::DeferredForgotten);
    check(Mode::PreCopy, planted, 2000, &[Rule::EqualAtTheSwitch]);
    let stale = [Rule::EqualAtTheSwitch, Rule::NothingStale];
    check(Mode::Auto, planted, 20_000, &stale);
}

#[test]
fn deferred_cleared() {
    let planted = Planted::World(WorldFault::DeferredCleared);
    check(Mode::PreCopy, planted, 2000, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn runs_without_proof() {
    let planted = Planted::World(WorldFault::RunsWithoutProof);
    check(
        Mode::StopAndCopy,
        planted,
        10_000,
        &[Rule::StandsForAReason],
    );
}

#[test]
fn barred_without_proof() {
    let planted = Planted::World(WorldFault::BarredWithoutProof);
    check(
        Mode::StopAndCopy,
        planted,
        10_000,
        &[Rule::OneRuns, Rule::NothingStale],
    );
}

#[test]
fn zero_page_not_overwritten() {
    let planted = Planted::World(WorldFault::ZeroNotOverwritten);
    check(Mode::PreCopy, planted, 1000, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn load_accepted_late() {
    let planted = Planted::World(WorldFault::LoadAcceptedLate);
    check(Mode::StopAndCopy, planted, 200, &[Rule::NothingStale]);
}

#[test]
fn holes_before_clear() {
    let planted = Planted::World(WorldFault::HolesBeforeClear);
    check(Mode::PreCopy, planted, 1000, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn answer_before_attach() {
    let planted = Planted::World(WorldFault::AnswerBeforeAttach);
    check(
        Mode::StopAndCopy,
        planted,
        30_000,
        &[Rule::OneRuns, Rule::NothingStale],
    );
}

#[test]
fn ledger_left_out() {
    let planted = Planted::World(WorldFault::LedgerLeftOut);
    check(
        Mode::StopAndCopy,
        planted,
        30_000,
        &[Rule::OneRuns, Rule::NothingStale],
    );
}

#[test]
fn resume_while_serving() {
    let planted = Planted::Source(SourceFault::ResumeAfterCommit);
    let rules = [Rule::OneRuns, Rule::NothingStale];
    check(Mode::PostCopy, planted, 1000, &rules);
}

#[test]
fn stale_pages_not_told() {
    let planted = Planted::Source(SourceFault::StaleNotTold);
    check(Mode::Hybrid, planted, 200, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn stale_pages_left_in_place() {
    let planted = Planted::World(WorldFault::StaleIgnored);
    check(Mode::Hybrid, planted, 200, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn state_loaded_before_faults_are_served() {
    let planted = Planted::Target(TargetFault::LoadBeforeServing);
    check(Mode::PostCopy, planted, 200, &[Rule::EqualAtTheSwitch]);
}

#[test]
fn pulled_page_of_an_earlier_round() {
    let planted = Planted::World(WorldFault::PulledPageOld);
    let rules = [Rule::NothingStale, Rule::EqualAtTheSwitch];
    check(Mode::Hybrid, planted, 500, &rules);
}

#[test]
fn page_installed_over_a_write() {
    let planted = Planted::World(WorldFault::InstalledTwice);
    let rules = [Rule::NothingStale, Rule::EqualAtTheSwitch];
    check(Mode::PostCopy, planted, 1000, &rules);
}

#[test]
fn half_a_page() {
    let planted = Planted::World(WorldFault::HalfPageVisible);
    check(Mode::PostCopy, planted, 500, &[Rule::NothingStale]);
}

#[test]
fn last_descriptor_of_page_faults_closed() {
    let planted = Planted::World(WorldFault::LastFaultDescriptorClosed);
    let rules = [Rule::NothingStale, Rule::EqualAtTheSwitch];
    check(Mode::Demand, planted, 1000, &rules);
}

#[test]
fn guest_runs_without_a_record() {
    let planted = Planted::World(WorldFault::RunWithoutRecord);
    // Without the record its process ends with the daemon, and the source may be told to resume.
    let rules = [Rule::StandsForAReason, Rule::OneRuns, Rule::NothingStale];
    check(Mode::PostCopy, planted, 1000, &rules);
}
