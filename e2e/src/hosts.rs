//! Two throw-away Linux hosts with a working `/dev/kvm`, on any machine.
//!
//! Where this one has processors with extensions for virtual machines, hosts are made of its namespaces
//! ([`native`]). Elsewhere QEMU emulates their processors, AMD's extensions among them, so that a stock kernel boots
//! as a guest there ([`emulated`]):
//!
//! ```text
//!  this machine ─┬─ host-a: Debian kernel in QEMU (no KVM) ── limosa ── stock guest
//!                └─ host-b: the same                               LAN between them: 10.77.0.0/24
//! ```
//!
//! Everything comes from Debian packages that are fetched and unpacked into a cache, nothing is
//! installed, and of this machine they take `apt-get`, `dpkg-deb`, `tar`, `mke2fs` and `setpriv`, those of
//! namespaces also root, `unshare` and `ip`.
//! A run makes fresh hosts, runs one script on each, and ends with them; [`Hosts::run`] says how it went. Scripts
//! find the same either way.
//!
//! Emulation is slow: an exit of a guest costs some ten microseconds, a guest boots in ten to thirty
//! seconds. What is measured here compares with nothing else.

mod archive;
mod emulated;
mod host;
mod images;
mod kernel;
mod native;
mod packages;

use host::{Host, Told};
use packages::succeed;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Series of the kernels of hosts and guests, the usual one first.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];
/// The processor of a host: AMD's first EPYC, whose kernel would only lose time by looking for MONITOR.
pub const PROCESSOR: &str = "EPYC,-monitor";
/// The disk that all hosts have, among what belongs to a run.
const SHARED_DISK: &str = "shared.raw";
/// How often it is looked whether hosts that say nothing are still there.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Why hosts cannot be made, or a run did not come to its end.
#[derive(Debug)]
pub struct HostError(String);

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for HostError {}

fn failed(what: impl fmt::Display) -> impl FnOnce(io::Error) -> HostError {
    move |error| HostError(format!("cannot {what}: {error}"))
}

/// What hosts are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bed {
    /// QEMU, which emulates all of them.
    Emulated,
    /// Namespaces of this machine, whose kernel and processors they share. Takes root.
    Native,
}

impl Bed {
    /// Whether this process may make such hosts, and finds what makes them.
    pub fn is_allowed(self) -> bool {
        let tried = [
            ("unshare", &["--net", "--mount", "true"][..]),
            ("ip", &["-V"][..]),
        ];
        let works = |(program, arguments): (&str, &[&str])| {
            succeed(Command::new(program).args(arguments)).is_ok()
        };
        self == Self::Emulated || tried.into_iter().all(works)
    }

    /// What suits this machine: its own processors if they can run guests.
    pub fn of_this_machine() -> Self {
        let information = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has_extensions = information
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| {
                line.split_whitespace()
                    .any(|flag| flag == "vmx" || flag == "svm")
            });
        let is_usable = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if has_extensions && is_usable && Self::Native.is_allowed() {
            Self::Native
        } else {
            Self::Emulated
        }
    }
}

/// Kernels, programs and guests, ready to run.
#[derive(Debug)]
pub struct Hosts {
    cache: PathBuf,
}

/// What is run on each host.
#[derive(Clone, Debug)]
pub struct Run {
    /// What hosts are made of.
    pub bed: Bed,
    /// One or two.
    pub hosts: usize,
    /// What is run on each of them, by bash.
    pub script: PathBuf,
    /// Files, and where they are on the hosts.
    pub files: Vec<(PathBuf, String)>,
    /// Variables of the scripts.
    pub variables: Vec<(String, String)>,
    /// What QEMU calls the processor of each host; [`PROCESSOR`] for those that have none here. Only emulated
    /// hosts have another than this machine.
    pub processors: Vec<String>,
    /// Memory of each emulated host in MiB.
    pub memory_mib: u32,
    /// Size in MiB of a disk that all hosts share, `/dev/vdb` on each; 0 for none.
    pub disk_mib: u64,
    /// When hosts are ended that have not ended by themselves.
    pub limit: Duration,
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    /// The status of the first script that failed; 0 if none did.
    pub status: i32,
    /// What all of them printed, each line with the name of its host before it.
    pub output: String,
}

impl Hosts {
    /// Makes what is needed, or finds it in the cache.
    ///
    /// # Errors
    /// Packages cannot be fetched, or programs for making images are missing here.
    pub fn prepare(cache: &Path) -> Result<Self, HostError> {
        fs::create_dir_all(cache).map_err(failed(format!("make {}", cache.display())))?;
        // One at a time: tests of several processes share the cache.
        let lock = fs::File::create(cache.join("lock")).map_err(failed("make a lock"))?;
        lock.lock().map_err(failed("wait for the cache"))?;
        let is_made = cache.join(images::STAMP);
        if fs::read_to_string(&is_made).ok().as_deref() != Some(&images::stamp()) {
            images::make(cache)?;
            fs::write(&is_made, images::stamp()).map_err(failed("finish the cache"))?;
        }
        Ok(Self {
            cache: cache.to_owned(),
        })
    }

    /// Boots hosts, runs the script on each and prints what they say, until all have ended.
    ///
    /// # Errors
    /// A host does not start, dies, or takes too long: with the end of its console.
    pub fn run(&self, run: &Run) -> Result<Ended, HostError> {
        if run.bed == Bed::Native && !run.processors.is_empty() {
            return Err(HostError(
                "only emulated hosts have other processors".to_owned(),
            ));
        }
        let place = tempfile::tempdir().map_err(failed("make a directory"))?;
        if run.disk_mib > 0 {
            fs::File::create(place.path().join(SHARED_DISK))
                .and_then(|disk| disk.set_len(run.disk_mib << 20))
                .map_err(failed("make the disk that hosts share"))?;
        }
        let (tell, told) = mpsc::channel();
        let mut hosts = Vec::new();
        for index in 0..run.hosts {
            let start = match run.bed {
                Bed::Emulated => emulated::start,
                Bed::Native => native::start,
            };
            hosts.push(start(&self.cache, place.path(), run, index, tell.clone())?);
        }
        if let (Bed::Native, [first, second]) = (run.bed, &*hosts) {
            native::connect([first.process_id(), second.process_id()])?;
        }
        drop(tell);
        let mut ended = Ended {
            status: 0,
            output: String::new(),
        };
        let result = listen(&mut hosts, &told, run.limit, &mut ended);
        if let Err(error) = result {
            let consoles: Vec<String> = hosts.iter().map(Host::last_words).collect();
            return Err(HostError(format!("{error}\n{}", consoles.join("\n"))));
        }
        Ok(ended)
    }
}

/// What a host's script has as variables, for its shell.
fn variables(run: &Run, name: &str) -> String {
    let mut text = format!("export HOST={name}\n");
    for (variable, value) in &run.variables {
        let value = value.replace('\'', r"'\''");
        text.push_str(&format!("export {variable}='{value}'\n"));
    }
    text
}

/// Follows the hosts until all have ended well, or one has not.
fn listen(
    hosts: &mut [Host],
    told: &Receiver<(usize, Told)>,
    limit: Duration,
    ended: &mut Ended,
) -> Result<(), HostError> {
    let until = Instant::now() + limit;
    let mut running = hosts.len();
    while running > 0 {
        if Instant::now() > until {
            return Err(HostError(format!("the hosts did not end within {limit:?}")));
        }
        let Ok((index, what)) = told.recv_timeout(LOOK_EVERY) else {
            for host in hosts.iter_mut() {
                host.check_alive()?;
            }
            continue;
        };
        match what {
            Told::Line(line) => {
                let line = format!("{}| {line}\n", hosts[index].name());
                print!("{line}");
                ended.output.push_str(&line);
            }
            Told::Barrier(name) => {
                hosts[index].waits_at = Some(name.clone());
                if hosts
                    .iter()
                    .all(|host| host.waits_at.as_ref() == Some(&name))
                {
                    for host in hosts.iter_mut() {
                        host.waits_at = None;
                        host.go_on()?;
                    }
                }
            }
            Told::Status(0) => running -= 1,
            Told::Status(status) => {
                ended.status = status;
                return Ok(());
            }
        }
    }
    Ok(())
}
