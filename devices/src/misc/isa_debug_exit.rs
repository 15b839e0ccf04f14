//! A port that ends the program: how test guests say how they fared.
//!
//! Spec: as QEMU's `isa-debug-exit`: a write of `n` ends with the exit code `n << 1 | 1`, which is never 0.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError, Stateless};

/// Where it is unless told otherwise.
pub const PORT: u16 = 0xf4;
/// Number of ports.
pub const PORTS: u64 = 4;
/// Accesses the ports take.
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B4).with_unaligned();

/// An exit port.
pub struct IsaDebugExit {
    exit: Box<dyn Fn(u32) + Send>,
}

impl IsaDebugExit {
    /// A port that passes the exit code to `exit`, which must not wait.
    pub fn new(exit: impl Fn(u32) + Send + 'static) -> Arc<Mutex<IsaDebugExit>> {
        Arc::new(Mutex::new(IsaDebugExit { exit: Box::new(exit) }))
    }
}

impl MutPioDevice for IsaDebugExit {
    fn pio_read(&mut self, _: PioAccess) -> Result<u64, BusFault> {
        Ok(0)
    }

    fn pio_write(&mut self, _: PioAccess, value: u64) -> Result<(), BusFault> {
        (self.exit)((value as u32) << 1 | 1);
        Ok(())
    }
}

impl MutLifecycle for IsaDebugExit {}

impl SaveRestore for IsaDebugExit {
    const SCHEMA: Schema = Schema::new("isa-debug-exit", 1);
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
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn exits() {
        let code = Arc::new(AtomicU32::new(0));
        let c = code.clone();
        let port = IsaDebugExit::new(move |value| c.store(value, Ordering::Relaxed));
        assert_eq!(inb(&*port, 0, 0), 0);
        outb(&*port, 0, 0, 0x10);
        assert_eq!(code.load(Ordering::Relaxed), 0x21);
        outb(&*port, 0, 3, 0);
        assert_eq!(code.load(Ordering::Relaxed), 1);
        assert_round_trip(&port, &IsaDebugExit::new(|_| {}));
    }
}
