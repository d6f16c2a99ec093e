//! A guest on a host, as its own reports tell.

use crate::daemon::Daemon;
use crate::wait::{self, PATIENCE};
use limosa_host::api::{
    CommandKind, CpuModel, DiskSpec, GuestReport, LinuxSpec, TrackerKind, VmSpec,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Units of work by which a guest shows that it works: several bursts of a writer.
const WORK_MIN: u64 = 50;
/// A sweep checks hundreds of megabytes a second; a busy machine needs longer.
const SWEEP_MAX: Duration = Duration::from_secs(60);

/// A guest that proves its memory: a writer with 64 MiB, most of them never touched.
pub fn writer(name: &str, args: &str) -> VmSpec {
    VmSpec {
        name: name.to_owned(),
        micro: Some("writer".to_owned()),
        linux: None,
        args: args.to_owned(),
        memory_bytes: 64 << 20,
        vcpus: 1,
        huge_pages: false,
        dirty_tracker: TrackerKind::default(),
        cpu: CpuModel::default(),
        networks: Vec::new(),
        observer: None,
    }
}

/// What a PC does without a kernel: it prints what is typed. Such a guest runs where KVM interprets kernels.
const ECHO: [u8; 23] = [
    0x66, 0xba, 0xfd, 0x03, // again: mov dx,3fdh
    0xec, 0xa8, 0x01, // in al,dx; test al,1
    0x74, 0xf7, // je again
    0x66, 0xba, 0xf8, 0x03, 0xec, // mov dx,3f8h; in al,dx
    0xee, // out dx,al
    0xeb, 0xef, // jmp again
    0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, // hlt
];

/// Writes the least that boots as a kernel does; where it is.
pub fn write_echo_kernel(directory: &Path) -> PathBuf {
    let mut bytes = vec![0; 1024 + 0x200];
    bytes[0x1f1] = 1;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x22c..0x230].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[0x236] = 1;
    bytes.extend(ECHO);
    let path = directory.join("echo");
    fs::write(&path, bytes).expect("a kernel can be written");
    path
}

/// A guest that echoes, with a disk.
pub fn echo(name: &str, kernel: &Path, disk: &Path, read_only: bool) -> VmSpec {
    VmSpec {
        micro: None,
        linux: Some(LinuxSpec {
            kernel: kernel.display().to_string(),
            initrd: None,
            cmdline: String::new(),
            disks: vec![DiskSpec {
                path: disk.display().to_string(),
                read_only,
            }],
        }),
        ..writer(name, "")
    }
}

/// Bytes a second that a guest fills at least, even on a busy machine.
const FILL_RATE: u64 = 24 << 20;

/// Starts a guest and waits until all its vCPUs work, which they do when their memory is filled.
///
/// # Panics
/// If they do not.
#[track_caller]
pub fn boot(daemon: &Daemon, spec: &VmSpec) {
    daemon.client().run(spec).expect("a guest can be started");
    let limit = PATIENCE + Duration::from_secs(spec.memory_bytes / FILL_RATE);
    let works = wait::poll(limit, || {
        let report = daemon.client().guest(&spec.name).ok()?;
        let is_complete = report.vcpus.len() == usize::from(spec.vcpus);
        let works = is_complete && report.vcpus.iter().all(|vcpu| vcpu.state == "ready");
        works.then_some(())
    });
    assert!(works.is_some(), "waited {limit:?} in vain: all vCPUs work");
}

/// Work over all vCPUs, or nothing if there is no such guest.
pub fn work(daemon: &Daemon, name: &str) -> Option<u64> {
    let report = daemon.client().guest(name).ok()?;
    Some(report.vcpus.iter().map(|vcpu| vcpu.work).sum())
}

/// Waits until the guest has done some more work.
///
/// # Panics
/// If it does none.
#[track_caller]
pub fn assert_works(daemon: &Daemon, name: &str) {
    let before = wait::until("the guest reports", || work(daemon, name));
    wait::until_true("the guest works", || {
        work(daemon, name).is_some_and(|now| now >= before + WORK_MIN)
    });
}

/// Gives a command and waits until every vCPU has carried it out.
///
/// # Panics
/// If one does not.
#[track_caller]
pub fn command(daemon: &Daemon, name: &str, kind: CommandKind) -> GuestReport {
    let before = daemon.client().guest(name).expect("a guest that reports");
    daemon
        .client()
        .command(name, kind)
        .expect("a guest that listens");
    let limit = if kind == CommandKind::Sweep {
        SWEEP_MAX
    } else {
        PATIENCE
    };
    let done = wait::poll(limit, || {
        let report = daemon.client().guest(name).expect("a guest that reports");
        let mut pairs = report.vcpus.iter().zip(&before.vcpus);
        pairs
            .all(|(now, then)| now.command_done != then.command_done)
            .then_some(report)
    });
    done.unwrap_or_else(|| panic!("{name} did not carry out {kind:?}"))
}

/// Has the guest check all of its memory, and looks at every count of errors. Gives the report.
///
/// # Panics
/// If a check has ever failed, or nothing was checked.
#[track_caller]
pub fn assert_whole(daemon: &Daemon, name: &str) -> GuestReport {
    let report = command(daemon, name, CommandKind::Sweep);
    for vcpu in &report.vcpus {
        let errors = (vcpu.errors, vcpu.sweep_errors, vcpu.tsc_backwards);
        assert_eq!(errors, (0, 0, 0), "vCPU {} of {name}: {vcpu:?}", vcpu.vcpu);
        assert!(
            vcpu.sweep_pages > 0,
            "vCPU {} of {name} swept nothing",
            vcpu.vcpu
        );
        assert_eq!(vcpu.first_error, None, "vCPU {} of {name}", vcpu.vcpu);
    }
    report
}

/// The longest stall of any vCPU since stalls were cleared, in milliseconds.
pub fn longest_stall_ms(report: &GuestReport) -> f64 {
    let ticks = report
        .vcpus
        .iter()
        .flat_map(|vcpu| &vcpu.long_stalls)
        .map(|stall| stall.length_tsc);
    // A stall lasts far less than 2^53 ticks.
    ticks.max().unwrap_or(0) as f64 / report.tsc_khz as f64
}
