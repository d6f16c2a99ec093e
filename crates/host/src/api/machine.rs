//! Virtual machines as the control interface tells them.

use super::ConsoleLine;
use limosa_os::dirty::TrackerKind;
use limosa_vmm::cpu::CpuModel;
use limosa_vmm::process::console_socket;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use utoipa::ToSchema;

/// A virtual machine to make and start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Letters, digits, `-`, `_` and `.`, at most 64, beginning with a letter or digit; unique on a host.
    #[schema(example = "web")]
    pub name: String,
    /// The micro guest: `writer`, `idle`, `compute`, `kv`, or the path of an ELF file on the daemon's host.
    /// Either this or `linux` has to be there.
    #[serde(default)]
    #[schema(example = "writer")]
    pub micro: Option<String>,
    /// The stock kernel to boot.
    #[serde(default)]
    pub linux: Option<LinuxSpec>,
    /// Arguments of the micro guest, as text.
    #[serde(default)]
    #[schema(example = "ws=64M rate=50000")]
    pub args: String,
    /// Size of the guest's memory.
    #[schema(example = 1_073_741_824u64)]
    pub memory_bytes: u64,
    /// 1 to 8, with a Linux kernel to 16.
    pub vcpus: u8,
    /// Back the memory with 2 MiB pages, which the host must have reserved.
    #[serde(default)]
    pub huge_pages: bool,
    /// Who notices which pages it writes: `bitmap`, `ring` or `write-protect`; for good, also on the
    /// hosts that it moves to.
    #[serde(default)]
    #[schema(value_type = String, example = "bitmap")]
    pub dirty_tracker: TrackerKind,
    /// What processor the guest sees: `host`, all that this host offers, or `x86-64-v2`, `x86-64-v3`,
    /// `x86-64-v4`, which unlike hosts can exchange.
    #[serde(default)]
    #[schema(value_type = String, example = "host")]
    pub cpu: CpuModel,
    /// Its network interfaces, at most seven.
    #[serde(default)]
    pub networks: Vec<NetworkSpec>,
    /// Where the VM process sends a datagram at each heartbeat of the guest: `IP:PORT` of a UDP
    /// socket on this machine.
    #[serde(default)]
    pub observer: Option<String>,
}

/// A stock Linux kernel to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LinuxSpec {
    /// Path of a bzImage on the daemon's host.
    #[schema(example = "/boot/vmlinuz")]
    pub kernel: String,
    /// Path of its initial file system.
    #[serde(default)]
    pub initrd: Option<String>,
    /// What the kernel is told; at most 2047 bytes.
    #[serde(default)]
    #[schema(example = "console=ttyS0 root=/dev/vda")]
    pub cmdline: String,
    /// Its disks: `/dev/vda`, `/dev/vdb` and so on. It has at most seven disks and network interfaces
    /// together.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
}

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// A raw file or a block device, by its absolute path; the hosts that the guest moves to have to see
    /// the same one there.
    #[schema(example = "/srv/images/web.raw")]
    pub path: String,
    /// The guest only reads it; several guests may.
    #[serde(default)]
    pub read_only: bool,
}

/// A network interface of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Name of the tap device behind it; the hosts that the guest moves to need one of the same name.
    #[schema(example = "tap0")]
    pub tap: String,
    /// Its address; made from the name of the virtual machine if it is not given.
    #[serde(default)]
    #[schema(example = "52:54:00:12:34:56")]
    pub mac: Option<String>,
}

/// What a virtual machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The guest runs here.
    Running,
    /// The guest is paused here.
    Paused,
    /// A migration moves it away; see `migration`.
    Migrating,
    /// It is being received from another host and does not run here yet.
    Arriving,
    /// It was handed over, and the target has not said yet that it runs there. Heals by itself.
    Unresolved,
    /// Its process does not answer; `phase` says more.
    Silent,
    /// It ended by itself; `ended` says how. Listed until it is removed by a stop.
    Ended,
}

/// A virtual machine of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: VmState,
    /// Who may run it, in words: the record that its process holds.
    #[schema(example = "running")]
    pub phase: String,
    /// Process id of the VM process; 0 once it ended.
    pub pid: u32,
    /// Size of its memory.
    pub memory_bytes: u64,
    /// Number of its vCPUs.
    pub vcpus: u8,
    /// Whether 2 MiB pages back the memory.
    pub huge_pages: bool,
    /// Who notices which pages it writes: `bitmap`, `ring` or `write-protect`.
    #[schema(value_type = String, example = "bitmap")]
    pub dirty_tracker: TrackerKind,
    /// What follows from that, in a line.
    #[schema(
        example = "a harvest reads a bit for each page; which vCPU writes how much is not known"
    )]
    pub dirty_tracker_means: String,
    /// What processor the guest sees.
    #[schema(value_type = String, example = "host")]
    pub cpu: CpuModel,
    /// Units of work that the guest did over all vCPUs, for guests that report it.
    pub work: Option<u64>,
    /// Checks that failed inside the guest over all vCPUs, for guests that report it.
    pub errors: Option<u64>,
    /// Pages that the guest, which runs here, misses: only its source has them.
    pub missing_pages: u64,
    /// In words, while pages are missing: how many, and where they are.
    #[schema(
        example = "running with residual dependency: 512 pages (2.00 MiB) are still at its source, 192.0.2.7"
    )]
    pub residual_dependency: Option<String>,
    /// What it has given up of its memory; not told while a migration holds it, and `null` for guests
    /// that have no balloon.
    pub balloon: Option<BalloonInfo>,
    /// The migration that moves it away now, or moved it here.
    pub migration: Option<String>,
    /// How it ended, once it has.
    pub ended: Option<String>,
    /// Socket of the VM process.
    pub socket: String,
    /// What it printed last is here.
    pub log: String,
}

impl VmInfo {
    /// Where that line of its guest's console is served, if it has one: bytes out and in.
    pub fn console_socket(&self, line: ConsoleLine) -> PathBuf {
        console_socket(Path::new(&self.socket), line)
    }
}

/// What a guest has given up of its memory, and what its driver told last of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonInfo {
    /// Whether the balloon's driver is there.
    pub has_driver: bool,
    /// How much its balloon is to hold.
    pub target_bytes: u64,
    /// How much it holds.
    pub held_bytes: u64,
    /// How much was taken out of its memory since it is on this host, what it reported as free
    /// included.
    pub reclaimed_bytes: u64,
    /// The guest's memory as it sees it.
    pub guest_total_bytes: Option<u64>,
    /// What of it is used for nothing.
    pub guest_free_bytes: Option<u64>,
    /// What of it programs could have: free, and caches that can go.
    pub guest_available_bytes: Option<u64>,
}

/// How much a guest is to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonBody {
    /// So much of its memory its balloon is to hold; less than all of it.
    pub target_bytes: u64,
}

/// A part of the state that moves with a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SectionInfo {
    /// What it is.
    pub name: String,
    /// Which one, where there are several.
    pub instance: u16,
    /// Version of its layout.
    pub version: u16,
    /// Its size.
    pub bytes: u64,
}

/// What the vCPUs of a micro guest say about themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestReport {
    /// Ticks of the guest's time stamp counter a millisecond; 0 if it is no micro guest.
    pub tsc_khz: u64,
    /// One report for each vCPU that has started, in order.
    pub vcpus: Vec<VcpuReport>,
}

/// What one vCPU of a micro guest says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VcpuReport {
    /// Its index.
    pub vcpu: u32,
    /// `boot`, `ready`, `done` or `failed`.
    pub state: String,
    /// Time stamp of the report.
    pub beat_tsc: u64,
    /// Pages written, units done, checks done.
    pub work: u64,
    /// Operations that only verified.
    pub reads: u64,
    /// Checks that failed.
    pub errors: u64,
    /// Sequence number of the last command that was carried out.
    pub command_done: u64,
    /// Sequence number of the last full sweep that ended.
    pub sweep_id: u64,
    /// Pages that this sweep looked at.
    pub sweep_pages: u64,
    /// Errors that it found.
    pub sweep_errors: u64,
    /// How often the time stamp counter went backwards.
    pub tsc_backwards: u64,
    /// Stalls since the start.
    pub stall_total: u64,
    /// The most recent stalls, oldest first.
    pub stalls: Vec<Stall>,
    /// The longest stalls since they were cleared, longest first.
    pub long_stalls: Vec<Stall>,
    /// All stalls since they were cleared, grouped by about the same length, shortest first.
    pub stall_groups: Vec<StallGroup>,
    /// The first check that failed.
    pub first_error: Option<FirstError>,
}

/// A time in which a vCPU that wanted to run did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stall {
    /// Last time stamp before the gap.
    pub start_tsc: u64,
    /// Length of the gap in ticks of the time stamp counter.
    pub length_tsc: u64,
}

/// Stalls of about the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StallGroup {
    /// How many; at least one.
    pub count: u64,
    /// How long they were together, in ticks of the time stamp counter.
    pub ticks: u64,
}

/// A check that failed inside a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FirstError {
    /// Number of the page.
    pub page: u64,
    /// What had to be there.
    pub expected: u64,
    /// What was there.
    pub found: u64,
    /// Which check it was.
    pub kind: u64,
}

/// A command for a micro guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandBody {
    /// What to do.
    pub kind: CommandKind,
}

/// What a micro guest can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CommandKind {
    /// Check all memory that the guest owns, once.
    Sweep,
    /// Forget the longest stalls, and begin anew to group them by length.
    ClearStalls,
    /// Stop working and end.
    Finish,
}
