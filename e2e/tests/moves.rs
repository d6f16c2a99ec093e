//! Moves that shall succeed: by each mode, of big, sparse, many and busy guests, within limits.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{assert_completed, assert_is_at, begin, body, end, move_whole, until_stage};
use limosa_e2e::resources::Resources;
use limosa_e2e::{Daemon, Pair, VM, binary, guest, has_kvm, skip, wait};
use limosa_engine::policy::{Mode, PauseReason};
use limosa_engine::source::Stage;
use limosa_engine::streams::Streams;
use limosa_host::api::{CommandKind, LimitsPatch, MigrateBody, PushOrder, Report, TrackerKind};
use limosa_os::kvm::Kvm;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// What a machine with nothing else to do adds to the time that a guest is stopped: slices of the
/// scheduler, a rest of the guest that was about to end.
const NOISE_MS: f64 = 10.0;

/// Trips there and back by each mode: a busy machine disturbs some of them.
const TRIPS: usize = 2;

#[test]
fn there_and_back_by_each_mode() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = Pair::start();
    let mut spec = guest::writer(VM, "ws=16M rate=20000 reads=20 touch=4M seed=3");
    spec.vcpus = 2;
    pair.boot(spec);
    for mode in Mode::ALL {
        let mut untold = Untold::default();
        for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)].repeat(TRIPS) {
            guest::command(from, VM, CommandKind::ClearStalls);
            let report = move_whole(VM, from, to, mode);
            check_pages(&report, 20 * MIB);
            if [Mode::StopAndCopy, Mode::PreCopy].contains(&mode) {
                // In the others a guest may miss pages, and stands for each of them besides.
                untold.note(&report, to);
            }
            // The old host knows of no such guest, and says so.
            let gone = from.client().vm(VM).expect_err("it has gone");
            assert!(gone.to_string().contains("no VM named"), "{gone}");
        }
        untold.check();
    }
    let turns = pair.beats.assert_one_at_a_time();
    let moves = 2 * TRIPS * Mode::ALL.len();
    assert_eq!(turns.len(), 1 + moves, "{turns:#?}");
}

/// Whoever notices the writes, nothing is lost, on either way: the tracker moves along.
#[test]
fn there_and_back_with_each_dirty_tracker() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = Pair::start();
    for tracker in TrackerKind::ALL {
        let mut spec = guest::writer(VM, "ws=24M rate=40000 seed=5");
        (spec.vcpus, spec.dirty_tracker) = (2, tracker);
        if let Err(error) = Kvm::open().and_then(|kvm| kvm.create_vm(tracker)) {
            skip(&format!("{tracker}: {error}"));
            continue;
        }
        pair.boot(spec);
        for mode in [Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
            for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
                move_whole(VM, from, to, mode);
                let vm = to.client().vm(VM).expect("it runs");
                assert_eq!(vm.dirty_tracker, tracker, "{mode}");
            }
        }
        pair.a.client().stop(VM, false).expect("it stops");
    }
}

/// Everything that was touched was sent, and little else.
fn check_pages(report: &Report, touched_bytes: u64) {
    let touched = touched_bytes / 4096;
    assert!(report.pages_sent >= touched, "{report:?}");
    if report.missing_at_switch > 0 {
        check_faults(report);
        return;
    }
    let first_time = report.pages_sent - report.pages_resent;
    assert!(first_time <= touched + 8 * MIB / 4096, "{report:?}");
    let rounds: u64 = report.rounds.iter().map(|round| round.bytes).sum();
    assert_eq!(report.wire_bytes, rounds + report.state_bytes, "{report:?}");
    assert!(report.wire_bytes >= touched_bytes, "{report:?}");
}

/// Every page that was missing came, some because a vCPU waited for them.
fn check_faults(report: &Report) {
    let pulled = report.pulled_pages.expect("all pages are there");
    let pushed = report.pushed_before_need.expect("all pages are there");
    assert!(pulled > 0, "{report:?}");
    assert!(pulled + pushed <= report.missing_at_switch, "{report:?}");
    assert!(report.fault_latency_us.is_some(), "{report:?}");
    assert!(report.missing_set_bytes > 0, "{report:?}");
}

/// How much longer the guest stood than reports told, at its longest stall of each move.
///
/// The guest stood at least as long as the downtime, but for one rest of it. What it saw beyond may
/// be the doing of a busy machine once, but not each time.
#[derive(Default)]
struct Untold(Vec<f64>);

impl Untold {
    /// A guest that waits for its next burst sees what it overslept.
    const REST_MS: f64 = 1.5;

    /// Takes the stalls of a guest whose stalls were cleared before the move to `here`.
    fn note(&mut self, report: &Report, here: &Daemon) {
        let downtime = report.downtime_ms.expect("it was completed").total;
        // It tells of it when it next looks at its clock, which may be after the report has come.
        let stall = wait::until("the guest has noticed how long it stood", || {
            let stall = guest::longest_stall_ms(&here.client().guest(VM).expect("it works"));
            (stall >= downtime - Self::REST_MS).then_some(stall)
        });
        let why = report.pause_reason;
        println!("{why:?}: downtime {downtime:.2} ms, the guest's longest stall {stall:.2} ms");
        self.0.push(stall - downtime);
    }

    fn check(&self) {
        if self.0.is_empty() {
            return;
        }
        let least = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(least <= NOISE_MS, "untold milliseconds: {:?}", self.0);
    }
}

/// What a guest asks for goes first when it moves the next time, whoever moved it meanwhile and whichever
/// daemon was restarted.
#[test]
fn what_a_guest_asked_for_goes_first_the_next_time() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let mut pair = Pair::start();
    pair.boot(guest::writer(VM, "ws=16M rate=20000 touch=4M seed=3"));
    let recorded = |from: &Daemon, to: &Daemon| {
        let mut body = body(to, Mode::PostCopy);
        body.push_order = PushOrder::Recorded;
        let id = from.client().migrate(VM, &body).expect("accepted");
        let report = end(from, &id);
        assert_completed(&report);
        assert_eq!(report.digest_equal, Some(true), "{report:?}");
        assert_is_at(VM, to, from);
        report.recorded_pages
    };
    let kept = |daemon: &Daemon| {
        let kept = fs::read_dir(daemon.state_dir().join("demanded")).expect("a directory");
        kept.count()
    };
    let demanded = move_whole(VM, &pair.a, &pair.b, Mode::Demand);
    assert_eq!(demanded.recorded_pages, 0, "nothing was recorded");
    let pulled = demanded.pulled_pages.expect("all pages are there");
    assert_eq!((kept(&pair.a), kept(&pair.b)), (0, 1));
    pair.b.kill();
    pair.b.restart();
    let first = recorded(&pair.b, &pair.a);
    // A page that the vCPUs need first goes in the pause; some were pushed before the answer came.
    assert!(first + 32 >= pulled && first > 0, "{first} of {pulled}");
    assert_eq!((kept(&pair.a), kept(&pair.b)), (1, 0));
    let copied = move_whole(VM, &pair.a, &pair.b, Mode::PreCopy);
    assert_eq!(copied.recorded_pages, 0, "{copied:?}");
    let second = recorded(&pair.b, &pair.a);
    assert!(second + 32 >= first, "{second}, then {first}");
    println!("{pulled} pages pulled, then {first} and {second} pushed as recorded");
    pair.a.client().stop(VM, false).expect("it stops");
    assert_eq!((kept(&pair.a), kept(&pair.b)), (0, 0));
}

#[test]
fn memory_that_was_never_touched_costs_nothing() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = Pair::start();
    let mut spec = guest::writer(VM, "ws=64M rate=10000 touch=192M");
    spec.memory_bytes = 4096 * MIB;
    let before = [Resources::of(&pair.a), Resources::of(&pair.b)];
    pair.boot(spec);
    for (from, to, mode) in [
        (&pair.a, &pair.b, Mode::StopAndCopy),
        (&pair.b, &pair.a, Mode::PreCopy),
        (&pair.a, &pair.b, Mode::PostCopy),
    ] {
        let id = begin(from, to, mode);
        let mut most = [0; 2];
        wait::until_true("the migration is over", || {
            for (most, daemon) in most.iter_mut().zip([&pair.a, &pair.b]) {
                *most = (*most).max(Resources::of(daemon).anonymous_bytes);
            }
            from.client().migration(&id).expect("it is known").stage == Stage::Finished
        });
        let report = end(from, &id);
        assert_completed(&report);
        assert_eq!(report.digest_equal, Some(true));
        let first_time = report.pages_sent - report.pages_resent;
        println!(
            "{mode}: {} MiB on the wire, {first_time} pages, daemons at most {most:?} bytes",
            report.wire_bytes / MIB
        );
        assert!(
            (256 * MIB / 4096..280 * MIB / 4096).contains(&first_time),
            "{report:?}"
        );
        assert!(
            report.wire_bytes
                < (280 * MIB / 4096 + report.pages_resent) * 4112 + report.state_bytes
        );
        for (most, before) in most.iter().zip(&before) {
            // Buffers of streams and bitmaps of pages; a sixteenth of what was touched.
            assert!(
                *most < before.anonymous_bytes + 16 * MIB,
                "{most} bytes, before {before:?}"
            );
        }
        assert_is_at(VM, to, from);
    }
}

#[test]
fn huge_pages_move_too() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    // Two hosts hold the guest for a moment.
    let Some(_reserved) = HugePages::reserve(2 * 64 * MIB / (2 * MIB)) else {
        return skip("huge pages cannot be reserved");
    };
    let pair = Pair::start();
    let mut spec = guest::writer(VM, "ws=16M rate=10000");
    spec.huge_pages = true;
    pair.boot(spec);
    for (from, to, mode) in [
        (&pair.a, &pair.b, Mode::StopAndCopy),
        (&pair.b, &pair.a, Mode::PreCopy),
    ] {
        move_whole(VM, from, to, mode);
        assert!(to.client().vm(VM).expect("it runs").huge_pages);
    }
}

/// Huge pages reserved on top of those that were; given back when it is dropped.
struct HugePages {
    before: u64,
}

impl HugePages {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    fn count() -> Option<u64> {
        fs::read_to_string(Self::FILE).ok()?.trim().parse().ok()
    }

    fn reserve(count: u64) -> Option<Self> {
        let before = Self::count()?;
        fs::write(Self::FILE, (before + count).to_string()).ok()?;
        let reserved = Self { before };
        (Self::count()? >= before + count).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(Self::FILE, self.before.to_string()).expect("it could be written before");
    }
}

#[test]
fn several_guests_move_at_once() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = Pair::start();
    let names = ["one", "two", "three"];
    for name in names {
        guest::boot(&pair.a, &guest::writer(name, "ws=8M rate=5000"));
    }
    for (from, to, modes) in [
        (
            &pair.a,
            &pair.b,
            [Mode::PreCopy, Mode::StopAndCopy, Mode::PreCopy],
        ),
        (
            &pair.b,
            &pair.a,
            [Mode::StopAndCopy, Mode::PreCopy, Mode::StopAndCopy],
        ),
    ] {
        let start = |(name, mode): (&str, Mode)| {
            from.client()
                .migrate(name, &body(to, mode))
                .expect("a migration that is accepted")
        };
        let ids: Vec<String> = names.into_iter().zip(modes).map(start).collect();
        for id in ids {
            let report = end(from, &id);
            assert_completed(&report);
            assert_eq!(report.digest_equal, Some(true));
        }
        for name in names {
            assert_is_at(name, to, from);
        }
    }
}

/// A guest that rewrites 16 MiB far faster than the link carries them, even on a busy host.
fn boot_too_fast(pair: &Pair) {
    pair.boot(guest::writer(VM, "ws=16M rate=max pattern=seq"));
}

const LINK: u64 = 25_000_000;

fn body_over_link(to: &Daemon) -> MigrateBody {
    let mut body = body(to, Mode::PreCopy);
    body.link = Some(LINK);
    body
}

#[test]
fn a_writer_faster_than_the_link_is_stopped_and_told_the_truth_about() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = Pair::start();
    boot_too_fast(&pair);
    let mut untold = Untold::default();
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        guest::command(from, VM, CommandKind::ClearStalls);
        let id = from.client().migrate(VM, &body_over_link(to));
        let report = end(from, &id.expect("accepted"));
        check_gave_up(&report);
        untold.note(&report, to);
        assert_is_at(VM, to, from);
    }
    untold.check();
}

/// It ended by its own rules. What was dirty at the pause had to pass the link, and the report says
/// so, before and after.
fn check_gave_up(report: &Report) {
    assert_completed(report);
    let reasons = [PauseReason::NoProgress, PauseReason::RoundsMax].map(Some);
    assert!(reasons.contains(&report.pause_reason), "{report:?}");
    let last = report.rounds.last().expect("a last round");
    // The guest rewrites more than 8 MiB a round.
    assert!(last.pages > 2048, "{report:?}");
    let on_link_ms = last.bytes as f64 * 1000.0 / LINK as f64;
    let downtime = report.downtime_ms.expect("it was completed");
    assert!(downtime.total >= on_link_ms * 0.9, "{report:?}");
    assert!(downtime.transfer >= on_link_ms * 0.9, "{report:?}");
    let predicted = report
        .predicted_downtime_ms
        .expect("rounds had shown the bandwidth");
    let ratio = predicted / downtime.total;
    assert!(
        (0.5..2.0).contains(&ratio),
        "predicted {predicted} ms: {report:?}"
    );
}

#[test]
fn rounds_end_at_their_limit_and_before_the_deadline() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = Pair::start();
    boot_too_fast(&pair);
    let mut body = body_over_link(&pair.b);
    body.rounds_max = Some(2);
    let report = end(
        &pair.a,
        &pair.a.client().migrate(VM, &body).expect("accepted"),
    );
    assert_completed(&report);
    assert_eq!(
        report.pause_reason,
        Some(PauseReason::RoundsMax),
        "{report:?}"
    );
    assert_eq!(
        report.rounds.len(),
        3,
        "two with the guest running, one without: {report:?}"
    );
    assert_is_at(VM, &pair.b, &pair.a);

    // One round takes two thirds of a second: there is time for the first and the last one.
    let mut body = body_over_link(&pair.a);
    body.deadline_ms = Some(1900.0);
    let report = end(
        &pair.b,
        &pair.b.client().migrate(VM, &body).expect("accepted"),
    );
    assert_completed(&report);
    assert_eq!(
        report.pause_reason,
        Some(PauseReason::Deadline),
        "{report:?}"
    );
    assert!(report.total_ms < 1900.0 + NOISE_MS, "{report:?}");
    assert_is_at(VM, &pair.a, &pair.b);
}

/// A guest that has 192 MiB to be copied and writes next to nothing.
fn pair_with_much_to_copy() -> Pair {
    let pair = Pair::start();
    let mut spec = guest::writer(VM, "ws=2M rate=500 touch=192M");
    spec.memory_bytes = 256 << 20;
    pair.boot(spec);
    pair
}

#[test]
fn a_bandwidth_set_in_flight_takes_effect() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = pair_with_much_to_copy();
    let mut body = body(&pair.b, Mode::PreCopy);
    body.bandwidth_max = Some(4_000_000);
    let id = pair.a.client().migrate(VM, &body).expect("accepted");
    until_stage(&pair.a, &id, &[Stage::Copying]);
    let slow = received_rate(&pair.b, 2_000_000);
    assert!(
        (2e6..6e6).contains(&slow),
        "{slow} bytes a second with a limit of 4 MB/s"
    );

    let set = |rate| LimitsPatch {
        bandwidth_max: Some(rate),
        ..LimitsPatch::default()
    };
    let info = pair.a.client().set(&id, &set(20_000_000)).expect("it runs");
    assert_eq!(info.limits.bandwidth_max, Some(20_000_000));
    let faster = received_rate(&pair.b, 8_000_000);
    assert!(
        (14e6..26e6).contains(&faster),
        "{faster} bytes a second with a limit of 20 MB/s"
    );

    let lifted = Instant::now();
    let info = pair.a.client().set(&id, &set(0)).expect("it runs");
    assert_eq!(info.limits.bandwidth_max, None);
    let report = end(&pair.a, &id);
    assert_completed(&report);
    // At the former limit the rest would have taken nine seconds.
    assert!(
        lifted.elapsed() < Duration::from_secs(5),
        "{:?}: {report:?}",
        lifted.elapsed()
    );
    println!(
        "seen {slow:.0} at 4 MB/s, {faster:.0} at 20 MB/s, over {:?} after that",
        lifted.elapsed()
    );
    assert_is_at(VM, &pair.b, &pair.a);
}

/// As an operator types it: fewer than are used, more than are open, and back to what pays.
#[test]
fn streams_set_in_flight_are_used() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let pair = pair_with_much_to_copy();
    let mut body = body(&pair.b, Mode::PreCopy);
    (body.bandwidth_max, body.streams) = (Some(16_000_000), Streams::fixed(1));
    body.verify = true;
    let id = pair.a.client().migrate(VM, &body).expect("accepted");
    until_stage(&pair.a, &id, &[Stage::Copying]);
    let in_use = || {
        let info = pair.a.client().migration(&id).expect("it is known");
        (info.streams_in_use, info.streams_open)
    };
    assert_eq!(in_use(), (1, 8));

    let (is_done, said) = type_set(&pair.a, "5");
    assert!(is_done && said.contains("streams 5"), "{said}");
    wait::until("five are used", || (in_use() == (5, 8)).then_some(()));
    let (is_done, said) = type_set(&pair.a, "9");
    assert!(!is_done && said.contains("8 are open"), "{said}");
    // Those that it added have pieces, which take as long as at this rate 80 MiB do.
    let (is_done, said) = type_set(&pair.a, "2");
    assert!(is_done && said.contains("streams 2"), "{said}");
    wait::until("two are used", || (in_use() == (2, 8)).then_some(()));
    let (is_done, said) = type_set(&pair.a, "auto");
    assert!(is_done && said.contains("streams auto"), "{said}");

    let unlimited = LimitsPatch {
        bandwidth_max: Some(0),
        ..LimitsPatch::default()
    };
    pair.a.client().set(&id, &unlimited).expect("it runs");
    let report = end(&pair.a, &id);
    assert_completed(&report);
    assert_eq!(report.digest_equal, Some(true));
    assert_eq!(report.rounds[0].streams, 5, "{report:?}");
    assert_is_at(VM, &pair.b, &pair.a);
}

/// Types `limosa set VM --streams …`: whether it is done, and what it says.
fn type_set(daemon: &Daemon, streams: &str) -> (bool, String) {
    let output = Command::new(binary::limosa())
        .args(["set", VM, "--streams", streams, "--state-dir"])
        .arg(daemon.state_dir())
        .env("NO_COLOR", "1")
        .output()
        .expect("the binary can be started");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.success(), said)
}

/// Bytes a second that arrive at a target while `bytes` more come in.
fn received_rate(target: &Daemon, bytes: u64) -> f64 {
    let received = || {
        target
            .client()
            .incoming()
            .ok()?
            .first()
            .map(|incoming| incoming.bytes_received)
    };
    // A change shows after what was let through before it has passed.
    let first = wait::until("pages arrive", || received().filter(|bytes| *bytes > 0));
    let from = wait::until("more pages arrive", || {
        received().filter(|bytes| *bytes > first + 600_000)
    });
    let begun = Instant::now();
    let to = wait::until("many pages arrive", || {
        received().filter(|now| *now >= from + bytes)
    });
    (to - from) as f64 / begun.elapsed().as_secs_f64()
}
