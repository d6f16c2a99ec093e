//! A hook for tests: holds a migration just before one action.
//!
//! With `LIMOSA_HOLD=POINT:PATH` in the daemon's environment, the first time that a migration is
//! about to carry out the action of that name it creates `PATH.held` and waits until `PATH` exists,
//! 30 s at most. A test kills, cuts or aborts meanwhile. Points are the names of the engine's
//! actions, with `source.` or `target.` in front; without the variable this costs nothing.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Longest hold: a test that forgot to let go shall fail by its own assertions.
const HOLD_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Hold {
    point: String,
    path: PathBuf,
    used: AtomicBool,
}

/// Waits here if a test asked for it.
pub(crate) fn at(role: &str, action: &str) {
    static HOLD: OnceLock<Option<Hold>> = OnceLock::new();
    let hold = HOLD.get_or_init(|| {
        let value = std::env::var("LIMOSA_HOLD").ok()?;
        let (point, path) = value.split_once(':')?;
        Some(Hold {
            point: point.to_owned(),
            path: path.into(),
            used: AtomicBool::new(false),
        })
    });
    let Some(hold) = hold else { return };
    let is_here = hold.point.split_once('.') == Some((role, action));
    if !is_here || hold.used.swap(true, Ordering::SeqCst) {
        return;
    }
    let held = hold.path.with_extension("held");
    if let Err(error) = std::fs::write(&held, b"") {
        tracing::warn!(%error, "a hold could not be announced");
        return;
    }
    let end = Instant::now() + HOLD_MAX;
    while !hold.path.exists() && Instant::now() < end {
        thread::sleep(Duration::from_millis(2));
    }
}
