//! One emulated host: QEMU with two sockets to it, one for what its script prints, one for control.

use super::archive::Archive;
use super::host::{self, Host, Told};
use super::packages::Packages;
use super::{HostError, PROCESSOR, Run, SERIES, SHARED_DISK, failed, variables};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

/// How long QEMU may take to connect, and to make its end of the LAN.
const START_MAX: Duration = Duration::from_secs(20);

/// Starts the host with that index.
pub(super) fn start(
    cache: &Path,
    place: &Path,
    run: &Run,
    index: usize,
    tell: Sender<(usize, Told)>,
) -> Result<Host, HostError> {
    let name = host::name(index);
    let initial = place.join(format!("{name}.initial"));
    write_initial(cache, &initial, run, name).map_err(failed("write what a host boots from"))?;
    let listen = |what: &str| {
        let path = place.join(format!("{name}.{what}"));
        UnixListener::bind(&path)
            .map_err(failed("make a socket"))
            .map(|listener| (listener, path))
    };
    let ((output, output_path), (control, control_path)) = (listen("output")?, listen("control")?);
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
    let connected =
        accept(&output, &mut qemu).and_then(|output| Ok((output, accept(&control, &mut qemu)?)));
    match connected {
        Ok(both) => Host::follow(index, qemu, both, vec![console, errors], tell),
        Err(error) => {
            host::end(&mut qemu);
            let said = fs::read_to_string(&errors).unwrap_or_default();
            Err(HostError(format!("{error}; {said}")))
        }
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
fn lan(command: &mut Command, place: &Path, index: usize) -> Result<(), HostError> {
    let path = place.join("lan");
    if index > 0 {
        let until = Instant::now() + START_MAX;
        while !path.exists() {
            if Instant::now() > until {
                return Err(HostError(
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
    archive.file("run/variables", 0o644, variables(run, name).as_bytes())?;
    archive.file("run/script", 0o755, &fs::read(&run.script)?)?;
    for (from, path) in &run.files {
        archive.copy(from, path.trim_start_matches('/'))?;
    }
    archive.finish()?.flush()
}

fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<File, HostError> {
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
                return Ok(File::from(OwnedFd::from(stream)));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed("wait for QEMU")(error)),
        }
        let has_ended = qemu
            .try_wait()
            .map_err(failed("look after QEMU"))?
            .is_some();
        if has_ended || Instant::now() > until {
            return Err(HostError("QEMU does not start".to_owned()));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
