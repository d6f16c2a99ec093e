//! Many cases of one test: some at a time, all of them even if one fails, each with its name.
//!
//! A process-wide limit keeps the machine from being so busy that the tests measure each other:
//! cases take one place of it, tests that measure time take all.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// What may run at once: a case is two daemons and a guest or two, which is plenty for two cores.
pub const PLACES: usize = 2;

static FREE: Mutex<usize> = Mutex::new(PLACES);
static FREED: Condvar = Condvar::new();

/// Places taken; given back when it is dropped.
#[derive(Debug)]
pub struct Places {
    count: usize,
}

impl Places {
    /// Waits for a place.
    pub fn one() -> Self {
        Self::take(1)
    }

    /// Waits until nothing else runs and keeps it so.
    pub fn all() -> Self {
        Self::take(PLACES)
    }

    fn take(count: usize) -> Self {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = FREED
            .wait_while(free, |free| *free < count)
            .unwrap_or_else(PoisonError::into_inner);
        *free -= count;
        Self { count }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += self.count;
        FREED.notify_all();
    }
}

/// Cases that may run at once if each of them waits for seconds and does nothing meanwhile.
const WAITING: usize = 6;

/// Runs `run` for every case whose name contains `LIMOSA_E2E_CASE`, or for all.
///
/// # Panics
/// At the end, with the names of all cases that failed.
pub fn run_all<C: Display + Sync>(cases: &[C], run: impl Fn(&C) + Sync) {
    run_at_once(cases, PLACES, |case| {
        let _place = Places::one();
        run(case);
    });
}

/// The same for cases that mostly wait.
///
/// # Panics
/// At the end, with the names of all cases that failed.
pub fn run_all_waiting<C: Display + Sync>(cases: &[C], run: impl Fn(&C) + Sync) {
    let _place = Places::all();
    run_at_once(cases, WAITING, run);
}

fn run_at_once<C: Display + Sync>(cases: &[C], at_once: usize, run: impl Fn(&C) + Sync) {
    let only = std::env::var("LIMOSA_E2E_CASE").unwrap_or_default();
    let wanted: Vec<&C> = cases
        .iter()
        .filter(|case| case.to_string().contains(&only))
        .collect();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let work = || {
        while let Some(case) = wanted.get(next.fetch_add(1, Ordering::SeqCst)) {
            let begun = Instant::now();
            let result = catch_unwind(AssertUnwindSafe(|| run(case)));
            let took = begun.elapsed();
            match &result {
                // Hundreds of such lines would stand before what a failure says.
                Ok(()) if only.is_empty() => {}
                Ok(()) => println!("{case}: ok in {took:.2?}"),
                Err(_) => println!("{case}: FAILED in {took:.2?}"),
            }
            if let Err(panic) = result {
                let failure = format!("{case}: {}", text(&*panic));
                failures
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(failure);
            }
        }
    };
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(work);
        }
    });
    let failures = failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let count = wanted.len();
    println!("{count} cases in {:.1?}", begun.elapsed());
    assert!(
        failures.is_empty(),
        "{} of {count} cases failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without text")
}
