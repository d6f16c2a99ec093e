//! VM processes: what they obey, what they refuse, and what they do when the daemon is lost.

use crate::guests::*;
use crate::vm_process::VmProcess;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_micro_abi::CommandKind;
use limosa_pages::{PageCount, PageSet, Pfn};
use limosa_vmm::answer::{ExitReason, RunState};
use limosa_vmm::client::{VmError, VmHandle};
use limosa_vmm::config::VmConfig;
use limosa_vmm::cpu::CpuModel;
use limosa_vmm::heartbeat::Heartbeat;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

const ID: MigrationId = MigrationId(7);

fn started(code: &[u8], vcpus: u8) -> (tempfile::TempDir, VmProcess, VmHandle) {
    let directory = tempfile::tempdir().unwrap();
    let process = VmProcess::start(directory.path(), "vm");
    let vm = process.connect().unwrap();
    vm.create(&config(vcpus), Some(&image(code)), Phase::Running)
        .unwrap();
    (directory, process, vm)
}

#[test]
fn a_process_serves_its_machine_and_ends_when_told() {
    if !has_kvm() {
        return;
    }
    let (_directory, mut process, vm) = started(&ORDERS, 2);
    let attached = vm.attached();
    assert_eq!(attached.name.as_deref(), Some("test"));
    assert_eq!(
        (attached.phase, attached.run_state),
        (Phase::Running, RunState::Paused)
    );
    let seen = attached.config.unwrap();
    assert!(seen.cpuid.is_some() && seen.tsc_khz.is_some());
    assert_eq!(VmConfig::from_description(&vm.description()).unwrap(), seen);
    seen.check_host().unwrap();
    let running = vm.run().unwrap();
    assert!(
        running.first_instruction_at <= running.last_entered_at && running.last_entered_at <= now()
    );
    give_order(vm.memory(), 1, 5, 3, DATA, 4096);
    wait_done(vm.memory(), 1, 5);
    let sections = vm.inspect().unwrap();
    assert!(
        sections
            .iter()
            .any(|section| section.name == "vcpu.vectors" && section.instance == 1)
    );
    assert_eq!(vm.status().unwrap().run_state, RunState::Running);
    let rehearsed = vm.rehearse().unwrap();
    assert!(rehearsed.dirty.is_none() && rehearsed.sections.len() > 4096);
    assert_eq!(vm.status().unwrap().run_state, RunState::Running);
    vm.start_tracking().unwrap();
    let mut set = PageSet::empty(vm.memory().page_count());
    vm.harvest(&mut set).unwrap();
    assert_eq!(set, PageSet::full(vm.memory().page_count()));
    let all = limosa_pages::PageRange::new(Pfn::new(0), vm.memory().page_count());
    vm.clear(all, Vec::new()).unwrap();
    give_order(vm.memory(), 1, 6, 1, DATA + 4096, 4096);
    wait_done(vm.memory(), 1, 6);
    let saved = vm.pause_and_save(true).unwrap();
    // Of transparent huge pages, those that the guest only read may be among them.
    let dirty = saved.dirty.unwrap().count().get();
    let is_exact = vm.memory().write_unit() == Some(PageCount::new(1));
    assert!(
        dirty == 2 || !is_exact && (2..=4).contains(&dirty),
        "{dirty}"
    );
    let again = vm
        .create(&config(1), Some(&image(&EXIT)), Phase::Running)
        .unwrap_err();
    assert_eq!(again.to_string(), "there is a machine already");
    vm.stop().unwrap();
    process.wait_end();
    let gone = vm.status().unwrap_err();
    assert!(matches!(gone, VmError::Gone(_)), "{gone:?}");
}

#[test]
fn one_daemon_at_a_time() {
    if !has_kvm() {
        return;
    }
    let (_directory, process, vm) = started(&ORDERS, 1);
    assert!(matches!(process.connect().unwrap_err(), VmError::Busy(_)));
    vm.run().unwrap();
    drop(vm);
    let vm = process.connect().unwrap();
    assert_eq!(vm.attached().run_state, RunState::Running);
    give_order(vm.memory(), 0, 1, 1, DATA, 4096);
    wait_done(vm.memory(), 0, 1);
}

#[test]
fn bad_machines_are_refused_in_words() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let process = VmProcess::start(directory.path(), "vm");
    let vm = process.connect().unwrap();
    let create = |change: fn(&mut VmConfig), elf: Option<&[u8]>, phase| {
        let mut config = config(1);
        change(&mut config);
        vm.create(&config, elf, phase).unwrap_err().to_string()
    };
    let elf = image(&EXIT);
    assert_eq!(
        create(|_| {}, Some(b"x"), Phase::Running),
        "this is no ELF file"
    );
    assert_eq!(
        create(|config| config.vcpus = 9, Some(&elf), Phase::Running),
        "9 vCPUs are not possible: such a machine has 1 to 8"
    );
    let begins = "a machine begins running with an image, or preparing without one";
    assert_eq!(create(|_| {}, None, Phase::Running), begins);
    assert_eq!(
        create(|_| {}, Some(&elf), Phase::Preparing { id: ID }),
        begins
    );
    let huge = create(
        |config| config.huge_pages = true,
        Some(&elf),
        Phase::Running,
    );
    assert!(
        huge.contains("huge pages of 2 MiB are needed and not free"),
        "{huge}"
    );
    assert_eq!(
        vm.run().unwrap_err().to_string(),
        "there is nothing to run: no state was loaded"
    );
    assert_eq!(
        vm.inspect().unwrap_err().to_string(),
        "there is no machine yet"
    );
}

/// A host that lacks what the guest has seen refuses before it makes anything.
#[test]
fn missing_cpu_features_are_named() {
    if !has_kvm() {
        return;
    }
    let (directory, _process, vm) = started(&ORDERS, 1);
    let mut config = VmConfig::from_description(&vm.description()).unwrap();
    let leaf = config
        .cpuid
        .as_mut()
        .unwrap()
        .iter_mut()
        .find(|leaf| leaf.function == 7 && leaf.index == 0);
    // AMX tiles: no processor of this kind has them.
    leaf.unwrap().registers[3] |= 1 << 24;
    assert_eq!(
        config.check_host().unwrap_err().to_string(),
        "this host's processor lacks amx_tile"
    );
    let target = VmProcess::start(directory.path(), "target");
    let target_vm = target.connect().unwrap();
    let error = target_vm
        .create(&config, None, Phase::Preparing { id: ID })
        .unwrap_err();
    assert_eq!(error.to_string(), "this host's processor lacks amx_tile");
    // All that a host lacks is told, and not the first of it.
    assert!(!config.msrs.is_empty());
    config.msrs.push(0x1234_5678);
    let differences = config.differences();
    let differences: Vec<String> = differences.iter().map(ToString::to_string).collect();
    assert_eq!(
        differences,
        [
            "this host's processor lacks amx_tile",
            "this host's KVM lacks model-specific registers [12345678]"
        ]
    );
    config = VmConfig::from_description(&vm.description()).unwrap();
    config.tsc_khz = Some(1_000_000);
    let error = config.check_host();
    assert!(error.is_ok() || error.unwrap_err().to_string().contains("cannot be scaled"));
}

#[test]
fn a_guest_sees_the_processor_of_its_model() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let process = VmProcess::start(directory.path(), "test");
    let vm = process.connect().unwrap();
    let mut config = config(1);
    config.model = CpuModel::V2;
    let created = vm.create(&config, Some(&image(&ORDERS)), Phase::Running);
    if let Some(lacking) = config.differences().first() {
        let error = created.unwrap_err().to_string();
        assert_eq!(error, lacking.to_string());
        assert!(error.contains("of CPU model x86-64-v2"), "{error}");
        return;
    }
    created.unwrap();
    let seen = VmConfig::from_description(&vm.description()).unwrap();
    assert_eq!(seen.model, CpuModel::V2);
    let table = seen.cpuid.as_deref().unwrap();
    let features = |function| table.iter().find(|leaf| leaf.function == function);
    let [_, _, has, _] = features(1).unwrap().registers;
    let (sse4_2, avx) = (has >> 20 & 1, has >> 28 & 1);
    assert_eq!((sse4_2, avx), (1, 0));
    assert!(features(0xa).is_none());
    assert!(seen.differences().is_empty(), "{:?}", seen.differences());
    vm.run().unwrap();
    give_order(vm.memory(), 0, 5, 3, DATA, 4096);
    wait_done(vm.memory(), 0, 5);
}

#[test]
fn the_end_of_a_guest_is_seen() {
    if !has_kvm() {
        return;
    }
    let (_directory, mut process, vm) = started(&EXIT, 1);
    vm.run().unwrap();
    wait_until(|| vm.status().unwrap().run_state != RunState::Running);
    let exited = RunState::Exited(ExitReason::Finished { status: 7 });
    assert_eq!(vm.status().unwrap().run_state, exited);
    let error = vm.pause_and_save(true).unwrap_err();
    assert!(matches!(&error, VmError::Exited(_)), "{error}");
    assert_eq!(
        error.to_string(),
        "the machine has exited: the guest finished with status 7"
    );
    drop(vm);
    let vm = process.connect().unwrap();
    assert_eq!(vm.attached().run_state, exited);
    vm.stop().unwrap();
    process.wait_end();
}

#[test]
fn heartbeats_and_commands() {
    if !has_kvm() {
        return;
    }
    let (_directory, _process, vm) = started(&COUNTER, 1);
    let observer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    observer
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    vm.set_observer(Some(observer.local_addr().unwrap()))
        .unwrap();
    let work = 0x2000 + 32;
    vm.memory().write_at(work, &77u64.to_le_bytes()).unwrap();
    vm.run().unwrap();
    let mut datagram = [0; 600];
    let mut last = None;
    for _ in 0..5 {
        let len = observer.recv(&mut datagram).unwrap();
        let beat = Heartbeat::decode(&datagram[..len]).unwrap();
        assert_eq!(
            (beat.name.as_str(), beat.host.as_str(), beat.work),
            ("test", "here", 77)
        );
        assert!(last.is_none_or(|last| last < (beat.sequence, beat.sent_at)));
        last = Some((beat.sequence, beat.sent_at));
    }
    assert_eq!(vm.command(CommandKind::Sweep).unwrap(), 1);
    assert_eq!(vm.command(CommandKind::Finish).unwrap(), 2);
    assert_eq!(vm.guest_report().len(), 1);
    vm.set_observer(None).unwrap();
}

/// The rule of the handover, phase by phase, when the daemon is lost.
#[test]
fn a_lost_daemon_is_answered_by_the_phase() {
    if !has_kvm() {
        return;
    }
    let committed = Phase::Committed {
        id: ID,
        peer: "b:1".to_owned(),
    };
    let offered = Phase::Offered { id: ID };
    let check = |phases: &[Phase], is_paused: bool, expect_phase: &Phase, expect: &RunState| {
        let goes_on_alone = *expect_phase == Phase::Running;
        let (_directory, process, vm) = started(&ORDERS, 1);
        vm.run().unwrap();
        for phase in phases {
            vm.record(phase).unwrap();
        }
        vm.start_tracking().unwrap();
        if is_paused {
            vm.pause_and_save(true).unwrap();
        }
        drop(vm);
        let vm = process.connect().unwrap();
        let attached = vm.attached();
        assert_eq!(
            (&attached.phase, &attached.run_state),
            (expect_phase, expect),
            "{phases:?}"
        );
        let mut set = PageSet::empty(vm.memory().page_count());
        let is_tracking = vm.harvest(&mut set).is_ok();
        assert_eq!(is_tracking, !goes_on_alone, "{phases:?}");
        if *expect == RunState::Running {
            give_order(vm.memory(), 0, 1, 1, DATA, 4096);
            wait_done(vm.memory(), 0, 1);
        } else {
            assert!(vm.resume().is_err());
        }
    };
    check(&[], false, &Phase::Running, &RunState::Running);
    check(&[], true, &Phase::Running, &RunState::Running);
    check(
        std::slice::from_ref(&offered),
        false,
        &Phase::Running,
        &RunState::Running,
    );
    check(
        std::slice::from_ref(&offered),
        true,
        &Phase::Running,
        &RunState::Running,
    );
    check(
        &[offered.clone(), committed.clone()],
        true,
        &committed,
        &RunState::Paused,
    );
}

#[test]
fn a_committed_guest_does_not_resume_before_it_is_resolved() {
    if !has_kvm() {
        return;
    }
    let (_directory, _process, vm) = started(&ORDERS, 1);
    vm.run().unwrap();
    let committed = Phase::Committed {
        id: ID,
        peer: "b:1".to_owned(),
    };
    assert!(matches!(
        vm.record(&committed).unwrap_err(),
        VmError::Phase(_)
    ));
    vm.record(&Phase::Offered { id: ID }).unwrap();
    vm.pause_and_save(false).unwrap();
    vm.record(&committed).unwrap();
    let error = vm.resume().unwrap_err();
    assert!(matches!(&error, VmError::Phase(_)), "{error}");
    assert!(matches!(
        vm.commit_and_run(ID, now(), false).unwrap_err(),
        VmError::Phase(_)
    ));
    assert!(matches!(
        vm.record(&Phase::Offered { id: ID }).unwrap_err(),
        VmError::Phase(_)
    ));
    vm.record(&Phase::Running).unwrap();
    vm.resume().unwrap();
    give_order(vm.memory(), 0, 1, 1, DATA, 4096);
    wait_done(vm.memory(), 0, 1);
}

#[test]
fn a_process_without_a_guest_ends_with_its_daemon() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut without = VmProcess::start(directory.path(), "without");
    drop(without.connect().unwrap());
    without.wait_end();
    let mut preparing = VmProcess::start(directory.path(), "preparing");
    let vm = preparing.connect().unwrap();
    vm.create(&config(1), None, Phase::Preparing { id: ID })
        .unwrap();
    assert!(matches!(vm.run().unwrap_err(), VmError::Phase(_)));
    let other = MigrationId(8);
    assert!(matches!(
        vm.commit_and_run(other, now(), false).unwrap_err(),
        VmError::Phase(_)
    ));
    let empty = vm.commit_and_run(ID, now(), false).unwrap_err();
    assert_eq!(
        empty.to_string(),
        "there is nothing to run: no state was loaded"
    );
    drop(vm);
    preparing.wait_end();
}

/// Bytes of a stranger end the connection, not the process.
#[test]
fn foreign_bytes_do_not_end_the_process() {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    if !has_kvm() {
        return;
    }
    let (_directory, process, vm) = started(&ORDERS, 1);
    vm.run().unwrap();
    drop(vm);
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 8],
        &[4, 0, 0, 0, 0, 0, 0, 0, 1],
        &[0xff; 64],
    ] {
        let mut stranger = UnixStream::connect(&process.socket).unwrap();
        stranger.write_all(bytes).unwrap();
    }
    let began = Instant::now();
    let vm = loop {
        match process.connect() {
            Ok(vm) => break vm,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{error}"),
        }
    };
    assert_eq!(vm.attached().run_state, RunState::Running);
}
