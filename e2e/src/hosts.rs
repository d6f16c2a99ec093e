//! Two throw-away Linux hosts with a working `/dev/kvm`, on any machine: QEMU emulates their processors,
//! AMD's extensions for virtual machines among them, so that a stock kernel boots as a guest there.
//!
//! ```text
//!  this machine ─┬─ host-a: Debian kernel in QEMU (no KVM) ── limosa ── stock guest
//!                └─ host-b: the same                               LAN between them: 10.77.0.0/24
//! ```
//!
//! Everything comes from Debian packages that are fetched and unpacked into a cache, nothing is
//! installed, and nothing of what this machine has matters but `apt-get`, `dpkg-deb`, `tar` and `mke2fs`.
//! A run boots fresh hosts, runs one script on each, and ends with them; [`Hosts::run`] says how it went.
//!
//! Emulation is slow: an exit of a guest costs some ten microseconds, a guest boots in ten to thirty
//! seconds. What is measured here compares with nothing else.

mod archive;
mod host;
mod images;
mod kernel;
mod packages;

use host::{Host, Told};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Series of the kernels of hosts and guests, the usual one first.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];
/// The processor of a host: AMD's first EPYC, whose kernel would only lose time by looking for MONITOR.
pub const PROCESSOR: &str = "EPYC,-monitor";
/// How often it is looked whether hosts that say nothing are still there.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Why hosts cannot be emulated, or a run did not come to its end.
#[derive(Debug)]
pub struct EmulationError(String);

impl fmt::Display for EmulationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for EmulationError {}

fn failed(what: impl fmt::Display) -> impl FnOnce(io::Error) -> EmulationError {
    move |error| EmulationError(format!("cannot {what}: {error}"))
}

/// Kernels, programs and guests, ready to run.
#[derive(Debug)]
pub struct Hosts {
    cache: PathBuf,
}

/// What is run on each host.
#[derive(Clone, Debug)]
pub struct Run {
    /// One or two.
    pub hosts: usize,
    /// What is run on each of them, by bash.
    pub script: PathBuf,
    /// Files, and where they are on the hosts.
    pub files: Vec<(PathBuf, String)>,
    /// Variables of the scripts.
    pub variables: Vec<(String, String)>,
    /// What QEMU calls the processor of each host; [`PROCESSOR`] for those that have none here.
    pub processors: Vec<String>,
    /// Memory of each host in MiB.
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
    pub fn prepare(cache: &Path) -> Result<Self, EmulationError> {
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
    pub fn run(&self, run: &Run) -> Result<Ended, EmulationError> {
        let place = tempfile::tempdir().map_err(failed("make a directory"))?;
        if run.disk_mib > 0 {
            fs::File::create(place.path().join(host::SHARED_DISK))
                .and_then(|disk| disk.set_len(run.disk_mib << 20))
                .map_err(failed("make the disk that hosts share"))?;
        }
        let (tell, told) = mpsc::channel();
        let mut hosts = Vec::new();
        for index in 0..run.hosts {
            hosts.push(Host::start(
                &self.cache,
                place.path(),
                run,
                index,
                tell.clone(),
            )?);
        }
        drop(tell);
        let mut ended = Ended {
            status: 0,
            output: String::new(),
        };
        let result = listen(&mut hosts, &told, run.limit, &mut ended);
        if let Err(error) = result {
            let consoles: Vec<String> = hosts.iter().map(Host::last_words).collect();
            return Err(EmulationError(format!("{error}\n{}", consoles.join("\n"))));
        }
        Ok(ended)
    }
}

/// Follows the hosts until all have ended well, or one has not.
fn listen(
    hosts: &mut [Host],
    told: &Receiver<(usize, Told)>,
    limit: Duration,
    ended: &mut Ended,
) -> Result<(), EmulationError> {
    let until = Instant::now() + limit;
    let mut running = hosts.len();
    while running > 0 {
        if Instant::now() > until {
            return Err(EmulationError(format!(
                "the hosts did not end within {limit:?}"
            )));
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
