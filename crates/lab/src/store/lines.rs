//! A file of JSON values, one a line, to which lines are only ever added.
//!
//! A line counts when its end is there: what follows the last end is dropped before anything is
//! added, and overlooked by those who only read.

use super::{StoreError, file_error};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The file, open for adding.
#[derive(Debug)]
pub(super) struct Lines {
    file: File,
    path: PathBuf,
}

impl Lines {
    /// Opens the file or makes it.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(|error| file_error("write", path, error))?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// Keeps others out for as long as this value lives; `false` if another one does so.
    pub(super) fn lock(&self) -> Result<bool, StoreError> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(file_error("lock", &self.path, error)),
        }
    }

    /// All values; a torn last line is taken out of the file.
    pub(super) fn read<T: DeserializeOwned>(&mut self) -> Result<Vec<T>, StoreError> {
        let bytes = content(&self.path)?;
        let whole = whole(&bytes);
        if whole.len() < bytes.len() {
            self.file
                .set_len(whole.len() as u64)
                .map_err(|error| file_error("write", &self.path, error))?;
        }
        values(&self.path, whole)
    }

    /// Adds a value; it is with the system when this returns.
    pub(super) fn append<T: Serialize>(&mut self, value: &T) -> Result<(), StoreError> {
        let mut line = serde_json::to_vec(value)
            .map_err(|error| file_error("write", &self.path, error.into()))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .and_then(|()| self.file.sync_data())
            .map_err(|error| file_error("write", &self.path, error))
    }
}

/// All values of a file that is only read; none if it is not there.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, StoreError> {
    values(path, whole(&content(path)?))
}

fn content(path: &Path) -> Result<Vec<u8>, StoreError> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|error| file_error("read", path, error)),
    }
}

/// Everything up to the last end of a line.
fn whole(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|byte| *byte == b'\n');
    &bytes[..end.map_or(0, |end| end + 1)]
}

fn values<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<Vec<T>, StoreError> {
    let lines = bytes.split(|byte| *byte == b'\n').zip(1..);
    lines
        .filter(|(line, _)| !line.is_empty())
        .map(|(line, number)| {
            serde_json::from_slice(line).map_err(|error| StoreError::BadLine {
                path: path.to_owned(),
                line: number,
                message: error.to_string(),
            })
        })
        .collect()
}
