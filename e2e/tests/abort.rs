//! Aborts at every action before the commit: the guest stays where it is, nothing is left behind.
//!
//! Tested each time is what does not repeat (see `points`); `LIMOSA_E2E_MATRIX=all` tests every point
//! in every mode.

use limosa_e2e::cases::run_all;
use limosa_e2e::pair::{assert_back_home, assert_completed, assert_is_at};
use limosa_e2e::points::{Place, TOO_LATE, places_before_commit};
use limosa_e2e::strike::Held;
use limosa_e2e::{VM, has_kvm};
use limosa_host::api::ErrorKind;

#[test]
fn aborted_at_every_point_the_guest_runs_on_at_the_source() {
    if has_kvm() {
        run_all(&places_before_commit(), abort_at);
    }
}

fn abort_at(place: &Place) {
    let held = Held::at(place.point.name, place.manner);
    let client = held.pair.a.client();
    let answer = client.abort(&held.id);
    held.release();
    let report = held.end();

    if place.point.name == TOO_LATE {
        // The decision to commit has been made and its record is on its way: the abort is refused,
        // and the migration goes on to its end.
        let error = answer.expect_err("too late to abort");
        assert_eq!(error.kind(), Some(ErrorKind::Conflict), "{error}");
        assert_completed(&report);
        assert_is_at(VM, &held.pair.b, &held.pair.a);
        held.pair.beats.assert_one_at_a_time();
        return;
    }
    answer.expect("an abort in time");
    assert_eq!(report.outcome.as_deref(), Some("aborted"), "{report:?}");
    assert_eq!(report.reason, None, "{report:?}");
    let again = client.abort(&held.id).expect_err("it is over");
    assert_eq!(again.kind(), Some(ErrorKind::Conflict), "{again}");
    assert_back_home(&held.pair, place.manner);
}
