//! Journals on disk: the configuration and every event of one migration's source.
//!
//! Written once at the end of a migration, so that nothing is written while a guest is paused.

use limosa_engine::journal::{self, Divergence, Entry};
use limosa_engine::source::{Source, SourceConfig, SourceEvent};
use std::io;
use std::path::Path;

/// First bytes of a journal; the last two digits are the format's version.
const MAGIC: &[u8; 8] = b"LIMJRN01";
/// Longest journal that is read back.
const BYTES_MAX: u64 = 256 << 20;

/// Why a journal cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be read.
    #[error("cannot read the journal")]
    Read(#[from] io::Error),
    /// It is no journal, or one of another version, or damaged.
    #[error("not a journal of this version of limosa")]
    Foreign,
    /// The engine answers otherwise than it did.
    #[error(transparent)]
    Diverged(#[from] Divergence),
}

/// Writes a journal. `None` stands for a migration that was taken up after a restart.
pub(crate) fn write(
    path: &Path,
    config: &SourceConfig,
    is_recovery: bool,
    entries: &[Entry<SourceEvent>],
) -> io::Result<()> {
    let mut bytes = MAGIC.to_vec();
    let body = postcard::to_allocvec(&(config, is_recovery, entries)).map_err(io::Error::other)?;
    bytes.extend_from_slice(&body);
    std::fs::write(path, bytes)
}

/// Replays a journal on a fresh engine; the number of steps, if all give the same actions.
///
/// # Errors
/// The file is no journal, or the engine answers otherwise than it did.
pub fn replay_file(path: &Path) -> Result<usize, JournalError> {
    if std::fs::metadata(path)?.len() > BYTES_MAX {
        return Err(JournalError::Foreign);
    }
    let bytes = std::fs::read(path)?;
    let body = bytes.strip_prefix(MAGIC).ok_or(JournalError::Foreign)?;
    let (config, is_recovery, entries): (SourceConfig, bool, Vec<Entry<SourceEvent>>) =
        postcard::from_bytes(body).map_err(|_| JournalError::Foreign)?;
    if !config.is_sound() {
        return Err(JournalError::Foreign);
    }
    let mut source = if is_recovery {
        Source::recover(config)
    } else {
        Source::new(config)
    };
    Ok(journal::replay(&mut source, entries)?)
}
