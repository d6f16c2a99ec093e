//! What people type wrongly, and what the program says: one line, the right status, no harm.
//!
//! All lines are in `golden/bad_input.txt`, so that they are read together and a change of one is
//! seen. `LIMOSA_E2E_BLESS=1` writes the file anew.

use limosa_e2e::cases::Places;
use limosa_e2e::peer::target::FakeTarget;
use limosa_e2e::peer::write;
use limosa_e2e::{Daemon, VM, binary, guest, has_kvm};
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

/// Where the lines are kept.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bad_input.txt")
}

/// Names for what differs from run to run, longest first.
struct Names(Vec<(String, &'static str)>);

impl Names {
    fn hide(&self, text: &str) -> String {
        let text = self.0.iter().fold(text.to_owned(), |text, (value, name)| {
            text.replace(value, name)
        });
        let is_id =
            |word: &&str| word.len() == 32 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
        let ids: Vec<&str> = text.split(' ').filter(is_id).collect();
        ids.iter()
            .fold(text.clone(), |text, id| text.replace(id, "$ID"))
    }

    fn show(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, (value, name)| {
            text.replace(name, value)
        })
    }
}

/// Each line is typed as it stands, with the names replaced.
const TYPED: &str = "\
run new --micro $DIR/missing.elf
run new --micro $DIR
run new --micro $DIR/text
run new --micro $DIR/elf32
run new --micro $DIR/cut-off
run new --micro $DIR/other-machine
run new --micro $DIR/low-segment
run new --micro $DIR/high-segment
run new --micro $DIR/nothing
run new --micro reader
run new
run new --kernel $DIR/missing.elf
run new --kernel $DIR
run new --kernel $DIR/text
run new --kernel $DIR/text --initrd $DIR/missing.elf
run new --kernel $DIR/text --micro writer
run new --initrd $DIR/text --micro writer
run new --micro writer --memory 0
run new --micro writer --memory 64K
run new --micro writer --memory 3000001
run new --micro writer --memory 16M --args ws=64M
run new --micro writer --memory 900T
run new --micro writer --memory 4X
run new --micro writer --memory
run new --micro writer --args ws=lots
run new --micro writer --args colour=red
run new --micro writer --args ws=1M,rate=5
run new --micro writer --vcpus 0
run new --micro writer --vcpus 9
run new --micro writer --observer 192.0.2.1:99
run new --micro kv
run new --micro kv --args ip=10.0.0.2
run new --micro kv --args ip=10.0.0.2/24
run new --micro kv --args ip=10.0.0.2/24 --vcpus 2
run new --micro kv --args ip=10.0.0.2/24 --net limosa-none
run new --micro kv --args ip=10.0.0.2/24 --net limosa-none,mac=1
run new --micro kv --disk $DIR/text
run ../new --micro writer
run web --micro idle
migrate web --to $CLOSED
migrate web --to nowhere
migrate web --to 127.0.0.1
migrate web --to 127.0.0.1:0
migrate web --to $SELF
migrate web --to $BROWSER
migrate web --to $TARGET
migrate web --to 192.0.2.1:7070
migrate web --to $TARGET --mode fast
migrate web --to $TARGET --streams 0
migrate web --to $TARGET --streams 17
migrate web --to $TARGET --bandwidth-max 0
migrate web --to $TARGET --rounds-max 0
migrate web --to $TARGET --downtime-max 5
migrate web --to $TARGET --deadline -1s
migrate web
migrate nobody --to $TARGET
inspect nobody
stop nobody
abort nobody
abort web
set web --downtime-max 5ms
set web --streams 17
set web
status 0123456789abcdef0123456789abcdef
status nobody --follow
replay $DIR/text
replay $DIR/missing.journal
list --state-dir $DIR/empty
migrate web --to $TARGET --state-dir $DIR/empty
fly web
host --listen 0.0.0.0:0 --state-dir $DIR/other
host --listen 127.0.0.1 --state-dir $DIR/other
host --listen $TARGET --state-dir $DIR/other
host --listen 127.0.0.1:0 --state-dir $STATE
host --listen 127.0.0.1:0 --state-dir $DIR/text
host --listen 127.0.0.1:0 --state-dir $DIR/other --tls $DIR/empty
host --listen 0.0.0.0:0 --state-dir $DIR/other --tls $DIR --insecure
cert ca --dir $DIR/empty --days 0
cert ca --dir $DIR/text
cert host a --ca $DIR/empty --out $DIR/empty
cert host a:7070 --ca $DIR/empty --out $DIR/empty
cert host --ca $DIR/empty --out $DIR/empty
";

#[test]
fn wrong_input_is_answered_with_one_line() {
    if !has_kvm() {
        return;
    }
    let _place = Places::one();
    let (source, target) = (Daemon::start(), Daemon::start());
    guest::boot(&source, &guest::writer(VM, "ws=1M rate=1000"));
    // The name is taken at the target.
    guest::boot(&target, &guest::writer(VM, "ws=1M rate=1000"));
    let directory = tempfile::tempdir().expect("a temporary directory");
    make_files(directory.path());
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let browser = FakeTarget::listen();
    let names = Names(vec![
        (source.state_dir().display().to_string(), "$STATE"),
        (directory.path().display().to_string(), "$DIR"),
        (source.peer_address().to_owned(), "$SELF"),
        (target.peer_address().to_owned(), "$TARGET"),
        (browser.address(), "$BROWSER"),
        (closed.expect("a port").to_string(), "$CLOSED"),
        (format!("process {}", source.pid()), "process $PID"),
    ]);
    let mut text = String::new();
    let mut faults = Vec::new();
    for line in TYPED.lines() {
        let output = thread::scope(|scope| {
            if line.contains("$BROWSER") {
                scope.spawn(|| answer_like_a_browser(&browser));
            }
            run(&names.show(line), &source)
        });
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let status = output.status.code();
        faults.extend(look_at(line, &said, status, &output.stdout));
        let status = status.map_or("none".to_owned(), |status| status.to_string());
        write!(
            text,
            "$ limosa {line}\n{status} {}\n",
            names.hide(said.trim_end())
        )
        .expect("a string");
    }
    for daemon in [&source, &target] {
        guest::assert_works(daemon, VM);
        guest::assert_whole(daemon, VM);
    }
    compare(&text);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn run(line: &str, daemon: &Daemon) -> Output {
    let mut command = Command::new(binary::limosa());
    command
        .args(line.split(' '))
        .env_remove("LIMOSA_STATE_DIR")
        .env_remove("RUST_LOG")
        .env("NO_COLOR", "1");
    if !line.contains("--state-dir") {
        command.arg("--state-dir").arg(daemon.state_dir());
    }
    command.output().expect("the binary can be started")
}

/// What is wrong about an answer, whatever it says.
fn look_at(line: &str, said: &str, status: Option<i32>, stdout: &[u8]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut fault = |what: String| faults.push(format!("limosa {line}: {what}"));
    if !matches!(status, Some(1 | 2)) {
        fault(format!("status {status:?}"));
    }
    let lines = said.lines().count();
    if lines != 1 || !said.ends_with('\n') {
        fault(format!("{lines} lines on stderr:\n{said}"));
    }
    if !said.starts_with("error: ") || said.len() < 20 {
        fault(format!("this is no clear line: {said}"));
    }
    if said.contains("panicked") || said.contains("RUST_BACKTRACE") {
        fault("it panicked".to_owned());
    }
    if said.trim_end().contains(char::is_control) {
        fault(format!("control characters: {said:?}"));
    }
    if !stdout.is_empty() {
        fault(format!(
            "something on stdout: {}",
            String::from_utf8_lossy(stdout)
        ));
    }
    faults
}

fn compare(text: &str) {
    let path = golden();
    if std::env::var_os("LIMOSA_E2E_BLESS").is_some() {
        fs::write(&path, text).expect("the sources can be written");
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    let differences: Vec<String> = text
        .lines()
        .filter(|line| !golden.lines().any(|known| known == *line))
        .map(|line| format!("new: {line}"))
        .chain(
            golden
                .lines()
                .filter(|known| !text.lines().any(|line| line == *known))
                .map(|known| format!("old: {known}")),
        )
        .collect();
    assert!(
        golden == text,
        "{} differs; LIMOSA_E2E_BLESS=1 writes it anew\n{}",
        path.display(),
        differences.join("\n")
    );
}

fn answer_like_a_browser(target: &FakeTarget) {
    let control = target.accept_control();
    write(
        &control,
        b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n",
    );
}

fn make_files(directory: &Path) {
    let file =
        |name: &str, bytes: &[u8]| fs::write(directory.join(name), bytes).expect("our directory");
    let memory = 256 << 20;
    file("text", b"#!/bin/sh\necho this is no guest\n");
    let mut elf = elf(0x20_0000);
    file("cut-off", &elf[..100]);
    elf[4] = 1;
    file("elf32", &elf);
    elf[4] = 2;
    elf[18] = 183;
    file("other-machine", &elf);
    file("low-segment", &self::elf(0x1000));
    file("high-segment", &self::elf(memory));
    file("nothing", b"");
    fs::create_dir(directory.join("empty")).expect("our directory");
}

/// A sound ELF of one segment with two instructions, loaded at `address`.
fn elf(address: u64) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend_from_slice(&2u16.to_le_bytes()); // an executable
    bytes.extend_from_slice(&62u16.to_le_bytes()); // x86-64
    bytes.extend_from_slice(&1u32.to_le_bytes());
    for word in [address, 64, 0] {
        bytes.extend_from_slice(&word.to_le_bytes()); // entry, program headers, sections
    }
    bytes.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes()); // sizes and counts of headers
    }
    bytes.extend_from_slice(&1u32.to_le_bytes()); // to be loaded
    bytes.extend_from_slice(&5u32.to_le_bytes()); // read and execute
    for word in [120, address, address, 2, 2, 1] {
        bytes.extend_from_slice(&u64::to_le_bytes(word)); // where in the file and in memory
    }
    bytes.extend_from_slice(&[0xeb, 0xfe]); // a loop without end
    bytes
}
