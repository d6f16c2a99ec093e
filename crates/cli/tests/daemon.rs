//! The program as its user meets it: a daemon, commands, mistakes, and a daemon that is killed.
//!
//! Every daemon has a state directory of its own, so that tests run side by side. Without
//! `/dev/kvm` what needs a guest prints `skipped`.
#![allow(clippy::unwrap_used)]

use limosa_host::api::CommandKind;
use limosa_host::client::Client;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon on a state directory; both end with the test, and every VM with them.
struct Daemon {
    process: Child,
    dir: tempfile::TempDir,
    /// Where other hosts reach it.
    peer: String,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (process, peer) = spawn(dir.path());
        Self { process, dir, peer }
    }

    /// Kills the daemon without a word and starts another one.
    fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        (self.process, self.peer) = spawn(self.dir.path());
    }

    /// Moves the guest away so that its pages stay here.
    fn migrate_on_demand(&self, to: &Self) {
        let output = self.limosa(&["migrate", "web", "--to", &to.peer, "--mode", "demand"]);
        assert!(output.status.success(), "{}", errors(&output));
        let text = String::from_utf8_lossy(&output.stdout);
        let told = ["running with residual dependency", "'limosa drain web'"];
        assert!(told.iter().all(|told| text.contains(told)), "{text}");
    }

    fn limosa(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_limosa"))
            .args(arguments)
            .arg("--state-dir")
            .arg(self.dir.path())
            .output()
            .unwrap()
    }

    /// The answer of a command that has to work.
    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.limosa(&[arguments, &["--json"]].concat());
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            errors(&output)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Checks that a command is refused with one line that contains this.
    fn refused(&self, arguments: &[&str], expect: &str) {
        let output = self.limosa(arguments);
        let text = errors(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains(expect), "{arguments:?}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.starts_with("error: "), "{arguments:?}: {text}");
    }

    fn work(&self, name: &str) -> u64 {
        let vms = self.json(&["list"]);
        let vm = vms
            .as_array()
            .unwrap()
            .iter()
            .find(|vm| vm["name"] == name)
            .unwrap();
        assert_eq!(vm["state"], "running", "{vm}");
        assert_eq!(vm["errors"], 0, "{vm}");
        vm["work"].as_u64().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(Value::Array(vms)) =
            serde_json::from_slice(&self.limosa(&["list", "--json"]).stdout)
        {
            for vm in vms {
                self.limosa(&["stop", "--force", vm["name"].as_str().unwrap_or_default()]);
            }
        }
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Starts a daemon and waits until it answers.
fn spawn(dir: &Path) -> (Child, String) {
    let mut process = host(dir, "127.0.0.1:0")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(process.stderr.take().unwrap());
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            eprintln!("daemon: {line}");
            if let Some((_, rest)) = line.split_once("listens for hosts on ") {
                let address = rest.split(' ').next().unwrap_or_default();
                sender.send(address.to_owned()).ok();
            }
        }
    });
    let peer = receiver.recv_timeout(PATIENCE).unwrap();
    (process, peer)
}

fn host(dir: &Path, listen: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command
        .args(["host", "--listen", listen, "--state-dir"])
        .arg(dir);
    command
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn has_kvm() -> bool {
    let has_kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !has_kvm {
        println!("skipped: no /dev/kvm");
    }
    has_kvm
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn without_a_daemon_a_command_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_limosa"))
        .args(["list", "--state-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let socket = dir.path().join("host.sock");
    let expect = format!(
        "error: no limosa daemon answers at {}: start one with 'limosa host'\n",
        socket.display()
    );
    assert_eq!(errors(&output), expect);
}

#[test]
fn a_daemon_refuses_what_it_must() {
    let daemon = Daemon::start();
    assert_eq!(daemon.json(&["list"]), Value::Array(Vec::new()));

    let second = host(daemon.dir.path(), "127.0.0.1:0").output().unwrap();
    let expect = format!("another limosa daemon (process {})", daemon.process.id());
    assert!(errors(&second).contains(&expect), "{}", errors(&second));
    let open = host(tempfile::tempdir().unwrap().path(), "0.0.0.0:0")
        .output()
        .unwrap();
    assert_eq!(open.status.code(), Some(1));
    assert!(errors(&open).contains("--insecure"), "{}", errors(&open));

    daemon.refused(&["inspect", "web"], "no VM named 'web' on this host");
    daemon.refused(&["stop", "web"], "no VM named 'web' on this host");
    daemon.refused(
        &["migrate", "web", "--to", "127.0.0.1:9"],
        "no VM named 'web' on this host",
    );
    daemon.refused(&["abort", "web"], "no migration of a VM 'web'");
    daemon.refused(&["status", "web"], "no migration of a VM 'web'");
    daemon.refused(
        &["set", "web", "--rounds-max", "3"],
        "no migration of a VM 'web'",
    );
    daemon.refused(&["run", "a/b", "--micro", "idle"], "cannot name a VM");
    daemon.refused(
        &["run", "web", "--micro", "writr"],
        "known are writer, idle, compute, kv",
    );
    daemon.refused(
        &["run", "web", "--micro", "idle", "--memory", "5000"],
        "memory",
    );
    daemon.refused(
        &["run", "web", "--micro", "idle", "--memory", "100T"],
        "memory",
    );
    daemon.refused(
        &["run", "web", "--micro", "idle", "--observer", "192.0.2.1:9"],
        "loopback",
    );
    daemon.refused(&["replay", "/dev/null"], "not a journal");
    assert_eq!(
        daemon.json(&["list"]),
        Value::Array(Vec::new()),
        "nothing is left of what was refused"
    );
}

#[test]
fn guests_that_cannot_run_are_refused_in_one_line() {
    if !has_kvm() {
        return;
    }
    let daemon = Daemon::start();
    let file = daemon.dir.path().join("text.elf");
    std::fs::write(&file, "this is no program").unwrap();
    daemon.refused(&["run", "web", "--micro", file.to_str().unwrap()], "ELF");
    daemon.refused(&["run", "web", "--micro", "/bin/true"], "");
    daemon.refused(
        &["run", "web", "--micro", "writer", "--args", "ws=lots"],
        "ws=lots",
    );
    daemon.refused(
        &[
            "run", "web", "--micro", "writer", "--memory", "16M", "--args", "ws=64M",
        ],
        "memory",
    );
    assert_eq!(daemon.json(&["list"]), Value::Array(Vec::new()));
}

#[test]
fn a_killed_daemon_is_not_missed_by_its_guests() {
    if !has_kvm() {
        return;
    }
    let mut daemon = Daemon::start();
    let spec = [
        "run",
        "web",
        "--micro",
        "writer",
        "--args",
        "ws=8M rate=2000",
        "--memory",
        "64M",
    ];
    let vm = daemon.json(&spec);
    assert_eq!(
        (&vm["state"], &vm["vcpus"]),
        (&"running".into(), &1.into()),
        "{vm}"
    );
    daemon.refused(&spec, "a VM named 'web' exists on this host");

    wait_until("the guest works", || daemon.work("web") > 0);
    let inspection = daemon.json(&["inspect", "web"]);
    let sections = inspection["sections"].as_array().unwrap();
    assert!(sections.len() > 3, "{inspection}");
    assert!(
        inspection["state_bytes"].as_u64().unwrap() > 1000,
        "{inspection}"
    );

    // A target that is not there: the guest stays, and one line says why.
    daemon.refused(
        &["migrate", "web", "--to", "127.0.0.1:1"],
        "no limosa host answers at 127.0.0.1:1",
    );
    daemon.refused(&["migrate", "web", "--to", "192.0.2.1:7070"], "--insecure");
    let status = daemon.json(&["status", "web"]);
    assert_eq!(status["report"]["outcome"], "failed", "{status}");
    let steps = std::fs::read_dir(daemon.dir.path().join("journals"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let replayed = daemon.json(&["replay", steps.path().to_str().unwrap()]);
    assert!(replayed["steps"].as_u64().unwrap() > 0, "{replayed}");

    let pid = daemon.json(&["list"])[0]["pid"].clone();
    daemon.kill_and_restart();
    let before = daemon.work("web");
    assert_eq!(daemon.json(&["list"])[0]["pid"], pid, "the same process");
    wait_until("the guest works on", || daemon.work("web") > before);

    // One that dies is shown as such until it is removed.
    Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    wait_until("the end is noticed", || {
        daemon.json(&["list"])[0]["state"] == "ended"
    });
    daemon.refused(&["inspect", "web"], "has ended");
    assert_eq!(daemon.json(&["stop", "web"])["stopped"], true);
    assert_eq!(daemon.json(&["list"]), Value::Array(Vec::new()));
}

#[test]
fn a_guest_moves_between_two_daemons_or_stays() {
    if !has_kvm() {
        return;
    }
    let [source, target] = [Daemon::start(), Daemon::start()];
    let spec = [
        "run",
        "web",
        "--micro",
        "writer",
        "--args",
        "ws=8M rate=2000",
        "--memory",
        "64M",
    ];
    source.json(&spec);
    wait_until("the guest works", || source.work("web") > 0);

    // Slow enough to be met on its way: it is shown, steered, and called back.
    let migrate = ["migrate", "web", "--to", &target.peer];
    let slow = [&migrate[..], &["--link", "1M", "--detach"]].concat();
    let id = source.json(&slow)["id"].as_str().unwrap().to_owned();
    let is_copying = || source.json(&["status", "web"])["stage"] == "copying";
    wait_until("pages are sent", is_copying);
    assert_eq!(target.json(&["status"])["incoming"][0]["id"], id.as_str());
    assert_eq!(target.json(&["list"])[0]["state"], "arriving");
    let changed = source.json(&["set", &id[..6], "--downtime-max", "7ms"]);
    assert_eq!(changed["limits"]["downtime_max_ms"], 7.0, "{changed}");
    source.refused(&["stop", "web"], "is being migrated");
    source.refused(&migrate, "is being migrated");
    assert_eq!(
        source.json(&["abort", "web"])["report"]["outcome"],
        "aborted"
    );
    source.refused(&["abort", "web"], "is over");
    let before = source.work("web");
    wait_until("the guest works on", || source.work("web") > before);

    for (from, to) in [(&source, &target), (&target, &source)] {
        let before = from.work("web");
        let migrate = ["migrate", "web", "--to", &to.peer, "--verify"];
        let output = from.limosa(&migrate);
        assert!(output.status.success(), "{}", errors(&output));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.starts_with("web runs at 127.0.0.1:") && text.contains("digests equal"),
            "{text}"
        );
        assert_eq!(from.json(&["list"]), Value::Array(Vec::new()));
        wait_until("the guest works on", || to.work("web") > before);
    }

    // Its name is taken at the target: refused there, and it stays here.
    target.json(&spec);
    source.refused(&migrate, "a VM named 'web' exists on this host");
    source.work("web");
}

/// A guest that owns more memory than it writes, so that most of it is never asked for.
const ROOMY: [&str; 8] = [
    "run",
    "web",
    "--micro",
    "writer",
    "--args",
    "ws=4M touch=32M rate=1000",
    "--memory",
    "64M",
];

#[test]
fn a_guest_lives_on_demand_until_it_is_drained() {
    if !has_kvm() {
        return;
    }
    let [source, target] = [Daemon::start(), Daemon::start()];
    source.json(&ROOMY);
    wait_until("the guest works", || source.work("web") > 0);
    source.migrate_on_demand(&target);

    let vm = &target.json(&["list"])[0];
    assert!(vm["missing_pages"].as_u64().unwrap() > 1000, "{vm}");
    let residue = vm["residual_dependency"].as_str().unwrap();
    assert!(residue.contains("at its source, 127.0.0.1"), "{residue}");
    let before = target.work("web");
    wait_until("the guest works on faults", || target.work("web") > before);
    let onwards = ["migrate", "web", "--to", &source.peer];
    target.refused(&onwards, "'limosa drain web' at the source");
    target.refused(&["inspect", "web"], "residual dependency");
    target.refused(&["drain", "web"], "is a command for that host");
    let refused = ["resolve", "web", "--runs-here"];
    target.refused(&refused, "pages of it are still at its source");
    source.refused(&["resolve", "web", "--gone"], "nothing to decide");
    source.refused(&["set", "web", "--mode", "pre-copy"], "post-copy are left");
    source.refused(&["stop", "--force", "web"], "limosa drain web");
    source.refused(&["abort", "web"], "too late");
    let status = source.json(&["status", "web"]);
    assert_eq!(status["stage"], "serving", "{status}");
    assert!(status["unsent_pages"].as_u64().unwrap() > 1000, "{status}");

    let output = source.limosa(&["drain", "web"]);
    assert!(output.status.success(), "{}", errors(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(" pages pulled"), "{text}");
    assert_eq!(source.json(&["list"]), Value::Array(Vec::new()));
    let report = &source.json(&["status", "web"])["report"];
    assert_eq!(report["mode_changes"][0]["to"], "post-copy", "{report}");
    assert!(report["pulled_pages"].as_u64().unwrap() > 0, "{report}");
    let vm = &target.json(&["list"])[0];
    assert_eq!(vm["residual_dependency"], Value::Null, "{vm}");
    target.json(&["inspect", "web"]);
    source.refused(&["drain", "web"], "nothing to drain");
}

#[test]
fn a_killed_source_daemon_brings_the_pages_when_it_is_back() {
    if !has_kvm() {
        return;
    }
    let [mut source, target] = [Daemon::start(), Daemon::start()];
    source.json(&ROOMY);
    wait_until("the guest works", || source.work("web") > 0);
    source.migrate_on_demand(&target);
    source.kill_and_restart();
    // On demand it was, and on demand it stays until somebody says otherwise.
    let is_serving = || source.json(&["status", "web"])["stage"] == "serving";
    wait_until("the source is back", is_serving);
    assert!(target.json(&["list"])[0]["missing_pages"].as_u64() > Some(0));
    let drained = source.limosa(&["drain", "web"]);
    assert!(drained.status.success(), "{}", errors(&drained));
    let is_empty = || source.json(&["list"]) == Value::Array(Vec::new());
    wait_until("all pages have gone", is_empty);
    let vm = &target.json(&["list"])[0];
    assert_eq!(vm["missing_pages"], 0, "{vm}");
    let before = target.work("web");
    wait_until("the guest works on", || target.work("web") > before);
}

#[test]
fn a_guest_whose_source_is_lost_is_given_up_by_its_operator_only() {
    if !has_kvm() {
        return;
    }
    let [mut source, target] = [Daemon::start(), Daemon::start()];
    source.json(&ROOMY);
    wait_until("the guest works", || source.work("web") > 0);
    source.migrate_on_demand(&target);
    source.kill();
    assert!(target.json(&["list"])[0]["residual_dependency"].is_string());
    target.json(&["resolve", "web", "--gone"]);
    wait_until("it is given up", || {
        target.json(&["list"])[0]["state"] == "ended"
    });
    target.json(&["stop", "web"]);
    // Should the source come back nevertheless, it hears that nobody needs its pages.
    source.restart();
    wait_until("the source knows", || {
        source.json(&["list"])[0]["state"] == "ended"
    });
    source.json(&["stop", "web"]);
}

#[test]
fn a_guest_that_finishes_is_listed_until_it_is_removed() {
    if !has_kvm() {
        return;
    }
    let daemon = Daemon::start();
    daemon.json(&["run", "calm", "--micro", "idle", "--memory", "16M"]);
    let client = Client::new(daemon.dir.path().join("host.sock"));
    client.command("calm", CommandKind::Finish).unwrap();
    wait_until("the end is noticed", || client.vm("calm").unwrap().pid == 0);
    let vm = client.vm("calm").unwrap();
    assert_eq!(
        vm.ended.as_deref(),
        Some("the guest finished with status 0")
    );
    let again = ["run", "calm", "--micro", "idle", "--memory", "16M"];
    daemon.refused(&again, "remove it with 'limosa stop calm'");
    daemon.json(&["stop", "calm"]);
    daemon.json(&again);
}
