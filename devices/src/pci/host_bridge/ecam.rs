//! Configuration space as memory (PCIe §7.2.2): 4 KiB for each function, 1 MiB for each bus.

use crate::pci::DevFn;
use crate::pci::bus::PciBus;
use mimus_core::bus::{BusFault, MmioAccess};
use mimus_core::device::MmioDevice;
use std::sync::Arc;

/// Bytes of configuration space per bus.
pub const ECAM_BUS_LEN: u64 = 1 << 20;

/// The configuration space of a root bus, which is bus 0; others read as all ones.
pub(super) struct Ecam {
    bus: Arc<PciBus>,
}

impl Ecam {
    pub fn new(bus: &Arc<PciBus>) -> Self {
        Self { bus: bus.clone() }
    }

    /// Function and register of an offset; `None` on another bus.
    fn decode(offset: u64) -> Option<(DevFn, u16)> {
        let on_root = offset >> 20 == 0;
        on_root.then_some((DevFn((offset >> 12) as u8), (offset & 0xfff) as u16))
    }
}

impl MmioDevice for Ecam {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        let value = Self::decode(a.offset).map(|(f, reg)| self.bus.config_read(f, reg, a.size).into());
        Ok(value.unwrap_or(a.size.mask()))
    }

    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        if let Some((f, reg)) = Self::decode(a.offset) {
            self.bus.config_write(f, reg, a.size, value as u32);
        }
        Ok(())
    }
}
