//! Generic PCI Express host bridge: ECAM and windows, nothing to program.
//!
//! Spec: PCIe §7.2.2 (ECAM); device tree binding `pci-host-ecam-generic`. One root bus;
//! other buses read as all ones. Checked with: Linux pci-host-generic.

use super::HostBridgeFunction;
use super::ecam::Ecam;
use crate::pci::bus::PciBus;
use crate::pci::intx::IntxRouter;
use crate::pci::{DevFn, PciError};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::MmioDevice;
use mimus_core::irq::{IrqLine, MsiTarget};
use mimus_core::memory::{AddressSpace, MemoryRegion};
use std::sync::Arc;

pub use super::ecam::ECAM_BUS_LEN;

/// Vendor and device number of the bridge's own function, those of QEMU's.
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0008;
/// Below the windows' contents.
const BACKGROUND: i32 = -1;

/// A range of system addresses: base and length in bytes.
pub type Window = (u64, u64);

/// Where a bridge is in system memory.
#[derive(Clone, Copy, Debug)]
pub struct GpexWindows {
    /// Configuration space, [`ECAM_BUS_LEN`] per bus.
    pub ecam: Window,
    /// Memory below 4 GiB; addresses are the same on both sides.
    pub mmio32: Window,
    /// Memory above 4 GiB; addresses are the same on both sides.
    pub mmio64: Option<Window>,
    /// Ports, from port 0 on.
    pub pio: Option<Window>,
}

/// A generic host bridge and its root bus.
pub struct Gpex {
    bus: Arc<PciBus>,
    function: Arc<HostBridgeFunction>,
}

impl Gpex {
    /// A bridge in `system` at `windows`. INTA to INTD of device 0 are `irqs`; a pin of
    /// another device is on the wire [`IntxRouter::wire`] says.
    pub fn new(
        name: &str,
        system: &Arc<AddressSpace>,
        windows: &GpexWindows,
        irqs: [IrqLine; 4],
        msi: Option<MsiTarget>,
    ) -> Result<Self, PciError> {
        let bus = PciBus::new(name, system, IntxRouter::new(irqs), msi);
        let function = HostBridgeFunction::plug(bus.reserve(Some(DevFn(0)))?, VENDOR, DEVICE);
        map_windows(name, system, windows, &bus);
        Ok(Self { bus, function })
    }

    /// The root bus.
    pub fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }

    /// The bridge's own function: a device to be reset and saved.
    pub fn function(&self) -> &Arc<HostBridgeFunction> {
        &self.function
    }
}

fn map_windows(name: &str, system: &Arc<AddressSpace>, w: &GpexWindows, bus: &Arc<PciBus>) {
    let region = |what: &str, len, rules, device: Arc<dyn MmioDevice>| {
        let region = MemoryRegion::mmio(format!("{name}-{what}"), len, rules);
        if let Some(binding) = region.binding() {
            binding.bind_mmio(device, 0);
        }
        region
    };
    let config = AccessRules::sizes(AccessSize::B1, AccessSize::B4);
    let ecam = region("ecam", w.ecam.1, config, Arc::new(Ecam::new(bus)));
    let memory = Some((w.mmio32, "mmio32")).into_iter().chain(w.mmio64.map(|w| (w, "mmio64")));
    let memory = memory.map(|(w, what)| (w, what, bus.memory(), w.0));
    let all = memory.chain(w.pio.map(|w| (w, "pio", bus.io(), 0)));
    system.map().change(|t| {
        let root = system.root();
        t.map(root, w.ecam.0, &ecam);
        for ((base, len), what, target, offset) in all {
            let alias = MemoryRegion::alias(format!("{name}-{what}"), target, offset, len);
            t.map(root, base, &alias);
            let rules = AccessRules::ANY.with_unaligned();
            let unclaimed = region(&format!("{what}-unclaimed"), len, rules, Arc::new(Unclaimed));
            t.map_with_priority(root, base, BACKGROUND, &unclaimed);
        }
    });
}

/// Addresses of a window that no BAR claims: a master abort, which reads as all ones.
pub(super) struct Unclaimed;

impl MmioDevice for Unclaimed {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(a.size.mask())
    }
    fn mmio_write(&self, _a: MmioAccess, _value: u64) -> Result<(), BusFault> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "gpex_tests.rs"]
mod tests;
