//! What is checked before a VM process is started: its program, and room for its memory.

use crate::api::{DiskSpec, LinuxSpec, NetworkSpec, VmSpec};
use crate::machine::Shape;
use crate::state_dir::VmName;
use limosa_pages::ByteCount;
use limosa_vmm::LinuxImage;
use limosa_vmm::config::VmConfig;
use limosa_vmm::config::devices::{DiskConfig, Mac, NetworkConfig};
use std::borrow::Cow;
use std::fs::{self, File};
use std::io;

/// Largest program: micro guests are far smaller, and it has to fit below small memories anyway.
const ELF_BYTES_MAX: u64 = 64 << 20;

/// What a new guest runs.
pub enum Program {
    Micro(Cow<'static, [u8]>),
    Linux(LinuxImage),
}

impl Program {
    /// Reads, or opens, what a specification names.
    pub fn open(spec: &VmSpec) -> Result<Self, String> {
        match (&spec.micro, &spec.linux) {
            (Some(micro), None) => Ok(Self::Micro(match limosa_micro::by_name(micro) {
                Some(elf) => Cow::Borrowed(elf),
                None => Cow::Owned(read_program(micro)?),
            })),
            (None, Some(linux)) => Ok(Self::Linux(LinuxImage {
                kernel: open_file("kernel", &linux.kernel)?,
                initrd: linux
                    .initrd
                    .as_ref()
                    .map(|initrd| open_file("initrd", initrd))
                    .transpose()?,
                cmdline: linux.cmdline.clone(),
            })),
            _ => Err(
                "a guest is either a micro program or a Linux kernel: give one of them".to_owned(),
            ),
        }
    }
}

/// The disks that a specification names.
pub fn disks(linux: &LinuxSpec) -> Vec<DiskConfig> {
    let disk = |disk: &DiskSpec| DiskConfig {
        path: disk.path.clone(),
        read_only: disk.read_only,
        bytes: None,
    };
    linux.disks.iter().map(disk).collect()
}

/// Takes the disks out of a machine that are not here; each in words.
pub fn take_missing_disks(config: &mut VmConfig) -> Vec<String> {
    let is_there = |disk: &DiskConfig| {
        let error = fs::metadata(&disk.path).err();
        error.is_none_or(|error| error.kind() != io::ErrorKind::NotFound)
    };
    let missing = config.disks.extract_if(.., |disk| !is_there(disk));
    let text = |disk: DiskConfig| {
        format!(
            "disk {} is not here: 'limosa migrate --copy-disks' brings along what hosts do not share",
            disk.path
        )
    };
    missing.map(text).collect()
}

/// The networks that it names, each with an address.
pub fn networks(name: &VmName, spec: &VmSpec) -> Result<Vec<NetworkConfig>, String> {
    let networks = spec.networks.iter().enumerate();
    let network = |(number, network): (usize, &NetworkSpec)| {
        let mac = network.mac.as_deref().map(str::parse).transpose()?;
        Ok(NetworkConfig {
            tap: network.tap.clone(),
            mac: mac.unwrap_or_else(|| Mac::of(name.as_str(), number)),
        })
    };
    networks.map(network).collect()
}

/// Opens a file that a kernel is booted with. Not a pipe or a device, which could keep us waiting.
fn open_file(what: &str, path: &str) -> Result<File, String> {
    let cannot = |error| format!("cannot read the {what} {path}: {error}");
    let file = fs::metadata(path).map_err(cannot)?;
    if !file.is_file() {
        return Err(format!("the {what} {path} is no file"));
    }
    File::open(path).map_err(cannot)
}

/// Reads a program that is not built in.
fn read_program(micro: &str) -> Result<Vec<u8>, String> {
    let file = fs::metadata(micro).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound && !micro.contains('/') {
            format!(
                "no micro program {micro:?}: known are writer, idle, compute, kv; or give the path of an ELF file"
            )
        } else {
            format!("cannot read the program {micro}: {error}")
        }
    })?;
    if !file.is_file() || file.len() > ELF_BYTES_MAX {
        return Err(format!(
            "{micro} is no program: expected an ELF file of at most {}",
            ByteCount::new(ELF_BYTES_MAX)
        ));
    }
    fs::read(micro).map_err(|error| format!("cannot read the program {micro}: {error}"))
}

/// Refuses a guest for whose memory this host has no room: better now than when it is touched.
pub fn ensure_memory(shape: Shape) -> Result<(), String> {
    let Ok(meminfo) = fs::read_to_string("/proc/meminfo") else {
        return Ok(());
    };
    let needed = ByteCount::new(shape.memory_bytes);
    let (what, free, advice) = if shape.huge_pages {
        let pages = value(&meminfo, "HugePages_Free").unwrap_or(0);
        (
            "huge pages",
            pages << 21,
            " (vm.nr_hugepages reserves them)",
        )
    } else {
        let Some(kib) = value(&meminfo, "MemAvailable") else {
            return Ok(());
        };
        ("memory", kib << 10, "")
    };
    if needed.get() <= free {
        return Ok(());
    }
    let free = ByteCount::new(free);
    Err(format!(
        "not enough {what}: {needed} needed, {free} free on this host{advice}"
    ))
}

/// The number of a line `name:  number unit`.
fn value(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_are_none_are_refused() {
        let check = |micro: &str, expect: &str| {
            let error = read_program(micro).unwrap_err();
            assert!(error.contains(expect), "{error}");
        };
        check("write", "known are writer, idle, compute, kv");
        check(
            "/nonexistent/program",
            "cannot read the program /nonexistent/program",
        );
        check("/proc", "is no program");
    }

    #[test]
    fn a_guest_that_does_not_fit_is_refused() {
        let shape = Shape {
            memory_bytes: 1 << 60,
            vcpus: 1,
            huge_pages: false,
            dirty_tracker: limosa_os::dirty::TrackerKind::default(),
            cpu: limosa_vmm::cpu::CpuModel::default(),
        };
        let error = ensure_memory(shape).unwrap_err();
        assert!(
            error.starts_with("not enough memory: 1.00 EiB needed"),
            "{error}"
        );
        assert!(
            ensure_memory(Shape {
                memory_bytes: 4096,
                ..shape
            })
            .is_ok()
        );
        let error = ensure_memory(Shape {
            huge_pages: true,
            ..shape
        })
        .unwrap_err();
        assert!(error.starts_with("not enough huge pages"), "{error}");
    }
}
