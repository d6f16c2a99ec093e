//! The line by which a VM process says that the guest of a migration runs, before it does.
//!
//! The process may end with its daemon in the instant after the guest's first instruction. Whoever
//! asks the host afterwards must hear that it ran: its source would set it back in time. So the
//! process appends the line to the host's ledger itself, and only then starts the vCPUs. One line
//! is one write and no `fsync`: a crash of the whole host takes the guest along.
//!
//! The daemon shortens the ledger by putting another file in its place, and locks the old one
//! meanwhile: a line is written under a lock of the file that bears the name.

use limosa_engine::handover::MigrationId;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The word for a guest that runs with all its pages.
pub const RAN: &str = "ran";
/// The word for a guest that runs and misses pages.
pub const FILLING: &str = "filling";

/// A line of the ledger.
pub fn line(word: &str, id: MigrationId) -> String {
    format!("{word} {id}\n")
}

/// Opens a ledger to read it and to append to it, and makes it if there is none.
///
/// # Errors
/// The file cannot be opened or made.
pub fn open(ledger: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(ledger)
}

/// Notes that the guest of `id` runs; with `is_filling` without all its pages.
///
/// # Errors
/// The file cannot be written; then nobody would know that it ran, and it must not run.
pub fn append(ledger: &Path, id: MigrationId, is_filling: bool) -> io::Result<()> {
    let word = if is_filling { FILLING } else { RAN };
    loop {
        let mut file = open(ledger)?;
        file.lock_shared()?;
        let (ours, named) = (file.metadata()?, std::fs::metadata(ledger)?);
        // Another one may have got its name before the lock was ours.
        if (ours.dev(), ours.ino()) == (named.dev(), named.ino()) {
            return file.write_all(line(word, id).as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn notes_are_appended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        append(&path, MigrationId(1), false).unwrap();
        append(&path, MigrationId(2), true).unwrap();
        let expect = format!("ran {:032x}\nfilling {:032x}\n", 1, 2);
        assert_eq!(fs::read_to_string(&path).unwrap(), expect);
        append(dir.path(), MigrationId(1), false).unwrap_err();
    }

    #[test]
    fn a_note_goes_to_the_file_that_has_the_name_by_then() {
        let dir = tempfile::tempdir().unwrap();
        let [path, next] = ["ledger", "next"].map(|name| dir.path().join(name));
        let old = open(&path).unwrap();
        old.lock().unwrap();
        let (done, is_done) = channel();
        let note = path.clone();
        let writer = thread::spawn(move || {
            append(&note, MigrationId(1), false).unwrap();
            done.send(()).unwrap();
        });
        is_done
            .recv_timeout(Duration::from_millis(50))
            .expect_err("the file is being replaced");
        fs::write(&next, "").unwrap();
        fs::rename(&next, &path).unwrap();
        drop(old);
        writer.join().unwrap();
        let expect = line(RAN, MigrationId(1));
        assert_eq!(fs::read_to_string(&path).unwrap(), expect);
    }
}
