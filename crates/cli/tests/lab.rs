//! Experiments as their user runs them: the program, plans of this repository, directories that are
//! cut, foreign or interrupted.
//!
//! Most tests use the simulator. Those that move real guests print `skipped` without `/dev/kvm`, the one with
//! QEMU without QEMU, and the one with clients without root.
#![allow(clippy::unwrap_used)]

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

const TWO_RUNS: &str = r#"
question = "Does a real guest arrive?"
repeats = 1

[workloads.busy]
guest = "writer"
working_set = "8M"
rate = 2000

[[matrix]]
techniques = ["pre-copy", "post-copy"]
workloads = ["busy"]
memory = ["64M"]
"#;

fn smoke() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plans/smoke.toml")
}

fn lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.arg("lab").args(arguments);
    command
}

/// Runs a plan in the simulator.
fn simulate(plan: &Path, out: &Path) -> Output {
    let mut command = lab(&["run", "--simulate", "--out"]);
    command.arg(out).arg(plan).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// The measurement that stands in a line.
fn record(line: &str) -> Value {
    let run: Value = serde_json::from_str(line).unwrap();
    run["record"].clone()
}

/// Checks that a command fails with one line that contains this.
fn refused(output: &Output, expect: &str) {
    let text = said(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: "), "{text}");
    assert!(last.contains(expect), "{text}");
}

#[test]
fn a_plan_is_run_resumed_and_reported() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("smoke");
    let output = simulate(&smoke(), &out);
    assert!(output.status.success(), "{}", said(&output));
    let told = said(&output);
    assert!(
        told.starts_with("simulated: --simulate was given\n"),
        "{told}"
    );
    assert!(told.contains("4 runs to make, 0 are there"), "{told}");
    assert!(told.contains("\n4/4  "), "{told}");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stdout.starts_with("SIMULATED"), "{stdout}");
    assert!(
        stdout.contains("4 of 4 runs measured, 4 moves completed"),
        "{stdout}"
    );

    let results = out.join("results.jsonl");
    let first = lines(&results);
    assert_eq!(first.len(), 4);
    assert!(
        first
            .iter()
            .all(|line| record(line)["outcome"] == "completed")
    );
    assert_eq!(lines(&out.join("results.csv")).len(), 5);
    let report = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(report.contains("<strong>Simulated.</strong>"));
    assert!(report.contains("<h1>Does the lab work on this machine at all?</h1>"));
    assert!(!report.contains("http") && !report.contains("<script"));
    let plan = fs::read_to_string(out.join("plan.toml")).unwrap();
    assert_eq!(plan, fs::read_to_string(smoke()).unwrap());

    // As a kill leaves it: two results, and half of a third one.
    let cut = format!("{}\n{}\n{}", first[0], first[1], &first[2][..99]);
    fs::write(&results, cut).unwrap();
    let output = simulate(&smoke(), &out);
    assert!(output.status.success(), "{}", said(&output));
    assert!(
        said(&output).contains("2 runs to make, 2 are there"),
        "{}",
        said(&output)
    );
    let second = lines(&results);
    assert_eq!(second[..2], first[..2]);
    let records = |lines: &[String]| lines.iter().map(|line| record(line)).collect::<Vec<_>>();
    assert_eq!(records(&second), records(&first));

    fs::remove_file(out.join("report.html")).unwrap();
    let output = lab(&["report", "--json"]).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["ok"], true);
    assert_eq!(answer["simulated"], true);
    assert_eq!(answer["cells"].as_array().unwrap().len(), 2);
    assert!(out.join("report.html").is_file());
}

/// Every plan of this repository, as far as the simulator has a model of it, with little guests and
/// one run of each cell.
#[test]
fn every_plan_runs_in_a_small_form() {
    let plans = smoke().parent().unwrap().to_owned();
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(plans).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let plan = directory.path().join(format!("{name}.toml"));
        fs::write(&plan, small_form(&fs::read_to_string(&path).unwrap())).unwrap();
        let out = directory.path().join(&name);
        let output = simulate(&plan, &out);
        assert!(output.status.success(), "{name}: {}", said(&output));
        let records = lines(&out.join("results.jsonl"));
        println!("{name}: {} runs", records.len());
        assert!(
            records.iter().all(|line| record(line).is_object()),
            "{name}"
        );
        assert!(out.join("report.html").is_file(), "{name}");
    }
}

/// A plan for the simulator, of tens of runs.
fn small_form(text: &str) -> String {
    const UNKNOWN: [&str; 4] = ["compress", "dirty_trackers", "push_orders", "tls"];
    let mut plan: toml::Table = text.parse().unwrap();
    plan.insert("repeats".to_owned(), 1.into());
    let workloads = plan["workloads"].as_table_mut().unwrap();
    let known = |guest: &toml::Value| !matches!(guest.as_str(), Some("compute" | "kv"));
    workloads.retain(|_, workload| known(&workload["guest"]));
    for (_, workload) in workloads.iter_mut() {
        let workload = workload.as_table_mut().unwrap();
        workload.remove("touch");
        if workload.contains_key("working_set") {
            workload.insert("working_set".to_owned(), "4M".into());
        }
    }
    let known: Vec<toml::Value> = workloads.keys().map(|name| name.as_str().into()).collect();
    let matrices = plan["matrix"].as_array_mut().unwrap();
    // Another size in each, or what differs by something unknown would stand there twice.
    let mut mebibytes = 16;
    matrices.retain_mut(|matrix| {
        let matrix = matrix.as_table_mut().unwrap();
        UNKNOWN.into_iter().for_each(|key| drop(matrix.remove(key)));
        mebibytes += 2;
        matrix.insert("memory".to_owned(), vec![format!("{mebibytes}M")].into());
        let names = matrix["workloads"].as_array_mut().unwrap();
        names.retain(|name| known.contains(name));
        !names.is_empty() && !matrix.contains_key("vmm")
    });
    plan.to_string()
}

#[test]
fn a_directory_of_another_plan_and_of_another_bed_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("smoke");
    assert!(simulate(&smoke(), &out).status.success());
    let before = lines(&out.join("results.jsonl"));
    let plan = directory.path().join("other.toml");
    fs::write(&plan, TWO_RUNS).unwrap();
    refused(&simulate(&plan, &out), "holds results of another plan");
    if has_kvm() {
        let mut real = lab(&["run", "--out"]);
        let output = real.arg(&out).arg(smoke()).output().unwrap();
        refused(
            &output,
            "holds simulated results and this would add real ones",
        );
    }
    assert_eq!(lines(&out.join("results.jsonl")), before);
}

#[test]
fn mistakes_are_told_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let plan = directory.path().join("plan.toml");
    let out = directory.path().join("out");
    fs::write(&plan, TWO_RUNS.replace("repeats", "repeat")).unwrap();
    refused(
        &simulate(&plan, &out),
        "plan.toml: line 3: unknown field `repeat`, expected one of `question`, `bed`, `seed`",
    );
    let compute = TWO_RUNS.replace("writer", "compute");
    fs::write(&plan, compute).unwrap();
    refused(
        &simulate(&plan, &out),
        "the simulator has no model of the compute guest",
    );
    assert!(!out.exists());
    let output = lab(&["report"]).arg(&out).output().unwrap();
    refused(&output, "holds no results");
}

#[test]
fn an_interrupted_experiment_says_how_to_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let plan = directory.path().join("plan.toml");
    let out = directory.path().join("out");
    fs::write(&plan, TWO_RUNS.replace("repeats = 1", "repeats = 10000")).unwrap();
    let mut command = lab(&["run", "--simulate", "--out"]);
    let child = command
        .arg(&out)
        .arg(&plan)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let give_up = Instant::now() + PATIENCE;
    let results = out.join("results.jsonl");
    while fs::read_to_string(&results)
        .unwrap_or_default()
        .lines()
        .count()
        < 2
    {
        assert!(Instant::now() < give_up, "no result after {PATIENCE:?}");
        thread::sleep(Duration::from_millis(10));
    }
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    refused(&output, "the same command goes on from there");
    let done = lines(&results).len();
    let told = format!("interrupted with {done} of 20000 runs done");
    assert!(said(&output).contains(&told), "{}", said(&output));
}

#[test]
fn real_guests_are_moved_and_nothing_is_left_behind() {
    if !has_kvm() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let plan = directory.path().join("plan.toml");
    let out = directory.path().join("out");
    // Sockets lie below it, whose paths are limited to a hundred bytes.
    let temporary = tempfile::Builder::new().prefix("lab").tempdir().unwrap();
    fs::write(&plan, TWO_RUNS).unwrap();
    let mut command = lab(&["run", "--json", "--out"]);
    let output = command
        .arg(&out)
        .arg(&plan)
        .env("TMPDIR", temporary.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&answer["ok"], &answer["simulated"]),
        (&true.into(), &false.into())
    );
    assert_eq!(
        (&answer["completed"], &answer["made_now"]),
        (&2.into(), &2.into())
    );
    for line in lines(&out.join("results.jsonl")) {
        let record = record(&line);
        assert_eq!((&record["from"], &record["to"]), (&"a".into(), &"b".into()));
        assert_eq!(record["memory_digest_equal"], true, "{record}");
        assert!(record["swept_pages"].as_u64().unwrap() >= 2048, "{record}");
        let speed = &record["guest_speed"];
        let slots = speed["work_per_s"].as_array().unwrap();
        assert!((200..=400).contains(&slots.len()), "{record}");
        // The second before the move.
        let before: f64 = slots[..100].iter().filter_map(Value::as_f64).sum();
        assert!((1000.0..3000.0).contains(&(before / 100.0)), "{record}");
        let moment = |name: &str| speed[name].as_f64().unwrap();
        let downtime = record["downtime_ms"]["total"].as_f64().unwrap();
        let stood = moment("running_ms") - moment("stopped_ms");
        assert!((stood - downtime).abs() < 0.1, "{record}");
    }
    let report = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(!report.contains("Simulated"));
    assert!(report.contains("speed over time"));
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    let left = processes_that_name(temporary.path());
    assert!(left.is_empty(), "{left:?}");
}

const BOTH: &str = r#"
question = "Do both arrive?"
repeats = 1
verify = false

[workloads.busy]
guest = "writer"
working_set = "8M"
rate = 2000
rest = "spin"

[[matrix]]
techniques = ["pre-copy"]
workloads = ["busy"]
memory = ["64M"]

[[matrix]]
vmm = "qemu"
variants = ["multifd"]
workloads = ["busy"]
memory = ["64M"]
"#;

#[test]
fn qemu_and_limosa_move_the_same_guest_and_nothing_is_left_behind() {
    let has_qemu = Command::new("qemu-system-x86_64").arg("--version").output();
    if !has_kvm() || has_qemu.is_err() {
        println!("skipped: no /dev/kvm, or no QEMU");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (plan, out) = (directory.path().join("p.toml"), directory.path().join("o"));
    let temporary = tempfile::Builder::new().prefix("lab").tempdir().unwrap();
    fs::write(&plan, BOTH).unwrap();
    let mut command = lab(&["run", "--json", "--out"]);
    command.arg(&out).arg(&plan).env("TMPDIR", temporary.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["completed"], 2);
    let gap = &answer["comparisons"][0]["lines"][0];
    assert_eq!(gap["figure"], "guest_gap_ms");
    assert_eq!(gap["best"]["variant"], "multifd \u{2264} 300 ms", "{gap}");
    let pairs = lines(&out.join("pairs.csv"));
    assert_eq!(pairs.len(), 8, "{pairs:?}");
    for line in lines(&out.join("results.jsonl")) {
        let record = record(&line);
        assert_eq!(record["integrity_errors"], 0);
        assert!(record["swept_pages"].as_u64().unwrap() >= 2048, "{record}");
        let is_ours = record["qemu"].is_null();
        assert_eq!(record["eviction_ms"].is_null(), !is_ours, "{record}");
    }
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    let left = processes_that_name(temporary.path());
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_comparison_without_its_peer_says_what_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let (plan, out) = (directory.path().join("p.toml"), directory.path().join("o"));
    fs::write(&plan, BOTH).unwrap();
    refused(&simulate(&plan, &out), "the simulator has no model of QEMU");
    if !has_kvm() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let mut command = lab(&["run", "--qemu", "/nonexistent/qemu", "--out"]);
    let output = command.arg(&out).arg(&plan).output().unwrap();
    refused(&output, "on Debian install qemu-system-x86");
    assert!(!out.exists(), "nothing was begun");
}

const SERVING: &str = r#"
question = "What do clients see?"
repeats = 1

[workloads.store]
guest = "kv"
keys = 5000
value_size = "512"
clients = 2

[[matrix]]
techniques = ["pre-copy", "post-copy"]
workloads = ["store"]
memory = ["64M"]
links = ["125M"]
"#;

#[test]
fn clients_of_a_guest_tell_what_they_saw_and_no_network_is_left_behind() {
    if !has_kvm() || !rustix::process::geteuid().is_root() {
        println!("skipped: no /dev/kvm, or no root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (plan, out) = (directory.path().join("p.toml"), directory.path().join("o"));
    let temporary = tempfile::Builder::new().prefix("lab").tempdir().unwrap();
    fs::write(&plan, SERVING).unwrap();
    let mut command = lab(&["run", "--out"]);
    command.arg(&out).arg(&plan).env("TMPDIR", temporary.path());
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stdout.contains("CLIENT GAP"), "{stdout}");
    for line in lines(&out.join("results.jsonl")) {
        let record = record(&line);
        let seen = &record["clients"];
        println!(
            "{}: clients {} ms, guest {} ms, downtime {} ms",
            record["mode"], seen["gap_ms"], record["guest_gap_ms"], record["downtime_ms"]["total"]
        );
        assert_eq!(
            (&record["outcome"], &seen["connections"]),
            (&"completed".into(), &3.into())
        );
        assert_eq!(
            (&seen["lost_connections"], &seen["wrong_answers"]),
            (&0.into(), &0.into())
        );
        assert_eq!(record["memory_digest_equal"], true, "{record}");
        // Whoever asks each millisecond meets the whole stop, but for the last of it before he asks.
        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{record}"));
        let downtime = number(&record["downtime_ms"]["total"]);
        assert!(number(&seen["gap_ms"]) >= downtime - 1.0, "{record}");
        assert!(
            number(&seen["worst_wait_ms"]) >= number(&seen["gap_ms"]),
            "{record}"
        );
        let before = &seen["waits_before_ms"];
        assert!(
            (900..=1100).contains(&before["count"].as_u64().unwrap()),
            "{record}"
        );
        for time in ["before", "during", "after"] {
            assert!(number(&seen["requests_per_s"][time]) > 100.0, "{record}");
        }
        let slots = seen["series"]["requests_per_s"].as_array().unwrap();
        assert!(slots.len() >= 200, "{record}");
    }
    let report = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(report.contains("<h2>What clients saw</h2>"));
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    let left = processes_that_name(temporary.path());
    assert!(left.is_empty(), "{left:?}");
    let spaces = fs::read_dir("/run/netns").unwrap().flatten();
    let spaces = spaces.map(|space| space.file_name().to_string_lossy().into_owned());
    let left: Vec<String> = spaces
        .filter(|name| name.contains(&format!("-{pid}-")))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_cannot_be_run_is_named_and_can_be_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let (plan, out) = (directory.path().join("p.toml"), directory.path().join("o"));
    let calm = "[workloads.calm]\nguest = \"idle\"\n\n[[matrix]]";
    let both = SERVING.replace("[[matrix]]", calm);
    let both = both.replace("[\"store\"]", "[\"store\", \"calm\"]");
    fs::write(&plan, &both).unwrap();
    refused(
        &simulate(&plan, &out),
        "no model of the kv guest, which the workload 'store' uses: use writer or idle, or leave it out by --without store",
    );
    if has_kvm() {
        // Where there is no ip, no network can be made, whoever asks.
        let mut command = lab(&["run", "--out"]);
        let output = command.arg(&out).arg(&plan).env("PATH", "").output();
        refused(&output.unwrap(), "; --without store leaves them out");
    }
    assert!(!out.exists(), "nothing was begun");
    let without = |names: &str| {
        let mut command = lab(&["run", "--simulate", "--without", names, "--out"]);
        command.arg(&out).arg(&plan).output().unwrap()
    };
    refused(
        &without("shop"),
        "there is no workload 'shop' to leave out; known are calm, store",
    );
    for to_make in [2, 0] {
        let output = without("store");
        assert!(output.status.success(), "{}", said(&output));
        let told = format!("{to_make} runs to make");
        assert!(said(&output).contains(&told), "{}", said(&output));
    }
    let kept = fs::read_to_string(out.join("plan.toml")).unwrap();
    assert!(
        kept.starts_with("# As it was given, but without: store.\n"),
        "{kept}"
    );
}

fn has_kvm() -> bool {
    let mut device = fs::File::options();
    device.read(true).write(true).open("/dev/kvm").is_ok()
}

/// Command lines of processes in which this path stands.
fn processes_that_name(path: &Path) -> Vec<String> {
    let path = path.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let commands = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    commands
        .map(|command| String::from_utf8_lossy(&command).replace('\0', " "))
        .filter(|command| command.contains(path))
        .collect()
}
