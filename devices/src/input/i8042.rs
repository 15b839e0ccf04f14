//! The PC's keyboard controller with a PS/2 keyboard and a PS/2 mouse.
//!
//! Spec: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller"; Intel 8042
//! as programmed there.
//! Modelled: output buffer with its two sources, command byte, translation to scan code set 1, self-tests, output
//! port with reset and A20, all that the PC's programs use. Bytes arrive as soon as the last one was read.
//! Not modelled: passwords, timeouts and parity errors, the controller's other RAM (reads as 0).
//! Checked with: its tests; register sequences of Linux's i8042, atkbd and psmouse drivers, and of SeaBIOS.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use mimus_core::backend::{InputEvent, InputSink};
use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice, ResetPhase, lock};
use mimus_core::irq::IrqLine;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

use super::ps2::keyboard::Keyboard;
use super::ps2::mouse::Mouse;
use super::ps2::scancodes::translate;

/// Region number of the data port (0x60).
pub const REGION_DATA: u32 = 0;
/// Region number of the status and command port (0x64).
pub const REGION_COMMAND: u32 = 1;
/// Access rules of its ports.
pub use crate::ports::BYTE_PORTS as RULES;

const STATUS_FULL: u8 = 0x01;
const STATUS_COMMAND: u8 = 0x08;
/// "Inhibit switch": the keyboard is not locked.
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_AUX: u8 = 0x20;

const CCB_INT: u8 = 0x01;
const CCB_AUX_INT: u8 = 0x02;
const CCB_SYSTEM: u8 = 0x04;
const CCB_DISABLE: u8 = 0x10;
const CCB_AUX_DISABLE: u8 = 0x20;
const CCB_TRANSLATE: u8 = 0x40;
/// As firmware leaves it, for kernels that are started without.
const CCB_RESET: u8 = CCB_INT | CCB_AUX_INT | CCB_TRANSLATE;

/// Output port: the CPU is not reset.
const OUT_RUN: u8 = 0x01;
const OUT_A20: u8 = 0x02;
const OUT_FULL: u8 = 0x10;
const OUT_AUX_FULL: u8 = 0x20;
const OUT_RESET: u8 = OUT_RUN | OUT_A20 | 0xc0;
/// What the input port reads as: not locked, colour display, no jumpers.
const INPUT_PORT: u8 = 0xa0;

const READ_CCB: u8 = 0x20;
const WRITE_CCB: u8 = 0x60;
const DISABLE_AUX: u8 = 0xa7;
const ENABLE_AUX: u8 = 0xa8;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE: u8 = 0xad;
const ENABLE: u8 = 0xae;
const READ_INPUT: u8 = 0xc0;
const READ_OUTPUT: u8 = 0xd0;
const WRITE_OUTPUT: u8 = 0xd1;
const WRITE_BUFFER: u8 = 0xd2;
const WRITE_AUX_BUFFER: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
const A20_OFF: u8 = 0xdd;
const A20_ON: u8 = 0xdf;
const READ_TEST: u8 = 0xe0;
const PULSE: u8 = 0xf0;

const SELF_TEST_PASSED: u8 = 0x55;
/// The controller's own bytes that wait for the output buffer, at most.
const OWN: usize = 16;

/// A byte for the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputByte {
    data: u8,
    /// Of the mouse.
    aux: bool,
}

/// The controller and what is on it, as saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The command byte.
    ccb: u8,
    output_port: u8,
    /// The command whose parameter the next write of the data port is.
    command: Option<u8>,
    /// The last write was of the command port.
    wrote_command: bool,
    /// The output buffer.
    output: Option<OutputByte>,
    /// What it held last.
    last: u8,
    /// Bytes of the controller's own that wait for the output buffer.
    own: VecDeque<OutputByte>,
    /// A release prefix was translated.
    released: bool,
    keyboard: Keyboard,
    mouse: Mouse,
}

/// How a controller is wired.
#[derive(Default)]
pub struct I8042Lines {
    /// Keyboard interrupt: IRQ 1.
    pub keyboard: IrqLine,
    /// Mouse interrupt: IRQ 12.
    pub mouse: IrqLine,
    /// A20 passes.
    pub a20: IrqLine,
}

/// Resets the CPUs. With the controller locked: must not wait.
pub type ResetRequest = Box<dyn Fn() + Send>;

/// A keyboard controller.
pub struct I8042 {
    s: State,
    lines: I8042Lines,
    reset: ResetRequest,
}

struct Sink(Arc<Mutex<I8042>>);

impl I8042 {
    /// A controller with keyboard and mouse; its reset output calls `reset`.
    pub fn new(lines: I8042Lines, reset: ResetRequest) -> Arc<Mutex<I8042>> {
        let this = I8042 { s: reset_state(), lines, reset };
        this.lines.a20.raise();
        Arc::new(Mutex::new(this))
    }

    /// Where what a person does goes.
    pub fn sink(this: &Arc<Mutex<I8042>>) -> Arc<dyn InputSink> {
        Arc::new(Sink(this.clone()))
    }

    /// The keyboard's lights: Scroll, Num and Caps Lock in bits 0 to 2.
    pub fn leds(&self) -> u8 {
        self.s.keyboard.leds()
    }

    fn input(&mut self, events: &[InputEvent]) {
        for event in events {
            match *event {
                InputEvent::Key { key, down } => self.s.keyboard.key(key, down),
                InputEvent::Button { button, down } => self.s.mouse.button(button, down),
                InputEvent::Motion { dx, dy } => self.s.mouse.motion(dx, dy),
                InputEvent::Wheel { clicks } => self.s.mouse.wheel(clicks),
                _ => {}
            }
        }
        self.s.mouse.report();
        self.update();
    }

    /// Fills the output buffer if it is empty, and drives the interrupts.
    fn update(&mut self) {
        while self.s.output.is_none() {
            let Some(byte) = self.s.next_byte() else { break };
            self.s.output = byte;
        }
        let (keyboard, mouse) = self.s.interrupts();
        self.lines.keyboard.set_level(keyboard);
        self.lines.mouse.set_level(mouse);
    }

    fn status(&self) -> u8 {
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        bit(self.s.output.is_some(), STATUS_FULL)
            | self.s.ccb & CCB_SYSTEM
            | bit(self.s.wrote_command, STATUS_COMMAND)
            | STATUS_UNLOCKED
            | bit(self.s.output.is_some_and(|o| o.aux), STATUS_AUX)
    }

    fn read_data(&mut self) -> u8 {
        if let Some(byte) = self.s.output.take() {
            self.s.last = byte.data;
            // Empty for a moment, which edge-triggered inputs must see.
            self.lines.keyboard.lower();
            self.lines.mouse.lower();
            self.update();
        }
        self.s.last
    }

    fn own(&mut self, data: u8, aux: bool) {
        if self.s.own.len() < OWN {
            self.s.own.push_back(OutputByte { data, aux });
        }
    }

    fn set_output_port(&mut self, value: u8) {
        self.s.output_port = value;
        self.lines.a20.set_level(value & OUT_A20 != 0);
        if value & OUT_RUN == 0 {
            (self.reset)();
        }
    }

    fn command(&mut self, command: u8) {
        self.s.command = None;
        match command {
            READ_CCB => self.own(self.s.ccb, false),
            0x21..=0x3f => self.own(0, false),
            WRITE_CCB..=0x7f | WRITE_OUTPUT..=WRITE_AUX => self.s.command = Some(command),
            DISABLE_AUX => self.s.ccb |= CCB_AUX_DISABLE,
            ENABLE_AUX => self.s.ccb &= !CCB_AUX_DISABLE,
            TEST_AUX | TEST_KEYBOARD => self.own(0, false),
            SELF_TEST => {
                self.s.ccb |= CCB_SYSTEM;
                self.own(SELF_TEST_PASSED, false);
            }
            DISABLE => self.s.ccb |= CCB_DISABLE,
            ENABLE => self.s.ccb &= !CCB_DISABLE,
            READ_INPUT => self.own(INPUT_PORT, false),
            READ_OUTPUT => {
                let full = self.s.output.map_or(0, |o| if o.aux { OUT_AUX_FULL } else { OUT_FULL });
                self.own(self.s.output_port & !(OUT_FULL | OUT_AUX_FULL) | full, false);
            }
            A20_OFF => self.set_output_port(self.s.output_port & !OUT_A20),
            A20_ON => self.set_output_port(self.s.output_port | OUT_A20),
            READ_TEST => self.own(0, false),
            // "Pulses bits that are 0 low for about 6 µs": bit 0 is the CPU's reset.
            PULSE.. if command & OUT_RUN == 0 => (self.reset)(),
            PULSE.. => {}
            _ => log::debug!(target: "guest_errors", "8042: {command:#04x} is no command"),
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.s.command.take() {
            Some(WRITE_CCB) => self.s.ccb = value & 0x77,
            Some(WRITE_OUTPUT) => self.set_output_port(value),
            Some(WRITE_BUFFER) => self.own(value, false),
            Some(WRITE_AUX_BUFFER) => self.own(value, true),
            Some(WRITE_AUX) => {
                self.s.ccb &= !CCB_AUX_DISABLE;
                self.s.mouse.write(value);
            }
            Some(_) => {}
            None => {
                // Sending to the keyboard enables its interface.
                self.s.ccb &= !CCB_DISABLE;
                self.s.keyboard.write(value);
            }
        }
    }
}

impl State {
    /// What goes into the output buffer next: `None` if there is nothing, `Some(None)` if a byte was swallowed.
    fn next_byte(&mut self) -> Option<Option<OutputByte>> {
        if let Some(byte) = self.own.pop_front() {
            return Some(Some(byte));
        }
        if self.ccb & CCB_DISABLE == 0
            && let Some(byte) = self.keyboard.take()
        {
            let data = match self.ccb & CCB_TRANSLATE {
                0 => Some(byte),
                _ => translate(byte, &mut self.released),
            };
            return Some(data.map(|data| OutputByte { data, aux: false }));
        }
        if self.ccb & CCB_AUX_DISABLE != 0 {
            return None;
        }
        self.mouse.take().map(|data| Some(OutputByte { data, aux: true }))
    }

    /// Levels of the keyboard's and the mouse's interrupt.
    fn interrupts(&self) -> (bool, bool) {
        let full = |aux| self.output.is_some_and(|o| o.aux == aux);
        (full(false) && self.ccb & CCB_INT != 0, full(true) && self.ccb & CCB_AUX_INT != 0)
    }
}

fn reset_state() -> State {
    State {
        ccb: CCB_RESET,
        output_port: OUT_RESET,
        command: None,
        wrote_command: true,
        output: None,
        last: 0,
        own: VecDeque::new(),
        released: false,
        keyboard: Keyboard::default(),
        mouse: Mouse::default(),
    }
}

impl InputSink for Sink {
    fn input(&self, events: &[InputEvent]) {
        lock(&self.0).input(events);
    }
}

impl MutPioDevice for I8042 {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        Ok(if a.region == REGION_DATA { self.read_data() } else { self.status() }.into())
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        self.s.wrote_command = a.region != REGION_DATA;
        if self.s.wrote_command {
            self.command(value as u8);
        } else {
            self.write_data(value as u8);
        }
        self.update();
        Ok(())
    }
}

impl MutLifecycle for I8042 {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => self.s = reset_state(),
            ResetPhase::Hold => {
                self.update();
                self.lines.a20.raise();
            }
            ResetPhase::Exit => {}
        }
    }
}

impl SaveRestore for I8042 {
    const SCHEMA: Schema = Schema::new("i8042", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let invalid = |field, reason: String| SnapshotError::invalid(Self::SCHEMA, field, reason);
        state.keyboard.check().map_err(|e| invalid("keyboard", e))?;
        state.mouse.check().map_err(|e| invalid("mouse", e))?;
        if state.ccb & !0x77 != 0 || state.own.len() > OWN {
            return Err(invalid("ccb, own", format!("{:#04x}, {} bytes", state.ccb, state.own.len())));
        }
        self.s = state;
        let (keyboard, mouse) = self.s.interrupts();
        self.lines.keyboard.import_level(keyboard);
        self.lines.mouse.import_level(mouse);
        // Whoever gates A20 may not keep what it was told.
        self.lines.a20.set_level(self.s.output_port & OUT_A20 != 0);
        Ok(())
    }
}

#[cfg(test)]
#[path = "i8042_tests.rs"]
mod tests;
