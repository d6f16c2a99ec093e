//! Virtual machines as processes of this program: starting, finding, watching and ending them.
//!
//! A VM process is started in a session of its own with its output in a log file, so that it lives
//! on when the daemon dies; the daemon finds it again by its socket. A thread for each waits for
//! its end by a process descriptor, which works for children and for those of an earlier daemon,
//! and cannot mistake a later process of the same number for it.

pub mod lent;
mod preflight;

use crate::api::{self, CommandKind, GuestReport, SectionInfo, VcpuReport, VmSpec};
use crate::machine::{Activity, Described, Look, Machine, Machines, OnEnd, Shape};
use crate::new_disks::{self, NewDisk};
use crate::refusal::Refusal;
use crate::state_dir::{self, VmName};
use lent::Lent;
use limosa_carrier::{Guest, GuestError};
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::wire::Start;
use limosa_micro_abi as abi;
use limosa_pages::{ByteCount, PAGE_SIZE_USIZE};
use limosa_vmm::answer::{self, RunState};
use limosa_vmm::client::{VmError, VmHandle};
use limosa_vmm::config::devices::Mac;
use limosa_vmm::config::{Platform, VmConfig};
use limosa_vmm::process::sockets_of;
use preflight::{Program, ensure_memory};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// How long a VM process may take to open its socket or to notice that its former daemon is gone:
/// longer than any busy host needs, shorter than an operator's patience.
const START_MAX: Duration = Duration::from_secs(10);
/// How long an orderly end may take; freeing gigabytes takes a second.
const END_MAX: Duration = Duration::from_secs(10);
/// Log size beyond which the next VM of the name begins a new one.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Makes VM processes below one state directory.
#[derive(Debug)]
pub struct Processes {
    root: PathBuf,
    lent: Lent,
}

impl Processes {
    /// For the state directory `root`, whose path tells the hosts of one machine apart; `lent` is for guests
    /// that arrive.
    pub fn new(root: &Path, lent: Lent) -> Self {
        Self {
            root: root.to_owned(),
            lent,
        }
    }

    fn socket(&self, name: &VmName) -> PathBuf {
        self.root.join(format!("vms/{name}.sock"))
    }

    fn log(&self, name: &VmName) -> PathBuf {
        self.root.join(format!("logs/{name}.log"))
    }

    /// Starts a VM process and makes `config` in it.
    fn make(
        &self,
        name: &VmName,
        shape: Shape,
        make: impl FnOnce(&VmHandle) -> Result<(), VmError>,
        on_end: OnEnd,
    ) -> Result<Arc<dyn Machine>, String> {
        let socket = self.socket(name);
        let mut child = self.spawn(name, &socket)?;
        let made = connect_to_child(&socket, &mut child, &self.log(name)).and_then(|handle| {
            make(&handle).map_err(|error| GuestError::from(error).0)?;
            Ok(handle)
        });
        match made {
            Ok(handle) => Process::watch(handle, child.id(), Some(child), shape, socket, on_end),
            Err(reason) => {
                end_child(&mut child);
                remove_socket(&socket);
                Err(reason)
            }
        }
    }

    fn spawn(&self, name: &VmName, socket: &Path) -> Result<Child, String> {
        let unlogged = |error| format!("cannot write the log of VM '{name}': {error}");
        let log = open_log(&self.log(name)).map_err(unlogged)?;
        let errors = log.try_clone().map_err(unlogged)?;
        // Whatever our own path names by now, this is the program that runs: the file may have been
        // replaced by another version.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["vm", "--host-tag"])
            .arg(&self.root)
            .arg("--socket")
            .arg(socket)
            .arg("--ledger")
            .arg(self.root.join(state_dir::LEDGER))
            .args(["--daemon", &std::process::id().to_string()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        limosa_os::process::spawn_detached(&mut command)
            .map_err(|error| format!("a VM process cannot be started: {error}"))
    }
}

impl Machines for Processes {
    fn boot(
        &self,
        name: &VmName,
        spec: &VmSpec,
        on_end: OnEnd,
    ) -> Result<Arc<dyn Machine>, Refusal> {
        let program = Program::open(spec).map_err(Refusal::bad_request)?;
        let mut config =
            VmConfig::new(name.as_str(), ByteCount::new(spec.memory_bytes), spec.vcpus);
        config.huge_pages = spec.huge_pages;
        config.dirty_tracker = spec.dirty_tracker;
        config.model = spec.cpu;
        config.args = spec.args.clone();
        if let Some(linux) = &spec.linux {
            (config.platform, config.irqchip) = (Platform::Pc, true);
            config.disks = preflight::disks(linux);
        }
        config.networks = preflight::networks(name, spec).map_err(Refusal::bad_request)?;
        config.observer = spec.observer.as_deref().and_then(|text| text.parse().ok());
        config
            .check()
            .map_err(|error| Refusal::bad_request(error.to_string()))?;
        ensure_memory(shape(&config)).map_err(Refusal::failed)?;
        let make = |handle: &VmHandle| match &program {
            Program::Micro(elf) => handle.create(&config, Some(elf), Phase::Running),
            Program::Linux(image) => handle.create_linux(&config, image),
        };
        self.make(name, shape(&config), make, on_end)
            .map_err(|reason| {
                Refusal::failed(format!("no VM '{name}' with {}: {reason}", what(spec)))
            })
    }

    fn describe(&self, start: &Start) -> Result<Described, String> {
        let mut config =
            VmConfig::from_description(&start.vm).map_err(|error| error.to_string())?;
        if config.memory.pages_ceil() != start.memory_pages {
            return Err("the source contradicts itself about the size of the memory".to_owned());
        }
        let name = VmName::new(&config.name)?;
        let brings_disks = !start.disks.is_empty();
        let mut new_disks = Vec::new();
        if brings_disks {
            new_disks = new_disks::announced(&config.disks, &start.disks)?;
        }
        // What is not lent is not looked at either: nobody learns whether it is there.
        let mut differences = self.lent.keep_lent(&mut config);
        if brings_disks {
            let is_lent = |new: &NewDisk| config.disks.iter().any(|disk| new.path == *disk.path);
            new_disks.retain(is_lent);
            differences.extend(new_disks::in_the_way(&new_disks));
            config.disks.clear();
        }
        differences.extend(preflight::take_missing_disks(&mut config));
        differences.extend(config.differences().iter().map(ToString::to_string));
        differences.extend(ensure_memory(shape(&config)).err());
        Ok(Described {
            name,
            differences,
            new_disks,
            macs: macs(&config),
        })
    }

    fn receive(
        &self,
        name: &VmName,
        id: MigrationId,
        start: &Start,
        on_end: OnEnd,
    ) -> Result<Arc<dyn Machine>, String> {
        let mut config =
            VmConfig::from_description(&start.vm).map_err(|error| error.to_string())?;
        // A source does not choose whom this host sends datagrams to.
        config.observer = config
            .observer
            .filter(|observer| observer.ip().is_loopback());
        let make = |handle: &VmHandle| {
            let phase = Phase::Preparing { id };
            handle.create(&config, None, phase)
        };
        self.make(name, shape(&config), make, on_end)
    }

    fn attach(&self, name: &VmName, on_end: OnEnd) -> Result<Option<Arc<dyn Machine>>, String> {
        let socket = self.socket(name);
        let Some(handle) = connect_again(&socket)? else {
            remove_socket(&socket);
            return Ok(None);
        };
        let attached = handle.attached();
        let Some(config) = attached.config else {
            // Its daemon died before it became a virtual machine.
            if let Err(error) = handle.stop() {
                tracing::warn!(pid = attached.pid, %error, "an unfinished VM process does not end");
            }
            remove_socket(&socket);
            return Ok(None);
        };
        if config.name != name.as_str() {
            return Err(format!(
                "the process behind {} is VM '{}'",
                socket.display(),
                config.name
            ));
        }
        Process::watch(handle, attached.pid, None, shape(&config), socket, on_end).map(Some)
    }
}

/// What a new guest runs, in words.
fn what(spec: &VmSpec) -> String {
    match (&spec.micro, &spec.linux) {
        (Some(micro), _) => format!("program {micro}"),
        (None, Some(linux)) => format!("kernel {}", linux.kernel),
        (None, None) => "nothing to run".to_owned(),
    }
}

/// A VM process.
struct Process {
    handle: Arc<VmHandle>,
    pid: u32,
    descriptor: Arc<OwnedFd>,
    shape: Shape,
    macs: Vec<Mac>,
    socket: PathBuf,
    ended: Arc<OnceLock<String>>,
}

impl Process {
    /// Wraps a process that answers, and starts the thread that waits for its end.
    fn watch(
        handle: VmHandle,
        pid: u32,
        child: Option<Child>,
        shape: Shape,
        socket: PathBuf,
        on_end: OnEnd,
    ) -> Result<Arc<dyn Machine>, String> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or("a VM process without a number")?;
        let descriptor = pidfd_open(number, PidfdFlags::empty())
            .map_err(|error| format!("cannot watch VM process {pid}: {error}"))?;
        let descriptor = Arc::new(descriptor);
        let ended = Arc::new(OnceLock::new());
        let (watched, told) = (Arc::clone(&descriptor), Arc::clone(&ended));
        thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || {
                let reason = wait_for_end(&watched, child);
                told.get_or_init(|| reason.clone());
                on_end(pid, &reason);
            })
            .map_err(|error| format!("no thread to watch VM process {pid}: {error}"))?;
        let config = handle.attached().config;
        Ok(Arc::new(Self {
            macs: config.as_ref().map_or_else(Vec::new, macs),
            handle: Arc::new(handle),
            pid,
            descriptor,
            shape,
            socket,
            ended,
        }))
    }

    /// The rate that a micro guest was told, from its boot information.
    fn tsc_khz(&self) -> u64 {
        let mut page = [0; PAGE_SIZE_USIZE];
        match self
            .handle
            .memory()
            // A page that is missing must not come to be by being looked at.
            .read_file_at(abi::memory_map::BOOT_INFO, &mut page)
        {
            Ok(()) => abi::BootInfo::read_from_prefix(&page)
                .ok()
                .filter(|(boot, _)| boot.is_usable())
                .map_or(0, |(boot, _)| boot.tsc_khz),
            Err(_) => 0,
        }
    }

    /// Waits until the process is gone; false if it is not within [`END_MAX`].
    fn is_gone_soon(&self) -> bool {
        let until = Instant::now() + END_MAX;
        while self.ended.get().is_none() {
            if Instant::now() > until {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Machine for Process {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn macs(&self) -> Vec<Mac> {
        self.macs.clone()
    }

    fn guest(&self) -> Arc<dyn Guest> {
        Arc::clone(&self.handle) as Arc<dyn Guest>
    }

    fn look(&self) -> Result<Look, GuestError> {
        let status = self.handle.status().map_err(GuestError::from)?;
        Ok(Look {
            phase: status.phase,
            activity: activity(&status.run_state),
            balloon: status.balloon,
        })
    }

    fn misses_pages(&self) -> bool {
        Guest::installer(&*self.handle).is_some()
    }

    fn run(&self) -> Result<(), GuestError> {
        self.handle.run().map(drop).map_err(GuestError::from)
    }

    fn sections(&self) -> Result<Vec<SectionInfo>, GuestError> {
        let sections = self.handle.inspect().map_err(GuestError::from)?;
        let info = |section: answer::SectionInfo| SectionInfo {
            name: section.name,
            instance: section.instance,
            version: section.version,
            bytes: u64::from(section.bytes),
        };
        Ok(sections.into_iter().map(info).collect())
    }

    fn report(&self) -> GuestReport {
        let reports = self.handle.guest_report();
        let vcpus = reports.iter().flatten().map(vcpu_report).collect();
        GuestReport {
            tsc_khz: self.tsc_khz(),
            vcpus,
        }
    }

    fn command(&self, kind: CommandKind) -> Result<(), GuestError> {
        let kind = match kind {
            CommandKind::Sweep => abi::CommandKind::Sweep,
            CommandKind::ClearStalls => abi::CommandKind::ClearStalls,
            CommandKind::Finish => abi::CommandKind::Finish,
        };
        self.handle
            .command(kind)
            .map(drop)
            .map_err(GuestError::from)
    }

    fn set_balloon(&self, target_bytes: u64) -> Result<(), GuestError> {
        let target = ByteCount::new(target_bytes);
        self.handle.set_balloon(target).map_err(GuestError::from)
    }

    fn lend_balloon(&self, least_bytes: u64) -> Result<(), GuestError> {
        let least = ByteCount::new(least_bytes);
        self.handle.lend_balloon(least).map_err(GuestError::from)
    }

    fn stop(&self) -> Result<(), GuestError> {
        if self.ended.get().is_some() {
            return Ok(());
        }
        self.handle.stop().map_err(GuestError::from)?;
        if self.is_gone_soon() {
            return Ok(());
        }
        Err(GuestError(format!("VM process {} did not end", self.pid)))
    }

    fn kill(&self) {
        if let Err(error) = pidfd_send_signal(&self.descriptor, Signal::KILL) {
            tracing::debug!(pid = self.pid, %error, "a VM process to kill was gone");
        }
        if self.is_gone_soon() {
            // The name is still taken, so this cannot be a later machine's socket.
            remove_socket(&self.socket);
        } else {
            tracing::warn!(pid = self.pid, "a killed VM process is still there");
        }
    }

    fn ended(&self) -> Option<String> {
        self.ended.get().cloned()
    }
}

fn macs(config: &VmConfig) -> Vec<Mac> {
    config.networks.iter().map(|network| network.mac).collect()
}

fn shape(config: &VmConfig) -> Shape {
    Shape {
        memory_bytes: config.memory.get(),
        vcpus: config.vcpus,
        huge_pages: config.huge_pages,
        dirty_tracker: config.dirty_tracker,
        cpu: config.model,
    }
}

/// What the vCPUs do, in our words.
fn activity(state: &RunState) -> Activity {
    match state {
        RunState::Running => Activity::Running,
        RunState::Paused | RunState::Empty => Activity::Paused,
        RunState::Exited(reason) => Activity::Ended {
            reason: reason.to_string(),
        },
    }
}

fn vcpu_report(report: &abi::Report) -> VcpuReport {
    let stall = |stall: abi::Stall| api::Stall {
        start_tsc: stall.start_tsc,
        length_tsc: stall.length_tsc,
    };
    let state = match report.state() {
        Some(abi::State::Boot) => "boot",
        Some(abi::State::Ready) => "ready",
        Some(abi::State::Done) => "done",
        Some(abi::State::Failed) => "failed",
        None => "unknown",
    };
    let first = report.first_error;
    let long_stalls = report.long_stalls.iter().filter(|long| long.length_tsc > 0);
    let groups = report.stall_groups.iter().filter(|group| group.count > 0);
    let groups = groups.map(|group| api::StallGroup {
        count: group.count,
        ticks: group.ticks,
    });
    VcpuReport {
        vcpu: report.vcpu(),
        state: state.to_owned(),
        beat_tsc: report.beat_tsc,
        work: report.work,
        reads: report.reads,
        errors: report.errors,
        command_done: report.command_done,
        sweep_id: report.sweep_id,
        sweep_pages: report.sweep_pages,
        sweep_errors: report.sweep_errors,
        tsc_backwards: report.tsc_backwards,
        stall_total: report.stall_total,
        stalls: report.recent_stalls().map(stall).collect(),
        long_stalls: long_stalls.copied().map(stall).collect(),
        stall_groups: groups.collect(),
        first_error: (first.kind != 0).then_some(api::FirstError {
            page: first.page,
            expected: first.expected,
            found: first.found,
            kind: first.kind,
        }),
    }
}

/// Connects to a VM process that is being started.
fn connect_to_child(socket: &Path, child: &mut Child, log: &Path) -> Result<VmHandle, String> {
    let begun = Instant::now();
    loop {
        match VmHandle::connect(socket) {
            Ok(handle) => return Ok(handle),
            Err(error) if begun.elapsed() > START_MAX => {
                return Err(format!("the VM process does not answer: {error}"));
            }
            Err(_) => {}
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!(
                "the VM process {}: see {}",
                describe_exit(status),
                log.display()
            ));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Connects to a VM process that may not have noticed yet that its former daemon is gone; `None` if
/// nobody listens.
fn connect_again(socket: &Path) -> Result<Option<VmHandle>, String> {
    let begun = Instant::now();
    loop {
        match VmHandle::connect(socket) {
            Ok(handle) => return Ok(Some(handle)),
            Err(VmError::Connect { source, .. }) if is_nobody(&source) => return Ok(None),
            // The last daemon's connection is still there, the process ends right now, or this
            // host is short of something.
            Err(
                VmError::Busy(_) | VmError::Gone(_) | VmError::Lost(_) | VmError::Connect { .. },
            ) if begun.elapsed() < START_MAX => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(GuestError::from(error).0),
        }
    }
}

/// True if a failed connection means that there is no process, and not that it could not be reached.
fn is_nobody(error: &io::Error) -> bool {
    let is_gone = [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];
    is_gone.contains(&error.kind()) || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// Ends a child that never became a virtual machine.
fn end_child(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::warn!(pid = child.id(), %error, "a failed VM process could not be ended");
    }
}

/// Sleeps until the process is gone and says how it went.
fn wait_for_end(descriptor: &OwnedFd, child: Option<Child>) -> String {
    loop {
        let mut polled = [PollFd::new(descriptor, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "a VM process cannot be watched");
                break;
            }
        }
    }
    match child.map(|mut child| child.wait()) {
        Some(Ok(status)) => format!("the VM process {}", describe_exit(status)),
        // Only a parent hears the exit status.
        Some(Err(_)) | None => "the VM process ended".to_owned(),
    }
}

fn describe_exit(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended".to_owned(),
        (Some(code), _) => format!("failed with status {code}"),
        (None, Some(9)) => "was killed (SIGKILL)".to_owned(),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or(0)),
    }
}

/// Removes what a process that is gone has listened at.
fn remove_socket(socket: &Path) {
    for path in sockets_of(socket) {
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(socket = %path.display(), %error, "a stale socket could not be removed");
        }
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    if log.metadata()?.len() > LOG_BYTES_MAX {
        log.set_len(0)?;
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_told_in_words() {
        let check = |script: &str, expect: &str| {
            let mut command = Command::new("sh");
            let child = command.args(["-c", script]).spawn().unwrap();
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
            let descriptor = pidfd_open(pid, PidfdFlags::empty()).unwrap();
            assert_eq!(wait_for_end(&descriptor, Some(child)), expect);
        };
        check("exit 0", "the VM process ended");
        check("exit 3", "the VM process failed with status 3");
        check("kill -9 $$", "the VM process was killed (SIGKILL)");
        check("kill -11 $$", "the VM process was ended by signal 11");
    }
}
