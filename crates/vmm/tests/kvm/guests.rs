//! Hand-assembled guests, the images around them, and what can be said of their memory and registers.
//!
//! Bytes stand beside the instructions that they are. All guests run at 0x200000 in 8 MiB.

use limosa_engine::Timestamp;
use limosa_os::kvm::Kvm;
use limosa_os::{SharedMemory, monotonic_nanos};
use limosa_pages::{ByteCount, PAGE_SIZE};
use limosa_vmm::config::VmConfig;
use limosa_vmm::machine::Machine;
use limosa_vmm::state::{Kind, parse};
use std::time::{Duration, Instant};

pub(crate) const CODE: u64 = 0x20_0000;
pub(crate) const MEMORY: ByteCount = ByteCount::new(8 << 20);
/// Where [`ORDERS`] looks for its orders: 64 bytes a vCPU.
pub(crate) const ORDERS_AT: u64 = 0x30_0000;
/// Where it says which order it has carried out: a page a vCPU.
pub(crate) const DONE_AT: u64 = 0x30_1000;
/// What orders and [`STORM`] write to.
pub(crate) const DATA: u64 = 0x40_0000;

/// Reads the heartbeat port and counts how often, in rbx.
pub(crate) const COUNTER: [u8; 11] = [
    0xba, 0x00, 0x50, 0x00, 0x00, // mov edx, 0x5000
    0xed, // again: in eax, dx
    0x48, 0xff, 0xc3, // inc rbx
    0xeb, 0xfa, // jmp again
];
/// Where [`COUNTER`] is between the port and the count.
pub(crate) const COUNTER_INC: u64 = CODE + 6;

/// Waits for an order {number, count, address, stride}, writes its number to these places, and then
/// to its own page; rbx is the last number.
pub(crate) const ORDERS: [u8; 86] = [
    0x49, 0x89, 0xf1, 0x49, 0xc1, 0xe1, 0x06, 0x49, 0x81, 0xc1, 0x00, 0x00, 0x30,
    0x00, // r9 = 0x300000 + 64 rsi
    0x49, 0x89, 0xf2, 0x49, 0xc1, 0xe2, 0x0c, 0x49, 0x81, 0xc2, 0x00, 0x10, 0x30,
    0x00, // r10 = 0x301000 + 4096 rsi
    0x49, 0x8b, 0x01, 0x48, 0x39, 0xd8, 0x75,
    0x13, // top: rax = [r9]; if rax != rbx goto work
    0xb8, 0xe8, 0x03, 0x00, 0x00, 0xba, 0x08, 0x50, 0x00, 0x00, 0xef, // out 0x5008, 1000
    0xba, 0x04, 0x50, 0x00, 0x00, 0xed, 0xeb, 0xe5, // in eax, 0x5004; goto top
    0x48, 0x89, 0xc3, 0x49, 0x8b, 0x49, 0x08, // work: rbx = rax; rcx = [r9 + 8]
    0x49, 0x8b, 0x79, 0x10, 0x4d, 0x8b, 0x41, 0x18, // rdi = [r9 + 16]; r8 = [r9 + 24]
    0x48, 0x89, 0x1f, 0x4c, 0x01, 0xc7, 0x48, 0xff, 0xc9, 0x75,
    0xf5, // each: [rdi] = rbx; rdi += r8; rcx times
    0x49, 0x89, 0x1a, 0xeb, 0xc6, // [r10] = rbx; goto top
];

/// Writes an ever growing number (each vCPU its own) to the page among 1024 that the number hashes
/// to, as fast as it can.
pub(crate) const STORM: [u8; 45] = [
    0x49, 0xb8, 0x15, 0x7c, 0x4a, 0x7f, 0xb9, 0x79, 0x37, 0x9e, // mov r8, the golden ratio
    0x48, 0xff, 0xc6, 0x48, 0x89, 0xf3, // inc rsi; mov rbx, rsi
    0x48, 0x83, 0xc3, 0x08, // again: add rbx, 8
    0x48, 0x89, 0xd9, 0x49, 0x0f, 0xaf, 0xc8, // mov rcx, rbx; imul rcx, r8
    0x48, 0xc1, 0xe9, 0x36, 0x48, 0xc1, 0xe1, 0x0c, // shr rcx, 54; shl rcx, 12
    0x48, 0x89, 0x9c, 0xf1, 0x00, 0x00, 0x40, 0x00, // mov [rcx + 8 rsi + 0x400000], rbx
    0xeb, 0xe3, // jmp again
];

/// Says that it has finished, with status 7.
pub(crate) const EXIT: [u8; 13] = [
    0xb8, 0x07, 0x00, 0x00, 0x00, 0xba, 0x10, 0x50, 0x00, 0x00, 0xef, // out 0x5010, 7
    0x0f, 0x0b, // ud2
];

/// An undefined instruction, and nobody to handle it.
pub(crate) const CRASH: [u8; 2] = [0x0f, 0x0b];

/// An image of these instructions.
pub(crate) fn image(code: &[u8]) -> Vec<u8> {
    const CODE_OFFSET: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(CODE.to_le_bytes());
    elf.extend(64u64.to_le_bytes());
    elf.resize(54, 0);
    elf.extend([56, 0, 1, 0]);
    elf.resize(64, 0);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for value in [
        CODE_OFFSET,
        CODE,
        CODE,
        code.len() as u64,
        code.len() as u64,
        0x1000,
    ] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Whether there is a KVM to test with; says so if not.
pub(crate) fn has_kvm() -> bool {
    match Kvm::open() {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

pub(crate) fn config(vcpus: u8) -> VmConfig {
    VmConfig::new("test", MEMORY, vcpus)
}

/// A machine with that guest, not yet running.
pub(crate) fn machine(code: &[u8], vcpus: u8) -> Machine {
    let mut machine = Machine::create(config(vcpus), "here").unwrap();
    machine.boot(&image(code)).unwrap();
    machine
}

pub(crate) fn now() -> Timestamp {
    Timestamp::from_nanos(monotonic_nanos())
}

/// The bytes of a section.
pub(crate) fn section(state: &[u8], kind: Kind, instance: u16) -> Vec<u8> {
    let sections = parse(state).unwrap();
    let found = sections
        .iter()
        .find(|section| (section.kind, section.instance) == (kind, instance));
    found
        .unwrap_or_else(|| panic!("no section {} {instance}", kind.name()))
        .bytes
        .to_vec()
}

/// rbx and rip of a vCPU.
pub(crate) fn registers(state: &[u8], vcpu: u16) -> (u64, u64) {
    let bytes = section(state, Kind::Registers, vcpu);
    let word =
        |index: usize| u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap());
    (word(1), word(16))
}

/// Gives [`ORDERS`] an order.
pub(crate) fn give_order(
    memory: &SharedMemory,
    vcpu: u64,
    number: u64,
    pages: u64,
    first: u64,
    stride: u64,
) {
    let at = ORDERS_AT + vcpu * 64;
    for (offset, value) in [(8, pages), (16, first), (24, stride), (0, number)] {
        memory.write_at(at + offset, &value.to_le_bytes()).unwrap();
    }
}

/// Waits until it is carried out.
pub(crate) fn wait_done(memory: &SharedMemory, vcpu: u64, number: u64) {
    wait_until(|| memory.read_word(DONE_AT + vcpu * PAGE_SIZE).unwrap() == number);
}

/// Waits for something that has to happen soon.
pub(crate) fn wait_until(mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "it does not happen"
        );
        std::thread::yield_now();
    }
}

/// Which of its pages a [`STORM`] writes that number to.
const fn storm_page(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54
}

/// Waits until each vCPU of a [`STORM`] has made its first write.
pub(crate) fn wait_for_storm(memory: &SharedMemory, vcpus: u64) {
    for vcpu in 0..vcpus {
        let at = DATA + storm_page(vcpu + 1 + 8) * PAGE_SIZE + (vcpu + 1) * 8;
        wait_until(|| memory.read_word(at).unwrap() != 0);
    }
}

/// Checks every page that a paused [`STORM`] has written: each holds the last number that hashes to
/// it, so no page is stale. How many numbers it has written.
pub(crate) fn check_storm(memory: &SharedMemory, state: &[u8], vcpus: u16) -> u64 {
    const PAGES: usize = 1024;
    const BEFORE_ADD: u64 = CODE + 0x10;
    const BEHIND_WRITE: u64 = CODE + 0x2b;
    let mut written = 0;
    for vcpu in 0..u64::from(vcpus) {
        let (rbx, rip) = registers(state, u16::try_from(vcpu).unwrap());
        assert!(
            (BEFORE_ADD..=BEHIND_WRITE).contains(&rip),
            "vCPU {vcpu} is at {rip:#x}"
        );
        let start = vcpu + 1;
        let last = if rip > BEFORE_ADD && rip < BEHIND_WRITE {
            rbx - 8
        } else {
            rbx
        };
        let mut expect = [0; PAGES];
        let mut missing = PAGES;
        let mut number = last;
        while number > start && missing > 0 {
            let page = usize::try_from(storm_page(number)).unwrap();
            if expect[page] == 0 {
                expect[page] = number;
                missing -= 1;
            }
            number -= 8;
        }
        for (page, expect) in (0..).zip(expect) {
            let at = DATA + page * PAGE_SIZE + (vcpu + 1) * 8;
            assert_eq!(
                memory.read_word(at).unwrap(),
                expect,
                "page {page} of vCPU {vcpu}, rbx {rbx}"
            );
        }
        written += (last - start) / 8;
    }
    written
}
