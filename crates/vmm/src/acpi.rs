//! The tables in which a stock kernel reads what hardware it has (ACPI 6.5).
//!
//! The hardware-reduced form: interrupt controllers, registers to sleep and to reset, and the devices.
//! Tables lie one after the other from [`START`], the root pointer first.

use crate::board::pc::{self, port};
use crate::virtio::{self, Place};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};

/// Where the tables begin, in the area in which firmware has its own.
pub(crate) const START: u64 = 0xe_0000;
/// What lies behind is the end of the firmware.
const END: u64 = 0xf_0000;
const LOCAL_CONTROLLERS: u32 = 0xfee0_0000;
const IO_CONTROLLER: u32 = 0xfec0_0000;
const OEM: [u8; 6] = *b"LIMOSA";
const TABLE: [u8; 8] = *b"LIMOSAVM";
const REVISION: u32 = 1;
/// Revision of the definition block: 64-bit integers.
const DEFINITIONS: u8 = 2;

/// Collects bytes.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(part: &dyn Aml) -> Vec<u8> {
    let mut bytes = Bytes::default();
    part.to_aml_bytes(&mut bytes);
    bytes.0
}

/// The tables of a machine with so many vCPUs and virtio devices, as they lie in memory from [`START`] on.
pub(crate) fn tables(vcpus: u8, devices: u16) -> Vec<u8> {
    let mut all = vec![0; Rsdp::len().next_multiple_of(64)];
    let mut place = |table: Vec<u8>| {
        let address = START + all.len() as u64;
        all.extend(table);
        all.resize(all.len().next_multiple_of(64), 0);
        address
    };
    let dsdt = place(definitions(vcpus, devices));
    let fadt = place(bytes(&fixed(dsdt)));
    let madt = place(bytes(&controllers(vcpus)));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    let root = bytes(&Rsdp::new(OEM, xsdt));
    all[..root.len()].copy_from_slice(&root);
    assert!(START + all.len() as u64 <= END, "tables are small");
    all
}

/// What is fixed: the registers for sleep and reset.
fn fixed(dsdt: u64) -> acpi_tables::fadt::FADT {
    let register = |port| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut builder = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    builder.reset_reg = register(port::RESET);
    builder.reset_value = pc::RESET_VALUE;
    builder.sleep_control_reg = register(port::SLEEP_CONTROL);
    builder.sleep_status_reg = register(port::SLEEP_STATUS);
    builder.hypervisor_vendor_identity = u64::from_le_bytes(TABLE).into();
    builder.finalize()
}

fn controllers(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(LOCAL_CONTROLLERS),
    );
    for vcpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_CONTROLLER, 0));
    madt
}

/// The devices, the processors among them.
fn definitions(vcpus: u8, devices: u16) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, DEFINITIONS, OEM, TABLE, REVISION);
    table.append_slice(&device(
        "_SB_.COM1",
        &aml::EISAName::new("PNP0501"),
        vec![
            &aml::IO::new(port::SERIAL, port::SERIAL, 0, 8),
            &aml::Interrupt::new(true, true, false, false, pc::SERIAL_LINE),
        ],
    ));
    table.append_slice(&device(
        "_SB_.RTC_",
        &aml::EISAName::new("PNP0B00"),
        vec![&aml::IO::new(port::CLOCK_INDEX, port::CLOCK_INDEX, 0, 2)],
    ));
    // As QEMU has named it; the driver of stock kernels looks for that.
    table.append_slice(&device(
        "_SB_.PEVT",
        &"QEMU0001",
        vec![&aml::IO::new(port::PANIC, port::PANIC, 1, 1)],
    ));
    for index in 0..devices {
        table.append_slice(&virtio_device(index));
    }
    for vcpu in 0..vcpus {
        let name = format!("_SB_.C{vcpu:03X}");
        table.append_slice(&bytes(&aml::Device::new(
            name.as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"ACPI0007"),
                &aml::Name::new("_UID".into(), &vcpu),
            ],
        )));
    }
    table.append_slice(&bytes(&aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&pc::OFF_STATE]),
    )));
    table.update_checksum();
    table.as_slice().to_vec()
}

/// A device of which there is one.
fn device(path: &str, identity: &dyn Aml, resources: Vec<&dyn Aml>) -> Vec<u8> {
    bytes(&aml::Device::new(
        path.into(),
        vec![
            &aml::Name::new("_HID".into(), identity),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources)),
        ],
    ))
}

/// A device as stock kernels look for it: `virtio_mmio` has this identity in its table.
fn virtio_device(index: u16) -> Vec<u8> {
    let Place { address, line } = Place::of(index);
    let address = u32::try_from(address).expect("below 4 GiB");
    bytes(&aml::Device::new(
        format!("_SB_.V{index:03X}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            // What it reads and writes is coherent with the processors' caches.
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, address, virtio::WINDOW_BYTES),
                    &aml::Interrupt::new(true, true, false, false, line),
                ]),
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows the pointers as a kernel does.
    #[test]
    fn tables_are_found_from_the_root() {
        let tables = tables(4, 2);
        let at = |address: u64| &tables[usize::try_from(address - START).unwrap()..];
        let word = |bytes: &[u8], offset: usize| {
            u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let table = |address: u64| {
            let bytes = at(address);
            let length = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
            assert_eq!(sum(&bytes[..length]), 0, "checksum of {:?}", &bytes[..4]);
            bytes[..length].to_vec()
        };
        let root = at(START);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root[..36])), (0, 0));
        let xsdt = table(word(root, 24));
        let [fadt, madt] = [36, 44].map(|offset| table(word(&xsdt, offset)));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(&table(word(&fadt, 140))[..4], b"DSDT");
        // Its flags: without the registers of older hardware, and with one to reset it. Where that and those to
        // sleep are, as ports.
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        let registers = [116, 244, 256].map(|offset| (fadt[offset], word(&fadt, offset + 4)));
        let ports = [port::RESET, port::SLEEP_CONTROL, port::SLEEP_STATUS];
        assert_eq!(registers, ports.map(|port| (1, u64::from(port))));
        let processors = madt[44..].chunks(8).filter(|entry| entry[..2] == [0, 8]);
        assert_eq!(processors.count(), 4);
    }
}
