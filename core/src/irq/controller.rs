//! What an interrupt controller is to those that raise interrupts.

use super::msi::MsiRoute;
use crate::bus::{MemTxResult, Requester};
use std::sync::Arc;

/// An interrupt controller or router. Reaches CPUs only through
/// [`VcpuHandle::set_pin`](crate::accel::VcpuHandle::set_pin), and never calls into a
/// device from here.
pub trait IrqController: Send + Sync {
    /// Input `pin` is now at `level`. Called only when it changes.
    fn set_input(&self, pin: u32, level: bool);

    /// Input `pin` was at `level` when a snapshot was made that is being restored. Controllers save their
    /// inputs and ignore this; gates, which do not, take it over and pass it on, silently.
    fn import_input(&self, _pin: u32, _level: bool) {}

    /// A message-signalled interrupt: `data` was written to `address`.
    fn msi(&self, _address: u64, _data: u32, _requester: Requester) -> MemTxResult {
        MemTxResult::AccessError
    }

    /// Whether a local APIC has `vector` requested or in service; `None` if whoever has them tells each end at once.
    /// The machine stands still.
    fn holds(&self, _vector: u8) -> Option<bool> {
        None
    }

    /// A way of its own for a message that is sent often, if there are any.
    fn msi_route(&self) -> Option<Arc<dyn MsiRoute>> {
        None
    }
}
