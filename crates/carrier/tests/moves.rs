//! Real engines over real sockets, with guests that are threads: no KVM needed.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "thread_guest/guest.rs"]
mod thread_guest;

use limosa_carrier::{
    Compression, Demanded, Guest, Listener, MigrateRequest, Migration, PushOrder, draw_id,
    replay_file,
};
use limosa_engine::deferral::Deferral;
use limosa_engine::handover::Phase;
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::report::{Coded, MigrationReport, Outcome, RoundReport};
use limosa_engine::source::Stage;
use limosa_engine::streams::Streams;
use limosa_engine::throttle::Throttling;
use limosa_engine::wire::ControlFrame;
use limosa_pages::{BytesPerSecond, PageCount};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use thread_guest::{ThreadGuest, ThreadHost};

const PATIENCE: Duration = Duration::from_secs(60);

fn listen() -> (Arc<ThreadHost>, Listener) {
    let host = Arc::new(ThreadHost::default());
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), host.clone(), None).unwrap();
    (host, listener)
}

fn request(peer: SocketAddr, mode: Mode) -> MigrateRequest {
    let limits = Limits {
        downtime_max: Duration::from_millis(20),
        ..Limits::default()
    };
    MigrateRequest {
        id: draw_id().unwrap(),
        peer: peer.to_string(),
        mode,
        limits,
        streams: 2,
        verify: true,
        copy_disks: false,
        link: None,
        compression: Compression::default(),
        push_order: PushOrder::default(),
        demanded: Demanded::default(),
        credentials: None,
    }
}

fn start(guest: &Arc<ThreadGuest>, request: MigrateRequest) -> Arc<Migration> {
    let guest: Arc<dyn Guest> = guest.clone();
    Migration::start(guest, request, None, Box::new(|_| {})).unwrap()
}

fn migrate(guest: &Arc<ThreadGuest>, request: MigrateRequest) -> MigrationReport {
    start(guest, request)
        .wait(PATIENCE)
        .expect("a migration ends")
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Has the guest run at the target without what it does not ask for, for so long, and then sends the rest.
fn let_run_on_demand(migration: &Migration, time: Duration) {
    wait_until("the guest runs at the target", || {
        migration.status().stage == Stage::Serving
    });
    std::thread::sleep(time);
    migration.set_mode(Mode::PostCopy).unwrap();
}

/// The guest works at the source and every page of it is right.
fn assert_runs_on(guest: &ThreadGuest) {
    assert!(guest.runs());
    assert_eq!(guest.phase(), Phase::Running);
    assert_eq!((guest.sweep(), guest.errors.load(Ordering::SeqCst)), (0, 0));
}

fn failure(report: &MigrationReport) -> &str {
    match &report.outcome {
        Some(Outcome::Failed { reason }) => reason,
        other => panic!("expected a failure, got {other:?}"),
    }
}

#[test]
fn every_mode_moves_a_busy_guest_whole() {
    for (mode, compression) in Mode::ALL.into_iter().flat_map(|mode| {
        let each = [Compression::Off, Compression::On, Compression::Zstd];
        each.map(|compression| (mode, compression))
    }) {
        let (host, listener) = listen();
        let guest = ThreadGuest::new(8192, 3000, true);
        let request = MigrateRequest {
            compression,
            push_order: match compression {
                Compression::On => PushOrder::Bubbling,
                _ => PushOrder::Hottest,
            },
            ..request(listener.local_addr(), mode)
        };
        let migration = start(&guest, request);
        if mode == Mode::Demand {
            let_run_on_demand(&migration, Duration::from_millis(50));
        }
        let report = migration.wait(PATIENCE).expect("a migration ends");
        assert_eq!(report.outcome, Some(Outcome::Completed), "{mode}");
        assert_eq!(report.digest_equal, Some(true), "{mode}");
        assert!(guest.ended());
        let arrived = host.guests.lock().unwrap()[0].1.clone();
        assert_eq!(arrived.errors.load(Ordering::SeqCst), 0, "{mode}");
        assert_eq!(arrived.sweep(), 0, "{mode}");
        wait_until("the source said done", || arrived.phase() == Phase::Running);
        // Holes were never sent, and everything else was.
        let sent = report.pages_sent().get();
        let rounds = report.rounds.len() as u64;
        assert!((3000..3000 * (rounds + 1)).contains(&sent), "{report:?}");
        assert!(report.wire_bytes().get() < sent * 4200 + 100_000);
        let coded = |of: fn(&RoundReport) -> Coded| -> u64 {
            report
                .rounds
                .iter()
                .map(|round| of(round).pages.get())
                .sum()
        };
        let (lz4, zstd) = (coded(|round| round.lz4), coded(|round| round.zstd));
        let (packed, deltas) = (lz4 + zstd, coded(|round| round.delta));
        println!("{mode}, {compression:?}: {packed} compressed, {deltas} as differences");
        assert_eq!(packed > 0, compression != Compression::Off, "{mode}");
        assert!(compression != Compression::Zstd || (zstd, lz4 + deltas) == (packed, 0));
        assert!(deltas == 0 || (mode.copies_live() && packed > 0), "{mode}");
        wait_until("the session is closed", || listener.incoming().is_empty());
    }
}

/// A disk that the guest writes meanwhile is the same at the target, and what the guest has written last is there
/// when it runs: it looks before it goes on.
#[test]
fn disks_are_copied_with_their_guest() {
    const DISK: u64 = (1 << 20) + 4096 + 512;
    let each = Mode::ALL.into_iter().flat_map(|mode| {
        let each = [Compression::Off, Compression::Zstd];
        each.map(|compression| (mode, compression))
    });
    for (mode, compression) in each {
        let (host, listener) = listen();
        let guest = ThreadGuest::with_disk(4096, 1000, true, DISK);
        let request = MigrateRequest {
            copy_disks: true,
            compression,
            ..request(listener.local_addr(), mode)
        };
        let migration = start(&guest, request);
        if mode == Mode::Demand {
            let_run_on_demand(&migration, Duration::from_millis(100));
        }
        let report = migration.wait(PATIENCE).expect("a migration ends");
        assert_eq!(report.outcome, Some(Outcome::Completed), "{mode}");
        assert_eq!(report.digest_equal, Some(true), "{mode}");
        let arrived = host.guests.lock().unwrap()[0].1.clone();
        assert_eq!(arrived.errors.load(Ordering::SeqCst), 0, "{mode}");
        assert_eq!(arrived.sweep(), 0, "{mode}");
        // Two of three pages of the disk were written at first.
        let sent = report.pages_sent().get();
        assert!(sent > 1000 + 170, "{mode}: {sent}");
        if mode == Mode::StopAndCopy {
            let on_disk = DISK.div_ceil(4096);
            assert!(sent <= 1000 + on_disk, "nothing twice: {sent}");
        }
    }
}

#[test]
fn disks_are_not_copied_where_that_cannot_be() {
    let (host, listener) = listen();
    let guest = ThreadGuest::new(1024, 100, true);
    let request = MigrateRequest {
        copy_disks: true,
        ..request(listener.local_addr(), Mode::PreCopy)
    };
    let started = Migration::start(guest.clone(), request, None, Box::new(|_| {}));
    let text = started.unwrap_err().to_string();
    assert_eq!(text, "its disks cannot be copied: no disk");
    assert_runs_on(&guest);
    assert!(host.guests.lock().unwrap().is_empty());
}

/// What a guest asks for is recorded, and the next move pushes it first.
#[test]
fn what_was_asked_for_goes_first_the_next_time() {
    let (host, listener) = listen();
    let guest = ThreadGuest::new(8192, 3000, true);
    let first = request(listener.local_addr(), Mode::Demand);
    let id = first.id;
    let migration = start(&guest, first);
    let_run_on_demand(&migration, Duration::from_millis(50));
    let report = migration.wait(PATIENCE).unwrap();
    assert_eq!(report.outcome, Some(Outcome::Completed));
    assert_eq!(report.recorded, PageCount::ZERO, "nothing was known");
    let pulled = report.faults.unwrap().pulled.get();
    let demanded = host.asked_for.lock().unwrap()[&id].clone();
    let asked_for: u64 = demanded.runs().iter().map(|run| run.count.get()).sum();
    // Some may have been pushed before the answer came.
    assert!(pulled > 0 && asked_for >= pulled, "{asked_for}, {pulled}");

    let guest = host.guests.lock().unwrap()[0].1.clone();
    wait_until("the source said done", || guest.phase() == Phase::Running);
    let (next, listener) = listen();
    let second = MigrateRequest {
        push_order: PushOrder::Recorded,
        demanded,
        ..request(listener.local_addr(), Mode::PostCopy)
    };
    let report = migrate(&guest, second);
    assert_eq!(report.outcome, Some(Outcome::Completed));
    assert_eq!(report.digest_equal, Some(true));
    // The page that the guest needs first goes in the pause.
    let recorded = report.recorded.get();
    assert!(
        (asked_for - 1..=asked_for).contains(&recorded),
        "{recorded} of {asked_for}"
    );
    let arrived = next.guests.lock().unwrap()[0].1.clone();
    assert_eq!(arrived.errors.load(Ordering::SeqCst), 0);
    assert_eq!(arrived.sweep(), 0);
}

#[test]
fn a_journal_replays_to_the_same_actions() {
    let (_host, listener) = listen();
    let guest = ThreadGuest::new(4096, 1000, true);
    let path = std::env::temp_dir().join(format!("limosa-journal-{}", std::process::id()));
    let request = request(listener.local_addr(), Mode::PreCopy);
    let migration = Migration::start(guest, request, Some(path.clone()), Box::new(|_| {})).unwrap();
    migration.wait(PATIENCE).unwrap();
    assert!(replay_file(&path).unwrap() > 10);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let damaged = replay_file(&path);
    std::fs::remove_file(&path).unwrap();
    assert!(damaged.is_err(), "{damaged:?}");
}

#[test]
fn an_abort_leaves_the_guest_where_it_was_and_the_next_attempt_works() {
    let (host, listener) = listen();
    let guest = ThreadGuest::new(8192, 3000, true);
    let mut slow = request(listener.local_addr(), Mode::PreCopy);
    slow.link = Some(BytesPerSecond::new(4_000_000));
    let migration = start(&guest, slow);
    wait_until("pages flow", || {
        migration.status().round_sent_pages.get() > 0
    });
    migration.abort().unwrap();
    let report = migration.wait(PATIENCE).unwrap();
    assert_eq!(report.outcome, Some(Outcome::Aborted));
    assert!(migration.abort().is_err());
    assert_runs_on(&guest);
    wait_until("the target dropped it", || {
        host.guests.lock().unwrap().is_empty()
    });
    let report = migrate(&guest, request(listener.local_addr(), Mode::PreCopy));
    assert_eq!(report.outcome, Some(Outcome::Completed));
}

#[test]
fn limits_change_in_flight() {
    let (_host, listener) = listen();
    let guest = ThreadGuest::new(8192, 8000, false);
    let mut slow = request(listener.local_addr(), Mode::PreCopy);
    slow.limits.bandwidth_max = Some(BytesPerSecond::new(1_000_000));
    let migration = start(&guest, slow);
    wait_until("pages flow", || {
        migration.status().round_sent_pages.get() > 0
    });
    let begun = Instant::now();
    migration.set(Limits {
        bandwidth_max: None,
        ..migration.status().limits
    });
    let report = migration.wait(PATIENCE).unwrap();
    assert_eq!(report.outcome, Some(Outcome::Completed));
    // At the old limit it would have taken half a minute.
    assert!(begun.elapsed() < Duration::from_secs(15));
}

/// Before the switch and after it: others are used from the next piece on, and nothing gets lost.
#[test]
fn streams_change_in_flight() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let (host, listener) = listen();
        let guest = ThreadGuest::new(32_768, 30_000, false);
        let mut slow = request(listener.local_addr(), mode);
        slow.streams = 6;
        slow.limits.streams = Streams::fixed(1).unwrap();
        slow.limits.bandwidth_max = Some(BytesPerSecond::new(40_000_000));
        let migration = start(&guest, slow);
        wait_until("pages flow", || {
            let status = migration.status();
            let is_pushed = status.unsent_pages.get() > 0 && status.unsent_pages.get() < 30_000;
            status.stage == Stage::Copying && status.round_sent_pages.get() > 0 || is_pushed
        });
        let status = migration.status();
        assert_eq!((status.streams_in_use, status.streams_open), (1, 6));
        migration.set(Limits {
            bandwidth_max: None,
            streams: Streams::fixed(5).unwrap(),
            ..status.limits
        });
        wait_until("others are used", || migration.status().streams_in_use == 5);
        let report = migration.wait(PATIENCE).unwrap();
        assert_eq!(report.outcome, Some(Outcome::Completed), "{mode}");
        assert_eq!(report.digest_equal, Some(true), "{mode}");
        let most = report.rounds.iter().map(|round| round.streams).max();
        assert_eq!(most, Some(5), "{mode}: {report:?}");
        drop(host);
    }
}

#[test]
fn what_cannot_start_is_said_and_the_guest_runs_on() {
    let guest = ThreadGuest::new(1024, 100, true);
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let report = migrate(&guest, request(closed, Mode::PreCopy));
    assert!(
        failure(&report).contains("is 'limosa host' running there?"),
        "{report:?}"
    );
    assert_runs_on(&guest);

    let (host, listener) = listen();
    *host.refuse.lock().unwrap() = Some("a VM of this name exists here already".to_owned());
    let report = migrate(&guest, request(listener.local_addr(), Mode::StopAndCopy));
    assert_eq!(
        failure(&report),
        "the target refused: a VM of this name exists here already"
    );
    assert_runs_on(&guest);
}

/// Peers that are no limosa host, each by what it does with a connection.
#[test]
fn bad_targets_end_the_attempt_and_not_the_guest() {
    let guest = ThreadGuest::new(1024, 100, true);
    let refuse = ControlFrame::Refuse {
        reason: "no".to_owned(),
    }
    .encode();
    let runs = ControlFrame::Commit.encode();
    let peers: [(&str, Vec<u8>, &str); 5] = [
        ("closes", Vec::new(), "broke"),
        ("garbage", vec![0xff; 64], "announced a frame"),
        (
            "malformed",
            [&8u32.to_le_bytes()[..], &[0xee; 8]].concat(),
            "malformed",
        ),
        ("refuses", refuse, "refused: no"),
        ("out of turn", runs, "out of turn"),
    ];
    for (name, answer, expect) in peers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            // Control, pull and two push streams.
            let mut streams: Vec<TcpStream> =
                (0..4).map(|_| listener.accept().unwrap().0).collect();
            let mut preamble = [0; 32];
            streams[0].read_exact(&mut preamble).unwrap();
            let _gone = streams[0].write_all(&answer);
            // Unread bytes would turn the close into a reset that overtakes the answer.
            streams[0]
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let _rest = streams[0].read_to_end(&mut Vec::new());
        });
        let report = migrate(&guest, request(peer, Mode::PreCopy));
        assert!(failure(&report).contains(expect), "{name}: {report:?}");
        assert_runs_on(&guest);
    }
}

/// Sources that are no limosa host: the target drops them and goes on serving.
#[test]
fn bad_sources_are_dropped() {
    let (host, listener) = listen();
    let mut old = [0; 32];
    old[..8].copy_from_slice(b"LIMOSA\r\n");
    old[8] = 99;
    for bytes in [vec![0x47; 32], old.to_vec(), vec![1, 2, 3]] {
        let mut stream = TcpStream::connect(listener.local_addr()).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let frame = ControlFrame::decode(&answer[4..]).unwrap();
        assert!(matches!(frame, ControlFrame::Refuse { .. }), "{frame:?}");
    }
    let guest = ThreadGuest::new(1024, 100, true);
    let report = migrate(&guest, request(listener.local_addr(), Mode::PreCopy));
    assert_eq!(report.outcome, Some(Outcome::Completed));
    assert_eq!(host.guests.lock().unwrap().len(), 1);
}

/// A restarted daemon finds a committed VM and asks: the target never heard of it.
#[test]
fn a_committed_guest_comes_back_when_the_target_bars_it() {
    let (_host, listener) = listen();
    let guest = ThreadGuest::new(1024, 100, true);
    let request = request(listener.local_addr(), Mode::PreCopy);
    let (id, peer) = (request.id, request.peer.clone());
    guest.record(&Phase::Offered { id }).unwrap();
    guest.pause_and_save(None).unwrap();
    guest.record(&Phase::Committed { id, peer }).unwrap();
    guest.lose_daemon();
    assert!(!guest.runs() && guest.resume().is_err());
    let migration = Migration::recover(guest.clone(), request, Box::new(|_| {})).unwrap();
    let report = migration.wait(PATIENCE).unwrap();
    assert!(failure(&report).contains("never took the guest over"));
    assert_runs_on(&guest);
}

/// A guest that writes all of its pages over and over: some of them are left out of rounds, and none is lost,
/// whether they go with the pause or behind the switch.
#[test]
fn hot_pages_that_rounds_leave_out_arrive_with_the_rest() {
    let check = |defer: Deferral, then: Option<Mode>| {
        let (host, listener) = listen();
        let guest = ThreadGuest::new(3000, 1500, true);
        let mut request = request(listener.local_addr(), Mode::PreCopy);
        request.link = Some(BytesPerSecond::new(20_000_000));
        request.limits.downtime_max = Duration::from_millis(150);
        request.limits.defer = defer;
        // A guest that is stuck is not given up.
        request.limits.throttle = Throttling::Auto;
        request.limits.rounds_max = 6;
        let migration = start(&guest, request);
        if let Some(mode) = then {
            let has_ended = || migration.wait(Duration::ZERO).is_some();
            wait_until("hot pages are left out, or all has gone", || {
                migration.status().deferred_pages > PageCount::ZERO || has_ended()
            });
            assert!(migration.set_mode(mode).is_ok() || has_ended());
        }
        let report = migration.wait(PATIENCE).expect("a migration ends");
        assert_eq!(report.outcome, Some(Outcome::Completed), "{report:?}");
        assert_eq!(report.digest_equal, Some(true));
        let arrived = host.guests.lock().unwrap()[0].1.clone();
        assert_eq!(arrived.sweep(), 0);
        assert_eq!(arrived.errors.load(Ordering::SeqCst), 0);
        let most = report.rounds.iter().map(|round| round.deferred).max();
        // Half of what the link carries in that time, if it is not measured at more than twice its rate.
        let may = PageCount::new(20_000_000 * 150 / 1000 / 4096);
        assert!(most.unwrap() <= may, "{report:?}");
        most > Some(PageCount::ZERO)
    };
    // A guest that gets no processor on a busy host has no hot pages: then it is moved again.
    assert!((0..5).any(|_| check(Deferral::Auto, None)));
    assert!(!check(Deferral::Off, None));
    assert!((0..5).any(|_| check(Deferral::Auto, Some(Mode::PostCopy))));
}
