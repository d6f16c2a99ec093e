//! Targets that break the rules, against a real source.
//!
//! Whatever a target does before the commit, the migration fails with one line that says why, and
//! the guest runs on; after it, only a clear answer of the target's host decides.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{assert_failed, end, move_whole, until_stage};
use limosa_e2e::peer::target::{ACCEPT, FakeTarget, Taken};
use limosa_e2e::peer::{now, read, send, write};
use limosa_e2e::resources::Resources;
use limosa_e2e::{Daemon, Pair, VM, guest, has_kvm};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_engine::wire::{ControlFrame, Digest, Role};
use limosa_host::api::{MigrateBody, Report, VmState};
use limosa_pages::PageCount;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

/// What a bad target does with a migration, and what the source is to say about it.
struct Deed {
    name: &'static str,
    expect: &'static str,
    run: fn(&FakeTarget),
}

const fn deed(name: &'static str, expect: &'static str, run: fn(&FakeTarget)) -> Deed {
    Deed { name, expect, run }
}

/// Answers to the start that are none.
// tidy: long-function because it is one table, a row a deed
fn deeds_at_the_door() -> Vec<Deed> {
    vec![
        deed("closes at once", "broke", |target| {
            drop(target.accept_control())
        }),
        deed("closes after the start", "broke", |target| {
            drop(target.take())
        }),
        deed("is a web server", "a frame of", |target| {
            answer(
                target,
                b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n",
            );
        }),
        deed(
            "sends a frame of 4 GiB",
            "a frame of 4294967295 bytes",
            |target| answer(target, &[0xff; 4]),
        ),
        deed("sends a frame of nothing", "malformed", |target| {
            answer(target, &[0; 4])
        }),
        deed("sends a frame that is none", "malformed", |target| {
            answer(target, &[2, 0, 0, 0, 0xee, 0])
        }),
        deed("sends half a frame and closes", "broke", |target| {
            let bytes = ACCEPT.encode();
            answer(target, &bytes[..bytes.len() - 1]);
        }),
        deed("refuses", "the target refused: no room for it", |target| {
            refuse(target, "no room for it");
        }),
        deed("refuses in a letter", "the target refused: ", |target| {
            refuse(target, "dear source,\r\n\nno\u{1b}[31m.\nyours");
        }),
        deed("refuses without a word", "the target refused", |target| {
            refuse(target, "")
        }),
        deed(
            "is of another version",
            "protocol version 4, this host version 5",
            |target| {
                // What a daemon of the next version says to the preamble.
                refuse(
                    target,
                    "the peer speaks protocol version 4, this host version 5: use the same release on both hosts",
                );
            },
        ),
        deed("is prepared at once", "prepared out of turn", |target| {
            say(
                target,
                &ControlFrame::Prepared {
                    received_at: now(),
                    loaded_at: now(),
                },
            );
        }),
        deed("runs it at once", "runs out of turn", |target| {
            say(
                target,
                &ControlFrame::Runs {
                    committed_at: now(),
                    first_instruction_at: now(),
                },
            );
        }),
        deed(
            "answers what was not asked",
            "resolved out of turn",
            |target| {
                say(target, &ControlFrame::Resolved(Resolution::Runs));
            },
        ),
        deed("wants to be the source", "out of turn", |target| {
            say(target, &ControlFrame::Commit)
        }),
    ]
}

/// Answers the start with bytes and closes.
fn answer(target: &FakeTarget, bytes: &[u8]) {
    write(&target.take().control, bytes);
}

/// Answers the start with a frame and waits for the end, so that the frame is what ends it.
fn say(target: &FakeTarget, frame: &ControlFrame) {
    let taken = target.take();
    taken.send(frame);
    wait_for_end(&taken);
}

fn refuse(target: &FakeTarget, reason: &str) {
    say(
        target,
        &ControlFrame::Refuse {
            reason: reason.to_owned(),
        },
    );
}

/// Reads until the source closes.
fn wait_for_end(taken: &Taken) {
    while taken.read().is_some() {}
}

/// Breaks of the rules once the guest was accepted.
// tidy: long-function because it is one table, a row a deed
fn deeds_inside() -> Vec<Deed> {
    vec![
        deed("accepts and closes", "broke", |target| {
            target.take().accept();
        }),
        deed("accepts twice", "accept out of turn", |target| {
            let taken = target.take();
            taken.accept();
            taken.send(&ACCEPT);
            wait_for_end(&taken);
        }),
        deed(
            "echoes the wrong probe",
            "clock-echo out of turn",
            |target| {
                let taken = target.take();
                taken.send(&ACCEPT);
                taken.send(&ControlFrame::ClockEcho {
                    number: 77,
                    now: now(),
                });
                wait_for_end(&taken);
            },
        ),
        deed(
            "gives up after the rehearsal",
            "the target gave up: out of memory",
            |target| {
                let taken = target.take();
                taken.accept();
                taken.send(&ControlFrame::Abort {
                    reason: "out of memory".to_owned(),
                });
                wait_for_end(&taken);
            },
        ),
        deed(
            "confirms a round before it came",
            "round that was not sent",
            |target| {
                let taken = target.take();
                taken.accept();
                taken.rehearsed();
                taken.wait_for_round(0);
                taken.send(&ControlFrame::RoundReceived { round: 5 });
                wait_for_end(&taken);
            },
        ),
        deed("closes when pages come", "broke", |target| {
            let taken = target.take();
            taken.accept();
            taken.rehearsed();
        }),
        deed("closes after a round", "broke", |target| {
            let taken = target.take();
            taken.accept();
            taken.rehearsed();
            taken.wait_for_round(0);
        }),
        deed("closes after it confirmed a round", "broke", |target| {
            let taken = target.take();
            taken.accept();
            taken.rehearsed();
            taken.wait_for_round(0);
            taken.send(&ControlFrame::RoundReceived { round: 0 });
        }),
        deed("closes after the state", "broke", |target| {
            take_to_the_state(target);
        }),
        deed(
            "gives up after the state",
            "the target gave up: no",
            |target| {
                let taken = take_to_the_state(target);
                taken.send(&ControlFrame::Abort {
                    reason: "no".to_owned(),
                });
                wait_for_end(&taken);
            },
        ),
        deed("runs it without a commit", "runs out of turn", |target| {
            let taken = take_to_the_state(target);
            taken.send(&ControlFrame::Runs {
                committed_at: now(),
                first_instruction_at: now(),
            });
            wait_for_end(&taken);
        }),
    ]
}

fn take_to_the_state(target: &FakeTarget) -> Taken {
    let taken = target.take();
    taken.accept();
    taken.rehearsed();
    taken.receive();
    taken
}

/// Targets that become silent; each takes the source ten seconds to believe.
fn silent_deeds() -> Vec<Deed> {
    vec![
        deed("says nothing to the start", "silent for 10 s", |target| {
            let taken = target.take();
            wait_for_end(&taken);
        }),
        deed("says half a frame", "silent for 10 s", |target| {
            let taken = target.take();
            let bytes = ACCEPT.encode();
            write(&taken.control, &bytes[..bytes.len() / 2]);
            wait_for_end(&taken);
        }),
        deed("says nothing to the pages", "silent for 10 s", |target| {
            let taken = target.take();
            taken.accept();
            taken.rehearsed();
            wait_for_end(&taken);
        }),
        deed("says nothing to the state", "silent for 10 s", |target| {
            let taken = take_to_the_state(target);
            wait_for_end(&taken);
        }),
        deed("does not read the pages", "silent for 10 s", |target| {
            let control = target.accept_control();
            let Some(ControlFrame::Start(start)) = read(&control) else {
                panic!("expected start")
            };
            // The streams stay open and nobody reads them.
            let _streams: Vec<(limosa_engine::wire::Preamble, TcpStream)> =
                (0..start.streams).map(|_| target.accept()).collect();
            send(&control, &ACCEPT);
            loop {
                match read(&control) {
                    Some(ControlFrame::ClockProbe { number }) => {
                        send(&control, &ControlFrame::ClockEcho { number, now: now() });
                    }
                    Some(ControlFrame::Rehearsal { .. }) => {
                        send(
                            &control,
                            &ControlFrame::Rehearsed {
                                load: Duration::from_millis(1),
                            },
                        );
                    }
                    Some(_) => {}
                    None => return,
                }
            }
        }),
    ]
}

#[test]
fn a_source_outlives_bad_targets() {
    if !has_kvm() {
        return;
    }
    let pair = Pair::start();
    let before = Resources::of(&pair.a);
    pair.boot(guest::writer(VM, "ws=8M rate=5000 touch=2M"));
    let silent = silent_deeds();
    for index in 0..silent.len() {
        // Enough pages to fill every buffer on the way to a target that does not read.
        guest::boot(
            &pair.a,
            &guest::writer(&format!("silent-{index}"), "ws=2M rate=1000 touch=40M"),
        );
    }
    thread::scope(|scope| {
        for (index, deed) in silent.iter().enumerate() {
            let source = &pair.a;
            scope.spawn(move || carry_out(deed, source, &format!("silent-{index}"), Mode::PreCopy));
        }
        for deed in deeds_at_the_door().iter().chain(&deeds_inside()) {
            carry_out(deed, &pair.a, VM, Mode::PreCopy);
        }
        for deed in deeds_at_the_door() {
            carry_out(&deed, &pair.a, VM, Mode::StopAndCopy);
        }
    });
    for index in 0..silent.len() {
        let name = format!("silent-{index}");
        guest::assert_whole(&pair.a, &name);
        pair.a.client().stop(&name, false).expect("it runs here");
    }
    let turns = pair.beats.assert_one_at_a_time();
    assert_eq!(turns.len(), 1, "{turns:#?}");
    guest::assert_whole(&pair.a, VM);
    move_whole(VM, &pair.a, &pair.b, Mode::PreCopy);
    before.assert_not_grown(&pair.a);
}

/// Lets a played target take a migration, and checks that it fails and the guest works on.
fn carry_out(deed: &Deed, source: &Daemon, name: &str, mode: Mode) {
    let target = FakeTarget::listen();
    let mut request = MigrateBody::new(target.address(), mode);
    request.rounds_max = Some(1);
    let id = source.client().migrate(name, &request).expect("accepted");
    let report = thread::scope(|scope| {
        let played = scope.spawn(|| (deed.run)(&target));
        let report = end(source, &id);
        assert!(
            played.join().is_ok(),
            "{}: the played target came to nothing: {report:?}",
            deed.name
        );
        report
    });
    let reason = assert_failed(&report);
    println!("{} ({mode}): {reason}", deed.name);
    assert!(reason.contains(deed.expect), "{}: {reason:?}", deed.name);
    assert!(
        !reason.contains(char::is_control),
        "{}: {reason:?}",
        deed.name
    );
    guest::assert_works(source, name);
}

/// After the commit the source holds its guest until it has a clear answer, whatever else it hears.
#[test]
fn only_a_clear_answer_brings_the_guest_back() {
    if !has_kvm() {
        return;
    }
    let _place = Places::one();
    let pair = Pair::start();
    pair.boot_small();
    let target = FakeTarget::listen();
    let (id, attempt) = commit_to(&target, &pair.a);
    for answer in [
        ACCEPT.encode(),
        ControlFrame::Refuse {
            reason: "ask somebody else".to_owned(),
        }
        .encode(),
        vec![0xff; 40],
        Vec::new(),
    ] {
        let question = asked(&target, attempt);
        write(&question, &answer);
        drop(question);
        let info = until_stage(&pair.a, &id, &[Stage::Unresolved]);
        assert_eq!(info.report.outcome, None, "{info:?}");
        assert_eq!(
            pair.a.client().vm(VM).expect("it is listed").state,
            VmState::Unresolved
        );
    }
    send(
        &asked(&target, attempt),
        &ControlFrame::Resolved(Resolution::Barred),
    );
    assert_failed(&end(&pair.a, &id));
    limosa_e2e::pair::assert_back_home(&pair, limosa_e2e::points::Manner::Of(Mode::PreCopy));
}

/// Has a source commit its guest to a played target, which then closes everything.
fn commit_to(target: &FakeTarget, source: &Daemon) -> (String, MigrationId) {
    let request = MigrateBody::new(target.address(), Mode::StopAndCopy);
    let id = source.client().migrate(VM, &request).expect("accepted");
    let taken = take_to_the_state(target);
    taken.prepare();
    (id, taken.id)
}

/// The next question of the source about the outcome.
fn asked(target: &FakeTarget, attempt: MigrationId) -> TcpStream {
    let (preamble, question) = target.accept();
    let asked = (preamble.migration, preamble.role);
    assert_eq!(asked, (attempt, Role::Resolve));
    assert_eq!(read(&question), Some(ControlFrame::Resolve));
    question
}

/// A target that says that the guest runs is believed, and what else it says harms nobody.
#[test]
fn impossible_numbers_are_reported_and_harm_nobody() {
    if !has_kvm() {
        return;
    }
    let _place = Places::one();
    let pair = Pair::start();
    for (received_at, loaded_at, runs_at) in [
        (u64::MAX, 0, u64::MAX),
        (0, u64::MAX, 0),
        (u64::MAX, u64::MAX, u64::MAX),
    ] {
        let at = Timestamp::from_nanos;
        pair.boot_small();
        let target = FakeTarget::listen();
        let mut request = MigrateBody::new(target.address(), Mode::PreCopy);
        (request.rounds_max, request.verify) = (Some(1), true);
        let id = pair.a.client().migrate(VM, &request).expect("accepted");
        let taken = target.take();
        taken.send(&ACCEPT);
        // Clocks that are centuries apart.
        let Some(ControlFrame::Rehearsal { .. }) = taken.read_with_clock(|| at(runs_at)) else {
            panic!("expected a rehearsal")
        };
        taken.send(&ControlFrame::Rehearsed {
            load: Duration::MAX,
        });
        taken.receive();
        taken.send(&ControlFrame::Prepared {
            received_at: at(received_at),
            loaded_at: at(loaded_at),
        });
        assert_eq!(taken.read(), Some(ControlFrame::Commit));
        taken.send(&ControlFrame::Runs {
            committed_at: at(runs_at),
            first_instruction_at: at(runs_at),
        });
        let (memory, pages, state) = (u128::MAX, PageCount::new(u64::MAX), 0);
        taken.send(&ControlFrame::Verified(Digest {
            memory,
            pages,
            state,
        }));
        assert_eq!(taken.read(), Some(ControlFrame::Done));
        check_impossible(&end(&pair.a, &id));
        limosa_e2e::pair::assert_gone(VM, &pair.a);
        pair.beats.clear();
    }
    pair.boot_small();
    move_whole(VM, &pair.a, &pair.b, Mode::PreCopy);
}

/// The guest has gone, and the report says that what arrived is not what was sent.
fn check_impossible(report: &Report) {
    assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
    assert_eq!(report.digest_equal, Some(false), "{report:?}");
    if let Some(downtime) = report.downtime_ms {
        assert!(
            downtime.total.is_finite() && downtime.total >= 0.0,
            "{report:?}"
        );
    }
}
