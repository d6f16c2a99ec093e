//! What hosts and guests boot from: initial file systems, and one image of programs that hosts share.
//!
//! A host's initial file system has its modules and [`HOST_INIT`]; everything else is in an image that
//! it mounts at `/usr`, since memory is what hosts have least of. A guest has all in its own but for `fio`, whose
//! libraries are larger than all of that: it finds that in the hosts' image, if that is one of its disks.

use super::archive::Archive;
use super::kernel::Kernel;
use super::packages::{Packages, TRIPLET, succeed};
use super::{HostError, SERIES, failed};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

/// Where it is written what a cache was made from.
pub(super) const STAMP: &str = "made-from";

const HOST_INIT: &str = include_str!("../../hosts/host-init");
const GUEST_INIT: &str = include_str!("../../hosts/guest-init");
/// What scripts on hosts call or source, by name.
const TOOLS: [(&str, &str); 3] = [
    ("barrier", include_str!("../../hosts/barrier")),
    ("host-run", include_str!("../../hosts/host-run")),
    ("daemon", include_str!("../../hosts/daemon")),
];
const HOST_PROGRAMS: [&str; 18] = [
    "busybox",
    "bash",
    "socat",
    "ip",
    "tc",
    "bridge",
    "ss",
    "ping",
    "redis-cli",
    "redis-benchmark",
    "iperf3",
    "stress-ng",
    "fio",
    "sqlite3",
    "mke2fs",
    "e2fsck",
    "debugfs",
    "qemu-system-x86_64",
];
const GUEST_PROGRAMS: [&str; 6] = [
    "busybox",
    "redis-server",
    "memcached",
    "sqlite3",
    "iperf3",
    "stress-ng",
];
const HOST_MODULES: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "kvm-amd",
    "tun",
    "bridge",
];
const GUEST_MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio_balloon",
    "virtio_console",
    "virtio-rng",
    "pvpanic-mmio",
];

/// Tells caches of different makings apart.
pub(super) fn stamp() -> String {
    let parts = [
        include_str!("images.rs"),
        include_str!("packages.rs"),
        include_str!("kernel.rs"),
        include_str!("archive.rs"),
        HOST_INIT,
        GUEST_INIT,
    ];
    let tools = TOOLS.map(|(_, content)| content);
    parts.concat() + &tools.concat()
}

/// Makes everything below `cache`.
pub(super) fn make(cache: &Path) -> Result<(), HostError> {
    eprintln!(
        "making the emulated hosts: packages are fetched and unpacked, which takes a minute or two"
    );
    let packages = Packages::fetch(cache)?;
    let stage = cache.join("stage");
    if stage.exists() {
        fs::remove_dir_all(&stage).map_err(failed("clear the stage"))?;
    }
    let (usr, guest_usr) = (stage.join("usr"), stage.join("guest"));
    let share = usr.join("share/limosa");
    fs::create_dir_all(&share).map_err(failed("make a directory"))?;
    packages.install(&GUEST_PROGRAMS, &guest_usr)?;
    for (series, root) in &packages.kernels {
        let kernel = Kernel::open(root)?;
        let copy = |to: &Path| fs::copy(&kernel.image, to).map_err(failed("copy a kernel"));
        copy(&cache.join(format!("vmlinuz-{series}")))?;
        copy(&share.join(format!("vmlinuz-{series}")))?;
        let host = cache.join(format!("host-{series}"));
        initial(&packages, &kernel, &host, HOST_INIT, &HOST_MODULES, None)?;
        let guest = share.join(format!("guest-{series}"));
        initial(
            &packages,
            &kernel,
            &guest,
            GUEST_INIT,
            &GUEST_MODULES,
            Some(&guest_usr),
        )?;
    }
    for name in ["vmlinuz", "guest"] {
        let usual = format!("{name}-{}", SERIES[0]);
        symlink(usual, share.join(name)).map_err(failed("make a link"))?;
    }
    complete_usr(&packages, &usr).map_err(failed("make the hosts' programs"))?;
    packages.install(&HOST_PROGRAMS, &usr)?;
    applets(&packages, &usr)?;
    make_image(cache, &usr)?;
    fs::remove_dir_all(&stage).map_err(failed("clear the stage"))
}

/// The initial file system of a host or a guest.
fn initial(
    packages: &Packages,
    kernel: &Kernel,
    to: &Path,
    init: &str,
    modules: &[&str],
    usr: Option<&Path>,
) -> Result<(), HostError> {
    let modules = kernel.load_order(modules)?;
    let busybox = packages.program("busybox")?;
    let write = || -> io::Result<()> {
        let mut archive = Archive::new(BufWriter::new(File::create(to)?));
        for name in ["bin", "sbin", "lib", "lib64"] {
            archive.link(name, &format!("usr/{name}"))?;
        }
        for name in [
            "proc", "sys", "dev", "tmp", "run", "etc", "root", "mnt", "usr", "out",
        ] {
            archive.directory(name)?;
        }
        archive.device("dev/console", 5, 1)?;
        archive.device("dev/null", 1, 3)?;
        archive.copy(&busybox, "busybox")?;
        archive.file("init", 0o755, init.as_bytes())?;
        let mut order = String::new();
        for module in &modules {
            archive.file(
                &format!("modules/{}.ko", module.name),
                0o644,
                &module.content,
            )?;
            order.push_str(&module.name);
            order.push('\n');
        }
        archive.file("modules/order", 0o644, order.as_bytes())?;
        if let Some(usr) = usr {
            archive.tree(usr, "usr")?;
        }
        archive.finish()?.flush()
    };
    write().map_err(failed(format!("write {}", to.display())))
}

/// What QEMU needs on a host, and what scripts there call.
fn complete_usr(packages: &Packages, usr: &Path) -> io::Result<()> {
    let modules = usr.join("lib").join(TRIPLET).join("qemu");
    for directory in [&modules, &usr.join("share/qemu"), &usr.join("bin")] {
        fs::create_dir_all(directory)?;
    }
    for entry in fs::read_dir(packages.qemu_modules())? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("accel-") && name.ends_with("-x86_64.so") {
            fs::copy(&path, modules.join(name))?;
        }
    }
    for name in [
        "bios-microvm.bin",
        "linuxboot_dma.bin",
        "pvh.bin",
        "kvmvapic.bin",
    ] {
        let places = ["share/qemu", "share/seabios"].map(|place| packages.usr(place).join(name));
        if let Some(path) = places.iter().find(|path| path.exists()) {
            fs::copy(path, usr.join("share/qemu").join(name))?;
        }
    }
    for (name, content) in TOOLS {
        let tool = usr.join("bin").join(name);
        fs::write(&tool, content)?;
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Busybox stands in for all that is not there otherwise.
fn applets(packages: &Packages, usr: &Path) -> Result<(), HostError> {
    let list = succeed(Command::new(packages.program("busybox")?).arg("--list"))?;
    for name in list.lines() {
        let place = usr.join("bin").join(name);
        // The shell is bash: busybox's prefers its own programs to those that were installed.
        let program = if name == "sh" { "bash" } else { "busybox" };
        if !place.exists() {
            symlink(program, place).map_err(failed("make a link"))?;
        }
    }
    Ok(())
}

fn make_image(cache: &Path, usr: &Path) -> Result<(), HostError> {
    let (image, size) = (
        cache.join("usr.img"),
        size_of(usr).map_err(failed("look at the stage"))?,
    );
    if image.exists() {
        fs::remove_file(&image).map_err(failed("remove the old image"))?;
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
        .arg(usr)
        .arg(&image)
        .arg(format!("{}k", size * 11 / 10 / 1024 + 8192))
        .env("PATH", format!("{path}:/usr/sbin:/sbin"));
    succeed(&mut make).map(drop)
}

fn size_of(directory: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let status = entry.metadata()?;
        sum += if status.is_dir() {
            size_of(&entry.path())?
        } else {
            status.len().next_multiple_of(4096) + 1024
        };
    }
    Ok(sum)
}
