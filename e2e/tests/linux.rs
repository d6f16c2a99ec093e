//! A stock Debian kernel under limosa, moved between two emulated hosts by every technique while it works:
//! it tests memory, writes to a disk that the hosts share, reads another, and serves clients on both. And one that
//! frees memory, and gives some up, which is not sent.
//!
//! `LIMOSA_E2E_MATRIX=all` moves it forty times and takes the newer kernel, too.

use limosa_e2e::hosts::{Bed, Hosts, PROCESSOR, Run, SERIES};
use limosa_e2e::{binary, has_kvm, skip};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Twenty times what it takes on an idle machine of two processors.
const LIMIT: Duration = Duration::from_secs(1200);
const MODES: [&str; 6] = [
    "pre-copy",
    "post-copy",
    "hybrid",
    "stop-and-copy",
    "demand",
    "auto",
];
/// What a kernel says when something is wrong with its time, its processors or its memory.
const ALARMS: [&str; 16] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "lockup",
    "stall",
    "unstable",
    "Call Trace",
    "CLOCK-WENT-BACK",
    "MEMORY-BAD",
    "DISK-BAD",
    "FILES-BAD",
    "DATABASE-BAD",
    "BLOCKS-BAD",
    "EXT4-fs error",
    "I/O error",
    "FAILURE",
];

/// Everything is made from Debian's packages, which only Debian has.
fn is_debian() -> bool {
    let is_there = |program: &str| {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut places = path.split(':').chain(["/usr/sbin", "/sbin"]);
        places.any(|place| Path::new(place).join(program).exists())
    };
    let missing = [
        "apt-get", "dpkg-deb", "tar", "mke2fs", "xz", "setpriv", "strip",
    ]
    .into_iter()
    .find(|program| !is_there(program));
    if let Some(program) = missing {
        skip(&format!("emulated hosts need {program}"));
    }
    missing.is_none()
}

/// Beside the tests' own programs, so that it goes when they go.
fn cache() -> PathBuf {
    let own = std::env::current_exe().expect("the test's own file");
    let target = own
        .ancestors()
        .nth(3)
        .expect("a test lies in target/profile/deps");
    std::env::var_os("LIMOSA_HOSTS_CACHE")
        .map_or_else(|| target.join("emulated-hosts"), PathBuf::from)
}

/// The program without what debuggers need: hosts have it in memory.
fn program(place: &Path) -> PathBuf {
    let small = place.join("limosa");
    let status = Command::new("strip")
        .arg("-o")
        .arg(&small)
        .arg(binary::limosa())
        .status();
    assert!(status.expect("strip can be started").success());
    small
}

/// Runs a script on two hosts that have the program; what it printed.
fn run(script: &str, variables: &[(&str, &str)], disk_mib: u64) -> String {
    run_on(Bed::of_this_machine(), &[], script, variables, disk_mib)
}

/// The same on hosts of that kind, with these processors.
fn run_on(
    bed: Bed,
    processors: &[&str],
    script: &str,
    variables: &[(&str, &str)],
    disk_mib: u64,
) -> String {
    let hosts = Hosts::prepare(&cache()).expect("hosts can be made");
    let place = tempfile::tempdir().expect("a directory");
    let own = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
    let run = Run {
        bed,
        hosts: 2,
        script: Path::new(env!("CARGO_MANIFEST_DIR")).join(script),
        files: vec![(program(place.path()), "/run/limosa".to_owned())],
        variables: variables.iter().map(own).collect(),
        processors: processors.iter().map(|&one| one.to_owned()).collect(),
        memory_mib: 1024,
        disk_mib,
        limit: LIMIT,
    };
    let ended = hosts.run(&run).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(ended.status, 0);
    ended.output
}

/// What the guest said on its console; it must not have complained.
fn said(output: &str) -> Vec<&str> {
    let lines = output.lines();
    let said = lines.filter_map(|line| line.split_once("| SAID "));
    let said: Vec<&str> = said.map(|line| line.1).collect();
    for alarm in ALARMS {
        let line = said.iter().find(|line| line.contains(alarm));
        assert_eq!(line, None, "the guest is not well");
    }
    said
}

fn moves(series: &str, vcpus: u8, modes: &[&str]) {
    let (vcpus, modes_text) = (vcpus.to_string(), modes.join(" "));
    let variables = [
        ("SERIES", series),
        ("VCPUS", &vcpus),
        ("MODES", &modes_text),
    ];
    let output = run("hosts/moves", &variables, 64);
    let said = said(&output);
    for work in ["MEMORY-GOOD", "FILES-GOOD", "DATABASE-GOOD"] {
        let is_done = said.iter().any(|line| line.contains(work));
        assert!(is_done, "nothing said {work}");
    }
    check_beats(&said);
    // All clients kept their one connection, and no answer was missing or given twice; both benchmarks kept theirs,
    // and the console of the guest takes and shows what is typed, wherever it runs.
    for kept in ["CLIENT", "CACHE", "BENCHMARK", "CONSOLE"] {
        let good = format!("| {kept}-GOOD");
        assert_eq!(output.matches(&good).count(), 2, "{kept}");
    }
    assert!(output.contains("| BLOCKS-VERIFIED"), "{output}");
    check_disk(&output, &said);
    check_safe(&output, &said, "DATABASE-GOOD ", "IN-DATABASE ");
    check_clock(&output);
    check_log(&output);
    check_streams(&output, modes.len());
    check_moved(&output, modes.len());
}

/// Each beat is there once, wherever it was said: nothing was lost, and nothing ran twice.
fn check_beats(said: &[&str]) {
    let mut beats: Vec<u32> = numbers(said.iter().copied(), "beat ").collect();
    beats.sort_unstable();
    let expect: Vec<u32> = (1..=u32::try_from(beats.len()).expect("few")).collect();
    assert_eq!(beats, expect);
}

/// What the guest was told to be safe is on its disk, whose file system is whole.
fn check_disk(output: &str, said: &[&str]) {
    assert!(
        !output.contains("DISK-BAD"),
        "the file is as it was written"
    );
    check_safe(output, said, "SAFE ", "ON-DISK ");
}

/// Of what the guest said to be safe, by the one word, as much is there at least, by the other.
fn check_safe(output: &str, said: &[&str], word: &str, found: &str) {
    let safe = numbers(said.iter().copied(), word).max();
    let safe = safe.expect("something is safe");
    let printed = output.lines().filter_map(|line| line.split_once("| "));
    let there = numbers(printed.map(|line| line.1), found).max();
    assert!(
        there.is_some_and(|there| there >= safe),
        "{word}{safe}, and there are {there:?}"
    );
}

fn check_moved(output: &str, moves: usize) {
    let moved = output.matches("downtime").count();
    assert!(moved >= moves, "{moved} of {moves} moves told how it was");
}

/// Both streams stood through all moves and carried something in between.
fn check_streams(output: &str, moves: usize) {
    assert!(!output.contains("STREAMS-BAD"), "{output}");
    let carried = told(output, "STREAMS-CARRIED ");
    let carried: Vec<usize> = carried
        .split(' ')
        .map_while(|word| word.parse().ok())
        .collect();
    // Told every five seconds; a move takes about as long.
    assert!(
        carried.len() == 2 && carried.iter().all(|&times| times * 2 > moves),
        "{carried:?}"
    );
}

/// The guest's clock is, after all moves, within ten milliseconds of where it was beside one host's, apart from
/// what the answers that told it took.
fn check_clock(output: &str) {
    let clocks: Vec<i64> = told(output, "CLOCK-AHEAD ")
        .split(' ')
        .map_while(|word| word.parse().ok())
        .collect();
    let [before, first_took, after, second_took] = clocks[..] else {
        panic!("no clocks were compared: {output}");
    };
    let moved = after - before;
    let allowed = 10_000 + (first_took + second_took) / 2;
    assert!(
        moved.abs() <= allowed,
        "the guest's clock is {moved} µs off"
    );
}

/// The guest's kernel has logged no warning that it had not before the first move, but that it had to wait for its
/// processor, which on an emulated one it does without a move.
fn check_log(output: &str) {
    let logged: u32 = told(output, "LOGGED ").parse().expect("a number");
    assert!(logged > 100, "a kernel that boots says more than {logged}");
    let is_new =
        |line: &&str| line.contains("NEW-WARNING") && !line.contains("hrtimer: interrupt took");
    assert_eq!(output.lines().find(is_new), None);
}

/// The numbers of the lines that begin so.
fn numbers<'a>(lines: impl Iterator<Item = &'a str>, word: &'a str) -> impl Iterator<Item = u32> {
    lines.filter_map(move |line| line.strip_prefix(word)?.parse().ok())
}

/// What a line that begins so says, whichever host printed it.
fn told<'a>(output: &'a str, word: &str) -> &'a str {
    let lines = output.lines().filter_map(|line| line.split_once("| "));
    let mut told = lines.filter_map(|line| line.1.strip_prefix(word));
    told.next()
        .unwrap_or_else(|| panic!("nothing was told of {word}"))
}

#[test]
fn memory_that_a_stock_kernel_gives_up_stays_where_it_was() {
    const MIB: u64 = 256;
    if !is_debian() {
        return;
    }
    let output = run("hosts/balloon", &[("SERIES", SERIES[0])], 0);
    said(&output);
    let number = |word: &str| told(&output, word).parse::<u64>().expect("a number");
    let [full, freed, balloon, shrunk] =
        ["full", "freed", "balloon", "shrunk"].map(|what| number(&format!("PAGES-{what} ")));
    assert!(
        freed + 60 * MIB < full && balloon + 60 * MIB < full,
        "of 96 MiB that were freed at least 60 are not sent: {full}, {freed}, {balloon}"
    );
    assert!(shrunk < freed, "it gave up more for the move: {shrunk}");
    assert_eq!(number("HELD "), 64 << 20, "the balloon came along");
    assert_eq!(number("USED "), 96 << 20, "what was given back can be used");
    assert!(told(&output, "OFF ").contains("switched itself off"));
    let sums = output.matches("  /tmp/full").count();
    let sum = told(&output, "WHOLE ");
    assert_eq!(
        (sums, output.matches(sum).count()),
        (2, 2),
        "{sum} is what it was"
    );
}

/// A disk that only one host has goes along while the guest writes it.
#[test]
fn a_stock_kernel_takes_its_disk_along() {
    if !is_debian() {
        return;
    }
    // Auto and post-copy are made of these.
    let modes = ["pre-copy", "demand", "hybrid", "stop-and-copy"];
    let variables = [("SERIES", SERIES[0]), ("MODES", &modes.join(" "))];
    let output = run("hosts/copies", &variables, 0);
    let said = said(&output);
    assert!(
        said.iter().any(|line| line.contains("FILES-GOOD")),
        "files were sorted on it"
    );
    check_beats(&said);
    check_disk(&output, &said);
    check_moved(&output, modes.len());
}

/// Where everything at the target is killed, by which technique.
const KILLS: [&str; 8] = [
    "source.rehearse/pre-copy",
    "source.send-piece/pre-copy",
    "source.pause/pre-copy",
    "source.state/pre-copy",
    "target.load/stop-and-copy",
    "target.prepared/hybrid",
    "source.send-stale/post-copy",
    "target.serve-faults/post-copy",
];

/// A target that dies leaves the guest where it was, with its disk; a source that dies after the commit leaves it
/// where it went.
#[test]
fn a_stock_kernel_outlives_the_other_host() {
    if !is_debian() {
        return;
    }
    let variables = [("SERIES", SERIES[0]), ("POINTS", &KILLS.join(" "))];
    let output = run("hosts/kills", &variables, 64);
    let said = said(&output);
    assert_eq!(output.matches("| KILLED ").count(), KILLS.len());
    assert!(told(&output, "ALONE ").contains("running"));
    check_beats(&said);
    check_disk(&output, &said);
}

#[test]
fn a_stock_kernel_moves_by_every_mode() {
    if !is_debian() {
        return;
    }
    moves(SERIES[0], 2, &MODES);
}

/// The second host lacks what the first one has: no guest that has seen that goes there, and one of a lower
/// model goes, and comes back.
#[test]
fn a_stock_kernel_moves_between_unlike_processors() {
    if !is_debian() {
        return;
    }
    let less = format!("{PROCESSOR},-adx,-smap,-rdseed");
    let processors = [PROCESSOR, &less];
    let variables = [("SERIES", SERIES[0])];
    let output = run_on(Bed::Emulated, &processors, "hosts/unlike", &variables, 0);
    for line in [told(&output, "DRY-RUN "), told(&output, "MIGRATE ")] {
        let names = ["processor lacks", "adx", "smap"];
        assert!(names.iter().all(|name| line.contains(name)), "{line}");
    }
    assert!(told(&output, "REBOOT ").contains("reset itself"));
    assert!(told(&output, "PANIC ").contains("kernel panicked"));
    assert!(!output.contains("SAID BUG"), "{output}");
    for model in ["x86-64-v2", "x86-64-v3"] {
        assert!(output.contains(&format!("MOVED {model}")), "{output}");
    }
}

/// What stock kernels move between where there is no need to emulate it, here with a guest that runs on any KVM.
#[test]
fn hosts_made_of_namespaces_are_hosts() {
    if !is_debian() || !has_kvm() {
        return;
    }
    if !Bed::Native.is_allowed() {
        skip("namespaces take root");
        return;
    }
    let modes = ["pre-copy", "post-copy"];
    let variables = [("MODES", &*modes.join(" "))];
    let output = run_on(Bed::Native, &[], "hosts/micro", &variables, 32);
    assert_eq!(output.matches("digests equal").count(), 2 * modes.len());
    check_moved(&output, 2 * modes.len());
    for word in ["LISTED writer", "LAN-GOOD", "DISK-GOOD", "SHARED-GOOD"] {
        assert!(output.contains(&format!("| {word}")), "{word}");
    }
}

#[test]
fn a_stock_kernel_moves_forty_times() {
    if std::env::var("LIMOSA_E2E_MATRIX").as_deref() != Ok("all") || !is_debian() {
        return;
    }
    // Each pass begins with another one, so that each is made in both directions.
    let mode = |move_: usize| MODES[(move_ + move_ / MODES.len()) % MODES.len()];
    let modes: Vec<&str> = (0..40).map(mode).collect();
    moves(SERIES[1], 2, &modes);
}
