//! The traits of a device.
//!
//! Authors implement the `Mut…` forms with `&mut self` and put the device in one
//! [`Mutex`]; the forms with `&self`, which the machine calls, are implemented for
//! `Mutex<D>` here. Devices that need finer locks implement those by hand.

use super::lifecycle::Lifecycle;
use crate::bus::{BusFault, MmioAccess, PioAccess};
use crate::snapshot::Snapshot;
use std::any::Any;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A device with memory-mapped registers, as its author writes it.
pub trait MutMmioDevice: Send {
    /// Reads a register.
    fn mmio_read(&mut self, access: MmioAccess) -> Result<u64, BusFault>;
    /// Writes a register.
    fn mmio_write(&mut self, access: MmioAccess, value: u64) -> Result<(), BusFault>;
}

/// A device with x86 ports, as its author writes it.
pub trait MutPioDevice: Send {
    /// `IN`.
    fn pio_read(&mut self, access: PioAccess) -> Result<u64, BusFault>;
    /// `OUT`.
    fn pio_write(&mut self, access: PioAccess, value: u64) -> Result<(), BusFault>;
}

/// A device with memory-mapped registers, as the bus calls it: from any thread.
pub trait MmioDevice: Send + Sync {
    /// Reads a register.
    fn mmio_read(&self, access: MmioAccess) -> Result<u64, BusFault>;
    /// Writes a register.
    fn mmio_write(&self, access: MmioAccess, value: u64) -> Result<(), BusFault>;
}

/// A device with x86 ports, as the bus calls it: from any thread.
pub trait PioDevice: Send + Sync {
    /// `IN`.
    fn pio_read(&self, access: PioAccess) -> Result<u64, BusFault>;
    /// `OUT`.
    fn pio_write(&self, access: PioAccess, value: u64) -> Result<(), BusFault>;
}

/// Locks a device. A panic of another thread in the device does not spread.
pub fn lock<D: ?Sized>(device: &Mutex<D>) -> MutexGuard<'_, D> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: MutMmioDevice> MmioDevice for Mutex<D> {
    fn mmio_read(&self, access: MmioAccess) -> Result<u64, BusFault> {
        lock(self).mmio_read(access)
    }
    fn mmio_write(&self, access: MmioAccess, value: u64) -> Result<(), BusFault> {
        lock(self).mmio_write(access, value)
    }
}

impl<D: MutPioDevice> PioDevice for Mutex<D> {
    fn pio_read(&self, access: PioAccess) -> Result<u64, BusFault> {
        lock(self).pio_read(access)
    }
    fn pio_write(&self, access: PioAccess, value: u64) -> Result<(), BusFault> {
        lock(self).pio_write(access, value)
    }
}

/// What the machine keeps of every device.
pub trait Device: Lifecycle + Snapshot + Any {}

impl<T: Lifecycle + Snapshot + Any> Device for T {}
