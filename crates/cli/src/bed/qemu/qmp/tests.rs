//! The client against a socket at whose other end a thread plays QEMU.

use super::*;
use std::io::{BufRead, BufReader};
use std::thread::{self, JoinHandle};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10},
    "package": "Some 1:10"}, "capabilities": ["oob"]}}"#;

/// Plays these answers, one for each line that comes; then hangs up.
fn peer(answers: &[&str]) -> (UnixStream, JoinHandle<Vec<String>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let answers: Vec<String> = answers.iter().map(|text| (*text).to_owned()).collect();
    let thread = thread::spawn(move || {
        let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
        let mut stream = theirs;
        writeln!(stream, "{}", GREETING.replace('\n', "")).unwrap();
        let mut heard = Vec::new();
        for answer in std::iter::once("{\"return\": {}}".to_owned()).chain(answers) {
            heard.extend(lines.next().map(Result::unwrap));
            writeln!(stream, "{answer}").unwrap();
        }
        heard
    });
    (ours, thread)
}

const STOP: &str = r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 250}}"#;

#[test]
fn commands_are_answered_and_events_between_are_kept() {
    let both = format!("{STOP}\n\n{}", r#"{"return": {"status": "active"}}"#);
    let (stream, thread) = peer(&[
        &both,
        r#"{"error": {"class": "X", "desc": "no such thing"}}"#,
    ]);
    let mut qmp = Qmp::start(stream).unwrap();
    assert_eq!(qmp.version, "10.0.2 (Some 1:10)");
    let answer = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(answer["status"], "active");
    let event = qmp.event(Duration::ZERO).unwrap().unwrap();
    assert_eq!((event.name.as_str(), event.status), ("STOP", None));
    let refused = qmp.execute("frobnicate", json!({"a": 1})).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "QEMU refused frobnicate: no such thing"
    );
    let heard = thread.join().unwrap();
    assert_eq!(heard[2], r#"{"arguments":{"a":1},"execute":"frobnicate"}"#);
}

fn check(answer: &str, expect: &str) {
    let (stream, thread) = peer(&[answer]);
    let mut qmp = Qmp::start(stream).unwrap();
    let error = qmp.execute("cont", json!({})).unwrap_err();
    assert_eq!(error.to_string(), expect, "{answer}");
    thread.join().unwrap();
}

#[test]
fn garbage_and_a_closed_socket_are_errors() {
    let garbage = |line: &str| format!("QEMU sent what is no line of its protocol: {line}");
    check("hello", &garbage("hello\n"));
    check("[1, 2]", &garbage("[1, 2]\n"));
    check("{\"odd\": 1}", &garbage("{\"odd\":1}"));
    check(r#"{"event": "STOP"}"#, &garbage(r#"{"event":"STOP"}"#));
    let (stream, thread) = peer(&[]);
    let mut qmp = Qmp::start(stream).unwrap();
    thread.join().unwrap();
    let error = qmp.event(Duration::from_secs(5)).unwrap_err();
    assert!(matches!(error, QmpError::Closed), "{error}");
}

#[test]
fn a_line_without_an_end_is_not_taken_for_ever() {
    let long = "x".repeat(LINE_BYTES_MAX + (64 << 10));
    let (stream, thread) = peer(&[&long]);
    let mut qmp = Qmp::start(stream).unwrap();
    let error = qmp.execute("cont", json!({})).unwrap_err().to_string();
    assert!(error.len() < 200, "{error}");
    drop(qmp);
    drop(thread);
}

#[test]
fn nobody_waits_for_an_event_that_does_not_come() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut qmp = Qmp {
        stream: ours,
        buffer: Vec::new(),
        events: VecDeque::new(),
        version: String::new(),
    };
    assert_eq!(qmp.event(Duration::ZERO).unwrap(), None);
    drop(theirs);
}

#[test]
fn times_of_day_are_laid_on_our_clock() {
    let day = SystemTime::UNIX_EPOCH + Duration::from_millis(2000);
    let now = (day, Timestamp::from_nanos(10_000_000_000));
    let stop: Value = serde_json::from_str(STOP).unwrap();
    let at = event(&stop, now).unwrap().at;
    assert_eq!(at.as_nanos(), 9_000_250_000);
    let text = r#"{"event": "MIGRATION_PASS", "data": {"pass": 2},
        "timestamp": {"seconds": 2, "microseconds": 0}}"#;
    let pass: Value = serde_json::from_str(text).unwrap();
    assert_eq!(event(&pass, now).unwrap().pass, Some(2));
    let odd = json!({"event": "X", "timestamp": {"seconds": u64::MAX, "microseconds": u64::MAX}});
    assert_eq!(event(&odd, now), None);
}

#[test]
fn foreign_bytes_do_not_panic() {
    let sound = format!(
        "{}\n{{\"return\": {{}}}}\n{STOP}\n",
        GREETING.replace('\n', "")
    );
    let mut seed = 11;
    for _ in 0..2000 {
        let mut bytes = sound.clone().into_bytes();
        for _ in 0..4 {
            let number = limosa_lab::schedule::next_random(&mut seed);
            let at = (number >> 16) as usize % bytes.len();
            bytes[at] = number as u8;
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes).unwrap();
        // The answers are all there; what is said to nobody is lost.
        let thread = thread::spawn(move || {
            let mut heard = [0; 256];
            let read = theirs.read(&mut heard);
            drop(theirs);
            read.is_ok()
        });
        if let Ok(mut qmp) = Qmp::start(ours) {
            while let Ok(Some(_)) = qmp.event(Duration::from_secs(1)) {}
        }
        thread.join().unwrap();
    }
}
