//! I/O advanced programmable interrupt controller.
//!
//! Spec: Intel 82093AA data sheet, 290566-001; the EOI register of version 0x20 as in the ICH9 data sheet, 316972-004,
//! section 13.5.
//! Modelled: 24 redirection entries, edge and level triggering, remote IRR, end of interrupt by broadcast and by
//! register. Messages are sent as PCI messages (SDM volume 3 section 11.11), to whoever has the local APICs.
//! Not modelled: the serial bus with its arbitration and delivery status, polarity (lines are asserted or not).
//! Checked with: its tests; register sequences of Linux's io_apic driver.

use std::sync::{Arc, Mutex};

use mimus_arch::x86::irqchip::{
    IOAPIC_PINS, IoApicState, REDIRECTION_BITS, REDIRECTION_LEVEL, REDIRECTION_MASKED, REDIRECTION_REMOTE_IRR,
};
use mimus_core::accel::irqchip::IOAPIC_SCHEMA;
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess, Requester};
use mimus_core::device::{MutLifecycle, MutMmioDevice, ResetPhase, lock};
use mimus_core::irq::IrqController;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};

/// Where a PC has it.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes of the register map.
pub const SIZE: u64 = 0x1000;
/// Accesses the region takes.
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B4, AccessSize::B4);
/// Number of inputs.
pub const PINS: u32 = IOAPIC_PINS as u32;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_REDIRECTION: u8 = 0x10;
const INDEX_END: u8 = INDEX_REDIRECTION + 2 * IOAPIC_PINS as u8;

const VERSION: u32 = 0x20 | (PINS - 1) << 16;

/// Delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | REDIRECTION_REMOTE_IRR;
const MODE_SHIFT: u32 = 8;
const LOWEST_PRIORITY: u64 = 1;

const MESSAGE_ADDRESS: u64 = 0xfee0_0000;
const MESSAGE_LOGICAL: u64 = 1 << 2;
const MESSAGE_ASSERT: u32 = 1 << 14;
const MESSAGE_LEVEL: u32 = 1 << 15;

/// The message of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Told, with the I/O APIC locked, what message an input sends from now on; `None` while it is masked.
pub type RouteListener = Box<dyn Fn(u32, Option<Route>) + Send>;

/// An I/O APIC.
pub struct IoApic {
    s: IoApicState,
    apics: Arc<dyn IrqController>,
    listener: Option<RouteListener>,
}

/// The controller the board wires; pin `n` is input `n`.
struct Inputs(Arc<Mutex<IoApic>>);

impl IoApic {
    /// An I/O APIC that sends its messages by [`IrqController::msi`] of `apics`.
    pub fn new(apics: Arc<dyn IrqController>) -> Arc<Mutex<IoApic>> {
        Arc::new(Mutex::new(IoApic { s: IoApicState::reset(), apics, listener: None }))
    }

    /// The controller to make interrupt lines with; pin `n` is input `n`, 0 to 23.
    pub fn irqs(ioapic: &Arc<Mutex<IoApic>>) -> Arc<dyn IrqController> {
        Arc::new(Inputs(ioapic.clone()))
    }

    /// Names who is told of changes of the redirection table: an accelerator that has the local APICs must know
    /// which vectors' ends to report. Told of all inputs at once; must not call back.
    pub fn set_route_listener(&mut self, listener: RouteListener) {
        self.listener = Some(listener);
        self.tell_all();
    }

    /// The end-of-interrupt broadcast of a local APIC: the interrupt `vector` was served.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..IOAPIC_PINS {
            let entry = &mut self.s.redirection[pin];
            if *entry & REDIRECTION_REMOTE_IRR != 0 && *entry as u8 == vector {
                *entry &= !REDIRECTION_REMOTE_IRR;
                self.service_level(pin);
            }
        }
    }

    fn tell(&self, pin: usize) {
        if let Some(listener) = &self.listener {
            let entry = self.s.redirection[pin];
            listener(pin as u32, (entry & REDIRECTION_MASKED == 0).then(|| route(entry)));
        }
    }

    fn tell_all(&self) {
        (0..IOAPIC_PINS).for_each(|pin| self.tell(pin));
    }

    fn set_line(&mut self, pin: u32, level: bool) {
        if pin >= PINS {
            return;
        }
        let mask = 1 << pin;
        let rose = level && self.s.lines & mask == 0;
        self.s.lines = self.s.lines & !mask | if level { mask } else { 0 };
        let entry = self.s.redirection[pin as usize];
        if is_level(entry) {
            self.service_level(pin as usize);
        } else if rose && entry & REDIRECTION_MASKED == 0 {
            // "Edge-sensitive interrupts signaled on a masked interrupt pin are ignored."
            self.send(entry);
        }
    }

    /// Sends the message of a level-triggered input that is asserted and not being served.
    fn service_level(&mut self, pin: usize) {
        let entry = self.s.redirection[pin];
        let waits = entry & (REDIRECTION_MASKED | REDIRECTION_REMOTE_IRR) == 0;
        // Without a local APIC that accepts it there will be no end of interrupt: the next change tries again.
        if is_level(entry) && waits && self.s.lines >> pin & 1 != 0 && self.send(entry) {
            self.s.redirection[pin] |= REDIRECTION_REMOTE_IRR;
        }
    }

    /// True if somebody accepted it.
    fn send(&self, entry: u64) -> bool {
        let Route { address, data } = route(entry);
        self.apics.msi(address, data, Requester::Unspecified).is_ok()
    }

    fn read_window(&self) -> u32 {
        match self.s.select {
            INDEX_ID | INDEX_ARBITRATION => u32::from(self.s.id) << 24,
            INDEX_VERSION => VERSION,
            index @ INDEX_REDIRECTION..INDEX_END => {
                let at = index - INDEX_REDIRECTION;
                (self.s.redirection[usize::from(at / 2)] >> (32 * (at & 1))) as u32
            }
            _ => 0,
        }
    }

    fn write_window(&mut self, value: u32) {
        match self.s.select {
            INDEX_ID => self.s.id = (value >> 24) as u8 & 0xf,
            index @ INDEX_REDIRECTION..INDEX_END => {
                let at = index - INDEX_REDIRECTION;
                let shift = 32 * (at & 1);
                self.set_entry(usize::from(at / 2), u64::from(value) << shift, 0xffff_ffff << shift);
            }
            _ => {}
        }
    }

    fn set_entry(&mut self, pin: usize, value: u64, mask: u64) {
        let mask = mask & REDIRECTION_BITS & !READ_ONLY;
        let entry = &mut self.s.redirection[pin];
        *entry = *entry & !mask | value & mask;
        // Only a level-triggered interrupt has a remote IRR.
        if !is_level(*entry) {
            *entry &= !REDIRECTION_REMOTE_IRR;
        }
        self.tell(pin);
        self.service_level(pin);
    }
}

/// "Delivery mode": of SMI, NMI, INIT and ExtINT "trigger mode must be edge".
fn is_level(entry: u64) -> bool {
    entry & REDIRECTION_LEVEL != 0 && entry >> MODE_SHIFT & 7 <= LOWEST_PRIORITY
}

fn route(entry: u64) -> Route {
    let logical = if entry & 1 << 11 != 0 { MESSAGE_LOGICAL } else { 0 };
    let level = if is_level(entry) { MESSAGE_LEVEL } else { 0 };
    Route {
        address: MESSAGE_ADDRESS | (entry >> 56) << 12 | logical,
        data: entry as u32 & 0x7ff | MESSAGE_ASSERT | level,
    }
}

impl IrqController for Inputs {
    fn set_input(&self, pin: u32, level: bool) {
        lock(&self.0).set_line(pin, level);
    }
}

impl MutMmioDevice for IoApic {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(match a.offset {
            SELECT => self.s.select.into(),
            WINDOW => self.read_window().into(),
            _ => 0,
        })
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        match a.offset {
            SELECT => self.s.select = value as u8,
            WINDOW => self.write_window(value as u32),
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
        Ok(())
    }
}

impl MutLifecycle for IoApic {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => self.s = IoApicState { lines: self.s.lines, ..IoApicState::reset() },
            ResetPhase::Hold => self.tell_all(),
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        // Edges that a kernel's chip had not delivered when it was saved.
        let edges = std::mem::take(&mut self.s.edges);
        for pin in (0..IOAPIC_PINS).filter(|pin| edges >> pin & 1 != 0) {
            let entry = self.s.redirection[pin];
            if !is_level(entry) && entry & REDIRECTION_MASKED == 0 {
                self.send(entry);
            }
        }
        // Levels that were served when the machine was saved, but not lowered: see `save_state`.
        (0..IOAPIC_PINS).for_each(|pin| self.service_level(pin));
    }
}

impl SaveRestore for IoApic {
    const SCHEMA: Schema = IOAPIC_SCHEMA;
    type State = IoApicState;

    /// An accelerator with the local APICs may not have told an end of interrupt yet, which then is in nobody's state:
    /// what no local APIC has any more was ended.
    fn save_state(&self) -> IoApicState {
        let mut state = self.s.clone();
        for entry in state.redirection.iter_mut().filter(|entry| **entry & REDIRECTION_REMOTE_IRR != 0) {
            if self.apics.holds(*entry as u8) == Some(false) {
                *entry &= !REDIRECTION_REMOTE_IRR;
            }
        }
        state
    }

    fn restore_state(&mut self, state: IoApicState) -> Result<(), SnapshotError> {
        state.check().map_err(|(field, reason)| SnapshotError::invalid(Self::SCHEMA, field, reason))?;
        self.s = state;
        self.tell_all();
        Ok(())
    }
}

#[cfg(test)]
#[path = "ioapic_tests.rs"]
mod tests;
