//! Holding a migration at one of its actions: the daemon's test hook `LIMOSA_HOLD`.
//!
//! The daemon creates a file when the action is about to be carried out, and goes on when another
//! file exists. A hold lets go when it is dropped, so that a failed test does not leave a daemon
//! waiting.

use crate::wait;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// Name of the variable in the daemon's environment.
pub const VARIABLE: &str = "LIMOSA_HOLD";

/// One point at which the first migration of a daemon waits.
#[derive(Debug)]
pub struct Hold {
    point: String,
    path: PathBuf,
    _directory: TempDir,
}

impl Hold {
    /// A hold at `point`, for example `source.pause`.
    ///
    /// # Panics
    /// If the point names no side.
    pub fn new(point: &str) -> Self {
        assert!(
            point.starts_with("source.") || point.starts_with("target."),
            "{point}"
        );
        let directory = tempfile::Builder::new()
            .prefix("limosa-hold-")
            .tempdir()
            .expect("a temporary directory");
        Self {
            point: point.to_owned(),
            path: directory.path().join("go"),
            _directory: directory,
        }
    }

    /// Whether it is the daemon at the source that waits.
    pub fn is_at_source(&self) -> bool {
        self.point.starts_with("source.")
    }

    /// For the daemon's environment.
    pub fn value(&self) -> String {
        format!("{}:{}", self.point, self.path.display())
    }

    /// Waits until a migration has come to the point.
    ///
    /// # Panics
    /// If none does.
    #[track_caller]
    pub fn wait_until_held(&self) {
        let what = format!("a migration comes to {}", self.point);
        wait::until_true(&what, || self.is_held());
    }

    /// Whether a migration has come to the point.
    pub fn is_held(&self) -> bool {
        self.path.with_extension("held").exists()
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// If the file cannot be made.
    pub fn release(&self) {
        fs::write(&self.path, b"").expect("the directory is ours");
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.release();
    }
}
