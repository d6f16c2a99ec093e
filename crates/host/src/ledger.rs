//! The ledger: how migrations to this host ended, remembered beyond the life of a daemon.
//!
//! A source that lost the connection after its commit asks how the attempt ended, perhaps long
//! after the guest has moved on from here. The answer must be the same for ever: an attempt whose
//! guest ran here *runs*, one that was asked for and did not run is *barred*. Each is one line,
//! appended with one write before the fact it stands for: no `fsync`, since a crash of the whole
//! host takes the guest along and leaves nothing to answer for.
//!
//! Reading is tolerant: a line torn by a crash is dropped, a line that is not understood is
//! skipped. Ids are random and peers choose them, so both kinds are limited, apart from each
//! other: questions about made-up ids cannot push out a guest that ran.

use anyhow::{Context, Result};
use limosa_engine::handover::{MigrationId, Resolution};
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Attempts remembered of each kind: years of migrations, 5 MiB of file, 10 MiB of memory.
const ATTEMPTS_MAX: usize = 1 << 16;
/// Bytes of a line: the longer word, a blank, the id, the line's end.
const LINE_BYTES_MAX: usize = 40;
/// Lines after which the file is written anew with what is remembered.
const LINES_MAX: usize = 4 * ATTEMPTS_MAX;

/// What is known about past attempts to move guests here.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    lines: usize,
    attempts: Attempts,
}

/// The attempts by id, and in the order in which they came, to forget the oldest.
#[derive(Debug, Default)]
struct Attempts {
    by_id: HashMap<MigrationId, Resolution>,
    ran: VecDeque<MigrationId>,
    barred: VecDeque<MigrationId>,
}

/// Why an attempt cannot be noted as running.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A source was told that it never will.
    #[error("the migration was barred: its source has been told to keep the guest")]
    Barred,
    /// The file cannot be written.
    #[error("the ledger cannot be written: {0}")]
    Write(#[from] std::io::Error),
}

impl Ledger {
    /// Reads the ledger, or begins one.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file =
            open_to_append(path).with_context(|| format!("cannot open {}", path.display()))?;
        let text =
            read_tail(&mut file).with_context(|| format!("cannot read {}", path.display()))?;
        // A torn last line has no end; the next record must not be glued to it.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            tracing::warn!("the last line of the ledger was torn and is dropped");
            let length = file.metadata()?.len() - (text.len() - whole) as u64;
            file.set_len(length)?;
        }
        let mut ledger = Self {
            path: path.to_owned(),
            file,
            lines: 0,
            attempts: Attempts::default(),
        };
        for line in text[..whole].lines() {
            ledger.lines += 1;
            match parse_line(line) {
                Some((id, resolution)) => ledger.attempts.insert(id, resolution),
                None => tracing::warn!(
                    line = ledger.lines,
                    "a line of the ledger is not understood"
                ),
            }
        }
        Ok(ledger)
    }

    /// How an attempt ended, if it is known.
    pub fn look_up(&self, id: MigrationId) -> Option<Resolution> {
        self.attempts.by_id.get(&id).copied()
    }

    /// Notes that the guest of `id` is about to run here.
    ///
    /// # Errors
    /// The attempt is barred, or the file cannot be written. Then it must not run.
    pub fn note_running(&mut self, id: MigrationId) -> Result<(), LedgerError> {
        match self.look_up(id) {
            Some(Resolution::Barred) => Err(LedgerError::Barred),
            Some(Resolution::Runs) => Ok(()),
            None => Ok(self.append(id, Resolution::Runs)?),
        }
    }

    /// Answers for an attempt that no session knows: as noted, else barred from now on.
    pub fn resolve(&mut self, id: MigrationId) -> Resolution {
        if let Some(resolution) = self.look_up(id) {
            return resolution;
        }
        if let Err(error) = self.append(id, Resolution::Barred) {
            // Still barred for as long as this daemon lives, and its sessions die with it.
            tracing::error!(migration_id = %id, %error, "a barred migration could not be written to the ledger");
            self.attempts.insert(id, Resolution::Barred);
        }
        Resolution::Barred
    }

    fn append(&mut self, id: MigrationId, resolution: Resolution) -> std::io::Result<()> {
        let line = line(id, resolution);
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            // What was written of it ends here, so that the next line begins a new one.
            if let Err(error) = self.file.write_all(b"\n") {
                tracing::debug!(%error, "nor could the line be ended");
            }
            return Err(error);
        }
        self.attempts.insert(id, resolution);
        self.lines += 1;
        if self.lines > LINES_MAX
            && let Err(error) = self.rewrite()
        {
            tracing::warn!(%error, "the ledger could not be shortened");
        }
        Ok(())
    }

    /// Writes the file anew with what is remembered.
    fn rewrite(&mut self) -> std::io::Result<()> {
        let next = self.path.with_extension("next");
        let mut text = String::new();
        for (ids, resolution) in [
            (&self.attempts.barred, Resolution::Barred),
            (&self.attempts.ran, Resolution::Runs),
        ] {
            ids.iter()
                .for_each(|id| text.push_str(&line(*id, resolution)));
        }
        fs::write(&next, &text)?;
        let file = open_to_append(&next)?;
        fs::rename(&next, &self.path)?;
        self.file = file;
        self.lines = text.lines().count();
        Ok(())
    }
}

impl Attempts {
    fn insert(&mut self, id: MigrationId, resolution: Resolution) {
        if self.by_id.insert(id, resolution).is_some() {
            return;
        }
        let order = match resolution {
            Resolution::Runs => &mut self.ran,
            Resolution::Barred => &mut self.barred,
        };
        order.push_back(id);
        if order.len() > ATTEMPTS_MAX
            && let Some(oldest) = order.pop_front()
        {
            self.by_id.remove(&oldest);
        }
    }
}

fn open_to_append(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// The file, or of a file that is too long the last lines of it.
fn read_tail(file: &mut File) -> std::io::Result<String> {
    let limit = (2 * LINES_MAX * LINE_BYTES_MAX) as u64;
    let start = file.metadata()?.len().saturating_sub(limit);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    // Foreign bytes become characters of one byte each, so that lengths stay what they are.
    let is_text = bytes.iter().all(u8::is_ascii);
    if !is_text {
        bytes
            .iter_mut()
            .filter(|byte| !byte.is_ascii())
            .for_each(|byte| *byte = b'?');
    }
    Ok(bytes.into_iter().map(char::from).collect())
}

fn line(id: MigrationId, resolution: Resolution) -> String {
    let word = match resolution {
        Resolution::Runs => "ran",
        Resolution::Barred => "barred",
    };
    format!("{word} {id}\n")
}

fn parse_line(line: &str) -> Option<(MigrationId, Resolution)> {
    let (word, id) = line.split_once(' ')?;
    let resolution = match word {
        "ran" => Resolution::Runs,
        "barred" => Resolution::Barred,
        _ => return None,
    };
    Some((crate::api::parse_id(id)?, resolution))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: MigrationId = MigrationId(1);
    const TWO: MigrationId = MigrationId(2);

    /// Opens a ledger with this text and says what it knows about ids 1 to 3.
    fn check(text: &[u8], expect: [Option<Resolution>; 3]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        fs::write(&path, text).unwrap();
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!([1, 2, 3].map(|id| ledger.look_up(MigrationId(id))), expect);
    }

    fn text(id: u128, word: &str) -> String {
        format!("{word} {id:032x}\n")
    }

    #[test]
    fn reading_is_tolerant() {
        let (runs, barred) = (Some(Resolution::Runs), Some(Resolution::Barred));
        let sound = text(1, "ran") + &text(2, "barred");
        check(sound.as_bytes(), [runs, barred, None]);
        check(b"", [None; 3]);
        let torn = sound.clone() + "ran 0000000000000000000000000000000";
        check(torn.as_bytes(), [runs, barred, None]);
        let foreign = text(1, "ran") + "sailed 3\n\n\nran zz\n" + &text(3, "barred");
        check(foreign.as_bytes(), [runs, None, barred]);
        let mut bytes = vec![0xff, 0, b'\n'];
        bytes.extend(sound.as_bytes());
        check(&bytes, [runs, barred, None]);
    }

    #[test]
    fn what_was_noted_is_remembered_by_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        fs::write(&path, "ran 0000").unwrap();
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.note_running(ONE).unwrap();
        assert_eq!(ledger.resolve(TWO), Resolution::Barred);
        drop(ledger);
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.resolve(ONE), Resolution::Runs);
        assert!(matches!(ledger.note_running(TWO), Err(LedgerError::Barred)));
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            text(1, "ran") + &text(2, "barred")
        );
    }

    #[test]
    fn made_up_ids_cannot_push_out_a_guest_that_ran() {
        let mut attempts = Attempts::default();
        attempts.insert(ONE, Resolution::Runs);
        for id in 0..2 * ATTEMPTS_MAX as u128 {
            attempts.insert(MigrationId(id << 8), Resolution::Barred);
        }
        assert_eq!(attempts.by_id.get(&ONE), Some(&Resolution::Runs));
        assert_eq!(attempts.by_id.len(), ATTEMPTS_MAX + 1);
    }

    #[test]
    fn a_long_ledger_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.note_running(ONE).unwrap();
        ledger.lines = LINES_MAX;
        ledger.resolve(TWO);
        assert_eq!(ledger.lines, 2);
        ledger.note_running(MigrationId(3)).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            text(2, "barred") + &text(1, "ran") + &text(3, "ran")
        );
    }
}
