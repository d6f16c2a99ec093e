//! Sources that break the rules, against a real target.
//!
//! Whatever comes over the network, the daemon lives, its guests live, nothing of an attempt is
//! left, and memory, threads and descriptors return to what they were. What it says to the peer is
//! one line that names what was wrong.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{
    assert_completed, assert_gone, assert_is_at, body, end, move_whole, until_stage,
};
use limosa_e2e::peer::source::RawSource;
use limosa_e2e::peer::target::{FakeTarget, Recording};
use limosa_e2e::peer::{connect, dial, fresh_id, goodbye, now, read, send, write};
use limosa_e2e::resources::Resources;
use limosa_e2e::{Daemon, Pair, VM, guest, has_kvm, wait};
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_engine::wire::{
    CONTROL_FRAME_BYTES_MAX, Coding, ControlFrame, Preamble, PushHeader, Role, STREAMS_MAX, Start,
};
use limosa_host::api::{LimitsPatch, MigrateBody};
use limosa_pages::{PageCount, PageRange, Pfn};
use std::fmt;
use std::net::TcpStream;

const MIB: u64 = 1 << 20;

/// A daemon, and the migration of a guest to it as a sound source would send it.
struct Scene<'a> {
    target: &'a Daemon,
    recording: &'a Recording,
}

impl Scene<'_> {
    fn address(&self) -> &str {
        self.target.peer_address()
    }

    fn start(&self) -> Start {
        self.recording.start.clone()
    }

    /// A description that describes nothing.
    fn nonsense(&self) -> ControlFrame {
        let vm = b"nonsense".to_vec();
        ControlFrame::Start(Start { vm, ..self.start() })
    }

    /// A control connection on which only the preamble was sent.
    fn control(&self) -> TcpStream {
        dial(self.address(), fresh_id(), Role::Control)
    }

    /// A source that was accepted.
    fn accepted(&self) -> RawSource {
        RawSource::accepted(self.address(), &self.recording.start)
    }
}

/// What a bad source does; it ends with what the target said at last.
struct Deed {
    name: &'static str,
    run: fn(&Scene<'_>) -> String,
    /// What the target is to say; nothing where it just closes.
    expect: &'static str,
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const fn deed(name: &'static str, expect: &'static str, run: fn(&Scene<'_>) -> String) -> Deed {
    Deed { name, run, expect }
}

/// Before a migration begins.
// tidy: long-function because it is one table, a row a deed
fn deeds_at_the_door() -> Vec<Deed> {
    vec![
        deed("a browser", "does not speak the limosa protocol", |scene| {
            let stream = connect(scene.address());
            write(
                &stream,
                b"GET / HTTP/1.1\r\nhost: limosa\r\nuser-agent: none\r\n\r\n",
            );
            goodbye(&stream)
        }),
        deed("another version", "protocol version 9", |scene| {
            let mut bytes = Preamble {
                migration: fresh_id(),
                role: Role::Control,
                generation: 1,
            }
            .encode();
            bytes[8] = 9;
            let stream = connect(scene.address());
            write(&stream, &bytes);
            goodbye(&stream)
        }),
        deed("an unknown role", "unknown role 7", |scene| {
            let mut bytes = Preamble {
                migration: fresh_id(),
                role: Role::Control,
                generation: 1,
            }
            .encode();
            bytes[10] = 7;
            let stream = connect(scene.address());
            write(&stream, &bytes);
            goodbye(&stream)
        }),
        deed("half a preamble and gone", "", |scene| {
            let stream = connect(scene.address());
            write(&stream, b"LIMOSA\r\n\x01");
            String::new()
        }),
        deed("pages for an unknown migration", "", |scene| {
            let stream = dial(scene.address(), fresh_id(), Role::Push(0));
            write(
                &stream,
                &PushHeader::Barrier {
                    round: 0,
                    streams: 1,
                }
                .encode(),
            );
            goodbye(&stream)
        }),
        deed("a question that is none", "", |scene| {
            let stream = dial(scene.address(), fresh_id(), Role::Resolve);
            write(&stream, &[0xff; 64]);
            goodbye(&stream)
        }),
        deed("a preflight that begins otherwise", "", |scene| {
            let stream = dial(scene.address(), fresh_id(), Role::Preflight);
            send(&stream, &ControlFrame::Commit);
            goodbye(&stream)
        }),
        deed(
            "a preflight of no machine",
            "no description of a machine",
            |scene| {
                let stream = dial(scene.address(), fresh_id(), Role::Preflight);
                send(&stream, &scene.nonsense());
                match read(&stream) {
                    Some(ControlFrame::Differences(all)) => all.join("; "),
                    answer => panic!("{answer:?}"),
                }
            },
        ),
        deed("a preflight that promises and leaves", "", |scene| {
            let stream = dial(scene.address(), fresh_id(), Role::Preflight);
            send(&stream, &scene.nonsense());
            read(&stream).expect("an answer");
            send(&stream, &ControlFrame::Probe { bytes: 1 << 20 });
            write(&stream, &[0; 1000]);
            String::new()
        }),
        deed(
            "an id that was asked about before",
            "begun before",
            |scene| {
                let id = fresh_id();
                let question = dial(scene.address(), id, Role::Resolve);
                send(&question, &ControlFrame::Resolve);
                assert_eq!(
                    read(&question),
                    Some(ControlFrame::Resolved(Resolution::Barred))
                );
                refused_begin(scene, id)
            },
        ),
        deed("a frame of 4 GiB", "a frame of 4294967295 bytes", |scene| {
            let stream = scene.control();
            write(&stream, &[0xff; 4]);
            goodbye(&stream)
        }),
        deed("a frame of nothing", "malformed", |scene| {
            let stream = scene.control();
            write(&stream, &[0; 4]);
            goodbye(&stream)
        }),
        deed("a frame that is none", "malformed", |scene| {
            let stream = scene.control();
            write(&stream, &[3, 0, 0, 0, 0xee, 0xee, 0xee]);
            goodbye(&stream)
        }),
        deed("commit before anything", "commit out of turn", |scene| {
            let stream = scene.control();
            send(&stream, &ControlFrame::Commit);
            goodbye(&stream)
        }),
        deed("no streams", "malformed", |scene| {
            start_with(scene, |start| start.streams = 0)
        }),
        deed("too many streams", "malformed", |scene| {
            start_with(scene, |start| start.streams = STREAMS_MAX + 1)
        }),
        deed("a machine that is none", "", |scene| {
            let reason = start_with(scene, |start| start.vm = b"what is this".to_vec());
            assert!(reason.len() > 10, "{reason:?}");
            String::new()
        }),
        deed("a machine of 3 MiB", "", |scene| {
            let reason = start_with(scene, |start| start.vm = vec![0x55; 3 << 20]);
            assert!(reason.len() > 10, "{reason:?}");
            String::new()
        }),
        deed("half a record", "is malformed", |scene| {
            start_with(scene, |start| start.demanded = vec![1; 12])
        }),
        deed("a record of a page twice", "is malformed", |scene| {
            start_with(scene, |start| {
                start.demanded = [7, 0, 0, 0, 1, 0, 0, 0].repeat(2)
            })
        }),
        deed("a record of other memory", "is malformed", |scene| {
            start_with(scene, |start| start.demanded = vec![0xff; 8])
        }),
        deed("a record without an end", "is malformed", |scene| {
            let run = |page: u32| [page.to_le_bytes(), 1u32.to_le_bytes()].concat();
            start_with(scene, |start| {
                start.demanded = (0..70_000).flat_map(run).collect()
            })
        }),
        deed("memory that differs", "memory", |scene| {
            start_with(scene, |start| start.memory_pages = PageCount::new(u64::MAX))
        }),
    ]
}

/// Peers that say too little; each takes the target five seconds to believe.
fn silent_deeds_at_the_door() -> Vec<Deed> {
    vec![
        deed("half a preamble and silence", "", |scene| {
            let stream = connect(scene.address());
            write(&stream, b"LIMOSA\r\n\x01");
            goodbye(&stream);
            String::new()
        }),
        deed("nothing at all", "", |scene| {
            goodbye(&connect(scene.address()));
            String::new()
        }),
        deed("half a frame and silence", "", |scene| {
            let stream = scene.control();
            let bytes = ControlFrame::Start(scene.start()).encode();
            write(&stream, &bytes[..bytes.len() / 2]);
            goodbye(&stream);
            String::new()
        }),
    ]
}

/// Sends a start that was changed and waits for the refusal.
fn start_with(scene: &Scene<'_>, change: impl Fn(&mut Start)) -> String {
    let mut start = scene.start();
    change(&mut start);
    let stream = scene.control();
    send(&stream, &ControlFrame::Start(start));
    goodbye(&stream)
}

/// Tries to begin an attempt whose id is taken.
fn refused_begin(scene: &Scene<'_>, id: MigrationId) -> String {
    let stream = dial(scene.address(), id, Role::Control);
    goodbye(&stream)
}

/// Once the target has made its VM.
// tidy: long-function because it is one table, a row a deed
fn deeds_inside() -> Vec<Deed> {
    vec![
        deed("the same id twice", "", |scene| {
            let source = scene.accepted();
            let reason = refused_begin(scene, source.id);
            assert!(reason.contains("begun before"), "{reason:?}");
            // The first is not disturbed.
            source.send(&ControlFrame::Rehearsal {
                state: scene.recording.rehearsal.clone(),
            });
            assert!(matches!(
                source.read(),
                Some(ControlFrame::Rehearsed { .. })
            ));
            source.send(&ControlFrame::Abort {
                reason: "enough".to_owned(),
            });
            goodbye(&source.control)
        }),
        deed(
            "pages behind the memory",
            "outside the guest's memory",
            |scene| {
                let first = Pfn::new(scene.recording.start.memory_pages.get() - 1);
                push(
                    scene,
                    &PushHeader::Pages(PageRange::new(first, PageCount::new(2))).encode(),
                )
            },
        ),
        deed(
            "pages at the end of numbers",
            "outside the guest's memory",
            |scene| {
                push(
                    scene,
                    &PushHeader::Zeros(PageRange::new(Pfn::new(u64::MAX), PageCount::new(9)))
                        .encode(),
                )
            },
        ),
        deed("too many pages at once", "too many pages", |scene| {
            push(
                scene,
                &PushHeader::Pages(PageRange::new(Pfn::new(0), PageCount::new(257))).encode(),
            )
        }),
        deed("no pages", "outside the guest's memory", |scene| {
            push(
                scene,
                &PushHeader::Zeros(PageRange::new(Pfn::new(0), PageCount::new(0))).encode(),
            )
        }),
        deed("coded pages of no length", "no such length", |scene| {
            push(scene, &coded(Coding::Lz4, 0, &[]))
        }),
        deed("coded pages longer than pages", "no such length", |scene| {
            push(scene, &coded(Coding::Lz4, 4097, &[]))
        }),
        deed("a block that is none", "cannot be read", |scene| {
            push(scene, &coded(Coding::Lz4, 100, &[0xff; 100]))
        }),
        deed("a block of half a page", "another length", |scene| {
            // A token of fifteen literals and 241 more of them, and nothing to copy.
            let block = [&[0xf0, 226][..], &[3; 241]].concat();
            push(scene, &coded(Coding::Lz4, 243, &block))
        }),
        deed("a frame that is none", "cannot be read", |scene| {
            push(scene, &coded(Coding::Zstd, 100, &[0xff; 100]))
        }),
        deed("a frame of half a page", "another length", |scene| {
            // The magic, one segment of a length in two bytes (minus 256), and a last block of one
            // byte 2048 times.
            let frame = [
                0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x07, 0x03, 0x40, 0x00, 9,
            ];
            push(scene, &coded(Coding::Zstd, 11, &frame))
        }),
        deed(
            "a frame of more pages than announced",
            "cannot be read",
            |scene| {
                // A length in eight bytes: 4 GiB, of which it has the same block.
                let frame = [
                    0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 1, 0, 0, 0, 0x03, 0x40, 0x00, 9,
                ];
                push(scene, &coded(Coding::Zstd, 17, &frame))
            },
        ),
        deed("a difference beyond the page", "another length", |scene| {
            push(scene, &coded(Coding::Delta, 7, &[5, 0, 0xff, 31, 2, 1, 1]))
        }),
        deed("a difference cut short", "cannot be read", |scene| {
            push(scene, &coded(Coding::Delta, 4, &[9, 0, 0, 7]))
        }),
        deed("a header of unknown kind", "unknown kind", |scene| {
            let mut header = PushHeader::Barrier {
                round: 0,
                streams: 1,
            }
            .encode();
            header[0] = 9;
            push(scene, &header)
        }),
        deed("a header with stray bits", "reserved", |scene| {
            let mut header = PushHeader::Barrier {
                round: 0,
                streams: 1,
            }
            .encode();
            header[2] = 1;
            push(scene, &header)
        }),
        deed("a barrier out of order", "do not follow", |scene| {
            push(
                scene,
                &PushHeader::Barrier {
                    round: 3,
                    streams: 1,
                }
                .encode(),
            )
        }),
        deed(
            "a barrier beyond all rounds",
            "round out of range",
            |scene| {
                let mut header = PushHeader::Barrier {
                    round: 0,
                    streams: 1,
                }
                .encode();
                header[15] = 1;
                push(scene, &header)
            },
        ),
        deed("half a page and gone", "", |scene| {
            let source = scene.accepted();
            source.push(
                0,
                &PushHeader::Pages(PageRange::new(Pfn::new(0), PageCount::new(4))).encode(),
            );
            source.push(0, &[7; 5000]);
            drop(source);
            String::new()
        }),
        deed("a commit before the state", "commit out of turn", |scene| {
            say(scene, &ControlFrame::Commit)
        }),
        deed("a frame of the target", "runs out of turn", |scene| {
            say(
                scene,
                &ControlFrame::Runs {
                    committed_at: now(),
                    first_instruction_at: now(),
                },
            )
        }),
        deed("a second start", "start out of turn", |scene| {
            say(scene, &ControlFrame::Start(scene.start()))
        }),
        deed("a rehearsal of garbage", "", |scene| {
            let reason = say(
                scene,
                &ControlFrame::Rehearsal {
                    state: vec![0x5a; 10_000],
                },
            );
            assert!(reason.len() > 10, "{reason:?}");
            String::new()
        }),
        deed("a rehearsal of nothing", "", |scene| {
            let reason = say(scene, &ControlFrame::Rehearsal { state: Vec::new() });
            assert!(reason.len() > 10, "{reason:?}");
            String::new()
        }),
        deed("a rehearsal with one bit changed", "", |scene| {
            let mut state = scene.recording.rehearsal.clone();
            let middle = state.len() / 2;
            state[middle] ^= 0x10;
            let reason = say(scene, &ControlFrame::Rehearsal { state });
            assert!(reason.len() > 10, "{reason:?}");
            String::new()
        }),
        deed("a state cut off", "", |scene| {
            let source = sent_pages(scene);
            let mut state = scene.recording.state.clone();
            state.truncate(state.len() - 1);
            let round = scene.recording.round;
            source.send(&ControlFrame::State {
                round,
                stopped_at: now(),
                state,
                missing: PageCount::ZERO,
            });
            let reason = goodbye(&source.control);
            assert!(reason.len() > 10, "{reason:?}");
            String::new()
        }),
        deed(
            "a frame of 4 GiB inside",
            "a frame of 4294967295 bytes",
            |scene| {
                let source = scene.accepted();
                write(&source.control, &[0xff; 4]);
                goodbye(&source.control)
            },
        ),
        deed("the largest frame, announced only", "", |scene| {
            let source = scene.accepted();
            let before = Resources::of(scene.target).anonymous_bytes;
            let length = u32::try_from(CONTROL_FRAME_BYTES_MAX).expect("4 MiB");
            write(&source.control, &length.to_le_bytes());
            write(&source.control, &[0; 1000]);
            let after = Resources::of(scene.target).anonymous_bytes;
            assert!(after < before + 2 * MIB, "{before} bytes, then {after}");
            drop(source);
            String::new()
        }),
    ]
}

/// The first page in a coding, said to take `length` bytes.
fn coded(coding: Coding, length: u32, bytes: &[u8]) -> Vec<u8> {
    let range = PageRange::new(Pfn::new(0), PageCount::new(1));
    let header = PushHeader::Coded { range, coding }.encode();
    [&header[..], &length.to_le_bytes(), bytes].concat()
}

/// Writes to the first push stream of an accepted migration and waits for the end.
fn push(scene: &Scene<'_>, bytes: &[u8]) -> String {
    let source = scene.accepted();
    source.push(0, bytes);
    goodbye(&source.control)
}

/// Sends a frame on an accepted migration and waits for the end.
fn say(scene: &Scene<'_>, frame: &ControlFrame) -> String {
    let source = scene.accepted();
    source.send(frame);
    goodbye(&source.control)
}

/// A source that has done everything right, up to the last barrier.
fn sent_pages(scene: &Scene<'_>) -> RawSource {
    let source = scene.accepted();
    source.send(&ControlFrame::Rehearsal {
        state: scene.recording.rehearsal.clone(),
    });
    assert!(matches!(
        source.read(),
        Some(ControlFrame::Rehearsed { .. })
    ));
    for (index, bytes) in scene.recording.streams.iter().enumerate() {
        source.push(index, bytes);
    }
    source
}

/// Peers that become silent once they were accepted; each takes the target ten seconds to believe.
fn silent_deeds() -> Vec<Deed> {
    vec![
        deed(
            "streams that do not come",
            "page streams did not come",
            |scene| {
                let stream = scene.control();
                send(&stream, &ControlFrame::Start(scene.start()));
                goodbye(&stream)
            },
        ),
        deed("silence after the start", "silent for 10 s", |scene| {
            goodbye(&scene.accepted().control)
        }),
        deed("half a frame after the start", "silent for 10 s", |scene| {
            let source = scene.accepted();
            let bytes = ControlFrame::Rehearsal {
                state: scene.recording.rehearsal.clone(),
            }
            .encode();
            write(&source.control, &bytes[..bytes.len() / 2]);
            goodbye(&source.control)
        }),
    ]
}

#[test]
fn a_target_outlives_bad_sources() {
    if !has_kvm() {
        return;
    }
    let pair = Pair::start();
    let before = Resources::of(&pair.b);
    pair.boot_small();
    let recording = record(&pair.a, VM);
    // The silent ones have names of their own, since they keep them for so long.
    let silent = silent_deeds();
    let recordings: Vec<Recording> = (0..silent.len())
        .map(|index| {
            let name = format!("silent-{index}");
            guest::boot(&pair.a, &guest::writer(&name, "ws=1M rate=1000"));
            record(&pair.a, &name)
        })
        .collect();
    let silent_at_the_door = silent_deeds_at_the_door();
    std::thread::scope(|scope| {
        for (deed, recording) in silent.iter().zip(&recordings) {
            let scene = Scene {
                target: &pair.b,
                recording,
            };
            scope.spawn(move || carry_out(deed, &scene));
        }
        for deed in &silent_at_the_door {
            let scene = Scene {
                target: &pair.b,
                recording: &recording,
            };
            scope.spawn(move || carry_out(deed, &scene));
        }
        let scene = Scene {
            target: &pair.b,
            recording: &recording,
        };
        for deed in deeds_at_the_door().iter().chain(&deeds_inside()) {
            carry_out(deed, &scene);
            wait_until_gone(&pair.b, VM);
        }
    });
    assert_nothing_left(&pair.b);
    before.assert_not_grown(&pair.b);
    assert_is_at(VM, &pair.a, &pair.b);
    move_whole(VM, &pair.a, &pair.b, Mode::PreCopy);
}

fn carry_out(deed: &Deed, scene: &Scene<'_>) {
    let reason = (deed.run)(scene);
    println!("{}: {reason}", deed.name);
    assert!(
        reason.contains(deed.expect),
        "{}: the target said {reason:?}",
        deed.name
    );
    assert!(!reason.contains(['\n', '\r']), "{}: {reason:?}", deed.name);
}

/// Has a real source send a guest to a played target, which gives up at the end.
fn record(source: &Daemon, name: &str) -> Recording {
    let target = FakeTarget::listen();
    let request = MigrateBody::new(target.address(), Mode::StopAndCopy);
    let id = source.client().migrate(name, &request).expect("accepted");
    let recording = target.take().record();
    let report = end(source, &id);
    assert_eq!(report.outcome.as_deref(), Some("failed"), "{report:?}");
    assert_eq!(
        report.reason.as_deref(),
        Some("the target gave up: it is only recorded")
    );
    recording
}

fn wait_until_gone(daemon: &Daemon, name: &str) {
    wait::until_true("the attempt is forgotten", || {
        let vms = daemon.client().vms().expect("a daemon that answers");
        vms.iter().all(|vm| vm.name != name)
    });
}

fn assert_nothing_left(daemon: &Daemon) {
    assert_gone(VM, daemon);
    assert!(daemon.vm_processes().is_empty());
}

/// Everything done right, and then pages that come too late: none of them is installed.
#[test]
fn pages_after_the_last_barrier_are_not_installed() {
    if !has_kvm() {
        return;
    }
    let _place = Places::one();
    let pair = Pair::start();
    guest::boot(&pair.a, &guest::writer(VM, "ws=8M rate=5000"));
    let recording = record(&pair.a, VM);
    let scene = Scene {
        target: &pair.b,
        recording: &recording,
    };
    let source = sent_pages(&scene);
    let (round, state) = (recording.round, recording.state.clone());
    source.send(&ControlFrame::State {
        round,
        stopped_at: recording.stopped_at,
        state,
        missing: PageCount::ZERO,
    });
    assert!(matches!(source.read(), Some(ControlFrame::Prepared { .. })));
    let late = late_pages(&recording);
    source.push(0, &late);
    source.send(&ControlFrame::Commit);
    source.push(1, &late);
    assert!(matches!(source.read(), Some(ControlFrame::Runs { .. })));
    source.push(0, &late);
    source.send(&ControlFrame::Done);
    goodbye(&source.control);
    // There are two of it now, which is the played source's doing; both are whole.
    for daemon in [&pair.a, &pair.b] {
        guest::assert_works(daemon, VM);
        guest::assert_whole(daemon, VM);
    }
}

/// Nonsense for every page from the second MiB on.
fn late_pages(recording: &Recording) -> Vec<u8> {
    let mut bytes = Vec::new();
    for first in (256..recording.start.memory_pages.get().min(256 + 2560)).step_by(256) {
        let range = PageRange::new(Pfn::new(first), PageCount::new(256));
        bytes.extend_from_slice(&PushHeader::Pages(range).encode());
        bytes.resize(bytes.len() + 256 * 4096, 0x66);
    }
    bytes
}

/// A crowd at the door does not touch what is inside, and leaves nothing.
#[test]
fn two_hundred_connections_at_once() {
    if !has_kvm() {
        return;
    }
    let _place = Places::one();
    let pair = Pair::start();
    pair.boot_small();
    let before = Resources::of(&pair.b);
    let mut slow = body(&pair.b, Mode::PreCopy);
    slow.bandwidth_max = Some(2_000_000);
    let id = pair.a.client().migrate(VM, &slow).expect("accepted");
    until_stage(&pair.a, &id, &[Stage::Copying]);
    let address = pair.b.peer_address();
    let crowd: Vec<TcpStream> = (0..200).map(|_| connect(address)).collect();
    let crowded = Resources::of(&pair.b);
    assert!(
        crowded.threads.len() < before.threads.len() + 100,
        "{before:?}, then {crowded:?}"
    );
    assert!(
        crowded.anonymous_bytes < before.anonymous_bytes + 16 * MIB,
        "{before:?}, then {crowded:?}"
    );
    let lifted = LimitsPatch {
        bandwidth_max: Some(0),
        ..LimitsPatch::default()
    };
    pair.a.client().set(&id, &lifted).expect("it runs");
    assert_completed(&end(&pair.a, &id));
    drop(crowd);
    assert_is_at(VM, &pair.b, &pair.a);
    move_whole(VM, &pair.b, &pair.a, Mode::StopAndCopy);
    before.assert_not_grown(&pair.b);
    move_whole(VM, &pair.a, &pair.b, Mode::PreCopy);
}

/// The control stream of a sound migration, cut at many places.
#[test]
fn a_source_that_vanishes_in_the_middle_of_a_frame() {
    if !has_kvm() {
        return;
    }
    let _place = Places::one();
    let pair = Pair::start();
    guest::boot(&pair.a, &guest::writer(VM, "ws=1M rate=1000"));
    let recording = record(&pair.a, VM);
    let scene = Scene {
        target: &pair.b,
        recording: &recording,
    };
    let bytes = ControlFrame::Rehearsal {
        state: recording.rehearsal.clone(),
    }
    .encode();
    for cut in [0, 1, 3, 4, 5, bytes.len() / 2, bytes.len() - 1, bytes.len()] {
        let source = scene.accepted();
        write(&source.control, &bytes[..cut]);
        drop(source);
        assert_gone(VM, &pair.b);
    }
    drop(sent_pages(&scene));
    assert_gone(VM, &pair.b);
    move_whole(VM, &pair.a, &pair.b, Mode::PreCopy);
}
