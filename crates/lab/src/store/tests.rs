//! Directories that are new, used, torn, foreign.

use super::*;
use crate::sample;
use crate::schedule::runs;
use std::fs::OpenOptions;
use std::io::Write;
use tempfile::TempDir;

fn plan() -> Plan {
    Plan::parse(sample::PLAN).unwrap()
}

fn open(directory: &TempDir) -> Result<Store, StoreError> {
    open_as(directory, sample::PLAN, false)
}

fn open_as(directory: &TempDir, text: &str, simulated: bool) -> Result<Store, StoreError> {
    let plan = Plan::parse(text).unwrap();
    Store::open(directory.path(), text, &plan, sample::start(simulated))
}

/// What is said of a directory that cannot be used.
fn refusal(opened: Result<Store, StoreError>, directory: &TempDir) -> String {
    let error = opened.unwrap_err().to_string();
    error.replace(&directory.path().display().to_string(), "DIR")
}

fn add(store: &mut Store, run: &Run, measured: Result<MoveRecord, &str>) {
    let finished = "2025-01-01T00:01:00Z".to_owned();
    store
        .add(run, finished, measured.map_err(str::to_owned))
        .unwrap();
}

#[test]
fn a_measured_run_is_not_made_again_and_a_failed_one_is() {
    let directory = tempfile::tempdir().unwrap();
    let runs = runs(&plan());
    let mut store = open(&directory).unwrap();
    assert!(runs.iter().all(|run| !store.has(run)));
    add(&mut store, &runs[0], Ok(sample::record(3.0)));
    add(&mut store, &runs[1], Err("a daemon does not answer"));
    assert!(store.has(&runs[0]) && !store.has(&runs[1]));
    drop(store);

    let mut store = open(&directory).unwrap();
    let has: Vec<bool> = runs.iter().map(|run| store.has(run)).collect();
    assert_eq!(has, [true, false, false, false]);
    add(&mut store, &runs[1], Ok(sample::record(5.0)));
    let results = store.into_results();
    assert_eq!(read(directory.path()).unwrap(), results);
    let found: Vec<(u32, usize, bool)> = results
        .runs
        .iter()
        .map(|run| (run.number, run.start, run.record.is_some()))
        .collect();
    assert_eq!(found, [(1, 1, true), (2, 2, true)]);
    assert_eq!(results.runs[0].record, Some(sample::record(3.0)));
    assert_eq!(results.starts.len(), 2);
    assert_eq!(results.plan_text, sample::PLAN);
}

#[test]
fn a_torn_last_line_is_dropped_and_its_run_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(RESULTS);
    let runs = runs(&plan());
    let mut store = open(&directory).unwrap();
    add(&mut store, &runs[0], Ok(sample::record(3.0)));
    add(&mut store, &runs[1], Ok(sample::record(4.0)));
    drop(store);
    let whole = fs::read(&path).unwrap();
    let first = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    for torn in [first + 1, first + 100, whole.len() - 1] {
        fs::write(&path, &whole[..torn]).unwrap();
        assert_eq!(read(directory.path()).unwrap().runs.len(), 1, "{torn}");
        assert_eq!(
            fs::read(&path).unwrap().len(),
            torn,
            "reading changes nothing"
        );
        let mut store = open(&directory).unwrap();
        let has: Vec<bool> = runs.iter().map(|run| store.has(run)).collect();
        assert_eq!(has, [true, false, false, false]);
        add(&mut store, &runs[1], Ok(sample::record(4.0)));
        assert_eq!(store.into_results().runs.len(), 2);
        assert_eq!(read(directory.path()).unwrap().runs.len(), 2);
    }
}

#[test]
fn a_line_that_nobody_here_wrote_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(&directory).unwrap());
    let path = directory.path().join(RESULTS);
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"{\"number\": 1}\n").unwrap();
    let said = refusal(open(&directory), &directory);
    assert_eq!(
        said,
        "DIR/results.jsonl line 1 cannot be read: missing field `start` at line 1 column 13"
    );
}

#[test]
fn results_of_another_plan_are_refused_and_comments_are_not_a_plan() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(&directory).unwrap());
    let commented = format!("{}# more\n", sample::PLAN);
    drop(open_as(&directory, &commented, false).unwrap());
    let other = sample::PLAN.replace("repeats = 2", "repeats = 3");
    assert_eq!(
        refusal(open_as(&directory, &other, false), &directory),
        "DIR holds results of another plan, whose question is 'Is <pre-copy> worth it, & when?': \
         give another --out, or the plan that stands in its plan.toml"
    );
    fs::write(directory.path().join(RESULTS), "{}\n").unwrap();
    fs::remove_file(directory.path().join(PLAN)).unwrap();
    assert_eq!(
        refusal(open(&directory), &directory),
        "DIR has a results.jsonl and no plan.toml: give another --out"
    );
}

#[test]
fn real_and_simulated_results_never_meet() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(&directory).unwrap());
    assert_eq!(
        refusal(open_as(&directory, sample::PLAN, true), &directory),
        "DIR holds real results and this would add simulated ones: give another --out"
    );
    assert_eq!(read(directory.path()).unwrap().starts.len(), 1);
    let directory = tempfile::tempdir().unwrap();
    drop(open_as(&directory, sample::PLAN, true).unwrap());
    assert_eq!(
        refusal(open(&directory), &directory),
        "DIR holds simulated results and this would add real ones: give another --out"
    );
}

#[test]
fn only_one_program_writes() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory).unwrap();
    assert_eq!(
        refusal(open(&directory), &directory),
        "DIR is in use: another lab run writes to it"
    );
    drop(store);
    drop(open(&directory).unwrap());
}

#[test]
fn a_directory_without_results_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let said = read(directory.path()).unwrap_err().to_string();
    assert!(
        said.contains("holds no results: it has no plan.toml"),
        "{said}"
    );
}
