//! SiFive test finisher: powers off, resets, or ends with an exit code.
//!
//! Spec: as Linux's `syscon-poweroff`/`syscon-reboot` nodes and QEMU's `virt` machine use it: one 32-bit
//! register at 0. 0x5555 powers off, 0x7777 resets, 0x3333 | code << 16 fails with the code.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{MutLifecycle, MutMmioDevice};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError, Stateless};

/// Bytes of the register map.
pub const SIZE: u64 = 0x1000;
/// Accesses the region takes: OpenSBI writes 16 bits, Linux 32.
pub const RULES: AccessRules = AccessRules {
    valid_min: AccessSize::B2,
    valid_max: AccessSize::B4,
    ..AccessRules::sizes(AccessSize::B2, AccessSize::B4)
};
/// Value that powers off.
pub const POWER_OFF: u32 = 0x5555;
/// Value that resets.
pub const RESET: u32 = 0x7777;
const FAIL: u32 = 0x3333;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SysconRequest {
    /// Power off.
    PowerOff,
    /// Reset the machine.
    Reset,
    /// End with this exit code.
    Fail(u16),
}

/// A test finisher.
pub struct Syscon {
    request: Box<dyn Fn(SysconRequest) + Send>,
}

impl Syscon {
    /// A device that passes requests to `request`, which must not wait.
    pub fn new(request: impl Fn(SysconRequest) + Send + 'static) -> Arc<Mutex<Syscon>> {
        Arc::new(Mutex::new(Syscon { request: Box::new(request) }))
    }
}

impl MutMmioDevice for Syscon {
    fn mmio_read(&mut self, _: MmioAccess) -> Result<u64, BusFault> {
        Ok(0)
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        if a.offset != 0 {
            return Ok(());
        }
        match value as u32 & 0xffff {
            POWER_OFF => (self.request)(SysconRequest::PowerOff),
            RESET => (self.request)(SysconRequest::Reset),
            FAIL => (self.request)(SysconRequest::Fail((value >> 16) as u16)),
            other => log::debug!(target: "guest_errors", "test finisher: {other:#x} is no request"),
        }
        Ok(())
    }
}

impl MutLifecycle for Syscon {}

impl SaveRestore for Syscon {
    const SCHEMA: Schema = Schema::new("sifive-test", 1);
    type State = Stateless;

    fn save_state(&self) -> Stateless {
        Stateless {}
    }

    fn restore_state(&mut self, _: Stateless) -> Result<(), SnapshotError> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "syscon_tests.rs"]
mod tests;
