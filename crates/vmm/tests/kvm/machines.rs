//! One machine in this process: booting, running, pausing, ending.

use crate::guests::*;
use limosa_vmm::answer::{ExitReason, RunState};
use limosa_vmm::config::VmConfig;
use limosa_vmm::machine::{Machine, MachineError};
use limosa_vmm::state::Kind;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// What ends a guest is seen, with its reason, and nothing can be asked of it any more.
#[test]
fn a_guest_that_ends_says_why() {
    if !has_kvm() {
        return;
    }
    let check = |code: &[u8], expect: ExitReason| {
        let mut machine = machine(code, 2);
        assert_eq!(machine.run_state(), RunState::Paused);
        machine.run().unwrap();
        wait_until(|| machine.run_state() != RunState::Running);
        match (machine.run_state(), expect) {
            (RunState::Exited(ExitReason::TripleFault { .. }), ExitReason::TripleFault { .. }) => {}
            (state, expect) => assert_eq!(state, RunState::Exited(expect)),
        }
        for error in [
            machine.run().unwrap_err(),
            machine.pause_and_save(false).unwrap_err(),
        ] {
            assert!(matches!(error, MachineError::Exited(_)), "{error}");
        }
    };
    check(&EXIT, ExitReason::Finished { status: 7 });
    check(&CRASH, ExitReason::TripleFault { vcpu: 0 });
}

#[test]
fn what_cannot_be_is_refused() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::create(config(1), "here").unwrap();
    assert_eq!(machine.run_state(), RunState::Empty);
    let message = |error: MachineError| error.to_string();
    assert_eq!(
        message(machine.run().unwrap_err()),
        "the machine is empty, it has to be paused"
    );
    assert_eq!(
        message(machine.pause_and_save(false).unwrap_err()),
        "the machine is empty, it has to be running or paused"
    );
    assert_eq!(
        message(machine.boot(b"no").unwrap_err()),
        "this is no ELF file"
    );
    assert_eq!(
        message(machine.load(b"no").unwrap_err()),
        "this is no machine state, or one of another version"
    );
    assert!(machine.harvest().is_err(), "tracking is off");
    machine.boot(&image(&COUNTER)).unwrap();
    machine.run().unwrap();
    assert_eq!(
        message(machine.run().unwrap_err()),
        "the machine is running, it has to be paused"
    );
    assert_eq!(
        message(machine.load(b"no").unwrap_err()),
        "the machine is running, it has to be empty or paused"
    );
}

/// A port read that is pending at a pause is completed exactly once: the monitor's count and the
/// guest's agree at every pause, whatever the guest was at.
#[test]
fn no_port_read_is_lost_or_doubled() {
    if !has_kvm() {
        return;
    }
    let mut machine = machine(&COUNTER, 1);
    machine.run().unwrap();
    let (mut between, mut seen) = (0, 0);
    for turn in 0..400 {
        // Pauses at all distances from the start of the guest's loop.
        thread::sleep(Duration::from_micros(turn % 97));
        let snapshot = machine.pause_and_save(false).unwrap();
        let (counted, rip) = registers(&snapshot.sections, 0);
        let micro = section(&snapshot.sections, Kind::Micro, 0);
        let beats = u64::from_le_bytes(micro[8..].try_into().unwrap());
        let is_between = rip == COUNTER_INC;
        assert_eq!(
            beats,
            counted + u64::from(is_between),
            "pause {turn} at {rip:#x}"
        );
        assert!(beats >= seen);
        between += u64::from(is_between);
        seen = beats;
        machine.run().unwrap();
    }
    println!("{between} of 400 pauses found a pending access, {seen} accesses in all");
    assert!(
        between > 0,
        "some pause has to find one, or nothing was tested"
    );
}

/// A guest that waits is paused at once and looks again afterwards.
#[test]
fn a_wait_ends_with_a_pause() {
    if !has_kvm() {
        return;
    }
    let mut machine = machine(&ORDERS, 2);
    let memory = Arc::clone(machine.memory());
    machine.run().unwrap();
    for number in 1..50 {
        let snapshot = machine.pause_and_save(false).unwrap();
        let times = snapshot.times;
        assert!(times.stopped_first <= times.stopped_last && times.stopped_last <= times.harvested);
        assert!(times.harvested <= times.saved);
        give_order(&memory, number % 2, number, 1, DATA, 4096);
        machine.run().unwrap();
        wait_done(&memory, number % 2, number);
    }
}

/// Eight vCPUs on few processors: all come out at a pause and go on.
#[test]
fn eight_vcpus_pause_and_go_on() {
    if !has_kvm() {
        return;
    }
    let mut machine = machine(&STORM, 8);
    let mut before = 0;
    for _ in 0..10 {
        machine.run().unwrap();
        thread::sleep(Duration::from_millis(30));
        let snapshot = machine.pause_and_save(false).unwrap();
        let written = check_storm(machine.memory(), &snapshot.sections, 8);
        assert!(written > before);
        before = written;
    }
}

/// With interrupt controllers all vCPUs run, too, and nothing else changes.
#[test]
fn a_machine_with_interrupt_controllers_runs() {
    if !has_kvm() {
        return;
    }
    let config = VmConfig {
        irqchip: true,
        ..config(2)
    };
    let mut machine = Machine::create(config, "here").unwrap();
    machine.boot(&image(&ORDERS)).unwrap();
    let memory = Arc::clone(machine.memory());
    for number in 1..10 {
        machine.run().unwrap();
        give_order(&memory, number % 2, number, 1, DATA, 4096);
        wait_done(&memory, number % 2, number);
        machine.pause_and_save(false).unwrap();
    }
}

/// Needs some reserved huge pages, which only root can see to.
#[test]
fn a_machine_on_huge_pages_runs() {
    if !has_kvm() {
        return;
    }
    let config = VmConfig {
        huge_pages: true,
        ..config(1)
    };
    let mut machine = match Machine::create(config, "here") {
        Ok(machine) => machine,
        Err(MachineError::Memory(error)) => return println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    machine.boot(&image(&STORM)).unwrap();
    machine.start_tracking().unwrap();
    machine.run().unwrap();
    thread::sleep(Duration::from_millis(20));
    let snapshot = machine.pause_and_save(true).unwrap();
    assert!(check_storm(machine.memory(), &snapshot.sections, 1) > 0);
}
