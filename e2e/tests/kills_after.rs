//! Processes killed once the commit was recorded: who has the guest is decided by its first
//! instruction at the target, and from then on pages that it misses are brought, whoever was killed.
//!
//! ```text
//!  commit ─▶ commit-and-run ─▶ runs ─▶ (push, serving) ─▶ disarm ─▶ complete ─▶ hash ─▶ release
//!  └──── the source has it ───┘└── the target has it; without all pages: it needs the source ──┘
//! ```
//!
//! Tested each time: pre-copy for all modes that bring every page before the switch, since they
//! differ in nothing after it; demand, post-copy and hybrid, and auto where it pushes.
//! `LIMOSA_E2E_MATRIX=all` tests all modes at all points.

use limosa_e2e::cases::run_all;
use limosa_e2e::pair::{assert_back_home, assert_failed, assert_is_at};
use limosa_e2e::points::{Manner, is_complete};
use limosa_e2e::strike::{
    COMING_BACK, Held, SERVING, Victim, assert_lost, kill_host, kill_vm, remove_ended,
};
use limosa_e2e::{VM, guest, has_kvm};
use limosa_engine::policy::Mode;
use limosa_host::api::{ErrorKind, ResolveWord, VmState};
use std::fmt;

/// Where the guest is to be found at last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Winner {
    /// At the source: it never ran at the target.
    Source,
    /// At the target.
    Target,
    /// The same, and the source had not the time to say that it holds nothing any more.
    Unconfirmed,
    /// It was killed where it was, with all its pages.
    Nobody,
    /// It was killed at the target before all its pages had come, or they were lost at the source.
    Lost,
}

/// A kill.
struct After {
    point: &'static str,
    manner: Manner,
    victim: Victim,
    winner: Winner,
}

impl fmt::Display for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}, {} killed", self.point, self.manner, self.victim)
    }
}

/// For each point who wins if a victim is killed there, in the order of [`Victim::ALL`]: target
/// daemon, target VM, source daemon, source VM, both daemons, source daemon and VM.
type Row = (&'static str, [Winner; 6]);

/// With all pages at the target. Of a source that is gone altogether the restarted daemon knows what
/// its predecessor had noted.
const WHOLE: [Row; 5] = {
    use Winner::{Nobody, Source, Target, Unconfirmed};
    [
        // The commit frame has not left: the target cannot have started it.
        (
            "source.commit",
            [Source, Source, Source, Target, Source, Nobody],
        ),
        // The commit has come and the target's VM process has not recorded it.
        (
            "target.commit-and-run",
            [Source, Source, Target, Target, Source, Target],
        ),
        // It runs, and the source does not know.
        (
            "target.runs",
            [Target, Nobody, Target, Target, Target, Target],
        ),
        // It runs, the source knows and still holds the old one.
        (
            "source.hash",
            [Unconfirmed, Nobody, Target, Target, Target, Target],
        ),
        (
            "source.release",
            [Unconfirmed, Nobody, Target, Target, Target, Target],
        ),
    ]
};

/// With pages missing at the target.
const MISSING: [Row; 9] = {
    use Winner::{Lost, Nobody, Source, Target, Unconfirmed};
    [
        (
            "source.commit",
            [Source, Source, Source, Target, Source, Nobody],
        ),
        (
            "target.commit-and-run",
            [Source, Source, Target, Target, Source, Lost],
        ),
        ("target.runs", [Target, Lost, Target, Target, Target, Lost]),
        // Pages go when they are asked for, and none besides.
        ("source.push", [Target, Lost, Target, Target, Target, Lost]),
        (SERVING, [Target, Lost, Target, Target, Target, Lost]),
        // The last page has come, and its VM process does not know.
        (
            "target.disarm",
            [Target, Lost, Target, Target, Target, Target],
        ),
        // The source does not know.
        (
            "target.complete",
            [Target, Nobody, Target, Target, Target, Target],
        ),
        (
            "source.hash",
            [Unconfirmed, Nobody, Target, Target, Target, Target],
        ),
        (
            "source.release",
            [Unconfirmed, Nobody, Target, Target, Target, Target],
        ),
    ]
};

/// Where a migration is held, and how the guest is moved.
struct Place((&'static str, Manner));

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.0, self.0.1)
    }
}

fn cases() -> Vec<After> {
    let mut cases = Vec::new();
    for manner in Manner::ALL {
        let rows: &[Row] = if manner.switches() { &MISSING } else { &WHOLE };
        for &(point, winners) in rows {
            let comes = match point {
                // On demand nothing is pushed; with pushes there is no time without them.
                "source.push" => manner != Manner::Of(Mode::Demand),
                SERVING => manner == Manner::Of(Mode::Demand),
                _ => true,
            };
            if !comes || !(is_complete() || is_everyday(point, manner)) {
                continue;
            }
            for (victim, winner) in Victim::ALL.into_iter().zip(winners) {
                cases.push(After {
                    point,
                    manner,
                    victim,
                    winner,
                });
            }
        }
    }
    cases
}

fn is_everyday(point: &str, manner: Manner) -> bool {
    match manner {
        Manner::Of(Mode::StopAndCopy | Mode::Auto) => false,
        // From the switch on it is hybrid.
        Manner::AutoThatSwitches => point == "source.push",
        // Until somebody asks for the drain it is served; after that it is post-copy.
        Manner::Of(Mode::Demand) => ["target.runs", SERVING].contains(&point),
        Manner::Of(_) => true,
    }
}

#[test]
fn killed_after_the_commit_was_recorded() {
    if has_kvm() {
        run_all(&cases(), |case| {
            run_after(Held::at(case.point, case.manner), case);
        });
    }
}

#[test]
fn killed_while_the_source_comes_back() {
    use Winner::{Lost, Target};
    if !has_kvm() {
        return;
    }
    let mut cases = Vec::new();
    for point in COMING_BACK {
        let winners = [Target, Lost, Target, Target, Target, Lost];
        for (victim, winner) in Victim::ALL.into_iter().zip(winners) {
            // Whatever comes back pushes: modes differ in nothing here.
            let manner = Manner::Of(Mode::Demand);
            cases.push(After {
                point,
                manner,
                victim,
                winner,
            });
        }
    }
    run_all(&cases, |case| {
        run_after(Held::at_over_link(case.point, case.manner), case);
    });
}

fn run_after(mut held: Held, case: &After) {
    strike(&mut held, case);
    let report = match case.victim {
        // Nobody knows of a migration any more.
        Victim::SourceHost => None,
        _ => Some(held.end()),
    };
    let is_complete = matches!(
        case.winner,
        Winner::Target | Winner::Unconfirmed | Winner::Nobody
    );
    if is_complete && let Some(report) = &report {
        assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
    }
    match (case.winner, &report) {
        (Winner::Source, Some(report)) => {
            assert_failed(report);
            assert_back_home(&held.pair, case.manner);
        }
        (Winner::Target, _) => {
            assert_is_at(VM, &held.pair.b, &held.pair.a);
            held.assert_has_moved();
        }
        (Winner::Unconfirmed, _) => {
            held.assert_has_arrived();
            held.assert_has_moved();
        }
        (Winner::Nobody, Some(_)) => held.assert_is_dead_at_target(),
        (Winner::Lost, report) => {
            report.iter().for_each(assert_lost);
            held.assert_is_lost();
        }
        // It never ran at the target, and its only process was killed.
        (Winner::Nobody, None) => {
            held.until_told("where it never ran");
            held.assert_can_begin_anew();
        }
        (Winner::Source, None) => unreachable!("its process was killed"),
    }
}

/// Kills, lets go on, and starts again what was killed and can be.
fn strike(held: &mut Held, case: &After) {
    // Where the source has to ask, it says so while there is nobody to be asked.
    let asks = case.winner != Winner::Unconfirmed;
    match case.victim {
        Victim::TargetDaemon => {
            held.pair.b.kill();
            held.release();
            if asks {
                held.assert_in_doubt();
            }
            held.pair.b.restart();
        }
        Victim::SourceDaemon => {
            held.pair.a.kill();
            // It asks while the target has not decided yet, where that is held.
            held.pair.a.restart();
            held.release();
        }
        Victim::BothDaemons => {
            held.pair.a.kill();
            held.pair.b.kill();
            held.pair.a.restart();
            held.assert_in_doubt();
            held.pair.b.restart();
        }
        Victim::TargetVm => {
            kill_vm(&held.pair.b);
            held.release();
        }
        Victim::SourceVm => {
            kill_vm(&held.pair.a);
            held.release();
            if case.point == SERVING {
                // Its memory outlives it.
                guest::assert_works(&held.pair.b, VM);
            }
        }
        Victim::SourceHost => {
            kill_host(&mut held.pair.a);
            held.release();
            held.pair.a.restart();
        }
    }
}

/// The target's daemon and VM process die in the instant after the guest's first instruction, which
/// the source has not heard of: it is told by what the VM process noted before.
#[test]
fn the_first_instruction_outlives_the_whole_target() {
    let manners = [Mode::StopAndCopy, Mode::PreCopy, Mode::PostCopy];
    if has_kvm() {
        run_all(&manners.map(Manner::Of), |manner| {
            let mut held = Held::at("target.runs", *manner);
            kill_host(&mut held.pair.b);
            held.assert_in_doubt();
            held.pair.b.restart();
            let report = held.end();
            let outcome = if manner.switches() {
                remove_ended(&held.pair.a);
                "guest-lost"
            } else {
                "completed"
            };
            assert_eq!(report.outcome.as_deref(), Some(outcome), "{report:?}");
            held.assert_can_begin_anew();
        });
    }
}

/// Nobody comes back who could say that the pages are lost: only an operator can.
#[test]
fn a_guest_without_its_source_stands_until_it_is_given_up() {
    let places = [
        (SERVING, Manner::Of(Mode::Demand)),
        ("source.push", Manner::Of(Mode::PostCopy)),
    ];
    if has_kvm() {
        run_all(&places.map(Place), |Place((point, manner))| {
            let mut held = Held::at(point, *manner);
            kill_host(&mut held.pair.a);
            held.release();
            held.assert_stands_until_given_up();
            // Should it come back after all, it hears what was decided.
            held.pair.a.restart();
            held.until_told("the guest is lost");
            held.assert_can_begin_anew();
        });
    }
}

#[test]
fn who_misses_pages_is_told_from_who_does_not() {
    if !has_kvm() {
        return;
    }
    let _place = limosa_e2e::cases::Places::one();
    let held = Held::at(SERVING, Manner::Of(Mode::Demand));
    let vm = held.pair.b.client().vm(VM).expect("it is listed");
    assert_eq!(vm.state, VmState::Running, "{vm:?}");
    assert!(vm.missing_pages > 0, "{vm:?}");
    assert!(vm.residual_dependency.is_some(), "{vm:?}");
    let report = held.end();
    assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
    assert_is_at(VM, &held.pair.b, &held.pair.a);
    let vm = held.pair.b.client().vm(VM).expect("it is listed");
    assert_eq!(vm.missing_pages, 0, "{vm:?}");
    assert_eq!(vm.residual_dependency, None, "{vm:?}");
    held.assert_has_moved();
}

#[test]
fn a_guest_whose_source_is_there_is_given_up_by_stopping_it() {
    if !has_kvm() {
        return;
    }
    let _place = limosa_e2e::cases::Places::one();
    let held = Held::at(SERVING, Manner::Of(Mode::Demand));
    let b = held.pair.b.client();
    let arriving = b.incoming().expect("it answers");
    assert!(arriving.iter().all(|one| one.is_connected), "{arriving:?}");
    let refused = b.resolve(&held.id, ResolveWord::Gone);
    let refused = refused.expect_err("its source has what is missing");
    assert_eq!(refused.kind(), Some(ErrorKind::Conflict), "{refused}");
    assert!(refused.to_string().contains("is connected"), "{refused}");
    b.stop(VM, false).expect("it is there");
    held.release();
    let report = held.end();
    assert_lost(&report);
    let reason = report.reason.expect("a loss has a reason");
    assert!(reason.contains("it was stopped at the target"), "{reason}");
    remove_ended(&held.pair.a);
    held.assert_can_begin_anew();
}
