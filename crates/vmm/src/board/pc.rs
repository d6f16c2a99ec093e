//! The devices of a PC by ports: a serial line for the console, the real-time clock, the keyboard
//! controller as far as it resets, the port of panics, and the registers by which ACPI sleeps and resets. Behind them, those
//! of [`crate::virtio`].
//!
//! Those by ports are handled on the thread of the vCPU that reaches for them, under a lock each, and none
//! writes the guest's memory.

use super::AfterOut;
use super::clock::RealTimeClock;
use crate::answer::ExitReason;
use crate::console::{Console, Keyboard, LOG_LINE_BYTES_MAX, Screen, Terminal};
use crate::state::{Kind, Section, StateError, Writer};
use crate::virtio::Devices;
use limosa_os::kvm::InterruptLine;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

/// Where the devices are.
pub(crate) mod port {
    /// First of eight.
    pub(crate) const SERIAL: u16 = 0x3f8;
    pub(crate) const CLOCK_INDEX: u16 = 0x70;
    pub(crate) const CLOCK_DATA: u16 = 0x71;
    /// State and commands of the keyboard controller.
    pub(crate) const KEYBOARD: u16 = 0x64;
    /// Where a kernel that panics says so (QEMU, `docs/specs/pvpanic`).
    pub(crate) const PANIC: u16 = 0x505;
    pub(crate) const SLEEP_CONTROL: u16 = 0x600;
    pub(crate) const SLEEP_STATUS: u16 = 0x601;
    pub(crate) const RESET: u16 = 0x602;
}

/// The line by which the serial port interrupts.
pub(crate) const SERIAL_LINE: u32 = 4;
/// What is written to reset.
pub(crate) const RESET_VALUE: u8 = 1;
/// The state in which a machine is off.
pub(crate) const OFF_STATE: u8 = 5;
/// Of the sleep register: the state, and the bit that enters it.
const SLEEP_STATE_SHIFT: u32 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;
/// Events of the panic port: a panic, which ends the guest, and one after which a second kernel saves what
/// was in memory, which goes on.
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;
/// The keyboard controller's pulse on the reset line.
const KEYBOARD_RESET: u8 = 0xfe;
const SERIAL_PORTS: u16 = 8;
/// Registers of the serial port, before the number of bytes that the guest has not read yet, these
/// bytes, and what it has begun to print as a line.
const SERIAL_FIELDS: usize = 9;

/// The devices.
#[derive(Debug)]
pub(crate) struct Pc {
    serial: Mutex<SerialPort>,
    clock: Mutex<RealTimeClock>,
    devices: Devices,
    screen: Arc<Screen>,
    /// The guest is paused.
    rests: AtomicBool,
    /// Its kernel said that it panicked, and goes on.
    has_panicked: AtomicBool,
}

type SerialPort = Serial<SerialLine, NoEvents, Console>;

/// The serial port's interrupt.
#[derive(Debug)]
struct SerialLine(InterruptLine);

impl Trigger for SerialLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse()
    }
}

impl Keyboard for Pc {
    fn type_in(&self, bytes: &[u8]) -> usize {
        let mut serial = self.serial();
        if self.rests.load(Ordering::SeqCst) {
            return 0;
        }
        // Nothing is taken while there is no room, or while the guest talks to itself.
        serial.enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}

impl Pc {
    /// The board of a machine with that name; the serial port interrupts by that line.
    ///
    /// # Errors
    /// There is no descriptor for its console.
    pub(crate) fn new(name: &str, line: InterruptLine, devices: Devices) -> io::Result<Self> {
        let screen = Arc::new(Screen::new()?);
        let console = Console::new(name, LOG_LINE_BYTES_MAX).shown_on(Arc::clone(&screen));
        Ok(Self {
            serial: Mutex::new(Serial::new(SerialLine(line), console)),
            clock: Mutex::new(RealTimeClock::new()),
            devices,
            screen,
            rests: AtomicBool::new(true),
            has_panicked: AtomicBool::new(false),
        })
    }

    /// Its serial line, as somebody sees it who watches and types.
    pub(crate) fn terminal(pc: &Arc<Self>) -> Terminal {
        let keyboard: Arc<Self> = Arc::clone(pc);
        Terminal::new(Arc::clone(&pc.screen), keyboard)
    }

    /// Whether the guest is paused, and so takes no input that its saved state would lack.
    pub(crate) fn set_resting(&self, rests: bool) {
        // Under the lock, so that whoever types has either done so or will see it.
        let _serial = self.serial();
        self.rests.store(rests, Ordering::SeqCst);
    }

    pub(crate) const fn devices(&self) -> &Devices {
        &self.devices
    }

    /// See [`super::Board::sections`].
    pub(crate) fn sections(&self) -> Vec<(Kind, u16)> {
        let mut sections = vec![(Kind::Serial, 0), (Kind::RealTimeClock, 0)];
        sections.extend(self.devices.sections());
        sections
    }

    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clock(&self) -> MutexGuard<'_, RealTimeClock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes a port.
    pub(crate) fn write(&self, port: u16, bytes: &[u8]) -> AfterOut {
        let Some(&value) = bytes.first() else {
            return AfterOut::GoOn;
        };
        if let Some(register) = serial_register(port) {
            for &byte in bytes {
                if let Err(error) = self.serial().write(register, byte) {
                    tracing::warn!(%error, "the console's interrupt is lost");
                }
            }
            return AfterOut::GoOn;
        }
        match (port, value) {
            (port::CLOCK_INDEX, _) => self.clock().set_index(value),
            (port::CLOCK_DATA, _) => self.clock().write(value),
            (port::KEYBOARD, KEYBOARD_RESET) | (port::RESET, RESET_VALUE) => {
                return AfterOut::End(ExitReason::Reset);
            }
            (port::PANIC, PANICKED) => return AfterOut::End(ExitReason::Panicked),
            (port::PANIC, CRASH_LOADED) => {
                // It may do so as often as it likes.
                if !self.has_panicked.swap(true, Ordering::Relaxed) {
                    tracing::warn!("the guest's kernel panicked: a second one takes over");
                }
            }
            (port::SLEEP_CONTROL, _) if value == OFF_STATE << SLEEP_STATE_SHIFT | SLEEP_ENABLE => {
                return AfterOut::End(ExitReason::PoweredOff);
            }
            _ => tracing::trace!(port, "write to a port that nobody has"),
        }
        AfterOut::GoOn
    }

    /// The guest reads a port.
    pub(crate) fn read(&self, port: u16) -> u8 {
        if let Some(register) = serial_register(port) {
            return self.serial().read(register);
        }
        match port {
            port::CLOCK_DATA => self.clock().read(SystemTime::now()),
            // What may be written there.
            port::PANIC => PANICKED | CRASH_LOADED,
            // Nothing to be read, ready for a command; not asleep.
            port::KEYBOARD | port::SLEEP_CONTROL | port::SLEEP_STATUS => 0,
            _ => {
                tracing::trace!(port, "read from a port that nobody has");
                u8::MAX
            }
        }
    }

    /// Appends its sections.
    pub(crate) fn save(&self, writer: &mut Writer) {
        let serial = self.serial();
        let bytes = encode(&serial.state(), &serial.writer().line);
        writer.write(Kind::Serial, 0, &bytes);
        drop(serial);
        writer.write(Kind::RealTimeClock, 0, &self.clock().save());
        self.devices.save(writer);
    }

    /// Takes its sections. An interrupt that the serial port was about to give is given again, which
    /// does no harm: its driver looks what there is.
    pub(crate) fn load(
        &self,
        serial: Section<'_>,
        clock: Section<'_>,
        devices: &[Section<'_>],
    ) -> Result<(), StateError> {
        let (state, begun) = decode(serial)?;
        let bytes = clock
            .bytes
            .try_into()
            .map_err(|_| clock.content("it has another size"))?;
        self.clock().load(bytes);
        let mut place = self.serial();
        let cannot = |error: &dyn std::fmt::Display| serial.content(error.to_string());
        let line = place
            .interrupt_evt()
            .0
            .try_clone()
            .map_err(|error| cannot(&error))?;
        let console = place.writer().behind(begun);
        *place = Serial::from_state(&state, SerialLine(line), NoEvents, console)
            .map_err(|error| cannot(&error))?;
        drop(place);
        self.devices.load(devices)
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(port::SERIAL)?;
    (register < SERIAL_PORTS).then(|| u8::try_from(register).expect("below eight"))
}

fn encode(state: &SerialState, line: &[u8]) -> Vec<u8> {
    let mut bytes = vec![
        state.baud_divisor_low,
        state.baud_divisor_high,
        state.interrupt_enable,
        state.interrupt_identification,
        state.line_control,
        state.line_status,
        state.modem_control,
        state.modem_status,
        state.scratch,
        u8::try_from(state.in_buffer.len()).expect("the port holds 64 bytes"),
    ];
    bytes.extend(&state.in_buffer);
    bytes.extend(line);
    bytes
}

/// The port, and the line that the guest has begun.
fn decode(section: Section<'_>) -> Result<(SerialState, Vec<u8>), StateError> {
    let too_short = || section.content("it is too short");
    let fields = section.bytes.split_first_chunk::<SERIAL_FIELDS>();
    let (fields, rest) = fields.ok_or_else(too_short)?;
    let (&count, rest) = rest.split_first().ok_or_else(too_short)?;
    let both = rest.split_at_checked(usize::from(count));
    let (input, line) = both.ok_or_else(too_short)?;
    if line.len() >= LOG_LINE_BYTES_MAX {
        return Err(section.content("its line is too long"));
    }
    let [
        low,
        high,
        enable,
        identification,
        control,
        status,
        modem,
        lines,
        scratch,
    ] = *fields;
    let state = SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: control,
        line_status: status,
        modem_control: modem,
        modem_status: lines,
        scratch,
        in_buffer: input.to_vec(),
    };
    Ok((state, line.to_vec()))
}
