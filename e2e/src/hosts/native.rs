//! A host that is made of namespaces of this machine: mounts, processes, a name and a network of its own, the
//! kernel and the processors of all. With its first process everything of it ends.

use super::host::{self, Host, Told};
use super::packages::succeed;
use super::{HostError, Run, SHARED_DISK, failed, variables};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

/// Does what an emulated host does until it has its file systems.
const NATIVE: &str = include_str!("../../hosts/host-native");
/// A host's end of the LAN.
const WIRE: &str = "eth0";
/// How long a host may take to be one.
const START_MAX: Duration = Duration::from_secs(20);

/// Starts the host with that index. It goes on when it has its end of the LAN, if there is one.
pub(super) fn start(
    cache: &Path,
    place: &Path,
    run: &Run,
    index: usize,
    tell: Sender<(usize, Told)>,
) -> Result<Host, HostError> {
    let name = host::name(index);
    let own = place.join(name);
    let script = lay_out(&own, run, name).map_err(failed("write what a host starts with"))?;
    let log = own.join("log");
    let errors = File::create(&log).map_err(failed("write a log"))?;
    let (near, far, held) = terminal().map_err(failed("make a terminal"))?;
    let wire = if run.hosts == 2 { WIRE } else { "" };
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .args(["unshare", "--net", "--mount", "--uts", "--ipc", "--pid"])
        .args(["--fork", "--kill-child", "--mount-proc", "bash"])
        .args([&script, &own, &cache.join("usr.img"), &far])
        .arg(wire);
    if run.disk_mib > 0 {
        command.arg(place.join(SHARED_DISK));
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors);
    let mut process = command.spawn().map_err(failed("run unshare"))?;
    let output = process.stdout.take().expect("it was asked for");
    let both = (File::from(OwnedFd::from(output)), near);
    let host = Host::follow(index, process, both, vec![log], tell)?;
    Ok(host.holding(held))
}

/// Puts a wire between two hosts, which is gone with them.
pub(super) fn connect([first, second]: [u32; 2]) -> Result<(), HostError> {
    for process in [first, second] {
        wait_for_network(process)?;
    }
    let mut add = Command::new("ip");
    add.args(["link", "add", WIRE, "netns", &first.to_string()])
        .args(["type", "veth", "peer", "name", WIRE])
        .args(["netns", &second.to_string()]);
    succeed(&mut add).map(drop)
}

/// Until a process has a network of its own.
fn wait_for_network(process: u32) -> Result<(), HostError> {
    let space = |of: &str| fs::read_link(format!("/proc/{of}/ns/net"));
    let until = Instant::now() + START_MAX;
    while Instant::now() < until {
        match (space("self"), space(&process.to_string())) {
            (Ok(ours), Ok(its)) if ours == its => thread::sleep(Duration::from_millis(5)),
            (Ok(_), Ok(_)) => return Ok(()),
            (Err(error), _) | (_, Err(error)) => return Err(failed("look after a host")(error)),
        }
    }
    Err(HostError(
        "a host does not get a network of its own".to_owned(),
    ))
}

/// Writes the directory of a host; where its first script is.
fn lay_out(own: &Path, run: &Run, name: &str) -> io::Result<PathBuf> {
    let content = own.join("run");
    fs::create_dir_all(&content)?;
    fs::write(content.join("variables"), variables(run, name))?;
    fs::copy(&run.script, content.join("script"))?;
    for (from, path) in &run.files {
        let relative = path.strip_prefix("/run/").ok_or_else(|| {
            io::Error::other(format!("{path}: files of these hosts are below /run"))
        })?;
        let to = content.join(relative);
        fs::create_dir_all(to.parent().expect("it is below the directory"))?;
        fs::copy(from, to)?;
    }
    let script = own.join("first");
    fs::write(&script, NATIVE)?;
    Ok(script)
}

/// Two ends of a line that passes bytes on as they are: ours, and the path of the other, which is held open: a
/// terminal that nobody has open cannot be read.
fn terminal() -> io::Result<(File, PathBuf, File)> {
    let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&near)?;
    unlockpt(&near)?;
    let far = PathBuf::from(OsString::from_vec(ptsname(&near, Vec::new())?.into_bytes()));
    let mut raw = tcgetattr(&near)?;
    raw.make_raw();
    tcsetattr(&near, OptionalActions::Now, &raw)?;
    let held = File::options()
        .read(true)
        .write(true)
        // It is nobody's controlling terminal, ours neither.
        .custom_flags(OFlags::NOCTTY.bits().cast_signed())
        .open(&far)?;
    Ok((File::from(near), far, held))
}
