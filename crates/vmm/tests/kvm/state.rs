//! State: what one machine saves, another one in another process has after loading it, to the bit.

use crate::guests::*;
use crate::vm_process::VmProcess;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_vmm::config::VmConfig;
use limosa_vmm::machine::Machine;
use limosa_vmm::state::{Kind, Writer, list, parse};
use std::fs;
use std::path::Path;

/// Clocks go on from save to save; all else stays.
const GOES_ON: [Kind; 2] = [Kind::Clock, Kind::TimeStampCounter];

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// The state with sections changed by `change`.
fn edited(state: &[u8], mut change: impl FnMut(Kind, u16, &mut Vec<u8>)) -> Vec<u8> {
    let mut writer = Writer::default();
    for section in parse(state).unwrap() {
        let mut bytes = section.bytes.to_vec();
        change(section.kind, section.instance, &mut bytes);
        writer.write(section.kind, section.instance, &bytes);
    }
    Writer::join(&[writer])
}

/// All sections that stay, one line each; large ones by their bytes that are not zero.
fn lasting(state: &[u8]) -> Vec<String> {
    parse(state)
        .unwrap()
        .iter()
        .filter(|section| !GOES_ON.contains(&section.kind))
        .map(|section| {
            let mut bytes = section.bytes.to_vec();
            if section.kind == Kind::Timer {
                // When each channel's count began, on the clock of its host: KVM sets it itself.
                bytes[..72]
                    .chunks_exact_mut(24)
                    .for_each(|channel| channel[16..].fill(0));
            }
            format!("{} {} {bytes:02x?}", section.kind.name(), section.instance)
        })
        .collect()
}

fn assert_same(left: &[u8], right: &[u8]) {
    let (left, right) = (lasting(left), lasting(right));
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter().zip(&right) {
        assert_eq!(left, right);
    }
}

fn irqchip_config(vcpus: u8) -> VmConfig {
    VmConfig {
        irqchip: true,
        ..config(vcpus)
    }
}

/// A state in which everything that can differ from a fresh machine's differs: vector registers of
/// all kinds that this host has, debug and model-specific registers, events under way, interrupt
/// controllers, the timer.
fn unusual(state: &[u8], config: &VmConfig) -> Vec<u8> {
    let leaves = config.cpuid.clone().unwrap();
    edited(state, |kind, vcpu, bytes| {
        let salt = u64::from(vcpu) + 1;
        match kind {
            Kind::Registers => (0..16).filter(|&index| index != 6).for_each(|index| {
                put(
                    bytes,
                    index * 8,
                    0x0123_4567_89ab_cdef * salt + index as u64,
                );
            }),
            Kind::Vectors => fill_vectors(bytes, &leaves, salt),
            Kind::DebugRegisters => {
                (0..4).for_each(|index| put(bytes, index * 8, 0x20_1000 * salt + index as u64));
                // DR6 and DR7 with what always reads as one, and two breakpoints switched on.
                put(bytes, 32, 0xffff_0ff0);
                put(bytes, 40, 0x405);
            }
            Kind::Msrs => set_msrs(bytes, salt),
            Kind::Events => {
                // A pending non-maskable interrupt, masked meanwhile: flags say that both count.
                bytes[13] = 1;
                bytes[14] = 1;
            }
            Kind::LocalInterruptController => {
                // Enabled, spurious vector 0xff; timer in one-shot mode, masked; task priority 0x20;
                // an interrupt requested and one in service.
                bytes[0xf0..0xf4].copy_from_slice(&0x1ff_u32.to_le_bytes());
                bytes[0x320..0x324].copy_from_slice(&0x1_0040_u32.to_le_bytes());
                bytes[0x3e0..0x3e4].copy_from_slice(&0xb_u32.to_le_bytes());
                bytes[0x210..0x214].copy_from_slice(&0x0800_0000_u32.to_le_bytes());
                bytes[0x110..0x114].copy_from_slice(&0x0100_0000_u32.to_le_bytes());
            }
            Kind::InterruptController if vcpu == 2 => {
                // The I/O APIC after its number and padding: base, select, id, requests; then 24
                // entries of which some are routed and masked.
                (5..9).for_each(|pin| {
                    put(bytes, 8 + 24 + pin * 8, 0x0100_0000_0001_0030 + pin as u64)
                });
            }
            Kind::InterruptController => {
                // Masks and vector bases of the two controllers of the PC.
                bytes[8 + 3] = 0xfb;
                bytes[8 + 6] = 0x20 + 8 * u8::try_from(vcpu).unwrap();
            }
            Kind::Timer => {
                // Channel 2: mode 3, a count of its own.
                bytes[48..52].copy_from_slice(&0x1234_u32.to_le_bytes());
                bytes[48 + 14 - 1] = 3;
            }
            _ => {}
        }
    })
}

/// Fills all vector components that the table of features has, up to bit 9, as the processor's
/// manual lays them out (not compacted).
fn fill_vectors(bytes: &mut [u8], leaves: &[limosa_vmm::cpu::CpuidLeaf], salt: u64) {
    const HEADER: usize = 512;
    let find = |index| {
        leaves
            .iter()
            .find(|leaf| leaf.function == 0xd && leaf.index == index)
    };
    let supported = find(0).map_or(3, |leaf| u64::from(leaf.registers[0]));
    // Bits 3 and 4 (MPX) have values that are checked.
    let wanted = supported & 0b10_1110_0111;
    put(bytes, HEADER, wanted);
    // Control words of both floating point units have to be sensible.
    bytes[0..2].copy_from_slice(&0x037f_u16.to_le_bytes());
    bytes[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    let mut fill = |from: usize, to: usize| {
        let place = &mut bytes[from..to];
        place
            .iter_mut()
            .zip(0u64..)
            .for_each(|(byte, at)| *byte = (at * 7 + salt * 13 + 1) as u8);
    };
    (0..8).for_each(|register| fill(32 + register * 16, 32 + register * 16 + 10));
    fill(160, 416);
    for component in (2..10).filter(|bit| wanted >> bit & 1 == 1) {
        let leaf = find(component).unwrap();
        let (size, offset) = (leaf.registers[0] as usize, leaf.registers[1] as usize);
        // Protection keys: the component has 8 bytes of which 4 count.
        fill(offset, offset + if component == 9 { 4 } else { size });
    }
}

/// System call entry points and the like, different on each vCPU.
fn set_msrs(bytes: &mut [u8], salt: u64) {
    for entry in bytes.chunks_exact_mut(12) {
        let index = u32::from_le_bytes(entry[..4].try_into().unwrap());
        let value = match index {
            0xc000_0081 => 0x23_0010_0000_0000,
            0xc000_0082 => 0xffff_8000_0000_1000 + (salt << 20),
            0xc000_0084 => 0x4_7700,
            0xc000_0102 => 0x7f00_0000_0000 + salt,
            0x174 => 0x10,
            0x175 => 0xffff_8000_0000_2000 + salt,
            0x277 => 0x0007_0406_0007_0401,
            _ => continue,
        };
        put(entry, 4, value);
    }
}

/// Loads a state into a machine of a process of its own and says what that machine saves then.
fn through_another_process(config: &VmConfig, state: &[u8]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let process = VmProcess::start(directory.path(), "vm");
    let vm = process.connect().unwrap();
    let config = VmConfig::from_description(&config.to_description()).unwrap();
    vm.create(&config, None, Phase::Preparing { id: MigrationId(1) })
        .unwrap();
    let loaded = vm.load(state, false).unwrap();
    assert_eq!(loaded.refused_msrs, []);
    vm.pause_and_save(false).unwrap().sections
}

#[test]
fn a_saved_state_is_the_same_in_another_process() {
    if !has_kvm() {
        return;
    }
    for config in [config(1), config(2), irqchip_config(1), irqchip_config(2)] {
        let mut machine = Machine::create(config, "here").unwrap();
        machine.boot(&image(&STORM)).unwrap();
        let fresh = machine.pause_and_save(false).unwrap().sections;
        let wanted = unusual(&fresh, machine.config());
        let mut first = Machine::create(machine.config().clone(), "here").unwrap();
        assert_eq!(first.load(&wanted).unwrap().refused_msrs, []);
        let saved = first.pause_and_save(false).unwrap().sections;
        assert_same(&wanted, &saved);
        let again = through_another_process(first.config(), &saved);
        assert_same(&saved, &again);
    }
}

/// The counter goes on by the time that passed, on all vCPUs alike.
#[test]
fn clocks_go_on() {
    if !has_kvm() {
        return;
    }
    let mut source = machine(&ORDERS, 2);
    source.run().unwrap();
    let saved = source.pause_and_save(false).unwrap();
    let mut target = Machine::create(source.config().clone(), "here").unwrap();
    let mut page = [0; 4096];
    for pfn in (0..source.memory().page_count().get()).map(limosa_pages::Pfn::new) {
        source.memory().read_page(pfn, &mut page);
        target.memory().write_at(pfn.file_offset(), &page).unwrap();
    }
    target.load(&saved.sections).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let ready = target.get_ready(saved.times.stopped_first).unwrap();
    target.start(ready).unwrap();
    let again = target.pause_and_save(false).unwrap();
    let khz = u64::from(source.config().tsc_khz.unwrap());
    let passed = again
        .times
        .stopped_first
        .since(saved.times.stopped_first)
        .as_nanos() as u64;
    assert!(passed > 20_000_000);
    for vcpu in 0..2 {
        let tsc = |state: &[u8]| word(&section(state, Kind::TimeStampCounter, vcpu), 0);
        let ticks = tsc(&again.sections) - tsc(&saved.sections);
        let expect = passed * khz / 1_000_000;
        assert!(
            ticks.abs_diff(expect) < khz / 20,
            "vCPU {vcpu}: {ticks} instead of {expect} ticks"
        );
    }
    let clock = |state: &[u8]| word(&section(state, Kind::Clock, 0), 0);
    let clock_passed = clock(&again.sections) - clock(&saved.sections);
    assert!(
        clock_passed.abs_diff(passed) < 200_000,
        "{clock_passed} instead of {passed} ns"
    );
}

#[test]
fn states_of_other_machines_are_refused_whole() {
    if !has_kvm() {
        return;
    }
    let mut source = machine(&ORDERS, 1);
    let state = source.pause_and_save(false).unwrap().sections;
    let check = |config: VmConfig, state: &[u8], expect: &str| {
        let mut target = Machine::create(config, "here").unwrap();
        assert_eq!(target.load(state).unwrap_err().to_string(), expect);
        assert_eq!(target.run_state(), limosa_vmm::answer::RunState::Empty);
    };
    let other = "section machine 0 of the state cannot be: it is of another kind of machine, or one with other memory, vCPUs or interrupt controllers";
    check(config(2), &state, other);
    check(irqchip_config(1), &state, other);
    let without = |kind: Kind| {
        let mut writer = Writer::default();
        for section in parse(&state)
            .unwrap()
            .iter()
            .filter(|section| section.kind != kind)
        {
            writer.write(section.kind, section.instance, section.bytes);
        }
        Writer::join(&[writer])
    };
    check(
        config(1),
        &without(Kind::Events),
        "the state lacks section vcpu.events 0",
    );
    check(
        config(1),
        &without(Kind::Clock),
        "the state lacks section clock 0",
    );
    let longer = edited(&state, |kind, _, bytes| {
        bytes.extend((kind == Kind::Registers).then_some(0))
    });
    check(
        config(1),
        &longer,
        "section vcpu.registers 0 of the state cannot be: it has 145 bytes, this host has 144",
    );
    let mut extra = Writer::default();
    for section in parse(&state).unwrap() {
        extra.write(section.kind, section.instance, section.bytes);
    }
    extra.write(Kind::Ports, 1, &[0; 4]);
    let expect = "the state has section vcpu.micro-ports 1, for which this machine has no place";
    check(config(1), &Writer::join(&[extra]), expect);
    // A register that no processor has, with a value: reported, since nothing depends on it.
    let strange = edited(&state, |kind, _, bytes| {
        if kind == Kind::Msrs {
            bytes.splice(0..0, [0x34, 0x12, 0, 0x40, 9, 0, 0, 0, 0, 0, 0, 0]);
        }
    });
    let mut target = Machine::create(config(1), "here").unwrap();
    let refused = target.load(&strange).unwrap().refused_msrs;
    assert_eq!(refused.len(), 1);
    assert_eq!((refused[0].index, refused[0].value), (0x4000_1234, 9));
}

/// The list of all sections is part of the format: whoever changes it sees it here.
#[test]
fn sections_are_the_golden_ones() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::create(irqchip_config(1), "here").unwrap();
    machine.boot(&image(&ORDERS)).unwrap();
    let state = machine.pause_and_save(false).unwrap().sections;
    let text: String = list(&state)
        .unwrap()
        .iter()
        .map(|section| {
            // These differ from host to host.
            let depends =
                ["vcpu.vectors", "vcpu.cpuid", "vcpu.msrs"].contains(&section.name.as_str());
            let bytes = if depends {
                "*".to_owned()
            } else {
                section.bytes.to_string()
            };
            format!(
                "{} {} version {} bytes {bytes}\n",
                section.name, section.instance, section.version
            )
        })
        .collect();
    check_golden("sections.txt", text.as_bytes());
}

/// The bytes of a state with made-up content.
#[test]
fn bytes_are_the_golden_ones() {
    let mut writer = Writer::default();
    let kinds = [
        Kind::Machine,
        Kind::Clock,
        Kind::Micro,
        Kind::Timer,
        Kind::InterruptController,
        Kind::RunState,
        Kind::Registers,
        Kind::SpecialRegisters,
        Kind::Vectors,
        Kind::VectorControl,
        Kind::DebugRegisters,
        Kind::LocalInterruptController,
        Kind::TimeStampCounter,
        Kind::Cpuid,
        Kind::Msrs,
        Kind::Events,
        Kind::Ports,
    ];
    for (number, kind) in (0u8..).zip(kinds) {
        writer.write(
            kind,
            u16::from(number % 3),
            &vec![number; usize::from(number)],
        );
    }
    let state = Writer::join(&[writer]);
    check_golden("state-1.bin", &state);
    assert_eq!(parse(&state).unwrap().len(), kinds.len());
}

fn check_golden(name: &str, bytes: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("LIMOSA_WRITE_GOLDEN").is_some() {
        fs::write(&path, bytes).unwrap();
    }
    let golden = fs::read(&path).unwrap();
    assert!(
        golden == bytes,
        "{name} has changed: if the format was meant to change, give it a new version and write the \
         file anew with LIMOSA_WRITE_GOLDEN=1\n{}",
        String::from_utf8_lossy(bytes)
    );
}
