//! A daemon as a child of the test, in a directory that vanishes with it.
//!
//! It can be killed and started again on the same directory and the same port, as after a crash.
//! Each test process listens on a loopback address of its own, so that a port which is free for the
//! moment of a restart is not given to somebody else.

use crate::binary;
use crate::hold::{self, Hold};
use crate::process;
use crate::wait;
use limosa_host::client::Client;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Lines of each log that are shown when a test fails.
const LOG_LINES: usize = 40;
/// How long VM processes that were killed may take to vanish.
const VANISH_MAX: Duration = Duration::from_secs(5);

/// Begins of the names of threads that carry migrations: none outlives its own by more than a moment.
const CARRYING: [&str; 14] = [
    "answers",
    "arrive",
    "connect",
    "control",
    "create",
    "digest",
    "faults",
    "hash",
    "migrate",
    "pull",
    "push-",
    "receive-",
    "reconcile",
    "resolve",
];

/// Where a daemon runs, other than among the processes of the test.
#[derive(Clone, Debug)]
pub struct Place {
    /// Name of its network namespace.
    pub namespace: String,
    /// Where it listens there.
    pub address: String,
    /// The tap device that it lends.
    pub tap: String,
}

/// `limosa host`, running or killed.
#[derive(Debug)]
pub struct Daemon {
    client: Client,
    child: Option<Child>,
    /// Where it listens for other daemons, once it was started.
    peer_address: String,
    state_dir: PathBuf,
    /// Where it runs, if not here.
    place: Option<Place>,
    /// What it has where others have [`lent_disks`], if that is not the same.
    own_disks: Option<PathBuf>,
    /// What it shows to other daemons, if connections are encrypted.
    certificates: Option<PathBuf>,
    /// Removed after the destructor of this type has run.
    _directory: TempDir,
}

impl Daemon {
    /// Starts a daemon and waits until it answers.
    ///
    /// # Panics
    /// If it does not.
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// Starts a daemon whose first migration waits at `hold`.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn start_with(hold: Option<&Hold>) -> Self {
        Self::start_so(hold, None)
    }

    /// The same, with the certificates of this directory.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn start_so(hold: Option<&Hold>, certificates: Option<&Path>) -> Self {
        Self::start_anywhere(hold, certificates, None, None)
    }

    /// Starts a daemon in a network of its own, without certificates.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn start_at(place: &Place) -> Self {
        Self::start_anywhere(None, None, Some(place), None)
    }

    /// Starts a daemon whose disks are its own: it has this directory where others have [`lent_disks`].
    ///
    /// # Panics
    /// If it does not answer.
    pub fn start_with_disks(own_disks: &Path) -> Self {
        Self::start_anywhere(None, None, None, Some(own_disks))
    }

    fn start_anywhere(
        hold: Option<&Hold>,
        certificates: Option<&Path>,
        place: Option<&Place>,
        own_disks: Option<&Path>,
    ) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("limosa-e2e-")
            .tempdir()
            .expect("a temporary directory");
        let state_dir = directory.path().join("state");
        let mut daemon = Self {
            client: Client::new(state_dir.join("host.sock")),
            child: None,
            peer_address: match place {
                Some(place) => format!("{}:0", place.address),
                None => format!("{}:0", own_loopback()),
            },
            state_dir,
            place: place.cloned(),
            own_disks: own_disks.map(Path::to_owned),
            certificates: certificates.map(Path::to_owned),
            _directory: directory,
        };
        daemon.spawn(hold);
        daemon
    }

    /// Kills it. Its VM processes live on.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("a daemon that runs");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// Starts it again on the same state directory and port, without a hold.
    ///
    /// # Panics
    /// If it runs, or does not answer.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "a daemon that was killed");
        self.spawn(None);
    }

    /// Talks to it.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Where other daemons reach it.
    pub fn peer_address(&self) -> &str {
        &self.peer_address
    }

    /// Its state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Its process id.
    ///
    /// # Panics
    /// If it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a daemon that runs").id()
    }

    /// Its VM processes, also while it is dead itself.
    pub fn vm_processes(&self) -> Vec<u32> {
        process::naming(&self.state_dir, self.child.as_ref().map(Child::id))
    }

    /// Sockets of VM processes in its state directory, also of those that have ended.
    pub fn vm_sockets(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state_dir.join("vms"));
        let entries = entries.into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Names of its threads that carry migrations.
    ///
    /// # Panics
    /// If it does not run.
    pub fn carrying_threads(&self) -> Vec<String> {
        let mut names = process::thread_names(self.pid());
        names.retain(|name| CARRYING.iter().any(|carrying| name.starts_with(carrying)));
        names
    }

    /// What it has logged, all its lives together.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self._directory.path().join("daemon.log")
    }

    fn spawn(&mut self, hold: Option<&Hold>) {
        let open = || {
            File::options()
                .create(true)
                .append(true)
                .open(self.log_path())
        };
        let mut command = self.command();
        command
            .arg("host")
            .arg("--lend-disk")
            .arg(lent_disks())
            .arg("--state-dir")
            .arg(&self.state_dir)
            .args(["--listen", &self.peer_address])
            .env_remove("LIMOSA_STATE_DIR")
            .env_remove(hold::VARIABLE)
            .stdin(Stdio::null())
            .stdout(open().expect("a log file"))
            .stderr(open().expect("a log file"));
        if let Some(certificates) = &self.certificates {
            command.arg("--tls").arg(certificates);
        }
        if let Some(place) = &self.place {
            command.args(["--insecure", "--lend-tap", &place.tap]);
        }
        if let Some(hold) = hold {
            command.env(hold::VARIABLE, hold.value());
        }
        self.child = Some(command.spawn().expect("the binary can be started"));
        let info = wait::until("a daemon answers", || match self.client.host() {
            Ok(info) => Some(info),
            Err(_) => {
                let child = self.child.as_mut().expect("just started");
                let status = child.try_wait().expect("a child can be watched");
                assert!(
                    status.is_none(),
                    "a daemon ended: {status:?}\n{}",
                    self.log()
                );
                None
            }
        });
        self.peer_address = info.peer_address;
    }

    /// The program, where it runs.
    fn command(&self) -> Command {
        if let Some(place) = &self.place {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &place.namespace]);
            command.arg(binary::limosa());
            return command;
        }
        let Some(own_disks) = &self.own_disks else {
            return Command::new(binary::limosa());
        };
        let mut command = Command::new("unshare");
        let begin = r#"mount --bind "$1" "$2" && shift 2 && exec "$@""#;
        command.args(["--mount", "sh", "-c", begin, "sh"]);
        command.args([own_disks.as_path(), &lent_disks(), binary::limosa()]);
        command
    }

    /// The ends of all logs.
    fn log_tails(&self) -> String {
        let vms = fs::read_dir(self.state_dir.join("logs"));
        let vms = vms
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let tails = [self.log_path()].into_iter().chain(vms).map(|path| {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            format!("--- {}\n{tail}\n", path.display())
        });
        tails.collect()
    }

    /// Lines of any log that tell of a broken assertion.
    fn panics(&self) -> Vec<String> {
        let vms = fs::read_dir(self.state_dir.join("logs"));
        let vms = vms
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let texts = [self.log_path()]
            .into_iter()
            .chain(vms)
            .map(|path| fs::read(path).unwrap_or_default());
        texts
            .flat_map(|text| {
                let text = String::from_utf8_lossy(&text).into_owned();
                let lines: Vec<String> = text.lines().map(str::to_owned).collect();
                lines
                    .into_iter()
                    .enumerate()
                    .filter_map(|(number, line)| {
                        line.contains("panicked at")
                            .then(|| format!("line {}: {line}", number + 1))
                    })
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

impl Drop for Daemon {
    /// Ends the daemon and then its VM processes, which nobody makes any more by then.
    ///
    /// # Panics
    /// If anything in it had panicked: such a program is broken, however the test went.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that ended by itself is found by the assertions of its test.
            drop(child.kill());
            drop(child.wait());
        }
        let is_empty = wait::poll(VANISH_MAX, || {
            let left = process::naming(&self.state_dir, None);
            left.iter().for_each(|pid| {
                process::try_kill(*pid);
            });
            left.is_empty().then_some(())
        });
        if std::thread::panicking() {
            eprint!("{}", self.log_tails());
            return;
        }
        assert!(is_empty.is_some(), "VM processes do not end");
        let panics = self.panics();
        assert!(
            panics.is_empty(),
            "a daemon or VM process panicked: {panics:#?}\n{}",
            self.log_tails()
        );
    }
}

/// The directory below which all daemons of tests lend disks to guests that arrive.
///
/// # Panics
/// If it cannot be made.
pub fn lent_disks() -> PathBuf {
    let place = std::env::temp_dir().join("limosa-e2e-lent");
    std::fs::create_dir_all(&place).expect("a directory can be made");
    place
}

/// An address of 127.0.0.0/8, where all daemons of this process listen, that no other living process uses.
pub fn own_loopback() -> Ipv4Addr {
    let pid = std::process::id().to_be_bytes();
    // Process ids have 22 bits; the first and the last number of a network are left out.
    Ipv4Addr::new(127, 64 | (pid[1] & 0x3f), pid[2], pid[3].clamp(1, 254))
}
