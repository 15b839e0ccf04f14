//! The generic event device, and ACPI's registers for hardware-reduced machines: power button, power-off, reset.
//!
//! Spec: ACPI 6.5, sections 5.6.9 (GED), 4.8.3.7 (sleep control and status), 4.8.3.6 (reset register). Where events
//! are read is not ACPI's matter but the AML's: a register of 32 bits that shows them and is cleared by reading.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{MutLifecycle, MutMmioDevice, ResetPhase};
use mimus_core::irq::IrqLine;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// Region number of the event register.
pub const REGION_EVENTS: u32 = 0;
/// Region number of sleep control, sleep status and reset, a byte each.
pub const REGION_REGISTERS: u32 = 1;
/// Bytes of [`REGION_EVENTS`].
pub const EVENTS_SIZE: u64 = 4;
/// Bytes of [`REGION_REGISTERS`].
pub const REGISTERS_SIZE: u64 = 3;
/// Accesses the event register takes.
pub const EVENTS_RULES: AccessRules = AccessRules::only(AccessSize::B4);
/// Accesses the registers take.
pub const REGISTERS_RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B1).with_unaligned();

/// Event: the power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1 << 1;
/// Place of sleep control in [`REGION_REGISTERS`].
pub const SLEEP_CONTROL: u64 = 0;
/// Place of sleep status.
pub const SLEEP_STATUS: u64 = 1;
/// Place of the reset register.
pub const RESET: u64 = 2;
/// The value that resets.
pub const RESET_VALUE: u8 = 0x42;
/// SLP_TYP of soft-off (`_S5`).
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const WAK_STS: u8 = 1 << 7;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GedRequest {
    /// Power off.
    PowerOff,
    /// Reset the machine.
    Reset,
}

/// The registers, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    events: u32,
    sleep_status: u8,
}

/// A generic event device.
pub struct Ged {
    s: State,
    irq: IrqLine,
    request: Box<dyn Fn(GedRequest) + Send>,
}

impl Ged {
    /// A device that raises `irq` while there are events, and passes requests to `request`, which must not wait.
    pub fn new(irq: IrqLine, request: impl Fn(GedRequest) + Send + 'static) -> Arc<Mutex<Ged>> {
        Arc::new(Mutex::new(Ged { s: State::default(), irq, request: Box::new(request) }))
    }

    /// The person asks the guest to turn off.
    pub fn press_power_button(&mut self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// Something happened.
    pub fn raise(&mut self, event: u32) {
        self.s.events |= event;
        self.update();
    }

    fn update(&self) {
        self.irq.set_level(self.s.events != 0);
    }

    fn sleep(&mut self, value: u8) {
        if value & SLP_EN == 0 {
            return;
        }
        match value >> SLP_TYP_SHIFT & 7 {
            SLEEP_TYPE_OFF => (self.request)(GedRequest::PowerOff),
            other => {
                log::warn!("the guest asks for sleep type {other}, which its tables do not name; it is woken at once");
                self.s.sleep_status |= WAK_STS;
            }
        }
    }
}

impl MutMmioDevice for Ged {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(match (a.region, a.offset) {
            (REGION_EVENTS, _) => {
                let events = std::mem::take(&mut self.s.events);
                self.update();
                events.into()
            }
            (_, SLEEP_STATUS) => self.s.sleep_status.into(),
            _ => 0,
        })
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        match (a.region, a.offset) {
            (REGION_EVENTS, _) => {}
            (_, SLEEP_CONTROL) => self.sleep(value as u8),
            (_, SLEEP_STATUS) => self.s.sleep_status &= !(value as u8),
            (_, RESET) if value as u8 == RESET_VALUE => (self.request)(GedRequest::Reset),
            _ => {}
        }
        Ok(())
    }
}

impl MutLifecycle for Ged {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => self.s = State::default(),
            ResetPhase::Hold => self.update(),
            ResetPhase::Exit => {}
        }
    }
}

impl SaveRestore for Ged {
    const SCHEMA: Schema = Schema::new("acpi-ged", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        if state.sleep_status & !WAK_STS != 0 {
            return Err(SnapshotError::invalid(Self::SCHEMA, "sleep_status", format!("{:#04x}", state.sleep_status)));
        }
        self.s = state;
        self.irq.import_level(self.s.events != 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Levels, assert_round_trip, mmio, reset, restore_with};
    use mimus_core::device::{MmioDevice, lock};

    fn at(region: u32, offset: u64, size: AccessSize) -> MmioAccess {
        MmioAccess { region, ..mmio(0, offset, size) }
    }

    #[test]
    fn events_and_requests() {
        let (levels, asked) = (Levels::new(), Arc::new(Mutex::new(Vec::new())));
        let a = asked.clone();
        let ged = Ged::new(levels.line(0), move |r| a.lock().unwrap().push(r));
        let read = |region, offset, size| ged.mmio_read(at(region, offset, size)).unwrap();
        let write = |offset, value| ged.mmio_write(at(REGION_REGISTERS, offset, AccessSize::B1), value).unwrap();
        lock(&ged).press_power_button();
        assert_eq!(levels.take(), [(0, true)]);
        assert_eq!(read(REGION_EVENTS, 0, AccessSize::B4), 2);
        assert_eq!(levels.take(), [(0, false)]);
        assert_eq!(read(REGION_EVENTS, 0, AccessSize::B4), 0);
        ged.mmio_write(at(REGION_EVENTS, 0, AccessSize::B4), 2).unwrap();
        write(SLEEP_CONTROL, 5 << 2);
        write(RESET, 0x41);
        assert_eq!(*asked.lock().unwrap(), []);
        write(SLEEP_CONTROL, 5 << 2 | 1 << 5);
        write(RESET, 0x42);
        assert_eq!(*asked.lock().unwrap(), [GedRequest::PowerOff, GedRequest::Reset]);
        write(SLEEP_CONTROL, 3 << 2 | 1 << 5);
        assert_eq!(read(REGION_REGISTERS, SLEEP_STATUS, AccessSize::B1), 0x80);
        lock(&ged).press_power_button();
        let other = Ged::new(levels.line(1), |_| {});
        levels.take();
        assert_round_trip(&ged, &other);
        reset(&*other);
        assert_eq!(levels.take(), [(1, false)]);
        assert!(restore_with(&other, "/sleep_status", 1).is_err());
        write(SLEEP_STATUS, 0x80);
        assert_eq!(read(REGION_REGISTERS, SLEEP_STATUS, AccessSize::B1), 0);
    }
}
