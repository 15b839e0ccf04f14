//! The PC's pair of programmable interrupt controllers.
//!
//! Spec: Intel 8259A data sheet, 231468-003 (section names below are its); the edge/level registers
//! (ELCR) as in the Intel 82371AB and ICH data sheets.
//! Modelled: initialisation, all operation commands, automatic end of interrupt, rotation, special mask,
//! special fully nested mode, poll, spurious vectors, ELCR.
//! Not modelled: MCS-80/85 mode (taken as 8086 mode), buffered mode (no effect on a PC). An edge that is
//! withdrawn before it is acknowledged stays latched: acknowledge cycles have no duration here, and
//! devices may pulse their lines.
//! Checked with: its tests; register sequences of Linux's i8259 driver.

use std::sync::{Arc, Mutex};

use mimus_arch::x86::irqchip::{ELCR_MASK, PicChipState, PicState};
use mimus_core::accel::irqchip::PIC_SCHEMA;
use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice, ResetPhase, lock};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};

/// Region number of the master's two ports (0x20).
pub const REGION_MASTER: u32 = 0;
/// Region number of the slave's two ports (0xa0).
pub const REGION_SLAVE: u32 = 1;
/// Region number of the two ELCR ports (0x4d0).
pub const REGION_ELCR: u32 = 2;

/// The master's input the slave is on.
const CASCADE: u8 = 2;

const ICW1: u8 = 0x10;
const ICW1_IC4: u8 = 1;
const ICW1_SINGLE: u8 = 2;
const ICW1_LTIM: u8 = 8;
const ICW4_AEOI: u8 = 2;
const ICW4_SFNM: u8 = 0x10;
const OCW3: u8 = 8;

/// What a chip does with its registers.
trait Chip {
    fn reset(&mut self);
    fn level_triggered(&self) -> u8;
    fn irr(&self, cascade: bool) -> u8;
    fn priority(&self, set: u8) -> u32;
    fn input_at(&self, priority: u32) -> u8;
    fn pending(&self, cascade: Option<bool>) -> Option<u8>;
    fn accept(&mut self, input: u8);
    fn set_line(&mut self, input: u8, level: bool);
    fn icw1(&mut self, value: u8);
    fn write_data(&mut self, value: u8);
    fn write_command(&mut self, value: u8);
    fn ocw3(&mut self, value: u8);
    fn ocw2(&mut self, value: u8);
}

impl Chip for PicChipState {
    fn reset(&mut self) {
        *self = Self { lines: self.lines, lowest: 7, ..Self::default() };
    }

    fn level_triggered(&self) -> u8 {
        if self.level_mode { 0xff } else { self.elcr }
    }

    /// IRR: latched edges, and the levels of level-triggered inputs.
    fn irr(&self, cascade: bool) -> u8 {
        let level = self.level_triggered();
        self.edges & !level | self.lines & level | u8::from(cascade) << CASCADE
    }

    /// 0 for the highest priority in `set`, 8 if it is empty.
    fn priority(&self, set: u8) -> u32 {
        set.rotate_right(u32::from((self.lowest + 1) & 7)).trailing_zeros()
    }

    fn input_at(&self, priority: u32) -> u8 {
        (priority as u8 + self.lowest + 1) & 7
    }

    /// The input to be acknowledged next. `cascade` is the slave's request, for a master.
    fn pending(&self, cascade: Option<bool>) -> Option<u8> {
        if !self.initialised {
            return None;
        }
        let request = self.priority(self.irr(cascade == Some(true)) & !self.imr);
        // "Special mask mode": a masked input in service holds back nothing.
        let served = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let serving = self.priority(served);
        // "Special fully nested mode": a slave in service is not locked out.
        let same_slave = self.special_fully_nested
            && cascade.is_some()
            && request == serving
            && request < 8
            && self.input_at(request) == CASCADE;
        (request < serving || same_slave).then(|| self.input_at(request))
    }

    /// INTA: the request becomes in service.
    fn accept(&mut self, input: u8) {
        self.edges &= !(1 << input);
        if !self.auto_eoi {
            self.isr |= 1 << input;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let mask = 1 << input;
        if level {
            // The latch needs a rising edge; level-triggered inputs do not use it.
            self.edges |= mask & !self.lines;
            self.lines |= mask;
        } else {
            self.lines &= !mask;
        }
    }

    /// "Initialization sequence", effects a to f of ICW1.
    fn icw1(&mut self, value: u8) {
        let elcr = self.elcr;
        self.reset();
        self.elcr = elcr;
        self.level_mode = value & ICW1_LTIM != 0;
        self.single = value & ICW1_SINGLE != 0;
        self.icw4_follows = value & ICW1_IC4 != 0;
        self.next_icw = 2;
    }

    fn write_data(&mut self, value: u8) {
        match self.next_icw {
            2 => self.base = value & 0xf8,
            // ICW3: how the pair is wired, which on a PC is fixed.
            3 => {}
            4 => {
                self.auto_eoi = value & ICW4_AEOI != 0;
                self.special_fully_nested = value & ICW4_SFNM != 0;
            }
            _ => return self.imr = value,
        }
        self.next_icw = match self.next_icw {
            2 if !self.single => 3,
            2 | 3 if self.icw4_follows => 4,
            _ => 0,
        };
        self.initialised = self.next_icw == 0;
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            self.icw1(value);
        } else if value & OCW3 != 0 {
            self.ocw3(value);
        } else {
            self.ocw2(value);
        }
    }

    fn ocw3(&mut self, value: u8) {
        if value & 4 != 0 {
            self.poll = true;
        }
        if value & 2 != 0 {
            self.read_isr = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    /// OCW2: bits R, SL, EOI.
    fn ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            command @ (1 | 5) => {
                // A masked input in service is not ended by a non-specific EOI in special mask mode.
                let served = if self.special_mask { self.isr & !self.imr } else { self.isr };
                let priority = self.priority(served);
                if priority < 8 {
                    let input = self.input_at(priority);
                    self.isr &= !(1 << input);
                    if command == 5 {
                        self.lowest = input;
                    }
                }
            }
            3 => self.isr &= !(1 << level),
            7 => {
                self.isr &= !(1 << level);
                self.lowest = level;
            }
            6 => self.lowest = level,
            _ => {}
        }
    }
}

/// The pair: inputs 0 to 7 are the master's, 8 to 15 the slave's.
pub struct I8259 {
    s: PicState,
    output: IrqLine,
}

/// The pair as the board wires it; pin `n` is IRQ `n`.
struct Inputs(Arc<Mutex<I8259>>);

impl I8259 {
    /// A pair whose INT output is `output`.
    pub fn new(output: IrqLine) -> Arc<Mutex<I8259>> {
        Arc::new(Mutex::new(I8259 { s: PicState::reset(), output }))
    }

    /// The controller to make interrupt lines with; pin `n` is IRQ `n`, 0 to 15 without 2.
    pub fn irqs(pic: &Arc<Mutex<I8259>>) -> Arc<dyn IrqController> {
        Arc::new(Inputs(pic.clone()))
    }

    /// INTA cycle: the vector. With nothing to acknowledge it is that of the chip's input 7
    /// ("the 8259A will issue a default IR7").
    pub fn acknowledge(&mut self) -> u8 {
        let s = &mut self.s;
        let vector = match s.master_pending() {
            Some(CASCADE) if !s.master.single => {
                s.master.accept(CASCADE);
                let pending = s.slave.pending(None);
                if let Some(input) = pending {
                    s.slave.accept(input);
                }
                s.slave.base | pending.unwrap_or(7)
            }
            Some(input) => {
                s.master.accept(input);
                s.master.base | input
            }
            None => s.master.base | 7,
        };
        self.update();
        vector
    }

    /// The level of INT.
    pub fn output(&self) -> bool {
        self.s.master_pending().is_some()
    }

    fn update(&self) {
        self.output.set_level(self.output());
    }

    fn set_irq(&mut self, irq: u32, level: bool) {
        match irq {
            0 | 1 | 3..8 => self.s.master.set_line(irq as u8, level),
            8..16 => self.s.slave.set_line(irq as u8 - 8, level),
            // The cascade, and pins a PC does not have.
            _ => return,
        }
        self.update();
    }

    fn poll_read(&mut self, region: u32) -> u8 {
        let pending = match region {
            REGION_MASTER => self.s.master_pending(),
            _ => self.s.slave.pending(None),
        };
        let chip = self.chip(region);
        chip.poll = false;
        if let Some(input) = pending {
            chip.accept(input);
        }
        self.update();
        pending.map_or(0, |input| 0x80 | input)
    }

    fn chip(&mut self, region: u32) -> &mut PicChipState {
        if region == REGION_MASTER { &mut self.s.master } else { &mut self.s.slave }
    }

    fn read(&mut self, region: u32, port: u16) -> u8 {
        if region == REGION_ELCR {
            return if port == 0 { self.s.master.elcr } else { self.s.slave.elcr };
        }
        if self.chip(region).poll {
            return self.poll_read(region);
        }
        let cascade = region == REGION_MASTER && self.s.slave.pending(None).is_some();
        let chip = self.chip(region);
        match port {
            0 if chip.read_isr => chip.isr,
            0 => chip.irr(cascade),
            _ => chip.imr,
        }
    }

    fn write(&mut self, region: u32, port: u16, value: u8) {
        match (region, port) {
            (REGION_ELCR, 0) => self.s.master.elcr = value & ELCR_MASK[0],
            (REGION_ELCR, _) => self.s.slave.elcr = value & ELCR_MASK[1],
            (_, 0) => self.chip(region).write_command(value),
            _ => self.chip(region).write_data(value),
        }
        self.update();
    }
}

/// What the master asks for, with the slave behind it.
trait Pair {
    fn master_pending(&self) -> Option<u8>;
}

impl Pair for PicState {
    fn master_pending(&self) -> Option<u8> {
        let cascade = !self.master.single && self.slave.pending(None).is_some();
        self.master.pending(Some(cascade))
    }
}

impl IrqController for Inputs {
    fn set_input(&self, pin: u32, level: bool) {
        lock(&self.0).set_irq(pin, level);
    }
}

impl MutPioDevice for I8259 {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        Ok(self.read(a.region, a.offset).into())
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        self.write(a.region, a.offset, value as u8);
        Ok(())
    }
}

impl MutLifecycle for I8259 {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => {
                self.s.master.reset();
                self.s.slave.reset();
            }
            ResetPhase::Hold => self.update(),
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        // Who listens may have been saved without the levels of its inputs, as a local APIC is.
        let level = self.output();
        self.output.import_level(!level);
        self.output.set_level(level);
    }
}

impl SaveRestore for I8259 {
    const SCHEMA: Schema = PIC_SCHEMA;
    type State = PicState;

    fn save_state(&self) -> PicState {
        self.s.clone()
    }

    fn restore_state(&mut self, state: PicState) -> Result<(), SnapshotError> {
        state.check().map_err(|(field, reason)| SnapshotError::invalid(Self::SCHEMA, field, reason))?;
        self.s = state;
        self.output.import_level(self.output());
        Ok(())
    }
}

#[cfg(test)]
#[path = "i8259_tests.rs"]
mod tests;
