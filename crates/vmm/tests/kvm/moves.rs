//! Moves between VM processes, with pages copied by the test.

use crate::guests::*;
use crate::vm_process::VmProcess;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_pages::{PAGE_SIZE_USIZE, PageRange, PageSet, Pfn};
use limosa_vmm::answer::RunState;
use limosa_vmm::client::VmHandle;
use limosa_vmm::config::VmConfig;
use std::path::Path;
use std::thread;
use std::time::Duration;

fn copy(from: &VmHandle, to: &VmHandle, pages: &PageSet) {
    let mut page = [0; PAGE_SIZE_USIZE];
    for pfn in pages.iter() {
        from.memory().read_page(pfn, &mut page);
        to.memory().write_at(pfn.file_offset(), &page).unwrap();
    }
}

/// Pre-copy with one round as the guest runs; the target runs when it returns.
fn move_guest(source: &VmHandle, directory: &Path, id: u128) -> (VmProcess, VmHandle) {
    let id = MigrationId(id);
    source.record(&Phase::Offered { id }).unwrap();
    let config = VmConfig::from_description(&source.description()).unwrap();
    config.check_host().unwrap();
    let process = VmProcess::start(directory, &format!("vm-{}", id.0));
    let target = process.connect().unwrap();
    target
        .create(&config, None, Phase::Preparing { id })
        .unwrap();
    let all = PageRange::new(Pfn::new(0), source.memory().page_count());
    let mut dirty = PageSet::empty(all.count);
    source.start_tracking().unwrap();
    source.harvest(&mut dirty).unwrap();
    source.clear(all, Vec::new()).unwrap();
    copy(source, &target, &dirty);
    let rehearsed = source.rehearse().unwrap();
    target.load(&rehearsed.sections, true).unwrap();
    assert!(
        target.commit_and_run(id, now(), false).is_err(),
        "a rehearsed state never runs"
    );
    let saved = source.pause_and_save(true).unwrap();
    source
        .record(&Phase::Committed {
            id,
            peer: "b:1".to_owned(),
        })
        .unwrap();
    copy(source, &target, &saved.dirty.unwrap());
    let loaded = target.load(&saved.sections, false).unwrap();
    assert_eq!(loaded.refused_msrs, []);
    let running = target
        .commit_and_run(id, saved.times.stopped_first, false)
        .unwrap();
    assert_eq!(
        target
            .commit_and_run(id, saved.times.stopped_first, false)
            .unwrap(),
        running,
        "repeated"
    );
    assert!(source.resume().is_err(), "at most one side runs");
    // Whatever becomes of the daemon now, the guest stays.
    drop(target);
    let target = process.connect().unwrap();
    let attached = target.attached();
    assert_eq!(
        (attached.phase, attached.run_state),
        (Phase::Arrived { id }, RunState::Running)
    );
    target.record(&Phase::Running).unwrap();
    (process, target)
}

/// Two moves there and two back; after each, no page is stale and no number was left out.
#[test]
fn a_guest_moves_there_and_back() {
    if !has_kvm() {
        return;
    }
    for (vcpus, irqchip) in [(1, false), (2, false), (2, true)] {
        let directory = tempfile::tempdir().unwrap();
        let mut process = VmProcess::start(directory.path(), "vm-0");
        let mut vm = process.connect().unwrap();
        let config = VmConfig {
            irqchip,
            ..config(vcpus)
        };
        vm.create(&config, Some(&image(&STORM)), Phase::Running)
            .unwrap();
        vm.run().unwrap();
        let mut written = 0;
        for id in 1..=4 {
            let (next_process, next) = move_guest(&vm, directory.path(), id);
            vm.stop().unwrap();
            process.wait_end();
            (process, vm) = (next_process, next);
            thread::sleep(Duration::from_millis(5));
            let saved = vm.pause_and_save(false).unwrap();
            let total = check_storm(vm.memory(), &saved.sections, u16::from(vcpus));
            assert!(total > written, "the guest has gone on");
            written = total;
            vm.resume().unwrap();
        }
    }
}
