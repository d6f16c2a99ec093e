//! The directory in which a daemon and its VM processes meet.
//!
//! ```text
//!  lock          held with flock by the one daemon; has its process id
//!  host.sock     control interface
//!  vms/NAME.sock one VM process each
//!  vms/NAME.tty  the console of its guest, if that is a stock one: its serial line
//!  vms/NAME.hvc  its virtio console
//!  logs/NAME.log what a VM process printed
//!  ledger        migration ids with their outcome
//!  departures/ID migrations away that are not over
//!  new-disks/ID.json disks that were made for a guest that does not run here yet
//!  demanded/NAME what a guest asked for in earlier moves
//!  journals/ID   one engine journal a migration
//! ```
//!
//! Only the owner may enter: whoever can open a socket in it owns the guests. The lock goes with
//! the process that holds it, so a killed daemon leaves none behind, or not for long.

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::geteuid;
use std::env;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Longest path of a Unix socket: `sun_path` without its terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest name of a virtual machine; leaves a state directory room in [`SOCKET_PATH_BYTES_MAX`].
const NAME_BYTES_MAX: usize = 64;
/// Journals that are kept: enough to look back after an evening of trials.
const JOURNALS_MAX: usize = 64;
/// How long a lock may outlive the daemon that had it: a process that it was about to start has a copy until it
/// becomes another program.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How soon it is tried again.
const LOCK_AGAIN: Duration = Duration::from_millis(10);
/// Name of the ledger, to which VM processes write, too.
pub const LEDGER: &str = "ledger";

/// Where a daemon is looked for when nothing is said: `$LIMOSA_STATE_DIR`, `/run/limosa` for root,
/// `$XDG_RUNTIME_DIR/limosa` for others.
///
/// # Errors
/// None of these is there.
pub fn default_state_dir() -> Result<PathBuf> {
    let from_env = |name| env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = from_env("LIMOSA_STATE_DIR") {
        return Ok(dir.into());
    }
    if geteuid().is_root() {
        return Ok("/run/limosa".into());
    }
    let runtime = from_env("XDG_RUNTIME_DIR").context(
        "no place for the daemon's state: give --state-dir, or set LIMOSA_STATE_DIR or XDG_RUNTIME_DIR",
    )?;
    Ok(PathBuf::from(runtime).join("limosa"))
}

/// The control socket of the daemon of a state directory.
pub fn host_socket(state_dir: &Path) -> PathBuf {
    state_dir.join("host.sock")
}

/// The name of a virtual machine: letters, digits, `-`, `_`, `.`, the first a letter or digit, so
/// that it is a file name and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

impl VmName {
    /// Checks a name.
    ///
    /// # Errors
    /// One line that says what a name is.
    pub fn new(name: &str) -> Result<Self, String> {
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_sound = name.len() <= NAME_BYTES_MAX
            && name
                .bytes()
                .next()
                .is_some_and(|byte| byte.is_ascii_alphanumeric())
            && name.bytes().all(is_inner);
        if is_sound {
            return Ok(Self(name.to_owned()));
        }
        let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
        Err(format!(
            "{shown:?} cannot name a VM: use 1 to {NAME_BYTES_MAX} letters, digits, '-', '_' or '.', \
             beginning with a letter or digit"
        ))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A state directory that this process holds alone.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    /// Never read: the kernel keeps the lock for as long as it is open.
    _lock: File,
}

impl StateDir {
    /// Makes the directory if it is not there, checks that nobody else can enter, takes the lock.
    ///
    /// # Errors
    /// It cannot be made or is open to others; another daemon has it.
    pub fn open(root: &Path) -> Result<Self> {
        make_private_dir(root)?;
        // VM processes and restarted daemons may have other working directories.
        let root =
            fs::canonicalize(root).with_context(|| format!("cannot find {}", root.display()))?;
        let lock = take_lock(&root)?;
        for part in [
            "vms",
            "logs",
            "journals",
            "departures",
            "demanded",
            "new-disks",
        ] {
            make_private_dir(&root.join(part))?;
        }
        let longest = root.join("vms/.sock").as_os_str().len() + NAME_BYTES_MAX;
        if longest > SOCKET_PATH_BYTES_MAX {
            bail!(
                "the path {} is too long for sockets in it ({} bytes too many): give --state-dir a shorter one",
                root.display(),
                longest - SOCKET_PATH_BYTES_MAX
            );
        }
        Ok(Self { root, _lock: lock })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The ledger.
    pub fn ledger(&self) -> PathBuf {
        self.root.join(LEDGER)
    }

    /// Notes of migrations away that are not over.
    pub fn departures(&self) -> PathBuf {
        self.root.join("departures")
    }

    /// Notes of disks that were made for guests that do not run here yet.
    pub fn new_disks(&self) -> PathBuf {
        self.root.join("new-disks")
    }

    /// What guests have asked for in earlier moves.
    pub fn demanded(&self) -> PathBuf {
        self.root.join("demanded")
    }

    /// The control interface.
    pub fn host_socket(&self) -> PathBuf {
        host_socket(&self.root)
    }

    /// Socket of a VM process.
    pub fn vm_socket(&self, name: &VmName) -> PathBuf {
        self.root.join(format!("vms/{name}.sock"))
    }

    /// Output of a VM process.
    pub fn vm_log(&self, name: &VmName) -> PathBuf {
        self.root.join(format!("logs/{name}.log"))
    }

    /// Where a migration's journal will be written; old ones make room.
    pub fn next_journal(&self, name: &VmName) -> PathBuf {
        let dir = self.root.join("journals");
        if let Err(error) = drop_oldest(&dir, JOURNALS_MAX - 1) {
            tracing::warn!(%error, "old journals could not be removed");
        }
        let number = fs::read_dir(&dir).map_or(0, |entries| {
            let last = entries
                .flatten()
                .filter_map(|entry| journal_number(&entry.file_name()))
                .max();
            last.map_or(0, |last| last + 1)
        });
        dir.join(format!("{number:06}-{name}.journal"))
    }

    /// Names of all sockets of VM processes, in order, stale ones included.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn vm_names(&self) -> Result<Vec<VmName>> {
        let dir = self.root.join("vms");
        let entries =
            fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
        let mut names: Vec<VmName> = entries
            .flatten()
            .filter_map(|entry| {
                let file = entry.file_name();
                VmName::new(file.to_str()?.strip_suffix(".sock")?).ok()
            })
            .collect();
        names.sort();
        Ok(names)
    }
}

/// The number at the front of a journal's file name, which orders them.
fn journal_number(file: &std::ffi::OsStr) -> Option<u64> {
    file.to_str()?.split('-').next()?.parse().ok()
}

/// Removes journals until at most `keep` are left.
fn drop_oldest(dir: &Path, keep: usize) -> Result<()> {
    let mut files: Vec<(u64, PathBuf)> = fs::read_dir(dir)?
        .flatten()
        .filter_map(|entry| Some((journal_number(&entry.file_name())?, entry.path())))
        .collect();
    files.sort();
    let extra = files.len().saturating_sub(keep);
    for (_, path) in files.into_iter().take(extra) {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Makes a directory with mode 0700, or checks one that is there.
fn make_private_dir(dir: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make the directory {}", dir.display()))?;
    let found = fs::metadata(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    if found.uid() != geteuid().as_raw() {
        bail!(
            "{} belongs to another user: give --state-dir a directory of your own",
            dir.display()
        );
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("cannot close {} to other users", dir.display()))?;
    }
    Ok(())
}

/// Takes the lock, or says who has it.
fn take_lock(root: &Path) -> Result<File> {
    let path = root.join("lock");
    let mut lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        match lock.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => {
                let holder = holder(&lock);
                let is_alive = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
                if holder.is_some_and(is_alive) || Instant::now() > give_up {
                    let holder =
                        holder.map_or("unknown process".to_owned(), |pid| format!("process {pid}"));
                    return Err(anyhow!(
                        "another limosa daemon ({holder}) has {}: stop it, or give --state-dir another directory",
                        root.display()
                    ));
                }
                thread::sleep(LOCK_AGAIN);
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
    }
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())?;
    Ok(lock)
}

/// Who has written that it has the lock.
fn holder(mut lock: &File) -> Option<u32> {
    let mut pid = String::new();
    lock.rewind().ok()?;
    lock.take(32).read_to_string(&mut pid).ok()?;
    pid.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, is_sound: bool) {
        assert_eq!(VmName::new(name).is_ok(), is_sound, "{name:?}");
    }

    #[test]
    fn names_are_file_names_and_nothing_else() {
        check("web", true);
        check("Web-1_a.b", true);
        check("0", true);
        check(&"a".repeat(64), true);
        check(&"a".repeat(65), false);
        for name in ["", ".", "..", ".web", "-web", "a/b", "a b", "wéb", "a\0"] {
            check(name, false);
        }
    }

    #[test]
    fn a_second_daemon_is_told_who_has_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        let error = StateDir::open(dir.path()).unwrap_err().to_string();
        let expect = format!(
            "another limosa daemon (process {}) has ",
            std::process::id()
        );
        assert!(error.starts_with(&expect), "{error}");
        drop(first);
        StateDir::open(dir.path()).unwrap();
    }

    #[test]
    fn the_lock_of_a_dead_daemon_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("state");
        drop(StateDir::open(&inside).unwrap());
        // What a daemon that was killed has left: its number, and a copy of its lock in a process that it began.
        let copy = OpenOptions::new()
            .read(true)
            .write(true)
            .open(inside.join("lock"))
            .unwrap();
        copy.lock().unwrap();
        fs::write(inside.join("lock"), format!("{}\n", u32::MAX)).unwrap();
        let begun = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(copy);
        });
        StateDir::open(&inside).unwrap();
        begun.join().unwrap();
        let noted = fs::read_to_string(inside.join("lock")).unwrap();
        assert_eq!(noted, format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_directory_is_closed_to_others() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(fs::metadata(state.root()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = StateDir::open(&dir.path().join("x".repeat(80))).unwrap_err();
        assert!(
            error.to_string().contains("too long for sockets"),
            "{error}"
        );
    }

    #[test]
    fn journals_are_numbered_and_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let name = VmName::new("web").unwrap();
        for _ in 0..JOURNALS_MAX + 3 {
            fs::write(state.next_journal(&name), b"").unwrap();
        }
        assert_eq!(
            fs::read_dir(state.root().join("journals")).unwrap().count(),
            JOURNALS_MAX
        );
        assert!(state.next_journal(&name).ends_with("000067-web.journal"));
    }

    #[test]
    fn only_sockets_with_sound_names_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        for file in ["web.sock", "db.sock", ".hidden.sock", "note.txt"] {
            fs::write(state.root().join("vms").join(file), b"").unwrap();
        }
        let names: Vec<String> = state
            .vm_names()
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(names, ["db", "web"]);
    }
}
