//! Links that are cut, or pass nothing for a while, at every point of a migration.
//!
//! ```text
//!  cut                    both sides hear of it; before the commit it fails, after it the source asks
//!  silent, and on again   shorter than anybody's patience: it goes on as if nothing had been
//!  silent for too long    both sides give the other up; what was on its way arrives then
//! ```
//!
//! Tested each time is what does not repeat (see `points` and `kills_after`), and silence, which takes
//! its time, where migrations wait for different things: for a page, for a state, for an answer.
//! `LIMOSA_E2E_MATRIX=all` tests every point in every mode.

use limosa_e2e::cases::{run_all, run_all_waiting};
use limosa_e2e::pair::{assert_back_home, assert_failed, assert_is_at, until_stage};
use limosa_e2e::points::{Manner, TOO_LATE, is_complete, places_before_commit};
use limosa_e2e::strike::{Held, SERVING};
use limosa_e2e::{VM, guest, has_kvm};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use std::fmt;
use std::thread;
use std::time::Duration;

/// Far shorter than the ten seconds after which a peer counts as lost.
const SHORT: Duration = Duration::from_secs(3);
/// Longer than these, and than the next look at them.
const LONG: Duration = Duration::from_secs(13);

/// Points behind the commit's record, where the guest has not run at the target yet.
const UNDECIDED: &str = "source.commit";
/// Points from which on the guest runs at the target, or will.
const DECIDED: [&str; 6] = [
    "target.commit-and-run",
    "target.runs",
    "source.push",
    SERVING,
    "target.disarm",
    "target.complete",
];
/// Points at which the target knows nothing worse than an unconfirmed guest.
const NEARLY_OVER: [&str; 2] = ["source.hash", "source.release"];

struct Case {
    point: &'static str,
    manner: Manner,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.point, self.manner)
    }
}

fn before() -> Vec<Case> {
    let places = places_before_commit().into_iter();
    let case = |place: limosa_e2e::points::Place| Case {
        point: place.point.name,
        manner: place.manner,
    };
    places.map(case).collect()
}

fn after(points: &[&'static str]) -> Vec<Case> {
    let mut cases = Vec::new();
    for manner in Manner::ALL {
        for &point in points {
            let is_demand = manner == Manner::Of(Mode::Demand);
            let comes = match point {
                SERVING => is_demand,
                "source.push" => manner.switches() && !is_demand,
                "target.disarm" | "target.complete" => manner.switches(),
                _ => true,
            };
            let is_everyday = match manner {
                Manner::Of(Mode::StopAndCopy | Mode::Auto) => false,
                Manner::AutoThatSwitches => point == "source.push",
                Manner::Of(Mode::Demand) => point == SERVING,
                Manner::Of(_) => true,
            };
            if comes && (is_complete() || is_everyday) {
                cases.push(Case { point, manner });
            }
        }
    }
    cases
}

#[test]
fn a_link_that_is_cut_before_the_commit_ends_the_migration() {
    if !has_kvm() {
        return;
    }
    run_all(&before(), |case| {
        let held = Held::at_over_link(case.point, case.manner);
        held.link().cut();
        held.release();
        if case.point == TOO_LATE {
            // The record is written before the loss is heard of: the target has to be asked.
            held.link().mend();
        }
        assert_failed(&held.end());
        held.link().mend();
        assert_back_home(&held.pair, case.manner);
    });
}

#[test]
fn a_link_that_is_cut_after_the_commit_delays_its_end() {
    if !has_kvm() {
        return;
    }
    let points = [&[UNDECIDED][..], &DECIDED, &NEARLY_OVER].concat();
    run_all(&after(&points), |case| {
        let held = Held::at_over_link(case.point, case.manner);
        held.link().cut();
        held.release();
        if !NEARLY_OVER.contains(&case.point) {
            held.assert_in_doubt();
        }
        held.link().mend();
        let report = held.end();
        if case.point == UNDECIDED {
            assert_failed(&report);
            return assert_back_home(&held.pair, case.manner);
        }
        assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
        if NEARLY_OVER.contains(&case.point) {
            held.assert_has_arrived();
        } else {
            assert_is_at(VM, &held.pair.b, &held.pair.a);
        }
        held.assert_has_moved();
    });
}

#[test]
fn a_guest_on_demand_outlives_any_number_of_cuts() {
    if !has_kvm() {
        return;
    }
    let _place = limosa_e2e::cases::Places::one();
    let held = Held::at_over_link(SERVING, Manner::Of(Mode::Demand));
    for _ in 0..5 {
        held.link().cut();
        held.assert_in_doubt();
        held.link().mend();
        until_stage(&held.pair.a, &held.id, &[Stage::Serving]);
        guest::assert_works(&held.pair.b, VM);
    }
    let report = held.end();
    assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
    assert_is_at(VM, &held.pair.b, &held.pair.a);
    held.assert_has_moved();
}

#[test]
fn a_link_that_passes_nothing_for_a_while_delays_everything_by_that() {
    if !has_kvm() {
        return;
    }
    let points = [&[UNDECIDED][..], &DECIDED, &NEARLY_OVER].concat();
    let mut cases = before();
    cases.extend(after(&points));
    if !is_complete() {
        cases.retain(|case| WAITS.contains(&case.to_string().as_str()));
    }
    run_all_waiting(&cases, |case| {
        let held = Held::at_over_link(case.point, case.manner);
        held.link().stand();
        held.release();
        thread::sleep(SHORT);
        held.link().mend();
        if case.point == SERVING {
            guest::assert_works(&held.pair.b, VM);
        }
        let report = held.end();
        assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
        assert_eq!(report.digest_equal, Some(true), "{report:?}");
        if NEARLY_OVER.contains(&case.point) {
            // A source that is done does not wait until its last word has been heard.
            guest::assert_works(&held.pair.b, VM);
        } else {
            assert_is_at(VM, &held.pair.b, &held.pair.a);
        }
        held.assert_has_moved();
    });
}

/// Where a migration waits for something, each time for something else.
const WAITS: [&str; 11] = [
    "source.start pre-copy",
    "source.rehearsal pre-copy",
    "source.send-piece pre-copy",
    "source.send-stale hybrid",
    "source.state post-copy",
    "target.prepared stop-and-copy",
    "source.commit post-copy",
    "target.runs hybrid",
    "source.push post-copy",
    "serving demand",
    "target.complete post-copy",
];

#[test]
fn a_link_that_is_silent_for_too_long_counts_as_cut() {
    if !has_kvm() {
        return;
    }
    let mut cases = before();
    cases.extend(after(&[UNDECIDED]));
    cases.extend(after(&DECIDED));
    if !is_complete() {
        cases.retain(|case| WAITS.contains(&case.to_string().as_str()));
    }
    run_all_waiting(&cases, |case| {
        let held = Held::at_over_link(case.point, case.manner);
        held.link().stand();
        held.release();
        thread::sleep(LONG);
        held.link().mend();
        let report = held.end();
        if DECIDED.contains(&case.point) {
            assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
        }
        match report.outcome.as_deref() {
            // What was on its way when both had given up decides nothing, whenever it comes.
            Some("failed") => assert_back_home(&held.pair, case.manner),
            Some("completed") => {
                assert_is_at(VM, &held.pair.b, &held.pair.a);
                held.assert_has_moved();
            }
            _ => panic!("{report:?}"),
        }
    });
}
