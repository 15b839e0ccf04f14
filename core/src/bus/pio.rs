//! The x86 port space: 64 Ki ports, unclaimed reads give all-ones, no faults.

use super::access::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
use crate::memory::{AddressSpace, MemoryMap, MemoryRegion};
use std::sync::Arc;

/// Number of ports.
pub const PIO_PORTS: u64 = 0x1_0000;

/// The port space of a machine. Regions are placed in [`PioSpace::root`] like memory
/// regions, with priorities and aliases.
pub struct PioSpace {
    root: MemoryRegion,
    space: Arc<AddressSpace>,
}

impl PioSpace {
    /// An empty port space whose changes are committed by `map`.
    pub fn new(map: &Arc<MemoryMap>) -> Arc<Self> {
        let root = MemoryRegion::container("io", PIO_PORTS);
        let space = map.address_space("io", &root);
        Arc::new(Self { root, space })
    }

    /// The container ports are mapped in.
    pub fn root(&self) -> &MemoryRegion {
        &self.root
    }

    /// The address space behind it.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// `IN`.
    pub fn read(&self, port: u16, size: AccessSize, attrs: MemTxAttrs) -> u64 {
        match self.space.read(GuestPhys(port.into()), size, attrs) {
            (value, MemTxResult::Ok) => value,
            _ => size.mask(),
        }
    }

    /// `OUT`. A write nothing takes is lost.
    pub fn write(&self, port: u16, size: AccessSize, value: u64, attrs: MemTxAttrs) {
        let _ = self.space.write(GuestPhys(port.into()), size, value, attrs);
    }
}
