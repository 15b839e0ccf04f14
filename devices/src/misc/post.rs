//! The port that power-on self-tests write their progress to. The last code can be read back; each is logged
//! (target `post`, level debug).

use std::sync::{Arc, Mutex};

use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice, ResetPhase};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// The port.
pub const PORT: u16 = 0x80;
/// Access rules of the port.
pub use crate::ports::BYTE_PORTS as RULES;

/// The register, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    code: u8,
}

/// A POST port.
pub struct PostPort {
    s: State,
}

impl PostPort {
    /// A port that shows 0.
    pub fn new() -> Arc<Mutex<PostPort>> {
        Arc::new(Mutex::new(PostPort { s: State::default() }))
    }

    /// The last code.
    pub fn code(&self) -> u8 {
        self.s.code
    }
}

impl MutPioDevice for PostPort {
    fn pio_read(&mut self, _: PioAccess) -> Result<u64, BusFault> {
        Ok(self.s.code.into())
    }

    fn pio_write(&mut self, _: PioAccess, value: u64) -> Result<(), BusFault> {
        // Kernels write here only to let time pass: the same value again and again.
        if self.s.code != value as u8 {
            log::debug!(target: "post", "{value:#04x}");
        }
        self.s.code = value as u8;
        Ok(())
    }
}

impl MutLifecycle for PostPort {
    fn reset(&mut self, phase: ResetPhase) {
        if phase == ResetPhase::Enter {
            self.s = State::default();
        }
    }
}

impl SaveRestore for PostPort {
    const SCHEMA: Schema = Schema::new("post", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        self.s = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_round_trip, inb, outb, reset};
    use mimus_core::device::lock;

    #[test]
    fn keeps_the_last_code() {
        let port = PostPort::new();
        outb(&*port, 0, 0, 0x55);
        outb(&*port, 0, 0, 0xaa);
        assert_eq!((inb(&*port, 0, 0), lock(&port).code()), (0xaa, 0xaa));
        let other = PostPort::new();
        assert_round_trip(&port, &other);
        assert_eq!(lock(&other).code(), 0xaa);
        reset(&*port);
        assert_eq!(inb(&*port, 0, 0), 0);
    }
}
