//! How a driver finds and reaches a virtio device.

pub mod mmio;
pub mod pci;
