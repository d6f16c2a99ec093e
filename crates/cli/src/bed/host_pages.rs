//! Which pages the host makes for shared memory, set for one run and put back behind it.
//!
//! Guest memory is a file in memory, and whether the kernel backs such files with transparent huge
//! pages is a setting of the whole host: one for all sizes, and on newer kernels one for each size,
//! where `inherit` is what the first one says. [Linux admin-guide/mm/transhuge.rst] `within_size` makes
//! a huge page where all of it lies within the file. So that two runs differ in nothing else, each size
//! is set, too: 2 MiB inherits, no other size is made.
//!
//! ```text
//!  set ──▶ daemons ──▶ guest ──▶ move ──▶ all of them end ──▶ drop: as it was
//! ```
//!
//! Invariants: a file that says the right word already is not written; what was written is put back in
//! the opposite order, whatever ends the run but a kill of this program.
//!
//! Deliberately absent: the setting for anonymous memory, which is not what guests have here.

use anyhow::{Context, anyhow};
use limosa_lab::backing::Backing;
use limosa_os::memory::chosen_word;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";
/// The setting for all sizes, and in the directory of each size the one for it.
const SHARED: &str = "shmem_enabled";
/// The directory of the size that is made.
const MADE: &str = "hugepages-2048kB";

/// A file that does not say what it shall.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    file: PathBuf,
    former: String,
    wanted: &'static str,
}

/// The setting of a run; dropping it brings back the former one.
#[derive(Debug, Default)]
pub(crate) struct HostPages {
    made: Vec<Change>,
}

impl HostPages {
    /// Sets what the kind of pages asks for.
    ///
    /// # Errors
    /// A setting cannot be read or written, with what to do.
    pub(crate) fn set(backing: Backing) -> anyhow::Result<Self> {
        Self::set_in(Path::new(SETTINGS), backing)
    }

    /// Whether [`HostPages::set`] would succeed, without changing anything.
    ///
    /// # Errors
    /// As of that.
    pub(crate) fn check(backing: Backing) -> anyhow::Result<()> {
        for change in changes(Path::new(SETTINGS), backing)? {
            let opened = File::options().write(true).open(&change.file);
            opened.with_context(|| advice(&change, backing))?;
        }
        Ok(())
    }

    fn set_in(settings: &Path, backing: Backing) -> anyhow::Result<Self> {
        let mut this = Self::default();
        for change in changes(settings, backing)? {
            let written = fs::write(&change.file, change.wanted);
            written.with_context(|| advice(&change, backing))?;
            this.made.push(change);
        }
        Ok(this)
    }
}

impl Drop for HostPages {
    fn drop(&mut self) {
        while let Some(change) = self.made.pop() {
            if let Err(error) = fs::write(&change.file, &change.former) {
                let (file, word) = (change.file.display(), change.former);
                tracing::error!(%error, %file, %word, "a setting of the host could not be put back");
            }
        }
    }
}

/// What there is to write; nothing if the host shall be left alone.
fn changes(settings: &Path, backing: Backing) -> anyhow::Result<Vec<Change>> {
    let wanted = match backing {
        Backing::Host | Backing::Reserved => return Ok(Vec::new()),
        Backing::Small => "never",
        Backing::Transparent => "within_size",
    };
    let unknown = || {
        let file = settings.join(SHARED);
        format!(
            "pages = \"{backing}\" needs {}, which cannot be read: is this kernel built with \
             transparent huge pages, and /sys mounted? Without pages the plan leaves the host alone",
            file.display()
        )
    };
    let mut all = vec![(settings.join(SHARED), wanted)];
    all.extend(sizes(settings).with_context(unknown)?);
    let mut changes = Vec::new();
    for (file, wanted) in all {
        let text = fs::read_to_string(&file).with_context(unknown)?;
        let former = chosen_word(&text).ok_or_else(|| {
            let file = file.display();
            anyhow!(
                "{file} marks none of its words as chosen: '{}'",
                text.trim()
            )
        })?;
        if former != wanted {
            changes.push(Change {
                former: former.to_owned(),
                file,
                wanted,
            });
        }
    }
    Ok(changes)
}

/// The settings of all sizes with the word for each, in the order of their names; none on older kernels.
fn sizes(settings: &Path) -> io::Result<Vec<(PathBuf, &'static str)>> {
    let mut sizes = Vec::new();
    for entry in fs::read_dir(settings)? {
        let entry = entry?;
        let name = entry.file_name();
        let file = entry.path().join(SHARED);
        if name.to_string_lossy().starts_with("hugepages-") && file.exists() {
            sizes.push((file, if name == MADE { "inherit" } else { "never" }));
        }
    }
    sizes.sort();
    Ok(sizes)
}

fn advice(change: &Change, backing: Backing) -> String {
    let (file, wanted) = (change.file.display(), change.wanted);
    format!(
        "pages = \"{backing}\" needs {file} to say {wanted}, which cannot be written: run as root, or \
         write it before"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const ALL: &str = "always within_size advise [never] deny force\n";

    /// What the files for all sizes, for 2 MiB and for 64 KiB say during a run and after it.
    fn check(words: [&str; 3], backing: Backing, expect: [&str; 3]) {
        let directory = tempfile::tempdir().unwrap();
        let files = ["", "hugepages-2048kB", "hugepages-64kB"].map(|size| {
            let place = directory.path().join(size);
            fs::create_dir_all(&place).unwrap();
            place.join(SHARED)
        });
        for (file, word) in files.iter().zip(words) {
            fs::write(file, word).unwrap();
        }
        let says = || files.clone().map(|file| fs::read_to_string(file).unwrap());
        let set = HostPages::set_in(directory.path(), backing).unwrap();
        assert_eq!(says(), expect, "{backing} {words:?}");
        drop(set);
        let former = says();
        for (former, word) in former.iter().zip(words) {
            let is_back = former == word || Some(former.as_str()) == chosen_word(word);
            assert!(is_back, "{backing}: {former} in place of {word}");
        }
    }

    #[test]
    fn only_what_says_another_word_is_set_and_then_put_back() {
        let usual = [ALL, "always [inherit] never", "inherit [never]"];
        check(usual, Backing::Host, usual);
        check(usual, Backing::Reserved, usual);
        check(usual, Backing::Small, usual);
        check(
            usual,
            Backing::Transparent,
            ["within_size", usual[1], usual[2]],
        );
        let large = ["[always] never", "[always] inherit", "[inherit] never"];
        check(large, Backing::Small, ["never", "inherit", "never"]);
        check(
            large,
            Backing::Transparent,
            ["within_size", "inherit", "never"],
        );
    }

    #[test]
    fn what_cannot_be_set_is_told_with_what_to_do() {
        let said = |settings: &Path, backing| {
            let error = HostPages::set_in(settings, backing).unwrap_err();
            error
                .to_string()
                .replace(&settings.display().to_string(), "DIR")
        };
        assert_eq!(
            said(Path::new("/nonexistent"), Backing::Small),
            "pages = \"small\" needs DIR/shmem_enabled, which cannot be read: is this kernel built with \
             transparent huge pages, and /sys mounted? Without pages the plan leaves the host alone"
        );
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(SHARED);
        fs::write(&file, "always never").unwrap();
        assert_eq!(
            said(directory.path(), Backing::Small),
            "DIR/shmem_enabled marks none of its words as chosen: 'always never'"
        );
        fs::write(&file, ALL).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
        if File::options().write(true).open(&file).is_ok() {
            println!("skipped: nothing is forbidden to root");
            return;
        }
        assert_eq!(
            said(directory.path(), Backing::Transparent),
            "pages = \"transparent\" needs DIR/shmem_enabled to say within_size, which cannot be \
             written: run as root, or write it before"
        );
    }
}
