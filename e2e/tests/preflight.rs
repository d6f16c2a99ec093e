//! `migrate --dry-run`: what is in the way at the target, and what a migration would take.

use limosa_e2e::pair::{assert_completed, begin, end};
use limosa_e2e::{Pair, VM, binary, guest, has_kvm};
use limosa_engine::policy::Mode;
use limosa_host::api::{MigrateBody, PreflightInfo};
use std::fs;
use std::process::{Command, Output};

/// `limosa migrate web --to … --dry-run` at the first host.
fn dry_run(pair: &Pair, options: &[&str]) -> Output {
    Command::new(binary::limosa())
        .arg("--state-dir")
        .arg(pair.a.state_dir())
        .args(["migrate", VM, "--dry-run", "--to", pair.b.peer_address()])
        .args(options)
        .output()
        .expect("limosa can be started")
}

fn assert_untouched(pair: &Pair) {
    assert_eq!(
        pair.a.client().vm(VM).expect("it is there").phase,
        "running"
    );
    assert!(pair.b.client().vms().expect("an answer").is_empty());
    assert!(pair.a.client().migrations().expect("an answer").is_empty());
}

#[test]
fn a_dry_run_estimates_and_moves_nothing() {
    if !has_kvm() {
        return;
    }
    let pair = Pair::start();
    pair.boot(guest::writer(VM, "ws=8M rate=5000 touch=16M"));
    let output = dry_run(&pair, &["--json", "--link", "20M"]);
    assert!(output.status.success(), "{output:?}");
    let info: PreflightInfo = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(info.differences, Vec::<String>::new());
    // What it touched and rewrites, its program and its page tables.
    let existing = info.existing_bytes >> 20;
    assert!((24..32).contains(&existing), "{existing} MiB");
    let written: Vec<u64> = info.dirtied.iter().map(|point| point.pages).collect();
    assert!(written.is_sorted() && written.last().is_some_and(|&last| last > 100));
    let of = |mode: Mode| {
        let mut estimates = info.estimates.iter();
        *estimates
            .find(|estimate| estimate.mode == mode)
            .expect("each mode")
    };
    let (stop, post) = (of(Mode::StopAndCopy), of(Mode::PostCopy));
    assert!(post.downtime_ms < stop.downtime_ms, "{post:?} {stop:?}");
    // 24 MiB over 20 MB/s.
    assert!(stop.downtime_ms > 500.0, "{stop:?}");
    assert_untouched(&pair);
    let output = dry_run(&pair, &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("would take web") && text.contains("pre-copy"),
        "{text}"
    );
    // It still can move.
    assert_completed(&end(&pair.a, &begin(&pair.a, &pair.b, Mode::PreCopy)));
}

#[test]
fn all_that_is_in_the_way_is_named_at_once() {
    if !has_kvm() {
        return;
    }
    let pair = Pair::start();
    let place = tempfile::tempdir().expect("a directory");
    let disk = place.path().join("disk.raw");
    fs::write(&disk, [0; 4096]).expect("a disk can be written");
    let kernel = guest::write_echo_kernel(place.path());
    pair.a
        .client()
        .run(&guest::echo(VM, &kernel, &disk, false))
        .expect("it runs");
    let namesake = guest::writer(VM, "ws=1M");
    pair.b.client().run(&namesake).expect("it runs");
    let output = dry_run(&pair, &["--json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let info: PreflightInfo = serde_json::from_slice(&output.stdout).expect("JSON");
    let [disk, name] = info.differences.as_slice() else {
        panic!("two things are in the way: {:?}", info.differences);
    };
    assert!(disk.contains("disk.raw is not lent"), "{disk}");
    assert!(name.contains("a VM named 'web' exists"), "{name}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("is not lent") && said.contains("(and 1 more)"),
        "{said}"
    );
    // A migration says the same.
    let body = MigrateBody::new(pair.b.peer_address(), Mode::PreCopy);
    let id = pair.a.client().migrate(VM, &body).expect("it begins");
    let report = end(&pair.a, &id);
    let text = format!("{report:?}");
    assert!(text.contains("is not lent"), "{text}");
    assert_eq!(
        pair.a.client().vm(VM).expect("it is there").phase,
        "running"
    );
}
