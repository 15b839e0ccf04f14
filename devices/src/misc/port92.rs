//! System control port A: the fast ways to gate A20 and to reset the CPU.
//!
//! Spec: IBM PS/2 Hardware Interface Technical Reference; Intel ICH9 data sheet, 316972-004, section 13.7.2.
//! A20 passes if this port or the keyboard controller says so: the board joins both with an OR gate.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice, ResetPhase};
use mimus_core::irq::IrqLine;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// The port.
pub const PORT: u16 = 0x92;
/// Access rules of the port.
pub use crate::ports::BYTE_PORTS as RULES;

const INIT_NOW: u8 = 1;
const A20: u8 = 2;

/// The register, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    value: u8,
}

/// System control port A.
pub struct Port92 {
    s: State,
    a20: IrqLine,
    reset: Box<dyn Fn() + Send>,
}

impl Port92 {
    /// A port that lets A20 pass by `a20` and resets the CPUs by `reset`, which must not wait.
    pub fn new(a20: IrqLine, reset: impl Fn() + Send + 'static) -> Arc<Mutex<Port92>> {
        Arc::new(Mutex::new(Port92 { s: State::default(), a20, reset: Box::new(reset) }))
    }
}

impl MutPioDevice for Port92 {
    fn pio_read(&mut self, _: PioAccess) -> Result<u64, BusFault> {
        Ok(self.s.value.into())
    }

    fn pio_write(&mut self, _: PioAccess, value: u64) -> Result<(), BusFault> {
        let value = value as u8 & (INIT_NOW | A20);
        let init = value & !self.s.value & INIT_NOW != 0;
        self.s.value = value;
        self.a20.set_level(value & A20 != 0);
        if init {
            (self.reset)();
        }
        Ok(())
    }
}

impl MutLifecycle for Port92 {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => self.s = State::default(),
            ResetPhase::Hold => self.a20.lower(),
            ResetPhase::Exit => {}
        }
    }
}

impl SaveRestore for Port92 {
    const SCHEMA: Schema = Schema::new("port92", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        if state.value & !(INIT_NOW | A20) != 0 {
            return Err(SnapshotError::invalid(Self::SCHEMA, "value", format!("{:#04x}", state.value)));
        }
        self.s = state;
        // Whoever gates A20 may not keep what it was told.
        self.a20.set_level(self.s.value & A20 != 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Levels, assert_round_trip, inb, outb, reset, restore_with};
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a20_and_reset() {
        let (levels, resets) = (Levels::new(), Arc::new(AtomicU32::new(0)));
        let r = resets.clone();
        let port = Port92::new(levels.line(0), move || _ = r.fetch_add(1, Ordering::Relaxed));
        outb(&*port, 0, 0, 0xfe);
        assert_eq!((inb(&*port, 0, 0), levels.take()), (A20, vec![(0, true)]));
        outb(&*port, 0, 0, 3);
        outb(&*port, 0, 0, 3);
        assert_eq!(resets.load(Ordering::Relaxed), 1, "a rising bit");
        let other_levels = Levels::new();
        let other = Port92::new(other_levels.line(0), || {});
        assert_round_trip(&port, &other);
        assert_eq!(other_levels.take(), [(0, true)]);
        assert!(restore_with(&other, "/value", 4).is_err());
        reset(&*port);
        assert_eq!((inb(&*port, 0, 0), levels.take()), (0, vec![(0, false)]));
    }
}
