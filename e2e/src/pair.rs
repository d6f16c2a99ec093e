//! Two hosts and a guest that is moved between them.

use crate::beats::Beats;
use crate::daemon::{Daemon, own_loopback};
use crate::guest;
use crate::hold::Hold;
use crate::points::Manner;
use crate::wait::{self, PATIENCE};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::{LimitsPatch, MigrateBody, MigrationInfo, Report, VmSpec, VmState};
use limosa_host::certificates::{make_authority, make_host};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Name of the guest where there is only one.
pub const VM: &str = "web";

/// Longest migration of any test.
const MIGRATION_MAX: Duration = Duration::from_secs(90);

/// Two daemons, `a` at first with the guest, and ears for its heartbeats.
#[derive(Debug)]
pub struct Pair {
    /// Where the guest begins.
    pub a: Daemon,
    /// Where it is moved to first.
    pub b: Daemon,
    /// Who runs the guest named [`VM`].
    pub beats: Beats,
    /// Gone with the daemons.
    _certificates: Option<Certificates>,
}

impl Pair {
    /// Starts both daemons.
    pub fn start() -> Self {
        Self {
            a: Daemon::start(),
            b: Daemon::start(),
            beats: Beats::listen(),
            _certificates: None,
        }
    }

    /// Starts both daemons; the first migration from `a` to `b` waits at `hold`.
    pub fn start_held(hold: &Hold) -> Self {
        Self::start_so(Some(hold), None)
    }

    /// Starts both daemons, which show certificates to each other; if there is a hold, the first
    /// migration from `a` to `b` waits there.
    pub fn start_encrypted(hold: Option<&Hold>) -> Self {
        Self::start_so(hold, Some(Certificates::make()))
    }

    /// Starts both daemons, the second one with this directory where the first one has its disks.
    pub fn start_apart(disks_of_b: &Path) -> Self {
        Self {
            a: Daemon::start(),
            b: Daemon::start_with_disks(disks_of_b),
            beats: Beats::listen(),
            _certificates: None,
        }
    }

    fn start_so(hold: Option<&Hold>, certificates: Option<Certificates>) -> Self {
        let (at_a, at_b) = match hold {
            Some(hold) if hold.is_at_source() => (Some(hold), None),
            hold => (None, hold),
        };
        let [of_a, of_b] = [0, 1].map(|index| {
            let certificates = certificates.as_ref()?;
            Some(&*certificates.of_hosts[index])
        });
        Self {
            a: Daemon::start_so(at_a, of_a),
            b: Daemon::start_so(at_b, of_b),
            beats: Beats::listen(),
            _certificates: certificates,
        }
    }

    /// Starts the guest at `a`, with its heartbeats heard.
    ///
    /// # Panics
    /// If it does not work.
    #[track_caller]
    pub fn boot(&self, mut spec: VmSpec) {
        spec.observer = Some(self.beats.address().to_string());
        guest::boot(&self.a, &spec);
    }

    /// Starts the guest of most manners: 8 MiB that it rewrites at a moderate rate.
    ///
    /// # Panics
    /// If it does not work.
    #[track_caller]
    pub fn boot_small(&self) {
        self.boot(Manner::Of(Mode::PreCopy).spec());
    }
}

/// An authority, and two hosts that it vouches for.
#[derive(Debug)]
pub struct Certificates {
    /// For `limosa host --tls`.
    pub of_hosts: [PathBuf; 2],
    _directory: TempDir,
}

impl Certificates {
    /// Makes them.
    ///
    /// # Panics
    /// If they cannot be made.
    pub fn make() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let authority = directory.path().join("ca");
        make_authority(&authority, 1).expect("an authority");
        let of_hosts = ["a", "b"].map(|name| {
            let names = [name.to_owned(), own_loopback().to_string()];
            let host = directory.path().join(name);
            make_host(&authority, &host, &names, 1).expect("a host");
            host
        });
        Self {
            of_hosts,
            _directory: directory,
        }
    }
}

/// What is asked for when nothing special is tested.
pub fn body(to: &Daemon, mode: Mode) -> MigrateBody {
    let mut body = MigrateBody::new(to.peer_address(), mode);
    body.verify = true;
    body
}

/// Starts to move [`VM`] and gives the migration's id.
///
/// # Panics
/// If it is refused.
#[track_caller]
pub fn begin(from: &Daemon, to: &Daemon, mode: Mode) -> String {
    from.client()
        .migrate(VM, &body(to, mode))
        .expect("a migration that is accepted")
}

/// Starts to move [`VM`] in this manner to the daemon at `address` and gives the migration's id.
///
/// # Panics
/// If it is refused.
#[track_caller]
pub fn begin_to(from: &Daemon, address: &str, manner: Manner) -> String {
    from.client()
        .migrate(VM, &manner.body(address))
        .expect("a migration that is accepted")
}

/// Waits for the end of a migration. A guest that runs on demand is drained, since nothing else ends
/// that.
///
/// # Panics
/// If it does not end.
#[track_caller]
pub fn end(from: &Daemon, id: &str) -> Report {
    let give_up = Instant::now() + MIGRATION_MAX;
    let mut is_on_demand = true;
    loop {
        // Short while it may have to be drained, which the daemon tells to nobody who waits.
        let wait = if is_on_demand { 20 } else { 5_000 };
        let info = from
            .client()
            .wait(id, Duration::from_millis(wait))
            .expect("a daemon that answers");
        if info.stage == Stage::Finished {
            return info.report;
        }
        is_on_demand = info.mode == Mode::Demand;
        if info.stage == Stage::Serving && is_on_demand {
            drain(from, id);
        }
        assert!(
            Instant::now() < give_up,
            "a migration does not end: {info:?}"
        );
    }
}

/// Has all pages sent that a guest misses. Whether one that has them all by now is told so is its
/// business.
pub fn drain(from: &Daemon, id: &str) {
    let patch = LimitsPatch {
        mode: Some(Mode::PostCopy),
        ..LimitsPatch::default()
    };
    if let Err(error) = from.client().set(id, &patch) {
        println!("nothing to drain: {error}");
    }
}

/// Waits until a migration is at one of `stages`.
///
/// # Panics
/// If it does not come there.
#[track_caller]
pub fn until_stage(from: &Daemon, id: &str, stages: &[Stage]) -> MigrationInfo {
    wait::until(&format!("the migration is at {stages:?}"), || {
        let info = from.client().migration(id).ok()?;
        stages.contains(&info.stage).then_some(info)
    })
}

/// Moves a guest, checks what the report says, and has the guest check its memory.
///
/// # Panics
/// If anything is not as it should be.
#[track_caller]
pub fn move_whole(name: &str, from: &Daemon, to: &Daemon, mode: Mode) -> Report {
    move_with(name, from, to, &body(to, mode))
}

/// The same with whatever is asked for.
///
/// # Panics
/// If anything is not as it should be.
#[track_caller]
pub fn move_with(name: &str, from: &Daemon, to: &Daemon, body: &MigrateBody) -> Report {
    let id = from
        .client()
        .migrate(name, body)
        .expect("a migration that is accepted");
    let report = end(from, &id);
    assert_completed(&report);
    assert_eq!(report.digest_equal, Some(true), "{report:?}");
    assert_is_at(name, to, from);
    report
}

/// Moves [`VM`] in this manner, and checks the same.
///
/// # Panics
/// If anything is not as it should be.
#[track_caller]
pub fn move_so(from: &Daemon, to: &Daemon, manner: Manner) -> Report {
    move_with(VM, from, to, &manner.body(to.peer_address()))
}

/// The migration was carried out, and its report is complete.
///
/// # Panics
/// If it was not.
#[track_caller]
pub fn assert_completed(report: &Report) {
    assert_eq!(report.outcome.as_deref(), Some("completed"), "{report:?}");
    let downtime = report
        .downtime_ms
        .expect("a completed migration has a downtime");
    let parts = downtime.pause
        + downtime.harvest
        + downtime.save
        + downtime.transfer
        + downtime.load
        + downtime.commit
        + downtime.start;
    assert!((parts - downtime.total).abs() < 0.001, "{downtime:?}");
    assert!(report.switch_ns.is_some(), "{report:?}");
    assert!(report.pause_reason.is_some(), "{report:?}");
    assert!(!report.rounds.is_empty(), "{report:?}");
}

/// The migration did not happen, and says why in one line.
///
/// # Panics
/// If it is otherwise.
#[track_caller]
pub fn assert_failed(report: &Report) -> &str {
    assert_eq!(report.outcome.as_deref(), Some("failed"), "{report:?}");
    let reason = report.reason.as_deref().expect("a failure has a reason");
    assert!(reason.len() > 10, "{reason:?}");
    assert!(!reason.contains(['\n', '\r']), "{reason:?}");
    reason
}

/// The guest runs on `here`, works, and its memory is whole; on `there` nothing of it is left.
///
/// # Panics
/// If it is otherwise.
#[track_caller]
pub fn assert_is_at(name: &str, here: &Daemon, there: &Daemon) {
    assert_gone(name, there);
    wait::until_true("the guest is at home", || {
        let vm = here.client().vm(name);
        // The phase ends with the source's last word, a moment after the guest runs.
        vm.is_ok_and(|vm| vm.state == VmState::Running && vm.phase == "running")
    });
    guest::assert_works(here, name);
    guest::assert_whole(here, name);
}

/// Nothing of the guest is left on a daemon, or soon will be: no machine, no process, no socket, no
/// migration, no thread that carries one.
///
/// # Panics
/// If something stays.
#[track_caller]
pub fn assert_gone(name: &str, daemon: &Daemon) {
    let mut seen = String::new();
    let is_gone = wait::poll(PATIENCE, || {
        let listed = daemon.client().vms().expect("a daemon that answers");
        let others = listed
            .iter()
            .filter(|vm| vm.name != name && vm.pid != 0)
            .count();
        let mine = listed.iter().find(|vm| vm.name == name);
        let incoming = daemon.client().incoming().expect("a daemon that answers");
        let processes = daemon.vm_processes();
        let threads = daemon.carrying_threads();
        let sockets = daemon.vm_sockets();
        let is_gone = mine.is_none()
            && incoming.is_empty()
            && processes.len() == others
            && threads.is_empty()
            && sockets.len() == others;
        seen = format!(
            "listed {mine:?}, incoming {incoming:?}, processes {processes:?}, threads {threads:?}, \
             sockets {sockets:?}"
        );
        is_gone.then_some(())
    });
    assert!(is_gone.is_some(), "something of {name} is left: {seen}");
}

/// After a migration to `b` that did not happen: the guest runs on at `a`, there is nothing of it
/// at `b`, no other process has run it, and the next migration works.
///
/// # Panics
/// If it is otherwise.
#[track_caller]
pub fn assert_back_home(pair: &Pair, manner: Manner) {
    assert_is_at(VM, &pair.a, &pair.b);
    let turns = pair.beats.assert_one_at_a_time();
    assert_eq!(
        turns.len(),
        1,
        "another process than the first has run the guest: {turns:#?}"
    );
    move_so(&pair.a, &pair.b, manner);
    pair.beats.assert_one_at_a_time();
}
