//! The bodies and answers of the daemon's control interface, as they stand in JSON.
//!
//! Plain data that both the daemon and its clients use; `docs/openapi.json` is made from it. Units
//! are part of the name: sizes are whole bytes (`*_bytes`), times are milliseconds with a fraction
//! (`*_ms`), rates are a second. A field that is not known yet is `null`, never a made-up zero.
//!
//! Deliberately absent: behaviour. Conversions from what the engine reports are in
//! [`migration`], everything else is filled in where it is known.

mod machine;
mod migration;
mod preflight;
mod throttle;

pub use limosa_carrier::{Compression, PushOrder};
pub use limosa_engine::deferral::Deferral;
pub use limosa_engine::throttle::Throttling;
pub use limosa_os::dirty::TrackerKind;
pub use limosa_vmm::ConsoleLine;
pub use limosa_vmm::cpu::CpuModel;
pub use machine::{
    BalloonBody, BalloonInfo, CommandBody, CommandKind, DiskSpec, FirstError, GuestReport,
    LinuxSpec, NetworkSpec, SectionInfo, Stall, StallGroup, VcpuReport, VmInfo, VmSpec, VmState,
};
pub use migration::{
    Downtime, FaultLatency, IncomingInfo, LimitsInfo, LimitsPatch, MigrateAnswer, MigrateBody,
    MigrationInfo, ModeChange, Moments, Report, ResolveBody, ResolveWord, Round, parse_id,
};
pub use preflight::{DirtyPoint, EstimateInfo, PreflightInfo};
pub use throttle::{ThrottleInfo, ThrottleKind, ThrottleReport};

use serde::{Deserialize, Serialize};
use std::time::Duration;
use utoipa::ToSchema;

/// What the daemon says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    /// Version of the program.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Where other daemons reach this one.
    #[schema(example = "127.0.0.1:7070")]
    pub peer_address: String,
    /// Every connection to other daemons is encrypted, and they have to show certificates.
    pub encrypted: bool,
    /// Identifies the running kernel; hosts with equal ids share one clock.
    pub boot_id: String,
    /// Directory of sockets, logs, ledger and journals.
    pub state_dir: String,
    /// Open file descriptors of the daemon.
    pub open_fds: u64,
    /// Threads of the daemon.
    pub threads: u64,
    /// Anonymous memory of the daemon. Guest memory is not in it.
    pub anonymous_bytes: u64,
    /// Virtual machines on this host, ended ones included.
    pub vms: u64,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// One line that says what happened and what to do.
    pub error: String,
    /// What kind of refusal it is, for programs.
    pub kind: ErrorKind,
}

/// Kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request itself is wrong.
    BadRequest,
    /// What it names does not exist.
    NotFound,
    /// It does not fit what is going on now.
    Conflict,
    /// The host or the virtual machine could not do it.
    Failed,
}

/// A duration as the interface tells it.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Reads a duration that a client sent.
///
/// # Errors
/// One line: negative, not a number, or beyond a year.
pub fn duration(field: &str, milliseconds: f64) -> Result<Duration, String> {
    /// Beyond this a limit is a mistake of units.
    const YEAR_MS: f64 = 366.0 * 86_400_000.0;
    if (0.0..=YEAR_MS).contains(&milliseconds) {
        Ok(Duration::from_secs_f64(milliseconds / 1000.0))
    } else {
        Err(format!(
            "{field} of {milliseconds} ms is out of range: give 0 to a year"
        ))
    }
}
