//! Certificates as their user makes them, and daemons that are given them.
#![allow(clippy::unwrap_used)]

use limosa_host::client::Client;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);

fn limosa(directory: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_limosa"))
        .args(line.split(' '))
        .current_dir(directory)
        .output()
        .unwrap()
}

fn made(directory: &Path, line: &str) -> String {
    let output = limosa(directory, line);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(directory: &Path, line: &str, expect: &str) {
    let output = limosa(directory, line);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{line}: {errors}");
    assert_eq!(errors.trim_end(), format!("error: {expect}"), "{line}");
}

/// Ends with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn three_commands_make_two_hosts_that_believe_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    assert_eq!(
        made(here, "cert ca --dir ca"),
        "ca/ca.pem ca/ca.key, valid for 3650 days\n\
         next, for each host: limosa cert host NAME… --ca ca --out DIR\n"
    );
    assert_eq!(
        made(here, "cert host a.example 127.0.0.1 --ca ca --out a"),
        "a/ca.pem a/host.pem a/host.key, valid for 366 days\n\
         next, on that host: limosa host --tls a\n"
    );
    let answer = made(here, "cert host b --ca ca --out b --days 9 --json");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let expect = serde_json::json!({
        "files": ["b/ca.pem", "b/host.pem", "b/host.key"], "days": 9
    });
    assert_eq!(answer, expect);
    for key in ["ca/ca.key", "a/host.key", "b/host.key"] {
        let mode = fs::metadata(here.join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    refused(
        here,
        "cert ca --dir ca",
        "ca/ca.pem is there already and is not overwritten: remove it, or give another directory",
    );
    refused(
        here,
        "cert host a --ca ca --out a",
        "a/host.pem is there already and is not overwritten: remove it, or give another directory",
    );

    // On every address of the machine, without being told that the network is to be trusted.
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_limosa"));
    daemon
        .args([
            "host",
            "--state-dir",
            "s",
            "--listen",
            "0.0.0.0:0",
            "--tls",
            "a",
        ])
        .current_dir(here)
        .stderr(Stdio::null());
    let _daemon = Daemon(daemon.spawn().unwrap());
    let client = Client::new(here.join("s/host.sock"));
    let end = Instant::now() + PATIENCE;
    let info = loop {
        match client.host() {
            Ok(info) => break info,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    assert!(info.encrypted);
}

#[test]
fn a_daemon_is_not_started_with_what_nobody_would_believe() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    made(here, "cert ca --dir ca");
    made(here, "cert ca --dir other");
    made(here, "cert host a --ca ca --out a");
    made(here, "cert host b --ca ca --out b");
    let start = "host --state-dir s --listen 127.0.0.1:0 --tls a";
    fs::copy(here.join("b/host.key"), here.join("a/host.key")).unwrap();
    refused(here, start, "a/host.key does not belong to a/host.pem");
    fs::copy(here.join("b/host.pem"), here.join("a/host.pem")).unwrap();
    fs::copy(here.join("other/ca.pem"), here.join("a/ca.pem")).unwrap();
    refused(
        here,
        start,
        "a/ca.pem does not vouch for a/host.pem: it was signed by another authority than the one in \
         ca.pem",
    );
    fs::remove_file(here.join("a/host.key")).unwrap();
    refused(
        here,
        start,
        "cannot read a/host.key: No such file or directory (os error 2)",
    );
    assert!(!here.join("s").exists(), "nothing was begun");
}
