//! One emulated host: QEMU with two sockets to it, one for what its script prints, one for control.

use super::archive::Archive;
use super::packages::Packages;
use super::{EmulationError, PROCESSOR, Run, SERIES, failed};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

/// The disk that all hosts have, beside what else belongs to a run.
pub(super) const SHARED_DISK: &str = "shared.raw";
const NAMES: [&str; 2] = ["host-a", "host-b"];
/// How long QEMU may take to connect, and to make its end of the LAN.
const START_MAX: Duration = Duration::from_secs(20);
/// How much of a console is shown when something went wrong.
const LAST_LINES: usize = 40;

/// What a host says.
#[derive(Debug)]
pub(super) enum Told {
    /// Its script printed this.
    Line(String),
    /// It waits until the other is there, too.
    Barrier(String),
    /// Its script has ended.
    Status(i32),
}

/// A host that runs.
pub(super) struct Host {
    index: usize,
    qemu: Child,
    control: UnixStream,
    console: PathBuf,
    errors: PathBuf,
    pub(super) waits_at: Option<String>,
}

impl Host {
    /// Starts the host with that index.
    pub(super) fn start(
        cache: &Path,
        place: &Path,
        run: &Run,
        index: usize,
        tell: Sender<(usize, Told)>,
    ) -> Result<Self, EmulationError> {
        let name = NAMES[index];
        let initial = place.join(format!("{name}.initial"));
        write_initial(cache, &initial, run, name)
            .map_err(failed("write what a host boots from"))?;
        let listen = |what: &str| {
            let path = place.join(format!("{name}.{what}"));
            UnixListener::bind(&path)
                .map_err(failed("make a socket"))
                .map(|listener| (listener, path))
        };
        let ((output, output_path), (control, control_path)) =
            (listen("output")?, listen("control")?);
        let (console, errors) = (
            place.join(format!("{name}.console")),
            place.join(format!("{name}.qemu")),
        );
        let sockets = [("output", &output_path), ("control", &control_path)];
        let mut command = qemu(cache);
        command.args(["-name", name, "-m", &run.memory_mib.to_string()]);
        let processor = run.processors.get(index).map_or(PROCESSOR, String::as_str);
        command.args(["-cpu", processor]);
        command.arg("-initrd").arg(&initial);
        connect(&mut command, &console, sockets);
        if run.disk_mib > 0 {
            share_disk(&mut command, place);
        }
        if run.hosts == 2 {
            lan(&mut command, place, index)?;
        }
        let log = File::create(&errors).map_err(failed("write a log"))?;
        let own = log.try_clone().map_err(failed("write a log"))?;
        command.stdin(Stdio::null()).stdout(own).stderr(log);
        let mut qemu = command.spawn().map_err(failed("run QEMU"))?;
        let connected = accept(&output, &mut qemu)
            .and_then(|output| Ok((output, accept(&control, &mut qemu)?)));
        let (output, control) = match connected {
            Ok(both) => both,
            Err(error) => {
                end(&mut qemu);
                let said = fs::read_to_string(&errors).unwrap_or_default();
                return Err(EmulationError(format!("{error}; {said}")));
            }
        };
        let reader = control.try_clone().map_err(failed("share a socket"))?;
        follow(index, output, reader, tell);
        Ok(Self {
            index,
            qemu,
            control,
            console,
            errors,
            waits_at: None,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        NAMES[self.index]
    }

    /// Lets it go on from its barrier.
    pub(super) fn go_on(&mut self) -> Result<(), EmulationError> {
        self.control
            .write_all(b"go\n")
            .map_err(failed("tell a host to go on"))
    }

    /// An error if QEMU has ended.
    pub(super) fn check_alive(&mut self) -> Result<(), EmulationError> {
        match self.qemu.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(EmulationError(format!(
                "{} has died: {status}",
                self.name()
            ))),
            Err(error) => Err(failed("look after QEMU")(error)),
        }
    }

    /// The end of its console and of what QEMU said.
    pub(super) fn last_words(&self) -> String {
        let text = [&self.console, &self.errors].map(|path| {
            let bytes = fs::read(path).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\r', "")
        });
        let lines: Vec<String> = text
            .iter()
            .flat_map(|text| text.lines())
            .map(|line| format!("{} console| {line}", self.name()))
            .collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        end(&mut self.qemu);
    }
}

fn end(qemu: &mut Child) {
    if let Err(error) = qemu.kill().and_then(|()| qemu.wait()) {
        eprintln!("QEMU does not end: {error}");
    }
}

/// The emulator out of the packages; it ends with whoever started it.
fn qemu(cache: &Path) -> Command {
    let packages = Packages::unpacked(cache);
    let series = SERIES[0];
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(packages.loader())
        .args(["--library-path", &packages.library_path()])
        .arg(packages.usr("bin/qemu-system-x86_64"))
        .env("QEMU_MODULE_DIR", packages.qemu_modules())
        .arg("-L")
        .arg(packages.usr("share/qemu"))
        .arg("-L")
        .arg(packages.usr("share/seabios"))
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        // One processor a host: with two, hosts now and then hang when they make their first machine.
        .args(["-M", "q35", "-accel", "tcg,thread=multi,tb-size=256", "-smp", "1"])
        .arg("-kernel")
        .arg(cache.join(format!("vmlinuz-{series}")))
        .args(["-append", "console=ttyS0 panic=-1 oops=panic tsc=reliable no_timer_check quiet"])
        .arg("-drive")
        .arg(format!("if=none,id=usr,format=raw,readonly=on,file={}", cache.join("usr.img").display()))
        .args(["-device", "virtio-blk-pci,drive=usr", "-device", "virtio-rng-pci"])
        .args(["-device", "virtio-serial-pci"]);
    command
}

/// Its console goes to a file, and ports of these names to sockets.
fn connect(command: &mut Command, console: &Path, sockets: [(&str, &PathBuf); 2]) {
    command
        .args([
            "-chardev",
            &format!("file,id=console,path={}", console.display()),
        ])
        .args(["-serial", "chardev:console"]);
    for (name, path) in sockets {
        command
            .args([
                "-chardev",
                &format!("socket,id={name},path={}", path.display()),
            ])
            .args([
                "-device",
                &format!("virtserialport,chardev={name},name={name}"),
            ]);
    }
}

/// All hosts write it: who may when is for those who use it to settle.
fn share_disk(command: &mut Command, place: &Path) {
    command
        .arg("-drive")
        .arg(format!(
            "if=none,id=shared,format=raw,cache=writethrough,file.locking=off,discard=unmap,file={}",
            place.join(SHARED_DISK).display()
        ))
        .args(["-device", "virtio-blk-pci,drive=shared"]);
}

/// The first host listens, the second one connects.
fn lan(command: &mut Command, place: &Path, index: usize) -> Result<(), EmulationError> {
    let path = place.join("lan");
    if index > 0 {
        let until = Instant::now() + START_MAX;
        while !path.exists() {
            if Instant::now() > until {
                return Err(EmulationError(
                    "the first host does not make its end of the LAN".to_owned(),
                ));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    let server = if index == 0 { "on" } else { "off" };
    command
        .arg("-netdev")
        .arg(format!(
            "stream,id=lan,server={server},addr.type=unix,addr.path={}",
            path.display()
        ))
        .arg("-device")
        .arg(format!(
            "virtio-net-pci,netdev=lan,romfile=,mac=52:54:00:77:00:0{}",
            index + 1
        ));
    Ok(())
}

/// What differs from run to run and from host to host, behind what all hosts boot from.
fn write_initial(cache: &Path, to: &Path, run: &Run, name: &str) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(to)?);
    io::copy(
        &mut File::open(cache.join(format!("host-{}", SERIES[0])))?,
        &mut file,
    )?;
    let mut archive = Archive::new(file);
    let mut variables = format!("export HOST={name}\n");
    for (variable, value) in &run.variables {
        variables.push_str(&format!(
            "export {variable}='{}'\n",
            value.replace('\'', r"'\''")
        ));
    }
    archive.file("run/variables", 0o644, variables.as_bytes())?;
    archive.file("run/script", 0o755, &fs::read(&run.script)?)?;
    for (from, path) in &run.files {
        archive.copy(from, path.trim_start_matches('/'))?;
    }
    archive.finish()?.flush()
}

fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream, EmulationError> {
    listener
        .set_nonblocking(true)
        .map_err(failed("wait for QEMU"))?;
    let until = Instant::now() + START_MAX;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream
                    .set_nonblocking(false)
                    .map_err(failed("wait for QEMU"))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed("wait for QEMU")(error)),
        }
        let has_ended = qemu
            .try_wait()
            .map_err(failed("look after QEMU"))?
            .is_some();
        if has_ended || Instant::now() > until {
            return Err(EmulationError("QEMU does not start".to_owned()));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Tells what a host prints and says. What was printed before the end comes before it: the thread of
/// the control socket waits for the other, whose socket is closed by the host first.
fn follow(index: usize, output: UnixStream, control: UnixStream, tell: Sender<(usize, Told)>) {
    let lines = tell.clone();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_owned();
            if lines.send((index, Told::Line(line))).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for line in BufReader::new(control).lines().map_while(Result::ok) {
            let told = match line.split_once(' ') {
                Some(("barrier", name)) => Told::Barrier(name.to_owned()),
                Some(("exit", status)) => Told::Status(status.trim().parse().unwrap_or(1)),
                _ => continue,
            };
            if tell.send((index, told)).is_err() {
                return;
            }
        }
    });
}
