//! South bridges: how PCI interrupts reach the interrupt controllers, and where power management is.

pub mod ich9;
pub mod piix;
pub mod pirq;
#[cfg(test)]
mod tests;

pub use ich9::Ich9Lpc;
pub use piix::{Piix3, Piix4Pm};
pub use pirq::PirqRouter;

use super::bus::PciSlot;
use super::config_space::BarKind;
use crate::acpi::pm::{self, AcpiPm};
use mimus_core::memory::{MemoryRegion, RegionHandle};
use std::sync::{Arc, Mutex};

/// The power management block as a region of the bus's ports.
fn pm_region(name: &str, slot: &PciSlot, pm: &Arc<Mutex<AcpiPm>>, len: u64) -> RegionHandle {
    let region = MemoryRegion::mmio(name, len, pm::RULES);
    if let Some(binding) = region.binding() {
        binding.bind_pio(pm.clone(), pm::REGION_BLOCK);
    }
    slot.bar_region(BarKind::Io, &region)
}

/// Places the block at `base`, or nowhere.
fn place(region: &RegionHandle, base: Option<u64>) {
    match base {
        Some(base) if base != 0 => region.map(base),
        _ => region.unmap(),
    }
}
