//! Disks that are made here for guests that bring theirs along.
//!
//! They are files at the paths that the guest knows, which must be free. Until the guest runs here they are
//! nobody's: if it does not arrive they go, and a daemon that was killed meanwhile finds what it made in a
//! note for each attempt. A note names the file itself, so that no other one is removed that has its path by
//! then. No `fsync`: after a crash of the whole host nobody knows who ran, so what a note of an earlier boot names
//! is kept. A daemon that is killed between making a file and noting it leaves that behind, too, empty.

use crate::notes::Notes;
use limosa_engine::handover::MigrationId;
use limosa_engine::wire::CopiedDisk;
use limosa_vmm::config::devices::DiskConfig;
use rustix::fs::statvfs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A disk that has to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// Where.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// How much of it will be written.
    pub data: u64,
}

/// What was made for an attempt.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// The running kernel at that time.
    boot_id: u128,
    made: Vec<Made>,
}

/// A file that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// The disks that a guest brings along.
///
/// # Errors
/// What is announced are not its disks.
pub fn announced(disks: &[DiskConfig], copied: &[CopiedDisk]) -> Result<Vec<NewDisk>, String> {
    let sizes = disks.iter().map(|disk| disk.bytes);
    if !sizes.eq(copied.iter().map(|disk| Some(disk.size.get()))) {
        return Err("the source contradicts itself about the disks".to_owned());
    }
    let new = |(disk, copied): (&DiskConfig, &CopiedDisk)| NewDisk {
        path: PathBuf::from(&disk.path),
        bytes: copied.size.get(),
        data: copied.data.get(),
    };
    Ok(disks.iter().zip(copied).map(new).collect())
}

/// What is in the way of making them here, each in one line.
pub fn in_the_way(disks: &[NewDisk]) -> Vec<String> {
    let mut differences = Vec::new();
    // What each file system has to take.
    let mut needed: BTreeMap<u64, (u64, &Path)> = BTreeMap::new();
    for NewDisk { path, data, .. } in disks {
        let shown = path.display();
        if fs::symlink_metadata(path).is_ok() {
            differences.push(format!(
                "disk {shown} is there already, and would be made anew: move it out of the way, or move the guest without copying disks"
            ));
        }
        let directory = path.parent().unwrap_or(path);
        match fs::metadata(directory) {
            Ok(status) => {
                let room = needed.entry(status.dev()).or_insert((0, directory));
                room.0 = room.0.saturating_add(*data);
            }
            Err(error) => differences.push(format!(
                "disk {shown} cannot be made: {}: {error}",
                directory.display()
            )),
        }
    }
    for (needed, directory) in needed.into_values() {
        match free_bytes(directory) {
            Ok(free) if free < needed => differences.push(format!(
                "disks need {needed} bytes below {}, where {free} are free",
                directory.display()
            )),
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "free room is not known"),
        }
    }
    differences
}

fn free_bytes(directory: &Path) -> io::Result<u64> {
    let status = statvfs(directory)?;
    Ok(status.f_bavail.saturating_mul(status.f_frsize))
}

/// The disks that were made for guests that do not run here yet.
#[derive(Debug)]
pub struct NewDisks(Notes<Note>);

impl NewDisks {
    /// With notes in the directory `dir`, which is there.
    pub fn new(dir: PathBuf) -> Self {
        Self(Notes::new(dir, "new disks"))
    }

    /// Makes the disks of an attempt, all zero; none if one cannot be made.
    ///
    /// # Errors
    /// Why, in one line.
    pub fn make(&self, id: MigrationId, disks: &[NewDisk]) -> Result<(), String> {
        let mut made = Vec::new();
        for disk in disks {
            let result = make(disk, &mut made).and_then(|()| self.note(id, &made));
            if let Err(error) = result {
                remove_all(&made);
                self.0.forget(id);
                return Err(format!(
                    "disk {} cannot be made: {error}",
                    disk.path.display()
                ));
            }
        }
        Ok(())
    }

    /// The guest of the attempt runs here, or did: its disks are its own.
    pub fn keep(&self, id: MigrationId) {
        self.0.forget(id);
    }

    /// The guest of the attempt will not run here: its disks go.
    pub fn remove(&self, id: MigrationId) {
        match self.0.look_up(id) {
            Some(note) if note.boot_id == limosa_os::boot_id() => remove_all(&note.made),
            Some(note) => {
                tracing::warn!(migration_id = %id, made = ?note.made, "disks of an earlier boot stay");
            }
            None => {}
        }
        self.0.forget(id);
    }

    /// Attempts for which there are such disks.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn all(&self) -> io::Result<Vec<MigrationId>> {
        self.0.ids()
    }

    fn note(&self, id: MigrationId, made: &[Made]) -> io::Result<()> {
        let note = Note {
            boot_id: limosa_os::boot_id(),
            made: made.to_vec(),
        };
        self.0.write(id, &note)
    }
}

/// Makes one, and adds it as soon as it is there.
fn make(disk: &NewDisk, made: &mut Vec<Made>) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&disk.path)?;
    let status = file.metadata()?;
    made.push(Made {
        path: disk.path.clone(),
        device: status.dev(),
        inode: status.ino(),
    });
    file.set_len(disk.bytes)
}

fn remove_all(made: &[Made]) {
    for Made {
        path,
        device,
        inode,
    } in made
    {
        let is_ours = fs::symlink_metadata(path)
            .is_ok_and(|status| (status.dev(), status.ino()) == (*device, *inode));
        if !is_ours {
            continue;
        }
        match fs::remove_file(path) {
            Ok(()) => {
                tracing::info!(disk = %path.display(), "removed, since its guest did not arrive")
            }
            Err(error) => {
                tracing::warn!(disk = %path.display(), %error, "a disk whose guest did not arrive stays behind");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_pages::ByteCount;

    const ID: MigrationId = MigrationId(7);

    struct Bed {
        place: tempfile::TempDir,
        disks: NewDisks,
    }

    impl Bed {
        fn new() -> Self {
            let place = tempfile::tempdir().unwrap();
            fs::create_dir(place.path().join("notes")).unwrap();
            let disks = NewDisks::new(place.path().join("notes"));
            Self { place, disks }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.place.path().join(name)
        }

        fn disk(&self, name: &str, bytes: u64) -> NewDisk {
            NewDisk {
                path: self.path(name),
                bytes,
                data: 0,
            }
        }

        /// Which of the files are there, and how many attempts are noted.
        fn left(&self) -> (Vec<&'static str>, usize) {
            let names = ["a", "b", "c"].into_iter();
            let there = names.filter(|name| self.path(name).exists());
            (there.collect(), self.disks.all().unwrap().len())
        }
    }

    #[test]
    fn what_was_made_goes_unless_its_guest_runs() {
        let bed = Bed::new();
        let both = [bed.disk("a", 1 << 20), bed.disk("b", 512)];
        bed.disks.make(ID, &both).unwrap();
        assert_eq!(fs::metadata(bed.path("a")).unwrap().len(), 1 << 20);
        assert_eq!(bed.left(), (vec!["a", "b"], 1));
        // One of them is another file by now.
        fs::rename(bed.path("b"), bed.path("c")).unwrap();
        fs::write(bed.path("b"), b"precious").unwrap();
        bed.disks.remove(ID);
        assert_eq!(bed.left(), (vec!["b", "c"], 0));
        bed.disks.remove(ID);
        fs::remove_file(bed.path("b")).unwrap();
        bed.disks.make(ID, &both[1..]).unwrap();
        // The host was started anew: the guest may have run.
        let file = bed.disks.0.file(ID);
        let mut note: Note = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        note.boot_id ^= 1;
        fs::write(&file, serde_json::to_vec(&note).unwrap()).unwrap();
        bed.disks.remove(ID);
        assert_eq!(bed.left(), (vec!["b", "c"], 0));
        fs::remove_file(bed.path("b")).unwrap();
        bed.disks.make(ID, &both).unwrap();
        bed.disks.keep(ID);
        bed.disks.remove(ID);
        assert_eq!(bed.left(), (vec!["a", "b", "c"], 0));
    }

    #[test]
    fn what_is_there_is_never_touched() {
        let bed = Bed::new();
        fs::write(bed.path("b"), b"precious").unwrap();
        let both = [bed.disk("a", 512), bed.disk("b", 512)];
        let error = bed.disks.make(ID, &both).unwrap_err();
        assert!(
            error.ends_with("/b cannot be made: File exists (os error 17)"),
            "{error}"
        );
        assert_eq!(bed.left(), (vec!["b"], 0));
        assert_eq!(fs::read(bed.path("b")).unwrap(), b"precious");
        // Larger than any file may be.
        let error = bed.disks.make(ID, &[bed.disk("c", 1 << 62)]).unwrap_err();
        assert!(error.contains("/c cannot be made: "), "{error}");
        assert_eq!(bed.left(), (vec!["b"], 0));
    }

    #[test]
    fn all_that_is_in_the_way_is_named() {
        let bed = Bed::new();
        fs::write(bed.path("b"), b"").unwrap();
        let huge = NewDisk {
            data: 1 << 60,
            ..bed.disk("a", 1 << 60)
        };
        let disks = [huge.clone(), bed.disk("b", 512), bed.disk("none/c", 512)];
        let text = in_the_way(&disks).join("\n");
        let place = bed.place.path().display().to_string();
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.replace(&place, "PLACE"))
            .collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(
            lines[0].starts_with("disk PLACE/b is there already"),
            "{text}"
        );
        assert!(
            lines[1].starts_with("disk PLACE/none/c cannot be made: PLACE/none: "),
            "{text}"
        );
        let needs = format!("disks need {} bytes below PLACE, where ", 1_u64 << 60);
        assert!(lines[2].starts_with(&needs), "{text}");
        assert_eq!(in_the_way(&[bed.disk("a", 512)]), Vec::<String>::new());
    }

    #[test]
    fn a_source_that_contradicts_itself_is_refused() {
        let config = |bytes| DiskConfig {
            path: "/a".to_owned(),
            read_only: false,
            bytes,
        };
        let copied = |size| CopiedDisk {
            size: ByteCount::new(size),
            data: ByteCount::ZERO,
        };
        assert_eq!(
            announced(&[config(Some(512))], &[copied(512)])
                .unwrap()
                .len(),
            1
        );
        for (disks, sizes) in [
            (vec![config(Some(512))], vec![copied(1024)]),
            (vec![config(None)], vec![copied(512)]),
            (vec![config(Some(512)); 2], vec![copied(512)]),
            (vec![], vec![copied(512)]),
        ] {
            let error = announced(&disks, &sizes).unwrap_err();
            assert_eq!(error, "the source contradicts itself about the disks");
        }
    }
}
