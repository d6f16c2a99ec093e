//! Aborts at every action before the commit: the guest stays where it is, nothing is left behind.

use limosa_e2e::cases::run_all;
use limosa_e2e::pair::{assert_back_home, assert_completed, assert_is_at, begin, end};
use limosa_e2e::points::{Place, places_before_commit};
use limosa_e2e::{Hold, Pair, VM, has_kvm};
use limosa_host::api::ErrorKind;

#[test]
fn aborted_at_every_point_the_guest_runs_on_at_the_source() {
    if has_kvm() {
        run_all(&places_before_commit(), abort_at);
    }
}

fn abort_at(place: &Place) {
    let hold = Hold::new(place.point.name);
    let pair = Pair::start_held(&hold);
    pair.boot_small();
    let id = begin(&pair.a, &pair.b, place.mode);
    hold.wait_until_held();
    let answer = pair.a.client().abort(&id);
    hold.release();
    let report = end(&pair.a, &id);

    if place.point.name == "source.record-committed" {
        // The decision to commit has been made and its record is on its way: the abort is refused,
        // and the migration goes on to its end.
        let error = answer.expect_err("too late to abort");
        assert_eq!(error.kind(), Some(ErrorKind::Conflict), "{error}");
        assert_completed(&report);
        assert_is_at(VM, &pair.b, &pair.a);
        pair.beats.assert_one_at_a_time();
        return;
    }
    answer.expect("an abort in time");
    assert_eq!(report.outcome.as_deref(), Some("aborted"), "{report:?}");
    assert_eq!(report.reason, None, "{report:?}");
    let again = pair.a.client().abort(&id).expect_err("it is over");
    assert_eq!(again.kind(), Some(ErrorKind::Conflict), "{again}");
    assert_back_home(&pair, place.mode);
}
