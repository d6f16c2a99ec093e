//! Disks that are copied along to a host that does not have them. Both hosts are on one machine, so the second
//! one sees a directory of its own where the first one has its disks.
//!
//! That a disk is copied whole while its guest writes it is shown by a stock kernel on emulated hosts (`linux`).

use limosa_e2e::daemon::lent_disks;
use limosa_e2e::pair::{assert_completed, body, drain, end, until_stage};
use limosa_e2e::{Pair, VM, guest, has_kvm, wait};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::{MigrateBody, Report, VmState};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Its last page is short.
const DISK_BYTES: u64 = (8 << 20) + 512;

/// Two hosts, and a guest on the first one with a disk that the second one does not have.
struct Bed {
    pair: Pair,
    /// The disk on the first host, and where it would be on the second one.
    disks: [PathBuf; 2],
    content: Vec<u8>,
    _small: Option<Small>,
    _places: [tempfile::TempDir; 2],
}

/// Room for what the disk holds and not much more.
const SMALL_BYTES: usize = 1 << 20;

/// A file system with that much room.
struct Small(PathBuf);

impl Small {
    fn mount(place: &Path) -> Self {
        let small = Self(place.to_owned());
        let size = format!("size={SMALL_BYTES}");
        small.call("mount", &["-t", "tmpfs", "-o", &size, "small"]);
        small
    }

    fn call(&self, program: &str, arguments: &[&str]) {
        let status = Command::new(program).args(arguments).arg(&self.0).status();
        assert!(status.expect("it can be started").success(), "{program}");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        self.call("umount", &["--lazy"]);
    }
}

impl Bed {
    /// `None` where there is no KVM.
    fn new() -> Option<Self> {
        Self::made(false)
    }

    /// The same, and the second host has its disks where there is room for little more than this one.
    fn on_small_disk() -> Option<Self> {
        Self::made(true)
    }

    fn made(is_small: bool) -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        let of_a = tempfile::tempdir_in(lent_disks()).expect("a directory");
        let of_b = tempfile::tempdir().expect("a directory");
        let small = is_small.then(|| Small::mount(of_b.path()));
        let name = of_a.path().file_name().expect("it has a name");
        let same = of_b.path().join(name);
        fs::create_dir(&same).expect("a directory can be made");
        let disks = [of_a.path(), &same].map(|place| place.join("disk.raw"));
        let content = write_disk(&disks[0]);
        let pair = Pair::start_apart(of_b.path());
        let kernel = guest::write_echo_kernel(of_a.path());
        let spec = guest::echo(VM, &kernel, &disks[0], false);
        pair.a.client().run(&spec).expect("it runs");
        Some(Self {
            pair,
            disks,
            content,
            _small: small,
            _places: [of_a, of_b],
        })
    }

    fn body(&self, mode: Mode, to_b: bool) -> MigrateBody {
        let to = if to_b { &self.pair.b } else { &self.pair.a };
        let mut body = body(to, mode);
        body.copy_disks = true;
        body
    }

    /// Moves the guest to one of the hosts.
    fn move_to(&self, mode: Mode, to_b: bool) -> Report {
        let Pair { a, b, .. } = &self.pair;
        let from = if to_b { a } else { b };
        let id = from.client().migrate(VM, &self.body(mode, to_b));
        end(from, &id.expect("a migration that is accepted"))
    }

    fn move_whole(&self, mode: Mode, to_b: bool) {
        let report = self.move_to(mode, to_b);
        assert_completed(&report);
        assert_eq!(report.digest_equal, Some(true), "{report:?}");
        let copied = &self.disks[usize::from(to_b)];
        assert!(
            fs::read(copied).expect("it was made") == self.content,
            "{mode}"
        );
        let status = fs::metadata(copied).expect("it is there");
        // What was never written takes no room there either.
        assert!(status.blocks() * 512 < DISK_BYTES / 2, "{status:?}");
        assert_eq!(status.mode() & 0o777, 0o600);
    }

    /// The guest runs at the first host, and nothing of its disk is at the second one.
    fn check_at_home(&self) {
        let info = self.pair.a.client().vm(VM).expect("it is there");
        assert_eq!(info.phase, "running", "{info:?}");
        assert!(!self.disks[1].exists(), "nothing is left of the disk");
    }
}

/// A disk with some content, most of which is a hole.
fn write_disk(path: &Path) -> Vec<u8> {
    let file = File::create(path).expect("a disk can be made");
    file.set_len(DISK_BYTES).expect("it can be sized");
    let mut seed = 1_u64;
    for (offset, len) in [(0, 4096), (1 << 20, 600_000), (DISK_BYTES - 512, 512)] {
        let part: Vec<u8> = (0..len)
            .map(|_| {
                // Nothing that could be compressed.
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 56) as u8
            })
            .collect();
        file.write_all_at(&part, offset).expect("it can be written");
    }
    // Zeros that were written are as good as a hole.
    file.write_all_at(&[0; 8192], 4 << 20)
        .expect("it can be written");
    fs::read(path).expect("it can be read")
}

#[test]
fn disks_go_along_to_a_host_that_lacks_them() {
    let Some(bed) = Bed::new() else { return };
    bed.move_whole(Mode::PreCopy, true);
    let at_home = fs::read(&bed.disks[0]).expect("it stays");
    assert!(at_home == bed.content, "what was left behind is as it was");
    // There is one at the place to which it would come back.
    let report = bed.move_to(Mode::StopAndCopy, false);
    let text = format!("{report:?}");
    assert!(text.contains("disk.raw is there already"), "{text}");
    fs::remove_file(&bed.disks[0]).expect("it can be removed");
    bed.move_whole(Mode::StopAndCopy, false);
    let modes = [Mode::PostCopy, Mode::Hybrid, Mode::Demand, Mode::Auto];
    for (mode, to_b) in modes.into_iter().zip([true, false, true, false]) {
        fs::remove_file(&bed.disks[usize::from(to_b)]).expect("it can be removed");
        bed.move_whole(mode, to_b);
    }
}

#[test]
fn what_is_in_the_way_is_said_before() {
    let Some(bed) = Bed::new() else { return };
    let client = bed.pair.a.client();
    let answer = client
        .preflight(VM, &bed.body(Mode::PreCopy, true))
        .expect("an answer");
    assert_eq!(answer.differences, Vec::<String>::new());
    bed.check_at_home();
    fs::write(&bed.disks[1], b"precious").expect("it can be written");
    let answer = client
        .preflight(VM, &bed.body(Mode::PreCopy, true))
        .expect("an answer");
    assert_eq!(answer.differences.len(), 1, "{:?}", answer.differences);
    let left = fs::read(&bed.disks[1]).expect("it is there");
    assert_eq!(left, b"precious");
}

/// However a migration ends before its commit, what was made for it goes.
#[test]
fn a_disk_whose_guest_does_not_arrive_goes() {
    let Some(mut bed) = Bed::new() else { return };
    let begin = |bed: &Bed| {
        let mut body = bed.body(Mode::PreCopy, true);
        // Several seconds for what the disk holds.
        body.link = Some(100_000);
        body.compress = serde_json::from_str("\"off\"").expect("a way to code");
        let a = &bed.pair.a;
        let id = a.client().migrate(VM, &body).expect("it is accepted");
        until_stage(a, &id, &[Stage::Copying]);
        wait::until("the disk is made", || bed.disks[1].exists().then_some(()));
        id
    };
    let id = begin(&bed);
    bed.pair.a.client().abort(&id).expect("in time");
    assert_eq!(end(&bed.pair.a, &id).outcome.as_deref(), Some("aborted"));
    wait::until("the disk is removed", || {
        (!bed.disks[1].exists()).then_some(())
    });
    bed.check_at_home();

    let id = begin(&bed);
    bed.pair.b.kill();
    assert_eq!(end(&bed.pair.a, &id).outcome.as_deref(), Some("failed"));
    assert!(bed.disks[1].exists(), "nobody is there to remove it");
    bed.pair.b.restart();
    bed.check_at_home();
    bed.move_whole(Mode::PreCopy, true);
}

/// What a disk lacks is written down beside its guest, and comes whoever dies meanwhile.
#[test]
fn pages_of_a_disk_come_although_daemons_die() {
    let Some(mut bed) = Bed::new() else { return };
    let mut body = bed.body(Mode::Demand, true);
    body.link = Some(100_000);
    let id = bed.pair.a.client().migrate(VM, &body);
    let id = id.expect("a migration that is accepted");
    until_stage(&bed.pair.a, &id, &[Stage::Serving]);
    bed.pair.b.kill();
    bed.pair.b.restart();
    until_stage(&bed.pair.a, &id, &[Stage::Serving]);
    bed.pair.a.kill();
    bed.pair.a.restart();
    let missing = || {
        let incoming = bed.pair.b.client().incoming().expect("it answers");
        incoming.iter().map(|one| one.missing_pages).sum::<u64>()
    };
    until_stage(&bed.pair.a, &id, &[Stage::Serving]);
    assert!(missing() >= DISK_BYTES / 4096, "{}", missing());
    drain(&bed.pair.a, &id);
    // By address: in the midst of what the disk holds.
    wait::until("some of it has come", || {
        (missing() < DISK_BYTES / 4096 - 300).then_some(())
    });
    assert!(missing() > 0, "and not all of it");
    bed.pair.b.kill();
    bed.pair.b.restart();
    bed.pair.a.kill();
    bed.pair.a.restart();
    until_stage(&bed.pair.a, &id, &[Stage::Serving, Stage::Finished]);
    drain(&bed.pair.a, &id);
    // Of the pause nobody knows any more.
    let outcome = end(&bed.pair.a, &id).outcome;
    assert_eq!(outcome.as_deref(), Some("completed"));
    let copied = fs::read(&bed.disks[1]).expect("it is there");
    assert!(copied == bed.content);
    let info = bed.pair.b.client().vm(VM).expect("it is there");
    assert_eq!(info.residual_dependency, None, "{info:?}");
}

/// Before the commit a disk that takes nothing is an error of the migration; after it the guest waits until somebody
/// has made room.
#[test]
fn a_disk_that_becomes_full_costs_no_guest() {
    let Some(bed) = Bed::on_small_disk() else {
        return;
    };
    let (a, b) = (&bed.pair.a, &bed.pair.b);
    let filler = bed.disks[1].with_file_name("filler");
    let fill = || {
        let error = fs::write(&filler, vec![1; 2 * SMALL_BYTES]).expect_err("there is less room");
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    };
    let begin = |mode| {
        let mut body = bed.body(mode, true);
        // Several seconds for what the disk holds.
        body.link = Some(100_000);
        let id = a.client().migrate(VM, &body);
        id.expect("a migration that is accepted")
    };
    let id = begin(Mode::PreCopy);
    wait::until("the disk is made", || bed.disks[1].exists().then_some(()));
    fill();
    let report = end(a, &id);
    assert_eq!(report.outcome.as_deref(), Some("failed"), "{report:?}");
    let reason = report.reason.expect("a failure has a reason");
    assert!(reason.contains("No space left on device"), "{reason}");
    wait::until("the disk is removed", || {
        (!bed.disks[1].exists()).then_some(())
    });
    bed.check_at_home();

    fs::remove_file(&filler).expect("it can be removed");
    let id = begin(Mode::PostCopy);
    until_stage(a, &id, &[Stage::Serving]);
    fill();
    wait::until("the daemon says what is wrong", || {
        let log = b.log();
        let mut lines = log.lines();
        lines.find(|line| line.contains("takes nothing") && line.contains("disk.raw"))?;
        Some(())
    });
    let info = b.client().vm(VM).expect("it is there");
    assert_eq!(info.state, VmState::Running, "{info:?}");
    assert!(info.missing_pages > 0, "{info:?}");
    let listed = info.residual_dependency.expect("pages are missing");
    for told in ["a disk takes nothing", "disk.raw: No space left on device"] {
        assert!(listed.contains(told), "{listed}");
    }
    let stuck = || b.client().incoming().expect("it answers")[0].stuck.clone();
    assert!(stuck().is_some_and(|stuck| stuck.contains("takes nothing")));
    fs::remove_file(&filler).expect("it can be removed");
    assert_completed(&end(a, &id));
    assert!(b.log().contains("takes what is written again"));
    let copied = fs::read(&bed.disks[1]).expect("it is there");
    assert!(copied == bed.content);
}
