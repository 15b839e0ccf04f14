//! A PCI bus: its functions, and what it gives each of them.

use super::DevFn;
use super::config_space::BarKind;
use super::intx::{IntxPin, IntxRouter};
use mimus_core::bus::{AccessSize, MemTxAttrs, Requester};
use mimus_core::irq::MsiTarget;
use mimus_core::memory::{AddressSpace, DmaGate, DmaHandle, MemoryMap, MemoryRegion, RegionHandle};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Header type, whose bit 7 says that device has more functions.
const HEADER_TYPE: u16 = 0x0e;
const MULTI_FUNCTION: u32 = 0x80;

/// Why something cannot be plugged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// Not an address.
    #[error("{0:?} is not a PCI address; write device.function in hexadecimal, such as 3 or 1f.7")]
    BadAddress(String),
    /// Somebody is there.
    #[error("{bus}: address {devfn} is taken")]
    Taken { bus: String, devfn: DevFn },
    /// Nowhere to go.
    #[error("{0}: all 32 devices are taken")]
    Full(String),
}

/// A PCI function as its bus sees it. Called with no lock held, on any thread.
pub trait PciFunction: Send + Sync {
    /// Reads 1, 2 or 4 bytes of configuration space.
    fn config_read(&self, offset: u16, size: AccessSize) -> u32;
    /// Writes 1, 2 or 4 bytes of configuration space.
    fn config_write(&self, offset: u16, size: AccessSize, value: u32);
    /// Bytes that each base address register decodes, for whoever looks from outside; 0: there is none.
    fn bar_lens(&self) -> [u64; 6] {
        [0; 6]
    }
}

type Functions = BTreeMap<DevFn, Option<Arc<dyn PciFunction>>>;

/// A root bus.
pub struct PciBus {
    name: String,
    /// Memory as its functions see it by DMA.
    system: Arc<AddressSpace>,
    /// Where memory BARs are mapped: PCI memory addresses.
    memory: MemoryRegion,
    /// Where port BARs are mapped.
    io: MemoryRegion,
    router: Arc<IntxRouter>,
    msi: Option<MsiTarget>,
    /// Plugged functions and, as `None`, reserved addresses. Leaf lock.
    functions: RwLock<Functions>,
}

impl PciBus {
    /// An empty bus whose functions master `system`. `msi` is where their messages go;
    /// without it they have INTx only.
    pub fn new(name: &str, system: &Arc<AddressSpace>, router: Arc<IntxRouter>, msi: Option<MsiTarget>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            system: system.clone(),
            memory: MemoryRegion::container(format!("{name}-memory"), u64::MAX),
            io: MemoryRegion::container(format!("{name}-io"), 0x1_0000),
            router,
            msi,
            functions: RwLock::default(),
        })
    }

    /// Its name: `pcie.0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine's memory map.
    pub fn map(&self) -> &Arc<MemoryMap> {
        self.system.map()
    }

    /// The container of memory BARs, for a host bridge's windows.
    pub fn memory(&self) -> &MemoryRegion {
        &self.memory
    }

    /// The container of port BARs.
    pub fn io(&self) -> &MemoryRegion {
        &self.io
    }

    fn functions(&self) -> RwLockReadGuard<'_, Functions> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn functions_mut(&self) -> RwLockWriteGuard<'_, Functions> {
        self.functions.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves `devfn`, or function 0 of the first device without any.
    pub fn reserve(self: &Arc<Self>, devfn: Option<DevFn>) -> Result<PciSlot, PciError> {
        let mut functions = self.functions_mut();
        let free = |d: &u8| functions.range(DevFn(d << 3)..=DevFn(d << 3 | 7)).next().is_none();
        let devfn = match devfn {
            Some(d) => d,
            None => (0..32).find(free).map(|d| DevFn(d << 3)).ok_or_else(|| PciError::Full(self.name.clone()))?,
        };
        if functions.contains_key(&devfn) {
            return Err(PciError::Taken { bus: self.name.clone(), devfn });
        }
        functions.insert(devfn, None);
        let wire = self.router.wire_of(devfn.device(), 0);
        Ok(PciSlot {
            bus: self.clone(),
            devfn,
            gate: DmaGate::new(false),
            intx: IntxPin::new(Some(self.router.clone()), wire),
            plugged: AtomicBool::new(false),
        })
    }

    /// Removes a function; the next to enumerate does not see it.
    pub fn unplug(&self, devfn: DevFn) {
        // Let go of without the lock: its slot, if this is the last of it, gives its address back.
        let function = self.functions_mut().remove(&devfn);
        drop(function);
    }

    /// Addresses of all functions.
    pub fn list(&self) -> Vec<DevFn> {
        self.functions().iter().filter(|(_, f)| f.is_some()).map(|(d, _)| *d).collect()
    }

    fn function(&self, devfn: DevFn) -> Option<Arc<dyn PciFunction>> {
        self.functions().get(&devfn).cloned().flatten()
    }

    /// True if the device has functions besides 0.
    fn is_multi_function(&self, device: u8) -> bool {
        let more = DevFn(device << 3 | 1)..=DevFn(device << 3 | 7);
        self.functions().range(more).any(|(_, f)| f.is_some())
    }

    /// A configuration read of 1, 2 or 4 bytes; all ones where nothing is.
    pub fn config_read(&self, devfn: DevFn, offset: u16, size: AccessSize) -> u32 {
        let Some(function) = self.function(devfn) else { return size.mask() as u32 };
        let mut value = function.config_read(offset, size);
        let covers = offset <= HEADER_TYPE && u64::from(HEADER_TYPE - offset) < size.bytes();
        if devfn.function() == 0 && covers && self.is_multi_function(devfn.device()) {
            value |= MULTI_FUNCTION << (8 * (HEADER_TYPE - offset));
        }
        value & size.mask() as u32
    }

    /// Bytes that each base address register of a function decodes; 0: there is none.
    pub fn bar_lens(&self, devfn: DevFn) -> [u64; 6] {
        self.function(devfn).map_or([0; 6], |f| f.bar_lens())
    }

    /// A configuration write of 1, 2 or 4 bytes; lost where nothing is.
    pub fn config_write(&self, devfn: DevFn, offset: u16, size: AccessSize, value: u32) {
        if let Some(function) = self.function(devfn) {
            function.config_write(offset, size, value);
        }
    }
}

/// A reserved address on a bus, and what a function there gets. Given back on drop unless
/// something was plugged.
pub struct PciSlot {
    bus: Arc<PciBus>,
    devfn: DevFn,
    gate: DmaGate,
    intx: Arc<IntxPin>,
    /// The address is the function's, not the slot's to give back.
    plugged: AtomicBool,
}

impl PciSlot {
    /// The bus.
    pub fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }

    /// The address.
    pub fn devfn(&self) -> DevFn {
        self.devfn
    }

    /// Bus 0, device, function: what DMA and messages are made as.
    pub fn requester(&self) -> Requester {
        Requester::Device(self.devfn.0.into())
    }

    /// The way to guest memory, closed until bus mastering is enabled.
    pub fn dma(&self) -> DmaHandle {
        let attrs = MemTxAttrs { requester: self.requester(), ..MemTxAttrs::default() };
        DmaHandle::new(self.bus.system.clone(), self.gate.clone(), attrs)
    }

    /// Bus mastering.
    pub fn dma_gate(&self) -> &DmaGate {
        &self.gate
    }

    /// The way to send messages, if the board has one.
    pub fn msi(&self) -> Option<MsiTarget> {
        self.bus.msi.as_ref().map(|m| m.for_requester(self.requester()))
    }

    /// Interrupt pin INTA.
    pub fn intx_pin(&self) -> &Arc<IntxPin> {
        &self.intx
    }

    /// A handle that maps `region` where BARs of this kind go.
    pub fn bar_region(&self, kind: BarKind, region: &MemoryRegion) -> RegionHandle {
        let container = match kind {
            BarKind::Io => &self.bus.io,
            _ => &self.bus.memory,
        };
        RegionHandle::new(self.bus.system.map(), region.clone(), Some(container), 0)
    }

    /// Applies map changes that were queued outside of an access. With no device lock held.
    pub fn apply_map_changes(&self) {
        self.bus.system.map().apply_pending();
    }

    /// Makes a finished function visible.
    pub fn plug(&self, function: Arc<dyn PciFunction>) {
        self.plugged.store(true, Ordering::Relaxed);
        self.bus.functions_mut().insert(self.devfn, Some(function));
    }
}

impl Drop for PciSlot {
    fn drop(&mut self) {
        if !*self.plugged.get_mut() {
            self.bus.functions_mut().remove(&self.devfn);
        }
    }
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
