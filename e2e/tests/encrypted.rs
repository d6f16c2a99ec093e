//! Daemons that show certificates to each other: moves by each mode, daemons that are killed and come
//! back, and hosts that do not believe each other.
//!
//! Which certificate is refused for what is tested with `carrier`; here it is that the reason comes to
//! whoever asked for the migration, and that nothing else happens.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{
    Certificates, assert_failed, assert_is_at, begin, end, move_whole, until_stage,
};
use limosa_e2e::points::Manner;
use limosa_e2e::strike::{Held, SERVING};
use limosa_e2e::{Daemon, Pair, VM, guest, has_kvm};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;

#[test]
fn there_and_back_by_each_mode() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = Pair::start_encrypted(None);
    pair.boot(guest::writer(
        VM,
        "ws=16M rate=20000 reads=20 touch=4M seed=3",
    ));
    for mode in Mode::ALL {
        for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
            move_whole(VM, from, to, mode);
        }
    }
    pair.beats.assert_one_at_a_time();
    for daemon in [&pair.a, &pair.b] {
        assert!(daemon.client().host().expect("it answers").encrypted);
        let migrations = daemon.client().migrations().expect("it answers");
        assert_eq!(migrations.len(), Mode::ALL.len());
        assert!(migrations.iter().all(|one| one.encrypted));
    }
}

/// The daemon at the source is killed where only the target can say who has the guest.
#[test]
fn a_restarted_source_asks_over_an_encrypted_connection() {
    if !has_kvm() {
        return;
    }
    for (point, mode) in [
        ("target.runs", Mode::PreCopy),
        ("target.runs", Mode::PostCopy),
        (SERVING, Mode::Demand),
    ] {
        let _places = Places::all();
        let mut held = Held::at_encrypted(point, Manner::Of(mode));
        held.pair.a.kill();
        held.release();
        held.pair.a.restart();
        if mode == Mode::Demand {
            let info = until_stage(&held.pair.a, &held.id, &[Stage::Serving]);
            assert!(info.encrypted);
        }
        held.end();
        held.assert_has_moved();
    }
}

/// Its guest misses pages, and its source has to come back to a daemon that is new.
#[test]
fn a_restarted_target_is_come_back_to_over_encrypted_connections() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let mut held = Held::at_encrypted(SERVING, Manner::Of(Mode::Demand));
    held.pair.b.kill();
    held.pair.b.restart();
    held.end();
    held.assert_has_moved();
}

#[test]
fn hosts_that_do_not_believe_each_other_move_nothing() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let (ours, theirs) = (Certificates::make(), Certificates::make());
    let a = Daemon::start_so(None, Some(&ours.of_hosts[0]));
    let stranger = Daemon::start_so(None, Some(&theirs.of_hosts[1]));
    let plain = Daemon::start();
    let check = |from: &Daemon, to: &Daemon, expect: &str| {
        let report = end(from, &begin(from, to, Mode::PreCopy));
        let reason = assert_failed(&report);
        assert!(reason.contains(expect), "{reason}");
        assert_is_at(VM, from, to);
    };
    guest::boot(&a, &guest::writer(VM, "ws=4M rate=1000"));
    check(&a, &stranger, "signed by another authority");
    check(&a, &plain, "does not speak TLS: start it with --tls");
    assert!(stranger.log().contains("a connection was refused"));
    assert!(plain.log().contains("this host does not speak TLS"));
    a.client().stop(VM, true).expect("it runs there");
    guest::boot(&plain, &guest::writer(VM, "ws=4M rate=1000"));
    check(&plain, &a, "speaks TLS only: start this host with --tls");
    assert!(a.log().contains("does not speak TLS: start it with --tls"));
}
