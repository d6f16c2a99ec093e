//! Processes killed at every action before the commit: the guest runs on at the source unless it was
//! itself what was killed, nothing else is left, and the next migration works.
//!
//! Tested each time is what does not repeat (see `points`); `LIMOSA_E2E_MATRIX=all` tests every point
//! in every mode, eight hundred cases, which takes a quarter of an hour on two cores.

use limosa_e2e::cases::run_all;
use limosa_e2e::pair::{assert_back_home, assert_failed, assert_gone};
use limosa_e2e::points::{Place, TOO_LATE, places_before_commit};
use limosa_e2e::strike::{Held, Victim, assert_lost, kill_host, kill_vm, remove_ended};
use limosa_e2e::{VM, guest, has_kvm, wait};
use std::fmt;

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

fn run_before(victim: Victim, run: fn(&Place, Held)) {
    if !has_kvm() {
        return;
    }
    let places = places_before_commit().into_iter();
    let places = places.filter(|place| victim != Victim::TargetVm || place.point.has_target_vm);
    let cases: Vec<Before> = places.map(|place| Before { place, victim }).collect();
    run_all(&cases, |case| {
        run(
            &case.place,
            Held::at(case.place.point.name, case.place.manner),
        );
    });
}

#[test]
fn target_daemon_killed_before_the_commit() {
    run_before(Victim::TargetDaemon, |place, mut held| {
        held.pair.b.kill();
        held.release();
        if place.point.name == TOO_LATE {
            // The record is written before the loss is heard of: only a target can say then that
            // it never took the guest over.
            held.pair.b.restart();
        }
        assert_failed(&held.end());
        // It runs on while there is no other daemon, and the VM process over there ends by itself.
        guest::assert_works(&held.pair.a, VM);
        wait::until_true("the target's VM process ends", || {
            held.pair.b.vm_processes().is_empty()
        });
        if place.point.name != TOO_LATE {
            held.pair.b.restart();
        }
        assert_back_home(&held.pair, place.manner);
    });
}

#[test]
fn target_vm_killed_before_the_commit() {
    run_before(Victim::TargetVm, |place, held| {
        kill_vm(&held.pair.b);
        held.release();
        assert_failed(&held.end());
        assert_back_home(&held.pair, place.manner);
    });
}

#[test]
fn source_daemon_killed_before_the_commit() {
    run_before(Victim::SourceDaemon, |place, mut held| {
        held.pair.a.kill();
        held.release();
        // The VM process puts its guest back by itself, with no daemon there to tell it.
        let turns = held.pair.beats.assert_one_at_a_time();
        assert_eq!(turns.len(), 1, "{turns:#?}");
        assert_gone(VM, &held.pair.b);
        held.pair.a.restart();
        assert_knows_no_migration(&held);
        assert_back_home(&held.pair, place.manner);
    });
}

#[test]
fn both_daemons_killed_before_the_commit() {
    run_before(Victim::BothDaemons, |place, mut held| {
        held.pair.a.kill();
        held.pair.b.kill();
        let turns = held.pair.beats.assert_one_at_a_time();
        assert_eq!(turns.len(), 1, "{turns:#?}");
        held.pair.b.restart();
        held.pair.a.restart();
        assert_knows_no_migration(&held);
        assert_back_home(&held.pair, place.manner);
    });
}

fn assert_knows_no_migration(held: &Held) {
    let migrations = held.pair.a.client().migrations();
    let migrations = migrations.expect("a daemon that answers");
    assert!(migrations.is_empty(), "{migrations:?}");
}

#[test]
fn source_vm_killed_before_the_commit() {
    run_before(Victim::SourceVm, |_, held| {
        kill_vm(&held.pair.a);
        held.release();
        assert_lost(&held.end());
        assert_gone(VM, &held.pair.b);
        // The operator sees what became of it, and can have the name again.
        remove_ended(&held.pair.a);
        held.assert_can_begin_anew();
    });
}

#[test]
fn source_host_killed_before_the_commit() {
    run_before(Victim::SourceHost, |_, mut held| {
        kill_host(&mut held.pair.a);
        held.release();
        assert_gone(VM, &held.pair.b);
        held.pair.a.restart();
        assert_knows_no_migration(&held);
        held.until_told("where it never ran");
        held.assert_can_begin_anew();
    });
}
