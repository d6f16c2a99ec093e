//! Disks and consoles of guests: who may use a disk, and what is typed and shown.

use limosa_e2e::pair::{assert_completed, begin, end};
use limosa_e2e::{Pair, VM, binary, guest, has_kvm, wait};
use limosa_engine::policy::Mode;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

#[test]
fn a_disk_has_one_writer_and_goes_over_with_its_guest() {
    if !has_kvm() {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let kernel = guest::write_echo_kernel(place.path());
    let disk = place.path().join("disk.raw");
    let file = File::create(&disk).expect("a file can be made");
    file.set_len(1 << 20).expect("it can grow");
    let pair = Pair::start();
    let (a, b) = (pair.a.client(), pair.b.client());
    let spec = |name: &str, read_only| guest::echo(name, &kernel, &disk, read_only);
    let refused = |client: &limosa_host::client::Client, read_only| {
        let error = client
            .run(&spec("other", read_only))
            .expect_err("the disk is in use");
        let text = error.to_string();
        assert!(text.contains("in use by another guest"), "{text}");
    };
    a.run(&spec(VM, false)).expect("it runs");
    refused(b, false);
    refused(b, true);
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
            assert_completed(&end(from, &begin(from, to, mode)));
            refused(a, false);
        }
    }
    a.stop(VM, true).expect("it stops");
    // Of readers there may be two, and no writer beside them.
    a.run(&spec("one", true)).expect("it reads");
    b.run(&spec("two", true)).expect("it reads, too");
    refused(a, false);
}

#[test]
fn a_disk_that_the_target_lacks_is_an_error_before_the_guest_is_touched() {
    if !has_kvm() {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let kernel = guest::write_echo_kernel(place.path());
    let disk = place.path().join("disk.raw");
    fs::write(&disk, [0; 4096]).expect("a disk can be written");
    let pair = Pair::start();
    let spec = guest::echo(VM, &kernel, &disk, false);
    pair.a.client().run(&spec).expect("it runs");
    let moved = place.path().join("moved.raw");
    fs::rename(&disk, moved).expect("it can be renamed");
    check_refused(&pair, "disk.raw cannot be used");
}

#[test]
fn a_disk_that_the_target_does_not_lend_stays_where_it_is() {
    if !has_kvm() {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let kernel = guest::write_echo_kernel(place.path());
    // Everything in the directory for temporary files is lent.
    let elsewhere = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let disk = elsewhere.path().join("own.raw");
    fs::write(&disk, [0; 4096]).expect("a disk can be written");
    let pair = Pair::start();
    let spec = guest::echo(VM, &kernel, &disk, false);
    pair.a.client().run(&spec).expect("it runs");
    check_refused(&pair, "own.raw is not lent to guests that arrive");
}

/// The guest cannot move, for that reason, and runs where it was.
fn check_refused(pair: &Pair, why: &str) {
    let report = end(&pair.a, &begin(&pair.a, &pair.b, Mode::PreCopy));
    let text = format!("{report:?}");
    assert!(text.contains(why), "{text}");
    let info = pair.a.client().vm(VM).expect("it is there");
    assert_eq!(info.phase, "running", "{info:?}");
}

#[test]
fn what_is_typed_is_shown_here_and_there() {
    if !has_kvm() {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let kernel = guest::write_echo_kernel(place.path());
    let disk = place.path().join("disk.raw");
    fs::write(&disk, [0; 4096]).expect("a disk can be written");
    let pair = Pair::start();
    let spec = guest::echo(VM, &kernel, &disk, true);
    pair.a.client().run(&spec).expect("it runs");
    talk(&pair.a, "before the move", &[]);
    assert_completed(&end(&pair.a, &begin(&pair.a, &pair.b, Mode::PreCopy)));
    talk(&pair.b, "after it", b"\x1d");
}

/// Types a line, waits until the guest has printed it, and leaves by a key or by closing.
fn talk(daemon: &limosa_e2e::Daemon, line: &str, leave: &[u8]) {
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
