//! Guests that run while their pages arrive: nothing reads as zero, nothing is lost, and the daemon may
//! go and come back.

use crate::guests::*;
use crate::vm_process::VmProcess;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_os::socket::wait_readable;
use limosa_os::userfault::PageInstaller;
use limosa_pages::{PAGE_SIZE, PAGE_SIZE_USIZE, PageCount, PageRange, PageSet, Pfn};
use limosa_vmm::answer::{RunState, Saved};
use limosa_vmm::client::{VmError, VmHandle};
use limosa_vmm::config::VmConfig;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const ID: MigrationId = MigrationId(7);
/// Pages that [`STORM`] writes to.
const STORM_PAGES: u64 = 1024;
/// Where in each of them this test leaves a mark that the guest does not touch.
const MARK_AT: u64 = 2048;

/// Two processes: a paused guest, and one that waits for it.
struct Move {
    _directory: tempfile::TempDir,
    _source_process: VmProcess,
    source: VmHandle,
    saved: Saved,
    target_process: VmProcess,
}

/// A guest that has run and is saved, and a target that is ready; `None` where that is not possible.
fn begin(vcpus: u8, huge_pages: bool) -> Option<(Move, VmHandle)> {
    if !has_kvm() {
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let source_process = VmProcess::start(directory.path(), "source");
    let source = source_process.connect().unwrap();
    source
        .create(&config(vcpus), Some(&image(&STORM)), Phase::Running)
        .unwrap();
    assert!(source.installer().is_none());
    for page in 0..STORM_PAGES {
        let at = DATA + page * PAGE_SIZE + MARK_AT;
        let mark = (page ^ 0x5555).to_le_bytes();
        source.memory().write_at(at, &mark).unwrap();
    }
    source.run().unwrap();
    source.record(&Phase::Offered { id: ID }).unwrap();
    wait_for_storm(source.memory(), u64::from(vcpus));
    thread::sleep(Duration::from_millis(3));
    let saved = source.pause_and_save(false).unwrap();
    check_storm(source.memory(), &saved.sections, u16::from(vcpus));
    let peer = "b:1".to_owned();
    source.record(&Phase::Committed { id: ID, peer }).unwrap();
    let target_process = VmProcess::start(directory.path(), "target");
    let target = target_process.connect().unwrap();
    let mut config = VmConfig::from_description(&source.description()).unwrap();
    config.huge_pages = huge_pages;
    match target.create(&config, None, Phase::Preparing { id: ID }) {
        Err(VmError::Refused(why)) if huge_pages => {
            println!("skipped: {why}");
            return None;
        }
        other => other.unwrap(),
    }
    if let Some(why) = target.attached().not_armed {
        println!("skipped: {why}");
        return None;
    }
    let moved = Move {
        _directory: directory,
        _source_process: source_process,
        source,
        saved,
        target_process,
    };
    Some((moved, target))
}

/// Everything that the source has is missing at the target, over stale content.
fn mark_all_missing(moved: &Move, target: &VmHandle) -> Arc<PageInstaller> {
    let installer = target.installer().unwrap();
    let all = PageRange::new(Pfn::new(0), target.memory().page_count());
    for extent in moved.source.memory().data_extents(all).unwrap() {
        for page in extent.iter() {
            let stale = [0x77; PAGE_SIZE_USIZE];
            target
                .memory()
                .write_at(page.file_offset(), &stale)
                .unwrap();
        }
        installer.mark_missing(extent).unwrap();
    }
    assert!(installer.missing_count() > PageCount::new(STORM_PAGES));
    installer
}

fn bring(source: &VmHandle, installer: &PageInstaller, page: Pfn) {
    let mut content = [0; PAGE_SIZE_USIZE];
    source.memory().read_page(page, &mut content);
    installer.install(page, &content).unwrap();
}

/// Serves at most that many faults, until it is over.
fn serve(source: &VmHandle, installer: &PageInstaller, limit: u64, is_over: &AtomicBool) {
    let mut faults = Vec::new();
    let mut served = 0;
    while served < limit && !is_over.load(Ordering::SeqCst) {
        wait_readable([Some(installer)], Some(10)).unwrap();
        installer.read_faults(&mut faults).unwrap();
        for page in faults.drain(..) {
            served += 1;
            let missing = installer.missing_in_unit(page);
            if missing.is_empty() {
                installer.resolve(page).unwrap();
            }
            missing
                .into_iter()
                .flat_map(PageRange::iter)
                .for_each(|page| bring(source, installer, page));
        }
    }
}

/// Ends the fault servers, whatever becomes of the test.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Loads and runs with pages missing, while faults are served.
fn hand_over(moved: &Move, target: &VmHandle) {
    target.load(&moved.saved.sections, false).unwrap();
    let running = target
        .commit_and_run(ID, moved.saved.times.stopped_first, true)
        .unwrap();
    let again = target.commit_and_run(ID, moved.saved.times.stopped_first, true);
    assert_eq!(again.unwrap(), running);
}

/// Pushes all that is missing from both ends, as faults are served; then all is there.
fn push_everything(source: &VmHandle, installer: &PageInstaller) {
    let mut missing = PageSet::empty(source.memory().page_count());
    installer.missing_set(&mut missing);
    let pages: Vec<Pfn> = missing.iter().collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            pages
                .iter()
                .for_each(|&page| bring(source, installer, page))
        });
        scope.spawn(|| {
            pages
                .iter()
                .rev()
                .for_each(|&page| bring(source, installer, page))
        });
    });
    installer.finish().unwrap();
}

/// The guest's numbers and this test's marks are all there.
fn check_guest(moved: &Move, target: &VmHandle, vcpus: u8) {
    let before = check_storm(
        moved.source.memory(),
        &moved.saved.sections,
        u16::from(vcpus),
    );
    let written = || {
        let saved = target.pause_and_save(false).unwrap();
        check_storm(target.memory(), &saved.sections, u16::from(vcpus))
    };
    let then = written();
    target.resume().unwrap();
    thread::sleep(Duration::from_millis(2));
    let now = written();
    assert!(before < now && then < now, "the guest has gone on");
    for page in 0..STORM_PAGES {
        let mark = target.memory().read_word(DATA + page * PAGE_SIZE + MARK_AT);
        assert_eq!(mark.unwrap(), page ^ 0x5555, "page {page}");
    }
}

#[test]
fn a_guest_runs_while_its_pages_arrive() {
    for (vcpus, huge_pages) in [(1, false), (2, false), (2, true)] {
        let Some((moved, target)) = begin(vcpus, huge_pages) else {
            return;
        };
        let installer = mark_all_missing(&moved, &target);
        let is_over = AtomicBool::new(false);
        let limit = if huge_pages { 1 } else { 100 };
        thread::scope(|scope| {
            let _over = Over(&is_over);
            scope.spawn(|| serve(&moved.source, &installer, limit, &is_over));
            for &page in &moved.saved.first_needed {
                bring(&moved.source, &installer, page);
            }
            hand_over(&moved, &target);
            check_refusals(&target, &installer);
            scope.spawn(|| serve(&moved.source, &installer, u64::MAX, &is_over));
            push_everything(&moved.source, &installer);
        });
        assert_eq!(target.status().unwrap().missing, Some(PageCount::ZERO));
        target.disarm().unwrap();
        target.disarm().unwrap();
        assert!(target.installer().is_none());
        assert_eq!(target.status().unwrap().missing, None);
        check_guest(&moved, &target, vcpus);
        assert_eq!(target.guest_report().len(), usize::from(vcpus));
    }
}

/// What a guest with missing pages may not do, and what it may.
fn check_refusals(target: &VmHandle, installer: &PageInstaller) {
    assert!(installer.missing_count() > PageCount::ZERO);
    let refused = |result: Result<(), VmError>| {
        let message = result.unwrap_err().to_string();
        let end = "are still missing here: the guest cannot move on before they have arrived";
        assert!(message.ends_with(end), "{message}");
    };
    refused(target.start_tracking());
    refused(target.record(&Phase::Offered { id: ID }));
    refused(target.rehearse().map(|_| ()));
    refused(target.pause_and_save(false).map(|_| ()));
    assert!(
        target
            .disarm()
            .unwrap_err()
            .to_string()
            .ends_with("still missing")
    );
    target.pause().unwrap();
    assert_eq!(target.status().unwrap().run_state, RunState::Paused);
    target.resume().unwrap();
}

/// The guest waits at a missing page for as long as there is no daemon, and then goes on.
#[test]
fn a_guest_outlives_its_daemon_while_pages_are_missing() {
    for (vcpus, huge_pages) in [(1, false), (2, false), (2, true)] {
        let Some((moved, target)) = begin(vcpus, huge_pages) else {
            return;
        };
        let installer = mark_all_missing(&moved, &target);
        /// Faults that the first daemon serves: the guest has come some way by then.
        const SERVED: u64 = 200;
        let limit = if huge_pages { 1 } else { SERVED };
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| serve(&moved.source, &installer, limit, &is_over));
            hand_over(&moved, &target);
        });
        // It stands now at a page that nobody brings; this daemon has read the fault and dies.
        wait_readable([Some(&*installer)], Some(5000)).unwrap();
        installer.read_faults(&mut Vec::new()).unwrap();
        let left = installer.missing_count();
        assert!(!target.is_gone());
        drop((target, installer));
        let target = moved.target_process.connect().unwrap();
        assert_eq!(target.attached().run_state, RunState::Running);
        assert_eq!(target.status().unwrap().missing, Some(left));
        let installer = target.installer().unwrap();
        assert_eq!(installer.missing_count(), left);
        // Kicked out of its wait and sent back into it.
        target.pause().unwrap();
        target.resume().unwrap();
        thread::scope(|scope| {
            let _over = Over(&is_over);
            scope.spawn(|| serve(&moved.source, &installer, u64::MAX, &is_over));
            push_everything(&moved.source, &installer);
        });
        target.disarm().unwrap();
        check_guest(&moved, &target, vcpus);
    }
}

#[test]
fn nobody_is_held_back_when_all_was_there() {
    let Some((moved, target)) = begin(1, false) else {
        return;
    };
    let all = PageRange::new(Pfn::new(0), target.memory().page_count());
    let mut content = [0; PAGE_SIZE_USIZE];
    for extent in moved.source.memory().data_extents(all).unwrap() {
        for page in extent.iter() {
            moved.source.memory().read_page(page, &mut content);
            target
                .memory()
                .write_at(page.file_offset(), &content)
                .unwrap();
        }
    }
    assert_eq!(target.status().unwrap().missing, Some(PageCount::ZERO));
    target.load(&moved.saved.sections, false).unwrap();
    target
        .commit_and_run(ID, moved.saved.times.stopped_first, false)
        .unwrap();
    assert!(target.installer().is_none());
    check_guest(&moved, &target, 1);
    drop(target);
    let target = moved.target_process.connect().unwrap();
    let why = target.attached().not_armed;
    assert_eq!(why.as_deref(), Some("its memory is complete"));
    target.stop().unwrap();
    assert!(target.is_gone());
}

#[test]
fn a_guest_that_was_complete_needs_only_its_own_pages_first() {
    let Some((moved, _target)) = begin(2, false) else {
        return;
    };
    let needed = &moved.saved.first_needed;
    for address in [0x1000, 0x2000, 0x3000, CODE] {
        let page = Pfn::new(address / PAGE_SIZE);
        assert!(needed.contains(&page), "{page} of {needed:?}");
    }
    assert!(needed.len() < 32, "{needed:?}");
}
