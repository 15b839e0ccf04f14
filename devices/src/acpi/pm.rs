//! ACPI's fixed hardware: PM1 event and control registers, the power management timer, general-purpose events, and
//! the APM ports by which an operating system takes it over.
//!
//! Spec: ACPI 6.5, section 4.8; Intel ICH9 data sheet, 316972-004, section 13.8 (power management, SMI registers)
//! and 13.7 (APM ports); the same registers are those of the PIIX4 at other places.
//! Modelled: timer, power and sleep button, general-purpose events, SCI, power-off by SLP_EN, SCI_EN directly and by
//! APM command, SMI on APM commands.
//! Sleep with memory kept (S3) where the board can, until a button or the RTC's alarm wakes it; S4 is power-off.
//! Not modelled: other sleep states, which are refused by waking at once; bus master and global status,
//! SMIs of other sources, the TCO watchdog.
//! Checked with: its tests; register sequences of Linux's ACPI driver, SeaBIOS and OVMF.

use std::sync::{Arc, Mutex, Weak};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, PioAccess};
use mimus_core::clock::Timer;
use mimus_core::device::{MutLifecycle, MutPioDevice, ResetPhase, lock};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

use crate::timer::rate::Rate;

/// Region number of the block at PMBASE.
pub const REGION_BLOCK: u32 = 0;
/// Region number of the general-purpose events, where they are apart from the block.
pub const REGION_GPE: u32 = 1;
/// Region number of the two APM ports (0xb2).
pub const REGION_APM: u32 = 2;
/// First of the APM ports.
pub const APM_PORT: u16 = 0xb2;
/// Number of APM ports.
pub const APM_PORTS: u64 = 2;
/// Accesses the ports take.
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B4).with_unaligned();

/// The value of APM control that hands ACPI to the operating system (FADT ACPI_ENABLE).
pub const ACPI_ENABLE: u8 = 2;
/// The value that takes it back (FADT ACPI_DISABLE).
pub const ACPI_DISABLE: u8 = 3;
/// SLP_TYP of soft-off (`_S5`).
pub const SLEEP_TYPE_OFF: u8 = 0;
/// SLP_TYP of suspend to RAM (`_S3`).
pub const SLEEP_TYPE_RAM: u8 = 1;
/// SLP_TYP of suspend to disk (`_S4`): the system has saved itself, and is turned off.
pub const SLEEP_TYPE_DISK: u8 = 2;
/// Places in the block of the registers that the FADT names.
pub const PM1_EVENT: u64 = 0;
/// PM1 control.
pub const PM1_CONTROL: u64 = 4;
/// The timer.
pub const PM_TIMER: u64 = 8;

/// Where a chip has its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmLayout {
    /// Ports of the block.
    pub block: u64,
    /// Where in the block the general-purpose events are; `None`: in [`REGION_GPE`].
    pub gpe_offset: Option<u64>,
    /// Bytes of general-purpose status and enable registers together.
    pub gpe_bytes: u64,
    /// Where in the block SMI enable and, four bytes on, SMI status are.
    pub smi_offset: Option<u64>,
}

/// The ICH9's block.
pub const ICH9: PmLayout = PmLayout { block: 0x80, gpe_offset: Some(0x20), gpe_bytes: 16, smi_offset: Some(0x30) };
/// The PIIX4's block, with events at ports of their own.
pub const PIIX4: PmLayout = PmLayout { block: 0x40, gpe_offset: None, gpe_bytes: 4, smi_offset: None };

const CLOCK: Rate = Rate::from_hz(3_579_545);
const TIMER_MASK: u64 = 0xff_ffff;
/// The timer's status is set when its highest bit changes.
const TOGGLE_SHIFT: u32 = 23;

const STS_TIMER: u16 = 1;
const STS_POWER_BUTTON: u16 = 1 << 8;
const STS_SLEEP_BUTTON: u16 = 1 << 9;
const STS_RTC: u16 = 1 << 10;
const STS_WAKE: u16 = 1 << 15;
const ENABLE_BITS: u16 = STS_TIMER | 1 << 5 | STS_POWER_BUTTON | STS_SLEEP_BUTTON | STS_RTC;
const CNT_SCI_EN: u16 = 1;
const CNT_BM_RLD: u16 = 2;
const CNT_TYPE_SHIFT: u16 = 10;
const CNT_TYPE: u16 = 7 << CNT_TYPE_SHIFT;
const CNT_SLP_EN: u16 = 1 << 13;

const SMI_GLOBAL: u32 = 1;
const SMI_APMC: u32 = 1 << 5;

/// The registers, as saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    status: u16,
    enable: u16,
    control: u16,
    /// General-purpose status, then enable.
    gpe: Vec<u8>,
    /// Levels of the general-purpose inputs, as the status bits.
    gpe_lines: Vec<u8>,
    smi_enable: u32,
    smi_status: u32,
    apm_control: u8,
    apm_status: u8,
    /// Changes of the timer's highest bit up to the last look.
    toggles: u64,
    /// The system sleeps, with its memory kept.
    #[serde(default)]
    asleep: bool,
}

/// How the block is wired.
pub struct PmLines {
    /// System control interrupt, level-triggered.
    pub sci: IrqLine,
    /// Pulsed for a system management interrupt. `None`: there is no SMM, and firmware is told that it is set up
    /// already, so that it does not try.
    pub smi: Option<IrqLine>,
    /// The guest turns the machine off. With the block locked: must not wait.
    pub power_off: Box<dyn Fn() + Send>,
    /// How it sleeps; `None`: it cannot.
    pub suspend: Option<Suspend>,
}

/// What the block asks of the machine around a sleep. Called with the block locked: must not wait.
pub struct Suspend {
    /// Stop the processors, and let time and devices go on.
    pub sleep: Box<dyn Fn() + Send>,
    /// Wake: if the block still sleeps then ([`AcpiPm::is_asleep`]), [`AcpiPm::wake`], and a reset.
    pub wake: Box<dyn Fn() + Send>,
}

/// The fixed hardware.
pub struct AcpiPm {
    s: State,
    layout: PmLayout,
    lines: PmLines,
    timer: Timer,
    /// See [`AcpiPm::set_smi_lock`].
    smi_lock: bool,
    /// The reset that comes is a waking.
    waking: bool,
    /// The RTC's interrupt, as last seen.
    rtc: bool,
}

/// General-purpose events: pin `n` is event `n`.
struct Events(Arc<Mutex<AcpiPm>>);

impl AcpiPm {
    /// A block of this layout whose timer counts `timer`'s clock, the virtual one.
    pub fn new(layout: PmLayout, lines: PmLines, timer: Timer) -> Arc<Mutex<AcpiPm>> {
        let s = reset_state(&layout, lines.smi.is_some());
        let pm = AcpiPm { s, layout, lines, timer: timer.clone(), smi_lock: false, waking: false, rtc: false };
        let pm = Arc::new(Mutex::new(pm));
        let weak = Arc::downgrade(&pm);
        timer.bind(move || {
            if let Some(pm) = weak.upgrade() {
                lock(&pm).update();
            }
        });
        pm
    }

    /// The controller to make lines of general-purpose events with; a rising edge on pin `n` sets status bit `n`.
    pub fn events(pm: &Arc<Mutex<AcpiPm>>) -> Arc<dyn IrqController> {
        Arc::new(Events(pm.clone()))
    }

    /// The person asks the guest to turn off.
    pub fn press_power_button(&mut self) {
        self.s.status |= STS_POWER_BUTTON;
        self.update();
    }

    /// The person asks the guest to sleep.
    pub fn press_sleep_button(&mut self) {
        self.s.status |= STS_SLEEP_BUTTON;
        self.update();
    }

    /// A line for the RTC's interrupt, whose rise is an event and wakes.
    pub fn alarm(pm: &Arc<Mutex<AcpiPm>>) -> IrqLine {
        IrqLine::new(Arc::new(Alarm(Arc::downgrade(pm))), 0)
    }

    /// Whether the system sleeps with its memory kept.
    pub fn is_asleep(&self) -> bool {
        self.s.asleep
    }

    /// The reset that comes now wakes the system, if it sleeps: it finds why in the status register.
    pub fn wake(&mut self) {
        self.waking = self.s.asleep;
    }

    fn set_rtc(&mut self, level: bool) {
        if level && !std::mem::replace(&mut self.rtc, level) {
            self.s.status |= STS_RTC;
            self.update();
        }
        self.rtc = level;
    }

    fn event(&self) -> bool {
        let (status, enable) = self.s.gpe.split_at(self.s.gpe.len() / 2);
        status.iter().zip(enable).any(|(s, e)| s & e != 0)
    }

    /// What ends a sleep: a button always, other events if they are enabled (ACPI 6.5 section 4.8.3.1.1).
    fn wakes(&self) -> bool {
        let button = self.s.status & (STS_POWER_BUTTON | STS_SLEEP_BUTTON) != 0;
        button || self.event() || self.s.status & self.s.enable & STS_RTC != 0
    }

    /// Hands ACPI to the operating system as firmware's handler would, or takes it back: SCI_EN.
    pub fn set_acpi_enabled(&mut self, on: bool) {
        self.s.control = self.s.control & !CNT_SCI_EN | u16::from(on);
        self.update();
    }

    /// Whether writes of APM control are SMIs, for chips that say so outside of the block (PIIX4).
    pub fn set_apm_smi(&mut self, on: bool) {
        self.s.smi_enable = if on { SMI_APMC } else { 0 };
    }

    /// Whether the chip set's SMI_LOCK keeps the global enable of SMIs as it is. Kept by the chip that has the bit.
    pub fn set_smi_lock(&mut self, on: bool) {
        self.smi_lock = on;
    }

    /// Number of ports of [`REGION_BLOCK`].
    pub fn block_len(&self) -> u64 {
        self.layout.block
    }

    fn ticks(&self) -> u64 {
        CLOCK.ticks(self.timer.now())
    }

    fn sci(&self) -> bool {
        self.s.control & CNT_SCI_EN != 0 && (self.s.status & self.s.enable & ENABLE_BITS != 0 || self.event())
    }

    /// Notices what the timer did, drives the SCI, arms the timer.
    fn update(&mut self) {
        let toggles = self.ticks() >> TOGGLE_SHIFT;
        if toggles != self.s.toggles {
            self.s.toggles = toggles;
            self.s.status |= STS_TIMER;
        }
        if let Some(suspend) = self.lines.suspend.as_ref().filter(|_| self.s.asleep && self.wakes()) {
            (suspend.wake)();
        }
        self.lines.sci.set_level(self.sci());
        let wanted = self.s.enable & !self.s.status & STS_TIMER != 0;
        let next = CLOCK.ns((toggles + 1) << TOGGLE_SHIFT);
        self.timer.arm(if wanted { next } else { u64::MAX });
    }

    /// What is at `offset` of the block, and which byte of it.
    fn locate(&self, offset: u64) -> (Register, usize) {
        let gpe = |at: u64| self.layout.gpe_offset.filter(|g| (*g..g + self.layout.gpe_bytes).contains(&at));
        let smi = |at: u64| self.layout.smi_offset.filter(|s| (*s..s + 8).contains(&at));
        let byte = |base: u64| (offset - base) as usize;
        match offset {
            0..2 => (Register::Status, byte(0)),
            2..4 => (Register::Enable, byte(2)),
            PM1_CONTROL..6 => (Register::Control, byte(PM1_CONTROL)),
            PM_TIMER..12 => (Register::Timer, byte(PM_TIMER)),
            _ => match (gpe(offset), smi(offset)) {
                (Some(base), _) => (Register::Gpe, byte(base)),
                (_, Some(base)) if offset < base + 4 => (Register::SmiEnable, byte(base)),
                (_, Some(base)) => (Register::SmiStatus, byte(base + 4)),
                _ => (Register::None, 0),
            },
        }
    }

    fn read_byte(&self, register: Register, n: usize, ticks: u64) -> u8 {
        let wide = match register {
            Register::Status => self.s.status.into(),
            Register::Enable => self.s.enable.into(),
            Register::Control => self.s.control.into(),
            Register::Timer => ticks & TIMER_MASK,
            Register::Gpe => return self.s.gpe.get(n).copied().unwrap_or(0),
            Register::SmiEnable => self.s.smi_enable.into(),
            Register::SmiStatus => self.s.smi_status.into(),
            Register::None => 0,
        };
        (wide >> (8 * n)) as u8
    }

    fn write_byte(&mut self, register: Register, n: usize, value: u8) {
        if register == Register::Gpe {
            return self.write_gpe(n, value);
        }
        let (mask, wide) = (0xff << (8 * n), u32::from(value) << (8 * n));
        let merge = |old: u32| old & !mask | wide;
        match register {
            // "Cleared by writing ones."
            Register::Status => self.s.status &= !(wide as u16),
            Register::Enable => self.s.enable = merge(self.s.enable.into()) as u16 & ENABLE_BITS,
            Register::Control => self.write_control(merge(self.s.control.into()) as u16),
            Register::SmiEnable if self.lines.smi.is_some() => {
                let kept = if self.smi_lock { SMI_GLOBAL } else { 0 };
                self.s.smi_enable = merge(self.s.smi_enable) & !kept | self.s.smi_enable & kept;
            }
            Register::SmiStatus => self.s.smi_status &= !wide,
            _ => {}
        }
    }

    fn write_gpe(&mut self, n: usize, value: u8) {
        let half = self.s.gpe.len() / 2;
        match self.s.gpe.get_mut(n) {
            Some(byte) if n < half => *byte &= !value,
            Some(byte) => *byte = value,
            None => {}
        }
    }

    fn write_control(&mut self, value: u16) {
        self.s.control = value & (CNT_SCI_EN | CNT_BM_RLD | CNT_TYPE);
        if value & CNT_SLP_EN == 0 {
            return;
        }
        let sleep_type = ((value & CNT_TYPE) >> CNT_TYPE_SHIFT) as u8;
        match (sleep_type, &self.lines.suspend) {
            (SLEEP_TYPE_OFF, _) | (SLEEP_TYPE_DISK, Some(_)) => return (self.lines.power_off)(),
            (SLEEP_TYPE_RAM, Some(suspend)) => {
                self.s.asleep = true;
                return (suspend.sleep)();
            }
            _ => {}
        }
        log::warn!("the guest asks for sleep type {sleep_type}, which its tables do not name; it is woken at once");
        self.s.status |= STS_WAKE;
    }

    fn write_apm_control(&mut self, value: u8) {
        self.s.apm_control = value;
        match value {
            ACPI_ENABLE => self.s.control |= CNT_SCI_EN,
            ACPI_DISABLE => self.s.control &= !CNT_SCI_EN,
            _ => {}
        }
        let enabled = self.s.smi_enable & SMI_APMC != 0;
        if let Some(smi) = self.lines.smi.as_ref().filter(|_| enabled) {
            self.s.smi_status |= SMI_APMC;
            smi.pulse();
        }
    }

    fn set_event(&mut self, pin: u32, level: bool) {
        let (byte, bit) = ((pin / 8) as usize, 1 << (pin % 8));
        let Some(line) = self.s.gpe_lines.get_mut(byte) else { return };
        let rose = level && *line & bit == 0;
        *line = *line & !bit | if level { bit } else { 0 };
        if rose {
            self.s.gpe[byte] |= bit;
        }
        self.update();
    }
}

/// A register of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Status,
    Enable,
    Control,
    Timer,
    Gpe,
    SmiEnable,
    SmiStatus,
    None,
}

fn reset_state(layout: &PmLayout, smm: bool) -> State {
    let bytes = layout.gpe_bytes as usize;
    State {
        status: 0,
        enable: 0,
        control: 0,
        gpe: vec![0; bytes],
        gpe_lines: vec![0; bytes / 2],
        // What firmware sets when it has installed its handler.
        smi_enable: if smm { 0 } else { SMI_APMC | SMI_GLOBAL },
        smi_status: 0,
        apm_control: 0,
        apm_status: 0,
        toggles: 0,
        asleep: false,
    }
}

/// The RTC's interrupt, as an event.
struct Alarm(Weak<Mutex<AcpiPm>>);

impl IrqController for Alarm {
    fn set_input(&self, _pin: u32, level: bool) {
        if let Some(pm) = self.0.upgrade() {
            lock(&pm).set_rtc(level);
        }
    }

    fn import_input(&self, _pin: u32, level: bool) {
        if let Some(pm) = self.0.upgrade() {
            lock(&pm).rtc = level;
        }
    }
}

impl IrqController for Events {
    fn set_input(&self, pin: u32, level: bool) {
        lock(&self.0).set_event(pin, level);
    }
}

impl MutPioDevice for AcpiPm {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        self.update();
        // The timer is read as a whole.
        let ticks = self.ticks();
        let byte = |n: u64| {
            let offset = u64::from(a.offset) + n;
            match a.region {
                REGION_APM if offset == 0 => self.s.apm_control,
                REGION_APM => self.s.apm_status,
                REGION_GPE => self.s.gpe.get(offset as usize).copied().unwrap_or(0),
                _ => {
                    let (register, n) = self.locate(offset);
                    self.read_byte(register, n, ticks)
                }
            }
        };
        Ok((0..a.size.bytes()).fold(0, |value, n| value | u64::from(byte(n)) << (8 * n)))
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        self.update();
        for n in 0..a.size.bytes() {
            let (offset, byte) = (u64::from(a.offset) + n, (value >> (8 * n)) as u8);
            match a.region {
                REGION_APM if offset == 0 => self.write_apm_control(byte),
                REGION_APM => self.s.apm_status = byte,
                REGION_GPE => self.write_gpe(offset as usize, byte),
                _ => {
                    let (register, n) = self.locate(offset);
                    self.write_byte(register, n, byte);
                }
            }
        }
        self.update();
        Ok(())
    }
}

impl MutLifecycle for AcpiPm {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => {
                let lines = std::mem::take(&mut self.s.gpe_lines);
                let toggles = self.ticks() >> TOGGLE_SHIFT;
                let mut fresh = reset_state(&self.layout, self.lines.smi.is_some());
                if std::mem::take(&mut self.waking) {
                    let why = self.s.status & (STS_POWER_BUTTON | STS_SLEEP_BUTTON | STS_RTC);
                    fresh.status = why | STS_WAKE;
                }
                self.s = State { gpe_lines: lines, toggles, ..fresh };
            }
            ResetPhase::Hold => self.update(),
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        self.update();
    }
}

impl SaveRestore for AcpiPm {
    const SCHEMA: Schema = Schema::new("acpi-pm", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let invalid = |field, reason: String| Err(SnapshotError::invalid(Self::SCHEMA, field, reason));
        let bytes = self.layout.gpe_bytes as usize;
        if state.gpe.len() != bytes || state.gpe_lines.len() != bytes / 2 {
            return invalid("gpe", format!("{} bytes instead of {bytes}", state.gpe.len()));
        }
        if state.enable & !ENABLE_BITS != 0 || state.control & !(CNT_SCI_EN | CNT_BM_RLD | CNT_TYPE) != 0 {
            return invalid("enable, control", format!("{:#06x}, {:#06x}", state.enable, state.control));
        }
        if state.asleep && self.lines.suspend.is_none() {
            return invalid("asleep", "this machine does not sleep".to_owned());
        }
        self.s = state;
        self.timer.disarm();
        self.lines.sci.import_level(self.sci());
        Ok(())
    }
}

#[cfg(test)]
#[path = "pm_tests.rs"]
mod tests;
