//! A port by which a guest's kernel says that it crashed.
//!
//! Spec: QEMU's `docs/specs/pvpanic`, the ISA device.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError, Stateless};

/// Where it is unless told otherwise.
pub const PORT: u16 = 0x505;
/// Access rules of the port.
pub use crate::ports::BYTE_PORTS as RULES;

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;
const SHUTDOWN: u8 = 4;

/// What the guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicEvent {
    /// It crashed, and the host is to deal with it.
    Panicked,
    /// It crashed, and a crash kernel deals with it.
    CrashLoaded,
    /// It wants to be turned off.
    ShutDown,
}

/// A panic port.
pub struct PvPanic {
    event: Box<dyn Fn(PanicEvent) + Send>,
}

impl PvPanic {
    /// A port that passes what the guest says to `event`, which must not wait.
    pub fn new(event: impl Fn(PanicEvent) + Send + 'static) -> Arc<Mutex<PvPanic>> {
        Arc::new(Mutex::new(PvPanic { event: Box::new(event) }))
    }
}

impl MutPioDevice for PvPanic {
    fn pio_read(&mut self, _: PioAccess) -> Result<u64, BusFault> {
        Ok((PANICKED | CRASH_LOADED | SHUTDOWN).into())
    }

    fn pio_write(&mut self, _: PioAccess, value: u64) -> Result<(), BusFault> {
        let value = value as u8;
        match value {
            _ if value & PANICKED != 0 => (self.event)(PanicEvent::Panicked),
            _ if value & CRASH_LOADED != 0 => (self.event)(PanicEvent::CrashLoaded),
            _ if value & SHUTDOWN != 0 => (self.event)(PanicEvent::ShutDown),
            _ => log::debug!(target: "guest_errors", "pvpanic: {value:#04x} is no event"),
        }
        Ok(())
    }
}

impl MutLifecycle for PvPanic {}

impl SaveRestore for PvPanic {
    const SCHEMA: Schema = Schema::new("pvpanic", 1);
    type State = Stateless;

    fn save_state(&self) -> Stateless {
        Stateless {}
    }

    fn restore_state(&mut self, _: Stateless) -> Result<(), SnapshotError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_round_trip, inb, outb};

    #[test]
    fn events() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let t = told.clone();
        let port = PvPanic::new(move |event| t.lock().unwrap().push(event));
        assert_eq!(inb(&*port, 0, 0), 7);
        for value in [1, 2, 4, 0, 0x80, 3] {
            outb(&*port, 0, 0, value);
        }
        use PanicEvent::{CrashLoaded, Panicked, ShutDown};
        assert_eq!(*told.lock().unwrap(), [Panicked, CrashLoaded, ShutDown, Panicked]);
        assert_round_trip(&port, &PvPanic::new(|_| {}));
    }
}
