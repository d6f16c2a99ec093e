//! Notes about attempts that outlive a daemon: a file of JSON for each, in a directory of their own.
//!
//! No `fsync`: a crash of the whole host may take a note along.

use limosa_engine::handover::MigrationId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs;
use std::io;
use std::marker::PhantomData;
use std::path::PathBuf;

/// Notes of one kind.
#[derive(Debug)]
pub struct Notes<T> {
    dir: PathBuf,
    /// What a note is about, for complaints.
    about: &'static str,
    kind: PhantomData<fn(T)>,
}

impl<T: Serialize + DeserializeOwned> Notes<T> {
    /// In the directory `dir`, which is there.
    pub fn new(dir: PathBuf, about: &'static str) -> Self {
        Self {
            dir,
            about,
            kind: PhantomData,
        }
    }

    /// Makes a note, in place of the last one about the attempt.
    ///
    /// # Errors
    /// The file cannot be written; what was noted before stays.
    pub fn write(&self, id: MigrationId, note: &T) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(note)?;
        let next = self.dir.join(format!("{id}.next"));
        fs::write(&next, text)?;
        fs::rename(&next, self.file(id))
    }

    /// What is noted of an attempt.
    pub fn look_up(&self, id: MigrationId) -> Option<T> {
        let file = self.file(id);
        let read = fs::read(&file).and_then(|text| Ok(serde_json::from_slice(&text)?));
        match read {
            Ok(note) => Some(note),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(migration_id = %id, %error, about = self.about, "a note cannot be read");
                None
            }
        }
    }

    /// The attempt is over.
    pub fn forget(&self, id: MigrationId) {
        match fs::remove_file(self.file(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(migration_id = %id, %error, about = self.about, "a note stays behind");
            }
            Ok(()) | Err(_) => {}
        }
    }

    /// The attempts about which there are notes, ascending, whether these are understood or not.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn ids(&self) -> io::Result<Vec<MigrationId>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json"));
            ids.extend(id.and_then(crate::api::parse_id));
        }
        ids.sort();
        Ok(ids)
    }

    /// Where the note about an attempt is.
    pub fn file(&self, id: MigrationId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}
