//! The ledger: how migrations to this host ended, remembered beyond the life of a daemon.
//!
//! A source that lost the connection after its commit asks how the attempt ended, perhaps long
//! after the guest has moved on from here. Each fact is one line, appended with one write before it
//! is answered for: no `fsync`, since a crash of the whole host takes the guest along and leaves
//! nothing to answer for. VM processes append lines, too ([`arrival_note`]), so the file is read on
//! before anything is said.
//!
//! ```text
//!  filling ──▶ ran        it has all its pages: its source may forget it
//!     └──────▶ gone       it ended before that: nobody needs the rest
//!  ran, barred            as they are, for ever
//! ```
//!
//! Reading is tolerant: a line torn by a crash is dropped, a line that is not understood or that
//! contradicts an earlier one is skipped. Ids are random and peers choose them, so guests that came
//! and attempts that are barred are limited apart from each other: questions about made-up ids
//! cannot push out a guest that ran.

use anyhow::{Context, Result};
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_vmm::arrival_note::{self, line};
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Attempts remembered of each kind: years of migrations, 5 MiB of file, 10 MiB of memory.
const ATTEMPTS_MAX: usize = 1 << 16;
/// Bytes of a line: the longest word, a blank, the id, the line's end.
const LINE_BYTES_MAX: usize = 41;
/// Lines after which the file is written anew with what is remembered.
const LINES_MAX: usize = 4 * ATTEMPTS_MAX;
/// Bytes that are read of a file, its last ones.
const READ_MAX: u64 = (2 * LINES_MAX * LINE_BYTES_MAX) as u64;

/// What is known about past attempts to move guests here.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    /// So many bytes of it have been understood, whole lines all.
    known_bytes: u64,
    lines: usize,
    attempts: Attempts,
}

/// How an attempt to move a guest here stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// It runs here, and misses pages that only its source has.
    Filling,
    /// It runs here, or ran, with all its pages.
    Ran,
    /// It ran here and ended before all its pages had come.
    Gone,
    /// It never ran here and never will.
    Barred,
}

impl Note {
    const ALL: [Self; 4] = [Self::Filling, Self::Ran, Self::Gone, Self::Barred];

    const fn word(self) -> &'static str {
        match self {
            Self::Filling => arrival_note::FILLING,
            Self::Ran => arrival_note::RAN,
            Self::Gone => "gone",
            Self::Barred => "barred",
        }
    }

    /// Whether a later line may say `next`.
    fn can_become(self, next: Self) -> bool {
        self == Self::Filling && matches!(next, Self::Ran | Self::Gone)
    }
}

/// The attempts by id, and in the order in which they came, to forget the oldest.
#[derive(Debug, Default)]
struct Attempts {
    by_id: HashMap<MigrationId, Note>,
    came: VecDeque<MigrationId>,
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
        let cannot = |what: &str| format!("cannot {what} {}", path.display());
        let file = arrival_note::open(path).with_context(|| cannot("open"))?;
        let length = file.metadata().with_context(|| cannot("read"))?.len();
        let mut ledger = Self {
            path: path.to_owned(),
            file,
            known_bytes: length.saturating_sub(READ_MAX),
            lines: 0,
            attempts: Attempts::default(),
        };
        let whole = ledger.read_on().with_context(|| cannot("read"))?;
        // A torn last line has no end; the next record must not be glued to it.
        if whole < length {
            tracing::warn!("the last line of the ledger was torn and is dropped");
            ledger.file.set_len(whole)?;
        }
        Ok(ledger)
    }

    /// How an attempt stands, if it is known.
    pub fn look_up(&mut self, id: MigrationId) -> Option<Note> {
        if let Err(error) = self.read_on() {
            tracing::error!(%error, "what VM processes have written to the ledger cannot be read");
        }
        self.attempts.by_id.get(&id).copied()
    }

    /// Notes that the guest of `id` runs here; with `is_filling` without all its pages.
    ///
    /// # Errors
    /// The attempt is barred, or the file cannot be written. Then it must not run.
    pub fn note_running(&mut self, id: MigrationId, is_filling: bool) -> Result<(), LedgerError> {
        if self.look_up(id) == Some(Note::Barred) {
            return Err(LedgerError::Barred);
        }
        let note = if is_filling { Note::Filling } else { Note::Ran };
        Ok(self.note(id, note)?)
    }

    /// Notes that the guest of `id` ended before all its pages had come.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn note_gone(&mut self, id: MigrationId) -> std::io::Result<()> {
        self.note(id, Note::Gone)
    }

    /// Answers for an attempt of which nothing lives here: as noted, else barred from now on.
    pub fn resolve(&mut self, id: MigrationId) -> Resolution {
        match self.look_up(id) {
            Some(Note::Ran) => Resolution::Runs,
            // Its process is no more, and nobody saw it end.
            Some(Note::Filling | Note::Gone) => Resolution::Gone,
            Some(Note::Barred) => Resolution::Barred,
            None => {
                if let Err(error) = self.append(id, Note::Barred) {
                    // Still barred for as long as this daemon lives, and its sessions die with it.
                    tracing::error!(migration_id = %id, %error, "a barred migration could not be written to the ledger");
                    self.attempts.insert(id, Note::Barred);
                }
                Resolution::Barred
            }
        }
    }

    /// Writes a note down unless what is known says as much already.
    fn note(&mut self, id: MigrationId, note: Note) -> std::io::Result<()> {
        match self.look_up(id) {
            Some(known) if !known.can_become(note) => Ok(()),
            Some(_) | None => self.append(id, note),
        }
    }

    fn append(&mut self, id: MigrationId, note: Note) -> std::io::Result<()> {
        let line = line(note.word(), id);
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            // What was written of it ends here, so that the next line begins a new one.
            if let Err(error) = self.file.write_all(b"\n") {
                tracing::debug!(%error, "nor could the line be ended");
            }
            return Err(error);
        }
        self.read_on()?;
        self.attempts.insert(id, note);
        if self.lines > LINES_MAX
            && let Err(error) = self.rewrite()
        {
            tracing::warn!(%error, "the ledger could not be shortened");
        }
        Ok(())
    }

    /// Takes note of the lines that were added to the file, up to the last one that has an end;
    /// returns how many bytes of the file are known then.
    fn read_on(&mut self) -> std::io::Result<u64> {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(self.known_bytes))?;
        (&self.file).take(READ_MAX).read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n');
        bytes.truncate(whole.map_or(0, |end| end + 1));
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.lines += 1;
            match parse_line(line) {
                Some((id, note)) => self.attempts.insert(id, note),
                None => tracing::warn!("a line of the ledger is not understood"),
            }
        }
        self.known_bytes += bytes.len() as u64;
        Ok(self.known_bytes)
    }

    /// Writes the file anew with what is remembered, while no VM process writes to it.
    fn rewrite(&mut self) -> std::io::Result<()> {
        self.file.try_lock()?;
        self.read_on()?;
        let next = self.path.with_extension("next");
        let mut text = String::new();
        for id in self.attempts.barred.iter().chain(&self.attempts.came) {
            if let Some(note) = self.attempts.by_id.get(id) {
                text.push_str(&line(note.word(), *id));
            }
        }
        fs::write(&next, &text)?;
        let file = arrival_note::open(&next)?;
        fs::rename(&next, &self.path)?;
        self.file = file;
        self.known_bytes = text.len() as u64;
        self.lines = text.lines().count();
        Ok(())
    }
}

impl Attempts {
    /// Takes note of a fact, or of what became of it.
    fn insert(&mut self, id: MigrationId, note: Note) {
        if let Some(known) = self.by_id.get_mut(&id) {
            if known.can_become(note) {
                *known = note;
            }
            return;
        }
        self.by_id.insert(id, note);
        let order = match note {
            Note::Filling | Note::Ran | Note::Gone => &mut self.came,
            Note::Barred => &mut self.barred,
        };
        order.push_back(id);
        if order.len() > ATTEMPTS_MAX
            && let Some(oldest) = order.pop_front()
        {
            self.by_id.remove(&oldest);
        }
    }
}

fn parse_line(line: &[u8]) -> Option<(MigrationId, Note)> {
    let (word, id) = str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
    let note = Note::ALL.into_iter().find(|note| note.word() == word)?;
    Some((crate::api::parse_id(id)?, note))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: MigrationId = MigrationId(1);
    const TWO: MigrationId = MigrationId(2);

    /// Opens a ledger with this text and says what it knows about ids 1 to 3.
    fn check(text: &[u8], expect: [Option<Note>; 3]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        fs::write(&path, text).unwrap();
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!([1, 2, 3].map(|id| ledger.look_up(MigrationId(id))), expect);
    }

    fn text(id: u128, word: &str) -> String {
        format!("{word} {id:032x}\n")
    }

    #[test]
    fn reading_is_tolerant() {
        let (runs, barred) = (Some(Note::Ran), Some(Note::Barred));
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
        ledger.note_running(ONE, false).unwrap();
        assert_eq!(ledger.resolve(TWO), Resolution::Barred);
        drop(ledger);
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.resolve(ONE), Resolution::Runs);
        assert!(matches!(
            ledger.note_running(TWO, true),
            Err(LedgerError::Barred)
        ));
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            text(1, "ran") + &text(2, "barred")
        );
    }

    #[test]
    fn a_guest_without_its_pages_gets_them_or_is_gone() {
        let (filling, ran, gone) = (Some(Note::Filling), Some(Note::Ran), Some(Note::Gone));
        let said = text(1, "filling") + &text(2, "filling") + &text(3, "filling");
        check(said.as_bytes(), [filling; 3]);
        let more = said + &text(1, "ran") + &text(2, "gone") + &text(3, "barred");
        check(more.as_bytes(), [ran, gone, filling]);
        // What contradicts an earlier line did not happen.
        let more = more + &text(1, "gone") + &text(2, "ran") + &text(2, "filling");
        check(more.as_bytes(), [ran, gone, filling]);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.note_running(ONE, true).unwrap();
        assert_eq!(ledger.resolve(ONE), Resolution::Gone);
        ledger.note_running(TWO, true).unwrap();
        ledger.note_running(TWO, false).unwrap();
        ledger.note_gone(TWO).unwrap();
        assert_eq!(ledger.resolve(TWO), Resolution::Runs);
        ledger.note_gone(ONE).unwrap();
        let said = text(1, "filling") + &text(2, "filling") + &text(2, "ran") + &text(1, "gone");
        assert_eq!(fs::read_to_string(&path).unwrap(), said);
        ledger.lines = LINES_MAX;
        assert_eq!(ledger.resolve(MigrationId(3)), Resolution::Barred);
        let said = text(3, "barred") + &text(1, "gone") + &text(2, "ran");
        assert_eq!(fs::read_to_string(&path).unwrap(), said);
    }

    #[test]
    fn made_up_ids_cannot_push_out_a_guest_that_ran() {
        let mut attempts = Attempts::default();
        attempts.insert(ONE, Note::Ran);
        for id in 0..2 * ATTEMPTS_MAX as u128 {
            attempts.insert(MigrationId(id << 8), Note::Barred);
        }
        assert_eq!(attempts.by_id.get(&ONE), Some(&Note::Ran));
        assert_eq!(attempts.by_id.len(), ATTEMPTS_MAX + 1);
    }

    #[test]
    fn what_a_vm_process_notes_is_known_before_anything_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        arrival_note::append(&path, ONE, false).unwrap();
        arrival_note::append(&path, TWO, true).unwrap();
        assert_eq!(ledger.resolve(ONE), Resolution::Runs);
        assert_eq!(ledger.resolve(TWO), Resolution::Gone);
        ledger.note_running(ONE, false).unwrap();
        let said = text(1, "ran") + &text(2, "filling");
        assert_eq!(fs::read_to_string(&path).unwrap(), said);
        // The one that has taken its place.
        ledger.lines = LINES_MAX;
        ledger.note_running(TWO, false).unwrap();
        arrival_note::append(&path, MigrationId(3), false).unwrap();
        assert_eq!(ledger.resolve(MigrationId(3)), Resolution::Runs);
        let said = text(1, "ran") + &text(2, "ran") + &text(3, "ran");
        assert_eq!(fs::read_to_string(&path).unwrap(), said);
    }

    #[test]
    fn a_long_ledger_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.note_running(ONE, false).unwrap();
        ledger.lines = LINES_MAX;
        ledger.resolve(TWO);
        assert_eq!(ledger.lines, 2);
        ledger.note_running(MigrationId(3), false).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            text(2, "barred") + &text(1, "ran") + &text(3, "ran")
        );
    }
}
