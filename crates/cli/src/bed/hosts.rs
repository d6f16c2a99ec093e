//! Two daemons as children of this process, in directories of their own that vanish with them.
//!
//! Whatever happens, nothing is left behind: the destructor stops the guest, ends the daemons and
//! looks for VM processes that outlived them, which is what VM processes are made for. The children
//! are no members of the terminal's process group, so that Ctrl-C reaches this program alone and it
//! can take them down in order.

use crate::bed::growth::Resources;
use crate::bed::interrupt::Interrupt;
use anyhow::{Context, bail};
use limosa_clients::{Lan, lan};
use limosa_host::certificates::{make_authority, make_host};
use limosa_host::client::Client;
use rustix::process::{Pid, Signal, kill_process};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Names of the two hosts.
pub(crate) const NAMES: [&str; 2] = ["a", "b"];
/// Name of the virtual machine.
pub(crate) const VM: &str = "guest";

/// A daemon listens within milliseconds; a busy machine takes longer.
const START_MAX: Duration = Duration::from_secs(20);
/// A daemon that was asked to end does so at once, or is killed after this time.
const END_MAX: Duration = Duration::from_secs(5);
/// Lines of each log that are shown when something failed.
const LOG_LINES: usize = 12;

/// A daemon.
#[derive(Debug)]
pub(crate) struct Host {
    /// Talks to it.
    pub client: Client,
    /// Where the other one reaches it.
    pub peer_address: String,
    child: Child,
    state_dir: PathBuf,
}

/// Both of them.
#[derive(Debug)]
pub(crate) struct Hosts {
    /// In the order of [`NAMES`].
    pub hosts: [Host; 2],
    /// Removed after the destructor of this type has run.
    directory: TempDir,
}

impl Hosts {
    /// Starts both, with certificates that believe each other if connections shall be encrypted; in their own
    /// networks, if they shall have such.
    pub(crate) fn start(
        tls: bool,
        lan: Option<&Lan>,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("limosa-")
            .tempdir()
            .context("cannot make a temporary directory")?;
        let certificates = tls.then(|| certify(directory.path())).transpose()?;
        let start = |index: usize| {
            let state_dir = directory.path().join(NAMES[index]);
            let place = lan.map(|lan| (lan, index));
            Host::start(&state_dir, certificates.as_deref(), place, interrupt)
        };
        let hosts = [start(0)?, start(1)?];
        Ok(Self { hosts, directory })
    }

    /// Where everything of them lies: a path of which stands in the command line of each process.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What both daemons hold.
    pub(crate) fn resources(&self) -> anyhow::Result<Resources> {
        let mut sum = Resources::default();
        for host in &self.hosts {
            let info = host.client.host()?;
            sum = sum.plus(Resources {
                open_fds: info.open_fds,
                threads: info.threads,
                anonymous_bytes: info.anonymous_bytes,
            });
        }
        Ok(sum)
    }

    /// The ends of all logs, for a failure that only they explain.
    pub(crate) fn log_tails(&self) -> String {
        let mut text = String::new();
        for host in &self.hosts {
            for log in logs(&host.state_dir) {
                let content = fs::read_to_string(&log).unwrap_or_default();
                let lines: Vec<&str> = content.lines().collect();
                let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
                if !tail.is_empty() {
                    let name = log.strip_prefix(self.directory.path()).unwrap_or(&log);
                    write!(text, "--- {}\n{}\n", name.display(), tail.join("\n"))
                        .expect("a string takes any text");
                }
            }
        }
        text
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &self.hosts {
            let vms = host.client.vms().unwrap_or_default();
            for vm in vms {
                if let Err(error) = host.client.stop(&vm.name, true) {
                    tracing::debug!(%error, vm = vm.name, "not stopped; its process is looked for");
                }
            }
        }
        // The daemons end in their own destructors, after which nobody starts VM processes any
        // more; but fields are dropped after this function, so they are ended here already.
        for host in &mut self.hosts {
            host.end();
        }
        kill_leftovers(self.directory.path());
    }
}

impl Host {
    fn start(
        state_dir: &Path,
        certificates: Option<&Path>,
        place: Option<(&Lan, usize)>,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        fs::create_dir(state_dir).context("cannot make a state directory")?;
        let log = File::create(state_dir.join("daemon.log")).context("cannot make a log file")?;
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut command = match place {
            None => Command::new(program),
            Some((lan, index)) => lan.command(index, &program),
        };
        let address = place.map_or("127.0.0.1", |(_, index)| lan::HOSTS[index]);
        let lent = place.map_or(&[][..], |_| &["--lend-tap", lan::TAP]);
        // Nobody else is in its network.
        let is_plain = place.is_some() && certificates.is_none();
        let child = command
            .arg("host")
            .arg("--state-dir")
            .arg(state_dir)
            .args(["--listen", &format!("{address}:0")])
            .args(lent)
            .args(is_plain.then_some("--insecure"))
            .args(certificates.map(|_| "--tls"))
            .args(certificates)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share a log file")?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start a daemon")?;
        let mut host = Self {
            client: Client::new(state_dir.join("host.sock")),
            peer_address: String::new(),
            child,
            state_dir: state_dir.to_owned(),
        };
        host.wait_until_it_listens(interrupt)?;
        Ok(host)
    }

    fn wait_until_it_listens(&mut self, interrupt: &Interrupt) -> anyhow::Result<()> {
        let give_up = Instant::now() + START_MAX;
        loop {
            let error = match self.client.host() {
                Ok(info) => {
                    self.peer_address = info.peer_address;
                    return Ok(());
                }
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait().context("cannot watch a daemon")? {
                let log = fs::read_to_string(self.state_dir.join("daemon.log"));
                let log = log.unwrap_or_default();
                let last = log.lines().last().unwrap_or("it said nothing");
                bail!("a daemon ended at once ({status}): {last}");
            }
            if Instant::now() > give_up {
                return Err(error).context("a daemon does not answer");
            }
            interrupt.sleep(Duration::from_millis(10))?;
        }
    }

    /// Ends the daemon, politely first.
    fn end(&mut self) {
        let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) else {
            return;
        };
        let give_up = Instant::now() + END_MAX;
        let mut is_asked = false;
        loop {
            match self.child.try_wait() {
                Ok(Some(_)) => return,
                Ok(None) if !is_asked => is_asked = kill_process(pid, Signal::TERM).is_ok(),
                Ok(None) if Instant::now() < give_up => {}
                Ok(None) | Err(_) => break,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            tracing::error!(%error, pid = self.child.id(), "a daemon could not be killed");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
    }
}

/// Makes what both hosts need, which are one to the world, and gives the directory.
fn certify(directory: &Path) -> anyhow::Result<PathBuf> {
    const DAYS: u32 = 30;
    let (authority, host) = (directory.join("authority"), directory.join("certificates"));
    make_authority(&authority, DAYS)?;
    let names = ["127.0.0.1", lan::HOSTS[0], lan::HOSTS[1]].map(str::to_owned);
    make_host(&authority, &host, &names, DAYS)?;
    Ok(host)
}

/// Log files of a daemon: its own and those of its VM processes.
fn logs(state_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state_dir.join("logs")).into_iter().flatten();
    let vms = entries.flatten().map(|entry| entry.path());
    [state_dir.join("daemon.log")]
        .into_iter()
        .chain(vms)
        .collect()
}

/// Kills processes of this very program that were started with a path in `directory`, which has a
/// name that nobody else uses.
fn kill_leftovers(directory: &Path) {
    let Ok(ours) = std::env::current_exe() else {
        return;
    };
    let own_pid = std::process::id();
    let Some(wanted) = directory.to_str() else {
        return;
    };
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let Some(pid) = pid.filter(|&pid: &u32| pid != own_pid) else {
            continue;
        };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let is_ours = fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == ours);
        if !is_ours || !String::from_utf8_lossy(&arguments).contains(wanted) {
            continue;
        }
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
            && let Err(error) = kill_process(pid, Signal::KILL)
        {
            tracing::error!(%error, pid = pid.as_raw_nonzero(), "a VM process could not be killed");
        }
    }
}
