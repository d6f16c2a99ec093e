//! Processes killed at every action before the commit and at those behind it: the guest runs on
//! exactly one host, nothing else is left, and the next migration works.

use limosa_e2e::cases::run_all;
use limosa_e2e::pair::{
    assert_back_home, assert_failed, assert_gone, assert_is_at, begin, end, move_whole, until_stage,
};
use limosa_e2e::points::{Place, places_before_commit};
use limosa_e2e::{Daemon, Hold, Pair, VM, guest, has_kvm, process, wait};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::VmState;
use std::fmt;

/// Whom to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    TargetDaemon,
    TargetVm,
    SourceDaemon,
    SourceVm,
    BothDaemons,
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TargetDaemon => "target daemon",
            Self::TargetVm => "target VM",
            Self::SourceDaemon => "source daemon",
            Self::SourceVm => "source VM",
            Self::BothDaemons => "both daemons",
        })
    }
}

/// A kill before the commit.
struct Before {
    place: Place,
    victim: Victim,
}

impl fmt::Display for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} killed", self.place, self.victim)
    }
}

fn run_before(victim: Victim, run: fn(&Place)) {
    if !has_kvm() {
        return;
    }
    let places = places_before_commit().into_iter();
    let places = places.filter(|place| victim != Victim::TargetVm || place.point.has_target_vm);
    let cases: Vec<Before> = places.map(|place| Before { place, victim }).collect();
    run_all(&cases, |case| run(&case.place));
}

#[test]
fn target_daemon_killed_before_the_commit() {
    run_before(Victim::TargetDaemon, |place| {
        let (mut pair, hold, id) = held_at(place.point.name, place.mode);
        pair.b.kill();
        hold.release();
        if place.point.name == "source.record-committed" {
            // The record is written before the loss is heard of: only a target can say then that
            // it never took the guest over.
            pair.b.restart();
        }
        assert_failed(&end(&pair.a, &id));
        // It runs on while there is no other daemon, and the VM process over there ends by itself.
        guest::assert_works(&pair.a, VM);
        wait::until_true("the target's VM process ends", || {
            pair.b.vm_processes().is_empty()
        });
        if place.point.name != "source.record-committed" {
            pair.b.restart();
        }
        assert_back_home(&pair, place.mode);
    });
}

#[test]
fn target_vm_killed_before_the_commit() {
    run_before(Victim::TargetVm, |place| {
        let (pair, hold, id) = held_at(place.point.name, place.mode);
        kill_vm(&pair.b);
        hold.release();
        assert_failed(&end(&pair.a, &id));
        assert_back_home(&pair, place.mode);
    });
}

#[test]
fn source_daemon_killed_before_the_commit() {
    run_before(Victim::SourceDaemon, |place| {
        let (mut pair, hold, _) = held_at(place.point.name, place.mode);
        pair.a.kill();
        hold.release();
        // The VM process puts its guest back by itself, with no daemon there to tell it.
        let turns = pair.beats.assert_one_at_a_time();
        assert_eq!(turns.len(), 1, "{turns:#?}");
        assert_gone(VM, &pair.b);
        pair.a.restart();
        let migrations = pair.a.client().migrations().expect("a daemon that answers");
        assert!(migrations.is_empty(), "{migrations:?}");
        assert_back_home(&pair, place.mode);
    });
}

#[test]
fn source_vm_killed_before_the_commit() {
    run_before(Victim::SourceVm, |place| {
        let (pair, hold, id) = held_at(place.point.name, place.mode);
        kill_vm(&pair.a);
        hold.release();
        let report = end(&pair.a, &id);
        assert_eq!(report.outcome.as_deref(), Some("guest-lost"), "{report:?}");
        let reason = report.reason.expect("a loss has a reason");
        assert!(!reason.is_empty() && !reason.contains('\n'), "{reason:?}");
        assert_gone(VM, &pair.b);
        // The operator sees what became of it, and can have the name again.
        let vm = pair.a.client().vm(VM).expect("it is listed");
        assert_eq!((vm.state, vm.pid), (VmState::Ended, 0), "{vm:?}");
        assert!(vm.ended.is_some_and(|how| !how.is_empty()));
        pair.a
            .client()
            .stop(VM, false)
            .expect("an ended VM can be removed");
        pair.beats.clear();
        pair.boot_small();
        move_whole(VM, &pair.a, &pair.b, place.mode);
    });
}

/// Two daemons, the guest at `a`, and its migration to `b` held at a point.
fn held_at(point: &str, mode: Mode) -> (Pair, Hold, String) {
    let hold = Hold::new(point);
    let pair = Pair::start_held(&hold);
    pair.boot_small();
    let id = begin(&pair.a, &pair.b, mode);
    hold.wait_until_held();
    (pair, hold, id)
}

#[track_caller]
fn kill_vm(daemon: &Daemon) {
    let vm = daemon.client().vm(VM).expect("it is listed");
    assert_ne!(vm.pid, 0, "{vm:?}");
    process::kill(vm.pid);
}

/// On which host the guest is to be found at last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Winner {
    Source,
    Target,
    /// The same, and the source had not the time to say that it holds nothing any more.
    TargetUnconfirmed,
    /// Its one VM process was killed.
    Nobody,
}

/// A kill once the commit was recorded.
struct After {
    point: &'static str,
    mode: Mode,
    victim: Victim,
    winner: Winner,
}

impl fmt::Display for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}, {} killed", self.point, self.mode, self.victim)
    }
}

/// Who has the guest is decided by the first instruction at the target, and known to all in time.
const AFTER: [(&str, Victim, Winner); 20] = [
    // The commit frame has not left: the target cannot have started it.
    ("source.commit", Victim::TargetDaemon, Winner::Source),
    ("source.commit", Victim::SourceDaemon, Winner::Source),
    ("source.commit", Victim::BothDaemons, Winner::Source),
    ("source.commit", Victim::TargetVm, Winner::Source),
    ("source.commit", Victim::SourceVm, Winner::Target),
    // The commit has come and the target's VM process has not recorded it.
    (
        "target.commit-and-run",
        Victim::TargetDaemon,
        Winner::Source,
    ),
    (
        "target.commit-and-run",
        Victim::SourceDaemon,
        Winner::Target,
    ),
    ("target.commit-and-run", Victim::BothDaemons, Winner::Source),
    ("target.commit-and-run", Victim::TargetVm, Winner::Source),
    ("target.commit-and-run", Victim::SourceVm, Winner::Target),
    // It runs, and the source does not know.
    ("target.runs", Victim::TargetDaemon, Winner::Target),
    ("target.runs", Victim::SourceDaemon, Winner::Target),
    ("target.runs", Victim::BothDaemons, Winner::Target),
    ("target.runs", Victim::TargetVm, Winner::Nobody),
    ("target.runs", Victim::SourceVm, Winner::Target),
    // It runs, and the source knows and still holds the old one.
    (
        "source.release",
        Victim::TargetDaemon,
        Winner::TargetUnconfirmed,
    ),
    ("source.release", Victim::SourceDaemon, Winner::Target),
    ("source.release", Victim::BothDaemons, Winner::Target),
    ("source.release", Victim::TargetVm, Winner::Nobody),
    ("source.release", Victim::SourceVm, Winner::Target),
];

#[test]
fn killed_after_the_commit_was_recorded() {
    if !has_kvm() {
        return;
    }
    let cases: Vec<After> = AFTER
        .into_iter()
        .flat_map(|(point, victim, winner)| {
            Mode::ALL.map(|mode| After {
                point,
                mode,
                victim,
                winner,
            })
        })
        .collect();
    run_all(&cases, run_after);
}

fn run_after(case: &After) {
    let (mut pair, hold, id) = held_at(case.point, case.mode);
    match case.victim {
        Victim::TargetDaemon => {
            pair.b.kill();
            hold.release();
            if case.point != "source.release" {
                assert_in_doubt(&pair.a, &id);
            }
            pair.b.restart();
        }
        Victim::SourceDaemon => {
            pair.a.kill();
            // It asks while the target has not decided yet, where that is held.
            pair.a.restart();
            hold.release();
        }
        Victim::BothDaemons => {
            pair.a.kill();
            pair.b.kill();
            pair.a.restart();
            assert_in_doubt(&pair.a, &id);
            pair.b.restart();
        }
        Victim::TargetVm => {
            kill_vm(&pair.b);
            hold.release();
        }
        Victim::SourceVm => {
            kill_vm(&pair.a);
            hold.release();
        }
    }
    let report = end(&pair.a, &id);
    match case.winner {
        Winner::Source => {
            assert_failed(&report);
            assert_back_home(&pair, case.mode);
        }
        Winner::Target => {
            assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
            assert_is_at(VM, &pair.b, &pair.a);
            assert_has_moved(&pair, case.mode);
        }
        Winner::TargetUnconfirmed => {
            assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
            let vm = pair.b.client().vm(VM).expect("it is listed");
            assert_eq!(vm.state, VmState::Running, "{vm:?}");
            assert!(vm.phase.starts_with("arrived"), "{vm:?}");
            assert_has_moved(&pair, case.mode);
        }
        Winner::Nobody => {
            assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
            assert_is_dead_at_target(&pair);
        }
    }
}

/// The source says that it does not know who has the guest, and lets nobody decide it by hand.
#[track_caller]
fn assert_in_doubt(source: &Daemon, id: &str) {
    let info = until_stage(source, id, &[Stage::Unresolved]);
    let said = wait::until("it says why", || {
        source.client().migration(id).ok()?.unresolved
    });
    assert!(!said.is_empty() && !said.contains('\n'), "{said:?}");
    assert_eq!(info.report.outcome, None, "{info:?}");
    assert_eq!(
        source.client().vm(VM).expect("it is listed").state,
        VmState::Unresolved
    );
    source.client().abort(id).expect_err("the target decides");
}

/// The guest runs at `b` and nowhere else, and the way back works.
#[track_caller]
fn assert_has_moved(pair: &Pair, mode: Mode) {
    assert_gone(VM, &pair.a);
    guest::assert_works(&pair.b, VM);
    guest::assert_whole(&pair.b, VM);
    let turns = pair.beats.assert_one_at_a_time();
    assert_eq!(turns.len(), 2, "{turns:#?}");
    move_whole(VM, &pair.b, &pair.a, mode);
    pair.beats.assert_one_at_a_time();
}

/// The guest died after it had moved: the target says so, and the source never brings it back.
#[track_caller]
fn assert_is_dead_at_target(pair: &Pair) {
    assert_gone(VM, &pair.a);
    let ended = wait::until("the target lists it as ended", || {
        let vm = pair.b.client().vm(VM).expect("it is listed");
        (vm.state == VmState::Ended).then_some(vm.ended)
    });
    assert!(ended.is_some_and(|how| !how.is_empty()));
    let turns = pair.beats.turns();
    assert!(turns.len() <= 2, "{turns:#?}");
}
