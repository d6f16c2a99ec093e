//! Waiting for facts.

use std::time::{Duration, Instant};

/// For whatever should happen at once or soon: far longer than a busy machine needs, and shorter
/// than what a person waits for a test.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Looks until there is something, at most `limit`.
pub fn poll<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        // The last look is after the end: a look that took long must not be the only one.
        let is_last = Instant::now() >= end;
        let found = look();
        if found.is_some() || is_last {
            return found;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Looks until there is something.
///
/// # Panics
/// If it does not come within [`PATIENCE`].
#[track_caller]
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    poll(PATIENCE, look).unwrap_or_else(|| panic!("waited {PATIENCE:?} in vain: {what}"))
}

/// Waits until it is so.
///
/// # Panics
/// If it is not so within [`PATIENCE`].
#[track_caller]
pub fn until_true(what: &str, mut is_so: impl FnMut() -> bool) {
    until(what, || is_so().then_some(()));
}
