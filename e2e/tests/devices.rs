//! Disks and consoles of guests: who may use a disk, and what is typed and shown.

use limosa_e2e::daemon::lent_disks;
use limosa_e2e::hold::Hold;
use limosa_e2e::pair::{assert_completed, assert_failed, begin, end};
use limosa_e2e::{Daemon, Pair, VM, binary, guest, has_kvm, process, wait};
use limosa_engine::policy::Mode;
use limosa_host::api::VmSpec;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

/// Two hosts, and what a guest boots from.
struct Bed {
    pair: Pair,
    kernel: PathBuf,
    place: tempfile::TempDir,
}

impl Bed {
    /// `None` where there is no KVM.
    fn new() -> Option<Self> {
        Self::of(Pair::start)
    }

    fn of(start: impl FnOnce() -> Pair) -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        let place = tempfile::tempdir_in(lent_disks()).expect("a directory");
        Some(Self {
            pair: start(),
            kernel: guest::write_echo_kernel(place.path()),
            place,
        })
    }

    /// A disk where tests have theirs, which all their hosts lend.
    fn disk(&self) -> PathBuf {
        write_disk(self.place.path())
    }

    /// With as many vCPUs as there may be, all but one of which wait to be started.
    fn spec(&self, name: &str, disk: &Path, read_only: bool) -> VmSpec {
        VmSpec {
            vcpus: 16,
            ..guest::echo(name, &self.kernel, disk, read_only)
        }
    }

    /// Runs [`VM`] with that disk on the first host.
    fn run(&self, disk: &Path, read_only: bool) {
        let spec = self.spec(VM, disk, read_only);
        self.pair.a.client().run(&spec).expect("it runs");
    }

    /// The disk is in use on either host.
    fn check_in_use(&self, disk: &Path, read_only: bool) {
        for host in [&self.pair.a, &self.pair.b] {
            let other = self.spec("other", disk, read_only);
            let error = host.client().run(&other).expect_err("the disk is in use");
            let text = error.to_string();
            assert!(text.contains("in use by another guest"), "{text}");
        }
    }

    /// The guest cannot move, for that reason, and runs where it was.
    fn check_refused(&self, why: &str) {
        let Pair { a, b, .. } = &self.pair;
        let report = end(a, &begin(a, b, Mode::PreCopy));
        let text = format!("{report:?}");
        assert!(text.contains(why), "{text}");
        let info = a.client().vm(VM).expect("it is there");
        assert_eq!(info.phase, "running", "{info:?}");
    }
}

fn write_disk(place: &Path) -> PathBuf {
    let disk = place.join("disk.raw");
    fs::write(&disk, [0; 4096]).expect("a disk can be written");
    disk
}

#[test]
fn a_disk_has_one_writer_and_goes_over_with_its_guest() {
    let Some(bed) = Bed::new() else { return };
    let disk = bed.disk();
    bed.run(&disk, false);
    bed.check_in_use(&disk, false);
    bed.check_in_use(&disk, true);
    let Pair { a, b, .. } = &bed.pair;
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        for (from, to) in [(a, b), (b, a)] {
            assert_completed(&end(from, &begin(from, to, mode)));
            bed.check_in_use(&disk, false);
        }
    }
    a.client().stop(VM, true).expect("it stops");
    // Of readers there may be two, and no writer beside them.
    for (host, name) in [(a, "one"), (b, "two")] {
        let reader = bed.spec(name, &disk, true);
        host.client().run(&reader).expect("it reads");
    }
    bed.check_in_use(&disk, false);
}

/// The guest has let go of it to be moved, and has it again when that fails.
#[test]
fn a_disk_comes_back_from_a_move_that_fails() {
    let hold = Hold::new("target.load");
    let Some(mut bed) = Bed::of(|| Pair::start_held(&hold)) else {
        return;
    };
    let disk = bed.disk();
    bed.run(&disk, false);
    let id = begin(&bed.pair.a, &bed.pair.b, Mode::PreCopy);
    hold.wait_until_held();
    bed.pair.b.kill();
    bed.pair
        .b
        .vm_processes()
        .into_iter()
        .for_each(process::kill);
    assert_failed(&end(&bed.pair.a, &id));
    bed.pair.b.restart();
    wait::until_true("the guest runs at home", || {
        let info = bed.pair.a.client().vm(VM);
        info.is_ok_and(|info| info.phase == "running")
    });
    bed.check_in_use(&disk, false);
}

#[test]
fn a_disk_that_the_target_lacks_is_an_error_before_the_guest_is_touched() {
    let Some(bed) = Bed::new() else { return };
    let disk = bed.disk();
    bed.run(&disk, false);
    fs::rename(&disk, bed.place.path().join("moved.raw")).expect("it can be renamed");
    bed.check_refused("disk.raw is not here");
}

#[test]
fn a_disk_that_the_target_does_not_lend_stays_where_it_is() {
    let Some(bed) = Bed::new() else { return };
    let elsewhere = tempfile::tempdir().expect("a directory");
    bed.run(&write_disk(elsewhere.path()), false);
    bed.check_refused("disk.raw is not lent to guests that arrive");
}

#[test]
fn what_is_typed_is_shown_here_and_there() {
    let Some(bed) = Bed::new() else { return };
    bed.run(&bed.disk(), true);
    let Pair { a, b, .. } = &bed.pair;
    talk(a, "before the move", &[]);
    assert_completed(&end(a, &begin(a, b, Mode::PreCopy)));
    talk(b, "after it", b"\x1d");
}

/// Types a line, waits until the guest has printed it, and leaves by a key or is ended.
fn talk(daemon: &Daemon, line: &str, leave: &[u8]) {
    let mut console = Command::new(binary::limosa())
        .arg("--state-dir")
        .arg(daemon.state_dir())
        .args(["console", VM])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("limosa can be started");
    let mut keyboard = console.stdin.take().expect("it is a pipe");
    let mut screen = console.stdout.take().expect("it is a pipe");
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = [0; 256];
        while let Ok(read @ 1..) = screen.read(&mut bytes) {
            if tell.send(bytes[..read].to_vec()).is_err() {
                return;
            }
        }
    });
    keyboard.write_all(line.as_bytes()).expect("it listens");
    let mut shown = Vec::new();
    wait::until_true("the guest prints what was typed", || {
        shown.extend(told.try_iter().flatten());
        String::from_utf8_lossy(&shown).contains(line)
    });
    keyboard.write_all(leave).expect("it listens");
    if leave.is_empty() {
        console.kill().expect("it can be ended");
    }
    let status = console.wait().expect("it ends");
    assert_eq!(status.success(), !leave.is_empty(), "{status}");
}
