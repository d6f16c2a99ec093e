//! Ten thousand seeds a technique: things go wrong, and no rule is ever broken.
//!
//! A failure prints the seed. `LIMOSA_SIM_SEED=…` runs only that one and tells every step;
//! `LIMOSA_SIM_SEEDS=…` runs as many as one has time for.

use limosa_engine::policy::Mode;
use limosa_sim::trial::Trial;
use std::{panic, thread};

const SEEDS: u64 = 10_000;
const SHARDS: usize = 2;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {text}")),
    )
}

/// What a seed breaks, an assertion of the engine included.
fn broken(mode: Mode, seed: u64) -> Option<String> {
    match panic::catch_unwind(|| Trial::new(mode, seed).run()) {
        Ok(Ok(_)) => None,
        Ok(Err(violation)) => Some(violation.to_string()),
        Err(_) => Some(String::from("an assertion, which is told above")),
    }
}

fn check(mode: Mode) {
    if let Some(seed) = number("LIMOSA_SIM_SEED") {
        let trial = Trial {
            traces: true,
            replays: true,
            ..Trial::new(mode, seed)
        };
        let summary = trial
            .run()
            .unwrap_or_else(|violation| panic!("seed {seed}, {mode}: {violation}"));
        eprintln!(
            "seed {seed}, {mode}: {} steps in {:?}",
            summary.steps, summary.virtual_time
        );
        return;
    }
    let seeds = number("LIMOSA_SIM_SEEDS").unwrap_or(SEEDS);
    let shards: Vec<_> = (0..SHARDS as u64)
        .map(|shard| {
            thread::spawn(move || {
                (shard..seeds)
                    .step_by(SHARDS)
                    .filter_map(|seed| Some((seed, broken(mode, seed)?)))
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    let mut broken: Vec<_> = shards
        .into_iter()
        .flat_map(|shard| {
            shard
                .join()
                .expect("a trial returns its violation and never panics")
        })
        .collect();
    broken.sort_by_key(|(seed, _)| *seed);
    for (seed, violation) in broken.iter().take(20) {
        eprintln!("{mode}: seed {seed} breaks {violation}");
    }
    if let Some((seed, violation)) = broken.first() {
        panic!(
            "{} of {seeds} seeds break a rule, the first is {seed}: {violation}\n\
             replay: LIMOSA_SIM_SEED={seed} cargo test -p limosa-sim --test seeds {} -- --nocapture",
            broken.len(),
            mode.name().replace('-', "_"),
        );
    }
}

#[test]
fn stop_and_copy() {
    check(Mode::StopAndCopy);
}

#[test]
fn demand() {
    check(Mode::Demand);
}

#[test]
fn post_copy() {
    check(Mode::PostCopy);
}

#[test]
fn pre_copy() {
    check(Mode::PreCopy);
}

#[test]
fn hybrid() {
    check(Mode::Hybrid);
}

#[test]
fn auto() {
    check(Mode::Auto);
}

/// Far seeds that broke a rule once: a push stream that died unnoticed while the guest asked for one
/// page after the other.
#[test]
fn seeds_of_the_past() {
    for (mode, seed) in [(Mode::Demand, 18689), (Mode::PostCopy, 20259)] {
        assert_eq!(broken(mode, seed), None, "seed {seed}, {mode}");
    }
}
