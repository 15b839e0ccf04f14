//! A PCI host bridge on a small machine, and functions that are nothing but their registers.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, MemTxResult, MmioAccess, Requester};
use mimus_core::device::{MmioDevice, lock};
use mimus_core::irq::{IrqLine, MsiSink, MsiTarget};
use mimus_core::memory::MemoryRegion;

use super::Levels;
use super::memory::Memory;
use crate::pci::host_bridge::{Gpex, GpexWindows};
use crate::pci::{BarKind, ConfigSpace, DevFn, Msix, PciFunction, PciIds, PciSlot};

pub const ECAM: u64 = 0x3000_0000;
pub const MMIO32: u64 = 0x4000_0000;
pub const MMIO64: u64 = 0x4_0000_0000;
pub const WINDOW: u64 = 0x1000_0000;
pub const PIO: u64 = 0x0300_0000;

/// Messages sent: address, data, sender.
#[derive(Default)]
pub struct Messages(Mutex<Vec<(u64, u32, Requester)>>);

impl Messages {
    /// Since the last call.
    pub fn take(&self) -> Vec<(u64, u32, Requester)> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl MsiSink for Messages {
    fn deliver(&self, address: u64, data: u32, requester: Requester) -> MemTxResult {
        lock(&self.0).push((address, data, requester));
        MemTxResult::Ok
    }
}

pub struct PciMachine {
    pub memory: Memory,
    pub lines: [IrqLine; 4],
    pub levels: Arc<Levels>,
    pub messages: Arc<Messages>,
    pub gpex: Gpex,
}

impl PciMachine {
    pub fn new() -> Self {
        let memory = Memory::new();
        let (levels, messages) = (Levels::new(), Arc::new(Messages::default()));
        let lines: [IrqLine; 4] = std::array::from_fn(|i| levels.line(i as u32));
        let msi = MsiTarget::to_sink(messages.clone(), Requester::Unspecified);
        let windows = GpexWindows {
            ecam: (ECAM, 2 << 20),
            mmio32: (MMIO32, WINDOW),
            mmio64: Some((MMIO64, WINDOW)),
            pio: Some((PIO, 0x1_0000)),
        };
        let gpex = Gpex::new("pcie.0", &memory.space, &windows, lines.clone(), Some(msi)).unwrap();
        Self { memory, lines, levels, messages, gpex }
    }

    pub fn slot(&self, devfn: u8) -> PciSlot {
        self.gpex.bus().reserve(Some(DevFn(devfn))).unwrap()
    }

    /// A configuration read through ECAM.
    pub fn config(&self, devfn: u8, offset: u64, size: AccessSize) -> u32 {
        self.read(ECAM + (u64::from(devfn) << 12) + offset, size) as u32
    }

    pub fn set_config(&self, devfn: u8, offset: u64, size: AccessSize, value: u32) {
        assert!(self.memory.write(ECAM + (u64::from(devfn) << 12) + offset, size, value.into()).is_ok());
    }

    pub fn read(&self, addr: u64, size: AccessSize) -> u64 {
        let (value, result) = self.memory.read(addr, size);
        assert_eq!(result, MemTxResult::Ok, "{addr:#x}");
        value
    }

    /// Levels of INTA to INTD of device 0.
    pub fn wires(&self) -> [bool; 4] {
        std::array::from_fn(|i| self.lines[i].level())
    }
}

/// BARs 0 (memory, 32 bits), 1 (ports), 2 (memory, 64 bits, prefetchable), 4 (MSI-X with three vectors); INTA.
pub struct TestFunction {
    pub slot: PciSlot,
    pub config: Mutex<ConfigSpace>,
    pub msix: Arc<Msix>,
    /// Where its own capability is.
    pub capability: usize,
}

pub const IDS: PciIds = PciIds {
    vendor: 0x1af4,
    device: 0x5678,
    revision: 9,
    class: 0x12_3456,
    subsystem_vendor: 0xaa55,
    subsystem: 0x1234,
};

impl TestFunction {
    pub fn plug(slot: PciSlot) -> Arc<Self> {
        let msix = Msix::new(3, slot.msi().unwrap(), slot.dma_gate().clone());
        let mut config = ConfigSpace::new(IDS, &slot, true);
        let bars = [
            (0, BarKind::Memory32, 0x1000),
            (1, BarKind::Io, 0x20),
            (2, BarKind::Memory64 { prefetchable: true }, 0x4000),
        ];
        for (index, kind, len) in bars {
            let region = MemoryRegion::mmio(format!("bar{index}"), len, AccessRules::ANY);
            region.binding().unwrap().bind_mmio(Arc::new(BarBytes), index);
            config.add_bar(&slot, index as usize, kind, &region);
        }
        config.add_msix(&slot, 4, &msix, &msix.region("msix"));
        let capability = config.add_capability(9, &[1, 2, 3, 4, 5], &[0, 0xf0, 0xff]);
        let this = Arc::new(Self { config: Mutex::new(config), msix, capability, slot });
        this.slot.plug(this.clone());
        this
    }
}

impl PciFunction for TestFunction {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }
    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        lock(&self.config).write(offset, size, value);
    }
}

/// Reads as the BAR's number in the upper and the offset in the lower half.
struct BarBytes;

impl MmioDevice for BarBytes {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(u64::from(a.region) << 16 | a.offset)
    }
    fn mmio_write(&self, _: MmioAccess, _: u64) -> Result<(), BusFault> {
        Ok(())
    }
}
