//! A move without faults, as `demo` shows it on a machine without KVM.

use core::time::Duration;
use limosa_engine::deferral::Deferral;
use limosa_engine::policy::{Limits, Mode, PauseReason};
use limosa_engine::report::Outcome;
use limosa_engine::throttle::{Throttle, Throttling};
use limosa_pages::{BytesPerSecond, PageCount};
use limosa_sim::{LinkProfile, Scenario, SimulatedMove, Workload, run};

fn completed(scenario: &Scenario) -> SimulatedMove {
    let moved = run(scenario);
    assert_eq!(moved.report.outcome, Some(Outcome::Completed));
    assert_eq!(moved.integrity_errors, 0);
    assert_eq!(moved.report.digest_equal, Some(true));
    moved
}

#[test]
fn the_reported_downtime_is_the_guests_gap() {
    for mode in Mode::ALL {
        let moved = completed(&Scenario {
            mode,
            ..Scenario::default()
        });
        let downtime = moved.report.downtime.unwrap().total();
        assert!(downtime.abs_diff(moved.guest_gap) <= Duration::from_nanos(2));
        assert!(moved.worst_stall >= moved.guest_gap);
    }
}

#[test]
fn pre_copy_stops_the_guest_for_milliseconds_and_stop_and_copy_for_the_whole_copy() {
    let live = completed(&Scenario::default());
    let cold = completed(&Scenario {
        mode: Mode::StopAndCopy,
        ..Scenario::default()
    });
    assert!(live.guest_gap < Duration::from_millis(15), "{live:?}");
    assert!(cold.guest_gap > Duration::from_millis(250), "{cold:?}");
    assert!(live.report.pages_sent() > cold.report.pages_sent());
    let former = live.writes_before;
    assert!((19_000.0..21_000.0).contains(&former), "{former}");
    assert!(live.writes_during > former * 0.9 && live.writes_after > former * 0.9);
    assert!(cold.writes_during < former * 0.2);
}

#[test]
fn holes_are_neither_read_nor_sent() {
    let memory = PageCount::new(1 << 18);
    let touched = PageCount::new(1 << 12);
    let moved = completed(&Scenario {
        memory,
        touched,
        workload: Workload::Idle,
        rate: 100,
        ..Scenario::default()
    });
    assert!(moved.report.pages_sent().get() < touched.get() + 100);
}

#[test]
fn a_writer_faster_than_the_link_ends_by_the_rules_of_pre_copy() {
    let moved = completed(&Scenario {
        rate: 60_000,
        link: LinkProfile {
            rate: BytesPerSecond::new(100_000_000),
            delay: Duration::from_micros(100),
            jitter: Duration::ZERO,
        },
        ..Scenario::default()
    });
    assert_eq!(moved.report.pause_reason, Some(PauseReason::NoProgress));
    let predicted = moved.report.predicted_downtime.unwrap();
    let ratio = moved.guest_gap.as_secs_f64() / predicted.as_secs_f64();
    assert!((0.8..1.25).contains(&ratio), "{ratio}");
}

/// The writer of the test above, with its writers slowed down.
fn slowed(mode: Mode, counts_vcpus: bool) -> SimulatedMove {
    let scenario = Scenario {
        mode,
        rate: 60_000,
        counts_vcpus,
        link: LinkProfile {
            rate: BytesPerSecond::new(100_000_000),
            delay: Duration::from_micros(100),
            jitter: Duration::ZERO,
        },
        limits: Limits {
            throttle: Throttling::Auto,
            ..Limits::default()
        },
        ..Scenario::default()
    };
    completed(&scenario)
}

#[test]
fn a_writer_faster_than_the_link_converges_when_it_is_slowed() {
    for counts_vcpus in [false, true] {
        let moved = slowed(Mode::PreCopy, counts_vcpus);
        let report = &moved.report;
        assert_eq!(report.pause_reason, Some(PauseReason::WithinBudget));
        let throttle = report.throttle.unwrap();
        let is_per_vcpu = matches!(throttle.last, Throttle::PerVcpu { .. });
        assert_eq!(is_per_vcpu, counts_vcpus);
        assert!(throttle.time > Duration::ZERO && throttle.time < report.total);
        assert!(throttle.held > Duration::ZERO && throttle.held < throttle.time);
        assert!(moved.guest_gap < Duration::from_millis(15), "{moved:?}");
        assert!(moved.writes_during < moved.writes_before * 0.95);
        // The guest was let go with the switch.
        assert!(moved.writes_after > moved.writes_before * 0.95);
    }
}

#[test]
fn auto_slows_the_writers_before_it_lets_them_miss_pages_if_it_may() {
    let moved = slowed(Mode::Auto, false);
    let report = &moved.report;
    assert_eq!(report.pause_reason, Some(PauseReason::WithinBudget));
    assert!(report.mode_changes.is_empty() && report.throttle.is_some());
    let hybrid = slowed(Mode::Hybrid, true).report;
    assert!(hybrid.faults.is_some(), "{hybrid:?}");
}

#[test]
fn a_deadline_and_a_limit_of_bandwidth_are_kept() {
    let limits = Limits {
        deadline: Some(Duration::from_secs(2)),
        bandwidth_max: Some(BytesPerSecond::new(200_000_000)),
        ..Limits::default()
    };
    let moved = completed(&Scenario {
        limits,
        rate: 40_000,
        ..Scenario::default()
    });
    // 268 MB at 200 MB/s are 1.34 s; what another round would take is beyond the deadline.
    assert_eq!(moved.report.pause_reason, Some(PauseReason::Deadline));
    assert!(
        moved.report.total < Duration::from_millis(2300),
        "{moved:?}"
    );
}

#[test]
fn one_scenario_has_one_result() {
    let scenario = Scenario {
        workload: Workload::Phases {
            working_set: PageCount::new(4096),
        },
        ..Scenario::default()
    };
    assert_eq!(run(&scenario), run(&scenario));
}

#[test]
fn a_guest_that_runs_before_its_pages_are_there_tells_how_they_came() {
    for mode in [Mode::Demand, Mode::PostCopy, Mode::Hybrid] {
        let moved = completed(&Scenario {
            mode,
            rate: 60_000,
            ..Scenario::default()
        });
        assert!(moved.guest_gap < Duration::from_millis(10), "{mode}");
        let report = &moved.report;
        let faults = report.faults.as_ref().unwrap();
        assert_eq!(
            faults.pulled.saturating_add(faults.pushed),
            report.missing_at_switch,
            "{mode}"
        );
        assert!(faults.pulled > PageCount::ZERO, "{mode}");
        // There and back over the link is what a page takes at least.
        assert!(faults.latency_p50 >= Duration::from_micros(200), "{mode}");
        assert!(faults.latency_p99 >= faults.latency_p50, "{mode}");
        assert!(faults.first_stall > Duration::ZERO, "{mode}");
        assert!(moved.stalled_at_pages >= faults.first_stall, "{mode}");
        let is_drained = report
            .mode_changes
            .iter()
            .any(|change| change.to == Mode::PostCopy);
        assert_eq!(is_drained, mode == Mode::Demand);
    }
}

#[test]
fn auto_switches_where_pre_copy_would_give_up() {
    let moved = completed(&Scenario {
        mode: Mode::Auto,
        rate: 60_000,
        link: LinkProfile {
            rate: BytesPerSecond::new(100_000_000),
            delay: Duration::from_micros(100),
            jitter: Duration::ZERO,
        },
        ..Scenario::default()
    });
    assert_eq!(moved.report.pause_reason, Some(PauseReason::Predicted));
    assert!(moved.report.missing_at_switch > PageCount::ZERO);
    assert!(moved.guest_gap < Duration::from_millis(20), "{moved:?}");
}

/// A guest whose few hot pages are dirty after every round.
fn hot(defer: Deferral, seed: u64) -> SimulatedMove {
    completed(&Scenario {
        workload: Workload::Zipf {
            working_set: PageCount::new(1 << 14),
        },
        rate: 60_000,
        link: LinkProfile {
            rate: BytesPerSecond::new(400_000_000),
            delay: Duration::from_micros(100),
            jitter: Duration::ZERO,
        },
        limits: Limits {
            defer,
            downtime_max: Duration::from_millis(10),
            ..Limits::default()
        },
        seed,
        ..Scenario::default()
    })
}

#[test]
fn pages_that_are_dirty_after_every_round_are_sent_with_the_pause() {
    for seed in 0..8 {
        let (auto, off) = (hot(Deferral::Auto, seed), hot(Deferral::Off, seed));
        let deferred = |moved: &SimulatedMove| {
            let rounds = moved.report.rounds.iter();
            rounds.map(|round| round.deferred.get()).max().unwrap()
        };
        assert!(deferred(&auto) > 0 && deferred(&off) == 0, "{auto:?}");
        let budget = Duration::from_millis(10);
        for moved in [&auto, &off] {
            assert_eq!(moved.report.pause_reason, Some(PauseReason::WithinBudget));
            assert!(moved.report.predicted_downtime.unwrap() <= budget);
            assert!(moved.guest_gap < budget * 3 / 2, "{moved:?}");
        }
        let (few, many) = (auto.report.pages_sent(), off.report.pages_sent());
        assert!(
            few < many,
            "seed {seed}: {few} with deferral, {many} without"
        );
    }
}
