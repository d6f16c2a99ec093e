//! What the guests of this host asked for in earlier moves: a file for each, beside its name.
//!
//! It comes with a guest that arrives, grows by what it asks for here, and goes along when it leaves; so a
//! restarted daemon finds it, too. It is a hint about an order. What cannot be read or written is as if
//! nothing had been recorded, and a file that a crash leaves behind goes when its name is used again.

use crate::state_dir::VmName;
use limosa_carrier::Demanded;
use limosa_pages::PageCount;
use std::fs;
use std::io;
use std::path::PathBuf;

/// The records of one host.
#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// In the directory `dir`, which is there.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// What is recorded of a virtual machine of so many pages.
    pub fn of(&self, name: &VmName, memory: PageCount) -> Demanded {
        let read = fs::read(self.file(name))
            .and_then(|bytes| Demanded::decode(&bytes, memory).map_err(io::Error::other));
        read.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(vm = %name, %error, "what the guest asked for in earlier moves is not known");
            }
            Demanded::default()
        })
    }

    /// Keeps a record in the place of any that was there.
    pub fn keep(&self, name: &VmName, demanded: &Demanded) {
        if demanded.is_empty() {
            return self.forget(name);
        }
        let next = self.dir.join(format!("{name}~"));
        let written = fs::write(&next, demanded.encode());
        if let Err(error) = written.and_then(|()| fs::rename(&next, self.file(name))) {
            tracing::warn!(vm = %name, %error, "what the guest has asked for could not be recorded");
        }
    }

    /// There is no such guest here any more, or not yet.
    pub fn forget(&self, name: &VmName) {
        match fs::remove_file(self.file(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(vm = %name, %error, "what a guest had asked for stays behind");
            }
            Ok(()) | Err(_) => {}
        }
    }

    fn file(&self, name: &VmName) -> PathBuf {
        self.dir.join(name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: PageCount = PageCount::new(64);

    #[test]
    fn a_record_is_kept_until_its_guest_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        let [web, db] = ["web", "db"].map(|name| VmName::new(name).unwrap());
        let demanded = Demanded::decode(&[9, 0, 0, 0, 2, 0, 0, 0], MEMORY).unwrap();
        assert_eq!(records.of(&web, MEMORY), Demanded::default());
        records.keep(&web, &demanded);
        assert_eq!(records.of(&web, MEMORY), demanded);
        assert_eq!(records.of(&db, MEMORY), Demanded::default());
        // Of another guest that had this name.
        assert_eq!(records.of(&web, PageCount::new(8)), Demanded::default());
        records.keep(&web, &Demanded::default());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        records.forget(&web);
        fs::write(dir.path().join("db"), "hello").unwrap();
        assert_eq!(records.of(&db, MEMORY), Demanded::default());
    }
}
