//! Memory of a small machine, and devices on its bus.

use std::sync::Arc;

use mimus_core::bus::{AccessRules, AccessSize, GuestPhys, IoBinding, MemTxAttrs, MemTxResult};
use mimus_core::device::MmioDevice;
use mimus_core::memory::{AddressSpace, DmaHandle, GuestRam, MemoryMap, MemoryRegion, RamBacking};

pub const RAM: u64 = 0x8000_0000;
pub const RAM_LEN: u64 = 1 << 20;
const CPU: MemTxAttrs = MemTxAttrs::vcpu(0);

/// RAM at [`RAM`], ROM of a page below it.
pub struct Memory {
    pub map: Arc<MemoryMap>,
    pub space: Arc<AddressSpace>,
    pub blocks: Arc<GuestRam>,
}

impl Memory {
    pub fn new() -> Self {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let space = map.address_space("system", &root);
        let blocks = GuestRam::new();
        let ram = blocks.add_block("ram", RAM_LEN, RamBacking::Private).unwrap();
        let rom = blocks.add_block("rom", 0x1000, RamBacking::Private).unwrap();
        map.change(|t| {
            t.map(&root, RAM, &MemoryRegion::ram("ram", &ram));
            t.map(&root, RAM - 0x1000, &MemoryRegion::rom("rom", &rom));
        });
        Self { map, space, blocks }
    }

    pub fn dma(&self) -> DmaHandle {
        DmaHandle::ungated(self.space.clone())
    }

    pub fn put(&self, addr: u64, data: &[u8]) {
        self.dma().write(GuestPhys(addr), data).unwrap();
    }

    pub fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.dma().read(GuestPhys(addr), &mut out).unwrap();
        out
    }

    /// As a CPU reads.
    pub fn read(&self, addr: u64, size: AccessSize) -> (u64, MemTxResult) {
        self.space.read(GuestPhys(addr), size, CPU)
    }

    /// As a CPU writes.
    pub fn write(&self, addr: u64, size: AccessSize, value: u64) -> MemTxResult {
        self.space.write(GuestPhys(addr), size, value, CPU)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.map.teardown();
    }
}

/// A device's registers as the bus presents them.
pub struct OnBus(Arc<IoBinding>);

impl OnBus {
    pub fn new<D: MmioDevice + 'static>(device: &Arc<D>, rules: AccessRules) -> Self {
        let binding = IoBinding::new("registers", rules);
        binding.bind_mmio(device.clone(), 0);
        Self(binding)
    }

    /// The value a little-endian CPU loads, or how it fails.
    pub fn read(&self, offset: u64, size: AccessSize) -> Result<u64, MemTxResult> {
        match self.0.read(offset, size, CPU) {
            (value, MemTxResult::Ok) => Ok(value),
            (_, failure) => Err(failure),
        }
    }

    pub fn write(&self, offset: u64, size: AccessSize, value: u64) -> Result<(), MemTxResult> {
        match self.0.write(offset, size, value, CPU) {
            MemTxResult::Ok => Ok(()),
            failure => Err(failure),
        }
    }
}

/// Any of the four widths.
pub fn any_size(random: u64) -> AccessSize {
    [AccessSize::B1, AccessSize::B2, AccessSize::B4, AccessSize::B8][random as usize % 4]
}
