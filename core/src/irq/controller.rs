//! What an interrupt controller is to those that raise interrupts.

use crate::bus::{MemTxResult, Requester};

/// An interrupt controller or router. Reaches CPUs only through
/// [`VcpuHandle::set_pin`](crate::accel::VcpuHandle::set_pin), and never calls into a
/// device from here.
pub trait IrqController: Send + Sync {
    /// Input `pin` is now at `level`. Called only when it changes.
    fn set_input(&self, pin: u32, level: bool);

    /// Input `pin` is at `level` after a restore, in which controllers restore their own inputs: for
    /// what only passes levels on.
    fn import_input(&self, _pin: u32, _level: bool) {}

    /// A message-signalled interrupt: `data` was written to `address`.
    fn msi(&self, _address: u64, _data: u32, _requester: Requester) -> MemTxResult {
        MemTxResult::AccessError
    }
}
