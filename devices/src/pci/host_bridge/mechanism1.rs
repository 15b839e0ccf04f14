//! Configuration mechanism #1 of x86: an address port (0xcf8) and a data port (0xcfc).
//!
//! Spec: PCI §3.2.2.3.2. The owner maps both ports and passes accesses on.

use crate::pci::DevFn;
use crate::pci::bus::PciBus;
use mimus_core::bus::AccessSize;
use std::sync::Arc;

const ENABLE: u32 = 1 << 31;

/// The two registers.
pub struct ConfigMechanism1 {
    bus: Arc<PciBus>,
    /// CONFIG_ADDRESS, for the owner to save.
    pub address: u32,
}

impl ConfigMechanism1 {
    /// Registers for `bus`, which is bus 0.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: 0 }
    }

    /// Function and register that an access `at` bytes into the data port is about.
    fn target(&self, at: u16) -> Option<(DevFn, u16)> {
        let on_root = self.address & ENABLE != 0 && self.address >> 16 & 0xff == 0;
        let register = (self.address & 0xfc) as u16 + (at & 3);
        on_root.then_some((DevFn((self.address >> 8) as u8), register))
    }

    /// Reads 0xcfc + `at`.
    pub fn read_data(&self, at: u16, size: AccessSize) -> u32 {
        let value = self.target(at).map(|(f, reg)| self.bus.config_read(f, reg, size));
        value.unwrap_or(size.mask() as u32)
    }

    /// Writes 0xcfc + `at`.
    pub fn write_data(&self, at: u16, size: AccessSize, value: u32) {
        if let Some((f, reg)) = self.target(at) {
            self.bus.config_write(f, reg, size, value);
        }
    }
}
