//! One QEMU as a child of this process, with its control socket, its guest's console and memory.
//!
//! The machine is the smallest that it has: no PCI, no firmware that takes seconds where privileged
//! code is emulated, memory as it comes by default. It ends with its destructor, whatever happens,
//! and is no member of the terminal's process group.

use crate::bed::interrupt::Interrupt;
use crate::bed::qemu::console::{Console, Heard};
use crate::bed::qemu::guest_memory::{GuestMemory, host_address};
use crate::bed::qemu::image;
use crate::bed::qemu::qmp::Qmp;
use anyhow::{Context, bail, ensure};
use limosa_micro_abi::port;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// QEMU opens its sockets within tenths of a second; a busy machine takes longer.
const START_MAX: Duration = Duration::from_secs(20);
/// Between two looks at something that will be there soon.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Lines of its errors that are shown.
const LOG_LINES: usize = 6;

/// What all QEMUs of a bed have in common.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// The program.
    pub program: PathBuf,
    /// The guest's image.
    pub image: PathBuf,
    /// The guest's memory.
    pub memory_bytes: u64,
}

/// Whether it begins with the guest or waits for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It boots.
    Source,
    /// It waits.
    Target,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// A QEMU.
#[derive(Debug)]
pub(crate) struct Process {
    /// Talks to it.
    pub qmp: Qmp,
    /// Its guest's memory.
    pub memory: GuestMemory,
    console: Console,
    /// Last, so that it ends when the others are no longer needed; the destructor sees to the rest.
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts one; a source does not run its guest before it is told to.
    pub(crate) fn start(
        role: Role,
        machine: &Machine,
        directory: &Path,
        heard: &Heard,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let path = |what: &str| directory.join(format!("{}.{what}", role.name()));
        let (control, console, log) = (path("qmp"), path("console"), path("log"));
        let listener = UnixListener::bind(&console).context("cannot make a socket")?;
        listener
            .set_nonblocking(true)
            .context("cannot set up a socket")?;
        let mut child = Started(Some(spawn(role, machine, &control, &console, &log)?));
        let stream = child.wait_for(&log, interrupt, || listener.accept().map(|(one, _)| one))?;
        stream
            .set_nonblocking(false)
            .context("cannot set up a socket")?;
        let socket = child.wait_for(&log, interrupt, || UnixStream::connect(&control))?;
        let mut qmp = Qmp::start(socket)?;
        let start = address_of(&mut qmp, 0)?;
        if machine.memory_bytes > image::HOLE_START {
            let upper = address_of(&mut qmp, image::HOLE_END)?;
            ensure!(
                upper == start + image::HOLE_START,
                "this QEMU has its memory elsewhere than the guest's page tables say"
            );
        }
        let memory = GuestMemory::open(child.id(), start)?;
        Ok(Self {
            console: Console::start(stream, memory.try_clone()?, heard)?,
            memory,
            qmp,
            child: child.taken(),
            log,
        })
    }

    /// Its process number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its last words, if it has ended.
    pub(crate) fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        // What its guest said last is heard then, too.
        self.console.join();
        Some(format!("QEMU ended ({status}): {}", last_words(&self.log)))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        end(&mut self.child);
        self.console.join();
    }
}

/// A child that ends, unless somebody takes it.
struct Started(Option<Child>);

impl Started {
    fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    fn taken(mut self) -> Child {
        self.0.take().expect("it is taken once")
    }

    /// Tries until it goes, the child ends, or too much time has passed.
    fn wait_for<T>(
        &mut self,
        log: &Path,
        interrupt: &Interrupt,
        attempt: impl Fn() -> io::Result<T>,
    ) -> anyhow::Result<T> {
        let give_up = Instant::now() + START_MAX;
        loop {
            let error = match attempt() {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let child = self.0.as_mut().expect("it is taken at the end");
            if let Some(status) = child.try_wait().context("cannot watch QEMU")? {
                bail!("QEMU ended at once ({status}): {}", last_words(log));
            }
            if Instant::now() > give_up {
                return Err(error).context("QEMU does not open its sockets");
            }
            interrupt.sleep(LOOK_EVERY)?;
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    // It holds nothing that would have to be put in order first.
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::error!(%error, pid = child.id(), "a QEMU could not be killed");
    }
}

fn spawn(
    role: Role,
    machine: &Machine,
    control: &Path,
    console: &Path,
    log: &Path,
) -> anyhow::Result<Child> {
    let log = File::create(log).context("cannot make a log file")?;
    let memory = format!("{}K", machine.memory_bytes >> 10);
    let mut command = Command::new(&machine.program);
    command
        .args(["-machine", MACHINE, "-bios", "qboot.rom", "-accel", "kvm"])
        // Software KVM refuses the register of the feature that is left out.
        .args(["-cpu", "max,-arch-capabilities", "-smp", "1"])
        .args(["-m", &memory, "-display", "none"])
        .args(["-nodefaults", "-no-user-config", "-name", "limosa-lab"])
        .arg("-kernel")
        .arg(&machine.image)
        .arg("-chardev")
        .arg(format!("socket,id=console,path={}", console.display()))
        .arg("-device")
        .arg(format!("isa-debugcon,iobase={},chardev=console", port::CONSOLE))
        .arg("-device")
        .arg(format!("isa-debug-exit,iobase={},iosize=4", port::EXIT))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", control.display()))
        .args(match role {
            Role::Source => &["-S"][..],
            Role::Target => &["-incoming", "defer"],
        })
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share a log file")?)
        .stderr(log)
        .process_group(0);
    let shown = machine.program.display();
    command
        .spawn()
        .with_context(|| format!("cannot start {shown}"))
}

/// Without what a guest that has no kernel would never use.
const MACHINE: &str =
    "microvm,isa-serial=off,rtc=off,pit=off,pic=off,auto-kernel-cmdline=off,acpi=off";

/// Where the process has the byte at this physical address of its guest.
fn address_of(qmp: &mut Qmp, address: u64) -> anyhow::Result<u64> {
    let line = format!("gpa2hva {address:#x}");
    let answer = qmp.execute("human-monitor-command", json!({ "command-line": line }))?;
    let text = answer.as_str().unwrap_or_default();
    let found = Value::as_str(&answer).and_then(host_address);
    found.with_context(|| format!("QEMU does not tell where its memory is: {}", text.trim()))
}

fn last_words(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
    if tail.is_empty() {
        return "it said nothing".to_owned();
    }
    tail.join("; ")
}
