//! A device's way to guest memory: RAM and ROM only, gated by bus mastering.

use super::address_space::AddressSpace;
use super::guest_ram::{RamSlice, RamWord};
use crate::bus::{BusFault, GuestPhys, MemTxAttrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a device may master its bus (PCI command register bit 2). Shared between the
/// bus, which switches it, and the device's [`DmaHandle`]s.
#[derive(Clone, Debug)]
pub struct DmaGate(Arc<AtomicBool>);

impl DmaGate {
    /// An open or closed gate.
    pub fn new(open: bool) -> Self {
        Self(Arc::new(AtomicBool::new(open)))
    }

    /// Opens or closes it.
    pub fn set(&self, open: bool) {
        self.0.store(open, Ordering::Release);
    }

    /// True if DMA passes.
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Access to guest memory for one device. Every failure is [`BusFault`]: the gate is
/// closed or the address is a device (`Access`), or nothing is there (`Decode`).
#[derive(Clone, Debug)]
pub struct DmaHandle {
    space: Arc<AddressSpace>,
    gate: DmaGate,
    attrs: MemTxAttrs,
}

impl DmaHandle {
    /// DMA through `space` as `attrs`, while `gate` is open.
    pub fn new(space: Arc<AddressSpace>, gate: DmaGate, attrs: MemTxAttrs) -> Self {
        Self { space, gate, attrs }
    }

    /// DMA that is always allowed: devices that sit on the system bus.
    pub fn ungated(space: Arc<AddressSpace>) -> Self {
        Self::new(space, DmaGate::new(true), MemTxAttrs::default())
    }

    /// The gate.
    pub fn gate(&self) -> &DmaGate {
        &self.gate
    }

    /// Who the accesses are made as.
    pub fn attrs(&self) -> MemTxAttrs {
        self.attrs
    }

    /// The RAM behind `[addr, addr+len)`, as few pieces as the map allows. `write` asks
    /// for memory that may be written.
    pub fn ram_slices(&self, addr: GuestPhys, len: u64, write: bool) -> Result<Vec<RamSlice>, BusFault> {
        let mut out = Vec::new();
        self.for_each(addr, len, write, |slice, _| {
            out.push(slice);
            Ok(())
        })?;
        Ok(out)
    }

    /// Copies out.
    pub fn read(&self, addr: GuestPhys, buf: &mut [u8]) -> Result<(), BusFault> {
        let len = buf.len() as u64;
        self.for_each(addr, len, false, |slice, at| {
            let at = at as usize;
            copied(slice.read(0, &mut buf[at..at + slice.len() as usize]))
        })
    }

    /// Copies in. Part of it may be written before a failure.
    pub fn write(&self, addr: GuestPhys, data: &[u8]) -> Result<(), BusFault> {
        self.for_each(addr, data.len() as u64, true, |slice, at| {
            let at = at as usize;
            copied(slice.write(0, &data[at..at + slice.len() as usize]))
        })
    }

    /// Fills with `byte`.
    pub fn fill(&self, addr: GuestPhys, len: u64, byte: u8) -> Result<(), BusFault> {
        self.for_each(addr, len, true, |slice, _| {
            slice.fill(byte);
            Ok(())
        })
    }

    /// Reads a little-endian `u16`.
    pub fn read_u16(&self, addr: GuestPhys) -> Result<u16, BusFault> {
        self.load(addr)
    }

    /// Reads a little-endian `u32`.
    pub fn read_u32(&self, addr: GuestPhys) -> Result<u32, BusFault> {
        self.load(addr)
    }

    /// Reads a little-endian `u64`.
    pub fn read_u64(&self, addr: GuestPhys) -> Result<u64, BusFault> {
        self.load(addr)
    }

    /// Writes a little-endian `u16`.
    pub fn write_u16(&self, addr: GuestPhys, value: u16) -> Result<(), BusFault> {
        self.store(addr, value)
    }

    /// Writes a little-endian `u32`.
    pub fn write_u32(&self, addr: GuestPhys, value: u32) -> Result<(), BusFault> {
        self.store(addr, value)
    }

    /// Writes a little-endian `u64`.
    pub fn write_u64(&self, addr: GuestPhys, value: u64) -> Result<(), BusFault> {
        self.store(addr, value)
    }

    /// Loads a word that lies in one block: atomic with acquire order if aligned.
    pub fn load<T: RamWord>(&self, addr: GuestPhys) -> Result<T, BusFault> {
        let (slice, _) = self.run(addr, size_of::<T>() as u64, false)?;
        slice.block().load(slice.offset()).ok_or(BusFault::Decode)
    }

    /// Stores a word that lies in one block: atomic with release order if aligned.
    pub fn store<T: RamWord>(&self, addr: GuestPhys, value: T) -> Result<(), BusFault> {
        let (slice, _) = self.run(addr, size_of::<T>() as u64, true)?;
        copied(slice.block().store(slice.offset(), value))
    }

    /// The first RAM piece of `[addr, addr+len)` and how many bytes remain after it.
    fn run(&self, addr: GuestPhys, len: u64, write: bool) -> Result<(RamSlice, u64), BusFault> {
        if !self.gate.is_open() {
            return Err(BusFault::Access);
        }
        let Some((block, offset, n, writable)) = self.space.ram_run(addr, len) else {
            let decoded = self.space.load().lookup(addr).is_some();
            return Err(if decoded { BusFault::Access } else { BusFault::Decode });
        };
        if write && !writable {
            return Err(BusFault::Access);
        }
        let slice = RamSlice::new(block, offset, n).ok_or(BusFault::Decode)?;
        Ok((slice, len - n))
    }

    fn for_each(
        &self,
        addr: GuestPhys,
        len: u64,
        write: bool,
        mut f: impl FnMut(RamSlice, u64) -> Result<(), BusFault>,
    ) -> Result<(), BusFault> {
        let mut left = len;
        while left > 0 {
            let at = addr.checked_add(len - left).ok_or(BusFault::Decode)?;
            let (slice, rest) = self.run(at, left, write)?;
            f(slice, len - left)?;
            left = rest;
        }
        Ok(())
    }
}

fn copied(done: bool) -> Result<(), BusFault> {
    done.then_some(()).ok_or(BusFault::Decode)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::AccessRules;
    use crate::memory::{GuestRam, MemoryMap, MemoryRegion, RamBacking};

    fn setup() -> DmaHandle {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let space = map.address_space("system", &root);
        let ram = GuestRam::new();
        let low = ram.add_block("low", 0x1000, RamBacking::Private).unwrap();
        let high = ram.add_block("high", 0x1000, RamBacking::Private).unwrap();
        let rom = ram.add_block("rom", 0x1000, RamBacking::Private).unwrap();
        map.change(|t| {
            t.map(&root, 0x1000, &MemoryRegion::ram("low", &low));
            t.map(&root, 0x2000, &MemoryRegion::ram("high", &high));
            t.map(&root, 0x3000, &MemoryRegion::mmio("dev", 0x1000, AccessRules::ANY));
            t.map(&root, 0x4000, &MemoryRegion::rom("rom", &rom));
        });
        DmaHandle::new(space, DmaGate::new(true), MemTxAttrs::device(8))
    }

    #[test]
    fn ram_only_and_across_blocks() {
        let dma = setup();
        dma.write(GuestPhys(0x1ffe), &[1, 2, 3, 4]).unwrap();
        let mut out = [0; 4];
        dma.read(GuestPhys(0x1ffe), &mut out).unwrap();
        assert_eq!(out, [1, 2, 3, 4]);
        assert_eq!(dma.read_u16(GuestPhys(0x2000)), Ok(0x0403));
        assert_eq!(dma.ram_slices(GuestPhys(0x1ff0), 0x20, true).unwrap().len(), 2);
        assert_eq!(dma.write(GuestPhys(0x2fff), &[0; 2]), Err(BusFault::Access));
        assert_eq!(dma.write_u32(GuestPhys(0x4000), 1), Err(BusFault::Access));
        assert_eq!(dma.read_u32(GuestPhys(0x4000)), Ok(0));
        assert_eq!(dma.read_u64(GuestPhys(0x9000)), Err(BusFault::Decode));
        assert_eq!(dma.ram_slices(GuestPhys(u64::MAX - 1), 16, false).unwrap_err(), BusFault::Decode);
        dma.fill(GuestPhys(0x1ffe), 4, 9).unwrap();
        assert_eq!(dma.read_u16(GuestPhys(0x1ffe)), Ok(0x0909));
    }

    #[test]
    fn the_gate_closes() {
        let dma = setup();
        dma.gate().set(false);
        assert_eq!(dma.read_u32(GuestPhys(0x1000)), Err(BusFault::Access));
    }
}
