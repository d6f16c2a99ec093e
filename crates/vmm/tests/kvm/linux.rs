//! Machines that boot as stock kernels do. The kernel is a few instructions that reach for what a PC
//! has: where KVM is emulated, a real one would take minutes.

use crate::guests::*;
use crate::vm_process::VmProcess;
use limosa_engine::handover::Phase;
use limosa_pages::{ByteCount, PAGE_SIZE_USIZE, PageRange, Pfn};
use limosa_vmm::LinuxImage;
use limosa_vmm::answer::{ExitReason, RunState};
use limosa_vmm::client::VmHandle;
use limosa_vmm::config::{Platform, VmConfig};
use limosa_vmm::machine::{Machine, MachineError};
use std::fs::File;
use std::io::Write;
use std::thread;
use std::time::Duration;

/// Notes a word in the serial port's scratch register, waits until the byte at [`FLAG`] is set, and
/// switches the machine off if the word is still there; else it resets it.
const KERNEL: [u8; 46] = [
    0x66, 0xba, 0xff, 0x03, 0xb0, 0x5a, 0xee, // mov dx,3ffh; mov al,5ah; out dx,al
    0x66, 0xba, 0xf8, 0x03, 0xb0, 0x0a, 0xee, // mov dx,3f8h; mov al,'\n'; out dx,al
    0x80, 0x3c, 0x25, 0x00, 0x00, 0x30, 0x00, 0x00, // back: cmp byte [300000h],0
    0x74, 0xf6, // je back
    0x66, 0xba, 0xff, 0x03, 0xec, // mov dx,3ffh; in al,dx
    0x3c, 0x5a, 0x75, 0x07, // cmp al,5ah; jne reset
    0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, // mov dx,600h; mov al,34h; out dx,al
    0xb0, 0xfe, 0xe6, 0x64, // reset: mov al,0feh; out 64h,al
    0xf4, 0xf4, // hlt
];
const FLAG: u64 = 0x30_0000;

fn pc(vcpus: u8) -> VmConfig {
    VmConfig {
        platform: Platform::Pc,
        irqchip: true,
        ..config(vcpus)
    }
}

fn image(code: &[u8]) -> LinuxImage {
    let mut bytes = vec![0; 1024 + 0x200];
    bytes[0x1f1] = 1;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x22c..0x230].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[0x236] = 1;
    bytes.extend(code);
    LinuxImage {
        kernel: file(&bytes),
        initrd: None,
        cmdline: String::new(),
    }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn wait_for_exit(machine: &Machine) -> RunState {
    wait_until(|| machine.run_state() != RunState::Running);
    machine.run_state()
}

#[test]
fn a_kernel_moves_with_its_devices_and_ends_as_it_likes() {
    if !has_kvm() {
        return;
    }
    let mut source = Machine::create(pc(2), "here").unwrap();
    source.boot_linux(&mut image(&KERNEL)).unwrap();
    source.run().unwrap();
    thread::sleep(Duration::from_millis(50));
    let snapshot = source.pause_and_save(false).unwrap();
    let mut target = Machine::create(source.config().clone(), "there").unwrap();
    let mut page = [0; PAGE_SIZE_USIZE];
    let all = PageRange::new(Pfn::new(0), source.memory().page_count());
    for pfn in all.iter() {
        source.memory().read_page(pfn, &mut page);
        target.memory().write_at(pfn.file_offset(), &page).unwrap();
    }
    target.load(&snapshot.sections).unwrap();
    target.memory().write_at(FLAG, &[1]).unwrap();
    target.run().unwrap();
    let expect = RunState::Exited(ExitReason::PoweredOff);
    assert_eq!(wait_for_exit(&target), expect);
    // A micro guest's machine does not take the state of a PC.
    let mut other = Machine::create(config(2), "there").unwrap();
    let error = other.load(&snapshot.sections).unwrap_err().to_string();
    assert!(error.contains("another kind of machine"), "{error}");
}

#[test]
fn a_reset_and_a_panic_are_seen() {
    if !has_kvm() {
        return;
    }
    let check = |code: &[u8], expect: ExitReason| {
        let mut machine = Machine::create(pc(1), "here").unwrap();
        machine.boot_linux(&mut image(code)).unwrap();
        machine.run().unwrap();
        assert_eq!(wait_for_exit(&machine), RunState::Exited(expect));
    };
    // mov al,0feh; out 64h,al; hlt
    check(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], ExitReason::Reset);
    // mov dx,505h; mov al,1; out dx,al; hlt
    let panic = [0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4];
    check(&panic, ExitReason::Panicked);
}

#[test]
fn a_process_boots_from_descriptors() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let process = VmProcess::start(directory.path(), "vm-linux");
    let handle = process.connect().unwrap();
    let mut wrong = image(&KERNEL);
    wrong.kernel = file(b"no kernel");
    let error = handle.create_linux(&pc(1), &wrong).unwrap_err().to_string();
    assert!(error.contains("give a bzImage"), "{error}");
    handle.create_linux(&pc(1), &image(&KERNEL)).unwrap();
    handle.run().unwrap();
    assert_eq!(handle.status().unwrap().phase, Phase::Running);
    handle.memory().write_at(FLAG, &[1]).unwrap();
    let exited = RunState::Exited(ExitReason::PoweredOff);
    wait_until(|| {
        handle
            .status()
            .is_ok_and(|status| status.run_state == exited)
    });
}

#[test]
fn a_pc_without_controllers_is_refused() {
    if !has_kvm() {
        return;
    }
    let config = VmConfig {
        irqchip: false,
        ..pc(1)
    };
    let error = Machine::create(config, "here").unwrap_err();
    assert!(matches!(error, MachineError::Config(_)), "{error}");
}

#[test]
fn only_a_pc_can_be_asked_for_memory() {
    if !has_kvm() {
        return;
    }
    let (none, page) = (ByteCount::new(0), ByteCount::new(4096));
    let check = |result: Result<(), MachineError>, expect: &str| {
        let text = result.map_or_else(|error| error.to_string(), |()| "ok".to_owned());
        assert_eq!(text, expect);
    };
    let micro = Machine::create(config(1), "test").unwrap();
    assert_eq!(micro.balloon(), None);
    let refused = "there is no balloon to fill: ";
    check(
        micro.set_balloon(page),
        &format!("{refused}a micro guest has none"),
    );
    check(
        micro.lend_balloon(page),
        &format!("{refused}a micro guest has none"),
    );
    check(micro.lend_balloon(none), "ok");
    let pc = Machine::create(pc(1), "test").unwrap();
    let memory = pc.config().memory;
    let target = || pc.balloon().unwrap().target;
    check(
        pc.set_balloon(memory),
        &format!("{refused}it would hold all of the memory"),
    );
    check(pc.set_balloon(page), "ok");
    check(pc.lend_balloon(ByteCount::new(8192)), "ok");
    assert_eq!(target(), ByteCount::new(8192));
    check(pc.lend_balloon(none), "ok");
    assert_eq!(target(), page);
    assert!(!pc.balloon().unwrap().has_driver);
}

#[test]
fn a_guest_has_its_memory_back_when_its_daemon_is_lost() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let process = VmProcess::start(directory.path(), "vm-linux");
    let handle = process.connect().unwrap();
    handle.create_linux(&pc(1), &image(&KERNEL)).unwrap();
    handle.run().unwrap();
    let target = |handle: &VmHandle| handle.status().unwrap().balloon.unwrap().target;
    handle.set_balloon(ByteCount::new(4096)).unwrap();
    handle.lend_balloon(ByteCount::new(1 << 20)).unwrap();
    assert_eq!(target(&handle), ByteCount::new(1 << 20));
    drop(handle);
    let next = process.connect().unwrap();
    wait_until(|| target(&next) == ByteCount::new(4096));
}
